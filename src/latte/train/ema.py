# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of the weights: what all samples are drawn from (Latte, Sec. 4.1: decay 0.9999)."""

import copy

import torch
from torch import nn


class EMA:
    """A second model, ``.model``, whose weights follow those of ``model``: ema <- decay * ema + (1 - decay) * weight.

    It starts as a copy, of which decay^n is left after n steps: with 0.999 still 37 % after 1000. ``warmup`` lets go of it sooner: step
    n = 1, 2, ... takes the lesser of ``decay`` and (1 + n) / (10 + n), an average over the last ninth of the run so far. Only what is
    trained moves; frozen parameters are those of ``model`` itself, not copies, and buffers stay as they were copied: who changes one (the
    loop a text model's gate) does so in both. Its state is that of ``.model``, under the same names as the model's own.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        pairs = [
            (mine, theirs)
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True)
            if theirs.requires_grad
        ]
        self.averages, self.weights = [mine for mine, _ in pairs], [theirs for _, theirs in pairs]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's weights as they are after step 1, 2, ..."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)  # pyright: ignore
