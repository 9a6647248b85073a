# SPDX-License-Identifier: Apache-2.0
"""LatteT2V, which diffusers calls LatteTransformer3DModel, <-> our LatteText: a folder with config.json and safetensors, or a bare file.

The tensors correspond one to one. What they do not tell (heads, frames, the grid that positions count on) is in config.json.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from latte.checks import InputError, require
from latte.files import commit_folder, reported
from latte.interop.coverage import Understanding, count_blocks, dimensions, learns_sigma, shape_of
from latte.interop.key_maps import translate
from latte.model.text import COARSE, LatteText, TextConfig

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
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
            f"{theirs}.{{i}}.{attention}.{projection}.{{w}}",
            f"{ours}.{{i}}.{ATTENTIONS[attention]}.{PROJECTIONS[projection]}.{{w}}",
        )
        for theirs, ours, attentions in BLOCKS
        for attention in attentions
        for projection in PROJECTIONS
    ),
    *(
        (f"{theirs}.{{i}}.{part}", f"{ours}.{{i}}.{mine}")
        for theirs, ours, _ in BLOCKS
        for part, mine in (
            ("scale_shift_table", "table"),
            ("ff.net.0.proj.{w}", "mlp.fc1.{w}"),
            ("ff.net.2.{w}", "mlp.fc2.{w}"),
        )
    ),
)
NULL_CAPTION = "caption_projection.y_embedding"
FIXED = {  # what LatteText is; a file that says otherwise is another network with the same names
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "num_embeds_ada_norm": 1000,
    "dropout": 0.0,
}


def recognise(names: Mapping[str, Any]) -> bool:
    """Does a file with these names hold a LatteT2V?"""
    return "temporal_transformer_blocks.0.scale_shift_table" in names and "pos_embed.proj.weight" in names


def understand(
    tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
) -> Understanding:
    """Sizes from the tensors; heads, frames and grid from config.json (``card``), else 16 frames on Latte-1's grid of 64.

    InputError when the two contradict each other, or config.json describes another network. The buffer that diffusers 0.24 kept for
    the caption of nothing is dropped.
    """
    card = dict(card or {})
    for key, value in FIXED.items():
        require(
            card.get(key, value) == value,
            f"config.json's {key}",
            card.get(key),
            f"this model has {value!r}",
            "give a LatteT2V",
        )
    width, channels, patch, _ = shape_of(tensors, "pos_embed.proj.weight", 4)
    written = heads_on_card(card, width)
    require(
        heads is None or written in (None, heads),
        "heads",
        heads,
        f"config.json says {written}",
        "leave them out, or give these",
    )
    heads = written if heads is None else heads
    size = whole(card, "sample_size", 64)
    scale = card.get("interpolation_scale") or max(size // COARSE, 1)
    require(
        scale == max(size // COARSE, 1),
        "config.json's interpolation_scale",
        scale,
        f"a sample_size of {size} goes with {max(size // COARSE, 1)}",
        "give a LatteT2V or PixArt-alpha",
    )
    config = TextConfig(
        **dimensions(count_blocks(tensors, "transformer_blocks"), width, heads),
        patch_size=patch,
        num_frames=whole(card, "video_length", 16),
        latent_size=size,
        latent_channels=channels,
        caption_channels=shape_of(tensors, "caption_projection.linear_1.weight", 2)[1],
        learn_sigma=learns_sigma(shape_of(tensors, "proj_out.weight", 2)[0], patch, channels),
    )
    check_card(card, config, shape_of(tensors, "proj_out.weight", 2)[0])
    dropped = {NULL_CAPTION: "is a buffer that no prompt uses"} if NULL_CAPTION in tensors else {}
    return Understanding(config, translate(tensors, TABLE, "to_ours"), dropped)


def check_card(card: Mapping[str, Any], config: TextConfig, rows: int) -> None:
    """InputError where config.json gives another size than the tensors; ``rows`` are those of the last layer."""
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
        require(
            card.get(key) in (None, size),
            f"config.json's {key}",
            card.get(key),
            f"the tensors say {size}",
            "the folder is mixed from two models, fetch it again",
        )


def heads_on_card(card: Mapping[str, Any], width: int) -> int | None:
    """config.json's number of heads, None when it has none; InputError when they do not make up the ``width``."""
    if "num_attention_heads" not in card:
        return None
    heads, each = whole(card, "num_attention_heads", 16), whole(card, "attention_head_dim", 88)
    require(
        heads * each == width,
        "config.json",
        f"{heads} heads of {each}",
        f"the tensors have a width of {width}",
        "the folder is mixed from two models, fetch it again",
    )
    return heads


def whole(card: Mapping[str, Any], key: str, default: int) -> int:
    """A positive whole number of config.json; InputError for anything else."""
    value = default if card.get(key) is None else card[key]
    if type(value) is not int or value < 1:
        raise InputError(
            f"config.json's {key} is {value!r}, but it must be a whole number of 1 or more; fetch the folder again"
        )
    return value


def diffusers_state(model: LatteText, gate_steps: int | None = None) -> dict[str, Tensor]:
    """``model``'s tensors under diffusers' names, an open gate left out. InputError for a model that diffusers' network cannot express.

    ``gate_steps`` is the step at which the model's run has opened the gate, if that is known, for the message.
    """
    config = model.config
    rows, columns = config.table_grid
    require(
        rows == columns,
        "model.latent_size",
        config.latent_size,
        "diffusers counts positions on a square grid",
        "keep this model in our own layout, or train it with model.table_size set",
    )
    state = dict(model.state_dict())
    state.pop("time_gate", None)
    where = "train.gate_steps" if gate_steps is None else f"{gate_steps} (train.gate_steps)"
    require(
        model.opened == 1.0,
        "time_gate",
        model.opened,
        "diffusers adds the temporal table whole",
        f"train on to step {where}, where the gate is open, or a step further with a lower one",
    )
    names = translate(state, TABLE, "to_theirs")
    assert len(names) == len(state), "a tensor of LatteText without a name in diffusers"
    return {names[ours]: tensor for ours, tensor in state.items()}


def diffusers_config(config: TextConfig) -> dict[str, Any]:
    """The config.json that belongs to ``diffusers_state``."""
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
    """Write the folder that ``LatteTransformer3DModel.from_pretrained`` loads -> its tensors' names.

    An earlier export in ``folder`` is replaced; InputError when anything else is in it, and as for ``diffusers_state``. RunError when the
    disk refuses.
    """
    others = sorted(file.name for file in Path(folder).glob("*") if file.name not in (CONFIG, WEIGHTS))
    require(
        not others,
        "folder",
        str(folder),
        f"it holds other files ({', '.join(others[:3])})",
        "give a new folder",
    )
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in diffusers_state(model, gate_steps).items()
    }
    text = json.dumps(diffusers_config(model.config), indent=2) + "\n"

    def write(place: Path) -> None:
        save_file(state, place / WEIGHTS, metadata={"format": "pt"})
        (place / CONFIG).write_text(text, encoding="utf-8")

    with reported("the diffusers folder", Path(folder), sum(tensor.nbytes for tensor in state.values())):
        commit_folder(Path(folder), write)
    return list(state)
