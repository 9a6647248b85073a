# SPDX-License-Identifier: Apache-2.0
"""``latte plan``: what a run costs, before it runs and without its data or weights."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.cli.options import OVERRIDABLE, Debug, Device, Json, Overrides, Run, print_result, table

if TYPE_CHECKING:
    from latte.profile.plan import Plan

__all__ = ["OVERRIDABLE", "plan"]

Measure = Annotated[
    bool,
    typer.Option(
        "--measure", help="Train three steps on random latents and tell how long the run will take."
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", help="Devices that will train together; those of torchrun by default."),
]


def plan(
    run: Run,
    overrides: Overrides = None,
    measure: Measure = False,
    processes: Processes = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Parameters and operations of a run's model, exactly and by the paper's counting rule; its memory, batches, disk and time."""
    from latte.config.run import load_run
    from latte.profile.plan import plan as plan_of

    found = plan_of(load_run(run, overrides or [])[0], device, processes, measure)
    print_result(asdict(found), as_json, table(rows(found)))


def rows(found: "Plan") -> list[tuple[str, str]]:
    """What people read, line by line."""
    memory, batch, disk = found.memory, found.batch, found.disk
    fixed = f"weights {size(memory.weights)}, gradients {size(memory.gradients)}, AdamW {size(memory.optimizer)}, average {size(memory.ema)}"
    ways = (
        f"{size(memory.without_checkpointing)}, with gradient checkpointing {size(memory.with_checkpointing)}"
    )
    split = f"{batch.processes} processes x {batch.micro_batch} clips x {batch.accumulation} accumulated"
    epochs = "" if batch.epochs is None else f", {batch.epochs:,.1f} epochs of {batch.clips:,}"
    lines = [
        (
            "parameters",
            f"{found.parameters:,}"
            + (f", trained {found.trainable:,}" if found.trainable != found.parameters else ""),
        ),
        ("operations per clip", f"{found.operations:,}"),
        ("latent", " x ".join(map(str, found.latent)) + " (frames, channels, height, width)"),
        ("tokens per clip", f"{found.tokens:,}"),
        ("global batch", f"{batch.global_batch} = {split}"),
        ("clips seen in training", f"{batch.clips_seen:,}{epochs}"),
        (
            "memory of a step",
            f"{size(memory.total)} per device: {fixed}, activations {size(memory.activations)}",
        ),
        ("activations", f"{ways} ({batch.micro_batch} clips, {memory.dtype})"),
        ("disk", f"{size(disk.checkpoint)} a checkpoint, {size(disk.kept)} for all that are kept"),
    ]
    if found.table3:
        counted = f"{found.table3.parameters:,} parameters, {found.table3.operations_g:,.6f} G operations"
        lines.insert(2, ("as in Table 3", counted))
    if found.time:
        lines.append(
            (
                "time",
                f"{found.time.step_seconds:.3f} s a step on {found.time.device}, {found.time.hours:,.1f} hours in all",
            )
        )
    return [*lines, *sampling_rows(found.sampling)]


def sampling_rows(sampling: dict[str, Any]) -> list[tuple[str, str]]:
    """Memory of ``latte sample``, stage by stage."""
    names = {"text_encoder": "reading prompts", "denoiser": "denoising", "decoder": "decoding"}
    stages = {name: sampling[name] for name in names if sampling[name]}
    lines = [
        (names[name], f"{size(stage['weights'])} of weights, {size(stage['working'])} at work")
        for name, stage in stages.items()
    ]
    peak, alone, together = (size(sampling[key]) for key in ("peak", "offloaded", "together"))
    settings = f"{sampling['batch']} clips at a time, {sampling['dtype']}"
    peak = f"{peak} ({settings}); with --offload {alone}, all parts at once {together}"
    return [("memory of sampling", peak), *lines]


def size(number: int) -> str:
    """Bytes for people, in MiB or GiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
