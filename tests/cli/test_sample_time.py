# SPDX-License-Identifier: Apache-2.0
"""``latte sample``, ``convert`` and ``evaluate`` of a run whose codec compresses time, from training on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import temporal
import tiny_detector
from cli.conftest import Answer
from latte.ablate.axes import make_settings
from latte.checks import InputError
from latte.config.run import load_run
from latte.data.media import probe, read_frames, write_mp4
from latte.data.procedural import draw_scene, render
from latte.evaluation import protocols
from latte.evaluation import report as page
from latte.evaluation.detectors import DETECTORS
from latte.inference.pipeline import VideoPipeline
from temporal import TIME_WORDS
from tiny import WORDS
from tiny_detector import TINY

pytestmark = pytest.mark.usefixtures("time_codecs")
PROTOCOLS = {frames: replace(TINY, name=f"tiny{frames}", frames=frames) for frames in (4, 10)}


@pytest.fixture
def run(latte) -> str:
    """A run of one step on clips of 9 frames, 3 latent frames."""
    words = [*WORDS, *TIME_WORDS, "model.patch_size=2", "train.steps=1"]
    trained = latte("train", "shapes", *words, "--out", "run")
    assert trained.code == 0, trained.err
    return "run"


def clips(found: Answer) -> list[np.ndarray]:
    """The clips that a command wrote."""
    assert found.code == 0, found.err
    infos = [probe(clip["path"]) for clip in found.json["clips"]]
    return [read_frames(info, range(info.frames)) for info in infos]


@pytest.mark.filterwarnings("default:4 latent frames", "default:latents of 8 x 10")
def test_a_run_is_sampled_at_every_valid_length_and_size(latte, run):
    words = ["sample", run, "--count", 1, "--json"]
    assert [clip.shape for clip in clips(latte(*words))] == [(9, 16, 16, 3)]
    other = latte(*words, "--frames", 13, "--size", "16x20")
    assert clips(other)[0].shape == (13, 16, 20, 3)
    assert "warning: 4 latent frames are more than the 3 the model was trained on" in other.err
    assert "warning: latents of 8 x 10 are larger than the 8 x 8 the model was trained on" in other.err
    record = Path(latte(*words).json["sheet"]).with_name("clips.json")
    assert json.loads(record.read_text())["facts"]["frames"] == 9
    for option, value, message in (
        ("--frames", 15, "the nearest valid numbers are 13 and 17"),
        ("--size", "18x16", "the nearest multiples are 16 and 20 for the height 18"),
        ("--window", 0, "window must be at least 1 latent frame"),
    ):
        found = latte(*words, option, value)
        assert (found.code, len(found.errors)) == (2, 1)
        assert message in found.errors[0]


def test_first_and_last_frames_and_longer_clips(latte, run, monkeypatch):
    monkeypatch.setattr(temporal, "MEMORY", 0.0)
    Image.new("RGB", (16, 16), (200, 60, 20)).save("first.png")
    write_mp4(Path("last.mp4"), np.stack([np.full((16, 16, 3), level, np.uint8) for level in (250, 20)]))
    images = ["--first", "first.png", "--last", "last.mp4"]
    words = ["sample", run, "--count", 1, "--json", *images]
    for longer in ("freenoise", "chained"):
        (clip,) = clips(latte(*words, "--frames", 33, "--window", 3, "--longer", longer, "--out", longer))
        assert len(clip) == 33
        assert abs(clip[0].astype(int) - (200, 60, 20)).mean() < 12
        assert abs(clip[-4:].astype(int) - 20).mean() < 12, "held for its latent frame"
    found = latte(*words, "--frames", 33, "--window", 3, "--overlap", 3)
    assert "overlap is 3, but windows have 3 latent frames" in found.errors[0]


def test_converted_weights_keep_codec_and_latent_frames(latte, run):
    assert latte("convert", run, "weights", "--to", "latte").code == 0
    assert "clips | 9 frames of video, 3 latent frames" in Path("weights/README.md").read_text()
    config = json.loads(Path("weights/config.json").read_text())
    assert (config["codec"]["name"], config["num_frames"]) == ("time", 3)
    pipe = VideoPipeline.from_pretrained("weights", device="cpu")
    found = pipe(num_frames=5, class_labels="up", seed=1, output_type="uint8")
    assert found.frames.shape == (1, 5, 16, 16, 3)
    assert latte("convert", run, "official.pt", "--to", "official").code == 0
    tensors = torch.load("official.pt", weights_only=True)
    assert next(value for key, value in tensors["ema"].items() if "temp_embed" in key).shape[1] == 3


def test_a_model_as_the_fake_side_is_cut_to_the_protocols_frames(latte, run, monkeypatch):
    monkeypatch.setattr(page, "PIXELS", 16)
    monkeypatch.setitem(DETECTORS, "tiny", tiny_detector.SPEC)
    for protocol in PROTOCOLS.values():
        monkeypatch.setitem(protocols.PROTOCOLS, protocol.name, protocol)
    Path("real").mkdir()
    for index in range(6):
        write_mp4(Path(f"real/{index}.mp4"), render(draw_scene(900, index, 10), 10, 16, 16), 8)
    words = ["evaluate", "real", run, "--device", "cpu", "--out", "out", "--json"]
    found = latte(*words, "--protocol", "tiny4")
    assert found.code == 0, found.err
    manifest = json.loads(Path(found.json["manifest"]).read_text())["manifest"]
    assert manifest["clips"]["frames"] == 4
    assert manifest["generation"]["other"] == {"frames": 9}
    assert {probe(path).frames for path in Path("out/samples").glob("*.mp4")} == {9}
    short = latte(*words, "--protocol", "tiny10")
    assert (short.code, len(short.errors)) == (2, 1)
    assert "9 frames, but 10 are needed; generate longer ones by latte sample --frames 13" in short.errors[0]


def test_axes_leave_out_what_the_latent_frames_do_not_allow():
    short, long = (
        load_run("shapes", [*WORDS, *TIME_WORDS, f"data.frames={frames}"])[0] for frames in (9, 13)
    )
    settings, left = make_settings(long, ["patch", "joint", "variant"])
    assert {setting.config.model.num_frames for setting in settings} == {4}
    assert left == []
    with pytest.raises(InputError, match=r"--axes patch .*model.num_frames is 3, but compression patches"):
        make_settings(short, ["patch"])
