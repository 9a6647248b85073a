# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is written by all processes that hold a part of it, and on request while training goes on."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from latte.checkpoint.run import list_checkpoints, load_checkpoint
from latte.checks import InputError, RunError
from latte.distributed import Group, ProcessLost
from latte.files import sweep_checkpoints
from latte.training import saving
from latte.training.resume import check_same
from latte.training.saving import Saver
from several import together
from tiny_runs import SHORT, Latents, run

Parts = dict[str, dict[str, Any]]


class Store(dict):
    """What the processes of a group share, as torch's stores: values become bytes."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


@dataclass(frozen=True)
class Threads(Group):
    """A group whose processes are threads of this one."""

    shared: dict = field(default_factory=dict)
    barrier: Any = None

    def run_on_rank0(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.rank == 0:
            try:
                self.shared["outcome"] = function(*arguments)
            except RunError as error:
                self.shared["outcome"] = error
        self.barrier.wait(60)
        if isinstance(self.shared["outcome"], RunError):
            raise self.shared["outcome"]
        return self.shared["outcome"]


class Split:
    """Stands for a DTensor: ``local`` is this process's part."""

    placements = ()

    def __init__(self, local: torch.Tensor):
        self.local = local

    def to_local(self) -> torch.Tensor:
        return self.local


def parts_of(rank: int, value: float = 1.0) -> Parts:
    """A tensor of 5 rows in two parts, and a number that only the first process saves."""
    rows = torch.arange(5.0) + value
    return {"model": {"w": Split(rows.chunk(2)[rank]), "n": torch.tensor(value)}}


def both(
    run_dir: Path, parts: tuple[Parts, Parts], folders: tuple[Path, Path] | None = None, asynchronous=False
) -> list:
    """Save as two processes do; return what each raised, or the checkpoints that it knows of."""
    store = Store()
    shared: dict = {}
    barrier = threading.Barrier(2)
    answers: list[Any] = [None, None]

    def save(rank: int) -> None:
        group = Threads(rank, 2, store=store, shared=shared, barrier=barrier)
        with Saver(run_dir, group, 2, asynchronous) as saver:
            try:
                saver.save(3, parts[rank], {"metrics": {}})
                saver.finish()
                answers[rank] = saver.committed()
            except RunError as error:
                answers[rank] = str(error)

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return answers


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_processes_write_their_own_parts(tmp_path, asynchronous):
    path = tmp_path / "checkpoints" / "step-3"
    answers = both(tmp_path, (parts_of(0), parts_of(1)), asynchronous=asynchronous)
    assert answers == [[path], [path]]
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", *names, "state.json"]
    found = load_checkpoint(path).tensors["model"]
    assert torch.equal(found["w"], torch.arange(5.0) + 1)
    assert found["n"] == 1


def test_what_stops_one_process_ends_the_save_in_all_and_is_named(tmp_path):
    both(tmp_path, (parts_of(0), parts_of(1)))
    bad = parts_of(1, float("nan"))
    answers = both(tmp_path, (parts_of(0, 2.0), bad))
    assert answers[0] == answers[1]
    assert answers[0].startswith("rank 1 of 2: the checkpoint of step 3 was not written: model tensor 'w'")
    answers = both(tmp_path, (bad, parts_of(1, 2.0)))
    assert answers[0] == answers[1]
    assert "model tensor 'w' holds" in answers[0]
    assert load_checkpoint(tmp_path / "checkpoints" / "step-3").tensors["model"]["n"] == 1
    assert not list(tmp_path.glob("checkpoints/.*"))


def test_a_process_that_does_not_see_the_folder_is_named(tmp_path, monkeypatch):
    real = Path.is_dir

    def elsewhere(path: Path) -> bool:
        return real(path) and not (path.name.startswith(".tmp-") and path.parent.name == "checkpoints")

    monkeypatch.setattr(saving.Path, "is_dir", elsewhere)
    answers = both(tmp_path, (parts_of(0), parts_of(1)))
    assert answers[0] == answers[1]
    place = tmp_path / "checkpoints"
    assert f"rank 1 of 2 and rank 0 do not see the same folder {place}; give a run.dir" in answers[0]
    assert list_checkpoints(tmp_path) == []


class Slow:
    """Stands for ``save_checkpoint``: waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.gate = threading.Event()
        self.begun: list[int] = []
        self.real = saving.save_checkpoint
        monkeypatch.setattr(saving, "save_checkpoint", self)

    def __call__(self, run_dir: Path, step: int, *rest: Any) -> Path:
        self.begun.append(step)
        assert self.gate.wait(60)
        return self.real(run_dir, step, *rest)


def test_training_goes_on_while_a_copy_is_written_and_the_next_save_waits(tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    weight = torch.ones(3)
    about = {"metrics": {"seconds": 1}}
    with Saver(tmp_path, Group(), asynchronous=True) as saver:
        saver.save(1, {"model": {"w": weight}}, about)
        saver.settle()
        weight += 1
        about["metrics"]["seconds"] = 2
        buffer = saver.buffers["model", "w"].data_ptr()
        assert saver.committed() == []
        next_save = threading.Thread(target=saver.save, args=(2, {"model": {"w": weight}}, about))
        next_save.start()
        time.sleep(0.1)
        assert next_save.is_alive()
        assert slow.begun == [1]
        slow.gate.set()
        next_save.join(60)
        saver.finish()
        assert slow.begun == [1, 2]
        assert saver.buffers["model", "w"].data_ptr() == buffer, "memory is taken once"
        paths = saver.committed()
    first, second = (load_checkpoint(path) for path in paths)
    assert first.tensors["model"]["w"].tolist() == [1.0] * 3
    assert second.tensors["model"]["w"].tolist() == [2.0] * 3
    assert [found.state["metrics"]["seconds"] for found in (first, second)] == [1, 2]


def test_the_weights_may_change_when_the_copy_is_taken(tmp_path, monkeypatch):
    gate = threading.Event()
    real = Saver.staged

    def slow(saver: Saver, own: Any) -> Any:
        assert gate.wait(60)
        return real(saver, own)

    monkeypatch.setattr(Saver, "staged", slow)
    weight = torch.ones(3)
    with Saver(tmp_path, Group(), asynchronous=True) as saver:
        saver.settle()
        saver.save(1, {"model": {"w": weight}}, {})
        update = threading.Thread(target=lambda: (saver.settle(), weight.add_(1)))
        update.start()
        time.sleep(0.1)
        assert update.is_alive()
        gate.set()
        update.join(60)
        saver.finish()
    assert weight.tolist() == [2.0] * 3
    assert load_checkpoint(tmp_path / "checkpoints/step-1").tensors["model"]["w"].tolist() == [1.0] * 3


class OnGPU:
    """Stands for a tensor of the second GPU of a machine."""

    shape = torch.Size([3])
    dtype = torch.float32
    device = torch.device("cuda:1")

    def detach(self) -> torch.Tensor:
        return torch.ones(3)


def test_the_copy_waits_for_the_gpu_that_it_reads(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    saver = Saver(tmp_path, Group(), asynchronous=True)
    saver.buffers["model", "w"] = torch.zeros(3)
    found = saver.staged({"model": {"w": OnGPU()}, "ema": {"step": torch.ones(2)}})
    assert found["model"]["w"].tolist() == [1.0] * 3
    assert waited == [torch.device("cuda:1")], "a thread's own device is the first, whatever training uses"


def test_a_save_that_fails_stops_the_run_at_the_next_one_or_at_its_end(tmp_path):
    (tmp_path / "checkpoints").touch()
    for go_on in (lambda saver: saver.finish(), lambda saver: saver.save(2, {}, {})):
        with Saver(tmp_path, Group(), asynchronous=True) as saver:
            saver.save(1, {"model": {"w": torch.ones(1)}}, {})
            with pytest.raises((RunError, InputError), match="checkpoint"):
                go_on(saver)


def leave(saver: Saver, error: BaseException, parts: Parts, gate: threading.Event | None = None) -> None:
    """Begin a save, open ``gate`` a little later and leave the block with ``error``."""
    with saver:
        saver.save(1 if gate else 2, parts, {})
        if gate:
            threading.Timer(0.2, gate.set).start()
        raise error


def test_an_error_elsewhere_lets_the_save_end_but_does_not_wait_for_lost_processes(tmp_path, monkeypatch):
    gate = Slow(monkeypatch).gate
    with pytest.raises(KeyError):
        leave(Saver(tmp_path, Group(), asynchronous=True), KeyError(), {"model": {"w": torch.ones(1)}}, gate)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    monkeypatch.setattr(saving, "REPORT_SECONDS", 0.2)
    saver = Saver(tmp_path, Threads(0, 2, store=Store()), 2, asynchronous=True)
    with pytest.raises(ProcessLost):
        leave(saver, ProcessLost(), parts_of(0))
    assert saver.thread is not None
    saver.thread.join(60)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1"]
    sweep_checkpoints(tmp_path)
    assert not list(tmp_path.glob("checkpoints/.*"))


class Fewer(Latents):
    def describe(self) -> dict:
        return {**super().describe(), "clips": 9}


def with_other_data(rank: int, folder: Path) -> str:
    """Start a run of two whose second process reads other data."""
    try:
        run(folder, SHORT, dataset=Fewer() if rank else Latents())
    except InputError as error:
        return str(error)
    return "no error"


def test_a_process_with_other_data_is_named_before_training(tmp_path):
    answers = together(2, with_other_data, tmp_path)
    expected = (
        "rank 1 of 2: data.clips is 9, but rank 0 has 10; give every process the same settings and files"
    )
    assert answers == [expected] * 2
    check_same({"data": 1}, Group())
