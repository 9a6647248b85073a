# SPDX-License-Identifier: Apache-2.0
"""What each key of the run config means: the comment of its field, read from the source of its class. And
which settings of a run differ from those of its recipe.
"""

import ast
import inspect
import io
import shlex
import tokenize
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from latte.checks import InputError
from latte.config.layers import type_name
from latte.config.run import RunConfig, load_run, recipes


@dataclass(frozen=True)
class Key:
    """A key of the run config: its type as text, its default (or None), its description."""

    name: str
    type: str
    default: Any
    description: str


def describe_keys(config: type = RunConfig, prefix: str = "") -> list[Key]:
    """Return every key in the order of the classes."""
    hints = get_type_hints(config)
    comments = field_comments(inspect.getsource(config))
    found = []
    for item in fields(config):
        hint = hints[item.name]
        if is_dataclass(hint):
            found += describe_keys(hint, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            default = None if item.default is MISSING else item.default
            found.append(Key(prefix + item.name, type_name(hint), default, comments.get(item.name, "")))
    return found


def field_comments(source: str) -> dict[str, str]:
    """Return field -> comment, on the lines of the field or else right above it."""
    lines = source.splitlines()
    comments = {}
    alone = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            comments[line] = token.string.lstrip("# ").strip()
            if lines[line - 1].lstrip().startswith("#"):
                alone.add(line)
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own = [
                comments[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments
            ]
            start = node.lineno
            while start - 1 in alone:
                start -= 1
            above = [comments[line] for line in range(start, node.lineno)]
            if text := " ".join(own or above):
                found[node.target.id] = text
    return found


def changed_settings(run_dir: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """Return what a run's settings are compared with, and (key, there, here) of those that differ.

    That is the recipe in the first line of its command.txt, or else the defaults.
    """
    from latte.training.resume import differences

    name = recipe_of(run_dir)
    base = RunConfig()
    if name is not None:
        try:
            base, _ = load_run(name, environment={})
        except InputError:  # the recipe of another version
            name = None
    given = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))
    known = {section: value for section, value in asdict(base).items() if section in given}
    rows = [row for row in differences(known, given) if row[0] != "run.dir" and row[2] != "nothing"]
    return f"recipe {name}" if name else "the defaults", rows


def recipe_of(run_dir: Path) -> str | None:
    """Return the recipe that the first command of a run names, None for other runs."""
    try:
        words = shlex.split((run_dir / "command.txt").read_text("utf-8").splitlines()[0])
        name = words[words.index("train") + 1]
    except (OSError, ValueError, IndexError):
        return None
    return name if name in recipes() else None
