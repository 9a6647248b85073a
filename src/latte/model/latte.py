# SPDX-License-Identifier: Apache-2.0
"""Latte: embed -> backbone -> unembed (arXiv 2401.03048, Sec. 3).

A latent clip becomes tokens, transformer blocks attend over space and over time, and every token gives back its patch of predicted
noise and of the variance's interpolation. One class serves every variant, clips and clips with stills: stills ride behind the clip
on the frame axis, and go through the spatial half of the same backbone by themselves.
Axes: b batch, f clip frames, i stills, c channels, h w latent size, n tokens of a frame, d width.
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latte.checks import InputError, choose, require
from latte.model.blocks import modulate
from latte.model.conditioning import CONDITIONINGS, LabelEmbedding, TimestepEmbedding
from latte.model.patches import PATCHES
from latte.model.positions import TEMPORAL_POSITIONS, spatial_table
from latte.model.pretrained import SavedModel
from latte.model.variants import VARIANTS, Parts, Variant

SIZES = {  # Table 4:  blocks  width  heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the weights' shapes. ``depth``, ``width`` and ``heads`` override those of ``size``.

    ``size``'s depth is that of variant 1; the others get as many blocks as fit its parameters (23 for variants 3 and 4 at XL).
    ``latent_size`` is (h, w) or one number for a square; ``num_classes=None`` is unconditional.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    size: str = "XL"
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    variant: int | str = 1
    patch: str = "uniform"
    patch_size: int = 2
    tube: int = 2
    conditioning: str = "s_adaln"
    temporal_position: str = "absolute"
    num_frames: int = 16
    latent_size: int | tuple[int, int] = 32
    latent_channels: int = 4
    num_classes: int | None = None
    class_dropout: float = 0.1
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.variant, str) and self.variant.isdigit():
            object.__setattr__(self, "variant", int(self.variant))
        if isinstance(self.latent_size, list):  # JSON and YAML have no tuples
            object.__setattr__(self, "latent_size", tuple(self.latent_size))
        choose("model.size", self.size, SIZES)
        choose("model.patch", self.patch, PATCHES)
        choose("model.conditioning", self.conditioning, CONDITIONINGS)
        choose("model.temporal_position", self.temporal_position, TEMPORAL_POSITIONS)
        for name in ("num_frames", "latent_channels", "patch_size", "tube"):
            require(
                getattr(self, name) >= 1,
                f"model.{name}",
                getattr(self, name),
                "it counts something",
                "give 1 or more",
            )
        require(
            self.num_classes is None or self.num_classes >= 1,
            "model.num_classes",
            self.num_classes,
            "a class model has classes",
            "give 1 or more, or null for an unconditional model",
        )
        require(
            0 <= self.class_dropout < 1,
            "model.class_dropout",
            self.class_dropout,
            "it is a share",
            "give 0 to below 1",
        )
        width, heads = self.dimensions[1:]
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
        self.variant_spec.check(self.dimensions[0], heads)
        for side in self.grid_size:
            require(
                side % self.patch_size == 0,
                "model.latent_size",
                side,
                f"patches are {self.patch_size} x {self.patch_size}",
                f"the nearest multiple is {max(round(side / self.patch_size), 1) * self.patch_size}",
            )
        if self.patch == "compression":
            require(
                self.num_frames % self.tube == 0,
                "model.num_frames",
                self.num_frames,
                f"tubes hold {self.tube} frames",
                f"the nearest multiple is {max(round(self.num_frames / self.tube), 1) * self.tube}",
            )

    @property
    def variant_spec(self) -> Variant:
        """The line of VARIANTS."""
        return choose("model.variant", self.variant, VARIANTS)

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """(depth, width, heads) after size, overrides and the variant's parameter budget."""
        depth, width, heads = SIZES[self.size]
        return self.depth or self.variant_spec.depth(depth), self.width or width, self.heads or heads

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        return (
            self.latent_size if isinstance(self.latent_size, tuple) else (self.latent_size, self.latent_size)
        )


class Latte(nn.Module, SavedModel):
    """The denoiser: ``Latte(config)(z, t, label=None, num_images=0)``."""

    config_class = ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        depth, width, heads = config.dimensions
        self.patch = PATCHES[config.patch](config, width)
        self.position = TEMPORAL_POSITIONS[config.temporal_position](
            width // self.heads_per_attention(config)
        )
        self.conditioning = CONDITIONINGS[config.conditioning]
        self.time_embedding = TimestepEmbedding(width)
        self.label_embedding = (
            LabelEmbedding(config.num_classes, width) if config.num_classes is not None else None
        )
        parts = Parts(width, heads, self.conditioning, self.position)
        self.blocks = nn.ModuleList(config.variant_spec.blocks(parts, depth))
        self.time_enters = config.variant_spec.time_enters(depth)
        self.final_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=self.conditioning.affine_norm)
        self.final_modulation = self.conditioning.final_modulation(width)
        self.final_linear = nn.Linear(width, self.patch.out_features)
        self.gradient_checkpointing = False
        self.initialise()

    @staticmethod
    def heads_per_attention(config: ModelConfig) -> int:
        """Heads of one attention: half of them where the variant splits them between space and time."""
        return config.dimensions[2] // config.variant_spec.heads_multiple

    def initialise(self) -> None:
        """All of the initialisation. With S-AdaLN every block starts as the identity, and any fresh model predicts exactly 0."""
        if self.final_linear.weight.is_meta:  # nothing to fill, and drawing there would import the compiler
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(
            self.patch.proj.weight.view(self.patch.proj.out_channels, -1)
        )  # a linear layer on flattened patches
        nn.init.zeros_(self.patch.proj.bias)
        if hasattr(self.patch, "expand"):  # starts as repeating every frame of the tube
            nn.init.zeros_(self.patch.expand.bias)
            nn.init.zeros_(self.patch.expand.weight)
            for channel in range(self.patch.out_channels):
                nn.init.ones_(self.patch.expand.weight[channel, channel])
        for linear in (self.time_embedding.fc1, self.time_embedding.fc2):
            nn.init.normal_(linear.weight, std=0.02)
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.table.weight, std=0.02)
        for modulation in [self.final_modulation, *(block.modulation for block in self.blocks)]:
            if hasattr(modulation, "linear"):
                nn.init.zeros_(modulation.linear.weight)
        nn.init.zeros_(self.final_linear.weight)

    def condition(self, t: Tensor, label: Tensor | None, num_images: int) -> Tensor:
        """t (b,), label None, (b,) or (b 1+i) -> c (b 1 d), or (b 1+i d) when every still has a label of its own."""
        c = self.time_embedding(t)[:, None]
        if self.label_embedding is None:
            if label is not None:
                raise InputError(
                    "label was given, but this model is unconditional (num_classes is null); leave the label out"
                )
            return c
        label = t.new_full((len(t),), -1, dtype=torch.long) if label is None else label
        require(
            label.shape in ((len(t),), (len(t), 1 + num_images)),
            "label's shape",
            tuple(label.shape),
            f"there are {len(t)} clips with {num_images} stills each",
            f"give {(len(t),)} or {(len(t), 1 + num_images)}",
        )
        return c + self.label_embedding(label if label.ndim == 2 else label[:, None])

    def forward(self, z: Tensor, t: Tensor, label: Tensor | None = None, num_images: int = 0) -> Tensor:
        """Noisy latents z (b f+i c h w), timesteps t (b,) in 0...999 -> (b f+i o h w), o = 2c with learned sigma, else c.

        The last ``num_images`` of the frame axis are stills. ``label`` is (b,), or (b 1+i) with a label per still; None is the null
        class. Raises InputError for wrong channels, or sizes that the patches do not divide.
        """
        self.check(z, num_images)
        c = self.condition(t, label, num_images)
        if not num_images:
            return self.denoise(z, c)
        clip, stills = z.split(
            [z.shape[1] - num_images, num_images], dim=1
        )  # contiguous, so that the clip meets the same kernels
        clip = self.denoise(clip.contiguous(), c[:, :1].contiguous())
        return torch.cat([clip, self.denoise(stills, c[:, 1:] if c.shape[1] > 1 else c, stills=True)], dim=1)

    def denoise(self, z: Tensor, c: Tensor, stills: bool = False) -> Tensor:
        """Latents (b f c h w) under the condition (b f|1 d) -> (b f o h w); ``stills``: time does not exist."""
        grid = z.shape[-2] // self.config.patch_size, z.shape[-1] // self.config.patch_size
        x = self.patch.embed(z, stills)  # (b f n d)
        x = self.conditioning.enter(x + spatial_table(*grid, x.shape[-1]).to(x), c)
        for index, block in enumerate(self.blocks):
            if index == self.time_enters and not stills:
                x = self.position.add(x)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, stills, use_reentrant=False)
            else:
                x = block(x, c, stills)
        x = self.final_norm(self.conditioning.leave(x))
        return self.patch.unembed(self.final_linear(modulate(x, *self.final_modulation(c))), grid, stills)

    def check(self, z: Tensor, num_images: int) -> None:
        """Refuse shapes that do not fit, warn outside the trained range."""
        config, (frames, channels, *size) = self.config, z.shape[1:]
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
        for side in size:
            require(
                side % config.patch_size == 0,
                "z's size",
                tuple(size),
                f"patches are {config.patch_size} x {config.patch_size}",
                f"the nearest multiple of {side} is {max(round(side / config.patch_size), 1) * config.patch_size}",
            )
        if frames - num_images > config.num_frames and not self.position.free_length:
            warnings.warn(
                f"{frames - num_images} frames are more than the {config.num_frames} that this model was made for; "
                "the temporal table is extended",
                stacklevel=3,
            )
        if any(side > trained for side, trained in zip(size, config.grid_size, strict=True)):
            warnings.warn(
                f"latents of {size[0]} x {size[1]} are larger than the {config.grid_size[0]} x {config.grid_size[1]} that this "
                "model was made for; the spatial table is extended",
                stacklevel=3,
            )
