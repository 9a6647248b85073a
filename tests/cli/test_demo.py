# SPDX-License-Identifier: Apache-2.0
"""The demo from end to end with a tiny model, and the laws of its grades."""

import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from support import wake
from typer.testing import CliRunner

from latte import demo
from latte.autoencoder.codec import CodecConfig, build_codec
from latte.cli.demo import unused_folder
from latte.cli.main import app
from latte.data.media import probe, read_frames
from latte.data.procedural import draw_scene, render
from latte.data.shape_grading import DIRECTIONS, Motion, read_motion
from latte.diffusion.config import DiffusionConfig
from latte.inference.generate import SampleConfig
from latte.inference.pipeline import VideoPipeline
from latte.model.latte import Latte, ModelConfig

TINY = (
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
    "data.frames=3",
    "data.resolution=32",
    "train.global_batch=2",
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A weights folder of a random model with the four directions as classes."""
    codec_config = CodecConfig(name="builtin")
    codec = build_codec(codec_config)
    model = wake(Latte(ModelConfig(depth=2, width=16, heads=2, num_frames=3, latent_size=4, num_classes=4)))
    sample = SampleConfig(sampler="ddim", steps=2, guidance=2.0, batch=4)
    folder = tmp_path_factory.mktemp("model") / "weights"
    VideoPipeline(
        "tiny", model, DiffusionConfig(), codec_config, codec, list(DIRECTIONS), sample, ""
    ).save_pretrained(folder)
    return folder


def invoke(*words):
    return CliRunner().invoke(app, ["demo", *map(str, words)])


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """The folder, the JSON and the log of one demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    done = invoke(
        "--out", out, "--model", tiny_model, "--count", 4, "--graded", 6, "--seconds", 0.2, "--json", *TINY
    )
    assert done.exit_code == 0, done.output
    return out, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_result_names_what_was_written(finished):
    out, result, _ = finished
    assert {"clips", "report", "label_accuracy", "seconds"} <= set(result)
    assert [(clip["seed"], clip["label"]) for clip in result["clips"]] == list(enumerate(DIRECTIONS))
    assert [probe(clip["path"]).frames for clip in result["clips"]] == [3] * 4
    assert all(
        Path(result[name]).is_relative_to(out) and Path(result[name]).is_file()
        for name in ("sheet", "gif", "report")
    )
    assert 0 <= result["interval"][0] <= result["label_accuracy"] <= result["interval"][1] <= 1
    assert (out / "run" / "metrics.jsonl").is_file()


def test_page_shows_curve_clips_and_numbers_with_their_commands(finished):
    out, result, _ = finished
    text = Path(result["report"]).read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    losses = [
        json.loads(line)["loss"]
        for line in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert f"{losses[0]:.2f} at first" in text
    assert len(list(root.iter("svg"))) == 1
    kinds = [element.attrib["src"].partition(";")[0] for element in root.iter() if "src" in element.attrib]
    assert kinds.count("data:video/mp4") == 4
    assert {"data:image/gif", "data:image/png"} <= set(kinds)
    assert not re.search(r"https?:", text)
    assert str(out) not in text
    assert [element.text.split()[:2] for element in root.iter("pre")] == [
        ["latte", "sample"],
        ["latte", "demo"],
        ["latte", "train"],
    ]


def test_progress_goes_to_stderr(finished):
    assert "100%" in finished[2]
    assert "steps" in finished[2]


def test_the_command_on_the_page_repeats_the_clips(finished, tiny_model, tmp_path):
    root = ElementTree.fromstring(Path(finished[1]["report"]).read_text(encoding="utf-8"))
    command = next(element.text for element in root.iter("pre")).split()[1:]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "again"), "--json"])
    assert done.exit_code == 0, done.output
    clips = json.loads(done.stdout.splitlines()[-1])["clips"]
    again, before = (
        [frames_of(Path(clip["path"])) for clip in some] for some in (clips, finished[1]["clips"])
    )
    assert [Path(clip["path"]).name for clip in clips] == [
        Path(clip["path"]).name for clip in finished[1]["clips"]
    ]
    distances = np.array([[np.abs(a - b).mean() for b in before] for a in again])
    # the same to rounding, which depends on where memory happens to lie, and which an untrained model and the
    # codec of mp4 enlarge
    assert distances.diagonal().max() < 2
    assert distances[~np.eye(4, dtype=bool)].min() > 50


def frames_of(path):
    """All frames of a video as int64 (t h w c)."""
    info = probe(path)
    return read_frames(info, range(info.frames)).astype(np.int64)


def test_a_finished_folder_is_not_trained_in_again(finished, tiny_model):
    done = invoke("--out", finished[0], "--model", tiny_model)
    assert done.exit_code == 2
    assert "an earlier demo" in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "0"], "--seconds"),
        (["--count", "0"], "--count"),
        (["--model", "nowhere"], "nowhere"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(words, message, tmp_path):
    done = invoke("--out", tmp_path / "out", *words)
    assert done.exit_code == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_model_of_other_classes_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    card = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(card | {"classes": ["cat", "dog", "owl", "bee"]}), encoding="utf-8"
    )
    done = invoke("--out", tmp_path / "out", "--model", folder)
    assert done.exit_code == 2
    assert "moving shapes" in done.stderr


def test_without_out_the_first_unused_folder_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(unused_folder().as_posix())
        unused_folder().mkdir(parents=True)
    assert names == ["runs/demo", "runs/demo-2", "runs/demo-3"]


def grades_of(asked):
    """Grades of procedural clips 0, 1, 2, ..., whose directions go round, when ``asked`` was wanted."""
    clips = [render(draw_scene(0, index, 8), 8, 64, 64) for index in range(len(asked))]
    return demo.Grades(asked, [read_motion(clip) for clip in clips])


def test_true_clips_follow_their_labels_and_not_shifted_ones():
    names = list(DIRECTIONS) * 4
    assert (grades_of(names).accuracy, grades_of(names).consistent) == (1.0, 1.0)
    assert grades_of(names[1:] + names[:1]).accuracy == 0.0
    assert grades_of(names).counts() == [[4 * (row == column) for column in range(5)] for row in range(4)]


def test_noise_is_unclear():
    frozen = demo.Grades(["up"], [read_motion(np.full((8, 32, 32, 3), 25, np.uint8))])
    assert frozen.counts()[0] == [0, 0, 0, 0, 1]
    assert (frozen.accuracy, frozen.coherent, frozen.consistent) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("correct", "n"), [(0, 64), (60, 64), (64, 64), (1, 2)])
def test_interval_solves_wilsons_equation(correct, n):
    grades = demo.Grades(
        ["up"] * n, [Motion("up" if k < correct else None, None, None, True) for k in range(n)]
    )
    for bound in grades.interval():
        if 0 < bound < 1:
            assert abs(grades.accuracy - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / n) ** 0.5)
