# SPDX-License-Identifier: Apache-2.0
"""What a run costs on many GPUs, by arithmetic: communication and compute, memory, storage, failures.

Bytes are those that one process sends in one training step, exact for ring algorithms; seconds come from the
rates of a ``Machine``, each with its source in ``SOURCES``. A collective over nodes of g GPUs moves its share
through NVLink and, with all g network ports at once, between the nodes; the slower of the two counts.
Collectives follow each other.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from latte.checks import InputError, check, choose
from latte.config.run import RunConfig
from latte.profile.kept import Counter
from latte.profile.memory import fresh, shards_of
from latte.profile.plan import Plan, adapters
from latte.tensors import without_memory

FLOAT32 = 4  # bytes
BUCKET = 25 << 20  # bytes of gradients that DDP sums at once, latte.training.parallel.BUCKET_MIB
STATES = 4  # float32 tensors of the size of the model: weights, gradients excluded, two moments, EMA weights
SCHEMES = ("ddp", "fsdp", "hsdp")


@dataclass(frozen=True)
class Machine:
    """Rates of one GPU and of what surrounds it, per second."""

    operations: float  # bfloat16 matrix product, dense, as the maker states it
    memory: float  # bytes
    link: float  # bytes that a GPU sends to the others of its node
    network: float  # bytes that a GPU sends to other nodes
    utilisation: float = 0.4  # share of ``operations`` that training reaches
    link_share: float = 0.8  # share of both bandwidths that collectives reach
    latency: float = 10e-6  # seconds from a node to the next, for each collective
    storage: float = 2e9  # bytes that a node writes of a checkpoint
    hours_between_failures: float = 50_700.0  # of one GPU with its share of the node
    restart: float = 300.0  # seconds from a failure to the first step after it


MACHINES = {"h100": Machine(989.4e12, 80e9, 450e9, 50e9), "h200": Machine(989.4e12, 141e9, 450e9, 50e9)}

SOURCES = {
    "operations": "NVIDIA's data sheet, without sparsity",
    "memory": "NVIDIA's data sheet",
    "link": "NVLink 4: 900 GB/s in both directions together",
    "network": "one port of 400 Gb/s for each GPU, as in a DGX H100",
    "utilisation": "assumption; a factorised video model of 12 B reached 0.40 (arXiv 2503.12964)",
    "link_share": "assumption",
    "latency": "assumption",
    "storage": "assumption",
    "hours_between_failures": "419 unexpected interruptions of 16,384 GPUs in 54 days (arXiv 2407.21783)",
    "restart": "assumption",
}


@dataclass(frozen=True)
class Load:
    """What a step of the run is, whatever the number of GPUs."""

    parameters: int
    block_parameters: int  # of all blocks together; the rest is gathered once a step
    largest_block: int
    operations: float  # of a training step of one clip, recomputation included
    activations: int  # bytes of one clip of a micro batch
    global_batch: int
    micro_batch: int  # 0: all clips of a process at once
    steps: int
    tokens: int  # of one clip
    width: int
    blocks: int
    clip_bytes: int  # of one clip's latents
    bytes_per_weight: int = 2  # of the gathered weights of blocks, and of activations


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step, by what they are for; ``inside`` a node of ``span`` GPUs."""

    gathered: float = 0  # weights, forward and backward
    scattered: float = 0  # gradients, to the process that keeps them
    reduced: float = 0  # gradients, summed
    exchanged: float = 0  # activations of sequence parallelism

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(asdict(self).values())


def ring(size: float, processes: int) -> float:
    """Return the bytes that each of ``processes`` sends to gather, or scatter, ``size`` bytes by a ring."""
    return size * (processes - 1) / processes


def traffic(
    load: Load, scheme: str, processes: int, shard_size: int | None = None, passes: int = 1, sequence: int = 1
) -> Traffic:
    """Return what each of ``processes`` sends in a step of ``passes`` micro batches.

    ``ddp`` sums float32 gradients once a step (a ring passes them twice). ``fsdp`` gathers the weights of
    every block forward and backward, all other weights once, and scatters float32 gradients, in every pass.
    ``hsdp`` does that among ``shard_size`` processes, and sums the gradients of a part between the groups.
    ``sequence`` processes share a clip: every block passes its tokens on by an all-to-all, forward and
    backward.
    """
    gradients = FLOAT32 * load.parameters
    exchanged = 0.0
    if sequence > 1:
        clips = load.global_batch * sequence / processes
        part = clips * load.tokens * load.width * load.bytes_per_weight / sequence
        exchanged = 2 * load.blocks * ring(part, sequence)
    if scheme == "ddp":
        return Traffic(reduced=2 * ring(gradients, processes), exchanged=exchanged)
    shards = shards_of(scheme, processes, shard_size)
    rest = load.parameters - load.block_parameters
    weights = 2 * load.bytes_per_weight * load.block_parameters + FLOAT32 * rest
    reduced = 2 * ring(gradients / shards, processes // shards) * passes
    return Traffic(ring(weights, shards) * passes, ring(gradients, shards) * passes, reduced, exchanged)


def seconds(size: float, processes: int, per_node: int, machine: Machine, count: int, sums: bool) -> float:
    """Return the time of ``count`` collectives that gather or scatter ``size`` bytes together or, with
    ``sums``, sum them, which passes them on twice.

    Bytes go round rings; the last byte waits for every node, or with sums for every level of a tree.
    """
    inside = min(processes, per_node)
    nodes = math.ceil(processes / per_node)
    hops = 2 * math.log2(nodes) if sums else nodes - 1
    link = ring(size, inside) / machine.link
    network = ring(size / inside, nodes) / machine.network
    return (1 + sums) * max(link, network) / machine.link_share + count * hops * machine.latency


def communication(
    load: Load, scheme: str, processes: int, per_node: int, machine: Machine, passes: int
) -> float:
    """Return the seconds of all collectives of a step, one after the other."""
    gradients = FLOAT32 * load.parameters
    if scheme == "ddp":
        return seconds(gradients, processes, per_node, machine, math.ceil(gradients / BUCKET), True)
    shards = shards_of(scheme, processes, per_node)
    rest = load.parameters - load.block_parameters
    weights = 2 * load.bytes_per_weight * load.block_parameters + FLOAT32 * rest
    found = seconds(weights, shards, per_node, machine, 2 * load.blocks + 1, False)
    found += seconds(gradients, shards, per_node, machine, load.blocks + 1, False)
    if processes > shards:  # every GPU of a node sums its own part with its counterparts in the other nodes
        part = gradients / shards
        found += seconds(part, processes // shards, 1, machine, load.blocks + 1, True)
    return found * passes


def memory(load: Load, scheme: str, processes: int, per_node: int) -> float:
    """Return bytes on each GPU: states and gradients, gathered weights of two blocks and of what is outside
    blocks, activations.
    """
    shards = shards_of(scheme, processes, per_node)
    held = (STATES + 1) * FLOAT32 * load.parameters / shards
    if shards > 1:
        held += 2 * load.bytes_per_weight * load.largest_block
        held += FLOAT32 * (load.parameters - load.block_parameters)
    share = load.global_batch // processes
    return held + load.activations * min(load.micro_batch or share, share)


def lost_share(save: float, machine: Machine, gpus: int) -> dict[str, float]:
    """Return the mean time between failures, the best checkpoint interval and the share of time that saving,
    repeated work and restarts cost (Young 1974: the interval is sqrt(2 x save x mean time), all in seconds).
    """
    between = machine.hours_between_failures * 3600 / gpus
    interval = math.sqrt(2 * save * between)
    lost = save / interval + (interval / 2 + machine.restart) / between
    return {"hours_between_failures": between / 3600, "minutes_between_saves": interval / 60, "lost": lost}


def cluster(
    load: Load,
    nodes: int,
    per_node: int = 8,
    gpu: str = "h100",
    clips: float | None = None,
    price: float | None = None,
    changes: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Return what the run costs on ``nodes`` x ``per_node`` GPUs, as plain data.

    ``clips`` is the size of the data set, ``price`` that of a GPU hour in any currency, ``changes`` rates of
    the machine. InputError for GPUs that cannot share the global batch.
    """
    machine = machine_of(gpu, changes or {})
    check(
        nodes >= 1 and per_node >= 1,
        f"--nodes and --gpus-per-node must be at least 1, got {nodes}, {per_node}",
    )
    gpus = nodes * per_node
    check(
        load.global_batch % gpus == 0,
        f"train.global_batch is {load.global_batch}, which {gpus} GPUs cannot share evenly; give a multiple "
        f"of {gpus}, or fewer --nodes",
    )
    share = load.global_batch // gpus
    passes = math.ceil(share / min(load.micro_batch or share, share))
    compute = load.operations * share / (machine.operations * machine.utilisation)
    states = STATES * FLOAT32 * load.parameters  # what a checkpoint holds
    save = states / (machine.storage * nodes)
    failures = lost_share(save, machine, gpus)
    schemes = {name: cost_of(load, name, gpus, per_node, machine, passes, compute) for name in SCHEMES}
    fitting = [scheme for scheme in schemes.values() if scheme["fits"]]
    best = min(fitting, key=lambda scheme: scheme["seconds"]) if fitting else None
    found: dict[str, Any] = {"gpus": gpus, "nodes": nodes, "clips_per_gpu": share, "compute_seconds": compute}
    found |= {
        "schemes": schemes,
        "sequence": shared_clip(load, per_node, machine),
        "checkpoint_bytes": states,
        "checkpoint_seconds": save,
        **failures,
    }
    if best is not None:
        step = max(compute, best["seconds"])
        hours = load.steps * step / (1 - min(failures["lost"], 0.99)) / 3600
        rate = load.global_batch / step
        found |= {"step_seconds": step, "hours": hours, "clips_per_second": rate}
        found["shard_bytes_per_second"] = rate * load.clip_bytes
        if price is not None:
            found["cost"] = hours * gpus * price
        if clips is not None:
            found["hours_per_pass"] = clips / rate / 3600
    if clips is not None:
        found["storage_bytes"] = clips * load.clip_bytes
    return found


def cost_of(
    load: Load, scheme: str, gpus: int, per_node: int, machine: Machine, passes: int, compute: float
) -> dict[str, Any]:
    """Return what a step of ``passes`` micro batches sends and holds with ``scheme``, groups of a node."""
    sent = communication(load, scheme, gpus, per_node, machine, passes)
    held = memory(load, scheme, gpus, per_node)
    return {
        "bytes_sent": traffic(load, scheme, gpus, per_node, passes).total,
        "seconds": sent,
        "over_compute": sent / compute,
        "memory": held,
        "fits": held < machine.memory,
    }


def shared_clip(load: Load, per_node: int, machine: Machine) -> dict[str, float]:
    """Return what the GPUs of a node exchange when they share one clip, and its time over their compute."""
    sent = traffic(replace(load, global_batch=1), "ddp", per_node, sequence=per_node).exchanged
    taken = sent / machine.link / machine.link_share + 2 * load.blocks * machine.latency
    compute = load.operations / per_node / (machine.operations * machine.utilisation)
    return {"bytes_sent": sent, "over_compute": taken / compute}


def machine_of(gpu: str, changes: dict[str, float]) -> Machine:
    """Return the rates of a GPU with ``changes``; InputError for an unknown or a non-positive one."""
    machine = choose("--gpu", gpu, MACHINES)
    known = {item.name for item in fields(Machine)}
    for name, value in changes.items():
        choose("--rate", name, dict.fromkeys(known))
        check(value > 0, f"--rate {name}={value:g} must be positive")
    return replace(machine, **changes)


def load_of(config: RunConfig, planned: Plan, kept: bool = False) -> Load:
    """Return what a step of ``config`` is; ``planned`` has its counts. ``kept``: as in ``plan``."""
    sizes = Counter(config, kept)(dict, lambda: block_sizes(config), config.network, config.lora)
    forwards = 3 + bool(config.train.gradient_checkpointing)  # the backward pass counts as two
    return Load(
        parameters=planned.trainable,
        block_parameters=sizes["all"],
        largest_block=sizes["largest"],
        operations=float(forwards * planned.operations),
        activations=planned.memory.activations // planned.batch.micro_batch,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch or 0,
        steps=config.train.steps,
        tokens=planned.tokens,
        width=sizes["width"],
        blocks=sizes["count"],
        clip_bytes=planned.encoding.clip_bytes,
        bytes_per_weight=2 if planned.memory.dtype != "float32" else 4,
    )


def block_sizes(config: RunConfig) -> dict[str, int]:
    """Return the parameters of all blocks and of the largest one, and the width of the model."""
    with without_memory():
        model: Any = fresh(config.network, adapters(config))
    sizes = [sum(weight.numel() for weight in block.parameters()) for block in model.blocks]
    width = config.network.dimensions[1]
    return {"all": sum(sizes), "largest": max(sizes), "count": len(sizes), "width": width}


def read_rates(words: list[str]) -> dict[str, float]:
    """Return NAME=VALUE words as rates of a machine; InputError for others."""
    rates = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            rates[name] = float(value)
        except ValueError:
            raise InputError(f"--rate is {word!r}, but it must be NAME=NUMBER, e.g. storage=5e9") from None
    return rates


def read_nodes(text: str) -> list[int]:
    """Return '1,8,64' as numbers; InputError for anything else."""
    parts = text.split(",")
    check(
        all(part.strip().isdigit() and int(part) > 0 for part in parts),
        f"--nodes is {text!r}, but it must be a number of nodes, or several such as 1,8,64",
    )
    return [int(part) for part in parts]


def table_of(found: list[dict[str, Any]]) -> list[str]:
    """Return two tables for people, a line per number of GPUs: communication over compute and the memory of a
    GPU, then the whole run; '-' where nothing fits, '!' where one does not.
    """
    heads = [
        "GPUs",
        "clips/GPU",
        "compute s",
        "DDP",
        "FSDP",
        "HSDP",
        "sequence",
        "GB DDP",
        "GB FSDP",
        "GB HSDP",
    ]
    lines = [heads]
    for row in found:
        schemes = [row["schemes"][name] for name in SCHEMES]
        cells = [f"{row['gpus']:,}", f"{row['clips_per_gpu']:,}", f"{row['compute_seconds']:.3g}"]
        cells += [f"{scheme['over_compute']:.1%}" for scheme in schemes]
        cells.append(f"{row['sequence']['over_compute']:.1%}")
        cells += [f"{scheme['memory'] / 1e9:.1f}{'' if scheme['fits'] else '!'}" for scheme in schemes]
        lines.append(cells)
    present = [key for key in RUN_COLUMNS if any(key in row for row in found)]
    runs = [["GPUs", *(RUN_COLUMNS[key][0] for key in present)]]
    for row in found:
        cells = [f"{row['gpus']:,}"]
        for key in present:
            _, form, scale = RUN_COLUMNS[key]
            cells.append(form.format(row[key] / scale) if key in row else "-")
        runs.append(cells)
    return [*aligned(lines), "", *aligned(runs)]


def aligned(lines: list[list[str]]) -> list[str]:
    """Return rows of cells as lines, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


RUN_COLUMNS = {  # key of ``cluster`` -> head, form and unit of its column
    "step_seconds": ("step s", "{:.3g}", 1),
    "hours": ("days", "{:,.1f}", 24),
    "hours_per_pass": ("hours per pass", "{:,.1f}", 1),
    "cost": ("cost", "{:,.0f}", 1),
    "storage_bytes": ("latents TB", "{:,.1f}", 1e12),
    "shard_bytes_per_second": ("shards MB/s", "{:,.1f}", 1e6),
    "checkpoint_bytes": ("checkpoint GB", "{:,.1f}", 1e9),
    "checkpoint_seconds": ("save s", "{:.2f}", 1),
    "hours_between_failures": ("failure every h", "{:,.0f}", 1),
    "minutes_between_saves": ("save every min", "{:,.1f}", 1),
    "lost": ("lost", "{:.2%}", 1),
}


def source_lines(machine: Machine) -> list[str]:
    """Return every rate with its source."""
    return [f"{name} = {value:.4g}: {SOURCES[name]}" for name, value in asdict(machine).items()]
