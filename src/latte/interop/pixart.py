# SPDX-License-Identifier: Apache-2.0
"""Starting text-to-video from PixArt-alpha, an image model: each of its tensors has a place in LatteText.

The temporal blocks are new. Their output starts at zero, and the temporal table is behind a gate that
starts at zero, so at step 0 the model is PixArt, frame by frame. Training opens the gate to exactly 1; the
model then has the shape of the released LatteT2V. Without the gate (``gated_time=False``) the table
disturbs every frame from the start, which a run refuses.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from latte.checks import InputError, check
from latte.interop import diffusers
from latte.interop.coverage import BRANCHES, Coverage, Understanding, build, compare, some, unwrap
from latte.interop.readers import fetch, read_card, read_tensors
from latte.model.text import LatteText

LOG = logging.getLogger(__name__)
NEW = ("time_blocks.*", "time_gate")
HINT = (
    "it is an image model: start a run from it with train.init and text.gated_time=true, or allow the "
    "missing 'time_*', "
    "which is then new and adds nothing"
)
ADVICE = {
    "caption_channels": "use the text encoder that it was trained with",
    "latent_channels": "use its autoencoder",
    "patch_size": "make them the same",
    "learn_sigma": "make them the same",
}
MICRO = "adaln_single.emb.resolution_embedder."


def recognise(names: Mapping[str, Any]) -> bool:
    """Return whether a file with these names holds a PixArt transformer."""
    return (
        "transformer_blocks.0.scale_shift_table" in names
        and "adaln_single.linear.weight" in names
        and not diffusers.recognise(names)
    )


def understand(
    tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
) -> Understanding:
    """Read as LatteT2V, with a gate; InputError for the models of 1024 pixels, which are conditioned on the
    size.
    """
    if any(name.startswith(MICRO) for name in tensors):
        raise InputError(
            "this PixArt is conditioned on resolution and aspect ratio, which LatteText is not; "
            "use the model of 512 pixels or less"
        )
    found = diffusers.understand(tensors, card, heads)
    config: Any = found.config
    return replace(found, config=replace(config, gated_time=True))


def from_pixart(
    source: str | Path, num_frames: int = 16, gated_time: bool = True, seed: int = 0, heads: int | None = None
) -> tuple[LatteText, Coverage]:
    """Return a LatteText of PixArt's size, started from the folder, file or hub id ``source``, and the
    logged report.

    The new weights depend on ``seed`` alone. InputError as for ``init_from_pixart``.
    """
    tensors, found = read_pixart(source, heads)
    config: Any = found.config
    config = replace(config, num_frames=num_frames, gated_time=gated_time)
    model: Any = build(config, seed)
    return model, fill(model, source, tensors, found)


def init_from_pixart(model: LatteText, source: str | Path) -> Coverage:
    """Fill ``model`` from the PixArt at ``source`` (folder, file or hub id); return the report, which is
    also logged.

    The temporal blocks keep fresh weights but add nothing yet; they are ``missing`` in the report.
    InputError for another width, depth or number of heads, another text encoder, and files that are not
    PixArt-alpha.
    """
    return fill(model, source, *read_pixart(source, model.config.dimensions[2]))


def read_pixart(source: str | Path, heads: int | None) -> tuple[dict[str, Tensor], Understanding]:
    """Return tensors and configuration of a PixArt; ``heads`` is used where config.json has none."""
    path = fetch(source)
    tensors = unwrap(read_tensors(path, BRANCHES)[0])
    card = read_card(path) or {}
    if not recognise(tensors):
        raise InputError(
            f"weights {source} are not PixArt-alpha (first tensors: {some(sorted(tensors))}); use its "
            "transformer folder"
        )
    if "num_attention_heads" in card:
        heads = None
    return tensors, understand(tensors, card, heads)


def fill(model: LatteText, source: str | Path, tensors: dict[str, Tensor], found: Understanding) -> Coverage:
    """Load the tensors of a PixArt, and make the new temporal blocks add nothing."""
    sizes = zip(("depth", "width", "heads"), model.config.dimensions, found.config.dimensions, strict=True)
    for name, ours, pixart in sizes:
        check(
            ours == pixart,
            f"model.{name} is {ours}, but the PixArt at {source} has {pixart}; set model.{name}={pixart}",
        )
    for name, advice in ADVICE.items():
        ours = getattr(model.config, name)
        pixart = getattr(found.config, name)
        check(ours == pixart, f"model.{name} is {ours}, but the PixArt at {source} has {pixart}; {advice}")
    ours = model.config.table_grid
    pixart = found.config.table_grid
    check(
        ours == pixart,
        f"the grid of positions is {ours}, but the PixArt at {source} has {pixart}; "
        f"set table_size={pixart[0]} (text.table_size in a run)",
    )
    state, report = compare(str(source), "PixArt-alpha", tensors, found, model.state_dict())
    LOG.info("%s", report)
    report.refuse(allow_missing=NEW, allow_unexpected=())
    model.load_state_dict(state, strict=False)
    model.zero_time_blocks()
    return report
