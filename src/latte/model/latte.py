# SPDX-License-Identifier: Apache-2.0
"""Latte: patchify -> transformer blocks -> unpatchify (arXiv 2401.03048, Sec. 3).

A latent clip becomes tokens, transformer blocks attend over space and over time, and every token returns its
patch of predicted noise and of the variance's interpolation. One class serves every variant, clips alone and
clips with images: images follow the clip on the frame axis, and pass through the spatial half of the same
backbone by themselves (Sec. 3.3.4).
Axes: b batch, f clip frames, i images, c channels, h w latent size, n tokens of a frame, d width, o output
channels.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from latte.checks import InputError, check
from latte.model.conditioning import NULL_LABEL, LabelEmbedding, TimestepEmbedding
from latte.model.config import CONDITIONINGS, PATCHES, SIZES, TEMPORAL_POSITIONS, ModelConfig
from latte.model.denoiser import Denoiser, condition_shape
from latte.model.fused import again
from latte.model.positions import spatial_table
from latte.model.variants import Parts

__all__ = ["SIZES", "Latte", "ModelConfig"]


class Latte(Denoiser):
    """The denoiser of a class or of nothing: ``Latte(config)(z, t, label=None, num_images=0)``."""

    config_class = ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        depth, width, heads = config.dimensions
        head_width = width // (heads // config.variant_spec.heads_multiple)
        self.patch = PATCHES[config.patch](config, width)
        self.position = TEMPORAL_POSITIONS[config.temporal_position](head_width)
        self.conditioning = CONDITIONINGS[config.conditioning]
        self.time_embedding = TimestepEmbedding(width)
        self.label_embedding = None
        if config.num_classes is not None:
            self.label_embedding = LabelEmbedding(config.num_classes, width)
        parts = Parts(width, heads, self.conditioning, self.position, config.block_options)
        self.blocks = nn.ModuleList(config.variant_spec.blocks(parts, depth))
        self.time_enters = config.variant_spec.time_enters(depth)
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=self.conditioning.affine_norm)
        self.final_modulation = self.conditioning.final_modulation(width)
        self.final_linear = nn.Linear(width, self.patch.out_features)
        self.initialise()

    def embedding_weights(self) -> Iterable[Tensor]:
        """Yield weights that start as a normal distribution of standard deviation 0.02."""
        yield from super().embedding_weights()
        if self.label_embedding is not None:
            yield self.label_embedding.table.weight

    def example_condition(self, clips: int, num_images: int = 0, tokens: int = 1) -> dict[str, Tensor]:
        """Return {"label": (b,) or (b 1+i)} of class 0; nothing for an unconditional model."""
        if self.label_embedding is None:
            return {}
        return {"label": torch.zeros(condition_shape(clips, num_images), dtype=torch.long)}

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None, num_images: int = 0) -> Tensor:
        """Return (b f+i o h w) for noisy latents z (b f+i c h w) and timesteps t (b,) or (b f); o = 2c or c.

        The last ``num_images`` frames are images. ``label`` is (b,), or (b 1+i) with a label per image; None
        is the null class. InputError for wrong channels, sizes that the patches do not divide, and labels
        that do not fit.
        """
        self.check_latent(z, t, num_images)
        self.warn_about_size(z, num_images)
        c = self.embed_condition(t, label, num_images)  # (b 1|1+i d)
        if not num_images:
            return self.denoise(z, c)
        clip, images = z.split([z.shape[1] - num_images, num_images], dim=1)
        image_c = c[:, 1:]  # (b i d)
        if c.shape[1] == 1:
            image_c = c  # (b 1 d)
        # contiguous, so that the clip meets the same kernels as without images
        clip = self.denoise(clip.contiguous(), c[:, :1].contiguous())
        return torch.cat([clip, self.denoise(images, image_c, images=True)], dim=1)  # (b f+i o h w)

    def embed_condition(self, t: Tensor, label: Tensor | None, num_images: int) -> Tensor:
        """Return c (b 1|f d) of timesteps (b,) or (b f) and labels (b,), or (b 1+i d) of labels (b 1+i)."""
        c = self.embed_time(t)  # (b 1|f d)
        if self.label_embedding is None:
            if label is not None:
                raise InputError("label was given, but this model is unconditional; leave the label out")
            return c
        b = len(t)
        if label is None:
            label = t.new_full((b,), NULL_LABEL, dtype=torch.long)
        check(
            label.shape in ((b,), (b, 1 + num_images)),
            f"label has shape {tuple(label.shape)}, but {b} clips with {num_images} images each need ({b},) "
            f"or ({b}, {1 + num_images})",
        )
        return c + self.label_embedding(label.reshape(b, -1))  # (b 1|1+i d)

    def denoise(self, z: Tensor, c: Tensor, images: bool = False) -> Tensor:
        """Return (b f o h w) for latents (b f c h w) and condition (b f|1 d); ``images`` mix no frames."""
        grid = z.shape[-2] // self.config.patch_size, z.shape[-1] // self.config.patch_size
        tube = 1 if images else self.patch.tube
        own, c = self.own_frames(tube, images, z, c)
        x = self.patch.embed(own, images).to(z.dtype)  # (b f n d)
        x = x + spatial_table(*grid, x.shape[-1]).to(x)
        x = self.conditioning.enter(x, c)  # (b f n d), n+1 with all_tokens
        x = self.run_all_blocks(x, c, images)
        modulation = again(self.final_modulation) if self.recomputes else self.final_modulation
        x = self.last_layer(self.conditioning.leave(x), *modulation(c))  # (b f n ppo)
        return self.all_frames(self.patch.unembed(x, grid, images), z, tube)  # (b f o h w)

    def run_blocks(
        self, part: range, x: Tensor, first: Tensor | None, *condition: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens (b f n d) after some blocks; ``condition``: c (b f|1 d), and whether x are images."""
        c, images = condition
        for index in part:
            block = self.blocks[index]
            if index == self.time_enters and not images:
                start = self.sequence.first_frame if self.sequence else 0
                x = self.position.add(x, start)
            x, first = self.run_block(block, x, c, images, first=first)
        return x, first

    def warn_about_size(self, z: Tensor, num_images: int) -> None:
        """Warn outside the range of training: more frames, or larger latents."""
        if not self.position.free_length:
            self.warn_about_frames(z.shape[1] - num_images)
        h, w = z.shape[-2:]
        _, rows, columns = self.trained_extent
        if h > rows or w > columns:
            warnings.warn(
                f"latents of {h} x {w} are larger than the {rows} x {columns} the model was trained on; the "
                "spatial table is extended",
                stacklevel=3,
            )
