# SPDX-License-Identifier: Apache-2.0
"""LayerSync: the tokens after an early block are pulled towards those after a deeper one, without parameters.

Haghighi et al. 2025, "LayerSync: Self-aligning Intermediate Layers" (arXiv 2510.12581). The deeper tokens are
detached: they are the target. The paper aligns block 8 of SiT-XL's 28 with block 16; here the same fractions
of the depth.
Axes: b batch, f frames (and images), n tokens of a frame, d width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def captured(model: Any, indices: tuple[int, int]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield two lists that receive the tokens (b f n d) after the blocks ``indices``, an entry per call.

    A model calls its blocks twice when images follow the clip.
    """
    blocks = list(model.blocks)
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])

    def keeper(into: list[Tensor]) -> Any:
        def keep(block: Any, inputs: Any, output: Any) -> None:
            # with value_residual, values stand behind the tokens
            if isinstance(output, tuple):
                output = output[0]
            into.append(output)

        return keep

    pairs = zip(indices, kept, strict=True)
    handles = [blocks[index].register_forward_hook(keeper(into)) for index, into in pairs]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def misalignment(early: list[Tensor], deep: list[Tensor]) -> Tensor:
    """Return 1 - the cosine between the tokens of both lists, averaged over f and n: (b,), in [0, 2].

    No gradient reaches ``deep``.
    """
    student = torch.cat(early, dim=1).float()  # (b f n d)
    target = torch.cat(deep, dim=1).detach().float()  # (b f n d)
    return 1 - F.cosine_similarity(student, target, dim=-1).flatten(1).mean(1)  # (b)
