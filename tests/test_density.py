# SPDX-License-Identifier: Apache-2.0
"""Limits on the density of the package's sources.

Line length, statements per line, inline conditionals, tuple assignments, length of functions and files.
Each measure is a function from one file's text to a list of (line, description). To list every offender of
some files, or of the whole package: ``python tests/test_density.py [FILE ...]``.
"""

import ast
import sys
from functools import lru_cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "latte"
FILES = sorted(SOURCE.rglob("*.py"))

MAX_COLUMNS = 110
MAX_FUNCTION_LINES = 60
MAX_MODULES = 218  # the goal is 115: lower this number whenever modules are merged
MAX_TOP_LEVEL = 12
MAX_FILE_LINES = 400
MAX_SOURCE_LINES = 39_600  # without blank lines; the goal is 16,500: lower it with every simplification
MAX_CONDITIONALS = 12  # inline ``a if c else b`` per 1000 lines without blank ones
MAX_TUPLE_ASSIGNMENTS = 5  # assignments of unrelated values to a tuple, per 1000 lines without blank ones
MAX_SKIPPED_FORMAT = 10  # ``# fmt: skip`` and ``# fmt: off``
LONG_FUNCTIONS = ("training/train.py:",)  # train(): flat, its stages marked by comments

Found = list[tuple[int, str]]


@lru_cache(2 * len(FILES))
def nodes(text: str) -> tuple[ast.AST, ...]:
    """Every node of a file's syntax tree."""
    return tuple(ast.walk(ast.parse(text)))


def long_lines(text: str) -> Found:
    """Lines of more than MAX_COLUMNS characters."""
    lines = enumerate(text.splitlines(), 1)
    return [(number, f"{len(line)} columns") for number, line in lines if len(line) > MAX_COLUMNS]


def several_statements(text: str) -> Found:
    """Statements that begin on the line on which another one begins."""
    found = []
    for node in nodes(text):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if not isinstance(body, list) or not body:
                continue
            starts = [getattr(node, "lineno", 0), *(statement.lineno for statement in body)]
            stub = len(body) == 1 and isinstance(body[0], ast.Expr) and ast.unparse(body[0]) == "..."
            if len(set(starts)) < len(starts) and not stub and isinstance(body[0], ast.stmt):
                found.append((body[0].lineno, "several statements on one line"))
    return found


def long_functions(text: str) -> Found:
    """Functions of more than MAX_FUNCTION_LINES lines, decorators not counted."""
    found = []
    for node in nodes(text):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append((node.lineno, f"function {node.name} has {lines} lines"))
    return found


def inline_conditionals(text: str) -> Found:
    """Conditional expressions, wherever they stand."""
    found = (node for node in nodes(text) if isinstance(node, ast.IfExp))
    return sorted((node.lineno, ast.unparse(node)) for node in found)


def nested_conditionals(text: str) -> Found:
    """Conditional expressions inside another one."""
    found = set()
    for outer in nodes(text):
        if isinstance(outer, ast.IfExp):
            inner = (node for node in ast.walk(outer) if isinstance(node, ast.IfExp) and node is not outer)
            found |= {(node.lineno, ast.unparse(outer)) for node in inner}
    return sorted(found)


def tuple_assignments(text: str) -> Found:
    """``a, b = x, y``: unrelated values assigned at once. A swap is no such thing."""
    found = []
    for node in nodes(text):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        target = node.targets[0]
        if not isinstance(target, ast.Tuple):
            continue
        left = {ast.unparse(item) for item in target.elts}
        right = {ast.unparse(item) for item in node.value.elts}
        if left != right:
            found.append((node.lineno, ast.unparse(node)))
    return found


def skipped_format(text: str) -> Found:
    """Places that ruff format must not touch."""
    lines = enumerate(text.splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if "# fmt: skip" in line or "# fmt: off" in line]


NEVER = (long_lines, several_statements, nested_conditionals)  # not one
PER_THOUSAND = {inline_conditionals: MAX_CONDITIONALS, tuple_assignments: MAX_TUPLE_ASSIGNMENTS}


def offenders(measure, files=FILES) -> list[str]:
    """'file:line: description' of everything that ``measure`` finds."""
    found = []
    for path in files:
        name = path.resolve().relative_to(SOURCE).as_posix()
        found += [f"{name}:{line}: {what}" for line, what in measure(path.read_text(encoding="utf-8"))]
    return found


def source_lines(files=FILES) -> int:
    """Lines that are not blank."""
    return sum(sum(map(bool, map(str.strip, path.read_text("utf-8").splitlines()))) for path in files)


@pytest.mark.parametrize("measure", NEVER)
def test_there_is_none(measure):
    assert len(FILES) > 100
    assert offenders(measure) == []


def test_every_function_fits_a_screen():
    found = [line for line in offenders(long_functions) if not line.startswith(LONG_FUNCTIONS)]
    assert found == []


@pytest.mark.parametrize("measure", PER_THOUSAND)
def test_few_per_thousand_lines(measure):
    found = offenders(measure)
    rate = 1000 * len(found) / source_lines()
    assert rate <= PER_THOUSAND[measure], "\n".join([f"{rate:.1f} per 1000 lines", *found])


def test_reviewed_tables_are_few():
    assert len(offenders(skipped_format)) <= MAX_SKIPPED_FORMAT


def test_the_number_of_modules_and_lines():
    modules = [path for path in FILES if path.name != "__init__.py"]
    assert len(modules) <= MAX_MODULES
    assert source_lines() <= MAX_SOURCE_LINES
    entries = [path for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    top_level = [path.name for path in entries if path.is_file() and not path.name.startswith("__")]
    assert len(top_level) <= MAX_TOP_LEVEL, top_level


def test_every_file_has_one_idea():
    sizes = {path.relative_to(SOURCE).as_posix(): path.read_text("utf-8").count("\n") for path in FILES}
    assert {name: lines for name, lines in sizes.items() if lines > MAX_FILE_LINES} == {}


@pytest.mark.parametrize(
    ("measure", "text", "count"),
    [
        (long_lines, "x = 1  # " + "a" * 110, 1),
        (long_lines, "x = 1", 0),
        (several_statements, "a = 1; b = 2", 1),
        (several_statements, "if a: b = 2", 1),
        (several_statements, "def f(): ...", 0),
        (several_statements, "if a:\n    b = 2\nelif c:\n    b = 3", 0),
        (long_functions, "def f():\n" + "    pass\n" * 60, 1),
        (long_functions, "def f():\n" + "    pass\n" * 59, 0),
        (inline_conditionals, "x = a if b else c", 1),
        (inline_conditionals, "x = [a for b in c if b]", 0),
        (nested_conditionals, "x = a if b else c if d else e", 1),
        (nested_conditionals, "x = (a if b else c, d if e else f)", 0),
        (tuple_assignments, "a, b = 1, f(x)", 1),
        (tuple_assignments, "a, b = b, a", 0),
        (tuple_assignments, "a, b = f(x)", 0),
        (skipped_format, "x = [1,2]  # fmt: skip", 1),
    ],
)
def test_each_measure_counts(measure, text, count):
    assert len(measure(text)) == count


if __name__ == "__main__":
    chosen = [Path(name) for name in sys.argv[1:]] or FILES
    for one in (*NEVER, long_functions, *PER_THOUSAND, skipped_format):
        lines = offenders(one, chosen)
        limit = PER_THOUSAND.get(one)
        rate = (
            f", {1000 * len(lines) / source_lines(chosen):.1f} per 1000 lines (limit {limit})"
            if limit
            else ""
        )
        print(f"{one.__name__}: {len(lines)}{rate}", *lines, sep="\n  ")
    print(f"{source_lines(chosen):,} lines that are not blank in {len(chosen)} files")
