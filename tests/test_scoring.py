# SPDX-License-Identifier: Apache-2.0
"""Scores while training: exact across stops, refused before the run where data or model do not fit."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from latte.build import build
from latte.checks import InputError
from latte.config.run import load_run
from latte.scoring import Scorer
from tiny import WORDS
from tiny_runs import FORKS

SCORED = [
    *(word for word in WORDS if not word.startswith(("data.frames", "data.resolution"))),
    "data.frames=16",
    "data.resolution=32",
    "data.num_clips=40",
    "train.steps=4",
    "train.score_every=2",
    "train.score_clips=6",
    "train.keep_best=score",
    "sample.steps=2",
    "model.depth=2",
]


def job(folder: Path, *words: str, recipe: str = "shapes"):
    """The run in ``folder``, and what scores it."""
    found = build(load_run(recipe, [*SCORED, f"run.dir={folder}", *words])[0], "cpu")
    assert found.codec is not None
    parts = (found.config, found.model, found.dataset, found.codec, found.captions, found.held_out)
    return found, Scorer(*parts)


def train(folder: Path, *words: str, recipe: str = "shapes", until: int | None = None) -> dict:
    """Train it."""
    found, score = job(folder, *words, recipe=recipe)
    return found.train(until=until, score=score)


def lines(folder: Path) -> list[dict]:
    """validation.jsonl."""
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_scores_of_a_resumed_run_are_those_of_one_that_never_stopped(tmp_path):
    result = train(tmp_path / "whole")
    train(tmp_path / "again", until=3)
    train(tmp_path / "again")
    found = lines(tmp_path / "again")
    assert found == lines(tmp_path / "whole")
    assert [line["step"] for line in found] == [2, 4]
    assert found[0]["score/fvd"] != found[1]["score/fvd"]
    best = min(found, key=lambda line: line["score/fvd"])["step"]
    assert result["best"].endswith(f"step-{best}")
    kept = tmp_path / "whole" / "scores" / "step-0000004"
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["values"]["fvd"] == found[1]["score/fvd"]
    assert (kept / "report.html").is_file()
    assert not list(kept.rglob("*.mp4")), "clips are removed after they were scored"


def test_held_out_clips_measure_memorisation_and_show_the_nearest(tmp_path):
    train(tmp_path, "data.hold_out=0.2", until=2)
    (line,) = lines(tmp_path)
    kept = tmp_path / "scores" / "step-0000002"
    found = json.loads((kept / "manifest.json").read_text())["memorisation"]
    assert line["score/memorisation"] == found["relative"]["value"] > 0
    assert (found["num_train"], found["num_held_out"]) == (6, 6)
    shown = [path.name for path in sorted((kept / "nearest").iterdir())]
    assert len(shown) == 12
    page = (tmp_path / "report.html").read_text("utf-8")
    assert found["verdict"] in page
    assert page.count("data:video/mp4") == 12


def test_without_enough_held_out_clips_scores_go_without_memorisation(tmp_path, caplog):
    train(tmp_path, "data.hold_out=0.025", until=2)
    assert "memorisation is not measured" in caplog.text
    assert set(lines(tmp_path)[0]) == {"step", "score/fvd", "score/kvd"}


def one_of_two(rank: int, port: int, folder: str, pipe) -> None:
    """A process of two that trains and scores, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    try:
        pipe.send(train(Path(folder), "data.hold_out=0.2", until=2)["step"])
    except BaseException as error:
        pipe.send(repr(error))
        raise


@pytest.mark.nightly  # two more processes, each of which builds the run
def test_scores_of_two_processes_are_those_of_one(tmp_path):
    train(tmp_path / "one", "data.hold_out=0.2", until=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends = [FORKS.Pipe() for _ in range(2)]
    for rank, (_, remote) in enumerate(ends):
        words = (rank, port, str(tmp_path / "two"), remote)
        FORKS.Process(target=one_of_two, args=words, daemon=True).start()
    assert all(ours.poll(200) for ours, _ in ends)
    assert [ours.recv() for ours, _ in ends] == [2, 2]
    (found,), (expected,) = (lines(tmp_path / name) for name in ("two", "one"))
    assert found.keys() == expected.keys() == {"step", "score/fvd", "score/kvd", "score/memorisation"}
    assert found == pytest.approx(expected, rel=1e-4), "gradients are summed in another order"
    assert (tmp_path / "two" / "report.html").is_file()


def test_a_text_model_is_scored_with_the_captions_of_its_data(tmp_path):
    train(tmp_path, recipe="shapes-text", until=2)
    assert lines(tmp_path)[0]["score/fvd"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.score_clips=41"], r"41 clips are scored, but the data have 40; set train\.score_clips=40"),
        (["data.frames=8"], r"too short for builtin.*8 frames, 16 are needed"),
        (["train.score_protocol=bilutin"], "builtin"),
        (["sample.steps=2000"], r"train\.score_every is 2, but the settings of section sample"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_run(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        job(tmp_path, *words)
    assert not (tmp_path / "checkpoints").exists()
