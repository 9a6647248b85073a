# SPDX-License-Identifier: Apache-2.0
"""The released Latte files <-> ours: even blocks attend over space, odd ones over time; position tables are
computed.

Reads the files of ``Latte`` and of ``LatteIMG`` (their names are the same), with or without ``ema`` or
``model`` around them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte.checks import InputError, RunError, check
from latte.files import commit_file, reported
from latte.interop.coverage import (
    Understanding,
    compare_table,
    count_blocks,
    dimensions,
    learns_sigma,
    shape_of,
    translate,
)
from latte.interop.readers import PICKLED
from latte.model.latte import Latte, ModelConfig
from latte.model.positions import spatial_table, temporal_table
from latte.tensors import check_finite

TABLES = ("pos_embed", "temp_embed")
TEXT = "text_embedding_projection."  # of the mode that the released code calls extras 78
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


RELEASED = {"variant": 1, "patch": "uniform", "conditioning": "s_adaln", "temporal_position": "absolute"}


def recognise(names: Mapping[str, Any]) -> bool:
    """Return whether a file with these names holds a released Latte."""
    return "x_embedder.proj.weight" in names and "blocks.0.attn.qkv.weight" in names


def understand(
    tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
) -> Understanding:
    """Read sizes, frames and classes from the tensors.

    A label table of n rows is n - 1 classes and the null class, as in every released file. InputError for a
    text projection (extras 78) and for shapes of another architecture.
    """
    projection = next((name for name in tensors if name.startswith(TEXT)), None)
    if projection:
        raise InputError(
            f"the file has {projection}: a Latte conditioned on CLIP text (extras 78) has no counterpart "
            "here; "
            "use a class-conditional, an unconditional or a text-to-video (LatteT2V) file"
        )
    config, _ = read_config(tensors, heads)
    temporal = "temp_embed" if "temp_embed" in tensors else "time_embed"  # the name of the first files
    grid = tuple(side // config.patch_size for side in config.grid_size)
    width = config.dimensions[1]
    dropped: dict[str, str] = {}
    strange: dict[str, str] = {}
    tables = {"pos_embed": spatial_table(*grid, width), temporal: temporal_table(config.num_frames, width)}
    for name, computed in tables.items():
        if name not in tensors:
            label = "temp_embed" if name == temporal else name
            strange[label] = "is not in the file, so the size that follows from it is unknown"
            continue
        same, finding = compare_table(tensors[name], computed)
        if same:
            dropped[name] = finding
        else:
            strange[name] = finding
    return Understanding(config, translate(tensors, TABLE, "to_ours"), dropped, strange)


def read_config(tensors: Mapping[str, Tensor], heads: int | None) -> tuple[ModelConfig, int | None]:
    """Return (configuration, rows of the label table or None) of tensors with DiT's names.

    Sizes that follow from no tensor are the defaults.
    """
    width, channels, patch, _ = shape_of(tensors, "x_embedder.proj.weight", 4)
    found: dict[str, Any] = {"patch_size": patch, "latent_channels": channels}
    found |= dimensions(count_blocks(tensors, "blocks"), width, heads)
    found["learn_sigma"] = learns_sigma(shape_of(tensors, "final_layer.linear.weight", 2)[0], patch, channels)
    rows = None
    if "y_embedder.embedding_table.weight" in tensors:
        rows = shape_of(tensors, "y_embedder.embedding_table.weight", 2)[0]
    if "pos_embed" in tensors:
        tokens = shape_of(tensors, "pos_embed", 3)[1]
        check(
            math.isqrt(tokens) ** 2 == tokens,
            f"pos_embed has {tokens} tokens, which is no square number, but the released models are square",
        )
        found["latent_size"] = math.isqrt(tokens) * patch
    frames = next((name for name in ("temp_embed", "time_embed") if name in tensors), None)
    if frames:
        found["num_frames"] = shape_of(tensors, frames, 3)[1]
    return ModelConfig(num_classes=None if rows is None else rows - 1, **found), rows


def official_state(model: Latte) -> dict[str, Tensor]:
    """Return the tensors of ``model`` under the released names, with the position tables.

    InputError for a model that the released code cannot express.
    """
    config = model.config
    for name, only in RELEASED.items():
        value = getattr(config, name)
        check(
            value == only,
            f"the released code supports model.{name}={only} only, but this model has {value!r}; use --to "
            "latte",
        )
    config.refuse_options("the released code")
    rows, columns = (side // config.patch_size for side in config.grid_size)
    check(
        rows == columns,
        f"the released code is square, but this model has latent_size {config.latent_size}; use --to latte",
    )
    state = model.state_dict()
    width = config.dimensions[1]
    names = translate(state, TABLE, "to_external")
    assert len(names) == len(state), "a tensor of variant 1 without a released name"
    with torch.device("cpu"):  # positions.py caches the tables: none may be on the meta device
        tables = {
            "pos_embed": spatial_table(rows, columns, width)[None],
            "temp_embed": temporal_table(config.num_frames, width)[None],
        }
    return {
        **{name: table.clone() for name, table in tables.items()},
        **{names[ours]: tensor for ours, tensor in state.items()},
    }


def save_official(model: Latte, path: str | Path) -> list[str]:
    """Write a file {'ema': tensors} that the released code loads; return the names.

    InputError for a name without the suffix of such a file; RunError when the disk refuses or a weight is
    NaN/Inf.
    """
    path = Path(path)
    check(
        path.suffix in PICKLED,
        f"--to official writes a file, but {str(path)!r} does not end in {', '.join(PICKLED)}; use e.g. "
        f"{path.name}.pt",
    )
    state = {name: tensor.detach().cpu() for name, tensor in official_state(model).items()}
    check_finite(state, "to be saved", RunError)

    def write(file: Path) -> None:
        try:
            with open(file, "wb") as opened:
                torch.save({"ema": state}, opened)
        except RuntimeError as error:  # torch hides the error of the system
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    with reported("the released layout", path, sum(tensor.nbytes for tensor in state.values())):
        path.parent.mkdir(parents=True, exist_ok=True)
        commit_file(path, write)
    return list(state)
