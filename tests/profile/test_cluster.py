# SPDX-License-Identifier: Apache-2.0
"""The simulator of clusters: bytes against counted collectives of real processes, and its arithmetic."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from latte.checks import InputError
from latte.config.run import load_run
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.distributed import process_group
from latte.model.latte import Latte, ModelConfig
from latte.profile.cluster import (
    MACHINES,
    SOURCES,
    Load,
    Machine,
    cluster,
    communication,
    load_of,
    lost_share,
    machine_of,
    memory,
    read_nodes,
    read_rates,
    ring,
    table_of,
    traffic,
)
from latte.profile.plan import plan
from latte.training.config import TrainConfig
from latte.training.parallel import PARALLELISMS
from latte.training.step import Task, backward
from several import next_group, together

CPU = torch.device("cpu")
SMALL = ModelConfig(depth=4, width=32, heads=2, num_frames=4, latent_size=4, num_classes=None)


def small_load(passes: int = 1, batch: int = 4) -> Load:
    model = Latte(SMALL)
    blocks = [sum(weight.numel() for weight in block.parameters()) for block in model.blocks]
    return Load(
        parameters=sum(weight.numel() for weight in model.parameters()),
        block_parameters=sum(blocks),
        largest_block=max(blocks),
        operations=1e9,
        activations=1000,
        global_batch=batch,
        micro_batch=batch // passes,
        steps=10,
        tokens=16,
        width=32,
        blocks=4,
        clip_bytes=512,
        bytes_per_weight=4,  # the processes train in float32
    )


class Sent(TorchDispatchMode):
    """Counts the bytes that this process sends in collectives that go round a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("c10d::")
        if func.namespace == "c10d":
            self.calls[name] = self.calls.get(name, 0) + 1
            groups = [value for value in args if isinstance(value, torch.ScriptObject)]
            size = dist.ProcessGroup.unbox(groups[0]).size()
            self.bytes += sent_by(name, args, size)
        return func(*args, **(kwargs or {}))


def sent_by(name: str, args: Any, processes: int) -> float:
    """Bytes of the larger side of a collective; a sum goes round twice."""
    if name == "allreduce_":
        return sum(2 * ring(tensor.numel() * tensor.itemsize, processes) for tensor in args[0])
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        return ring(max(value.numel() * value.itemsize for value in args[:2]), processes)
    return 0.0


def step_bytes(
    rank: int, schemes: tuple[tuple[str, int | None, int], ...]
) -> list[tuple[float, dict[str, int]]]:
    """Bytes that this process sends in the gradient of a step with each of ``schemes``."""
    found = []
    for number, (scheme, shard_size, passes) in enumerate(schemes):
        if number:
            next_group()
        with process_group(CPU) as group:
            config = TrainConfig(parallel=scheme, shard_size=shard_size, global_batch=4)
            model = Latte(SMALL)
            parallel = PARALLELISMS[scheme](model, group, config, CPU, torch.float32)
            task = Task(
                model=model,
                forward=parallel.forward,
                process=build_process(DiffusionConfig()),
                objective=OBJECTIVES["paper"],
                codec=None,
                seed=0,
                global_batch=4,
                micro_batch=4 // group.size // passes,
                device=CPU,
                dtype=torch.float32,
                loss_scale=parallel.loss_scale,
                accumulate=parallel.accumulate,
            )
            share = range(4 // group.size)
            video = torch.zeros(len(share), 4, 4, 4, 4)
            backward(task, 1, share, video, None)  # the first step of DDP arranges its buckets
            sent = Sent()
            with sent:
                backward(task, 2, share, video, None)
            found.append((sent.bytes, sent.calls))
    return found


@pytest.mark.parametrize(
    ("processes", "schemes"),
    [
        (2, (("ddp", None, 1), ("ddp", None, 2), ("fsdp", None, 1), ("fsdp", None, 2))),
        (4, (("ddp", None, 1), ("fsdp", None, 1), ("hsdp", 2, 1))),
    ],
)
def test_the_bytes_of_a_step_are_those_that_processes_send(processes, schemes):
    for answer in together(processes, step_bytes, schemes):
        for (scheme, shard_size, passes), (sent, calls) in zip(schemes, answer, strict=True):
            assert calls, "nothing was counted"
            expected = traffic(small_load(), scheme, processes, shard_size, passes)
            assert sent == pytest.approx(expected.total, rel=1e-9), (scheme, passes, calls)


def ffs(*words: str) -> Load:
    config, _ = load_run("ffs", ["model.size=S", "train.global_batch=512", "train.micro_batch=1", *words])
    return load_of(config, plan(config, "cuda", 8))


def test_the_load_is_that_of_the_run():
    config, _ = load_run("ffs", ["train.gradient_checkpointing=true", "train.micro_batch=1"])
    planned = plan(config, "cuda", 8)
    load = load_of(config, planned)
    assert load.parameters == planned.parameters
    assert load.operations == 4 * planned.operations
    assert 0.98 < load.block_parameters / load.parameters < 1
    assert load.largest_block * load.blocks == load.block_parameters
    assert (load.blocks, load.width, load.tokens) == (28, 1152, 4096)


def test_parts_of_states_and_gathered_blocks_make_the_memory():
    load = small_load()
    whole = 20 * load.parameters  # weights, gradients, two moments, EMA weights
    assert memory(load, "ddp", 4, 8) == whole + load.activations
    rest = load.parameters - load.block_parameters
    gathered = 8 * load.largest_block + 4 * rest
    assert memory(load, "fsdp", 4, 8) == whole / 4 + gathered + load.activations
    assert memory(load, "hsdp", 4, 2) == whole / 2 + gathered + load.activations


def test_a_plan_splits_what_its_processes_split():
    words = ["model.size=S", "train.global_batch=16", "train.micro_batch=1", "data.root=nowhere"]
    alone = plan(load_run("ffs", words)[0], "cpu", 4).memory
    parts = plan(load_run("ffs", [*words, "train.parallel=fsdp"])[0], "cpu", 4).memory
    groups = plan(load_run("ffs", [*words, "train.parallel=hsdp", "train.shard_size=2"])[0], "cpu", 4).memory
    for name in ("weights", "gradients", "optimizer", "ema"):
        assert getattr(parts, name) == math.ceil(getattr(alone, name) / 4)
        assert getattr(groups, name) == math.ceil(getattr(alone, name) / 2)
    assert parts.activations == alone.activations
    with pytest.raises(InputError, match="shard_size is 3, but 4 processes cannot be divided"):
        plan(load_run("ffs", [*words, "train.parallel=hsdp", "train.shard_size=3"])[0], "cpu", 4)


def test_time_follows_the_slower_of_both_networks():
    load = replace(small_load(), parameters=10**9, block_parameters=10**9)
    machine = Machine(1e15, 80e9, link=400e9, network=10e9, link_share=1.0, latency=1e-30)
    inside = communication(load, "ddp", 8, 8, machine, 1)
    assert inside == pytest.approx(2 * 4e9 * 7 / 8 / 400e9)
    across = communication(load, "ddp", 16, 8, machine, 1)
    assert across == pytest.approx(2 * 4e9 / 8 / 2 / 10e9)
    assert communication(load, "fsdp", 16, 8, machine, 1) == pytest.approx(12e9 / 8 / 2 / 10e9)
    assert communication(load, "fsdp", 16, 8, machine, 3) == pytest.approx(3 * 12e9 / 8 / 2 / 10e9)
    hybrid = 12e9 * 7 / 8 / 400e9 + 2 * 4e9 / 8 / 2 / 10e9
    assert communication(load, "hsdp", 16, 8, machine, 1) == pytest.approx(hybrid)
    slow = replace(machine, latency=1e-3)
    assert communication(load, "fsdp", 4096, 8, slow, 1) > 10 * communication(load, "hsdp", 4096, 8, slow, 1)


def test_sequence_parallelism_sends_every_token_once_a_block_and_direction():
    load = replace(small_load(), bytes_per_weight=2)
    alone = traffic(load, "ddp", 4)
    shared = traffic(load, "ddp", 4, sequence=2)
    assert alone.exchanged == 0
    # 4 clips by 2 groups of 2: of 2 clips a process holds half of the tokens, of which half leaves it
    assert shared.exchanged == 2 * 4 * (2 * 16 * 32 * 2 / 2) / 2
    assert shared.reduced == alone.reduced


def test_the_best_interval_loses_the_least():
    machine = MACHINES["h100"]
    found = lost_share(60.0, machine, 4096)
    between = found["hours_between_failures"] * 3600

    def lost(interval):
        return 60 / interval + (interval / 2 + machine.restart) / between

    best = 60 * found["minutes_between_saves"]
    assert found["lost"] == pytest.approx(lost(best))
    assert lost(best) < min(lost(0.8 * best), lost(1.25 * best))
    assert found["hours_between_failures"] == pytest.approx(50_700 / 4096)
    # 16,384 GPUs for 54 days, 419 interruptions
    assert machine.hours_between_failures == pytest.approx(16384 * 54 * 24 / 419, rel=1e-3)


def test_a_cluster_is_described_with_cost_and_storage():
    load = ffs()
    found = cluster(load, 8, price=2.0, clips=1e8)
    assert found["gpus"] == 64
    assert found["cost"] == pytest.approx(2 * 64 * found["hours"])
    assert found["storage_bytes"] == 1e8 * load.clip_bytes
    assert found["hours_per_pass"] == pytest.approx(1e8 / found["clips_per_second"] / 3600)
    assert found["shard_bytes_per_second"] == found["clips_per_second"] * load.clip_bytes
    assert "cost" not in cluster(load, 8)
    tiny = cluster(load, 8, changes={"memory": 1e6})
    assert "hours" not in tiny
    assert not any(scheme["fits"] for scheme in tiny["schemes"].values())
    lines = table_of([found, tiny])
    assert len({len(line) for line in lines[:3]}) == len({len(line) for line in lines[4:]}) == 1
    assert "-" in lines[-1].split()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cluster(small_load(), 3, 1), "global_batch is 4, which 3 GPUs cannot share evenly"),
        (lambda: machine_of("h1000", {}), "h100"),
        (lambda: machine_of("h100", {"speed": 1.0}), "--rate.*speed"),
        (lambda: machine_of("h100", {"network": 0.0}), "--rate network=0 must be positive"),
        (lambda: read_rates(["network"]), "must be NAME=NUMBER"),
        (lambda: read_nodes("1,x"), "--nodes is '1,x'"),
        (lambda: read_nodes("0"), "--nodes is '0'"),
    ],
)
def test_what_cannot_be_planned_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_every_rate_has_a_source():
    assert set(SOURCES) == set(Machine.__dataclass_fields__)


def test_a_table_of_the_page_is_what_its_command_prints():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")
    command, _, rest = page.partition("latte plan ffs ")[2].partition("\n")
    words = command.split()
    settings = [word for word in words if "=" in word]
    nodes = words[words.index("--nodes") + 1]
    config, _ = load_run("ffs", settings)
    counts = read_nodes(nodes)
    load = load_of(config, plan(config, "cuda", counts[0] * 8, kept=True), kept=True)
    shown = table_of([cluster(load, count, clips=1e8) for count in counts])
    assert "\n".join(shown) in rest
