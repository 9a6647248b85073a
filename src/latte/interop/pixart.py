# SPDX-License-Identifier: Apache-2.0
"""Starting text-to-video from PixArt-alpha, an image model: every one of its tensors has its place in LatteText.

The temporal blocks are new. What they add starts at zero, and the temporal table behind a gate that starts at zero, so at step 0 the
model is PixArt, frame by frame. Training opens the gate to exactly 1, and then the model is one of the released LatteT2V's shape. Without
the gate (``gated_time=False``) the table moves every frame from the start, which a run refuses.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from latte.checks import InputError, require
from latte.interop import diffusers
from latte.interop.coverage import Coverage, Understanding, build, compare, some
from latte.interop.key_maps import BRANCHES, unwrap
from latte.interop.readers import fetch, read_card, read_tensors
from latte.model.text import LatteText

LOG = logging.getLogger(__name__)
NEW = ("time_blocks.*", "time_gate")
HINT = (
    "it is an image model: start a run from it with train.init and text.gated_time=true, or allow what is missing, 'time_*', "
    "which is then new and silent"
)
WAYS_OUT = {
    "caption_channels": "give the text encoder that it was trained with",
    "latent_channels": "give its autoencoder",
    "patch_size": "make them the same",
    "learn_sigma": "make them the same",
}
MICRO = "adaln_single.emb.resolution_embedder."


def recognise(names: Mapping[str, Any]) -> bool:
    """Does a file with these names hold a PixArt transformer?"""
    return (
        "transformer_blocks.0.scale_shift_table" in names
        and "adaln_single.linear.weight" in names
        and not diffusers.recognise(names)
    )


def understand(
    tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
) -> Understanding:
    """As LatteT2V's, with a gate; InputError for the models of 1024 pixels, which are told the picture's size."""
    if any(name.startswith(MICRO) for name in tensors):
        raise InputError(
            "this PixArt is conditioned on resolution and aspect ratio, which a clip has no place for; "
            "give the model of 512 pixels or less"
        )
    found = diffusers.understand(tensors, card, heads)
    return replace(found, config=replace(found.config, gated_time=True))


def from_pixart(
    source: str | Path, num_frames: int = 16, gated_time: bool = True, seed: int = 0, heads: int | None = None
) -> tuple[LatteText, Coverage]:
    """A LatteText of PixArt's size, started from the folder, file or hub id ``source`` -> (model, report, which is logged, too).

    The new weights are a function of ``seed``. InputError as for ``init_from_pixart``.
    """
    tensors, found = read_pixart(source, heads)
    config = replace(found.config, num_frames=num_frames, gated_time=gated_time)
    model = build(config, seed)
    return model, fill(model, source, tensors, found)


def init_from_pixart(model: LatteText, source: str | Path) -> Coverage:
    """Fill ``model`` from the PixArt at ``source`` (folder, file or hub id) -> the report, which is logged, too.

    The temporal blocks keep fresh weights but add nothing yet, and are ``missing`` in the report. InputError for another width, depth or
    other heads (with both numbers), another text encoder, and files that are not PixArt-alpha.
    """
    return fill(model, source, *read_pixart(source, model.config.dimensions[2]))


def read_pixart(source: str | Path, heads: int | None) -> tuple[dict[str, Tensor], Understanding]:
    """(tensors, what they are) of a PixArt; ``heads`` counts where config.json says nothing."""
    path = fetch(source)
    tensors, card = unwrap(read_tensors(path, BRANCHES)[0]), read_card(path) or {}
    if not recognise(tensors):
        raise InputError(
            f"weights {source} are not PixArt-alpha's (its tensors: {some(sorted(tensors))}); give its transformer folder"
        )
    return tensors, understand(tensors, card, None if "num_attention_heads" in card else heads)


def fill(model: LatteText, source: str | Path, tensors: dict[str, Tensor], found: Understanding) -> Coverage:
    """Load, and silence what is new."""
    for what, ours, theirs in zip(
        ("depth", "width", "heads"), model.config.dimensions, found.config.dimensions, strict=True
    ):
        require(
            ours == theirs,
            f"model.{what}",
            ours,
            f"the PixArt at {source} has {theirs}",
            f"set model.{what}={theirs}",
        )
    for what, way_out in WAYS_OUT.items():
        ours, theirs = getattr(model.config, what), getattr(found.config, what)
        require(ours == theirs, f"model.{what}", ours, f"the PixArt at {source} has {theirs}", way_out)
    grids = model.config.table_grid, found.config.table_grid
    require(
        grids[0] == grids[1],
        "the grid of positions",
        grids[0],
        f"the PixArt at {source} has {grids[1]}",
        f"set table_size={grids[1][0]}, in a run text.table_size",
    )
    state, report = compare(str(source), "PixArt-alpha", tensors, found, model.state_dict())
    LOG.info("%s", report)
    report.refuse(allow_missing=NEW, allow_unexpected=())
    model.load_state_dict(state, strict=False)
    model.zero_time_blocks()
    return report
