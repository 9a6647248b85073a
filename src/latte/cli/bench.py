# SPDX-License-Identifier: Apache-2.0
"""``latte bench``: how fast this machine is for a run, and the list of all benchmarks."""

import ast
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.checks import check
from latte.cli.options import (
    OVERRIDABLE,
    TABLES,
    Debug,
    Device,
    Dtype,
    Json,
    Overrides,
    print_note,
    print_result,
    progress_line,
    table,
)
from latte.tables import Later, Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from latte.profile.bench import Parts, Question

__all__ = ["OVERRIDABLE", "QUESTIONS", "bench"]

# To add one: a function from Parts to a Question, and one entry.
QUESTIONS: Table[str, "Callable[[Parts], Question]"] = Table(
    {
        "forward": Later("latte.profile.bench:forward"),
        "step": Later("latte.profile.bench:step"),
        "sample": Later("latte.profile.bench:sampling"),
        "encode": Later("latte.profile.bench:encoding"),
        "decode": Later("latte.profile.bench:decoding"),
        "data": Later("latte.profile.bench:data"),
    }
)
TABLES["questions"] = lambda: QUESTIONS  # for the help
SCRIPTS = Path(__file__).parents[3] / "benchmarks"  # in a checkout
RunOrNone = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="A recipe's name, a YAML file or a run folder; without it the benchmarks are listed.",
    ),
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Only this question, may be repeated: {questions}.")
]
Rounds = Annotated[int, typer.Option(help="Rounds, in each of which everything is timed once.")]
Seconds = Annotated[float, typer.Option(help="Least length of one sample; short tasks repeat within it.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the blocks of the sampled model.")]


def bench(
    run: RunOrNone = None,
    overrides: Overrides = None,
    only: Only = None,
    rounds: Rounds = 5,
    seconds: Seconds = 0.3,
    compile_: Compile = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how fast this machine is for a run: forward pass, training step, sampling, codec and data.

    All are timed in turn in one process, beside a large matrix product. Weights are random and nothing is
    downloaded. With --json one line per question. Without RUN: a list of all benchmarks.
    """
    if run is None:
        check(not only, "--only chooses questions about a run; give a recipe, such as: latte bench shapes")
        found = listing()
        print_result(found, as_json, list_lines(found))
        return
    from latte.config.run import load_run

    config, _ = load_run(run, overrides or [])
    from latte.profile.bench import measure, summary  # torch, after the settings were found good

    progress = progress_line("rounds", 0, 1, "rounds")
    lines = measure(config, QUESTIONS, only or (), device, dtype, rounds, seconds, compile_, progress)
    if as_json:
        for line in lines:
            print(json.dumps(line), flush=True)
        return
    print_result({}, False, [*table(rows(lines)), *summary(lines, config)])
    for line in lines:
        if "skipped" in line:
            print_note(f"{line['what']} was left out: {line['skipped']}")


def rows(lines: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return a header and the cells of each answer."""
    found = [("what", "seconds", "clips/s", "x forward", "of matmul", "spread")]
    for line in lines:
        if "skipped" in line:
            continue
        found.append(
            (
                line["what"],
                f"{line['median_s']:.4g}",
                f"{line['clips_per_second']:.4g}",
                f"{line['over_forward']:.3g}",
                share_text(line),
                f"{line['spread']:.1%}",
            )
        )
    return found


def share_text(line: dict[str, Any]) -> str:
    """Return the share of the matrix product's rate in percent; nothing where operations are not counted."""
    if "share_of_matmul" not in line:
        return ""
    return f"{line['share_of_matmul']:.1%}"


def listing() -> dict[str, Any]:
    """Return the names of the questions and, in a checkout, the scripts of benchmarks/ with what they say."""
    scripts = {}
    for path in sorted(SCRIPTS.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "__main__" in text:
            about = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
            scripts[path.relative_to(SCRIPTS.parent).as_posix()] = about
    return {"questions": list(QUESTIONS), "scripts": scripts}


def list_lines(found: dict[str, Any]) -> list[str]:
    """Return ``listing()`` for people."""
    lines = ["questions about a run, answered by latte bench RUN: " + ", ".join(found["questions"])]
    if found["scripts"]:
        lines += ["", "scripts of this checkout, each with --help:"]
        lines += table([(f"python {name}", about) for name, about in found["scripts"].items()])
    else:
        lines.append("a checkout of the source has more, in its folder benchmarks")
    return lines
