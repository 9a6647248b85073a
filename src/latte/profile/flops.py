# SPDX-License-Identifier: Apache-2.0
"""Parameters and operations of any model: exactly, and a class model's by Table 3's own counting rule.

Nothing is computed: the model runs on the meta device. The paper counted with ``thop`` on three clips: multiply-accumulates of
linear and convolution layers, two operations per element of every layer norm, and neither biases, attention products nor
activations; tables are not among its parameters, and the condition is evaluated once per frame and once per position.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from latte.model.conditioning import Modulation
from latte.model.latte import ModelConfig
from latte.model.text import Network, TextConfig, network

TABLE3_CLIPS = 3


@dataclass(frozen=True)
class Cost:
    """``parameters`` that are trained, and ``operations`` of one clip's forward pass: 2 per multiply-add, attention included."""

    parameters: int
    operations: int


@dataclass(frozen=True)
class Table3:
    """What the paper's Table 3 prints: ``parameters``, and 1e9 operations of three clips."""

    parameters: int
    operations_g: float


def count(config: ModelConfig | TextConfig, tokens: int = 1) -> Cost:
    """The true cost. Convolutions, linear layers and attention products count; norms and activations do not.

    ``tokens`` are those of a text model's caption, with its padding.
    """
    model, inputs = _on_meta(config, clips=1, tokens=tokens)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops())


def table3(config: ModelConfig) -> Table3:
    """The cost as Table 3 counts it."""
    config = replace(config, num_classes=None)
    model, inputs = _on_meta(config, TABLE3_CLIPS)
    frames = config.num_frames // model.patch.tube
    positions = inputs[0][0, 0, 0].numel() // config.patch_size**2
    rows = {"space": frames, "time": positions, "both": frames + positions, "joint": 1, "mlp": 0}
    repeats = {model.final_modulation: frames}
    blocks: Any = model.blocks
    for block in blocks:
        repeats[block.modulation] = sum(rows[name] for name in block.branches)
    total = 0

    def add(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += out.numel() * module.in_features
        elif isinstance(module, nn.LayerNorm):
            total += 2 * out.numel()
        else:
            weight: Any = module.weight
            total += (args[0] if isinstance(module, nn.ConvTranspose3d) else out).numel() * weight[0].numel()

    for module in model.modules():
        if isinstance(module, Modulation):
            total += (repeats[module] - 1) * TABLE3_CLIPS * module.linear.weight.numel()
    counted = [
        m
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.LayerNorm | nn.Conv2d | nn.Conv3d | nn.ConvTranspose3d)
    ]
    handles = [module.register_forward_hook(add) for module in counted]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return Table3(sum(p.numel() for m in counted for p in m.parameters()), total / 1e9)


def _on_meta(
    config: ModelConfig | TextConfig, clips: int, tokens: int = 1
) -> tuple[Network, tuple[Tensor, ...]]:
    """The model and an input (z, t), for a text model (z, t, text), of ``clips`` clips, none of them with storage."""
    with torch.device("meta"):
        z = torch.empty(clips, config.num_frames, config.latent_channels, *config.grid_size)
        told = (
            (torch.empty(clips, tokens, config.caption_channels),) if isinstance(config, TextConfig) else ()
        )
        return network(config), (z, torch.zeros(clips, dtype=torch.long), *told)
