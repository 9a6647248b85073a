# SPDX-License-Identifier: Apache-2.0
"""Starting from DiT, an ImageNet model with the released Latte's names (Latte, Sec. 3.3.5, Fig. 6c).

DiT's spatial table serves every frame: ours is the same, and computed. Its label table of 1000 classes
matches nothing: it is dropped, and ours starts at zero. The paper does not state where DiT's blocks go, so
that is a choice (MAPPINGS):

- ``all``: DiT's block k becomes block k, also the temporal ones, as in the released loader.
- ``spatial``: only blocks that attend within a frame are filled, from DiT blocks spread evenly over its
  depth: every second one of 28 for the 14 of variants 1 and 2.
- ``spatial-first``: the same blocks, from the first blocks of DiT.

In variant 3 a DiT block fills attention over space, MLP and modulation of a block; attention over time
keeps fresh weights. In the joint variant DiT's attention attends to all frames. Variant 4 cannot take DiT
blocks: its spatial half has half of the heads.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latte.checks import InputError, check, choose
from latte.interop.config import MAPPINGS as MAPPINGS
from latte.interop.coverage import (
    BRANCHES,
    Coverage,
    Table,
    Understanding,
    compare,
    compare_table,
    count_blocks,
    some,
    translate,
    unwrap,
)
from latte.interop.official import TABLE, read_config
from latte.interop.readers import fetch, read_tensors
from latte.model.latte import SIZES, Latte
from latte.model.positions import spatial_table

LOG = logging.getLogger(__name__)
LABELS = "y_embedder.embedding_table.weight"


def recognise(names: Mapping[str, Any]) -> bool:
    """Return whether a file with these names holds a DiT: a released Latte with labels, without a temporal
    table.
    """
    temporal = "temp_embed" in names or "time_embed" in names
    return (
        "x_embedder.proj.weight" in names
        and "blocks.0.attn.qkv.weight" in names
        and LABELS in names
        and not temporal
    )


def understand(
    tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
) -> Understanding:
    """Read DiT as an unconditional Latte of its size, to be trained, with the mapping ``all``.

    InputError when its spatial table differs from ours.
    """
    config, _ = read_config(tensors, heads)
    return Understanding(
        replace(config, num_classes=None), translate(tensors, TABLE, "to_ours"), dropped_by_all(tensors)
    )


def dropped_by_all(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name -> reason of what no mapping uses; InputError when DiT's spatial table differs from
    ours.
    """
    dropped = {LABELS: "holds ImageNet's classes"} if LABELS in tensors else {}
    if "pos_embed" in tensors:
        config, _ = read_config(tensors, heads=1)  # checks the table's shape
        grid = tuple(side // config.patch_size for side in config.grid_size)
        same, finding = compare_table(tensors["pos_embed"], spatial_table(*grid, config.dimensions[1]))
        check(same, f"pos_embed {finding}; use a file of DiT")
        dropped["pos_embed"] = finding
    return dropped


def init_from_dit(model: Latte, source: str | Path, mapping: str = "all") -> Coverage:
    """Fill ``model`` from the DiT at ``source`` (file or hub id) by MAPPINGS; return the report, which is
    also logged.

    The label table is set to zero. What DiT lacks keeps fresh weights and is ``missing`` in the report;
    tensors of another shape (compression patches, no learned sigma) are ``mismatched`` and ignored.
    InputError for an unknown mapping, another width or number of heads, variant 4, all-tokens conditioning,
    and files that are not DiT.
    """
    choose("mapping", mapping, MAPPINGS)
    tensors = unwrap(read_tensors(fetch(source), BRANCHES)[0])
    if not recognise(tensors):
        raise InputError(
            f"weights {source} are not a DiT (first tensors: {some(sorted(tensors))}); use e.g. "
            "DiT-XL-2-256x256.pt"
        )
    check_fit(model, tensors, str(source))
    table = block_table(model, count_blocks(tensors, "blocks"), mapping)
    names = translate(tensors, table, "to_ours")
    dropped = dropped_by_all(tensors)
    dropped |= {
        name: f"has no place in mapping {mapping!r}"
        for name in tensors
        if name.startswith("blocks.") and name not in names
    }
    state, report = compare(
        str(source),
        f"DiT, mapping {mapping!r}",
        tensors,
        Understanding(model.config, names, dropped),
        model.state_dict(),
    )
    model.load_state_dict(state, strict=False)
    if model.label_embedding is not None:
        nn.init.zeros_(model.label_embedding.table.weight)
    LOG.info("%s", report)
    return report


def block_table(model: Latte, depth: int, mapping: str) -> Table:
    """Return the rename table of this model: the rows outside the blocks, and five per filled block."""
    attentions = [
        (index, next(name for name, _ in block.branches.named_children()))
        for index, block in enumerate(model.blocks)
    ]
    filled = [(index, name) for index, name in attentions if mapping == "all" or name != "time"]
    rows = [row for row in TABLE if not row[0].startswith("blocks.") and row[0] != LABELS]
    for j, (index, attention) in enumerate(filled):
        source = f"blocks.{MAPPINGS[mapping](j, len(filled), depth)}"
        target = f"blocks.{index}"
        for part in ("qkv", "proj"):
            rows.append((f"{source}.attn.{part}.{{w}}", f"{target}.branches.{attention}.{part}.{{w}}"))
        for part in ("fc1", "fc2"):
            rows.append((f"{source}.mlp.{part}.{{w}}", f"{target}.branches.mlp.{part}.{{w}}"))
        rows.append((f"{source}.adaLN_modulation.1.{{w}}", f"{target}.modulation.linear.{{w}}"))
    return rows


def check_fit(model: Latte, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise InputError unless DiT's blocks compute the same in this model."""
    config = model.config
    dit_width = read_config(tensors, heads=1)[0].dimensions[1]
    _, width, heads = config.dimensions
    check(
        width == dit_width,
        f"model.width is {width}, but the DiT at {source} has {dit_width}; use a DiT of width {width}, or "
        "set "
        "model.size",
    )
    known = {w: h for _, w, h in SIZES.values()}.get(width, heads)
    check(
        heads == known,
        f"model.heads is {heads}, but a DiT of width {width} has {known}; set model.heads={known}",
    )
    check(
        config.variant != 4,
        "model.variant is 4, whose spatial attention has half of DiT's heads, each twice as wide; "
        "only variants 1, 2, 3 and joint can start from DiT",
    )
    check(
        config.conditioning == "s_adaln",
        f"model.conditioning is {config.conditioning!r}, but DiT's blocks need their modulation; "
        "set model.conditioning=s_adaln",
    )
