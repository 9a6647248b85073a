# SPDX-License-Identifier: Apache-2.0
"""What the commands share: common options, help that lists a table, and printing. No torch here.

An option's help may hold the name of a table in braces, such as ``{samplers}``. The entries of that table are
read when the help is printed, so that the help is complete for tables that were extended.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from latte.checks import InputError, duration, printable

DEBUG = "latte.debug"
LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal
OVERRIDABLE = {"ignore_unknown_options": True}  # so that --model.size S reaches the overrides


def _samplers() -> Iterable[str]:
    from latte.diffusion.config import SAMPLERS

    return SAMPLERS


def _qualities() -> Iterable[str]:
    from latte.inference.quality import QUALITIES

    return QUALITIES


def _long_video() -> Iterable[str]:
    from latte.diffusion.config import LONG_VIDEO_METHODS

    return LONG_VIDEO_METHODS


def _protocols() -> Iterable[str]:
    from latte.evaluation.protocols import PROTOCOLS

    return PROTOCOLS


def _confounders() -> Iterable[str]:
    from latte.evaluation.plan import CONFOUNDERS

    return CONFOUNDERS


def _stages() -> Iterable[str]:
    from latte.evaluation.evaluate import STAGES

    return STAGES


def _targets() -> Iterable[str]:
    from latte.interop.export import TARGETS

    return TARGETS


def _axes() -> Iterable[str]:
    from latte.ablate.axes import AXES

    return AXES


def _dtypes() -> Iterable[str]:
    from latte.runtime import DTYPES, FASTEST

    return ("auto", FASTEST, *DTYPES)


def _training_dtypes() -> Iterable[str]:
    from latte.training.config import TRAINING_DTYPES

    return TRAINING_DTYPES


def _latent_dtypes() -> Iterable[str]:
    from latte.data.encoder import DTYPES

    return DTYPES


def _scenes() -> Iterable[str]:
    from latte.data.config import PROCEDURAL

    return PROCEDURAL


def _kinds() -> Iterable[str]:
    from latte.config.describe import KINDS

    return (*KINDS, "keys")


TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "samplers": _samplers,
    "qualities": _qualities,
    "long_video": _long_video,
    "protocols": _protocols,
    "confounders": _confounders,
    "stages": _stages,
    "targets": _targets,
    "axes": _axes,
    "dtypes": _dtypes,
    "training_dtypes": _training_dtypes,
    "latent_dtypes": _latent_dtypes,
    "scenes": _scenes,
    "kinds": _kinds,
}


def with_tables(text: str) -> str:
    """Replace every ``{table}`` of a help text by the names of that table."""
    return re.sub(r"\{(\w+)\}", lambda match: ", ".join(map(str, TABLES[match[1]]())), text)


RENAMED_OPTIONS: dict[str, dict[str, str]] = {  # command -> option of 0.1.0 -> its name now
    "ablate": {"--graded": "--generated"}
}


SEVERAL = ("train", "sample", "evaluate", "encode", "ablate", "plan")  # commands that know of other processes


class Command(TyperCommand):
    """A command with plain help (importing rich takes longer than printing), its tables filled in."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **{**settings, "rich_markup_mode": None})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; InputError for a renamed option and an empty --out."""
        renamed = RENAMED_OPTIONS.get(self.name or "", {})
        own = {option for parameter in self.params for option in parameter.opts}
        for word, following in pairwise([*args, None]):
            option, equals, value = str(word).partition("=")
            if option in renamed and option not in own:
                raise InputError(f"{option} is now called {renamed[option]}; write that instead")
            empty = not value if equals else following == ""
            if option == "--out" and option in own and empty:
                raise InputError("--out is empty; give the path of a file or folder")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; under torchrun one that is not among SEVERAL runs in rank 0 alone."""
        from latte.runtime import alone, rank, world_size

        others = world_size() - 1
        if not others or self.name in SEVERAL:
            return super().invoke(ctx)
        if rank():
            raise typer.Exit()
        print_note(f"notice: latte {self.name} is one process: rank 0 runs it, the other {others} have ended")
        with alone():
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help with the names of the tables that it mentions."""
        for parameter in self.params:
            if text := getattr(parameter, "help", None):
                parameter.help = with_tables(text)  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


class Group(TyperGroup):
    """A group of commands with plain help."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **{**settings, "rich_markup_mode": None})


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
Dtype = Annotated[str, typer.Option(metavar="NAME", help="Precision of matrix products: {dtypes}.")]
TrainDtype = Annotated[
    str | None, typer.Option("--dtype", metavar="NAME", help="train.dtype: {training_dtypes}.")
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


def configure_logging(quiet: bool = False) -> None:
    """Send the library's log to stderr as plain lines; processes other than the first log warnings only."""
    from latte.runtime import rank

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("latte")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if quiet or rank() else logging.INFO)


def print_result(result: dict[str, Any], as_json: bool, lines: Iterable[str]) -> None:
    """Print ``result`` as one line of JSON, or ``lines`` for people, safe for a terminal; of several
    processes rank 0 alone does.
    """
    from latte.runtime import rank

    if rank():
        return
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        print("\n".join(printable(line) for text in lines for line in text.split("\n")), flush=True)


def print_note(line: str) -> None:
    """Print a line about progress on stderr, safe for a terminal."""
    print(printable(line), file=sys.stderr, flush=True)


def progress_line(
    label: str, part: int, parts: int, unit: str = "clips", count: float | None = None
) -> Callable[[int, int], None]:
    """Return ``progress(done, total)`` for part ``part`` of ``parts``: what is done, how fast, the time left.

    On a terminal it rewrites one line; elsewhere it prints a line at every quarter and every LINE_SECONDS.
    ``count`` is the number of ``unit`` of the part; by default ``total``. Ranks other than 0 print nothing.
    """
    from latte.runtime import rank

    if rank():
        return lambda done, total: None
    quarters = 0
    started = time.monotonic()
    printed = started

    def progress(done: int, total: int) -> None:
        nonlocal quarters, printed
        fraction = (part + done / total) / parts
        now = time.monotonic()
        spent = max(now - started, 1e-9)
        speed = (total if count is None else count) * done / total / spent
        left = spent * (parts - part - done / total) / max(done / total, 1e-9)
        line = f"{label} {fraction:.0%}  {speed:.3g} {unit}/s  {duration(left)} left"
        if sys.stderr.isatty():
            end = "\n" if done == total and part + 1 == parts else ""
            print(f"\r{line:<70}", end=end, file=sys.stderr, flush=True)
        elif int(4 * fraction) > max(quarters, int(4 * part / parts)) or now - printed >= LINE_SECONDS:
            quarters = int(4 * fraction)
            printed = now
            print(line, file=sys.stderr, flush=True)

    return progress


def table(rows: list[tuple[Any, ...]]) -> list[str]:
    """Return rows of cells as lines with aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ((cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return ["  ".join(row).rstrip() for row in padded]
