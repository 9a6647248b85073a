# SPDX-License-Identifier: Apache-2.0
"""What all denoisers share: the checks of their configuration, their initialisation, and one interface.

A denoiser is called as ``model(z, t, **condition, num_images=i)``: noisy latents, timesteps and its own
condition in, prediction out. Training, guidance, sampling and profiling pass the condition through as a
dictionary and never ask for the class.
Axes: b batch, f clip frames, i images, c channels, h w latent size.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latte.checks import check
from latte.model.attention_options import ValueResidual
from latte.model.blocks import modulate
from latte.model.conditioning import Modulation
from latte.model.config import DenoiserConfig as DenoiserConfig
from latte.model.fused import Modulated, is_plain, modulated_linear
from latte.model.pretrained import SavedModel
from latte.model.sequence import SequenceParallel


def condition_shape(clips: int, num_images: int) -> tuple[int, ...]:
    """Return the shape of a batch's labels: (b,), with images (b, 1+i)."""
    if num_images:
        return clips, 1 + num_images
    return (clips,)


CHECKPOINTED_BLOCKS: dict[bool | str, int] = {False: 1, True: 1, "pairs": 2}
"""``gradient_checkpointing`` -> the blocks of a stage: with pairs half as many inputs are kept."""


class Denoiser(nn.Module, SavedModel):
    """A model that predicts noise (or velocity) from noisy latents. Abstract: Latte and LatteText.

    ``model(z, t, **condition, num_images=i)`` returns (b f+i o h w) for noisy latents z (b f+i c h w) and
    timesteps t (b,) in 0...999; o = 2c with a learned variance, else c. The last ``num_images`` frames are
    images: each is denoised by itself.
    """

    blocks: Any  # all blocks in the order of the forward pass
    patch: Any
    blocks: Any  # the blocks in the order of the forward pass
    time_embedding: Any
    final_norm: nn.LayerNorm
    final_linear: nn.Linear
    recomputes: bool = False
    sequence: SequenceParallel | None = None
    """The processes that share each clip, None for this one alone."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.gradient_checkpointing: bool | str = False  # a key of CHECKPOINTED_BLOCKS
        self.trained_extent: tuple[int, int, int] = (config.num_frames, *config.grid_size)

    def trained_on(self, shapes: Iterable[Sequence[int]]) -> None:
        """Count latents of ``shapes`` (f, h, w) among those of training: up to the most frames, rows and
        columns of any, positions are extended without a warning.
        """
        frames, rows, columns = zip(*(self.trained_extent, *shapes), strict=True)
        self.trained_extent = max(frames), max(rows), max(columns)

    def example_condition(self, clips: int, num_images: int = 0, tokens: int = 1) -> dict[str, Tensor]:
        """Return a condition of the right shapes on torch's default device, for measuring cost.

        ``tokens`` are those of a caption, with its padding.
        """
        raise NotImplementedError

    @property
    def opened(self) -> float:
        """How much of the temporal position table is added, 0 to 1; all of it without ``gated_time``."""
        return 1.0

    def initialise(self) -> None:
        """Initialise all weights.

        Every adaLN-Zero block is the identity, and a fresh model predicts exactly 0 (Latte, Sec. 3.3.2).
        """
        for module in self.modules():
            if isinstance(module, ValueResidual):  # of the first attention
                module.share = None
                break
        if self.final_linear.weight.is_meta:  # filling it would import torch's compiler, for nothing
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.patch.initialise()
        for weight in self.embedding_weights():
            nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):  # so that every gate alpha starts at 0
                nn.init.zeros_(module.linear.weight)
        for weight in self.zero_weights():
            nn.init.zeros_(weight)

    def embedding_weights(self) -> Iterable[Tensor]:
        """Yield weights that start as a normal distribution of standard deviation 0.02, in order."""
        yield self.time_embedding.fc1.weight
        yield self.time_embedding.fc2.weight

    def zero_weights(self) -> Iterable[Tensor]:
        """Yield weights, beside the modulations', that start at 0."""
        yield self.final_linear.weight

    def recompute(self, enabled: bool) -> None:
        """Make the backward pass recompute norms, modulation, GELU and gates, or save them: same output, less
        memory.
        """
        self.recomputes = enabled
        for block in self.blocks:
            block.recompute = enabled

    def last_layer(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return outputs (b f n o) of tokens (b f n d): norm, modulation and linear layer."""
        lean = self.recomputes and torch.is_grad_enabled() and is_plain(self.final_linear)
        if lean and shift is not None and scale is not None:
            return modulated_linear(self.final_linear, Modulated(x, shift, scale, self.final_norm.eps))
        return self.final_linear(modulate(self.final_norm(x), shift, scale))

    def run_block(self, block: nn.Module, *inputs: Any, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return tokens and the first attention's values, None without ``value_residual``."""
        if self.config.value_residual:
            return block(*inputs, first)
        return block(*inputs), None

    def run_blocks(
        self, part: range, x: Tensor, first: Tensor | None, *condition: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens (b f n d) after the blocks of indices ``part``, and ``first``, see ``run_block``."""
        raise NotImplementedError

    def run_all_blocks(self, x: Tensor, *condition: Any) -> Tensor:
        """Return tokens (b f n d) after all blocks.

        With ``gradient_checkpointing`` only the inputs of every stage, a block or a pair of them, are kept,
        and the backward pass computes the stage again.
        """
        size = CHECKPOINTED_BLOCKS.get(self.gradient_checkpointing, 1)
        first = None  # the first attention's values, with value_residual
        for start in range(0, len(self.blocks), size):
            part = range(start, min(start + size, len(self.blocks)))
            inputs = (part, x, first, *condition)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                output: Any = checkpoint(self.run_blocks, *inputs, use_reentrant=False)
            else:
                output = self.run_blocks(*inputs)
            x, first = output
        return x

    def own_frames(self, tube: int, images: bool, z: Tensor, *conditions: Any) -> tuple[Any, ...]:
        """Return this process's frames of latents (b f c h w), ``tube`` per token, and of conditions
        (b f ...); (b 1 ...) and None as they are.
        """
        if self.sequence is None:
            return z, *conditions
        count = z.shape[1] // tube
        if not images:
            self.sequence.frames = count
        part = self.sequence.part(count)
        own = [c if c is None or c.shape[1] == 1 else c[:, part] for c in conditions]
        return z[:, tube * part.start : tube * part.stop], *own

    def all_frames(self, output: Tensor, like: Tensor, tube: int) -> Tensor:
        """Return the output (b f o h w) of all frames of latents ``like``, from that of ``own_frames``."""
        if self.sequence is None:
            return output
        return self.sequence.gathered(output, like.shape[1] // tube, tube)

    def embed_time(self, t: Tensor) -> Tensor:
        """Return the embedding (b 1 d) of timesteps (b,), or (b f d) of a timestep per frame (b f)."""
        if t.ndim == 1:
            return self.time_embedding(t)[:, None]  # (b 1 d)
        return self.time_embedding(t.flatten()).unflatten(0, t.shape)  # (b f d)

    def check_latent(self, z: Tensor, t: Tensor, num_images: int) -> None:
        """Raise InputError when z, t and num_images do not fit each other or the model."""
        config = self.config
        check(
            z.ndim == 5, f"z has shape {tuple(z.shape)}, but must be (clips, frames, channels, height, width)"
        )
        b, frames, channels, *size = z.shape
        check(
            channels == config.latent_channels,
            f"z has {channels} channels, but the model takes {config.latent_channels}; use the autoencoder "
            "it was trained with",
        )
        check(
            0 <= num_images < frames,
            f"num_images is {num_images}, but z has {frames} frames in all; leave at least one for the clip",
        )
        per_frame = (b, frames)
        check(
            t.shape == (b,) or (t.shape == per_frame and num_images == 0 and config.frames_per_token == 1),
            f"t has shape {tuple(t.shape)}, but must be ({b},), one timestep per clip, or without images and "
            f"tubes {per_frame}, one per frame",
        )
        for side in size:
            config.check_side("the height or width of z", side)

    def warn_about_frames(self, frames: int) -> None:
        """Warn when a clip has more frames than the model was trained on."""
        most = self.trained_extent[0]
        if frames > most:
            warnings.warn(
                f"{frames} latent frames are more than the {most} the model was trained on; the temporal "
                "table is extended",
                stacklevel=4,
            )
