# SPDX-License-Identifier: Apache-2.0
"""The KL autoencoder.

The same numbers as diffusers' own, every way its folder can be laid out, and every fault in one line.
"""

import json
import shutil

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from support import noise

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.autoencoder.kl import KLCodec
from latte.checks import InputError
from latte.runtime import generator

BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
TINY = {
    **BLOCKS,
    "block_out_channels": [4, 4, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole pipeline's folder with a tiny autoencoder in ``vae``."""
    root = tmp_path_factory.mktemp("pipeline")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(**TINY).save_pretrained(root / "vae")
    return root


@pytest.fixture
def pipeline(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def load(path) -> KLCodec:
    return build_codec(CodecConfig("kl", str(path)))


def test_equals_diffusers(saved):
    codec, vae = load(saved), AutoencoderKL.from_pretrained(saved / "vae", low_cpu_mem_usage=False)
    frames = noise(1, 3, 3, 16, 24).clamp(-1, 1)
    with torch.no_grad():
        posterior = vae.encode(frames[0]).latent_dist
        torch.testing.assert_close(codec.encode(frames)[0], posterior.mean * 0.18215)
        torch.testing.assert_close(
            codec.encode(frames, generator(5))[0], posterior.sample(generator(5)) * 0.18215
        )
        latent = noise(1, 3, 4, 2, 3)
        torch.testing.assert_close(
            codec.decode(latent)[0], vae.decode(latent[0] / 0.18215).sample.clamp(-1, 1)
        )


def test_the_chunk_changes_no_draw(saved):
    frames = noise(2, 3, 3, 16, 16).clamp(-1, 1)
    one, two = (
        build_codec(CodecConfig("kl", str(saved), chunk)).encode(frames, generator(1)) for chunk in (16, 4)
    )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_the_scale_of_the_weights_is_kept(pipeline):
    before = load(pipeline)
    config = pipeline / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    after = load(pipeline)
    frames = noise(1, 1, 3, 16, 16).clamp(-1, 1)
    torch.testing.assert_close(after.encode(frames) / 0.5, before.encode(frames) / 0.18215)
    assert after.fingerprint != before.fingerprint


def test_layouts_names_and_containers_are_one_codec(pipeline):
    fingerprint = load(pipeline).fingerprint
    assert load(pipeline / "vae").fingerprint == fingerprint
    weights = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors, renamed = load_file(weights), 0
    for new, name in old.items():
        hits = [key for key in tensors if f".{new}." in key]
        renamed += len(hits)
        tensors |= {key.replace(f".{new}.", f".{name}."): tensors.pop(key) for key in hits}
    assert renamed == 16  # weight and bias of four projections in two attentions
    save_file(tensors, weights)
    assert load(pipeline).fingerprint == fingerprint
    weights.unlink()
    torch.save(tensors, weights.with_suffix(".bin"))
    assert load(pipeline).fingerprint == fingerprint


def test_stable_diffusion_1_4_fits():
    """83,653,863 parameters in 248 tensors (Latte's reference facts, section 4.5), counted without memory."""
    with torch.device("meta"):
        vae = AutoencoderKL(
            **BLOCKS, block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4
        )
    assert (sum(p.numel() for p in vae.parameters()), len(vae.state_dict())) == (83_653_863, 248)


def spoil(root, fault: str) -> None:
    vae = root / "vae"
    weights, config = vae / "diffusion_pytorch_model.safetensors", vae / "config.json"
    values = json.loads(config.read_text())
    if fault == "half downloaded":
        weights.unlink()
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif fault == "lacks":
        tensors = load_file(weights)
        del tensors["quant_conv.weight"]
        save_file(tensors, weights)
    elif fault == "of shape":
        values["block_out_channels"] = [8, 8, 16, 16]
    elif fault == "layout":
        values["_class_name"] = "AutoencoderKLTemporalDecoder"
    elif fault == "channels":
        values["latent_channels"] = 16
    elif fault == "shift":
        values["shift_factor"] = 0.1
    elif fault == "does not describe":
        values["block_out_channels"] = "wide"
    config.write_text("{" if fault == "config.json does" else json.dumps(values))
    if fault == "no config.json":
        config.unlink()


FAULTS = (
    "half downloaded",
    "truncated",
    "lacks",
    "of shape",
    "layout",
    "channels",
    "shift",
    "does not describe",
    "config.json does",
)


@pytest.mark.parametrize("fault", [*FAULTS, "no config.json"])
def test_every_fault_is_one_line(pipeline, fault):
    spoil(pipeline, fault)
    with pytest.raises(InputError, match=fault) as caught:
        load(pipeline)
    assert "\n" not in str(caught.value)
    assert str(pipeline) in str(caught.value)


def test_a_path_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder, and not a hub id"):
        load(tmp_path / "missing")


def test_a_hub_id_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"no-owner/no-such-vae is no folder here .* the hub id has no config\.json.*\(.+\)"
    ) as caught:
        load("no-owner/no-such-vae")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_read_as_a_folder_is(pipeline, monkeypatch):
    asked = []

    def download(repo: str, name: str) -> str:
        asked.append((repo, name))
        if not (pipeline / name).is_file():
            raise FileNotFoundError(f"{name} is not in {repo}")
        return str(pipeline / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load("someone/something").fingerprint == load(pipeline).fingerprint
    assert asked[0] == ("someone/something", "vae/config.json")
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="half downloaded"):
        load("someone/something")
