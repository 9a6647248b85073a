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

Tuning = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings of the fine-tuning, e.g. train.lr=1e-3."),
]
Out = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="By default the first unused of runs/demo, runs/demo-2, ..."),
]
Model = Annotated[
    str, typer.Option(metavar="MODEL", help="A model of recipe builtin: builtin, a run or a weights folder.")
]
Graded = Annotated[int, typer.Option(help="Clips of combinations held out of training to grade.")]
Seconds = Annotated[float, typer.Option(help="Training time of the fine-tuning.")]
Seed = Annotated[int, typer.Option(help="Seed of the first clip and of the training.")]


def demo(
    overrides: Tuning = None,
    out: Out = None,
    model: Model = "builtin",
    graded: Graded = 27,
    seconds: Seconds = 50.0,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate clips from sentences and an image, grade them, fine-tune for a minute, and write one page."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before everything else
    from latte.demo.run import DemoConfig, run_demo
    from latte.inference.outputs import check_output_folder

    configure_logging(quiet=True)
    folder = unused_folder() if out is None else check_output_folder(out)
    config = DemoConfig(folder, model, graded, seconds, seed, tuple(overrides or ()))
    result = run_demo(config, device, dtype, partial(progress_line, unit="steps"), print_note)
    low, high = result["interval"]
    share = f"{result['label_accuracy']:.0%} of {result['graded']} clips of unseen combinations"
    before, after = result["loss"]
    lines = [
        f"{share} show kind, colour and direction of their sentence ({low:.0%} to {high:.0%})",
        f"{result['consistency']:.0%} are the same scene throughout",
        f"held-out loss of the new motion: {before:.3f}, after {result['steps']} steps {after:.3f}",
        *(f"{name}: {result[name]}" for name in ("sheet", "gif", "run")),
        f"clips: {Path(result['clips'][0]['path']).parent}",
        f"see: {result['report']}  ({result['seconds']:.0f} s)",
    ]
    print_result(result, as_json, lines)


def unused_folder() -> Path:
    """Return runs/demo, or the first of runs/demo-2, runs/demo-3, ... that does not exist."""
    names = chain(["demo"], (f"demo-{number}" for number in count_up(2)))
    return next(path for name in names if not (path := Path("runs") / name).exists())
