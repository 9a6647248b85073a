# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped, killed or damaged on the way ends bit for bit where one that was never stopped
ends.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latte.checkpoint import run as checkpoints
from latte.checkpoint.record import source_commit
from latte.checkpoint.run import latest_checkpoint, list_checkpoints
from latte.checks import InputError
from latte.data.mix import MixDataset, MixedSet
from latte.training import saving
from latte.training.config import TrainConfig
from latte.training.resume import run_facts
from several import started, together
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


class Encoded(Latents):
    """Latents that record their codec."""

    def describe(self):
        return {**super().describe(), "codec": "0123456789abcdef"}


def test_a_run_on_a_mix_of_latents_has_their_codec():
    mix = MixDataset([MixedSet(name, 1, Encoded()) for name in ("A", "B")])
    facts = run_facts(tiny_model(), None, mix, SHORT, 0)
    assert facts["codec"] == "0123456789abcdef", "sampling refuses another one by it"
    other = SimpleNamespace(name="other", fingerprint="fedcba9876543210")
    with pytest.raises(InputError, match="but the latents were made with 0123456789abcdef"):
        run_facts(tiny_model(), other, mix, SHORT, 0)


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


COMMITS = replace(SHORT, steps=4000, checkpoint_every=1, log_every=1)
MODES = {"": COMMITS, "asynchronous": replace(COMMITS, async_save=True)}
SHARDED = {
    "sharded": replace(COMMITS, parallel="fsdp"),
    "sharded, asynchronous": replace(COMMITS, parallel="fsdp", async_save=True),
}


def train_and_acknowledge(folder: Path, config: TrainConfig) -> None:
    """Train, and acknowledge every checkpoint once it is committed, in the file ``acknowledged``."""
    log = os.open(folder / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def acknowledged(*arguments):
        path = checkpoints.save_checkpoint(*arguments)
        os.write(log, f"{arguments[1]}\n".encode())
        return path

    saving.save_checkpoint = acknowledged
    run(folder, config)


def acknowledged_steps(folder: Path) -> list[int]:
    """The steps whose checkpoints were acknowledged."""
    try:
        return [int(line) for line in (folder / "acknowledged").read_text().splitlines()]
    except FileNotFoundError:
        return []


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    """Return when ``condition()`` holds; the test fails when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"


def wait_and_kill(folder: Path, kill: Callable[[], None], commit: bool, dice: random.Random) -> tuple:
    """Kill a run once it has committed and a little later, with ``commit`` when one is seen to be under way.

    Return the last acknowledged step, whether an unfinished commit was left, and the newest saved step.
    """
    before = len(acknowledged_steps(folder))
    wait_for(lambda: len(acknowledged_steps(folder)) > before)
    time.sleep(dice.random() * 0.03)
    if commit:
        wait_for(lambda: list(folder.glob("checkpoints/.tmp-step-*")))
    kill()
    left = bool(list(folder.glob("checkpoints/.*")))
    newest = latest_checkpoint(folder)
    assert newest is not None
    return acknowledged_steps(folder)[-1], left, int(newest.name.removeprefix("step-"))


def kill_again_and_again(folder: str, kills: int, config: TrainConfig, results) -> None:
    """Fork a run, let it commit, kill it, and so on; every second time inside a commit."""
    torch.set_num_threads(1)
    source_commit()  # asks git, once
    dice = random.Random(0)
    run_dir = Path(folder)
    for number in range(kills):
        child = os.fork()
        if child == 0:
            train_and_acknowledge(run_dir, config)
            os._exit(0)

        def kill(child: int = child) -> None:
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

        results.put(wait_and_kill(run_dir, kill, number % 2 == 0, dice))
    results.put(None)


def check_kills(seen: list[tuple[int, bool, int]], kills: int) -> int:
    """Nothing acknowledged was lost, at least a quarter of the kills hit a commit; return the last step."""
    latest = [found for *_, found in seen]
    assert all(found >= done for done, _, found in seen)
    assert all(after > before for before, after in pairwise(latest))
    torn = sum(left for _, left, _ in seen)
    print(f"{len(seen)} kills, {torn} inside a commit, {latest[-1]} steps")
    assert len(seen) == kills
    assert torn >= kills // 4
    return latest[-1]


NIGHT = pytest.mark.nightly


@pytest.mark.parametrize(
    ("mode", "kills"),
    [
        ("", 18),
        ("asynchronous", 16),
        pytest.param("", 250, marks=(NIGHT, pytest.mark.timeout(5000))),
        pytest.param("asynchronous", 170, marks=(NIGHT, pytest.mark.timeout(5000))),
    ],
)
def test_killing_it_at_any_instant_loses_no_committed_step_and_no_bit(tmp_path, mode, kills):
    results = FORKS.SimpleQueue()
    arguments = (str(tmp_path), kills, MODES[mode], results)
    child = FORKS.Process(target=kill_again_and_again, args=arguments, daemon=True)
    child.start()
    seen = list(iter(results.get, None))
    child.join(20)
    steps = check_kills(seen, kills) + 2
    run(tmp_path, replace(MODES[mode], steps=steps))
    run(tmp_path / "straight", replace(COMMITS, steps=steps))
    assert_same(tmp_path, tmp_path / "straight")


def part_of_a_run(rank: int, folder: Path, config: TrainConfig) -> None:
    """One process of several that save their own parts."""
    train_and_acknowledge(folder, config)


@pytest.mark.parametrize(
    ("mode", "kills"),
    [
        ("sharded, asynchronous", 6),
        pytest.param("sharded", 40, marks=(NIGHT, pytest.mark.timeout(5000))),
        pytest.param("sharded, asynchronous", 40, marks=(NIGHT, pytest.mark.timeout(5000))),
    ],
)
def test_killing_processes_that_save_their_own_parts_loses_nothing_either(tmp_path, mode, kills):
    """One process is killed at some instant, the other one a little later, as by torchrun."""
    dice = random.Random(0)
    seen = []
    for number in range(kills):
        with started(2, part_of_a_run, tmp_path, SHARDED[mode]) as (children, _):

            def kill(children: list = children) -> None:
                for child in dice.sample(children, 2):
                    child.kill()
                    child.join(60)
                    assert child.exitcode == -signal.SIGKILL
                    time.sleep(dice.random() * 0.02)

            seen.append(wait_and_kill(tmp_path, kill, number % 2 == 0, dice))
    steps = check_kills(seen, kills) + 2
    config = replace(SHARDED[mode], steps=steps)
    together(2, part_of_a_run, tmp_path, config)
    straight = tmp_path / "straight"
    straight.mkdir()
    together(2, part_of_a_run, straight, replace(config, async_save=False))
    assert_same(tmp_path, straight)
