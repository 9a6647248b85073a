# SPDX-License-Identifier: Apache-2.0
"""What a run of days needs: restarts by torchrun's agent, and memory that does not grow."""

import gc
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from latte.checkpoint.run import list_checkpoints
from latte.data.media import probe, read_frames
from latte.data.writers import write_mp4
from latte.inference.generate import SampleConfig
from latte.training.callbacks import Callback, TrainEvent
from several import together
from tiny import tiny_trained
from tiny_runs import FORKS, SHORT, assert_same, run
from videos import numbered

ELASTIC = replace(
    SHORT, steps=24, checkpoint_every=2, parallel="fsdp", async_save=True, timeout=60.0, log_every=1
)
LIMIT = 8 << 20  # bytes of growth


class Resumed(Callback):
    """Notes when the first step after a restart is done."""

    def __init__(self, folder: Path):
        self.file = folder / "resumed"

    def on_step(self, event: TrainEvent) -> None:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and not self.file.exists():
            self.file.write_text(str(time.time()))


def one_process(folder: Path, victim: int, step: int) -> None:
    """What the agent starts; in its first attempt process ``victim`` is killed when it sees a checkpoint."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    def end() -> None:
        while not any(int(path.name[5:]) >= step for path in list_checkpoints(folder)):
            time.sleep(0.005)
        (folder / "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and int(os.environ["RANK"]) == victim:
        threading.Thread(target=end, daemon=True).start()
    run(folder, ELASTIC, callbacks=[Resumed(folder)])


def agent(folder: Path, victim: int, step: int) -> None:
    """torchrun --standalone --nproc-per-node 2 --max-restarts 1, with processes that have imported torch."""
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        monitor_interval=0.1,
        start_method="forkserver",
    )
    elastic_launch(settings, one_process)(folder, victim, step)


def undisturbed(rank: int, folder: Path) -> None:
    """One process of the same run."""
    run(folder, ELASTIC)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """The folder of a run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    together(2, undisturbed, folder)
    return folder


NIGHT = pytest.mark.nightly
KILLS = [(1, 4), (0, 2), (0, 4), (0, 8), (1, 2), (1, 8)]


@pytest.mark.parametrize(
    ("victim", "step"),
    [pytest.param(*kill, marks=NIGHT if number else ()) for number, kill in enumerate(KILLS)],
)
def test_a_killed_rank_restarts_all_and_they_end_where_an_undisturbed_run_ends(
    tmp_path, straight, victim, step
):
    process = FORKS.Process(target=agent, args=(tmp_path, victim, step))
    process.start()
    process.join(280)
    code = process.exitcode
    process.kill()
    assert code == 0
    seconds = float((tmp_path / "resumed").read_text()) - float((tmp_path / "killed").read_text())
    print(f"rank {victim} killed at step {step}: first step after the restart {seconds:.1f} s later")
    assert seconds > 0
    assert_same(tmp_path, straight)


def resident() -> int:
    """Return the bytes of memory that this process has, after what is garbage is gone."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(count: int, work) -> tuple[int, int]:
    """Call ``work(number)`` ``count`` times; return the growth of memory and open files since a quarter."""
    before = [0, 0]
    for number in range(count):
        work(number)
        if number == count // 4:
            before = [resident(), len(os.listdir("/proc/self/fd"))]
    return resident() - before[0], len(os.listdir("/proc/self/fd")) - before[1]


class Measured(Callback):
    """Memory and open files at a quarter and at the end of a run."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_step(self, event: TrainEvent) -> None:
        if event.step in (event.total_steps // 4, event.total_steps):
            self.seen.append((resident(), len(os.listdir("/proc/self/fd"))))


def train_long(folder: Path, async_save: bool) -> tuple[int, int]:
    measured = Measured()
    config = replace(SHORT, steps=1000, checkpoint_every=50, async_save=async_save, log_every=10)
    run(folder, config, callbacks=[measured], sample=lambda model, step: None)
    first, last = measured.seen
    return last[0] - first[0], last[1] - first[1]


def sample_often(folder: Path, _: bool) -> tuple[int, int]:
    trained = tiny_trained()
    config = SampleConfig(sampler="ddim", steps=4, guidance=2.0)
    return growth(200, lambda seed: dict(trained.generate([seed], [0], config=config)))


def decode_often(folder: Path, _: bool) -> tuple[int, int]:
    write_mp4(folder / "clip.mp4", numbered(24))
    info = probe(folder / "clip.mp4")
    return growth(500, lambda number: read_frames(info, [number % 24, (number * 7) % 24]))


def measure(work, folder: Path, asynchronous: bool, pipe) -> None:
    """Send what ``work`` returns, from a process of its own."""
    torch.set_num_threads(1)
    pipe.send(work(folder, asynchronous))


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("work", "asynchronous"),
    [(train_long, False), (train_long, True), (sample_often, False), (decode_often, False)],
)
def test_memory_and_open_files_do_not_grow(tmp_path, work, asynchronous):
    """1000 training steps with 20 checkpoints, 200 clips, 500 decoded parts of a video."""
    here, there = FORKS.Pipe()
    child = FORKS.Process(target=measure, args=(work, tmp_path, asynchronous, there), daemon=True)
    child.start()
    assert here.poll(2900)
    grown, files = here.recv()
    print(f"{work.__name__} {asynchronous}: {grown / 2**20:+.2f} MiB, {files:+d} open files")
    assert grown <= LIMIT
    assert files <= 0
