# SPDX-License-Identifier: Apache-2.0
"""``latte ablate``: the paper's ablations as one sweep from one recipe."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    print_note,
    print_result,
    table,
)

if TYPE_CHECKING:
    from latte.ablate.axes import LeftOut
    from latte.ablate.plan import Plan

__all__ = ["OVERRIDABLE", "ablate"]

Axes = Annotated[str, typer.Option(metavar="A,B,...", help="What to vary: {axes}.", show_default=False)]
Seeds = Annotated[str, typer.Option(metavar="N,N,...", help="Seeds; every setting is trained with each.")]
Steps = Annotated[int | None, typer.Option(help="train.steps; those of the recipe by default.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the sweep; runs/RUN-ablation by default. The same command on it resumes."),
]
Dit = Annotated[
    str | None, typer.Option(metavar="PATH", help="The DiT that axis init starts from: a file or a hub id.")
]
NumPoints = Annotated[int, typer.Option("--points", help="Measured steps per run, the last step included.")]
HeldOut = Annotated[int, typer.Option("--heldout", help="Clips of the held-out loss.")]
Generated = Annotated[
    int, typer.Option(help="Clips generated at every point for the other metrics; 0 for none.")
]


def ablate(
    run: Run,
    axes: Axes,
    overrides: Overrides = None,
    seeds: Seeds = "0,1,2",
    steps: Steps = None,
    out: Out = None,
    dit: Dit = None,
    points: NumPoints = 8,
    heldout: HeldOut = 64,
    generated: Generated = 32,
    device: Device = "auto",
    dtype: TrainDtype = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train every setting of some axes from one recipe and report the paper's conclusions and ours.

    All settings see the same data in the same order, with the same seeds. An example that takes a quarter of
    an hour on two CPU cores: latte ablate shapes-tiny --axes variant
    """
    from latte.config.run import load_run
    from latte.files import commit_file, reported
    from latte.runtime import rank, resolve_device

    configure_logging()
    given = {"train.steps": steps, "train.dtype": dtype}
    words = (*(overrides or []), *(f"{key}={value}" for key, value in given.items() if value is not None))
    config, _ = load_run(run, words)
    from latte.ablate.axes import make_settings  # torch, after the settings were found good
    from latte.ablate.plan import Plan, base_config, summary
    from latte.ablate.report import show
    from latte.ablate.sweep import sweep
    from latte.distributed import command_group

    names = tuple(read_list(axes))
    base = base_config(config)
    folder = out or Path(f"{config.run.dir or 'runs/unnamed'}-ablation")
    plan = Plan(base, run, words, names, folder, read_seeds(seeds), points, heldout, generated, dit)
    settings, left = make_settings(base, names)
    log = print_note if rank() == 0 else lambda line: None
    for one in left:
        log(f"left out: {one.axis} {one.name}: {one.reason}")
    torch_device = resolve_device(device)
    page = folder / "report.html"

    def write_report() -> None:
        with reported("the report", page):
            commit_file(page, show(plan, settings, left, torch_device))

    with command_group(torch_device) as ranks:
        code = sweep(plan, settings, torch_device, log, write_report, ranks)
    if rank() == 0:
        write_report()
    print_summary(plan, summary(plan, settings), left, as_json, stopped=code != 0)
    if code:
        raise typer.Exit(code)


def print_summary(
    plan: "Plan", entries: list[dict[str, Any]], left: list["LeftOut"], as_json: bool, stopped: bool
) -> None:
    """Print a line per setting, or the result as JSON."""
    page = plan.out / "report.html"
    result = {
        "out": str(plan.out),
        "report": str(page),
        "settings": entries,
        "arms": entries,  # the name of 0.1.0, for one version
        "left_out": [vars(one) for one in left],
    }
    lines = table([columns(), *(cells(entry) for entry in entries)])
    if stopped:
        lines.append(f"stopped; resume with: {plan.command()}")
    print_result(result, as_json, [*lines, f"see: {page}"])


def columns() -> tuple[str, ...]:
    """Return the titles of the table."""
    from latte.ablate.metrics import METRICS

    titles = (metric.title for metric in METRICS.values())
    return ("axis", "setting", *titles, "parameters", "operations per clip", "training s")


def cells(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return a setting's line of the table."""
    from latte.ablate.metrics import METRICS

    measured = (shown(entry[name], metric.number_format) for name, metric in METRICS.items())
    costs = (f"{entry['parameters']:,}", f"{entry['operations']:,}", shown(entry["seconds"], "g"))
    return (entry["axis"], entry["name"], *measured, *costs)


def shown(value: float | None, number_format: str) -> str:
    """Return a number as text, a dash for None."""
    return "-" if value is None else f"{value:{number_format}}"


def read_list(text: str) -> list[str]:
    """Return 'a, b' as ['a', 'b']."""
    return [word.strip() for word in text.split(",") if word.strip()]


def read_seeds(text: str) -> tuple[int, ...]:
    """Return '0,1,2' as (0, 1, 2); InputError for anything but distinct numbers from 0."""
    words = read_list(text)
    if not words or not all(word.isascii() and word.isdecimal() and len(word) < 19 for word in words):
        raise InputError(f"--seeds must be whole numbers from 0 with commas between them, got {text!r}")
    return tuple(int(word) for word in words)
