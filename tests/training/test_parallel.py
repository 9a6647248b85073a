# SPDX-License-Identifier: Apache-2.0
"""However the processes share the model, they train as one process does."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from latte.checkpoint.run import Checkpoint, latest_checkpoint, load_latest, open_checkpoint
from latte.checks import InputError, RunError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.distributed import process_group
from latte.tensors import tensors_sha256
from latte.training import parallel
from latte.training.callbacks import Callback, TrainEvent
from latte.training.config import PARALLELISMS, TrainConfig
from latte.training.optim import Gathered, TrainState
from latte.training.parallel import local_part
from latte.training.step import Task, backward
from several import next_group, together
from tiny_runs import SHORT, TINY, Latents, assert_same, curve, run, tiny_model

# Adam turns rounding of the smallest gradients into a share of the rate.
STEPS = replace(SHORT, steps=6, global_batch=8, lr=1e-4, log_every=1)
PLANS = {
    "whole": STEPS,
    "accumulated": replace(STEPS, micro_batch=1),
    "recomputed": replace(STEPS, recompute=True, gradient_checkpointing=True),
}


# 20 steps, in two parts where a run is resumed
LONG = replace(STEPS, steps=20, checkpoint_every=8, keep_last=9, validate_every=10, validate_clips=3)
SPLIT = {
    "fsdp": replace(LONG, parallel="fsdp", async_save=True),
    "accumulated": replace(LONG, parallel="fsdp", micro_batch=1),
    "hsdp": replace(LONG, parallel="hsdp", shard_size=2, recompute=True, gradient_checkpointing=True),
    "sequence": replace(LONG, sequence_parallel=2, micro_batch=2),
    "both": replace(LONG, parallel="fsdp", sequence_parallel=2, gradient_checkpointing=True),
}
OPTIONS = replace(TINY, qk_norm=True, value_residual=True, mlp="swiglu")  # of blocks, all at once
WITH_OPTIONS = replace(STEPS, parallel="fsdp")
WIDE = replace(TINY, depth=4, width=64)


class Counted(parallel.DistributedDataParallel):
    """Keeps all that are made, and how often a micro batch was not summed."""

    made: ClassVar[list[Any]] = []
    unsummed = 0

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.made.append(self)

    def no_sync(self) -> Any:
        self.unsummed += 1
        return super().no_sync()


def several_runs(rank: int, folder: Path) -> tuple[list[tuple[int, int]], list[str]]:
    """Train every plan; return how many buckets each had and how often it did not sum, and the errors of runs
    with NaN.
    """
    counts = []
    parallel.DistributedDataParallel = Counted
    parallel.BUCKET_MIB = 0.01  # several buckets of this tiny model
    for name, config in PLANS.items():
        next_group()
        run(folder / name, config)
        made = Counted.made.pop()
        sizes = made._get_ddp_logging_data()["rebuilt_bucket_sizes"]
        counts.append((sizes.count(",") + 1, made.unsummed))
    return counts, [failure(rank, folder / "loss", 3.0, 1), failure(rank, folder / "gradient", 1.0, 0)]


def failure(rank: int, folder: Path, scale: float, bad_rank: int) -> str:
    """Return the error of a run whose loss, or with ``scale`` 1 whose gradient alone, is NaN on one rank from
    step 3 on.
    """
    calls = []

    def objective(*arguments: Any) -> Any:
        calls.append(1)
        loss = OBJECTIVES["paper"](*arguments)
        if rank != bad_rank or len(calls) < 3:
            return loss
        if scale != 1:
            return loss._replace(total=loss.total * float("nan"))
        loss.total.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    next_group()
    try:
        run(folder, STEPS, objective=objective)
    except RunError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def replicated(tmp_path_factory) -> tuple[Path, list]:
    """The runs of two processes, and what each returned."""
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
    """Micro batches but the last add up in each process."""
    (first, _), (second, _) = replicated[1]
    assert first == second
    assert all(2 <= buckets < 10 for buckets, _ in first)
    assert [unsummed for _, unsummed in first] == [0, 3 * STEPS.steps, 0]


def test_nan_on_one_rank_ends_all_and_names_step_and_rank(replicated):
    (_, first), (_, second) = replicated[1]
    assert first == second
    assert first[0].startswith("loss or gradient of step 3 is NaN or Inf on rank 1 of 2, and nothing")
    assert "step 3 is NaN or Inf (the sum of the gradients; the loss of each of 2 ranks" in first[1]


class Watching(Callback):
    """Keeps the EMA weight that a sample function sees, and what is left of it afterwards."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []

    def on_step(self, event: TrainEvent) -> None:
        weight = next(event.ema_model.parameters())
        self.seen.append((event.step, weight.device.type))


def split_runs(rank: int, folder: Path, names: tuple[str, ...], resumed: tuple[Path, int] | None) -> Any:
    """Train each of ``names``; then resume the run of other processes and stop it at a step."""
    results = [run(folder / name, SPLIT[name], held_out=Latents()) for name in names if not next_group()]
    if resumed:
        path, end = resumed
        next_group()
        run(path, SPLIT["fsdp"], held_out=Latents(), until=end)
        if len(names) > 2:  # of the four processes
            if rank == 0:
                shutil.copytree(path, folder / "again")
            next_group()
            run(folder / "again", SPLIT["fsdp"], held_out=Latents())
    if "sequence" in names:
        next_group()
        run(folder / "stopped", SPLIT["sequence"], held_out=Latents(), until=9)
        next_group()
        run(folder / "stopped", SPLIT["sequence"], held_out=Latents())
        next_group()
        run(folder / "options", WITH_OPTIONS, model=tiny_model(OPTIONS))
    next_group()
    found = results, bytes_of_training("fsdp"), sampled(folder / "sampled")
    if "accumulated" not in names:
        return found
    return (*found, reloaded(folder.parent / "4/fsdp"))


def reloaded(folder: Path) -> dict[str, str]:
    """Load the newest checkpoint of a run of other processes; return the hash of each group."""
    config = TrainConfig(parallel="fsdp", global_batch=4, dtype="fp32")
    cpu = torch.device("cpu")
    path = latest_checkpoint(folder)
    assert path is not None
    next_group()
    with process_group(cpu) as group:
        model = tiny_model()
        shared = PARALLELISMS["fsdp"](model, group, config, cpu, torch.float32)
        state = TrainState(model, 1e-3, 0.0, 0.9, skeleton=shared.skeleton)
        state.load(open_checkpoint(path).tensors)
        return {kind: tensors_sha256(Gathered(parts)) for kind, parts in state.parts().items()}


def bytes_of_training(name: str) -> dict[str, int]:
    """Return the bytes that this process has of weights, gradients, EMA weights and optimizer state when a
    gradient has been summed.
    """
    config = TrainConfig(parallel=name, global_batch=4, dtype="fp32")
    cpu = torch.device("cpu")
    with process_group(cpu) as group:
        model = tiny_model(WIDE)
        shared = PARALLELISMS[name](model, group, config, cpu, torch.float32)
        state = TrainState(model, 1e-3, 0.0, 0.9, skeleton=shared.skeleton)
        objective = OBJECTIVES["paper"]
        process = build_process(DiffusionConfig())
        task = Task(model, shared.forward, process, objective, None, 0, 4, None, cpu, torch.float32)
        counted = {}
        for step in (1, 2):
            losses = backward(task, step, [group.rank], torch.ones(1, 3, 4, 4, 4), torch.zeros(1).long())
            gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
            counted = {"gradients": sum(local_part(part).nbytes for part in gradients)}
            state.update(step, losses, 1e-3, None, group)
    for kind, tensors in state.parts().items():
        counted[kind] = sum(local_part(part).nbytes for part in tensors.values())
    return counted


def sampled(folder: Path) -> Any:
    """Return where the EMA weights are after each step, and the first of those that are sampled with."""
    watching = Watching()
    seen = []

    def sample(model: Any, step: int) -> None:
        seen.append(float(next(model.parameters()).flatten()[0]))

    config = replace(SPLIT["fsdp"], steps=2, sample_every=1, validate_every=0)
    next_group()
    run(folder, config, sample=sample, callbacks=[watching])
    return watching.seen, seen


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> tuple[Path, list, list]:
    """Runs of four processes and of two, which also resume one of the four; what each returned."""
    folder = tmp_path_factory.mktemp("split")
    four = together(4, split_runs, folder / "4", ("fsdp", "hsdp", "both"), (folder / "resumed", 8))
    two = together(2, split_runs, folder / "2", ("accumulated", "sequence"), (folder / "resumed", 16))
    return folder, four, two


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The same run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder, LONG, held_out=Latents())
    return folder


@pytest.mark.parametrize("name", ["4/fsdp", "4/hsdp", "2/accumulated", "4/both", "2/sequence"])
def test_processes_that_split_the_weights_or_the_clips_train_as_one(split, alone, name):
    found, expected = newest(split[0] / name), newest(alone)
    assert found.step == expected.step == 20
    for group, tensors in expected.tensors.items():
        assert found.tensors[group].keys() == tensors.keys()
        for key, tensor in tensors.items():
            torch.testing.assert_close(found.tensors[group][key], tensor, rtol=0, atol=1e-6)
    lines = zip(curve(split[0] / name), curve(alone), strict=True)
    assert all(line["loss"] == pytest.approx(other["loss"], abs=1e-6) for line, other in lines)
    texts = [(path / "validation.jsonl").read_text().splitlines() for path in (split[0] / name, alone)]
    assert len(texts[0]) == len(texts[1]) == 2


def test_all_processes_return_the_same(split):
    for results in split[1:]:
        assert all(one[0] == results[0][0] for one in results)


def test_a_resumed_run_of_split_weights_is_the_uninterrupted_one(split):
    folder = split[0]
    assert_same(folder / "4" / "again", folder / "4" / "fsdp")
    assert_same(folder / "2" / "stopped", folder / "2" / "sequence")


def test_options_of_blocks_are_split_too(split, tmp_path):
    run(tmp_path, STEPS, model=tiny_model(OPTIONS))
    found, expected = newest(split[0] / "2" / "options"), newest(tmp_path)
    for key, tensor in expected.tensors["model"].items():
        torch.testing.assert_close(found.tensors["model"][key], tensor, rtol=0, atol=1e-6)


def test_four_processes_become_two_and_then_one(split, alone):
    """A checkpoint holds whole tensors, so that any number of processes reads the same."""
    folder = split[0] / "resumed"
    run(folder, LONG, held_out=Latents())
    found, expected = newest(folder), newest(alone)
    assert found.step == expected.step == 20
    for key, tensor in expected.tensors["ema"].items():
        torch.testing.assert_close(found.tensors["ema"][key], tensor, rtol=0, atol=1e-6)
    lines = list(zip(curve(folder), curve(alone), strict=True))
    assert len(lines) == 20
    assert all(line["loss"] == pytest.approx(other["loss"], abs=1e-6) for line, other in lines)


def test_what_four_processes_saved_is_what_others_load(split):
    """Bit for bit in two processes and in one."""
    saved = newest(split[0] / "4/fsdp").tensors
    expected = {kind: tensors_sha256(tensors) for kind, tensors in saved.items()}
    assert [answer[3] for answer in split[2]] == [expected] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
        assert reloaded(split[0] / "4/fsdp") == expected


def test_each_of_four_processes_keeps_a_quarter(split):
    whole = bytes_of_training("ddp")
    assert whole.keys() == {"model", "ema", "optimizer", "gradients"}
    for _, counted, _ in split[1]:
        assert all(0.2 * whole[kind] < size <= 0.27 * whole[kind] for kind, size in counted.items())


def test_the_weights_are_gathered_where_the_ema_model_is_used(split):
    (first, seen), (second, nothing) = (answer[2] for answer in split[2])
    assert first == [(1, "meta"), (2, "meta")]
    assert second == []
    assert len(seen) == 2
    assert seen[0] != seen[1]
    assert nothing == [], "samples are generated in rank 0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muon"}, "train.optimizer=muon needs whole matrices"),
        ({"optimizer": "adafactor"}, "train.optimizer=adafactor needs whole matrices"),
        ({"compile": True}, "which train.compile does not support"),
        ({"cpu_offload": True}, "where they are already with device cpu"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, changes, message):
    def fails(model: Any, device: torch.device, *rest: Any) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latte.training.step.compile_blocks", fails)
        with pytest.raises(InputError, match=message):
            run(tmp_path, replace(SHORT, parallel="fsdp", **changes))
    assert not (tmp_path / "checkpoints").exists()


def test_processes_that_cannot_share_a_clip_are_refused(tmp_path):
    with pytest.raises(InputError, match="sequence_parallel is 2, but the number of processes is 1; start a"):
        run(tmp_path, replace(SHORT, sequence_parallel=2))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "zero"}, "train.parallel is 'zero'"),
        ({"shard_size": 2}, "for hsdp only"),
        ({"parallel": "hsdp", "shard_size": 0}, "at least 1"),
        ({"cpu_offload": True}, "train.cpu_offload is for train.parallel=fsdp or hsdp"),
        ({"sequence_parallel": 0}, "train.sequence_parallel is 0, but it must be at least 1"),
        ({"sequence_parallel": 2, "compile": True}, "which train.compile does not support"),
        ({"sequence_parallel": 2, "layer_sync": 0.2}, "which train.layer_sync does not support"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**changes)
