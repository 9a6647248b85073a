# SPDX-License-Identifier: Apache-2.0
"""Settings as they are written: YAML, environment variables and ``a.b=value`` words -> entries, and text -> a value of a given type.

Every value stays text until the field it belongs to says what it is, so YAML's surprises (``1e-4`` a string, ``010`` eight, ``on`` a
truth value, ``1:30`` ninety) cannot happen: a number is read as a number and a name as a name, whatever it looks like. Nothing is
ever built from YAML, only mappings, sequences and scalars are looked at; aliases and tags have no effect.
"""

import math
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

from latte.checkpoint.record import RENAMED_KEYS
from latte.checks import InputError, nearest, require

MOST_BYTES = 1 << 20  # a configuration is a page; anything larger is another kind of file
NULLS = {"null", "Null", "NULL", "~", ""}
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "null",
}
NUMBER = re.compile(r"[-+]?(\d{1,19}(\.\d{0,24})?|\.\d{1,24})(e[-+]?\d{1,3})?", re.ASCII | re.IGNORECASE)
WAY_OUT = "give 'section:' lines with 'key: value' lines under them"


class Plain(str):
    """Text that was written without quotes: a number, a truth value, null or a name, as its field decides."""


def plain(word: str) -> Plain:
    """A word of a command line or an environment variable; there, Python's None means null too."""
    return Plain("null" if word in ("None", "none") else word)


@dataclass(frozen=True)
class Entry:
    """One value as it was written (Plain, str, list, or dict for what no setting can be) and where."""

    raw: Any
    origin: str


@dataclass
class Layer:
    """The settings of one source by dotted key, and the problems found in it. ``hints`` holds every valid key and its type."""

    hints: Mapping[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def sections(self) -> set[str]:
        """The names before the dots."""
        return {key.partition(".")[0] for key in self.hints if "." in key}

    def add(self, key: str, raw: Any, origin: str) -> None:
        """Take a setting, or note that there is none of this name."""
        key = RENAMED_KEYS.get(key, key)
        if key in self.hints:
            self.entries[key] = Entry(raw, origin)
            return
        leaves = {known.rpartition(".")[2]: known for known in self.hints}
        elsewhere = leaves.get(key.rpartition(".")[2])
        hint = f"; did you mean {elsewhere!r}?" if elsewhere else nearest(key, self.hints)
        self.problems.append(f"{origin}: {short(key)[1:-1]} = {short(raw)}: there is no such setting{hint}")


def read_yaml(path: Path, name: str, hints: Mapping[str, Any]) -> Layer:
    """A YAML file of sections, ``name`` in messages; InputError when it is not one at all."""
    require(
        path.stat().st_size <= MOST_BYTES,
        "configuration",
        name,
        "it is larger than 1 MB",
        "give a YAML file of settings",
    )
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not text in UTF-8 ({error.reason} at byte {error.start}); {WAY_OUT}"
        ) from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        what = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise InputError(f"{where} is not YAML: {what}; {WAY_OUT}") from None
    layer = Layer(hints)
    if root is not None:
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{name} holds no settings; {WAY_OUT}")
        _walk(root, "", name, layer)
    return layer


def _walk(node: yaml.MappingNode, prefix: str, name: str, layer: Layer) -> None:
    """Add what stands under ``node``; sections are not nested, so this goes two levels deep at most."""
    for key_node, value in node.value:
        key = prefix + (key_node.value if isinstance(key_node, yaml.ScalarNode) else "?")
        key = RENAMED_KEYS.get(key, key)
        origin = f"{name}:{key_node.start_mark.line + 1}"
        if key in layer.entries:
            layer.problems.append(
                f"{origin}: {key} is given again (first in {layer.entries[key].origin}); keep one of the two"
            )
        elif key not in layer.sections:
            layer.add(key, _raw(value), origin)
        elif isinstance(value, yaml.MappingNode):
            _walk(value, key + ".", name, layer)
        elif not (isinstance(value, yaml.ScalarNode) and value.value in NULLS):
            layer.problems.append(
                f"{origin}: {key} is {short(_raw(value))}, but it is a section; put its keys under it, indented"
            )


def _raw(node: yaml.Node) -> Any:
    """A node as text, a list of texts, or an empty dict for anything deeper."""
    if isinstance(node, yaml.ScalarNode):
        return Plain(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [Plain(item.value) if isinstance(item, yaml.ScalarNode) else {} for item in node.value]
    return {}


def read_environment(environ: Mapping[str, str], hints: Mapping[str, Any]) -> Layer:
    """``LATTE_<SECTION>_<KEY>`` variables; other variables that begin with ``LATTE_`` are not settings."""
    layer = Layer(hints)
    known = {"LATTE_" + key.replace(".", "_").upper(): key for key in [*hints, *RENAMED_KEYS] if "." in key}
    sections = tuple(f"LATTE_{section.upper()}_" for section in layer.sections)
    for name, value in environ.items():
        if name in known:
            layer.add(known[name], plain(value), f"environment {name}")
        elif name.startswith(sections):
            layer.problems.append(f"environment {name}: there is no such setting{nearest(name, known)}")
    return layer


def read_words(words: Iterable[str], hints: Mapping[str, Any]) -> Layer:
    """``a.b=value``, ``--a.b=value`` and ``--a.b value``. The last one of a key counts."""
    layer = Layer(hints)
    rest = iter(words)
    for word in rest:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals and not word.startswith("--"):
            layer.problems.append(
                f"command line: {short(word)} is not of the form key=value{nearest(key, hints)}"
            )
            continue
        layer.add(key, plain(value if equals else next(rest, "")), "command line")
    return layer


def read_value(raw: Any, hint: Any) -> Any:
    """What was written -> a value of type ``hint`` (of a union: null, bool, int, float, tuple, str in this order); ValueError if none."""
    kinds = kinds_of(hint)
    text = raw.strip() if isinstance(raw, str) else ""
    if types.NoneType in kinds and isinstance(raw, Plain) and text in NULLS:
        return None
    if bool in kinds and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    if NUMBER.fullmatch(text):
        if int in kinds and re.fullmatch(r"[-+]?\d+", text):
            return int(text)
        if int in kinds and float(text).is_integer() and abs(float(text)) < 2**53:
            return int(float(text))  # 1e6 steps
        if float in kinds and math.isfinite(float(text)):
            return float(text)
    pattern = next((kind for kind in kinds if get_origin(kind) is tuple), None)
    listed = isinstance(raw, Plain) and (text[:1] in ("[", "(") or "," in text)
    if pattern is not None and (listed or isinstance(raw, list)):
        items = [Plain(item) for item in text.strip("[]()").split(",") if item.strip()] if listed else raw
        each = get_args(pattern)
        each = each[:1] * len(items) if Ellipsis in each else each
        return tuple(read_value(item, kind) for item, kind in zip(items, each, strict=True))
    if str in kinds and isinstance(raw, str):
        return str(raw)
    if pattern is not None and get_args(pattern)[1:] == (Ellipsis,) and isinstance(raw, str):
        return (read_value(raw, get_args(pattern)[0]),)  # one item of a list of any length
    raise ValueError(raw)


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def in_words(hint: Any) -> str:
    """A type in words: 'a whole number, or null'."""
    return ", or ".join(WORDS.get(kind, "a list such as [32, 32]") for kind in kinds_of(hint))


def short(value: Any) -> str:
    """repr, cut in the middle when it is long."""
    text = (
        repr(str(value)) if isinstance(value, str) else ("{...}" if isinstance(value, dict) else str(value))
    )
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"
