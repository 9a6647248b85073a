# SPDX-License-Identifier: Apache-2.0
"""The order of the data is a function of (seed, step) alone: the same for every number of ranks, workers and
restarts.
"""

import gc
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from encoded import pixels
from latte.checks import InputError, RunError
from latte.data import loader as loader_module
from latte.data.datasets import Clip, DataConfig, FolderDataset
from latte.data.encode import encode_dataset
from latte.data.joint import JointDataset
from latte.data.latents import LatentDataset
from latte.data.loader import Loader, load_batch
from latte.data.media import Unreadable
from latte.data.order import items_of_step, permuted
from videos import encode, numbered


class Unpicklable(ValueError):
    """An error that holds what cannot be sent to another process."""

    def __init__(self):
        super().__init__("a handle")
        self.handle = open(os.devnull)  # noqa: SIM115

    def __del__(self):
        self.handle.close()


class Killed(Exception):
    """Raising it kills the process, as the system does when memory runs out."""

    def __init__(self):
        os.kill(os.getpid(), signal.SIGKILL)


class Numbers:
    """A dataset whose clip holds its index and a random number; of varying speed, so that workers overtake
    each other.
    """

    def __init__(self, length=37, fail_at=None, fail_with=None, delay=0.0, label=True, report_pid=False):
        self.length = length
        self.fail_at = fail_at
        self.fail_with = fail_with
        self.delay = delay
        self.label = label
        self.report_pid = report_pid
        self.calls = 0

    def __len__(self):
        return self.length

    def clip(self, index, generator):
        self.calls += 1
        if self.delay:
            time.sleep(self.delay * (self.calls % 3))
        if index == self.fail_at:
            raise Unreadable(f"clip {index}", "damaged", "it is broken")
        if self.fail_with:
            raise self.fail_with()
        video = torch.cat([torch.tensor([float(index)]), torch.rand(1, generator=generator)])
        caption = str(os.getpid()) if self.report_pid else None
        return Clip(video, index % 5 if self.label else None, caption, str(index))


@pytest.mark.parametrize("num_items", [1, 2, 3, 4, 7, 10, 37, 100, 997])
def test_each_epoch_is_a_permutation(num_items):
    for seed in (0, 5):
        for epoch in range(4):
            assert sorted(permuted(i, num_items, seed, epoch) for i in range(num_items)) == list(
                range(num_items)
            )


def test_epochs_and_seeds_differ_and_no_place_is_preferred():
    orders = [
        tuple(permuted(i, 50, seed, epoch) for i in range(50)) for seed in range(4) for epoch in range(4)
    ]
    assert len(set(orders)) == 16
    places = Counter(permuted(3, 10, 0, epoch) for epoch in range(5000))
    chi2 = sum((places[i] - 500) ** 2 / 500 for i in range(10))
    assert chi2 < 27.9, f"chi-squared {chi2:.1f} with 9 degrees of freedom (0.1 % level)"
    pairs = Counter((permuted(0, 6, 0, epoch), permuted(1, 6, 0, epoch)) for epoch in range(6000))
    chi2 = sum((pairs[i, j] - 200) ** 2 / 200 for i in range(6) for j in range(6) if i != j)
    assert chi2 < 58.3, f"neighbours depend on each other: chi-squared {chi2:.1f} with 29 degrees of freedom"


def test_fixed_points_of_shuffles_of_three_come_as_often_as_chance_has_them():
    orders = Counter(tuple(permuted(i, 3, 0, epoch) for i in range(3)) for epoch in range(3000))
    assert len(orders) == 6
    assert min(orders.values()) > 350, orders


def test_the_row_of_items_is_cut_into_batches_that_straddle_epochs():
    row = [item for step in range(40) for item in items_of_step(9, step, 8, 37)]
    for epoch in range(len(row) // 37):
        assert sorted(row[37 * epoch : 37 * (epoch + 1)]) == list(range(37))
    assert row == [item for step in range(10) for item in items_of_step(9, step, 32, 37)], (
        "the order does not depend on the batch"
    )
    assert Counter(items_of_step(0, 0, 100, 7)).most_common()[-1][1] >= 14, "a batch may hold several epochs"


def test_a_huge_set_needs_no_memory():
    began = time.perf_counter()
    items = items_of_step(1, 10**9, 1000, 10**12)
    assert len(set(items)) == 1000
    assert max(items) < 10**12
    assert max(items) > 9e11
    assert (time.perf_counter() - began) / 1000 < 1e-3


def ids(world: int, workers: int, start: int, stop: int) -> list[tuple[str, float]]:
    """(index, its random number) of all samples of steps start ... stop - 1, over ``world`` processes."""
    data = Numbers(delay=0.0003 if workers > 1 else 0.0)
    loaders = [Loader(data, 4, 20, start, stop, rank, world, workers) for rank in range(world)]
    samples = []
    for batches in zip(*loaders, strict=True):
        for batch in batches:
            samples += list(zip(batch.keys, batch.video[:, 1].tolist(), strict=True))
    for loader in loaders:
        loader.close()
    return samples


def test_the_first_500_samples_are_the_same_for_every_rank_and_resume():
    reference = ids(1, 0, 0, 25)
    assert len(reference) == 500
    assert len({number for _, number in reference}) > 480, "every sample has random numbers of its own"
    for world in (1, 2, 4):
        assert ids(world, 0, 0, 25) == reference, world
    for resume in (1, 2, 3, 7, 12, 19, 24):
        assert ids(2, 0, 0, resume) + ids(4, 0, resume, 25) == reference, resume


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize(("world", "workers", "resume"), [(1, 1, 25), (2, 1, 8), (1, 3, 13)])
def test_the_first_500_samples_are_the_same_for_every_number_of_workers(world, workers, resume):
    before = ids(world, workers, 0, resume)
    after = ids(1, workers, resume, 25) if resume < 25 else []
    assert before + after == ids(1, 0, 0, 25)
    assert multiprocessing.active_children() == []


def test_worker_processes_load_and_the_global_random_state_is_not_touched():
    state = torch.get_rng_state()
    with Loader(Numbers(report_pid=True), 0, 4, workers=2, stop=4) as loader:
        processes = {int(pid) for batch in loader for pid in batch.captions}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert [batch.step for batch in Loader(Numbers(), 0, 4, stop=1)] == [0]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_real_videos_and_latents_are_the_same_bits_in_worker_processes(tmp_path, workers):
    for index in range(3):
        encode(tmp_path / f"{index}.mp4", numbered(10))
    config = DataConfig(root=str(tmp_path), resolution=16, frames=4, interval=2, flip=True)
    encode_dataset(config, pixels(), tmp_path / "latents", cache_dir=tmp_path / "cache")
    latents = LatentDataset(replace(config, kind="latents", root=str(tmp_path / "latents")))
    for dataset in (FolderDataset(config, tmp_path / "cache"), JointDataset(latents, 2)):
        expected = [load_batch(dataset, 7, step, 4) for step in range(3)]
        with Loader(dataset, 7, 4, stop=3, workers=workers) as loader:
            batches = list(loader)
        assert len(batches) == 3
        assert all(torch.equal(one.video, two.video) for one, two in zip(batches, expected, strict=True))
        assert [batch.keys for batch in batches] == [batch.keys for batch in expected]


def test_a_batch_has_labels_only_when_all_clips_do():
    batch = load_batch(Numbers(), 0, 3, 6)
    assert batch.label.dtype == torch.int64
    assert batch.label.tolist() == [int(key) % 5 for key in batch.keys]
    assert (batch.step, batch.video.shape) == (3, (6, 2))
    assert load_batch(Numbers(label=False), 0, 3, 6).label is None
    with pytest.raises(InputError, match="6, which 4 processes cannot share evenly; give a multiple of 4"):
        load_batch(Numbers(), 0, 0, 6, 0, 4)
    with pytest.raises(InputError, match="the dataset is empty"):
        load_batch(Numbers(0), 0, 0, 6)


@pytest.mark.usefixtures("quick_start")
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_comes_out_at_its_own_step_and_ends_the_loader(workers):
    bad = items_of_step(0, 2, 4, 37)[1]
    assert bad not in [item for step in (0, 1) for item in items_of_step(0, step, 4, 37)]
    loader = Loader(Numbers(fail_at=bad), 0, 4, workers=workers, ahead=4)
    assert [next(loader).step, next(loader).step] == [0, 1]
    with pytest.raises(Unreadable) as caught:
        next(loader)
    assert str(caught.value) == str(Unreadable(f"clip {bad}", "damaged", "it is broken")), (
        "one line, as it was raised"
    )
    assert (caught.value.path, caught.value.reason) == (f"clip {bad}", "damaged: it is broken")
    assert workers == 0 or "in clip" in caught.value.__notes__[0], (
        "the worker's traceback is kept for --debug"
    )
    with pytest.raises(StopIteration):
        next(loader)
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("quick_start")
def test_an_error_that_cannot_be_sent_is_one_line():
    with pytest.raises(RunError, match=r"^loading a batch failed with Unpicklable: a handle$"):
        next(Loader(Numbers(fail_with=Unpicklable), 0, 4, workers=1))
    with pytest.raises(Unpicklable):
        next(Loader(Numbers(fail_with=Unpicklable), 0, 4))


def test_a_worker_that_dies_while_the_consumer_waits_is_one_line():
    loader = Loader(Numbers(fail_with=Killed), 0, 4, workers=1)
    with pytest.raises(
        RunError, match=r"^a data worker died at step 0 \(.*signal: Killed\); .*fewer data\.workers"
    ) as caught:
        next(loader)
    assert "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_during_a_step_is_one_line():
    def train():
        with Loader(Numbers(), 0, 4, workers=1) as loader:
            next(loader)
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(20)  # a step of training, interrupted by torch's signal handler

    with pytest.raises(RunError, match=r"^a data worker died \(.*signal: Killed\)"):
        train()


def test_a_dataset_that_cannot_be_pickled_names_the_setting():
    dataset = Numbers()
    dataset.clip = lambda index, stream: None
    with pytest.raises(
        InputError, match=r"^data\.workers is 2, but this dataset cannot be pickled .*set data\.workers=0"
    ):
        Loader(dataset, 0, 4, workers=2)
    gc.collect()
    assert multiprocessing.active_children() == []


def test_counts_out_of_range_are_refused():
    with pytest.raises(InputError, match=r"^data\.workers must be at least 0, got -1$"):
        Loader(Numbers(), 0, 4, workers=-1)
    with pytest.raises(InputError, match=r"^a worker must prepare at least 1 batch in advance, got 0$"):
        Loader(Numbers(), 0, 4, ahead=0)
    with pytest.raises(InputError, match=r"^data\.workers must be at least 0, got -2$"):
        DataConfig(kind="procedural", workers=-2)


def test_steps_from_start_to_stop():
    assert [batch.step for batch in Loader(Numbers(), 0, 2, start=5, stop=9)] == [5, 6, 7, 8]
    assert list(Loader(Numbers(), 0, 2, start=9, stop=9)) == []
    with Loader(Numbers(), 0, 2) as endless:
        assert [next(endless).step for _ in range(3)] == [0, 1, 2]


@pytest.mark.usefixtures("quick_start")
def test_waiting_is_counted_and_workers_hide_it():
    with Loader(Numbers(delay=0.01), 0, 3, workers=0) as loader:
        next(loader)
        assert loader.waited >= 0.02
    waited = []
    for _ in range(3):  # other processes may hold up the worker: the best of three
        with Loader(Numbers(delay=0.01), 0, 3, workers=1, stop=8) as loader:
            next(loader)
            before = loader.waited
            for _ in loader:
                time.sleep(0.06)  # a step of training; loading takes half as long
            waited.append(loader.waited - before)
        if waited[-1] < 0.5 * 7 * 0.03:
            break
    assert min(waited) < 0.5 * 7 * 0.03


@pytest.mark.usefixtures("quick_start")
def test_a_read_that_hangs_is_reported_and_its_process_killed(monkeypatch):
    monkeypatch.setattr(loader_module, "BATCH_TIMEOUT", 3.0)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    loader = Loader(Numbers(delay=1000.0), 0, 2, workers=1)
    with pytest.raises(RunError, match=r"^no batch arrived at step 0 within 3 s; is the disk of data\.root"):
        next(loader)
    assert multiprocessing.active_children() == []


SCRIPT = """
import sys, time
from latte.data.datasets import DataConfig, ProceduralDataset
from latte.data.loader import Loader

if __name__ == "__main__":
    dataset = ProceduralDataset(DataConfig(kind="procedural", resolution=8, frames=2, num_clips=9))
    loader = Loader(dataset, 0, 2, workers=1)
    next(loader)
    try:
        print(*[worker.pid for worker in loader._workers], flush=True)
        sys.stdin.read()
    except KeyboardInterrupt:
        print([next(loader).step for _ in range(9)], flush=True)
        loader.close()
"""


def alive(pid: int) -> bool:
    """Whether process ``pid`` runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("end", ["interrupt", "exit", "kill"])
def test_workers_survive_ctrl_c_and_never_outlive_the_program(tmp_path, end):
    """Ctrl-C reaches the whole process group, and only the main process acts on it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    program = subprocess.Popen(
        [sys.executable, script], stdin=-1, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    assert program.stdout is not None
    pids = [int(word) for word in program.stdout.readline().split()]
    assert len(pids) == 1
    assert all(map(alive, pids))
    if end == "interrupt":
        os.killpg(program.pid, signal.SIGINT)
    elif end == "kill":
        program.kill()
    out, errors = program.communicate(timeout=60)
    if end == "interrupt":
        assert out == "[1, 2, 3, 4, 5, 6, 7, 8, 9]\n"
    # torch's native threads rarely print this while a process ends; nothing of ours is running any more
    errors = errors.replace("terminate called without an active exception\n", "")
    # nor is this: Python's tracker of semaphores, when program and worker end at the same moment
    errors = re.sub(r".*resource_tracker.*\n  warnings\.warn.*\n", "", errors)
    assert errors == "" or (end == "kill" and "Traceback" not in errors)
    deadline = time.monotonic() + 20  # torch's worker looks for its parent every 5 seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_the_number_of_rounds_mixes_both_halves():
    """With whole rows moved together neighbours would stay neighbours; about one pair in n should."""
    n = 10_000
    order = [permuted(i, n, 3, 0) for i in range(n)]
    close = sum(abs(a - b) == 1 for a, b in pairwise(order))
    assert close < 2 + 6 * math.sqrt(2), close
