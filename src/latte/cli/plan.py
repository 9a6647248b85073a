# SPDX-License-Identifier: Apache-2.0
"""``latte plan``: what a run costs before it runs, without its data or weights."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.checks import check
from latte.cli.options import OVERRIDABLE, Debug, Device, Json, Overrides, Run, print_result, table
from latte.files import size_text as size

if TYPE_CHECKING:
    from latte.config.run import RunConfig
    from latte.profile.plan import Plan

__all__ = ["OVERRIDABLE", "plan"]
NOTE = (
    "DDP, FSDP, HSDP: time of communication over that of compute; sequence: the same for the exchange of "
    "activations when the GPUs of a node share one clip; GB of a GPU: ! does not fit"
)

Measure = Annotated[
    bool,
    typer.Option("--measure", help="Train three steps on random latents and estimate the time of the run."),
]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", help="Devices that will train together; those of torchrun by default."),
]
MemoryGib = Annotated[
    float | None,
    typer.Option(
        "--memory",
        metavar="GIB",
        help="Memory of a device, e.g. 80, for the verdict about one that is not here; by default this "
        "machine's.",
    ),
]
Nodes = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N...]",
        help="A table of what the run costs on so many nodes of GPUs: communication, memory, failures.",
    ),
]
Rates = Annotated[
    list[str] | None,
    typer.Option(
        "--rate", metavar="NAME=VALUE", help="Another rate of the machine than --nodes assumes; repeatable."
    ),
]
Price = Annotated[float | None, typer.Option(min=0, help="Price of a GPU hour, for --nodes.")]
Clips = Annotated[float | None, typer.Option(min=1, help="Clips of the data set, for --nodes; e.g. 1e9.")]


def plan(
    run: Run,
    overrides: Overrides = None,
    measure: Measure = False,
    processes: Processes = None,
    memory: MemoryGib = None,
    nodes: Nodes = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node, for --nodes.")] = 8,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="Kind of GPU, for --nodes: h100 or h200.")
    ] = "h100",
    clips: Clips = None,
    price: Price = None,
    rate: Rates = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a run costs: parameters and operations (exact, and counted as in the paper), memory, batches,
    disk, time; at the end whether a step fits into the memory at hand, and a setting that does.
    """
    from latte.config.run import load_run

    config, _ = load_run(run, overrides or [])
    from latte.data.selection import table_lines  # torch, after the settings were found good
    from latte.profile.fit import verdict_text
    from latte.profile.plan import plan as plan_of

    if nodes is not None:
        print_cluster(
            config, as_json, nodes, gpus_per_node, gpu=gpu, clips=clips, price=price, rates=rate or []
        )
        return
    check(memory is None or 0 < memory < 1e6, f"--memory must be in (0, 1e6) GiB, got {memory}; e.g. 80")
    available = None if memory is None else round(memory * 2**30)
    planned = plan_of(config, device, processes, measure, kept=True, available=available)
    lines = table(rows(planned))
    for row in planned.mix:
        lines.append(mix_line(row))
    if planned.buckets:
        lines += table_lines(planned.buckets)
    lines.append(f"verdict: {verdict_text(planned.verdict)}")
    print_result(asdict(planned), as_json, lines)


def print_cluster(
    config: "RunConfig", as_json: bool, nodes: str, per_node: int, rates: list[str], gpu: str, **data: Any
) -> None:
    """Print what ``config`` costs on each of ``nodes`` (text such as "1,8") of GPUs."""
    from latte.profile import cluster as clusters
    from latte.profile.plan import plan as plan_of

    counts = clusters.read_nodes(nodes)
    changes = clusters.read_rates(rates)
    machine = clusters.machine_of(gpu, changes)
    planned = plan_of(config, "cuda", counts[0] * per_node, kept=True)
    load = clusters.load_of(config, planned, kept=True)
    found = [clusters.cluster(load, count, per_node, gpu, changes=changes, **data) for count in counts]
    result = {"clusters": found, "machine": asdict(machine), "load": asdict(load)}
    lines = [*clusters.table_of(found), NOTE, *clusters.source_lines(machine)]
    print_result(result, as_json, lines)


def rows(planned: "Plan") -> list[tuple[str, str]]:
    """Return (name, value) of every line of the answer for people."""
    memory = planned.memory
    batch = planned.batch
    disk = planned.disk
    parameters = f"{planned.parameters:,}"
    if planned.trainable != planned.parameters:
        parameters += f", trained {planned.trainable:,}"
    epochs = "" if batch.epochs is None else f", {batch.epochs:,.1f} epochs of {batch.clips:,}"
    split = f"{batch.processes} processes x {batch.micro_batch} clips x {batch.accumulation} accumulated"
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
    parts |= {"EMA weights": memory.ema, "activations": memory.activations}
    step = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    saving = f"with gradient checkpointing {size(memory.with_checkpointing)}"
    lines = [
        ("parameters", parameters),
        ("operations per clip", f"{planned.operations:,}"),
        ("frames per clip", encoding_text(planned)),
        ("latent", " x ".join(map(str, planned.latent)) + " (frames, channels, height, width)"),
        ("tokens per clip", f"{planned.tokens:,}"),
        ("global batch", f"{batch.global_batch} = {split}"),
        ("clips seen in training", f"{batch.clips_seen:,}{epochs}"),
        ("memory of a step", f"{size(memory.total)} per device: {step}"),
        (
            "activations",
            f"{size(memory.without_checkpointing)}, {saving} ({batch.micro_batch} clips, {memory.dtype})",
        ),
        ("disk", f"{size(disk.checkpoint)} per checkpoint, {size(disk.kept)} for all that are kept"),
    ]
    if planned.table3:
        counted = f"{planned.table3.parameters:,} parameters, {planned.table3.operations_g:,.6f} G operations"
        lines.insert(2, ("as in Table 3", counted))
    if planned.time:
        seconds = f"{planned.time.step_seconds:.3f} s per step on {planned.time.device}"
        lines.append(("time", f"{seconds}, {planned.time.hours:,.1f} hours in all"))
    return [*lines, *sampling_rows(planned.sampling)]


def mix_line(row: dict[str, Any]) -> str:
    """Return what a run takes of one set of its mix."""
    line = f"set {row['set']}: {row['share']:.2%} of the clips"
    if row["clips"] is not None:
        line += f", {row['clips_seen']:,} seen, {row['epochs']:,.1f} epochs of {row['clips']:,}"
    return line


def encoding_text(planned: "Plan") -> str:
    """Return how many latent frames the frames of a clip become, and what encoding them costs."""
    found = planned.encoding
    latents = f"{found.frames} -> {found.latent_frames} latent frames"
    return f"{latents}, {found.operations:,} operations to encode, {size(found.clip_bytes)} in float16 shards"


def sampling_rows(sampling: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the lines about the memory of ``latte sample``, stage by stage."""
    names = {"text_encoder": "encoding prompts", "denoiser": "denoising", "decoder": "decoding"}
    lines = [
        (
            name,
            f"{size(sampling[key]['weights'])} of weights, {size(sampling[key]['working'])} of working "
            "memory",
        )
        for key, name in names.items()
        if sampling[key]
    ]
    settings = f"{sampling['batch']} clips at a time, {sampling['dtype']}"
    offload = f"with --offload {size(sampling['offloaded'])}, all parts at once {size(sampling['together'])}"
    return [("memory of sampling", f"{size(sampling['peak'])} ({settings}); {offload}"), *lines]
