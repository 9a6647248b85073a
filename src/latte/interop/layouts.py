# SPDX-License-Identifier: Apache-2.0
"""The layouts of weight files that are known, recognised by the names of their tensors.

To add a layout: a file with ``recognise`` and ``understand``, and one entry in LAYOUTS.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from latte.checks import InputError
from latte.interop import diffusers, dit, official, pixart
from latte.interop.coverage import Understanding, some
from latte.model.latte import ModelConfig
from latte.model.pretrained import parse_config
from latte.model.text import LatteText, TextConfig

Understand = Callable[[Mapping[str, Tensor], Mapping[str, Any] | None, int | None], Understanding]


@dataclass(frozen=True)
class Layout:
    """One layout of weight files.

    ``recognise(names)``: does a file with these tensors have this layout? ``understand(tensors,
    config.json, heads)`` returns its configuration and the translation of its names. ``hint`` states what to
    do about a file that holds only a part of a model; ``silence(model)`` makes the missing part contribute
    nothing.
    """

    recognise: Callable[[Mapping[str, Any]], bool]
    understand: Understand
    hint: str = ""
    silence: Callable[[Any], None] = lambda model: None


def recognise(names: Iterable[str], source: str | Path) -> str:
    """Return the layout of a file with these tensor names; raise InputError when none of LAYOUTS fits."""
    known = dict.fromkeys(names)
    for name, layout in LAYOUTS.items():
        if layout.recognise(known):
            return name
    raise InputError(
        f"weights {source} have an unknown layout: the first tensors are {some(sorted(known))}; "
        f"use a checkpoint of {', '.join(LAYOUTS)}"
    )


def understand_ours(kind: type[ModelConfig] | type[TextConfig]) -> Understand:
    """Return the ``understand`` of our own layout, where config.json holds the whole configuration."""

    def understand(
        tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
    ) -> Understanding:
        if card is None:
            raise InputError("there is no config.json beside the file; use the complete weights folder")
        return Understanding(parse_config(kind, card, Path("config.json")), {name: name for name in tensors})

    return understand


def is_latte(names: Mapping[str, Any]) -> bool:
    """Does a file with these names hold our own Latte?"""
    return (
        "patch.proj.weight" in names
        and "final_linear.weight" in names
        and "space_blocks.0.table" not in names
    )


LAYOUTS = {
    "Latte": Layout(is_latte, understand_ours(ModelConfig)),
    "LatteText": Layout(lambda names: "space_blocks.0.table" in names, understand_ours(TextConfig)),
    "LatteT2V": Layout(diffusers.recognise, diffusers.understand),
    "PixArt-alpha": Layout(pixart.recognise, pixart.understand, pixart.HINT, LatteText.zero_time_blocks),
    "DiT": Layout(dit.recognise, dit.understand),
    "released Latte": Layout(official.recognise, official.understand),
}
