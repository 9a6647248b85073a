# SPDX-License-Identifier: Apache-2.0
"""Parameters and operations of a model: exactly, and a class model's by the counting rule of the paper's
Table 3.

Nothing is computed: the model runs on the meta device. The paper counted with ``thop`` on three clips:
multiply-accumulates of linear and convolution layers, two operations per element of every layer norm, and no
biases, attention products or activations. Position tables are not parameters, and the condition is evaluated
once per frame and once per position.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latte.autoencoder.codec import CODECS, CodecConfig
from latte.model.conditioning import Modulation
from latte.model.denoiser import Denoiser, DenoiserConfig
from latte.model.latte import ModelConfig
from latte.tensors import without_memory

TABLE3_CLIPS = 3


@dataclass(frozen=True)
class Cost:
    """Exact cost of a model."""

    parameters: int  # trainable parameters
    operations: int  # of one clip's forward pass: 2 per multiply-add, attention included


@dataclass(frozen=True)
class Table3:
    """What the paper's Table 3 prints."""

    parameters: int  # parameters of counted layers
    operations_g: float  # 1e9 operations of three clips


def count(config: DenoiserConfig, tokens: int = 1) -> Cost:
    """Return the exact cost: convolutions, linear layers and attention products, not norms and activations.

    ``tokens`` are those of a text model's caption, with its padding.
    """
    model, z, t = on_meta(config, clips=1)
    with without_memory():
        condition = model.example_condition(1, tokens=tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(z, t, **condition)
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops())


def encoding_operations(codec: CodecConfig, frames: int, size: tuple[int, int]) -> int:
    """Return the exact operations of encoding one clip of ``frames`` frames of ``size``, (height, width)."""
    kind = CODECS[codec.name]
    encoder = kind(kind.skeleton(codec.path), codec.chunk, "meta")
    clip = torch.empty(1, frames, 3, *size, device="meta")  # (1 f 3 H W)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.encode(clip)
    return counter.get_total_flops()


def table3(config: ModelConfig) -> Table3:
    """Return the cost as Table 3 counts it, without classes."""
    config = replace(config, num_classes=None)
    model, z, t = on_meta(config, TABLE3_CLIPS)
    matrices: tuple[type, ...] = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d)
    counters = {**dict.fromkeys(matrices, multiply_adds), nn.LayerNorm: norm_operations}
    total = modulation_operations(model)
    parameters = 0
    handles = []

    def counted_by(
        rule: Callable[[Any, Tensor, Tensor], int],
    ) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total
            total += rule(module, inputs[0], output)

        return hook

    for module in model.modules():
        rule = counters.get(type(module))
        if rule is not None:
            handles.append(module.register_forward_hook(counted_by(rule)))
            parameters += sum(parameter.numel() for parameter in module.parameters())
    with torch.no_grad():
        model(z, t)
    for handle in handles:
        handle.remove()
    return Table3(parameters, total / 1e9)


def multiply_adds(module: Any, x: Tensor, output: Tensor) -> int:
    """Return the multiply-adds of a linear or convolution layer.

    One weight row per output, per input if transposed.
    """
    if isinstance(module, nn.ConvTranspose3d):
        return x.numel() * module.weight[0].numel()
    return output.numel() * module.weight[0].numel()


def norm_operations(module: Any, x: Tensor, output: Tensor) -> int:
    """Return two operations per element."""
    return 2 * output.numel()


def modulation_operations(model: Any) -> int:
    """Return what Table 3 counts of modulations beyond the single evaluation per clip that our code does.

    The paper evaluates a block's modulation once per sequence its branches attend over, the final one once
    per frame.
    """
    config: ModelConfig = model.config
    frames = config.num_frames // config.frames_per_token
    rows = {model.final_modulation: frames}
    for block in model.blocks:
        rows[block.modulation] = max(block.table3_rows(frames, config.num_tokens // frames), 1)
    return sum(
        (count - 1) * TABLE3_CLIPS * modulation.linear.weight.numel()
        for modulation, count in rows.items()
        if isinstance(modulation, Modulation)
    )


def on_meta(config: DenoiserConfig, clips: int) -> tuple[Denoiser, Tensor, Tensor]:
    """Return the model and an input (z, t) of ``clips`` clips, without storage."""
    values: Any = config
    with without_memory():
        z = torch.empty(clips, values.num_frames, values.latent_channels, *values.grid_size)
        return config.build(), z, torch.zeros(clips, dtype=torch.long)
