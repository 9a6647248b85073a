# SPDX-License-Identifier: Apache-2.0
"""LatteText: captions to video (Latte, Sec. 4.4): PixArt's image transformer with a temporal block after each
spatial block.

The mathematics are those of the released LatteT2V. Three things differ from it: padding is never attended to,
so a prompt's clip does not depend on the prompts beside it; captions are not repeated per frame; images
follow the clip and pass through the spatial blocks alone.
Axes: b batch, f clip frames, i images, c channels, h w latent size, n tokens of a frame, d width, l tokens of
a caption, k its channels, g captions of a clip (1, or one for it and each image), o output channels.
"""

from collections.abc import Container, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from latte.checks import InputError, check
from latte.model.conditioning import Modulation, TimestepEmbedding
from latte.model.config import ModelConfig, TextConfig
from latte.model.denoiser import Denoiser, condition_shape
from latte.model.patches import UniformPatch
from latte.model.positions import sincos, temporal_table
from latte.model.text_blocks import CaptionProjection, PooledCaption, SpaceBlock, TimeBlock


@lru_cache(maxsize=32)
def scaled_table(rows: int, columns: int, spans: tuple[float, float], width: int) -> Tensor:
    """Return (rows columns, width) float32, row by row: column, then row, spread over ``spans``."""
    down = torch.arange(rows, dtype=torch.float64) * (spans[0] / rows)
    across = torch.arange(columns, dtype=torch.float64) * (spans[1] / columns)
    y, x = torch.meshgrid(down, across, indexing="ij")
    return torch.cat([sincos(x.flatten(), width // 2), sincos(y.flatten(), width // 2)], dim=1).float()


class LatteText(Denoiser):
    """The denoiser of a caption: ``LatteText(config)(z, t, text, mask=None, num_images=0)``."""

    config_class = TextConfig

    space_blocks: Any  # nn.ModuleList of SpaceBlock
    time_blocks: Any  # nn.ModuleList of TimeBlock
    time_gate: Tensor | None  # (1,) with ``gated_time``: how much of the temporal table is added; a buffer

    def __init__(self, config: TextConfig):
        super().__init__(config)
        depth, width, heads = config.dimensions
        self.patch = UniformPatch(config, width)
        self.time_embedding = TimestepEmbedding(width)
        self.modulation = Modulation(width, 6)
        self.caption = CaptionProjection(config.caption_channels, width)
        self.pooled = PooledCaption(width) if config.pooled_caption else None
        options = config.block_options
        self.space_blocks = nn.ModuleList(SpaceBlock(width, heads, options) for _ in range(depth))
        self.time_blocks = nn.ModuleList(TimeBlock(width, heads, options) for _ in range(depth))
        self.register_buffer("time_gate", torch.zeros(1) if config.gated_time else None)
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_table = nn.Parameter(torch.zeros(2, width))
        self.final_linear = nn.Linear(width, self.patch.out_features)
        self.initialise()

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order of the forward pass."""
        return [block for pair in zip(self.space_blocks, self.time_blocks, strict=True) for block in pair]

    def embedding_weights(self) -> Iterable[Tensor]:
        """Yield weights that start as a normal distribution of standard deviation 0.02."""
        yield from super().embedding_weights()
        yield self.caption.fc1.weight
        yield self.caption.fc2.weight

    def zero_weights(self) -> Iterable[Tensor]:
        """Yield weights that start at 0: cross-attention has no gate, so its output does (PixArt)."""
        yield from super().zero_weights()
        if self.pooled is not None:
            yield self.pooled.linear.weight
        for block in self.space_blocks:
            yield block.cross.proj.weight

    def example_condition(self, clips: int, num_images: int = 0, tokens: int = 1) -> dict[str, Tensor]:
        """Return {"text": (b l k), "mask": (b l)}, with images (b 1+i l k) and (b 1+i l)."""
        shape = (*condition_shape(clips, num_images), tokens)
        text = torch.zeros(*shape, self.config.caption_channels)
        return {"text": text, "mask": torch.ones(shape, dtype=torch.bool)}

    def zero_time_blocks(self) -> None:
        """Make the temporal blocks the identity: the output of each of their branches becomes 0.

        With ``gated_time`` the model then treats every frame as an image of its own; without, only the
        temporal table distinguishes the frames.
        """
        for block in self.time_blocks:
            for linear in (block.attention.proj, block.mlp.fc2):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        if self.time_gate is not None:
            self.open_gate(0.0)

    @property
    def opened(self) -> float:
        """How much of the temporal table is added: all of it without ``gated_time``."""
        if self.time_gate is None:
            return 1.0
        return float(self.time_gate)

    @torch.no_grad()
    def open_gate(self, opened: float) -> None:
        """Set how much of the temporal table is added, in place, so that a compiled model stays compiled.

        At 1 the model is one without a gate. InputError outside 0...1, and for a model without
        ``gated_time``.
        """
        check(0 <= opened <= 1, f"the temporal gate must be between 0 and 1, got {opened}")
        if self.time_gate is None:
            raise InputError("this model has no temporal gate; make it with gated_time=True")
        self.time_gate.fill_(opened)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        num_images: int = 0,
        temporal: bool = True,
    ) -> Tensor:
        """Return (b f+i o h w) for noisy latents z (b f+i c h w), timesteps t and captions; o = 2c or c.

        ``t`` is (b,), or (b f) with a timestep per frame and no images.
        ``text`` is (b l k), or (b 1+i l k) with a caption per image; ``mask`` (b l) or (b 1+i l) is True
        where it is not padding, None when there is no padding. The last ``num_images`` frames are images.
        ``temporal=False`` leaves the temporal blocks out: every frame is an image. So is the only frame of a
        clip, for which the temporal blocks run without a position. InputError for channels and sizes that do
        not fit, and on the CPU for a caption that is nothing but padding.
        """
        self.check_latent(z, t, num_images)
        text, mask = self.check_text(text, mask, len(z), num_images)
        c = self.embed_time(t)  # (b 1|f d)
        if not num_images:
            return self.denoise(z, c, text, mask, temporal)
        clip, images = z.split([z.shape[1] - num_images, num_images], dim=1)
        clip_text = image_text = text
        clip_mask = image_mask = mask
        if text.shape[1] > 1:  # a caption per image
            clip_text = text[:, :1].contiguous()  # (b 1 l k)
            image_text = text[:, 1:]  # (b i l k)
            if mask is not None:
                clip_mask = mask[:, :1].contiguous()  # (b 1 l)
                image_mask = mask[:, 1:]  # (b i l)
        # contiguous, so that the clip meets the same kernels as without images
        clip = self.denoise(clip.contiguous(), c, clip_text, clip_mask, temporal)
        images = self.denoise(images, c, image_text, image_mask, temporal=False)
        return torch.cat([clip, images], dim=1)  # (b f+i o h w)

    def denoise(self, z: Tensor, c: Tensor, text: Tensor, mask: Tensor | None, temporal: bool) -> Tensor:
        """Return (b f o h w) for latents (b f c h w), timesteps c (b 1 d), captions (b g l k), g 1 or f."""
        grid = z.shape[-2] // self.config.patch_size, z.shape[-1] // self.config.patch_size
        own, c, text, mask = self.own_frames(1, not temporal, z, c, text, mask)
        x = self.patch.embed(own).to(z.dtype)  # (b f n d)
        x = x + scaled_table(*grid, self.config.spans, x.shape[-1]).to(x)
        text = self.caption(text)  # (b g l d)
        if self.pooled is not None:
            c = c + self.pooled(text, mask)  # (b 1|f d)
        shared = self.modulation(c)  # 6 chunks, each (b 1|f 1 d)
        x = self.run_all_blocks(x, shared, text, mask, temporal)
        shift, scale = (c[:, :, None] + row for row in self.final_table)  # each (b 1 1 d)
        x = self.last_layer(x, shift, scale)  # (b f n ppo)
        return self.all_frames(self.patch.unembed(x, grid), z, 1)  # (b f o h w)

    def run_blocks(
        self, part: range, x: Tensor, first: Tensor | None, *condition: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return tokens (b f n d) after some blocks, spatial and temporal ones in turn."""
        shared, text, mask, temporal = condition
        for index in part:
            block = self.blocks[index]
            if index % 2 == 0:
                x, first = self.run_block(block, x, shared, text, mask, first=first)
            elif temporal:
                if index == 1 and (self.sequence or x.shape[1] > 1):
                    x = self.add_time(x)
                x, first = self.run_block(block, x, shared, first=first)
        return x, first

    def add_time(self, x: Tensor) -> Tensor:
        """Return tokens (b f n d) plus the table of their frame; warns beyond the frames of training."""
        frames = x.shape[1]
        part = slice(None)
        if self.sequence:
            frames = self.sequence.frames
            part = self.sequence.part(frames)
        self.warn_about_frames(frames)
        table = temporal_table(frames, x.shape[-1]).to(x)[part, None]  # (f 1 d)
        if self.time_gate is not None:
            table = self.time_gate.to(x) * table
        return x + table

    def check_text(
        self, text: Tensor, mask: Tensor | None, b: int, num_images: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return text (b g l k) and mask (b g l) bool or None; InputError for shapes that do not fit."""
        given_shape = tuple(text.shape)
        if text.ndim == 3:
            text = text[:, None]  # (b 1 l k)
            if mask is not None:
                mask = mask[:, None]  # (b 1 l)
        check(
            text.ndim == 4 and text.shape[0] == b and text.shape[1] in (1, 1 + num_images),
            f"text has shape {given_shape}, but {b} clips with {num_images} images each need (b l k) or (b "
            "1+i l k)",
        )
        channels = text.shape[3]
        check(
            channels == self.config.caption_channels,
            f"text has {channels} channels, but the model takes {self.config.caption_channels}; use the text "
            "encoder it was trained with",
        )
        if mask is None:
            return text, None
        check(
            mask.shape == text.shape[:3],
            f"mask has shape {tuple(mask.shape)}, but text has {tuple(text.shape[:3])} in front of its "
            "channels",
        )
        mask = mask.bool()
        if torch.compiler.is_compiling():  # reading a value would end the graph
            torch.ops.aten._assert_async.msg(mask.any(-1).all(), "mask is False for a whole caption")
        elif mask.device.type == "cpu" and not bool(mask.any(-1).all()):
            raise InputError("mask is False for a whole caption; keep at least an empty prompt's end token")
        return text, mask


def config_class(keys: Container[str]) -> type[ModelConfig] | type[TextConfig]:
    """Return the configuration class that ``keys`` belong to, such as those of a stored config.json."""
    return TextConfig if "caption_channels" in keys else ModelConfig
