# SPDX-License-Identifier: Apache-2.0
"""A trained model comes back bit for bit from a run or a weights folder, or is refused with the reason."""

import ast
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import latte
from latte.autoencoder.codec import CodecConfig, build_codec
from latte.build import build
from latte.checkpoint.record import RENAMED_KEYS
from latte.checks import InputError
from latte.config.run import load_run
from latte.inference.generate import SampleConfig
from latte.inference.pipeline import VideoPipeline
from latte.interop.readers import BUILTIN
from latte.model.latte import Latte
from latte.model.text import LatteText
from latte.text.encoders import BuiltinEncoder
from tiny import CLASSES, WORDS, tiny_trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    job = build(load_run("shapes", [*WORDS, "train.steps=2", f"run.dir={folder}"])[0], "cpu")
    return folder, job.train()


def test_a_run_gives_its_ema_weights(run):
    folder, result = run
    trained = VideoPipeline.from_pretrained(folder, device="cpu")
    assert (trained.weights, trained.classes, trained.sample.steps) == (result["weights_sha256"], CLASSES, 3)
    ema = load_file(folder / "checkpoints/step-2/ema.safetensors")
    assert all(torch.equal(tensor, ema[name]) for name, tensor in trained.model.state_dict().items())
    assert (
        VideoPipeline.from_pretrained(folder / "checkpoints/step-2", device="cpu").weights == trained.weights
    )


def test_a_weights_folder_keeps_everything_and_from_pretrained_reads_it(tmp_path):
    trained = tiny_trained()
    trained.save_pretrained(tmp_path / "w")
    again = VideoPipeline.from_pretrained(tmp_path / "w", device="cpu")
    for key in ("diffusion", "codec_config", "classes", "sample"):
        assert getattr(again, key) == getattr(trained, key)
    assert again.model.config == trained.model.config
    (_, one), (_, other) = next(trained.generate([7], ["left"])), next(again.generate([7], ["left"]))
    assert (one == other).all()
    assert again.buckets == ()
    plain = Latte.from_pretrained(str(tmp_path / "w"))
    assert all(
        torch.equal(tensor, trained.model.state_dict()[name]) for name, tensor in plain.state_dict().items()
    )


def test_a_weights_folder_keeps_the_shapes_of_the_training(tmp_path):
    trained = tiny_trained()
    frames, height, width = trained.num_frames, *trained.frame_size()
    trained.buckets = ((frames, height, width), (2 * frames, height, width), (1, height, 2 * width))
    trained.save_pretrained(tmp_path / "w")
    again = VideoPipeline.from_pretrained(tmp_path / "w", device="cpu")
    assert again.buckets == trained.buckets
    rows, columns = again.model.config.grid_size
    assert again.model.trained_extent == (again.codec.latent_frames(2 * frames), rows, 2 * columns)
    trained.buckets = ((frames, height, "wide"),)
    trained.save_pretrained(tmp_path / "bad")
    with pytest.raises(InputError, match=r"config.json: buckets: .*; correct it there"):
        VideoPipeline.from_pretrained(tmp_path / "bad", device="cpu")


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A run of two steps of a model that reads captions."""
    folder = tmp_path_factory.mktemp("runs") / "words"
    build(load_run("shapes-text", [*WORDS, "train.steps=2", f"run.dir={folder}"])[0], "cpu").train()
    return folder


def test_a_text_run_comes_back_with_its_reader_and_so_does_its_folder(text_run, tmp_path):
    trained = VideoPipeline.from_pretrained(text_run, device="cpu", prompts=["red"])
    assert isinstance(trained.model, LatteText)
    assert set(trained.reader.known.features) == {"", "red"}
    trained.save_pretrained(tmp_path / "w")
    again = VideoPipeline.from_pretrained(tmp_path / "w", device="cpu")
    assert (again.model.config, again.reader.config) == (trained.model.config, trained.reader.config)
    assert again.reader.fingerprint == trained.reader.fingerprint
    clips = [next(one.generate([7], prompts=["a red circle moves up"]))[1] for one in (trained, again)]
    assert (clips[0] == clips[1]).all()
    plain = LatteText.from_pretrained(str(tmp_path / "w"))
    assert all(
        torch.equal(tensor, trained.model.state_dict()[name]) for name, tensor in plain.state_dict().items()
    )


def test_another_text_encoder_than_the_runs_is_refused(text_run, monkeypatch):
    monkeypatch.setattr(BuiltinEncoder, "fingerprint", "0" * 16)
    with pytest.raises(
        InputError, match="the text encoder is builtin 0000000000000000, but the model was trained with"
    ):
        VideoPipeline.from_pretrained(text_run, device="cpu", prompts=["red"])


def test_a_text_model_of_another_configuration_is_refused(text_run):
    config = (text_run / "config.yaml").read_text()
    try:
        (text_run / "config.yaml").write_text(config.replace("gated_time: false", "gated_time: true"))
        with pytest.raises(InputError, match=r"model.gated_time is True, but .* was trained with False"):
            VideoPipeline.from_pretrained(text_run, device="cpu")
    finally:
        (text_run / "config.yaml").write_text(config)


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    tiny_trained().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="altered"):
        VideoPipeline.from_pretrained(tmp_path, device="cpu")


def test_truncated_weights_are_noticed(tmp_path):
    tiny_trained().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model.safetensors"):
        VideoPipeline.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda card: card.pop("codec"), "give its autoencoder"),
        (lambda card: card.pop("width"), "does not describe a Latte model"),
        (lambda card: card.update(width=20), "of shape"),
        (lambda card: card.update(depth=4), "lacks blocks"),
        (lambda card: card.update(depth="deep"), "depth"),
        (lambda card: card["codec"].update(fingerprint="0" * 16), "was trained on the latents of 0000"),
        (  # the key of version 0.1.0
            lambda card: card.update(codec={"name": "builtin", "path": None, "identity": "0" * 16}),
            "was trained on the latents of 0000",
        ),
        (lambda card: card["codec"].update(name="pixel"), "codec.name"),
        (lambda card: card["diffusion"].update(beta=3), "beta"),
        (lambda card: card["sample"].update(sampler="magic"), "sample.sampler"),
        (lambda card: card.clear(), "does not describe a Latte model"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path, change, words):
    tiny_trained().save_pretrained(tmp_path)
    card = json.loads((tmp_path / "config.json").read_text())
    change(card)
    (tmp_path / "config.json").write_text(json.dumps(card))
    with pytest.raises(InputError, match=words):
        VideoPipeline.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 50_000, '{"size": 1}'])
def test_a_card_that_is_no_card_is_refused(tmp_path, text):
    tiny_trained().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"does not describe a Latte model|config.json: size"):
        VideoPipeline.from_pretrained(tmp_path, device="cpu")


def test_tensors_too_many_are_refused(tmp_path):
    tiny_trained().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "extra": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="has the unexpected tensor extra"):
        VideoPipeline.from_pretrained(tmp_path, device="cpu")


def test_a_checkpoint_of_another_configuration_is_refused(run):
    folder, _ = run
    config = (folder / "config.yaml").read_text()
    try:
        (folder / "config.yaml").write_text(config.replace("width: 16", "width: 32"))
        with pytest.raises(InputError, match=r"model.width is 32, but .* was trained with 16"):
            VideoPipeline.from_pretrained(folder, device="cpu")
        (folder / "config.yaml").write_text(config.replace("num_steps: 1000", "num_steps: 500"))
        with pytest.raises(InputError, match=r"diffusion.num_steps is 500"):
            VideoPipeline.from_pretrained(folder, device="cpu")
    finally:
        (folder / "config.yaml").write_text(config)


def test_a_run_without_a_checkpoint_says_how_to_make_one(tmp_path):
    (tmp_path / "config.yaml").write_text("version: 1\n")
    with pytest.raises(InputError, match="latte train"):
        VideoPipeline.from_pretrained(tmp_path, device="cpu")


def test_what_is_no_model_is_refused_with_what_would_be(tmp_path):
    with pytest.raises(InputError, match="builtin"):
        VideoPipeline.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(InputError, match="nowhere"):
        VideoPipeline.from_pretrained("nowhere", device="cpu")


def test_a_missing_builtin_model_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(BUILTIN, "builtin", tmp_path)
    with pytest.raises(InputError, match="install latte again"):
        VideoPipeline.from_pretrained(device="cpu")


def test_a_hub_id_offline_is_refused_without_asking_the_network(monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        VideoPipeline.from_pretrained("owner/nothing", device="cpu")


def test_public_names_exist_and_none_is_the_name_of_a_module():
    modules = {path.stem for path in Path(latte.__file__).parent.iterdir()}
    for name in latte.__all__:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            assert getattr(latte, name) is not None
        assert name not in modules, f"importing latte.{name} would replace it"
    assert set(latte.__all__) <= set(dir(latte))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = latte.nothing


def test_type_checkers_see_every_public_name():
    """The names under TYPE_CHECKING are those that are imported at first use, from the same modules."""
    tree = ast.parse(Path(latte.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.asname: node.module for node in block.body for alias in node.names if alias.asname == alias.name
    }
    assert len(seen) > 10
    assert seen == latte._MODULES


def test_importing_latte_does_not_import_torch():
    code = "import sys, latte; assert 'torch' not in sys.modules; latte.Latte; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_names_of_0_1_0_still_work_and_warn():
    with pytest.deprecated_call(match="VideoPipeline"):
        assert latte.Trained is latte.VideoPipeline
    with pytest.deprecated_call(match=r"VideoPipeline\.from_pretrained"):
        trained = latte.load_trained("builtin-shapes", "cpu")
    config = SampleConfig(sampler="ddim", steps=1)
    image = np.zeros((64, 64, 3), np.uint8)
    with pytest.deprecated_call(match="conditioning_frames"):
        old = dict(trained.generate([3], ["up"], config=config, given={0: image}))
    new = dict(trained.generate([3], ["up"], config=config, conditioning_frames={0: image}))
    assert (old[3] == new[3]).all()


def test_the_weight_file_of_a_folder_means_the_folder(tmp_path):
    tiny_trained().save_pretrained(tmp_path)
    assert VideoPipeline.from_pretrained(tmp_path / "model.safetensors", device="cpu").classes == CLASSES


def test_every_load_leaves_its_report(run, tmp_path, caplog):
    tiny_trained().save_pretrained(tmp_path / "w")
    for source, tensors in ((tmp_path / "w", len(load_file(tmp_path / "w/model.safetensors"))), (run[0], 31)):
        caplog.clear()
        with caplog.at_level("INFO", logger="latte"):
            VideoPipeline.from_pretrained(source, device="cpu")
        assert f"{tensors} tensors used, 0 missing, 0 unexpected" in caplog.text


def test_a_key_of_an_older_version_in_config_yaml_is_read(run, monkeypatch):
    """The table of renamed keys is applied to a run's sections, whichever keys it lists."""
    monkeypatch.setitem(RENAMED_KEYS, "sample.scale", "sample.guidance")
    monkeypatch.setitem(RENAMED_KEYS, "draw.batch", "sample.batch")
    folder, _ = run
    text = (folder / "config.yaml").read_text()
    try:
        older = text.replace("  guidance: ", "  scale: ").replace("  batch: 2\n", "") + "draw:\n  batch: 3\n"
        assert older.count("scale: ") == 1
        (folder / "config.yaml").write_text(older.replace("scale: 1.0", "scale: 2.5"))
        sample = VideoPipeline.from_pretrained(folder, device="cpu").sample
        assert sample.batch == 3
        assert sample.guidance == (
            2.5 if "guidance: 1.0" in text else float(text.split("guidance: ")[1].split()[0])
        )
    finally:
        (folder / "config.yaml").write_text(text)


@pytest.mark.parametrize(
    "text", ["- a\n", "model: 3\n", "sample: [1]\n", "a: &x [*x]\nmodel: *x\n", "\x00", "{" * 5000]
)
def test_a_config_that_is_no_mapping_of_sections_is_one_line(run, text):
    folder, _ = run
    before = (folder / "config.yaml").read_text()
    try:
        (folder / "config.yaml").write_text(text)
        with pytest.raises(InputError) as error:
            VideoPipeline.from_pretrained(folder, device="cpu")
        assert len(str(error.value).splitlines()) == 1
        assert "config.yaml" in str(error.value)
    finally:
        (folder / "config.yaml").write_text(before)


def test_a_run_whose_config_records_the_model_alone_is_sampled_with_what_it_lacks(run, tmp_path):
    """A run made from Python may record no data, codec or diffusion section."""
    shutil.copytree(run[0], tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    sections = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({key: sections[key] for key in ("model", "train", "run")}))
    with pytest.raises(InputError, match="codec="):
        VideoPipeline.from_pretrained(tmp_path / "run", device="cpu")
    codec = build_codec(CodecConfig(name="pixels"))
    pipe = VideoPipeline.from_pretrained(tmp_path / "run", device="cpu", codec=codec)
    config = SampleConfig(sampler="ddim", steps=2)
    whole = VideoPipeline.from_pretrained(run[0], device="cpu")
    (_, found), (_, expected) = (next(each.generate([3], ["up"], config=config)) for each in (pipe, whole))
    assert (found == expected).all()
