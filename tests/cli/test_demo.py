# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end with a tiny model: what it writes, its page, and the refusals."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from support import wake
from typer.testing import CliRunner

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.cli.demo import unused_folder
from latte.cli.main import app
from latte.data.config import DataConfig
from latte.data.media import probe, read_frames
from latte.demo import page
from latte.demo import run as demo
from latte.demo.page import Clips
from latte.diffusion.config import DiffusionConfig
from latte.inference.generate import SampleConfig
from latte.inference.pipeline import VideoPipeline
from latte.inference.prompts import PromptReader, Vocabulary
from latte.inference.requests import SampleRequest
from latte.model.text import LatteText, TextConfig
from latte.text.encoders import TextEncoderConfig

SHAPE = {"depth": 2, "width": 16, "heads": 2}
TINY = [f"model.{key}={value}" for key, value in SHAPE.items()]
TINY += ["data.frames=5", "data.resolution=32", "train.global_batch=2"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A weights folder of a random text model of the world, 5 frames of 32 x 32."""
    codec_config = CodecConfig(name="builtin_temporal")
    codec = build_codec(codec_config)
    config = TextConfig(**SHAPE, num_frames=2, latent_size=4, latent_channels=16, caption_channels=64)
    reader = PromptReader(TextEncoderConfig(name="builtin", length=20), "cpu")
    sample = SampleConfig(sampler="ddim", steps=2, guidance=2.0, batch=4)
    pipe = VideoPipeline(
        "tiny",
        wake(LatteText(config)),
        DiffusionConfig(objective="v"),
        codec_config,
        codec,
        [],
        sample,
        "",
        reader,
    )
    pipe.about = {"data": {"kind": "procedural", "scenes": "world", "language": "mixed", "hold_out": 8}}
    folder = tmp_path_factory.mktemp("model") / "weights"
    pipe.save_pretrained(folder)
    return folder


def invoke(*words):
    return CliRunner().invoke(app, ["demo", *map(str, words)])


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """The folder, the JSON and the log of one demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    words = ["--out", out, "--model", tiny_model, "--graded", 3, "--seconds", 0.2, "--json"]
    done = invoke(*words, *TINY)
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_result_names_what_was_written(finished):
    out, result, _ = finished
    assert {"clips", "report", "label_accuracy", "seconds"} <= set(result)
    assert [(clip["seed"], clip["prompt"]) for clip in result["clips"]] == list(enumerate(demo.SENTENCES))
    assert [probe(clip["path"]).frames for clip in result["clips"]] == [5] * 9
    paths = [Path(result[name]) for name in ("sheet", "gif", "report")]
    assert all(path.is_relative_to(out) and path.is_file() for path in paths)
    assert 0 <= result["interval"][0] <= result["label_accuracy"] <= result["interval"][1] <= 1
    assert len(result["loss"]) == len(result["new_motion"]) == 2
    assert result["loss"][0] != result["loss"][1]
    lines = (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == result["steps"] > demo.PROBE_STEPS
    counts = {
        name: len(list((out / name).glob("*.mp4"))) for name in ("from-image", "held-out", "before", "after")
    }
    assert counts == {"from-image": 3, "held-out": 3, "before": 4, "after": 4}


def test_page_shows_curve_clips_and_numbers_with_their_commands(finished):
    out, result, _ = finished
    text = Path(result["report"]).read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert len(list(root.iter("svg"))) >= 1
    kinds = [element.attrib["src"].partition(";")[0] for element in root.iter() if "src" in element.attrib]
    assert kinds.count("data:video/mp4") == 9 + 3 + 2 + 4 + 4
    assert kinds.count("data:image/png") == 2
    assert not re.search(r"https?:", text)
    assert str(out) not in text
    assert all(sentence in text for sentence in demo.SENTENCES)
    assert f"{result['loss'][0]:.3f} to {result['loss'][1]:.3f}" in text
    commands = [element.text.split()[:2] for element in root.iter("pre")]
    assert commands == [["latte", name] for name in ("sample", "sample", "sample", "demo", "train")]
    shown = [int(share * demo.NEW_CLIPS) for share in result["new_motion"]]
    assert f"Before, {shown[0]} of 4 clips show an opening curtain; after, {shown[1]}." in text


def test_the_command_of_a_built_in_model_is_a_sentence():
    clips = Clips([SampleRequest(5, prompt="a red ball")], Path(), [])
    lines = [
        page.sample_command(SimpleNamespace(model=model), clips, "--guidance", "4")
        for model in ("builtin", "runs/x")
    ]
    assert lines == [
        "latte sample 'a red ball' --seed 5 --guidance 4",
        "latte sample runs/x --prompt 'a red ball' --seed 5 --guidance 4",
    ]


def test_the_clips_that_begin_with_an_image_do(finished):
    from PIL import Image

    out = finished[0]
    image = np.asarray(Image.open(out / "first-frame.png")).astype(int)
    for path in (out / "from-image").glob("*.mp4"):
        first = read_frames(probe(path), [0])[0].astype(int)
        assert np.abs(first - image).mean() < 12


def test_two_guidance_scales_have_one_seed_and_differ(finished):
    frames = []
    for scale in demo.SCALES:
        (path,) = (finished[0] / f"guidance-{scale:g}").glob("*.mp4")
        assert path.name.startswith("seed-0000-")
        frames.append(read_frames(probe(path), range(5)).astype(int))
    assert np.abs(frames[0] - frames[1]).max() > 2


def test_the_run_can_be_sampled_by_its_sentence(finished, tmp_path):
    words = ["sample", str(finished[0] / "run"), "--prompt", "a red curtain opens", "--steps", "2"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "clips"), "--json"])
    assert done.exit_code == 0, done.output
    assert "warning" not in done.stderr, "its words were trained on"


@pytest.mark.parametrize(
    ("config", "value"), [(TextConfig(), "false"), (TextConfig(pooled_caption=True), "true")]
)
def test_the_fine_tuning_has_the_blocks_of_the_model(config, value):
    pipe = SimpleNamespace(model=SimpleNamespace(config=config))
    settings = demo.tuning_of(demo.DemoConfig(Path(), overrides=("train.lr=1e-3",)), pipe)
    assert f"text.pooled_caption={value}" in settings
    assert settings[-1] == "train.lr=1e-3", "what is given on the command line comes last"


def test_progress_goes_to_stderr(finished):
    assert "100%" in finished[2]
    assert "steps" in finished[2]


def test_a_finished_folder_is_not_trained_in_again(finished, tiny_model):
    done = invoke("--out", finished[0], "--model", tiny_model)
    assert done.exit_code == 2
    assert "an earlier demo" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds"),
        (["--graded", "0"], "--graded"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "builtin-shapes"], "builtin-shapes does not read captions of data.scenes=world"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, message, tmp_path):
    done = invoke("--out", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_without_out_the_first_unused_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(unused_folder().as_posix())
        unused_folder().mkdir(parents=True)
    assert names == ["runs/demo", "runs/demo-2", "runs/demo-3"]


def test_the_sentences_are_within_the_words_of_the_captions():
    known = Vocabulary.of({"kind": "procedural", "scenes": "world", "language": "mixed"})
    assert known is not None
    texts = [*demo.SENTENCES, *demo.FROM_IMAGE, demo.GUIDED]
    assert [warning for text in texts if (warning := known.warning(text))] == []
    new = DataConfig(kind="procedural", scenes="curtains", language="mixed").scene_set.captions
    assert all(known.warning(text) for text in new), "the fine-tuning teaches words"
