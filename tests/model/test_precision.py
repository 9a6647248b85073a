# SPDX-License-Identifier: Apache-2.0
"""Under autocast the matrix products are in bf16 and the residual stream stays in float32."""

import pytest
import torch
from torch import nn

from latte.model.config import VARIANTS, ModelConfig, TextConfig
from support import wake

SMALL = {"size": "S", "depth": 4, "width": 32, "heads": 4, "num_frames": 4, "latent_size": 8}
CASES = [ModelConfig(**SMALL, variant=variant, num_classes=3) for variant in VARIANTS]
CASES += [
    ModelConfig(**SMALL, conditioning="all_tokens"),
    ModelConfig(**SMALL, temporal_position="rotary", patch="compression"),
    TextConfig(**{**SMALL, "depth": 2}, caption_channels=16),
]


@pytest.mark.parametrize("config", CASES)
def test_the_residual_stream_is_float32_under_autocast(config):
    model = wake(config.build()).eval()
    linear, stream = [], []

    def record(found):
        return lambda module, given, output: found.append(output.dtype)

    def kept(module, given):
        stream.append(given[0].dtype)

    names = ("blocks", "space_blocks", "time_blocks")
    blocks = [block for name in names for block in getattr(model, name, [])]
    for block in blocks:
        block.register_forward_pre_hook(kept)
        block.register_forward_hook(record(stream))
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(record(linear))
    z = torch.randn(2, 4, 4, 8, 8)
    condition = model.example_condition(2, tokens=3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(z, torch.tensor([3, 500]), **condition)
    assert len(stream) == 2 * len(blocks) >= 8
    assert set(stream) == {torch.float32}
    assert torch.bfloat16 in linear, "no matrix product was in bf16"
