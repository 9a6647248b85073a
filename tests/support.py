# SPDX-License-Identifier: Apache-2.0
"""What several test files share.

Waking a zero-initialised model, reproducible noise, and the optional folder of real clips.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from latte.runtime import generator

MEAN, DEVIATION = 0.7, 0.4  # of the data that ``gaussian`` denoises
SHARED = Path(__file__).parents[2] / "shared"


def wake(module: nn.Module, scale: float = 0.05, seed: int = 0) -> nn.Module:
    """Fill every trainable parameter with small noise.

    A fresh adaLN-Zero model predicts exactly 0, and a test of it would be empty.
    """
    draw = generator(seed, "wake")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw).to(parameter))
    return module


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal of ``shape``, a function of ``seed`` alone."""
    return torch.randn(shape, generator=generator(seed, "noise"), dtype=torch.float64).to(dtype)


def gaussian(process):
    """The exact denoiser of elementwise N(MEAN, DEVIATION^2) data, in whatever ``process`` predicts."""

    def denoise(z, t):
        a, s = (table[t].view(-1, 1, 1, 1, 1).to(z) for table in (process.signal, process.noise))
        z0 = MEAN + a * DEVIATION**2 / (a**2 * DEVIATION**2 + s**2) * (z - a * MEAN)
        return process.target(z0, t, (z - a * z0) / s)

    return denoise


def shared(*parts: str) -> Path:
    """A path under the optional folder of real clips and weights.

    The test is skipped, saying so, where it does not exist.
    """
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"optional data {'/'.join(parts)} is not here")
    return path
