# SPDX-License-Identifier: Apache-2.0
"""``latte ablate``: the paper's ablations as one sweep from one recipe."""

from pathlib import Path
from typing import Annotated, Any

import typer

from latte.checks import InputError
from latte.cli.options import (
    OVERRIDABLE,
    Debug,
    Device,
    Json,
    Overrides,
    Run,
    TrainDtype,
    configure_logging,
    print_result,
    table,
)

__all__ = ["OVERRIDABLE", "ablate"]

COLUMNS = (
    "axis",
    "arm",
    "held-out loss",
    "label obedience",
    "built-in score",
    "parameters",
    "operations per clip",
    "training s",
)

Axes = Annotated[
    str,
    typer.Option(
        metavar="A,B,...",
        help="What to vary: {axes}.",
        show_default=False,
    ),
]
Seeds = Annotated[str, typer.Option(metavar="N,N,...", help="Seeds; every arm is trained with each.")]
Steps = Annotated[int | None, typer.Option(help="train.steps; those of the recipe by default.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the sweep; runs/RUN-ablation by default. The same command on it goes on."),
]
Dit = Annotated[
    str | None, typer.Option(metavar="PATH", help="The DiT that axis init starts from: a file or a hub id.")
]
Points = Annotated[int, typer.Option(help="How many times a run is measured, the last step included.")]
Heldout = Annotated[int, typer.Option(help="Clips of the held-out loss.")]
Graded = Annotated[
    int, typer.Option(help="Generated clips that are graded and scored at every point; 0 for none.")
]


def ablate(
    run: Run,
    axes: Axes,
    overrides: Overrides = None,
    seeds: Seeds = "0,1,2",
    steps: Steps = None,
    out: Out = None,
    dit: Dit = None,
    points: Points = 8,
    heldout: Heldout = 64,
    graded: Graded = 32,
    device: Device = "auto",
    dtype: TrainDtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every arm of some axes from one recipe, same data order and seeds, and report the paper's conclusions beside ours.

    Small enough for two CPU cores and a quarter of an hour: latte ablate shapes-tiny --axes variant
    """
    from latte.ablate.axes import make_arms
    from latte.ablate.report import print_result as page_of
    from latte.ablate.sweep import Plan, settle, summary, sweep
    from latte.config.run import load_run
    from latte.files import commit_file, reported
    from latte.runtime import resolve_device

    configure_logging()
    given = {"train.steps": steps, "train.dtype": dtype}
    words = (*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value is not None))
    config, _ = load_run(run, words)
    names = tuple(read_list(axes))
    base = settle(config)
    where = out or Path(f"{config.run.dir or 'runs/unnamed'}-ablation")
    plan = Plan(base, run, words, names, where, read_seeds(seeds), points, heldout, graded, dit)
    arms, left = make_arms(base, names)
    for one in left:
        say(f"left out: {one.axis} {one.name}: {one.reason}")
    found = resolve_device(device)
    page = where / "report.html"

    def write() -> None:
        with reported("the report", page):
            commit_file(page, page_of(plan, arms, left, found))

    code = sweep(plan, arms, found, say, write)
    write()
    entries = summary(plan, arms)
    lines = table([COLUMNS, *(cells(entry) for entry in entries)])
    stopped = [f"stopped; go on with: {plan.command()}"] if code else []
    result = {
        "out": str(where),
        "report": str(page),
        "arms": entries,
        "left_out": [vars(one) for one in left],
    }
    print_result(result, as_json, [*lines, *stopped, f"see: {page}"])
    if code:
        raise typer.Exit(code)


def cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """An arm's line of the table."""
    loss, share, score, seconds = (
        entry[key] for key in ("heldout_loss", "label_accuracy", "score", "seconds")
    )
    return (
        entry["axis"],
        entry["name"],
        "-" if loss is None else f"{loss:.4f}",
        "-" if share is None else f"{share:.1%}",
        "-" if score is None else f"{score:.4g}",
        f"{entry['parameters']:,}",
        f"{entry['operations']:,}",
        "-" if seconds is None else f"{seconds:g}",
    )


def say(line: str) -> None:
    """A line for people."""
    typer.echo(line, err=True)


def read_list(text: str) -> list[str]:
    """'a, b' -> ['a', 'b']."""
    return [word.strip() for word in text.split(",") if word.strip()]


def read_seeds(text: str) -> tuple[int, ...]:
    """'0,1,2' -> (0, 1, 2); InputError for anything but numbers from 0."""
    words = read_list(text)
    if not words or not all(word.isdecimal() for word in words):
        raise InputError(
            f"--seeds is {text!r}, but it must be whole numbers from 0 with commas between them; give e.g. 0,1,2"
        )
    return tuple(int(word) for word in words)
