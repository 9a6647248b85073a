# SPDX-License-Identifier: Apache-2.0
"""Folders of diffusers' autoencoders: every layout of files, and every fault in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from latte.autoencoder.codec import CODECS, CodecConfig, build_codec, decoder_for, kind_at
from latte.checks import InputError
from tiny_external import CASES, save_external

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each case, with the autoencoder in ``vae``."""
    root = tmp_path_factory.mktemp("external")
    for name in CASES:
        save_external(name, root / name)
    return root


@pytest.fixture
def wan(saved, tmp_path):
    """A copy of Wan's that a test may spoil."""
    shutil.copytree(saved / "wan", tmp_path / "wan")
    return tmp_path / "wan"


def change(folder, **values) -> None:
    """Change keys of the config.json in ``folder``/vae; None removes one."""
    config = folder / "vae" / "config.json"
    changed = json.loads(config.read_text()) | values
    config.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def load(folder, name: str = "wan"):
    return build_codec(CodecConfig(name, str(folder)))


@pytest.mark.parametrize("name", list(CASES))
def test_a_folder_says_which_codec_it_is(saved, name):
    for place in (saved / name, saved / name / "vae"):
        assert kind_at(str(place)) is CODECS[CASES[name].codec]
    skeleton = CODECS[CASES[name].codec].skeleton(str(saved / name))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert {key: value.shape for key, value in skeleton.state_dict().items()} == {
        key: value.shape for key, value in load(saved / name, CASES[name].codec).network.state_dict().items()
    }


def test_containers_of_the_same_weights_are_one_codec(wan):
    fingerprint = load(wan).fingerprint
    assert load(wan / "vae").fingerprint == fingerprint
    file = wan / "vae" / WEIGHTS
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, file.with_suffix(".bin"))
    assert load(wan).fingerprint == fingerprint
    file.with_suffix(".bin").unlink()
    names = sorted(tensors)
    parts = {"first.safetensors": names[:9], "second.safetensors": names[9:]}
    for part, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, wan / "vae" / part)
    index = wan / "vae" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {key: part for part, keys in parts.items() for key in keys}}))
    assert load(wan).fingerprint == fingerprint
    (wan / "vae" / "second.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"has vae/config.json but no second.safetensors; it is half downloaded"
    ):
        load(wan)
    index.write_text("[]")
    with pytest.raises(InputError, match="lists no weight files"):
        load(wan)


def test_weights_of_16_bits_are_read(wan):
    file = wan / "vae" / WEIGHTS
    tensors = load_file(file)
    save_file(
        {key: tensor.half() for key, tensor in tensors.items()},
        wan / "vae" / "diffusion_pytorch_model.fp16.safetensors",
    )
    file.unlink()
    network = load(wan).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    for key, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, tensors[key].half().float(), rtol=0, atol=0)


def test_a_hub_id_is_read_as_a_folder_is(wan, monkeypatch):
    def download(repo: str, name: str) -> str:
        if not (wan / name).is_file():
            raise FileNotFoundError(f"{name} is not in {repo}")
        return str(wan / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert CODECS["wan"].compression_at("some/video") == load(wan).compression
    assert load("some/video").fingerprint == load(wan).fingerprint
    assert kind_at("some/video") is CODECS["wan"]


def spoil(folder, fault: str) -> None:
    """Break the copy of Wan's in ``folder``."""
    file = folder / "vae" / WEIGHTS
    tensors = load_file(file)
    if fault == "half downloaded":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    elif fault == "lacks":
        del tensors["quant_conv.weight"]
        save_file(tensors, file)
    elif fault == "non-finite":
        tensors["quant_conv.weight"][0, 0] = torch.nan
        save_file(tensors, file)
    elif fault == "of shape":
        change(folder, base_dim=8)
    elif fault == "encodes 4 channels":
        change(folder, in_channels=4)
    elif fault == "compresses time 2 times":
        change(folder, temperal_downsample=[False, False, True])
    elif fault == "does not describe":
        change(folder, dim_mult="wide")
    elif fault == "it is no object":
        (folder / "vae" / "config.json").write_text("[]")
    elif fault == "set codec.name=ltx":
        change(folder, _class_name="AutoencoderKLLTXVideo")
    elif fault == "set codec.name=diffusers":
        change(folder, _class_name="AutoencoderKLMochi")
    elif fault == "no config.json":
        (folder / "vae" / "config.json").unlink()


OF_WEIGHTS = ("half downloaded", "truncated", "lacks", "non-finite", "of shape", "does not describe")
OF_CONFIG = (
    "encodes 4 channels",
    "compresses time 2 times",
    "it is no object",
    "set codec.name=ltx",
    "set codec.name=diffusers",
    "no config.json",
)


@pytest.mark.parametrize("fault", [*OF_WEIGHTS, *OF_CONFIG])
def test_every_fault_is_one_line(wan, fault):
    spoil(wan, fault)
    readers = [load]
    if fault in OF_CONFIG:  # found before any weight is read
        readers += [lambda folder: CODECS["wan"].compression_at(str(folder))]
    for reader in readers:
        with pytest.raises(InputError, match="NaN or Inf" if fault == "non-finite" else fault) as caught:
            reader(wan)
        assert "\n" not in str(caught.value)
        assert "codec.path" in str(caught.value)
        assert str(wan) in str(caught.value)


@pytest.mark.parametrize("name", sorted({case.codec for case in CASES.values()}))
def test_a_path_that_is_nothing_and_none_are_refused(name, tmp_path):
    with pytest.raises(InputError, match=r"nothing is no folder, and not a hub id"):
        CODECS[name].compression_at(str(tmp_path / "nothing"))
    with pytest.raises(
        InputError, match=r"no-owner/none is no folder here .* the hub id has no config\.json"
    ):
        CODECS[name].compression_at("no-owner/none")
    with pytest.raises(
        InputError, match=rf"codec.path is missing, but codec '{name}' needs {CODECS[name].layout}"
    ):
        build_codec(CodecConfig(name))


def test_moments_are_part_of_the_fingerprint_and_of_what_decoders_must_share(wan, saved):
    before = load(wan)
    assert decoder_for(before, str(wan)).fingerprint == before.fingerprint
    change(wan, latents_std=[1.5, 2.0, 0.7, 2.0])
    after = load(wan)
    assert after.fingerprint != before.fingerprint
    with pytest.raises(InputError, match=r"--decoder .*own means and deviations, but the model's are"):
        decoder_for(before, str(wan))
    with pytest.raises(
        InputError, match=r"--decoder .*: its latents are 6 channels, 16 times smaller each way"
    ):
        decoder_for(before, str(saved / "wan_22"))
    scaled = [load(saved / "hunyuan", "hunyuan").scale, load(saved / "cogvideox", "cogvideox").scale]
    assert scaled == [0.476986, 0.7]


def test_moments_that_no_pipeline_applies_are_refused(saved, tmp_path):
    shutil.copytree(saved / "cogvideox", tmp_path / "copy")
    change(tmp_path / "copy", shift_factor=0.1)
    with pytest.raises(InputError, match="it sets shift_factor, which no pipeline of CogVideoX applies"):
        CODECS["cogvideox"].compression_at(str(tmp_path / "copy"))
