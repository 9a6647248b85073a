# SPDX-License-Identifier: Apache-2.0
"""Training options that read or cut the tokens between blocks, without parameters of their own.

LayerSync (Haghighi et al. 2025, arXiv 2510.12581) pulls the tokens after an early block towards those after a
deeper one, which are detached. The paper aligns block 8 of SiT-XL's 28 with block 16; here the same fractions
of the depth. Alignment with the codec (after SRA 2, Wang et al. 2026, arXiv 2601.17830) makes the same early
tokens predict the clean latent; through a fixed random projection, where the paper trains an MLP, so that no
weights are kept that sampling has no use for. Token routing (TREAD, Krause et al. 2025, arXiv 2501.04765)
takes some positions of every frame around the middle half of the blocks.
Axes: b batch, f frames (and images), n tokens of a frame, d width, c channels, h w latent size, p patch side,
s frames of a token, k tokens of a frame that are not routed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latte.checks import InputError, check
from latte.model.config import DenoiserConfig
from latte.runtime import generator
from latte.training.config import BETWEEN_BLOCKS, TrainConfig

FEWEST_BLOCKS = 4


def check_network(config: TrainConfig, network: DenoiserConfig) -> None:
    """InputError for settings that a model of ``network`` cannot be trained with."""
    if any(getattr(config, name) for name in BETWEEN_BLOCKS):
        layer_pair(network.num_blocks)
    tube = network.frames_per_token
    check(
        not (config.codec_align and config.num_images and tube > 1),
        f"train.codec_align has no latent of an image that fits a token of {tube} frames; give "
        "model.patch=uniform, or train.num_images=0",
    )
    extra = {"conditioning": "s_adaln", "value_residual": False}
    for name, usual in extra.items():
        value = getattr(network, name, usual)
        check(
            not (config.route or config.codec_align) or value == usual,
            f"train.route and train.codec_align need a token for each patch alone, but model.{name} is "
            f"{value}; give model.{name}={str(usual).lower()}, or turn the option off",
        )
    check(
        not config.frame_noise or tube == 1,
        f"train.frame_noise is {config.frame_noise}, but a token of this model covers {tube} latent frames, "
        "which have one noise level; give model.patch=uniform, or train.frame_noise=0",
    )


def layer_pair(depth: int) -> tuple[int, int]:
    """Return the indices of the aligned blocks and of their target: after 2/7 and 4/7 of ``depth`` blocks.

    InputError for fewer than FEWEST_BLOCKS blocks, among which there is no such pair.
    """
    if depth < FEWEST_BLOCKS:
        raise InputError(
            f"train.{', train.'.join(BETWEEN_BLOCKS)} act between blocks inside the model, but it has "
            f"{depth}; give a model of at least {FEWEST_BLOCKS} blocks, or 0 for each of them"
        )
    return max(2 * depth // 7, 1) - 1, 4 * depth // 7 - 1


def routed_blocks(depth: int) -> range:
    """Return the indices of the blocks that routed tokens pass by: the middle half of ``depth`` blocks."""
    return range(depth // 4, depth - depth // 4)


@contextmanager
def captured(model: Any, indices: Sequence[int]) -> Iterator[list[list[Tensor]]]:
    """Yield a list for each of ``indices`` that receives the tokens (b f n d) after that block, an entry per
    call.

    A model calls its blocks twice when images follow the clip.
    """
    blocks = list(model.blocks)
    kept: list[list[Tensor]] = [[] for _ in indices]

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


def distance_to_latent(early: list[Tensor], z0: Tensor, patch_size: int, tube: int) -> Tensor:
    """Return the smooth L1 distance between projected tokens (b f n d) and the clean latent z0 (b sf c h w):
    (b,).
    """
    target = latent_tokens(z0, patch_size, tube)  # (b f n scpp)
    tokens = torch.cat(early, dim=1).float()  # (b f n d)
    shape = tokens.shape[-1], target.shape[-1]
    stream = generator(0, "latent projection", *shape)
    projection = torch.randn(shape, generator=stream).to(tokens) / shape[0] ** 0.5  # (d scpp)
    return F.smooth_l1_loss(tokens @ projection, target, reduction="none").flatten(1).mean(1)  # (b)


def latent_tokens(z: Tensor, patch_size: int, tube: int) -> Tensor:
    """Return the numbers of the latent (b sf c h w) that each token covers: (b f n scpp)."""
    b, _, _, h, w = z.shape
    p = patch_size
    z = z.reshape(b, -1, tube, z.shape[2], h // p, p, w // p, p)  # (b f s c h/p p w/p p)
    return z.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(4).flatten(2, 3)  # (b f n scpp)


def kept_tokens(share: float, tokens: int, streams: Sequence[torch.Generator]) -> Tensor:
    """Return the indices (b k), rising, of a random ``1 - share`` of ``tokens``: one at least."""
    count = max(round((1 - share) * tokens), 1)
    rows = [torch.randperm(tokens, generator=stream)[:count].sort().values for stream in streams]
    return torch.stack(rows)  # (b k)


@contextmanager
def routed(model: Any, blocks: range, kept: Tensor) -> Iterator[None]:
    """Inside, ``blocks`` of ``model`` see only the ``kept`` (b k) positions of every frame; behind the last
    of them the other tokens return as they were.
    """
    whole: list[Tensor] = []

    def places(x: Tensor) -> Tensor:
        return kept.to(x.device)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])  # (b f k d)

    def leave(block: Any, inputs: Any) -> Any:
        x, *rest = inputs
        whole.append(x)
        return x.gather(2, places(x)), *rest

    def come_back(block: Any, inputs: Any, output: Tensor) -> Tensor:
        x = whole.pop()
        return x.scatter(2, places(x), output.to(x.dtype))

    first, last = (model.blocks[index] for index in (blocks[0], blocks[-1]))
    handles = [first.register_forward_pre_hook(leave), last.register_forward_hook(come_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
