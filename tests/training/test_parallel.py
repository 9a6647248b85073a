# SPDX-License-Identifier: Apache-2.0
"""However the processes share the model, they train as one process does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latte.checkpoint.run import Checkpoint, load_latest
from latte.training import parallel
from several import next_group, together
from tiny_runs import SHORT, curve, run

# Adam turns rounding of the smallest gradients into a share of the rate.
STEPS = replace(SHORT, steps=6, global_batch=8, lr=1e-4, log_every=1)
PLANS = {
    "whole": STEPS,
    "accumulated": replace(STEPS, micro_batch=1),
    "recomputed": replace(STEPS, recompute=True, gradient_checkpointing=True),
}


def several_runs(rank: int, folder: Path) -> list[int]:
    """Train every plan; return how many sums of buckets each started."""
    sums = []
    counts = []
    original = parallel.sum_bucket

    def counted(state: None, bucket) -> torch.futures.Future[torch.Tensor]:
        sums.append(bucket.buffer().numel())
        return original(state, bucket)

    parallel.sum_bucket = counted
    parallel.BUCKET_MIB = 0.01  # several buckets of this tiny model
    for name, config in PLANS.items():
        next_group()
        run(folder / name, config)
        counts.append(len(sums))
        sums.clear()
    return counts


@pytest.fixture(scope="module")
def replicated(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """The runs of two processes, and the sums that each started."""
    folder = tmp_path_factory.mktemp("replicated")
    return folder, together(2, several_runs, folder)


def newest(folder: Path) -> Checkpoint:
    """The newest checkpoint of a run."""
    found = load_latest(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("name", PLANS)
def test_replicated_processes_train_as_one(replicated, tmp_path, name):
    run(tmp_path, PLANS[name])
    two, one = (newest(path) for path in (replicated[0] / name, tmp_path))
    for group in ("model", "ema"):
        for key, tensor in one.tensors[group].items():
            torch.testing.assert_close(two.tensors[group][key], tensor, rtol=0, atol=1e-6)
    for line, expected in zip(curve(replicated[0] / name), curve(tmp_path), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-6)
        assert line == pytest.approx(expected, rel=1e-5)


def test_gradients_are_summed_in_buckets_once_a_step(replicated):
    """Also when micro batches add up in each process first."""
    first, second = replicated[1]
    assert first == second
    assert len(set(first)) == 1
    assert 2 * STEPS.steps < first[0] < 6 * STEPS.steps
