# SPDX-License-Identifier: Apache-2.0
"""Muon for the matrices of the blocks, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) makes the momentum of a matrix orthogonal by a
Newton-Schulz iteration in bfloat16 before it is applied. Its steps are scaled by 0.2 sqrt(max(rows,
columns)), so that they have the RMS of AdamW's and both take one learning rate and weight decay (Liu et al.
2025, arXiv 2502.16982, Sec. 2.2). Embeddings, first and last layer, biases and tables stay with AdamW.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from latte.checks import InputError

BLOCK_LISTS = ("blocks", "space_blocks", "time_blocks")  # where Latte and LatteText keep their blocks


def is_block_matrix(name: str, shape: torch.Size) -> bool:
    """Return whether parameter ``name`` is a matrix of a linear layer inside a block, which Muon updates."""
    inside = not set(BLOCK_LISTS).isdisjoint(name.split("."))
    return inside and name.endswith(".weight") and len(shape) == 2


def is_branch_matrix(name: str, shape: torch.Size) -> bool:
    """Return whether parameter ``name`` is such a matrix, but not a modulation's: those cost most."""
    return is_block_matrix(name, shape) and "modulation" not in name.split(".")


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon over those of ``named`` that are ``chosen``, AdamW over the other parameters.

    Both share ``state`` and ``param_groups`` with this object, which is what is saved and loaded, and whose
    groups hold the learning rate. InputError for a model without matrices in blocks.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        lr: float,
        weight_decay: float,
        fused: bool,
        chosen: Callable[[str, torch.Size], bool] = is_block_matrix,
    ):
        matrices = [parameter for name, parameter in named.items() if chosen(name, parameter.shape)]
        if not matrices:
            raise InputError(
                "train.optimizer is muon, but no trainable parameter is a matrix of a block; "
                "give train.optimizer=adamw"
            )
        taken = {id(parameter) for parameter in matrices}
        others = [parameter for parameter in named.values() if id(parameter) not in taken]
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[Optimizer] = [torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings)]
        if others:
            self.parts.append(torch.optim.AdamW(others, fused=fused, **settings))
        super().__init__([group for part in self.parts for group in part.param_groups], settings)
        self.share()

    def share(self) -> None:
        """Give both optimizers the state and the groups of this one."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups = [group]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients; ``closure`` is not supported."""
        for part in self.parts:
            part.step()
