# SPDX-License-Identifier: Apache-2.0
"""``latte train``: the keys of its answer, exact resuming by the same command, interruption, and refusals."""

import json
import os
import shlex
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from latte.config.run import flat, load_run
from tiny import WORDS


def test_train_answers_with_its_keys_and_leaves_a_run_folder(latte):
    found = latte("train", "shapes", *WORDS, "train.steps=2", "--json")
    assert found.code == 0
    assert {"run", "step", "loss", "checkpoint", "weights_sha256"} <= found.json.keys()
    assert (found.json["run"], found.json["step"]) == ("runs/shapes", 2)
    folder = load_run("runs/shapes")[0]
    assert folder.run.dir == "runs/shapes"
    assert json.loads(Path("runs/shapes/metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_the_same_command_goes_on_and_ends_where_an_unstopped_run_ends(latte):
    words = [
        *WORDS,
        "train.decay_steps=0",
    ]  # a rate that falls at the end would fall at the end of every part
    whole = latte("train", "shapes", *words, "train.steps=5", "--out", "whole", "--json").json
    for steps in (2, 3, 5):
        part = latte("train", "shapes", *words, f"train.steps={steps}", "--out", "part", "--json")
        assert part.json["step"] == steps
    again = latte("train", "part", "--json").json
    assert again["weights_sha256"] == part.json["weights_sha256"] == whole["weights_sha256"]
    assert again["loss"] == whole["loss"]


def test_the_run_folder_reloads_to_the_configuration_of_the_command(latte, run_folder):
    asked, _ = load_run("shapes", [*WORDS, "train.steps=2", f"run.dir={run_folder}"])
    again, origins = load_run(run_folder)
    assert flat(again) == flat(asked)
    lines = {f"{run_folder / 'config.yaml'}:{line}" for line in range(1, 400)}
    assert set(origins.values()) <= {*lines, "the run folder", "default"}
    left_out = {key for key, origin in origins.items() if origin == "default"}
    assert left_out <= {"model.qk_norm", "model.value_residual", "model.mlp", "data.mix"}, (
        "all others are recorded"
    )
    assert yaml.safe_load((run_folder / "config.yaml").read_text())["version"] == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.width=32"], "model.width"),
        (["run.seed=5"], "seed"),
        (["data.seed=1"], "seed"),
        (["train.global_batch=8"], "global_batch"),
        (["diffusion.num_steps=500"], "num_steps"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused_and_nothing_changes(
    latte, run_folder, tmp_path, words, expected
):
    shutil.copytree(run_folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file()}
    found = latte("train", "shapes", *WORDS, *words, "train.steps=4", "--out", tmp_path / "run")
    assert found.code == 2
    assert any(expected in line for line in found.errors)
    assert before == {
        path: path.read_bytes() for path in (tmp_path / "run/checkpoints").rglob("*") if path.is_file()
    }


def test_options_are_settings(latte):
    found = latte(
        "train",
        "shapes",
        *WORDS,
        "train.steps=1",
        "--out",
        "a b",
        "--seed",
        9,
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--json",
    )
    config, _ = load_run("a b")
    assert (found.json["run"], config.run.seed, config.train.dtype) == ("a b", 9, "fp32")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["shapes", "train.stepz=3", "model.dept=2"], ["train.steps", "model.depth"]),
        (["shape"], ["shapes"]),
        (["sky-small"], ["codec.path", "data.root"]),
        (["shapes", "model.num_classes=3"], ["model.num_classes=4"]),
        (["shapes", "--device", "abacus"], ["device"]),
        (["shapes", "--dtype", "fp99"], ["train.dtype"]),
    ],
)
def test_wrong_input_is_reported_before_anything_is_written(latte, tmp_path, words, expected):
    found = latte("train", *words)
    assert found.code == 2
    assert "Traceback" not in found.err
    assert any(word in found.err for word in expected)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)],
)
def test_a_signal_saves_and_leaves_with_its_code(latte, tmp_path, number, code):
    def send_when_training():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(tmp_path.glob("run/checkpoints/step-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_when_training)
    sender.start()
    found = latte("train", "shapes", *WORDS, "train.steps=100000", "--out", "run", "--json")
    sender.join()
    assert found.code == code
    assert "Traceback" not in found.err
    step = found.json["step"]
    assert 2 <= step < 100_000
    assert found.json["checkpoint"] == f"run/checkpoints/step-{step}"
    assert latte("train", "run", f"train.steps={step + 1}", "--json").json["step"] == step + 1


@pytest.fixture
def captioned(latte):
    """A folder of three procedural videos with captions.csv."""
    assert latte("data", "synth", "videos", "--count", 3, "--frames", 4, "--size", 16).code == 0
    return Path("videos")


FOLDER = ["data.kind=folder", "data.root=videos", "data.hold_out=0", "data.captions=auto", "train.steps=1"]


def test_a_text_model_trains_on_a_folder_with_captions(latte, captioned):
    found = latte("train", "shapes-text", *WORDS, *FOLDER, "--json")
    assert (found.code, found.json["step"]) == (0, 1), found.err


@pytest.mark.parametrize(
    ("rows", "words", "expected"),
    [
        (["up/none.mp4,nothing"], [], "captions.csv:5 describes 'up/none.mp4', but there is no such video"),
        (["up/00000.mp4,again"], [], "which has a caption already"),
        (None, [], "holds neither captions.csv"),
        ([], ["data.captions=null"], "the data have no captions"),
        ([], ["data.captions=other.csv"], "there is no such file"),
        ([], ["text.length=3"], "has 6 tokens, but text.length is 3"),
        ([], ["model.variant=2"], "model.variant is 2"),
        ([], ["text.name=t5"], "text.path is not set"),
        ([], ["text.name=clip"], "text.name is 'clip'"),
        ([], ["text.bits=8"], "text.bits is 8"),
        ([], ["train.init=nowhere.safetensors"], "nowhere.safetensors"),
        ([], ["data.kind=procedural", "data.root=null"], "data.captions is 'auto'"),
    ],
)
def test_what_a_text_run_cannot_use_is_reported_in_one_line(latte, captioned, rows, words, expected):
    file = captioned / "captions.csv"
    if rows is None:
        file.unlink()
    else:
        file.write_text(file.read_text() + "".join(row + "\n" for row in rows))
    found = latte("train", "shapes-text", *WORDS, *FOLDER, *words)
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert expected in found.errors[0]


@pytest.mark.parametrize(
    ("row", "expected"), [("up/00000.mp4,", "has an empty caption"), (None, "have no caption, first")]
)
def test_videos_without_a_caption_are_reported(latte, captioned, row, expected):
    lines = (captioned / "captions.csv").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("up/00000.mp4")]
    (captioned / "captions.csv").write_text("\n".join([*kept, *([row] if row else [])]) + "\n")
    for command in ("train", "data encode"):
        found = latte(*command.split(), "shapes-text", *WORDS, *FOLDER)
        assert (found.code, len(found.errors)) == (2, 1), found.err
        assert expected in found.errors[0]


@pytest.mark.parametrize("recipe", ["shapes", "shapes-text"])
def test_the_command_that_is_printed_at_the_end_generates_clips(latte, recipe):
    words = [word for word in WORDS if not word.startswith("data.labels")]
    found = latte("train", recipe, *words, "train.steps=1", "--out", "my run")
    assert found.code == 0, found.err
    (line,) = [line for line in found.out.splitlines() if "latte sample" in line]
    command = shlex.split(line.partition("latte ")[2])
    assert command[:2] == ["sample", "my run"]
    assert ("--prompt" in command) == (recipe == "shapes-text")
    assert latte(*command, "--count", 1, "--out", "clips").code == 0
    assert list(Path("clips").glob("*.mp4"))


def test_the_command_that_resumes_is_quoted():
    from latte.cli.train import next_command

    line = next_command({"run": "my run/$HOME"}, [], 130)
    assert shlex.split(line.partition("latte ")[2]) == ["train", "my run/$HOME"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample.steps=2000"], "2000"),
        (["sample.sampler=flow"], "sampler"),
        (["model.num_classes=null", "sample.guidance=4"], "guidance"),
        (["train.decay_steps=500", "train.steps=400"], "give train.decay_steps=400 or less"),
        (
            ["train.decay_steps=300", "train.warmup_steps=200", "train.steps=400"],
            "give train.decay_steps=200 or less",
        ),
    ],
)
def test_what_would_fail_later_is_refused_before_training(latte, tmp_path, words, message):
    found = latte("train", "shapes", *WORDS, "train.sample_every=100", *words, "--out", "run")
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert message in found.errors[0]
    assert not (tmp_path / "run").exists()


def test_a_video_that_vanishes_during_training_is_named_and_the_run_resumes_when_allowed(latte, tmp_path):
    assert latte("data", "synth", "videos", "--count", 6, "--frames", 4, "--size", 16).code == 0
    videos = sorted(Path("videos").rglob("*.mp4"))
    words = [*WORDS, "data.kind=folder", "data.root=videos", "model.num_classes=null", "data.labels=false"]
    words += ["sample.guidance=1", "train.steps=100000", "train.log_every=1"]
    vanished = videos[0]

    def remove_when_training():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(tmp_path.glob("run/checkpoints/step-*")):
            time.sleep(0.01)
        vanished.unlink()

    remover = threading.Thread(target=remove_when_training)
    remover.start()
    found = latte("train", "shapes", *words, "--out", "run")
    remover.join()
    assert not vanished.exists()
    assert (found.code, len(found.errors)) == (1, 1), found.err
    assert vanished.name in found.errors[0]
    steps = [int(path.name[5:]) for path in Path("run/checkpoints").glob("step-*")]
    assert f"step {max(steps)} was saved" in found.errors[0]
    again = latte("train", "run", f"train.steps={max(steps) + 1}")
    assert again.code == 2
    assert any(f"missing: {vanished.relative_to('videos').as_posix()}" in line for line in again.errors), (
        again.err
    )
    allowed = latte("train", "run", f"train.steps={max(steps) + 1}", "run.allow_data_change=true", "--json")
    assert allowed.json["step"] == max(steps) + 1
