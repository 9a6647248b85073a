# SPDX-License-Identifier: Apache-2.0
"""What each key of the run config means (the comment of its field, read from the source of its class), and
one line about every recipe, protocol, sampler, codec, ... And which settings of a run differ from those of
its recipe.
"""

import ast
import inspect
import io
import re
import shlex
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from latte.autoencoder.config import CODECS
from latte.checks import InputError
from latte.config.layers import type_name
from latte.config.run import RunConfig, load_run, recipes
from latte.data.config import PROCEDURAL
from latte.diffusion.config import LONG_VIDEO_METHODS, OBJECTIVES, SAMPLERS, TIMES
from latte.model.config import CONDITIONINGS, MLPS, PATCHES, TEMPORAL_POSITIONS
from latte.tables import Table
from latte.text.config import TEXT_ENCODERS
from latte.training.config import OPTIMIZERS, PARALLELISMS, TRACKERS


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


class Kind(NamedTuple):
    """A kind of choice: where a name of it is given, and a function that returns name -> a line about it."""

    where: str
    describe: Callable[[], Mapping[str, str]]


def _of_table(entries: Table[Any, Any]) -> Callable[[], Mapping[str, str]]:
    """Return the function that describes the entries of a Table, which it does not import."""
    return lambda: {str(name): entries.about(name) for name in entries}


def about_recipes() -> dict[str, str]:
    """Return recipe -> the first sentence of the comment at the top of its file."""
    return {name: first_sentence(path.read_text("utf-8")) for name, path in recipes().items()}


def first_sentence(text: str) -> str:
    """Return the first sentence of the comment that ``text`` begins with, without its full stop."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("# ") or line.startswith("#  "):
            break
        lines.append(line.removeprefix("# "))
    return re.split(r"\.(?= [A-Z]|$)", " ".join(lines))[0]


def about_protocols() -> dict[str, str]:
    """Return protocol -> the first sentence of its note."""
    from latte.evaluation.protocols import PROTOCOLS  # torch

    notes = {name: re.split(r"\.(?= [A-Z]|$)", entry.note)[0] for name, entry in PROTOCOLS.items()}
    return notes | {"external": "scores between files of features or of mu and sigma, see latte evaluate"}


def about_variants() -> dict[str, str]:
    """Return variant -> how its blocks are arranged."""
    from latte.model.variants import VARIANTS

    return {str(key): variant.name for key, variant in VARIANTS.items()}


def about_qualities() -> dict[str, str]:
    """Return quality -> its sampler and number of steps."""
    from latte.inference.quality import QUALITIES

    return {name: f"{quality.sampler}, {quality.steps} steps" for name, quality in QUALITIES.items()}


KINDS: dict[str, Kind] = {
    "recipes": Kind("latte train RECIPE", about_recipes),
    "samplers": Kind("sample.sampler, --sampler", _of_table(SAMPLERS)),
    "qualities": Kind("latte sample --quality", about_qualities),
    "longer": Kind("latte sample --longer", _of_table(LONG_VIDEO_METHODS)),
    "protocols": Kind("latte evaluate --protocol, train.score_protocol", about_protocols),
    "codecs": Kind("codec.name", _of_table(CODECS)),
    "text_encoders": Kind("text.name", _of_table(TEXT_ENCODERS)),
    "variants": Kind("model.variant", about_variants),
    "patches": Kind("model.patch", _of_table(PATCHES)),
    "conditionings": Kind("model.conditioning", _of_table(CONDITIONINGS)),
    "temporal_positions": Kind("model.temporal_position", _of_table(TEMPORAL_POSITIONS)),
    "mlps": Kind("model.mlp", _of_table(MLPS)),
    "objectives": Kind("diffusion.objective", _of_table(OBJECTIVES)),
    "timesteps": Kind("train.timesteps", _of_table(TIMES)),
    "optimizers": Kind("train.optimizer", _of_table(OPTIMIZERS)),
    "parallelisms": Kind("train.parallel", _of_table(PARALLELISMS)),
    "trackers": Kind("train.trackers", _of_table(TRACKERS)),
    "scenes": Kind("data.scenes, latte data synth --scenes", _of_table(PROCEDURAL)),
}
"""Kinds of choices of ``latte config list``. To add one: one entry."""


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
