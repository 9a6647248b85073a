# SPDX-License-Identifier: Apache-2.0
"""The Muon optimizer: momentum whose matrices are made orthogonal before they are applied.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. torch.optim.Muon takes
matrices alone; here the axes of a convolution's weights after the first are flattened. First and last layers
and biases stay with AdamW.
"""

from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Muon over weights of two or more axes, the first of which is the output's; ``lr`` is that of a square
    matrix.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], lr: float = 0.02):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step with the gradients; ``closure`` is not supported."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(gradient, 1 - MOMENTUM)
                matrix = gradient.lerp(state["momentum"], MOMENTUM).flatten(1)  # Nesterov's
                scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
                parameter.add_(orthogonal(matrix).view(parameter.shape), alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Return about the nearest matrix with orthonormal rows or columns, singular values in [0.7, 1.2], by a
    Newton-Schulz iteration in bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype).contiguous()


def with_adamw(model: nn.Module, edges: Container[nn.Module], lr: float, muon_lr: float) -> list[Optimizer]:
    """Return AdamW, and Muon for the convolutions of 3 x 3 that are not in ``edges``; frozen weights have
    neither.
    """
    inner = {
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module not in edges
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trained if parameter not in inner]
    chosen = [parameter for parameter in trained if parameter in inner]
    return [AdamW(rest, lr=lr, weight_decay=1e-3), Muon(chosen, lr=muon_lr)]
