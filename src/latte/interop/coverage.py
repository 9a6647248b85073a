# SPDX-License-Identifier: Apache-2.0
"""What a foreign layout's reader finds out about a file, and the report of what became of each of its tensors."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from latte.checks import InputError, require
from latte.model.denoiser import SIZES, DenoiserConfig
from latte.runtime import generator

LABELS = "label_embedding.table.weight"
SHOWN = 4  # names in a one-line message
TABLE_TOLERANCE = 2e-3  # tables saved in half precision differ from ours by 5e-4, those averaged over a training by less; others by 1
Config = DenoiserConfig


@dataclass(frozen=True)
class Understanding:
    """A file's configuration; ``names``: its tensors' names -> ours; ``dropped`` and ``strange``: its names -> why.

    ``dropped`` tensors are not needed, ``strange`` ones are as bad as missing.
    """

    config: Config
    names: dict[str, str]
    dropped: dict[str, str] = field(default_factory=dict)
    strange: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Coverage:
    """What became of every tensor. ``used``, ``unexpected``, ``mismatched`` and ``dropped`` are the file's names, ``missing`` ours.

    ``mismatched`` and ``dropped`` say why. str() is the report for people.
    """

    source: str
    layout: str
    used: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = (
            f"{len(self.used)} tensors used, {len(self.missing)} missing, {len(self.unexpected)} unexpected"
        )
        lines = [
            f"{self.source} ({self.layout}): {counts}, {len(self.mismatched)} mismatched, {len(self.dropped)} dropped"
        ]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  unexpected: {name}" for name in self.unexpected]
        lines += [f"  mismatched: {name} {why}" for name, why in self.mismatched.items()]
        lines += [f"  dropped: {name} {why}" for name, why in self.dropped.items()]
        return "\n".join(lines)

    def refuse(self, allow_missing: Sequence[str], allow_unexpected: Sequence[str], hint: str = "") -> None:
        """InputError in one line unless every missing, mismatched or unexpected tensor is allowed by a pattern such as 'blocks.*'."""
        missing, mismatched = (
            not_allowed(self.missing, allow_missing),
            not_allowed(self.mismatched, allow_missing),
        )
        unexpected = not_allowed(self.unexpected, allow_unexpected)
        faults = [
            f"{len(names)} tensors {what} ({some(names)})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        faults += [f"{name} {self.mismatched[name]}" for name in mismatched[:1]]
        faults += [f"{len(mismatched) - 1} more like it"] if len(mismatched) > 1 else []
        if faults:
            way_out = hint or "to load it in part, name them in allow_missing or allow_unexpected"
            raise InputError(f"{self.source} ({self.layout}) does not fit: {', '.join(faults)}; {way_out}")


def not_allowed(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that no pattern fits."""
    return [name for name in names if not any(fnmatchcase(name, allowed) for allowed in patterns)]


def some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def compare(
    source: str,
    layout: str,
    tensors: Mapping[str, Tensor],
    found: Understanding,
    wanted: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], Coverage]:
    """A file's ``tensors`` against the ``wanted`` ones of a model (by our names) -> (state dict under our names, report)."""
    state, used, unexpected, mismatched = {}, [], [], dict(found.strange)
    for name, tensor in tensors.items():
        ours = found.names.get(name)
        if name in found.dropped or name in mismatched:
            continue
        if ours is None or ours not in wanted:
            unexpected.append(name)
        elif tensor.shape != wanted[ours].shape:
            mismatched[name] = (
                f"has the shape {tuple(tensor.shape)} where {tuple(wanted[ours].shape)} belongs"
            )
        else:
            state[ours] = tensor
            used.append(name)
    there = set(state) | {found.names[name] for name in mismatched if name in found.names}
    missing = [name for name in wanted if name not in there]
    return state, Coverage(source, layout, used, missing, unexpected, mismatched, found.dropped)


def build(config: Config, seed: int = 0) -> Any:
    """The model of ``config``, its weights a function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "weights").initial_seed())
        return config.build()


def expected_tensors(config: Config) -> dict[str, Tensor]:
    """Names and shapes of the tensors that a model of ``config`` has, without storage."""
    with torch.device("meta"):
        return build(config).state_dict()


def relabelled(table: Tensor, before: Sequence[str], after: Sequence[str]) -> Tensor:
    """A label table (k+1|k d) whose rows stand for the classes ``before``, in the order ``after`` of these names; the null class stays."""
    return table[[*(list(before).index(name) for name in after), *range(len(after), len(table))]]


def shape_of(tensors: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """The shape of the tensor ``name``; InputError unless it is there with that many axes, none of them empty."""
    if name not in tensors:
        raise InputError(
            f"the file has no tensor {name}, which tells the model's size; give the complete file"
        )
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or 0 in shape:
        raise InputError(
            f"{name} has the shape {shape}, but {axes} axes belong there; the file is of another architecture"
        )
    return shape


def count_blocks(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow ``prefix`` in the names."""
    return len({match[1] for name in names if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))})


def dimensions(depth: int, width: int, heads: int | None) -> dict[str, Any]:
    """Keywords of a configuration: the size's name where Table 4 has these numbers, else the numbers themselves.

    The number of heads cannot be seen in the tensors: it is Table 4's for that width unless ``heads`` says otherwise.
    """
    known = {w: h for _, w, h in SIZES.values()}
    require(
        heads is None or heads >= 1,
        "heads",
        heads,
        "it counts attention heads",
        "give 1 or more, or leave it out",
    )
    if heads is None and width not in known:
        raise InputError(
            f"the file's model has a width of {width}, which is none of Table 4's ({', '.join(map(str, known))}), and the "
            "number of attention heads cannot be read from the tensors; give heads=..."
        )
    heads = known[width] if heads is None else heads
    for size, numbers in SIZES.items():
        if numbers == (depth, width, heads):
            return {"size": size}
    return {"depth": depth, "width": width, "heads": heads}


def learns_sigma(rows: int, patch: int, channels: int) -> bool:
    """Whether the last linear layer's ``rows`` hold noise and variance (True) or noise alone; InputError for any other number."""
    per_channel = rows / (patch * patch * channels)
    if per_channel not in (1, 2):
        raise InputError(
            f"the last layer gives {rows} numbers per token, but patches of {patch} x {patch} with {channels} channels need "
            f"{patch * patch * channels}, or twice that with learned sigma; the file is of another architecture"
        )
    return per_channel == 2


def against_table(stored: Tensor, computed: Tensor) -> tuple[bool, str]:
    """Whether a stored position table (1 n d) is the computed one (n d), and the finding in words."""
    if stored.shape[1:] != computed.shape:
        return (
            False,
            f"has the shape {tuple(stored.shape)} where (1, {computed.shape[0]}, {computed.shape[1]}) belongs",
        )
    difference = float((stored[0].double() - computed.double()).abs().max())
    if not difference <= TABLE_TOLERANCE:
        return (
            False,
            f"differs by {difference:.3g} from the table that is computed here: the model has learned another one",
        )
    return True, f"is computed here; the file's differs by {difference:.1g}"
