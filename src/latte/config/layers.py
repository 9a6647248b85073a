# SPDX-License-Identifier: Apache-2.0
"""Settings as they are written (YAML, environment, ``a.b=value`` words) -> entries, and text -> typed values.

Every value stays text until its field decides what it is, so the surprises of YAML (``1e-4`` a string,
``010`` eight, ``on`` a boolean, ``1:30`` ninety) cannot happen. Nothing is built from YAML: only mappings,
sequences and scalars are read, tags have no effect, and size, depth and number of values are bounded
beforehand.
"""

import logging
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from latte.checkpoint.record import RENAMED_KEYS
from latte.checks import InputError, check, nearest

LOG = logging.getLogger(__name__)

MAX_BYTES = 1 << 18  # a configuration is a page or two
MAX_DEPTH = 8
MAX_NODES = 20_000
MAX_PROBLEMS = 20  # reported one by one; of the rest only the number is
NULLS = {"null", "Null", "NULL", "~", ""}
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    types.NoneType: "null",
}
NUMBER = re.compile(r"[-+]?(\d{1,19}(\.\d{0,24})?|\.\d{1,24})(e[-+]?\d{1,3})?", re.ASCII | re.IGNORECASE)
MAX_INT = 2**63 - 1
BASE = "base"  # the key of a YAML file that names what it inherits from
HOW = "give 'section:' lines with 'key: value' lines under them"
OTHER_NAMES = {  # what other programs call a setting
    "batch_size": "train.global_batch",
    "learning_rate": "train.lr",
    "precision": "train.dtype",
    "grad_clip": "train.clip_norm",
    "max_grad_norm": "train.clip_norm",
    "num_workers": "data.workers",
    "data.num_frames": "data.frames",
    "data.size": "data.resolution",
    "data.path": "data.root",
    "layers": "model.depth",
    "num_layers": "model.depth",
    "hidden_size": "model.width",
}
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, 10 times faster, where PyYAML has it


class Plain(str):
    """Text written without quotes: a number, a boolean, null or a name, as its field decides."""


def plain(word: str) -> Plain:
    """Return a word of a command line or an environment variable; Python's None means null there."""
    if word in ("None", "none"):
        return Plain("null")
    return Plain(word)


@dataclass(frozen=True)
class Entry:
    """One value as it was written (Plain, str, list, or dict for what no setting can be) and its place."""

    raw: Any
    origin: str


@dataclass
class Layer:
    """The settings of one source by dotted key, and the problems found in it.

    ``hints`` holds every valid key and its type. Keys of RENAMED_KEYS are read, with a notice in the log.
    """

    hints: Mapping[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    num_unlisted: int = 0

    @property
    def sections(self) -> set[str]:
        """The names before the dots."""
        return {key.partition(".")[0] for key in self.hints if "." in key}

    def add(self, key: str, raw: Any, origin: str) -> None:
        """Take a setting, or note that the name is unknown."""
        if key in RENAMED_KEYS:
            LOG.warning("%s: %s is now called %s", origin, key, RENAMED_KEYS[key])
            key = RENAMED_KEYS[key]
        if key in self.hints:
            self.entries[key] = Entry(raw, origin)
        else:
            self.refuse(
                lambda: f"{origin}: {short(key)[1:-1]} = {short(raw)}: unknown setting{self._hint(key)}"
            )

    def refuse(self, message: Callable[[], str]) -> None:
        """Note a problem, in full while there are few."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(message())
        else:
            self.num_unlisted += 1

    def all_problems(self) -> list[str]:
        """Return the problems, and a line about those that are not listed."""
        if not self.num_unlisted:
            return self.problems
        return [*self.problems, f"{self.num_unlisted} more problems of this kind"]

    def _hint(self, key: str) -> str:
        leaves = {known.rpartition(".")[2]: known for known in self.hints}
        leaf = key.rpartition(".")[2]
        elsewhere = OTHER_NAMES.get(key) or leaves.get(leaf) or OTHER_NAMES.get(leaf)
        if elsewhere in self.hints:
            return f"; did you mean {elsewhere!r}?"
        return nearest(key[:100], self.hints)


def read_yaml(path: Path, name: str, hints: Mapping[str, Any]) -> Layer:
    """Read a YAML file of sections, called ``name`` in messages; InputError when it is no such file."""
    check(
        path.stat().st_size <= MAX_BYTES,
        f"{name} is larger than {MAX_BYTES:,} bytes; give a YAML file of settings",
    )
    try:
        text = path.read_text("utf-8")
        _check_bounds(text, name)
        root = yaml.compose(text, Loader=LOADER)
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}); {HOW}") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise InputError(f"{place} is not YAML: {reason}; {HOW}") from None
    layer = Layer(hints)
    if root is not None:
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{name} holds no settings; {HOW}")
        _walk(root, "", name, layer)
    return layer


def read_inheriting(
    path: Path, name: str, hints: Mapping[str, Any], recipes: Mapping[str, Path], seen: tuple[Path, ...] = ()
) -> Layer:
    """Read a YAML file whose key ``base`` may name a recipe or a file beside it, whose settings it changes.

    InputError for a base that does not exist or that has this file as its own base.
    """
    layer = read_yaml(path, name, {**hints, BASE: str})
    layer.hints = hints
    given = layer.entries.pop(BASE, None)
    if given is None:
        return layer
    base = recipes.get(str(given.raw), path.parent / str(given.raw))
    check(
        base.is_file(),
        f"{given.origin}: base is {short(given.raw)}, which is no recipe and no YAML file beside this one; "
        f"recipes: {', '.join(recipes)}",
    )
    seen = (*seen, path.resolve())
    check(
        base.resolve() not in seen,
        f"{given.origin}: base is {short(given.raw)}, which inherits from this file; name another base",
    )
    parent = read_inheriting(base, f"base {given.raw}", hints, recipes, seen)
    layer.entries = parent.entries | layer.entries
    layer.problems = parent.problems + layer.problems
    layer.num_unlisted += parent.num_unlisted
    return layer


def _check_bounds(text: str, name: str) -> None:
    """Raise InputError for YAML that is too deep or holds too many values, before it is composed."""
    depth = num_nodes = 0
    for event in yaml.parse(text, Loader=LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        num_nodes += isinstance(event, yaml.NodeEvent)
        line = event.start_mark.line + 1
        check(
            depth <= MAX_DEPTH, f"{name}:{line} is not a file of settings: nested {depth} levels deep; {HOW}"
        )
        check(
            num_nodes <= MAX_NODES,
            f"{name}:{line} is not a file of settings: over {MAX_NODES:,} values; {HOW}",
        )


def _walk(node: yaml.MappingNode, prefix: str, name: str, layer: Layer) -> None:
    """Add the settings of ``node``. Sections are not nested, so this goes two levels deep at most."""
    for key_node, value in node.value:
        key = prefix + (key_node.value if isinstance(key_node, yaml.ScalarNode) else "?")
        origin = f"{name}:{key_node.start_mark.line + 1}"
        first = layer.entries.get(RENAMED_KEYS.get(key, key))
        if first is not None:
            layer.refuse(
                lambda key=key, first=first, origin=origin: (
                    f"{origin}: {key} is given again (first in {first.origin}); keep one of the two"
                )
            )
        elif key not in layer.sections:
            layer.add(key, _raw(value), origin)
        elif isinstance(value, yaml.MappingNode):
            _walk(value, key + ".", name, layer)
        elif not (isinstance(value, yaml.ScalarNode) and value.value in NULLS):
            layer.refuse(
                lambda key=key, value=value, origin=origin: (
                    f"{origin}: {key} is a section, not {short(_raw(value))}; put its keys under it, indented"
                )
            )


def _raw(node: yaml.Node) -> Any:
    """Return a node as text, a list of texts, or an empty dict for anything deeper."""
    if isinstance(node, yaml.ScalarNode):
        if node.style in ("'", '"', "|", ">"):
            return node.value
        return Plain(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_raw_item(item) for item in node.value]
    return {}


def _raw_item(node: yaml.Node) -> Any:
    """Return an item of a list as text, a mapping of texts as a dict of them, or an empty dict."""
    if isinstance(node, yaml.ScalarNode):
        return Plain(node.value)
    if isinstance(node, yaml.MappingNode):
        return {key.value: _raw(value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    return {}


def read_environment(environ: Mapping[str, str], hints: Mapping[str, Any]) -> Layer:
    """Read ``LATTE_<SECTION>_<KEY>`` variables; others that begin with ``LATTE_`` are not settings."""
    layer = Layer(hints)
    known = {"LATTE_" + key.replace(".", "_").upper(): key for key in (*hints, *RENAMED_KEYS) if "." in key}
    sections = tuple(f"LATTE_{section.upper()}_" for section in layer.sections)
    for name, value in environ.items():
        if name in known:
            layer.add(known[name], plain(value), f"environment {name}")
        elif name.startswith(sections):
            layer.refuse(lambda name=name: f"environment {name}: unknown setting{nearest(name[:100], known)}")
    return layer


def read_words(words: Iterable[str], hints: Mapping[str, Any]) -> Layer:
    """Read ``a.b=value``, ``--a.b=value`` and ``--a.b value``. The last one of a key is used."""
    layer = Layer(hints)
    rest = iter(words)
    for word in rest:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals and word.startswith("--"):
            value = next(rest, "")
        if equals or word.startswith("--"):
            layer.add(key, plain(value), "command line")
        else:
            hint = nearest(key[:100], hints)
            layer.refuse(lambda word=word, hint=hint: f"command line: {short(word)} is not key=value{hint}")
    return layer


def read_value(raw: Any, hint: Any) -> Any:
    """Return what was written as a value of type ``hint``; ValueError if it is none.

    Of a union the types are tried in the order null, bool, int, float, tuple, str.
    """
    kinds = kinds_of(hint)
    text = raw.strip() if isinstance(raw, str) else ""
    if types.NoneType in kinds and isinstance(raw, Plain) and text in NULLS:
        return None
    if bool in kinds and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    if (number := _number(text, kinds)) is not None:
        return number
    pattern = next((kind for kind in kinds if get_origin(kind) is tuple), None)
    if pattern is not None and is_dataclass(get_args(pattern)[0]):
        return _parts(raw, get_args(pattern)[0])
    listed = isinstance(raw, Plain) and (text[:1] in ("[", "(") or "," in text)
    if pattern is not None and (listed or isinstance(raw, list)):
        items = raw
        if listed:
            items = [Plain(item) for item in text.strip("[]()").split(",") if item.strip()]
        each = get_args(pattern)
        if Ellipsis in each:
            each = each[:1] * len(items)
        return tuple(read_value(item, kind) for item, kind in zip(items, each, strict=True))
    if str in kinds and isinstance(raw, str):
        return str(raw)
    if pattern is not None and get_args(pattern)[1:] == (Ellipsis,) and isinstance(raw, str):
        return (read_value(raw, get_args(pattern)[0]),)  # one item of a list of any length
    raise ValueError(raw)


def unusable(value: Any) -> str:
    """Return why a text cannot be a name, a path or part of a file, '' for every other value."""
    texts = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, str)]
    if any("\0" in text for text in texts):
        return "holds a NUL character"
    if any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        return "is not valid UTF-8"
    return ""


def _parts(raw: Any, kind: Any) -> tuple[Any, ...]:
    """Return a list of mappings as values of the dataclass ``kind``; ValueError if it is none, InputError for
    a key or a value that does not fit.
    """
    if isinstance(raw, Plain):
        try:
            _check_bounds(str(raw), "the list")
            raw = _raw(yaml.compose(str(raw), Loader=LOADER))
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(raw) from error
    if not isinstance(raw, list) or not all(isinstance(item, dict) and item for item in raw):
        raise ValueError(raw)
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]
    parts = []
    for number, item in enumerate(raw, 1):
        values = {}
        for key, text in item.items():
            check(key in known, f"entry {number}: unknown key {short(key)}{nearest(key[:100], known)}")
            try:
                values[key] = read_value(text, hints[key])
            except ValueError:
                expected = type_name(hints[key])
                raise InputError(f"entry {number}: {key} must be {expected}, got {short(text)}") from None
            reason = unusable(values[key])
            check(not reason, f"entry {number}: {key} {reason}; give another one")
        parts.append(kind(**values))
    return tuple(parts)


def _number(text: str, kinds: tuple[Any, ...]) -> int | float | None:
    """Return ``text`` as an int or a float, whichever ``kinds`` allows, None if it is neither."""
    if not NUMBER.fullmatch(text):
        return None
    if int in kinds:
        if re.fullmatch(r"[-+]?\d+", text) and abs(int(text)) <= MAX_INT:
            return int(text)
        if float(text).is_integer() and abs(float(text)) < 2**53:
            return int(float(text))  # 1e6 steps
    if float in kinds and math.isfinite(float(text)):
        return float(text)
    return None


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    if get_origin(hint) in (Union, types.UnionType):
        return get_args(hint)
    return (hint,)


def type_name(hint: Any) -> str:
    """Return a type as people call it: 'a whole number, or null'."""
    names = []
    for kind in kinds_of(hint):
        example = "[32, 32]"
        if get_args(kind) and is_dataclass(get_args(kind)[0]):
            example = "[{root: A, weight: 3}, {root: B}]"
        names.append(TYPE_NAMES.get(kind, f"a list such as {example}"))
    return ", or ".join(names)


def short(value: Any) -> str:
    """Return the repr of ``value``, cut in the middle when it is long."""
    if isinstance(value, str):
        text = repr(str(value)[:1000])
    elif isinstance(value, dict):
        text = "{...}"
    else:
        text = str(value)[:10_000]
    if len(text) <= 80:
        return text
    return f"{text[:60]}...{text[-10:]}"
