# SPDX-License-Identifier: Apache-2.0
"""``latte report``: the page of a run, or of several compared."""

from pathlib import Path
from typing import Annotated

import typer

from latte.checks import printable
from latte.cli.options import Debug, Json, print_note, print_result, table

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option(help="The page: RUN/report.html of one run, comparison.html of several by default."),
]


def report(runs: Runs, out: Out = None, as_json: Json = False, debug: Debug = False) -> None:
    """Write the page of a run, or one page that compares several: curves, scores, samples, settings.

    Runs that are still training are shown as they are now. Score differences are from the first run.
    """
    from latte.config.describe import changed_settings
    from latte.report import open_runs, result_of, summaries, write_comparison
    from latte.training.report import FILE, write_report

    found = open_runs(runs)
    for run in found:
        total = (run.config.get("train") or {}).get("steps")
        if isinstance(total, int) and run.step < total:
            print_note(f"{run.name} is at step {run.step:,} of {total:,}, and is shown as it is now")
    if len(found) == 1:
        path = write_report(found[0].folder, changed_settings, out or found[0].folder / FILE)
        differences = []
    else:
        path = out or Path("comparison.html")
        differences = write_comparison(found, path)
    rows = summaries(found)
    lines = table([tuple(rows[0]), *(tuple(row.values()) for row in rows)])
    verdicts = {True: "significant", False: "not significant"}
    for one in differences:
        if one.significant is None:
            lines.append(f"{one.run} and {one.base}: the scores cannot be compared: {one.note}")
        else:
            lines.append(
                f"{one.run} minus {one.base} at step {one.step}: {one.value:.4g} "
                f"({one.low:.4g} to {one.high:.4g}), {verdicts[one.significant]}"
            )
    print_result(result_of(found, differences, path), as_json, [*lines, f"see: {printable(str(path))}"])
