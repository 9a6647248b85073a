# SPDX-License-Identifier: Apache-2.0
"""The released Latte files <-> ours: even blocks attend over space, odd ones over time; the position tables are computed, not loaded.

Serves ``Latte``'s and ``LatteIMG``'s files alike (their names are the same), with or without ``ema`` or ``model`` around them.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte.checks import InputError, require
from latte.files import TEMPORARY, reported, sync
from latte.interop.coverage import (
    Understanding,
    against_table,
    count_blocks,
    dimensions,
    learns_sigma,
    shape_of,
)
from latte.interop.key_maps import translate
from latte.interop.readers import PICKLED
from latte.model.latte import Latte, ModelConfig
from latte.model.positions import spatial_table, temporal_table

TABLES = ("pos_embed", "temp_embed")
TEXT = "text_embedding_projection."  # of the mode that their code calls extras 78
TABLE = (
    ("x_embedder.proj.{w}", "patch.proj.{w}"),
    ("t_embedder.mlp.0.{w}", "time_embedding.fc1.{w}"),
    ("t_embedder.mlp.2.{w}", "time_embedding.fc2.{w}"),
    ("y_embedder.embedding_table.weight", "label_embedding.table.weight"),
    ("blocks.{even}.attn.qkv.{w}", "blocks.{even}.branches.space.qkv.{w}"),
    ("blocks.{even}.attn.proj.{w}", "blocks.{even}.branches.space.proj.{w}"),
    ("blocks.{odd}.attn.qkv.{w}", "blocks.{odd}.branches.time.qkv.{w}"),
    ("blocks.{odd}.attn.proj.{w}", "blocks.{odd}.branches.time.proj.{w}"),
    ("blocks.{i}.mlp.fc1.{w}", "blocks.{i}.branches.mlp.fc1.{w}"),
    ("blocks.{i}.mlp.fc2.{w}", "blocks.{i}.branches.mlp.fc2.{w}"),
    ("blocks.{i}.adaLN_modulation.1.{w}", "blocks.{i}.modulation.linear.{w}"),
    ("final_layer.linear.{w}", "final_linear.{w}"),
    ("final_layer.adaLN_modulation.1.{w}", "final_modulation.linear.{w}"),
)


def recognise(names: Mapping[str, Any]) -> bool:
    """Does a file with these names hold a released Latte?"""
    return "x_embedder.proj.weight" in names and "blocks.0.attn.qkv.weight" in names


def understand(
    tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
) -> Understanding:
    """Sizes, frames and classes from the tensors. InputError for a text projection (extras 78) or shapes of another architecture.

    A label table of n rows is read as n - 1 classes and the null class, which is how every released file was trained.
    """
    projection = next((name for name in tensors if name.startswith(TEXT)), None)
    if projection:
        raise InputError(
            f"the file has {projection}: a Latte conditioned on CLIP text (extras 78), which has no counterpart here; "
            "give a class-conditional, an unconditional or a text-to-video (LatteT2V) file"
        )
    config, _ = read_config(tensors, heads)
    temporal = "temp_embed" if "temp_embed" in tensors else "time_embed"  # the name of the first files
    grid = tuple(side // config.patch_size for side in config.grid_size)
    width = config.dimensions[1]
    dropped, strange = {}, {}
    for name, computed in (
        ("pos_embed", spatial_table(*grid, width)),
        (temporal, temporal_table(config.num_frames, width)),
    ):
        if name in tensors:
            same, finding = against_table(tensors[name], computed)
            (dropped if same else strange)[name] = finding
        else:
            strange["temp_embed" if name == temporal else name] = (
                "is not in the file, so the size that it tells is unknown"
            )
    return Understanding(config, translate(tensors, TABLE, "to_ours"), dropped, strange)


def read_config(tensors: Mapping[str, Tensor], heads: int | None) -> tuple[ModelConfig, int | None]:
    """(configuration, rows of the label table or None) of tensors with DiT's names; sizes that no tensor tells are the defaults."""
    width, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    found: dict[str, Any] = {"patch_size": patch, "latent_channels": channels}
    found |= dimensions(count_blocks(tensors, "blocks"), width, heads)
    found["learn_sigma"] = learns_sigma(shape_of(tensors, "final_layer.linear.weight", 2)[0], patch, channels)
    rows = (
        shape_of(tensors, "y_embedder.embedding_table.weight", 2)[0]
        if "y_embedder.embedding_table.weight" in tensors
        else None
    )
    if "pos_embed" in tensors:
        tokens = shape_of(tensors, "pos_embed", 3)[1]
        require(
            math.isqrt(tokens) ** 2 == tokens,
            "pos_embed's tokens",
            tokens,
            "the released models are square",
            "give such a file",
        )
        found["latent_size"] = math.isqrt(tokens) * patch
    frames = next((name for name in ("temp_embed", "time_embed") if name in tensors), None)
    if frames:
        found["num_frames"] = shape_of(tensors, frames, 3)[1]
    return ModelConfig(num_classes=None if rows is None else rows - 1, **found), rows


def official_state(model: Latte) -> dict[str, Tensor]:
    """``model``'s tensors under the released names, position tables included. InputError for what the released code cannot hold."""
    config = model.config
    for name, only in (
        ("variant", 1),
        ("patch", "uniform"),
        ("conditioning", "s_adaln"),
        ("temporal_position", "absolute"),
    ):
        require(
            getattr(config, name) == only,
            f"model.{name}",
            getattr(config, name),
            f"the released code has {only!r} alone",
            "keep this model in our own layout",
        )
    rows, columns = (side // config.patch_size for side in config.grid_size)
    require(
        rows == columns,
        "model.latent_size",
        config.latent_size,
        "the released code is square",
        "keep this model in our own layout",
    )
    state, width = model.state_dict(), config.dimensions[1]
    names = translate(state, TABLE, "to_theirs")
    assert len(names) == len(state), "a tensor of variant 1 without a released name"
    with torch.device("cpu"):  # the tables are kept by positions.py: none may be made without storage
        tables = {
            "pos_embed": spatial_table(rows, columns, width)[None],
            "temp_embed": temporal_table(config.num_frames, width)[None],
        }
    return {
        **{name: table.clone() for name, table in tables.items()},
        **{names[ours]: tensor for ours, tensor in state.items()},
    }


def save_official(model: Latte, path: str | Path) -> list[str]:
    """Write a file {'ema': tensors} that the released code loads -> its names.

    InputError for a name without the ending of such a file, and for a folder; RunError when the disk refuses.
    """
    path = Path(path)
    require(
        path.suffix in PICKLED and not path.is_dir(),
        "the released layout's place",
        str(path),
        f"it is a file whose name ends in one of {', '.join(PICKLED)}",
        f"give e.g. {path.name}.pt",
    )
    state = {name: tensor.detach().cpu() for name, tensor in official_state(model).items()}
    temporary = path.with_name(TEMPORARY + path.name)
    with reported("the released layout", path, sum(tensor.nbytes for tensor in state.values())):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save({"ema": state}, temporary)
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return list(state)
