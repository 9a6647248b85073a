# SPDX-License-Identifier: Apache-2.0
"""Starting from DiT, an ImageNet model with the released Latte's names (Latte, Sec. 3.3.5 and Fig. 6c).

Its spatial table serves every frame: ours is the same and computed. Its label table of 1000 classes fits nothing: it is dropped, and ours
starts at zero. The paper does not say where its blocks go, so that is a choice (MAPPINGS):

- ``all``: DiT's block k becomes block k, the temporal ones too, as the released name-matching loader would have it.
- ``spatial``: only blocks that attend within a frame are filled, from DiT blocks spread evenly over its depth: every second one of 28
  for the 14 of variants 1 and 2.
- ``spatial-first``: the same blocks, from DiT's first ones.

In variant 3 a DiT block fills attention over space, MLP and modulation of a block; attention over time keeps its fresh weights. In the
joint variant its attention goes on attending, now to all frames. Variant 4 has no place for it: its spatial half has half of the heads.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latte.checks import InputError, choose, require
from latte.interop.coverage import Coverage, Understanding, against_table, compare, count_blocks, some
from latte.interop.key_maps import BRANCHES, Table, translate, unwrap
from latte.interop.official import TABLE, read_config
from latte.interop.readers import fetch, read_tensors
from latte.model.latte import SIZES, Latte
from latte.model.positions import spatial_table

LOG = logging.getLogger(__name__)
LABELS = "y_embedder.embedding_table.weight"
MAPPINGS: dict[
    str, Callable[[int, int, int], int]
] = {  # j-th of the n blocks that are filled, DiT's depth -> DiT's block
    "all": lambda j, n, depth: j,
    "spatial": lambda j, n, depth: j * max(depth, n) // n,
    "spatial-first": lambda j, n, depth: j,
}


def recognise(names: Mapping[str, Any]) -> bool:
    """Does a file with these names hold a DiT? It is a released Latte without a temporal table, and always has labels."""
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
    """An unconditional Latte of DiT's size with the mapping ``all``, to be trained; InputError when DiT's spatial table is not ours."""
    config, _ = read_config(tensors, heads)
    return Understanding(
        replace(config, num_classes=None), translate(tensors, TABLE, "to_ours"), dropped_by_all(tensors)
    )


def dropped_by_all(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What no mapping uses, and why. InputError when DiT's spatial table is not the one that is computed here."""
    dropped = {LABELS: "holds ImageNet's classes"} if LABELS in tensors else {}
    if "pos_embed" in tensors:
        config, _ = read_config(tensors, heads=1)  # checks the table's shape
        grid = tuple(side // config.patch_size for side in config.grid_size)
        same, finding = against_table(tensors["pos_embed"], spatial_table(*grid, config.dimensions[1]))
        require(same, "pos_embed", finding, "DiT's spatial table is computed here", "give a file of DiT")
        dropped["pos_embed"] = finding
    return dropped


def init_from_dit(model: Latte, source: str | Path, mapping: str = "all") -> Coverage:
    """Fill ``model`` from the DiT at ``source`` (file or hub id) by MAPPINGS -> the report, which is logged, too.

    The model's label table is set to zero; what DiT has nothing for keeps its fresh weights and is ``missing`` in the report; tensors of
    another shape (of compression patches, or without learned sigma) are ``mismatched`` and left alone. InputError for an unknown mapping,
    another width (with both widths) or other heads, variant 4, the all-tokens conditioning, and files that are not DiT.
    """
    choose("mapping", mapping, MAPPINGS)
    tensors = unwrap(read_tensors(fetch(source), BRANCHES)[0])
    if not recognise(tensors):
        raise InputError(
            f"weights {source} are not a DiT (its tensors: {some(sorted(tensors))}); give DiT's flat file, e.g. DiT-XL-2-256x256.pt"
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
    """The rename table of this model: the rows outside the blocks, and five for each block that is filled."""
    attentions = [
        (index, next(name for name, _ in block.branches.named_children()))
        for index, block in enumerate(model.blocks)
    ]
    filled = [(index, name) for index, name in attentions if mapping == "all" or name != "time"]
    rows = [row for row in TABLE if not row[0].startswith("blocks.") and row[0] != LABELS]
    for j, (index, attention) in enumerate(filled):
        theirs, ours = f"blocks.{MAPPINGS[mapping](j, len(filled), depth)}", f"blocks.{index}"
        rows += [
            (f"{theirs}.attn.{part}.{{w}}", f"{ours}.branches.{attention}.{part}.{{w}}")
            for part in ("qkv", "proj")
        ]
        rows += [
            (f"{theirs}.mlp.{part}.{{w}}", f"{ours}.branches.mlp.{part}.{{w}}") for part in ("fc1", "fc2")
        ]
        rows += [(f"{theirs}.adaLN_modulation.1.{{w}}", f"{ours}.modulation.linear.{{w}}")]
    return rows


def check_fit(model: Latte, tensors: Mapping[str, Tensor], source: str) -> None:
    """InputError unless DiT's blocks mean the same in this model."""
    config, theirs = model.config, read_config(tensors, heads=1)[0].dimensions[1]
    _, width, heads = config.dimensions
    require(
        width == theirs,
        "model.width",
        width,
        f"the DiT at {source} has a width of {theirs}",
        f"give a DiT of width {width}, or choose the size of this one",
    )
    known = {w: h for _, w, h in SIZES.values()}.get(width, heads)
    require(
        heads == known,
        "model.heads",
        heads,
        f"a DiT of width {width} has {known}",
        f"set model.heads={known}",
    )
    require(
        config.variant != 4,
        "model.variant",
        config.variant,
        "its attention over space has half of DiT's heads, twice as wide each",
        "start variants 1, 2, 3 or joint from DiT",
    )
    require(
        config.conditioning == "s_adaln",
        "model.conditioning",
        config.conditioning,
        "DiT's blocks live by their modulation",
        "set model.conditioning=s_adaln",
    )
