# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped, killed or damaged on the way ends bit for bit where one that was never stopped
ends.
"""

import json
import os
import random
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from latte.checkpoint import run as checkpoints
from latte.checkpoint.record import source_commit
from latte.checkpoint.run import latest_checkpoint, list_checkpoints
from latte.checks import InputError
from latte.training import train as loop
from tiny_runs import FORKS, SHORT, TINY, Latents, assert_same, curve, run, tiny_model


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("clean")
    run(folder)
    return folder


def test_looking_at_a_run_on_its_way_changes_no_bit_of_a_rate_that_falls(tmp_path):
    """``until`` stops without bringing the end nearer, which would let the rate fall at once."""
    falling = replace(SHORT, decay_steps=8)
    run(tmp_path / "clean", falling)
    for step in (3, 7, 99):
        result = run(tmp_path / "seen", falling, until=step)
        assert (result["step"], result["interrupted"]) == (min(step, SHORT.steps), 0)
    assert_same(tmp_path / "seen", tmp_path / "clean")
    rates = [line["lr"] for line in curve(tmp_path / "clean")]
    assert rates[-1] == pytest.approx(SHORT.lr / 9)


@pytest.mark.parametrize(
    "stops",
    [(1,), (3,), (7,), (11,), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)],
    ids=[
        "first step",
        "epoch's second batch",
        "after pruning, between lines and checkpoints",
        "last but one",
        "every step",
    ],
)
def test_stopping_changes_no_bit(tmp_path, clean, stops):
    for steps in (*stops, SHORT.steps):
        with torch.random.fork_rng():
            torch.manual_seed(steps)  # nothing is drawn from the global stream
            result = run(tmp_path, replace(SHORT, steps=steps))
        assert result["step"] == steps
    assert_same(tmp_path, clean)


def test_accumulating_while_stopped_changes_no_bit_either(tmp_path):
    config = replace(SHORT, micro_batch=3)
    for folder, stops in {"straight": (12,), "stopped": (5, 12)}.items():
        for steps in stops:
            run(tmp_path / folder, replace(config, steps=steps))
    assert_same(tmp_path / "stopped", tmp_path / "straight")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = run(tmp_path, replace(SHORT, steps=3))
    before = (tmp_path / "metrics.jsonl").read_text()
    for steps in (3, 2):
        assert run(tmp_path, replace(SHORT, steps=steps)) == first
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_seconds_go_on(tmp_path):
    run(tmp_path, replace(SHORT, steps=2))
    run(tmp_path, replace(SHORT, steps=4))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for key in ("seconds", "cpu_seconds"):
        assert 0 < lines[0][key] <= lines[1][key] <= lines[2][key]


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bit(tmp_path, clean, capsys):
    run(tmp_path, replace(SHORT, steps=9))
    with open(tmp_path / "checkpoints/step-9/optimizer.safetensors", "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"damage")
    capsys.readouterr()
    run(tmp_path)
    lines = capsys.readouterr().err
    assert "step-9 is damaged: optimizer.safetensors has sha256" in lines
    assert "resuming from the earlier checkpoint" in lines
    assert_same(tmp_path, clean)


def test_nothing_starts_over_when_every_checkpoint_is_damaged(tmp_path):
    run(tmp_path, replace(SHORT, steps=6))
    for path in list_checkpoints(tmp_path):
        os.truncate(path / "model.safetensors", 100)
    with pytest.raises(InputError, match=r"no checkpoint of .* can be read"):
        run(tmp_path)


class OtherData(Latents):
    def describe(self):
        return {**super().describe(), "clips": 11, "flip": True}


def test_a_run_of_another_configuration_is_refused_with_every_difference(tmp_path):
    run(tmp_path, replace(SHORT, steps=2), facts={"sharding": {"size": 4}})
    written = (tmp_path / "config.yaml").read_text()
    with pytest.raises(InputError) as caught:
        run(
            tmp_path,
            replace(SHORT, global_batch=8),
            seed=1,
            dataset=OtherData(),
            model=tiny_model(replace(TINY, heads=4)),
        )
    first, *lines = str(caught.value).splitlines()
    assert str(tmp_path) in first
    assert lines == [
        "  model.heads: the run has 2, you gave 4",
        "  data.clips: the run has 10, you gave 11",
        "  train.global_batch: the run has 4, you gave 8",
        "  run.seed: the run has 0, you gave 1",
        "  sharding.size: the run has 4, you gave nothing",
        "  data.flip: the run has nothing, you gave true",
    ]
    assert (tmp_path / "config.yaml").read_text() == written


def test_the_optimisers_settings_may_change_and_it_is_said(tmp_path, capsys):
    run(tmp_path, replace(SHORT, steps=2))
    capsys.readouterr()
    run(tmp_path, replace(SHORT, steps=6, lr=5e-4, clip_norm=None, micro_batch=2, log_every=1, keep_last=1))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("notice")]
    assert lines == [
        "notice: train.lr was 0.001 up to step 2 and is 0.0005 from here on",
        "notice: train.clip_norm was 0.5 up to step 2 and is null from here on",
    ]
    assert curve(tmp_path)[-1]["lr"] == 5e-4


COMMITS = replace(SHORT, steps=250, checkpoint_every=1, log_every=1)


def train_and_acknowledge(folder: Path, pipe: int) -> None:
    """Train, and acknowledge every checkpoint once it is committed."""

    def acknowledged(*arguments):
        path = checkpoints.save_checkpoint(*arguments)
        os.write(pipe, bytes([arguments[1]]))
        return path

    loop.save_checkpoint = acknowledged
    run(folder, COMMITS)


def kill_again_and_again(folder: str, kills: int, results) -> None:
    """Fork a run, let it commit, kill it, and so on; every second time just when a commit is seen to be
    under way.

    For each: the last acknowledged step, whether it was killed, whether an unfinished commit was left, and
    what is found afterwards.
    """
    torch.set_num_threads(1)
    source_commit()  # asks git, once
    dice, run_dir = random.Random(0), Path(folder)
    for number in range(kills):
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            train_and_acknowledge(run_dir, there)
            os._exit(0)
        os.close(there)
        done = os.read(here, 1)
        time.sleep(dice.random() * 0.03)
        deadline = time.monotonic() + 10
        while (
            number % 2 == 0
            and time.monotonic() < deadline
            and not list(run_dir.glob("checkpoints/.tmp-step-*"))
        ):
            pass
        os.kill(child, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        done += os.read(here, 1000)
        os.close(here)
        left = bool(list(run_dir.glob("checkpoints/.*")))
        results.put((done[-1], killed, left, latest_checkpoint(run_dir).name))
    results.put(None)


def test_killing_it_at_any_instant_loses_no_committed_step_and_no_bit(tmp_path):
    results = FORKS.SimpleQueue()
    child = FORKS.Process(target=kill_again_and_again, args=(str(tmp_path), 20, results), daemon=True)
    child.start()
    seen = list(iter(results.get, None))
    child.join(20)
    latest = [int(name.removeprefix("step-")) for *_, name in seen]
    assert all(found >= done for found, (done, *_) in zip(latest, seen, strict=True))
    assert all(after > before for before, after in pairwise(latest))
    kills, torn = sum(killed for _, killed, _, _ in seen), sum(left for _, _, left, _ in seen)
    print(f"{kills} kills, {torn} inside a commit, {latest[-1]} steps")
    assert kills == 20
    assert torn >= 5
    steps = latest[-1] + 2
    run(tmp_path, replace(COMMITS, steps=steps))
    run(tmp_path / "straight", replace(COMMITS, steps=steps))
    assert_same(tmp_path, tmp_path / "straight")
