# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does."""

import json
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from latte import distributed
from latte.checkpoint.run import latest_checkpoint, load_checkpoint
from latte.checks import InputError, RunError
from latte.distributed import Group
from latte.training.config import TrainConfig
from several import together
from tiny_runs import FORKS, SHORT, Latents, curve, run

# Adam turns rounding of the smallest gradients into a share of the rate.
TWO = replace(SHORT, steps=6, lr=1e-4, validate_every=2, validate_clips=5)
ENDLESS = replace(TWO, steps=100_000, validate_every=0)


def validation(run_dir: Path) -> list[dict]:
    """validation.jsonl."""
    return [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]


def one_of_two(rank: int, ports: list[int], folder: str, stops: tuple[int, ...], pipe) -> None:
    """What torchrun would start: a process of two. Its last run is stopped by a signal that the other
    process alone receives.

    Every group has a port of its own: the process that is ahead must not meet the one behind at the store
    of the group before.
    """
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    distributed.STARTUP_TIMEOUT = timedelta(seconds=60)
    try:
        for attempt, steps in enumerate(stops):
            os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(attempt), "MASTER_PORT": str(ports.pop())}
            result = run(Path(folder), replace(TWO, steps=steps), held_out=Latents())
        if rank == 1:
            threading.Thread(target=stop_when_handled, daemon=True).start()
        os.environ["MASTER_PORT"] = str(ports.pop())
        stopped = run(Path(folder) / "endless", replace(ENDLESS, checkpoint_every=100_000))
        os.environ["MASTER_PORT"] = str(ports.pop())
        pipe.send((result, stopped, failure_of_the_first(rank)))
    except BaseException as error:
        pipe.send(repr(error))
        raise


def stop_when_handled() -> None:
    """SIGTERM to this process, a little after training has begun to listen for it: before, it would be the
    end of it.
    """
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)


def failure_of_the_first(rank: int) -> str:
    """What each process sees when the first one fails at something only it does."""

    def fail() -> None:
        raise RunError(f"disk of process {rank} is full")

    with distributed.process_group(torch.device("cpu")) as group:
        try:
            group.run_on_rank0(fail)
        except RunError as error:
            return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, list]:
    """The folder of a run of two processes, stopped and resumed on the way, and what each of them returned."""
    folder = tmp_path_factory.mktemp("pair")
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(4)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in sockets]
    pipes, children = zip(*(FORKS.Pipe() for _ in range(2)), strict=True), []
    ours, expected = pipes
    for rank in range(2):
        children.append(
            FORKS.Process(
                target=one_of_two, args=(rank, ports, str(folder), (2, 6), expected[rank]), daemon=True
            )
        )
        children[-1].start()
    assert all(pipe.poll(200) for pipe in ours)
    results = [pipe.recv() for pipe in ours]
    for child in children:
        child.join(30)
    assert all(isinstance(result, tuple) for result in results), results
    return folder, results


def test_the_result_is_that_of_one_process(pair, tmp_path):
    folder, results = pair
    run(tmp_path, TWO, held_out=Latents())
    two, one = (load_checkpoint(latest_checkpoint(path)) for path in (folder, tmp_path))
    assert two.step == one.step == 6
    for group in ("model", "ema"):
        for name, tensor in one.tensors[group].items():
            torch.testing.assert_close(two.tensors[group][name], tensor, rtol=0, atol=1e-6)
    for line, expected in zip(curve(folder), curve(tmp_path), strict=True):
        assert line == pytest.approx(expected, rel=1e-5)
    measured, expected = (validation(path) for path in (folder, tmp_path))
    assert [line["step"] for line in measured] == [2, 4, 6]
    for line, other in zip(measured, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    assert results[0][0] == results[1][0]


def test_a_signal_that_one_of_them_receives_stops_both_at_the_same_step(pair):
    folder, results = pair
    (_, first, _), (_, second, _) = results
    assert first == second
    assert first["interrupted"] == 143
    assert first["checkpoint"] == str(folder / "endless" / "checkpoints" / f"step-{first['step']}")


def test_what_fails_in_the_first_fails_in_both(pair):
    assert [failure for _, _, failure in pair[1]] == ["disk of process 0 is full"] * 2


def test_alone_everything_is_a_plain_call():
    group, tensor = Group(), torch.ones(2)
    group.all_reduce([tensor])
    group.broadcast([tensor])
    assert tensor.tolist() == [1.0, 1.0]
    assert group.max(3) == 3
    assert group.run_on_rank0(lambda a, b: a + b, 1, 2) == 3


class Answering:
    """A store in which every process has reported that the operation failed."""

    def set(self, *entry) -> None: ...

    set_timeout = set

    def check(self, keys: list[str]) -> bool:
        return True


def test_a_lost_connection_is_reported_once():
    group = Group(0, 2, 5.0, store=Answering())
    once = r"connection \(\[gloo/tcp\] closed\); check the network, [^;]*$"
    with pytest.raises(RunError, match=once), group.computation(), group.collective():
        raise RuntimeError("[gloo/tcp] closed")
    with pytest.raises(RunError, match=r"^clips/gloo\.mp4 cannot be written$"), group.computation():
        raise RunError("clips/gloo.mp4 cannot be written")


def fails_beside_a_team(rank: int) -> str:
    """Rank 1 refuses a clip while rank 0 waits for its tokens."""
    try:
        with distributed.command_group(torch.device("cpu"), 60.0) as group:
            team = group.teams(2)
            if rank == 1:
                raise InputError("clip 1 is broken")
            with group.computation():
                torch.distributed.all_reduce(torch.ones(1), group=team.data)
    except (InputError, RunError) as error:
        return str(error)
    return ""


def test_a_lost_connection_says_why_the_other_process_ended():
    found = together(2, fails_beside_a_team)
    assert found == ["rank 1 of 2 failed: clip 1 is broken", "clip 1 is broken"]


def one_stops(rank: int, port: int, folder: str, pipe, config: TrainConfig) -> None:
    """A process of two; rank 1 stops for good when training has begun, as on a machine that hangs."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": str(port)}
    if rank == 1:
        threading.Thread(target=stop_process_when_training, args=(folder,), daemon=True).start()
    try:
        run(Path(folder), config)
    except RunError as error:
        pipe.send(str(error))


def stop_process_when_training(folder: str) -> None:
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        time.sleep(0.01)
    time.sleep(0.3)
    (Path(folder) / "stopped").write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_every": 100_000},
        pytest.param(
            {"parallel": "fsdp", "async_save": True, "checkpoint_every": 1}, marks=pytest.mark.nightly
        ),
    ],
    ids=["replicated", "sharded, asynchronous saves"],
)
def test_a_rank_that_stopped_is_named_within_the_timeout(tmp_path, changes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = FORKS.Pipe()
    children = []
    for rank in range(2):
        arguments = (rank, port, str(tmp_path), there, replace(ENDLESS, timeout=3.0, **changes))
        children.append(FORKS.Process(target=one_stops, args=arguments, daemon=True))
        children[-1].start()
    answered = here.poll(90)
    seconds = time.time() - float((tmp_path / "stopped").read_text())
    print(f"ended {seconds:.1f} s after rank 1 stopped, with a limit of 3 s")
    state = Path(f"/proc/{children[1].pid}/stat").read_text().split()[2]
    for child in children:
        child.kill()
        child.join(10)
    assert state == "T", "rank 1 is stopped"
    assert answered
    message = here.recv()
    assert "rank 1 of 2 did not answer within train.timeout=3 s" in message
    assert "\n" not in message


def test_saving_may_take_longer_than_the_timeout(tmp_path):
    """Rank 0 writes while the others wait in a group with a limit of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = FORKS.Pipe()
    children = [
        FORKS.Process(target=slow_on_rank0, args=(rank, port, there), daemon=True) for rank in range(2)
    ]
    for child in children:
        child.start()
    assert here.poll(60)
    results = [here.recv(), here.recv()]
    for child in children:
        child.join(20)
    assert results == ["done", "done"]


def slow_on_rank0(rank: int, port: int, pipe) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_PORT": str(port)}
    with distributed.process_group(torch.device("cpu"), timeout=1.0) as group:
        try:
            pipe.send(group.run_on_rank0(lambda: time.sleep(3) or "done"))
        except RunError as error:
            pipe.send(str(error))
