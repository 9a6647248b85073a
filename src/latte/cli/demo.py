# SPDX-License-Identifier: Apache-2.0
"""``latte demo``: the whole job offline on built-in data and weights."""

import os
from functools import partial
from itertools import chain
from itertools import count as count_up
from pathlib import Path
from typing import Annotated

import typer

from latte.cli.options import (
    Debug,
    Device,
    Dtype,
    Json,
    configure_logging,
    print_note,
    print_result,
    progress_line,
)

Small = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the small model, e.g. model.depth=4."),
]
Out = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="By default the first unused of runs/demo, runs/demo-2, ..."),
]
Model = Annotated[
    str, typer.Option(metavar="MODEL", help="A model of moving shapes: builtin-shapes, a run, weights.")
]
Count = Annotated[int, typer.Option(help="Clips to write, labels in turn.")]
Graded = Annotated[int, typer.Option(help="Clips to generate and grade, the written ones included.")]
Seconds = Annotated[float, typer.Option(help="Training time of the small model.")]
Seed = Annotated[int, typer.Option(help="Seed of the first clip and of the training.")]


def demo(
    overrides: Small = None,
    out: Out = None,
    model: Model = "builtin-shapes",
    count: Count = 16,
    graded: Graded = 64,
    seconds: Seconds = 60.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate labelled clips, grade them, train a small model for a minute, and write one page about it."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before everything else
    from latte.demo import DemoConfig, run_demo
    from latte.inference.outputs import check_output_folder

    configure_logging()
    folder = unused_folder() if out is None else check_output_folder(out)
    config = DemoConfig(
        folder, model, count, max(graded, count), seconds=seconds, seed=seed, overrides=tuple(overrides or ())
    )
    result = run_demo(config, device, dtype, partial(progress_line, unit="steps"), print_note)
    low, high = result["interval"]
    accuracy = (
        f"{result['label_accuracy']:.1%} of {result['graded']} clips move in the direction of their label"
    )
    lines = [
        f"{accuracy} ({low:.1%} to {high:.1%}); {result['consistency']:.1%} keep colour, size and outline",
        f"loss of the small model: {result['loss'][0]:.3f} at first, {result['loss'][1]:.3f} at the end",
        *(f"{name}: {result[name]}" for name in ("sheet", "gif", "run")),
        f"clips: {Path(result['clips'][0]['path']).parent}",
        f"see: {result['report']}  ({result['seconds']:.0f} s)",
    ]
    print_result(result, as_json, lines)


def unused_folder() -> Path:
    """Return runs/demo, or the first of runs/demo-2, runs/demo-3, ... that does not exist."""
    names = chain(["demo"], (f"demo-{number}" for number in count_up(2)))
    return next(path for name in names if not (path := Path("runs") / name).exists())
