# SPDX-License-Identifier: Apache-2.0
"""Two-way rename tables: a row is (external name, our name) with the same placeholders on both sides.

``{i}`` is a number, ``{even}`` and ``{odd}`` are such numbers, ``{w}`` is weight or bias. One function
reads a table in both directions, so import and export cannot disagree.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from torch import Tensor

from latte.checks import InputError, choose

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
