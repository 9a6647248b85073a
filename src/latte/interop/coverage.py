# SPDX-License-Identifier: Apache-2.0
"""Names of tensors: two-way rename tables, what the reader of a layout finds in a file, and the report of
what became of each tensor.

A row of a table is (external name, our name) with the same placeholders on both sides: ``{i}`` is a number,
``{even}`` and ``{odd}`` are such numbers, ``{w}`` is weight or bias. One function reads a table in both
directions, so import and export cannot disagree.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from latte.checks import InputError, check, choose, printable
from latte.model.config import SIZES, DenoiserConfig
from latte.runtime import generator
from latte.tensors import without_memory

LABELS = "label_embedding.table.weight"
SHOWN = 4  # names in a one-line message
TABLE_TOLERANCE = 2e-3  # half precision differs from our table by 5e-4, EMA by less, another table by 1
Config = DenoiserConfig


@dataclass(frozen=True)
class Understanding:
    """The configuration of a file; ``names`` translates its names to ours.

    ``dropped`` tensors are not needed, ``strange`` ones are as bad as missing; both give the reason by name.
    """

    config: Config
    names: dict[str, str]
    dropped: dict[str, str] = field(default_factory=dict)
    strange: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Coverage:
    """What became of every tensor; str() is the report.

    ``used``, ``unexpected``, ``mismatched`` and ``dropped`` are names of the file, ``missing`` are ours.
    ``mismatched`` and ``dropped`` give the reason.
    """

    source: str
    layout: str
    used: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        source = printable(self.source)
        used = (
            f"{len(self.used)} tensors used, {len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )
        rest = f"{len(self.mismatched)} mismatched, {len(self.dropped)} dropped"
        lines = [f"{source} ({self.layout}): {used}, {rest}"]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  unexpected: {printable(name)}" for name in self.unexpected]
        lines += [f"  mismatched: {printable(name)} {reason}" for name, reason in self.mismatched.items()]
        lines += [f"  dropped: {printable(name)} {reason}" for name, reason in self.dropped.items()]
        return "\n".join(lines)

    def refuse(self, allow_missing: Sequence[str], allow_unexpected: Sequence[str], hint: str = "") -> None:
        """Raise InputError, in one line, for a tensor that no pattern such as 'blocks.*' allows to differ.

        ``hint`` replaces the advice to allow them.
        """
        missing = not_allowed(self.missing, allow_missing)
        mismatched = not_allowed(self.mismatched, allow_missing)
        unexpected = not_allowed(self.unexpected, allow_unexpected)
        faults = []
        if missing:
            faults.append(f"{len(missing)} tensors missing ({some(missing)})")
        if unexpected:
            faults.append(f"{len(unexpected)} tensors unexpected ({some(unexpected)})")
        if mismatched:
            faults.append(f"{printable(mismatched[0])} {self.mismatched[mismatched[0]]}")
        if len(mismatched) > 1:
            faults.append(f"{len(mismatched) - 1} more like it")
        if faults:
            advice = hint or "to load a part of it, name them in allow_missing or allow_unexpected"
            source = printable(self.source)
            raise InputError(f"{source} ({self.layout}) does not match: {', '.join(faults)}; {advice}")


def not_allowed(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match no pattern."""
    return [name for name in names if not any(fnmatchcase(name, allowed) for allowed in patterns)]


def some(names: Sequence[str]) -> str:
    """Return the first few names, safe to print."""
    shown = [printable(name) for name in names[:SHOWN]]
    if len(names) > SHOWN:
        shown.append("...")
    return ", ".join(shown)


def compare(
    source: str,
    layout: str,
    tensors: Mapping[str, Tensor],
    found: Understanding,
    expected: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Coverage]:
    """Compare the ``tensors`` of a file with the ``expected`` ones of a model, which have our names.

    Returns (state dict under our names, report).
    """
    state: dict[str, Tensor] = {}
    used: list[str] = []
    unexpected: list[str] = []
    mismatched = dict(found.strange)
    for name, tensor in tensors.items():
        ours = found.names.get(name)
        if name in found.dropped or name in mismatched:
            continue
        if ours is None or ours not in expected:
            unexpected.append(name)
        elif tensor.shape != expected[ours].shape:
            mismatched[name] = f"has shape {tuple(tensor.shape)} instead of {tuple(expected[ours].shape)}"
        elif not tensor.is_floating_point():
            mismatched[name] = f"has dtype {str(tensor.dtype)[6:]} instead of floating point"
        else:
            state[ours] = tensor
            used.append(name)
    there = set(state) | {found.names[name] for name in mismatched if name in found.names}
    missing = [name for name in expected if name not in there]
    return state, Coverage(source, layout, used, missing, unexpected, mismatched, found.dropped)


def build(config: Config, seed: int = 0) -> Any:
    """Return a fresh model of ``config``; its weights depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        return config.build()


def expected_tensors(config: Config) -> dict[str, Tensor]:
    """Return the state dict of a model of ``config`` on the meta device: names and shapes."""
    with without_memory():
        return build(config).state_dict()


def relabelled(table: Tensor, before: Sequence[str], after: Sequence[str]) -> Tensor:
    """Reorder the rows of a label table (k+1|k d) from the classes ``before`` to ``after``; the null class
    stays last.
    """
    rows = [list(before).index(name) for name in after]
    return table[[*rows, *range(len(after), len(table))]]  # (k+1|k d)


def shape_of(tensors: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Return the shape of tensor ``name``; InputError unless it exists with that many axes, none of them
    empty.
    """
    if name not in tensors:
        raise InputError(
            f"the file has no tensor {name}, from which the model's size follows; use the complete file"
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise InputError(
            f"{name} has shape {shape} instead of {axes} axes; the file holds another architecture"
        )
    return shape


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """Return how many different numbers follow ``prefix`` in the names."""
    return len({match[1] for name in names if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})


def dimensions(depth: int, width: int, heads: int | None) -> dict[str, Any]:
    """Return keywords of a configuration: the name of the size if Table 4 has these numbers, else the
    numbers.

    The number of heads does not follow from the tensors: without ``heads`` it is that of Table 4 for this
    width.
    """
    known = {w: h for _, w, h in SIZES.values()}
    check(heads is None or heads >= 1, f"heads must be at least 1, got {heads}")
    if heads is None and width not in known:
        raise InputError(
            f"the model has width {width}, which is not in Table 4 ({', '.join(map(str, known))}), and the "
            "number of "
            "attention heads does not follow from the tensors; give heads=..."
        )
    if heads is None:
        heads = known[width]
    for size, numbers in SIZES.items():
        if numbers == (depth, width, heads):
            return {"size": size}
    return {"depth": depth, "width": width, "heads": heads}


def learns_sigma(rows: int, patch: int, channels: int) -> bool:
    """Return whether the ``rows`` of the last linear layer hold noise and variance (True) or noise alone
    (False).

    InputError for any other number.
    """
    per_channel = rows / (patch * patch * channels)
    if per_channel not in (1, 2):
        raise InputError(
            f"the last layer has {rows} rows, but patches of {patch} x {patch} with {channels} channels need "
            f"{patch * patch * channels}, or twice that with learned sigma; the file holds another "
            "architecture"
        )
    return per_channel == 2


def compare_table(stored: Tensor, computed: Tensor) -> tuple[bool, str]:
    """Return whether a stored position table (1 n d) equals the computed one (n d), and the result as
    text.
    """
    if stored.shape[1:] != computed.shape:
        return (
            False,
            f"has shape {tuple(stored.shape)} instead of (1, {computed.shape[0]}, {computed.shape[1]})",
        )
    difference = float((stored[0].double() - computed.double()).abs().max())
    if not difference <= TABLE_TOLERANCE:
        return False, f"differs by {difference:.3g} from the computed table: the model learned another one"
    return True, f"is computed here; the file's differs by {difference:.1g}"


Table = Sequence[tuple[str, str]]
PLACEHOLDERS = {"i": r"\d{1,6}", "even": r"\d{0,5}[02468]", "odd": r"\d{0,5}[13579]", "w": "weight|bias"}
DIRECTIONS = {"to_ours": (0, 1), "to_external": (1, 0)}
BRANCHES = ("ema", "model", "state_dict")  # keys under which training files store weights, the best first
PREFIXES = ("_orig_mod.", "module.")  # of compiled and of distributed models


def translate(names: Iterable[str], table: Table, direction: str) -> dict[str, str]:
    """Return name -> translation ('to_ours' or 'to_external') of every name that matches a row of
    ``table``.
    """
    source, target = choose("direction", direction, DIRECTIONS)
    found = {}
    for name in names:
        for row in table:
            match = pattern(row[source]).fullmatch(name)
            if match:
                found[name] = row[target].format(**match.groupdict())
                break
    return found


@lru_cache(maxsize=1024)
def pattern(row: str) -> re.Pattern[str]:
    """Return one side of a row as a regular expression with a group per placeholder."""
    parts = re.split(r"\{(\w+)\}", row)
    sides = [
        re.escape(part) if k % 2 == 0 else f"(?P<{part}>{PLACEHOLDERS[part]})" for k, part in enumerate(parts)
    ]
    return re.compile("".join(sides))


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the wrapper of a training file: ``ema``, else ``model``, else all; and prefixes of
    torch.compile and DDP.

    InputError when two tensors get the same name.
    """
    for branch in BRANCHES:
        inner = {
            name.removeprefix(f"{branch}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{branch}.")
        }
        if inner:
            tensors = inner
            break
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = re.sub(rf"^({'|'.join(re.escape(prefix) for prefix in PREFIXES)})+", "", name)
        if short in found:
            raise InputError(
                f"two tensors of the file are both called {short} without the prefixes "
                f"{' and '.join(PREFIXES)}; save it again"
            )
        found[short] = tensor
    return found
