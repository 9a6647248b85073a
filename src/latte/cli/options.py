# SPDX-License-Identifier: Apache-2.0
"""What the commands share: their common options, and how a result is printed. Nothing here imports torch."""

import json
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

DEBUG = "latte.debug"
OVERRIDABLE = {"ignore_unknown_options": True}  # so that --model.size S reaches the overrides


def _remember(context: typer.Context, value: bool) -> bool:
    context.meta[DEBUG] = value or context.meta.get(DEBUG, False)
    return value


Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON object, the last line of stdout.")
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember, is_eager=True)
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[
    str, typer.Option(metavar="NAME", help="auto, fp32, bf16 or fp16: precision of matrix products.")
]
Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A recipe's name, a YAML file or a run folder.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings, e.g. train.steps=1000 (see latte config show RUN)."
    ),
]


def speak(quiet: bool = False) -> None:
    """Send the library's log to stderr as plain lines; only the first process of several speaks unless something is wrong."""
    from latte.runtime import rank

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("latte")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet or rank() else logging.INFO)


def show(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    """Print ``result`` as one line of JSON, or ``lines`` for people."""
    print(json.dumps(result) if as_json else "\n".join(lines), flush=True)


def tell(what: str, part: int, parts: int) -> Callable[[int, int], None]:
    """A ``progress(done, of)`` for part ``part`` of ``parts``: one line that is written over on a terminal, quarters elsewhere."""
    said = 0

    def progress(done: int, of: int) -> None:
        nonlocal said
        share = (part + done / of) / parts
        if sys.stderr.isatty():
            print(f"\r{what} {share:4.0%}", end="\n" if share == 1 else "", file=sys.stderr, flush=True)
        elif int(4 * share) > max(said, int(4 * part / parts)):
            said = int(4 * share)
            print(f"{what} {share:.0%}", file=sys.stderr, flush=True)

    return progress


def table(rows: list[tuple[Any, ...]]) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))] if cells else []
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
