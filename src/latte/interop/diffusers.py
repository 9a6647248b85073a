# SPDX-License-Identifier: Apache-2.0
"""LatteT2V (diffusers' LatteTransformer3DModel) <-> our LatteText: a folder with config.json and
safetensors, or a bare file.

The tensors correspond one to one. Heads, frames and the grid of positions do not follow from them and are
in config.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from latte.checks import InputError, RunError, check
from latte.files import check_replaceable, commit_folder, reported
from latte.interop.coverage import Understanding, count_blocks, dimensions, learns_sigma, shape_of, translate
from latte.model.config import COARSE
from latte.model.text import LatteText, TextConfig
from latte.tensors import check_finite

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCKS = (
    ("transformer_blocks", "space_blocks", ("attn1", "attn2")),
    ("temporal_transformer_blocks", "time_blocks", ("attn1",)),
)
ATTENTIONS = {"attn1": "attention", "attn2": "cross"}
PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj"}
TABLE = (
    ("pos_embed.proj.{w}", "patch.proj.{w}"),
    ("adaln_single.emb.timestep_embedder.linear_1.{w}", "time_embedding.fc1.{w}"),
    ("adaln_single.emb.timestep_embedder.linear_2.{w}", "time_embedding.fc2.{w}"),
    ("adaln_single.linear.{w}", "modulation.linear.{w}"),
    ("caption_projection.linear_1.{w}", "caption.fc1.{w}"),
    ("caption_projection.linear_2.{w}", "caption.fc2.{w}"),
    ("scale_shift_table", "final_table"),
    ("proj_out.{w}", "final_linear.{w}"),
    *(
        (
            f"{diffusers}.{{i}}.{attention}.{projection}.{{w}}",
            f"{ours}.{{i}}.{ATTENTIONS[attention]}.{PROJECTIONS[projection]}.{{w}}",
        )
        for diffusers, ours, attentions in BLOCKS
        for attention in attentions
        for projection in PROJECTIONS
    ),
    *(
        (f"{diffusers}.{{i}}.{part}", f"{ours}.{{i}}.{our_part}")
        for diffusers, ours, _ in BLOCKS
        for part, our_part in (
            ("scale_shift_table", "table"),
            ("ff.net.0.proj.{w}", "mlp.fc1.{w}"),
            ("ff.net.2.{w}", "mlp.fc2.{w}"),
        )
    ),
)
NULL_CAPTION = "caption_projection.y_embedding"
FIXED = {  # what LatteText computes; other values are another network with the same names
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "num_embeds_ada_norm": 1000,
    "dropout": 0.0,
}


def recognise(names: Mapping[str, Any]) -> bool:
    """Return whether a file with these names holds a LatteT2V."""
    return "temporal_transformer_blocks.0.scale_shift_table" in names and "pos_embed.proj.weight" in names


def understand(
    tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
) -> Understanding:
    """Read sizes from the tensors; heads, frames and grid from config.json (``card``), else 16 frames on
    Latte-1's grid of 64.

    InputError when the two contradict each other, or config.json describes another network. The buffer of
    the empty caption that diffusers 0.24 stored is dropped.
    """
    card = dict(card or {})
    for key, value in FIXED.items():
        check(
            card.get(key, value) == value,
            f"config.json has {key} {card.get(key)!r}, but a LatteT2V has {value!r}; use a LatteT2V",
        )
    width, channels, patch, _ = shape_of(tensors, "pos_embed.proj.weight", 4)
    written = heads_on_card(card, width)
    check(
        heads is None or written in (None, heads),
        f"heads is {heads}, but config.json has {written}; remove heads, or give that number",
    )
    if heads is None:
        heads = written
    size = positive_integer(card, "sample_size", 64)
    scale = card.get("interpolation_scale") or max(size // COARSE, 1)
    expected = max(size // COARSE, 1)
    check(
        scale == expected,
        f"config.json has interpolation_scale {scale}, but sample_size {size} needs {expected}; "
        "use a LatteT2V or PixArt-alpha",
    )
    config = TextConfig(
        **dimensions(count_blocks(tensors, "transformer_blocks"), width, heads),
        patch_size=patch,
        num_frames=positive_integer(card, "video_length", 16),
        latent_size=size,
        latent_channels=channels,
        caption_channels=shape_of(tensors, "caption_projection.linear_1.weight", 2)[1],
        learn_sigma=learns_sigma(shape_of(tensors, "proj_out.weight", 2)[0], patch, channels),
    )
    check_card(card, config, shape_of(tensors, "proj_out.weight", 2)[0])
    dropped = {NULL_CAPTION: "is a buffer that no prompt uses"} if NULL_CAPTION in tensors else {}
    return Understanding(config, translate(tensors, TABLE, "to_ours"), dropped)


def check_card(card: Mapping[str, Any], config: TextConfig, rows: int) -> None:
    """Raise InputError where config.json has another size than the tensors; ``rows`` are those of the last
    layer.
    """
    depth, width, _ = config.dimensions
    sizes = {
        "num_layers": depth,
        "in_channels": config.latent_channels,
        "out_channels": rows // config.patch_size**2,
        "patch_size": config.patch_size,
        "cross_attention_dim": width,
        "caption_channels": config.caption_channels,
    }
    for key, size in sizes.items():
        check(
            card.get(key) in (None, size),
            f"config.json has {key} {card.get(key)!r}, but the tensors have {size}; "
            "the folder is mixed from two models, fetch it again",
        )


def heads_on_card(card: Mapping[str, Any], width: int) -> int | None:
    """Return the number of heads in config.json, or None; InputError when they do not make up the
    ``width``.
    """
    if "num_attention_heads" not in card:
        return None
    heads = positive_integer(card, "num_attention_heads", 16)
    head_width = positive_integer(card, "attention_head_dim", 88)
    check(
        heads * head_width == width,
        f"config.json has {heads} heads of width {head_width}, but the tensors have width {width}; "
        "the folder is mixed from two models, fetch it again",
    )
    return heads


def positive_integer(card: Mapping[str, Any], key: str, default: int) -> int:
    """Return a positive integer of config.json; InputError for anything else."""
    value = card.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise InputError(
            f"{key} in config.json must be an integer of at least 1, got {value!r}; fetch the folder again"
        )
    return value


def diffusers_state(model: LatteText, gate_steps: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of ``model`` under the names of diffusers, without the gate, which must be open.

    ``gate_steps``, if known, is the step at which the run opens the gate, for the message. InputError for a
    model that the network of diffusers cannot express.
    """
    config = model.config
    config.refuse_options("diffusers")
    rows, columns = config.table_grid
    check(
        rows == columns,
        f"diffusers counts positions on a square grid, but this model has latent_size {config.latent_size}; "
        "use --to latte, or train it with model.table_size set",
    )
    state = dict(model.state_dict())
    state.pop("time_gate", None)
    step = "train.gate_steps" if gate_steps is None else f"{gate_steps} (train.gate_steps)"
    check(
        model.opened == 1.0,
        f"time_gate is {model.opened:g}, but diffusers has no gate, as if it were 1; resume training up to "
        f"step {step}, "
        "where the gate is open, or resume with a lower train.gate_steps",
    )
    names = translate(state, TABLE, "to_external")
    assert len(names) == len(state), "a tensor of LatteText without a name in diffusers"
    return {names[ours]: tensor for ours, tensor in state.items()}


def diffusers_config(config: TextConfig) -> dict[str, Any]:
    """Return the config.json of ``diffusers_state``."""
    depth, width, heads = config.dimensions
    return {
        "_class_name": "LatteTransformer3DModel",
        **FIXED,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "cross_attention_dim": width,
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels * (2 if config.learn_sigma else 1),
        "num_layers": depth,
        "sample_size": config.table_grid[0],
        "patch_size": config.patch_size,
        "caption_channels": config.caption_channels,
        "video_length": config.num_frames,
    }


def save_diffusers(model: LatteText, folder: str | Path, gate_steps: int | None = None) -> list[str]:
    """Write the folder that ``LatteTransformer3DModel.from_pretrained`` loads; return the names of its
    tensors.

    An earlier export in ``folder`` is replaced. InputError when anything else is in it, and as for
    ``diffusers_state``. RunError when the disk refuses, or a weight is NaN/Inf.
    """
    folder = Path(folder)
    check_replaceable(folder, (CONFIG, WEIGHTS))
    named = diffusers_state(model, gate_steps)
    check_finite(named, "to be saved", RunError)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    text = json.dumps(diffusers_config(model.config), indent=2) + "\n"

    def write(place: Path) -> None:
        save_file(state, place / WEIGHTS, metadata={"format": "pt"})
        (place / CONFIG).write_text(text, encoding="utf-8")

    with reported("the diffusers folder", folder, sum(tensor.nbytes for tensor in state.values())):
        commit_folder(folder, write)
    return list(state)
