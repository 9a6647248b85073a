# SPDX-License-Identifier: Apache-2.0
"""LatteText: captions to video (Latte, Sec. 4.4): PixArt's image transformer with a temporal block after each of its spatial blocks.

The mathematics are those of the released LatteT2V. What is ours: padding is never attended to, so a prompt's clip does not depend on the
prompts beside it; captions are not repeated per frame; stills ride behind the clip through the spatial blocks alone.
Axes: b batch, f clip frames, i stills, c channels, h w latent size, n tokens of a frame, d width, l tokens of a caption, k its channels,
g captions of a clip (1, or one for it and each still).
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latte.checks import InputError, choose, require
from latte.model.blocks import modulate
from latte.model.conditioning import Modulation, TimestepEmbedding
from latte.model.latte import SIZES, Latte, ModelConfig
from latte.model.patches import UniformPatch
from latte.model.positions import sincos, temporal_table
from latte.model.pretrained import SavedModel
from latte.model.text_blocks import CaptionProjection, SpaceBlock, TimeBlock

COARSE = 64  # latents of 2 x 64 and more count positions in steps of a half, of 3 x 64 in thirds, ...


@dataclass(frozen=True)
class TextConfig:
    """Everything that decides the weights' shapes. ``depth`` counts pairs of a spatial and a temporal block.

    ``depth``, ``width`` and ``heads`` override those of ``size``. ``latent_size`` is (h, w) or one number for a square. Positions of any
    size are scaled to the grid of ``table_size``, a square (None: of ``latent_size``); a model that started from another one keeps its.
    ``caption_channels`` is the width of the text encoder (4096 for T5 v1.1 XXL).
    ``gated_time`` multiplies the temporal table by a gate that starts at 0, so that a model can start as an image model, and that training
    opens to 1 (``open_gate``).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    size: str = "XL"
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    patch_size: int = 2
    num_frames: int = 16
    latent_size: int | tuple[int, int] = 64
    table_size: int | None = None
    latent_channels: int = 4
    caption_channels: int = 4096
    learn_sigma: bool = True
    gated_time: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.latent_size, list):  # JSON and YAML have no tuples
            object.__setattr__(self, "latent_size", tuple(self.latent_size))
        choose("model.size", self.size, SIZES)
        for name in ("num_frames", "latent_channels", "patch_size", "caption_channels"):
            require(
                getattr(self, name) >= 1,
                f"model.{name}",
                getattr(self, name),
                "it counts something",
                "give 1 or more",
            )
        depth, width, heads = self.dimensions
        require(depth >= 1, "model.depth", depth, "it counts pairs of blocks", "give 1 or more")
        require(
            width % 4 == 0 and width > 0,
            "model.width",
            width,
            "the spatial table codes sine and cosine of row and column",
            f"the nearest multiple of 4 is {max(round(width / 4), 1) * 4}",
        )
        require(
            heads > 0 and width % heads == 0,
            "model.heads",
            heads,
            f"the heads share a width of {width}",
            f"give a divisor of it, e.g. {next((h for h in range(max(heads, 1), 0, -1) if width % h == 0), 1)}",
        )
        for side in self.grid_size:
            self.check_side("model.latent_size", side)
        self.check_side("model.table_size", self.table_grid[0])

    def check_side(self, field: str, side: int) -> None:
        """InputError unless patches cover ``side`` exactly."""
        require(
            side > 0 and side % self.patch_size == 0,
            field,
            side,
            f"patches are {self.patch_size} x {self.patch_size}",
            f"the nearest multiple is {max(round(side / self.patch_size), 1) * self.patch_size}",
        )

    @property
    def tube(self) -> int:
        """Frames of a token: patches never span frames here."""
        return 1

    @property
    def num_classes(self) -> None:
        """Classes are not what it is told."""
        return

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """(depth, width, heads) after size and overrides."""
        depth, width, heads = SIZES[self.size]
        return (
            depth if self.depth is None else self.depth,
            self.width or width,
            heads if self.heads is None else self.heads,
        )

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        return (
            self.latent_size if isinstance(self.latent_size, tuple) else (self.latent_size, self.latent_size)
        )

    @property
    def table_grid(self) -> tuple[int, int]:
        """(h, w) of the latent that positions are scaled to."""
        return self.grid_size if self.table_size is None else (self.table_size, self.table_size)

    @property
    def spans(self) -> tuple[float, float]:
        """How far positions reach down and across, whatever the size: tokens of the table's grid, in coarser steps from 128 latents on."""
        down, across = (side // self.patch_size / max(side // COARSE, 1) for side in self.table_grid)
        return down, across


@lru_cache(maxsize=32)
def scaled_table(rows: int, columns: int, spans: tuple[float, float], width: int) -> Tensor:
    """(rows columns, width) float32, row by row: column, then row, at positions spread over ``spans`` (see TextConfig.spans)."""
    down, across = (
        torch.arange(n, dtype=torch.float64) * (span / n)
        for n, span in zip((rows, columns), spans, strict=True)
    )
    y, x = torch.meshgrid(down, across, indexing="ij")
    return torch.cat([sincos(x.flatten(), width // 2), sincos(y.flatten(), width // 2)], dim=1).float()


class LatteText(nn.Module, SavedModel):
    """The denoiser: ``LatteText(config)(z, t, text, mask=None, num_images=0, temporal=True)``."""

    config_class = TextConfig

    time_gate: (
        Tensor | None
    )  # (1,), with ``gated_time``: the share of the temporal table that is added; nothing learns it

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        depth, width, heads = config.dimensions
        self.patch = UniformPatch(config, width)
        self.time_embedding = TimestepEmbedding(width)
        self.modulation = Modulation(width, 6)
        self.caption = CaptionProjection(config.caption_channels, width)
        self.space_blocks = nn.ModuleList(SpaceBlock(width, heads) for _ in range(depth))
        self.time_blocks = nn.ModuleList(TimeBlock(width, heads) for _ in range(depth))
        self.register_buffer("time_gate", torch.zeros(1) if config.gated_time else None)
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final_table = nn.Parameter(torch.zeros(2, width))
        self.final_linear = nn.Linear(width, self.patch.out_features)
        self.gradient_checkpointing = False
        self.initialise()

    @property
    def blocks(self) -> list[nn.Module]:
        """All of them, in the order in which tokens go through."""
        return [block for pair in zip(self.space_blocks, self.time_blocks, strict=True) for block in pair]

    def initialise(self) -> None:
        """All of the initialisation: every block starts as the identity, and a fresh model predicts exactly 0."""
        if (
            self.final_linear.weight.is_meta
        ):  # nothing to fill, and drawing on the meta device imports torch's compiler: seconds
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(
            self.patch.proj.weight.view(self.patch.proj.out_channels, -1)
        )  # a linear layer on flattened patches
        nn.init.zeros_(self.patch.proj.bias)
        for linear in (self.time_embedding.fc1, self.time_embedding.fc2, self.caption.fc1, self.caption.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (
            self.modulation.linear,
            self.final_linear,
            *(block.cross.proj for block in self.space_blocks),
        ):
            nn.init.zeros_(linear.weight)

    def still_time(self) -> None:
        """Make the temporal blocks the identity whatever the shared modulation says: what their branches add starts at zero.

        With ``gated_time`` the model then treats every frame as an image of its own; without, only the temporal table tells frames apart.
        """
        for block in self.time_blocks:
            for linear in (block.attention.proj, block.mlp.fc2):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
        if self.time_gate is not None:
            self.open_gate(0.0)

    @property
    def opened(self) -> float:
        """The share of the temporal table that is added: all of it without ``gated_time``."""
        return 1.0 if self.time_gate is None else float(self.time_gate)

    @torch.no_grad()
    def open_gate(self, share: float) -> None:
        """Add ``share`` of the temporal table from here on, in place, so that a compiled model is not compiled again.

        At 1 the model is one without a gate. InputError for a share outside 0...1, and for a model without ``gated_time``.
        """
        require(0 <= share <= 1, "share", share, "it is a share of the temporal table", "give 0 to 1")
        if self.time_gate is None:
            raise InputError(
                "gated_time is False, but this opens a gate; make the model with gated_time=True"
            )
        self.time_gate.fill_(share)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        text: Tensor,
        mask: Tensor | None = None,
        num_images: int = 0,
        temporal: bool = True,
    ) -> Tensor:
        """Noisy latents z (b f+i c h w), timesteps t (b,) in 0...999, caption features -> (b f+i o h w), o = 2c with learned sigma.

        ``text`` is (b l k), or (b 1+i l k) with a caption per still; ``mask`` (b l) or (b 1+i l) is True where it is not padding, None
        when there is no padding. The last ``num_images`` of the frame axis are stills. ``temporal=False`` leaves the temporal blocks
        out: every frame is an image. So is the only frame of a clip, for which the temporal blocks run without a position.
        Raises InputError for channels and sizes that do not fit, and on the CPU for a caption that is nothing but padding.
        """
        text, mask = self.check(z, t, text, mask, num_images)
        c = self.time_embedding(t)[:, None]
        if not num_images:
            return self.denoise(z, c, text, mask, temporal)
        clip, stills = z.split(
            [z.shape[1] - num_images, num_images], dim=1
        )  # contiguous, so that the clip meets the same kernels
        own = text.shape[1] > 1
        texts = (text[:, :1].contiguous(), text[:, 1:]) if own else (text, text)
        masks = (
            (None, None) if mask is None else (mask[:, :1].contiguous(), mask[:, 1:]) if own else (mask, mask)
        )
        return torch.cat(
            [
                self.denoise(clip.contiguous(), c, texts[0], masks[0], temporal),
                self.denoise(stills, c, texts[1], masks[1], temporal=False),
            ],
            dim=1,
        )

    def denoise(self, z: Tensor, c: Tensor, text: Tensor, mask: Tensor | None, temporal: bool) -> Tensor:
        """Latents (b f c h w), timestep features (b 1 d), captions (b g l k) with g 1 or f -> (b f o h w)."""
        grid = z.shape[-2] // self.config.patch_size, z.shape[-1] // self.config.patch_size
        x = self.patch.embed(z)  # (b f n d)
        x = x + scaled_table(*grid, self.config.spans, x.shape[-1]).to(x)
        shared, text = self.modulation(c), self.caption(text)
        for index, (space, time) in enumerate(zip(self.space_blocks, self.time_blocks, strict=True)):
            x = self.run(space, x, shared, text, mask)
            if temporal:
                x = self.add_time(x) if index == 0 and x.shape[1] > 1 else x
                x = self.run(time, x, shared)
        shift, scale = (c[:, :, None] + row for row in self.final_table)  # each (b 1 1 d)
        return self.patch.unembed(self.final_linear(modulate(self.final_norm(x), shift, scale)), grid)

    def add_time(self, x: Tensor) -> Tensor:
        """Tokens (b f n d) plus the table of their frame; warns beyond the trained frames."""
        if x.shape[1] > self.config.num_frames:
            warnings.warn(
                f"{x.shape[1]} frames are more than the {self.config.num_frames} that this model was made for; "
                "the temporal table is extended",
                stacklevel=4,
            )
        table = temporal_table(x.shape[1], x.shape[-1]).to(x)[:, None]
        return x + (table if self.time_gate is None else self.time_gate.to(x) * table)

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """``block(*inputs)``, recomputed in the backward pass with ``gradient_checkpointing``."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def check(
        self, z: Tensor, t: Tensor, text: Tensor, mask: Tensor | None, num_images: int
    ) -> tuple[Tensor, Tensor | None]:
        """Refuse shapes that do not fit -> text (b g l k), mask (b g l) bool or None."""
        config, (b, frames, channels, *size) = self.config, z.shape
        require(
            channels == config.latent_channels,
            "z's channels",
            channels,
            f"the model takes {config.latent_channels}",
            "use the autoencoder that it was trained with",
        )
        require(
            0 <= num_images < frames,
            "num_images",
            num_images,
            f"z has {frames} frames in all",
            "leave at least one for the clip",
        )
        require(t.shape == (b,), "t's shape", tuple(t.shape), f"there are {b} clips", f"give {(b,)}")
        for side in size:
            config.check_side("z's size", side)
        if text.ndim == 3:
            text, mask = text[:, None], None if mask is None else mask[:, None]
        g, _, k = text.shape[1:] if text.ndim == 4 else (0, 0, 0)
        require(
            text.shape[0] == b and g in (1, 1 + num_images),
            "text's shape",
            tuple(text.shape),
            f"there are {b} clips with {num_images} stills each",
            "give (b l k), or (b 1+i l k)",
        )
        require(
            k == config.caption_channels,
            "text's channels",
            k,
            f"the model reads {config.caption_channels}",
            "use the text encoder that it was trained with",
        )
        if mask is not None:
            require(
                mask.shape == text.shape[:3],
                "mask's shape",
                tuple(mask.shape),
                f"text has {tuple(text.shape[:3])}",
                "give that",
            )
            mask = mask.bool()
            if mask.device.type == "cpu" and not bool(mask.any(-1).all()):
                raise InputError(
                    "mask is False for all of a caption, but there must be something to look at; keep an empty prompt's end token"
                )
        return text, mask


Network = Latte | LatteText
"""A denoiser of either kind: told a class, or a caption."""


def network(config: ModelConfig | TextConfig) -> Network:
    """A fresh model of either kind."""
    return Latte(config) if isinstance(config, ModelConfig) else LatteText(config)
