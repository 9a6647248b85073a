# SPDX-License-Identifier: Apache-2.0
"""The one door through which weights come in: file, folder or hub id -> configuration, tensors under our names, and a report.

The layout is told by the tensors' names, sizes by their shapes. Every load leaves its report in the log, and a load that does not use
every tensor is refused unless the exceptions are named.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from latte.checkpoint.run import tensors_sha256
from latte.checks import InputError, require
from latte.interop import diffusers, dit, official, pixart
from latte.interop.coverage import Config, Coverage, Understanding, build, compare, some, wanted_by
from latte.interop.key_maps import BRANCHES, unwrap
from latte.interop.readers import fetch, read_card, read_tensors
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig

__all__ = ["LAYOUTS", "Layout", "Loaded", "fetch", "load_foreign", "read_tensors"]
LOG = logging.getLogger(__name__)
Understand = Callable[[Mapping[str, Tensor], Mapping[str, Any] | None, int | None], Understanding]


@dataclass(frozen=True)
class Layout:
    """``recognise(names)`` tells whether a file is of this layout, ``understand(tensors, config.json, heads)`` what is in it.

    ``hint`` is what to do about a file that holds a part of a model only, ``silence(model)`` keeps what it lacks from having a say.
    """

    recognise: Callable[[Mapping[str, Any]], bool]
    understand: Understand
    hint: str = ""
    silence: Callable[[Any], None] = lambda model: None


@dataclass(frozen=True)
class Loaded:
    """Foreign weights under our names, in the precision they were stored in. ``facts`` is what the file says beside its tensors.

    ``card`` is the config.json beside it, empty when there is none.
    """

    layout: str
    config: Config
    state_dict: dict[str, Tensor]
    report: Coverage
    facts: dict[str, str]
    card: dict[str, Any]

    def model(self, dtype: torch.dtype = torch.float32) -> Latte | LatteText:
        """The model with these weights, for inference (no gradients), in ``dtype``; allowed gaps hold fresh weights."""
        with torch.device("cpu" if self.report.missing else "meta"):
            model = build(self.config)
        model.load_state_dict(self.state_dict, strict=False, assign=True)
        if self.report.missing:
            LAYOUTS[self.layout].silence(model)
        return model.to(dtype).requires_grad_(False).eval()


def load_foreign(
    source: str | Path,
    heads: int | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Loaded:
    """Weights of any layout in LAYOUTS -> Loaded; the report is logged.

    ``heads`` is needed for a width that is not in Table 4. ``allow_missing`` and ``allow_unexpected`` are patterns of names, such as
    'time_blocks.*', that may be missing (or of another shape) and left over. InputError, in one line, for everything else that does
    not fit, for files that hold code, are cut short or mixed, and for unknown layouts.
    """
    path = fetch(source)
    stored, facts = read_tensors(path, BRANCHES)
    tensors = unwrap(stored)
    name = recognise(tensors, source)
    layout, card = LAYOUTS[name], read_card(path)
    try:
        found = layout.understand(tensors, card, heads)
    except InputError as error:
        raise InputError(f"weights {source} ({name}): {error}") from None
    state, report = compare(str(source), name, tensors, found, wanted_by(found.config))
    LOG.info("%s", report)
    report.refuse(allow_missing, allow_unexpected, layout.hint)
    wanted = (card or {}).get("weights_sha256")
    if wanted is not None and not (report.missing or report.unexpected or report.mismatched):
        same = tensors_sha256(state) == wanted
        rule = "its weights have another hash: they are of another model or altered"
        require(
            same,
            f"weights_sha256 in config.json of {source}",
            str(wanted)[:16],
            rule,
            "fetch the folder again",
        )
    return Loaded(name, found.config, state, report, facts, card or {})


def layout_of(source: str | Path) -> str:
    """Which of LAYOUTS a file, folder or hub id is of; InputError for none."""
    return recognise(unwrap(read_tensors(fetch(source), BRANCHES)[0]), source)


def recognise(tensors: Mapping[str, Tensor], source: str | Path) -> str:
    """The layout of tensors with these names; InputError for none of LAYOUTS."""
    for name, layout in LAYOUTS.items():
        if layout.recognise(tensors):
            return name
    raise InputError(
        f"weights {source} hold no model that is known here ({', '.join(LAYOUTS)}): its tensors are called "
        f"{some(sorted(tensors))}; give a file of one of these"
    )


def understand_ours(kind: type[ModelConfig] | type[TextConfig]) -> Understand:
    """Our own folder: config.json says it all."""

    def understand(
        tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
    ) -> Understanding:
        if card is None:
            raise InputError("there is no config.json beside the file; give the folder that latte wrote")
        keys = {item.name: card[item.name] for item in fields(kind) if item.name in card}
        try:
            return Understanding(TypeAdapter(kind).validate_python(keys), {name: name for name in tensors})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InputError(
                f"config.json{': ' + where if where else ''}: {first['msg']}; give the folder that latte wrote"
            ) from None

    return understand


LAYOUTS = {
    "Latte": Layout(
        lambda names: (
            "patch.proj.weight" in names
            and "final_linear.weight" in names
            and "space_blocks.0.table" not in names
        ),
        understand_ours(ModelConfig),
    ),
    "LatteText": Layout(lambda names: "space_blocks.0.table" in names, understand_ours(TextConfig)),
    "LatteT2V": Layout(diffusers.recognise, diffusers.understand),
    "PixArt-alpha": Layout(pixart.recognise, pixart.understand, pixart.HINT, LatteText.still_time),
    "DiT": Layout(dit.recognise, dit.understand),
    "released Latte": Layout(official.recognise, official.understand),
}
