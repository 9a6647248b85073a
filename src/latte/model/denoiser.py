# SPDX-License-Identifier: Apache-2.0
"""What all denoisers share: the checks of their configuration, their initialisation, and one interface.

A denoiser is called as ``model(z, t, **condition, num_images=i)``: noisy latents, timesteps and its own
condition in, prediction out. Training, guidance, sampling and profiling pass the condition through as a
dictionary and never ask for the class.
Axes: b batch, f clip frames, i images, c channels, h w latent size.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latte.checks import check, choose
from latte.model.conditioning import Modulation
from latte.model.pretrained import SavedModel

SIZES = {  # Table 4:  depth  width  heads
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}

# Far above any model ever trained. A larger value is a mistake, and is refused before anything is built.
LIMITS = {
    "depth": 1_000,
    "width": 65_536,
    "heads": 1_024,
    "patch_size": 256,
    "tube": 256,
    "num_frames": 10_000,
    "latent_channels": 4_096,
    "num_classes": 1_000_000,
    "caption_channels": 65_536,
    "table_size": 8_192,
}
MAX_SIDE = 8_192  # latent rows or columns
MAX_PARAMETERS = 100_000_000_000
MAX_TABLE = 2**29  # numbers in a position table


class DenoiserConfig:
    """What the configurations of all denoisers share. Abstract.

    Each subclass is a frozen dataclass that lists all its fields.
    """

    reads_text: ClassVar[bool] = False
    """Whether the condition is a caption, {"text", "mask"}, rather than a class, {"label"}, or nothing."""

    size: str
    depth: int | None
    width: int | None
    heads: int | None
    patch_size: int
    num_frames: int
    latent_size: int | tuple[int, int]
    latent_channels: int
    num_classes: int | None
    gated_time: bool

    def build(self) -> "Denoiser":
        """Return a freshly initialised model."""
        raise NotImplementedError

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """(depth, width, heads): those of ``size`` unless overridden."""
        overrides = (self.depth, self.width, self.heads)
        depth, width, heads = (
            default if override is None else override
            for default, override in zip(SIZES[self.size], overrides, strict=True)
        )
        return depth, width, heads

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w) of the latent."""
        if isinstance(self.latent_size, tuple):
            return self.latent_size
        return self.latent_size, self.latent_size

    @property
    def frames_per_token(self) -> int:
        """Latent frames that one token covers: 1 unless patches span several frames."""
        return 1

    @property
    def num_tokens(self) -> int:
        """Tokens of one clip."""
        h, w = self.grid_size
        return (self.num_frames // self.frames_per_token) * (h // self.patch_size) * (w // self.patch_size)

    def check_dimensions(self, block_matrices: int) -> None:
        """Raise InputError for values that are out of range or do not divide each other.

        ``block_matrices`` is the size of one block (or pair of blocks) in units of width^2.
        """
        if isinstance(self.latent_size, list):  # JSON and YAML have no tuples
            object.__setattr__(self, "latent_size", tuple(self.latent_size))
        choose("model.size", self.size, SIZES)
        for name, limit in LIMITS.items():
            value = getattr(self, name, None)
            check(
                value is None or (type(value) is int and 1 <= value <= limit),
                f"model.{name} must be an integer from 1 to {limit}, got {value!r}",
            )
        depth, width, heads = self.dimensions
        check(
            width % 4 == 0,
            f"model.width is {width}, but must be a multiple of 4 (sine and cosine of row and column); the "
            f"nearest is {nearest_multiple(width, 4)}",
        )
        check(
            width % heads == 0,
            f"model.heads is {heads}, but must divide model.width = {width}; the next smaller divisor is "
            f"{next(divisor for divisor in range(heads, 0, -1) if width % divisor == 0)}",
        )
        parameters = depth * block_matrices * width**2
        check(
            parameters <= MAX_PARAMETERS,
            f"model.depth = {depth} and model.width = {width} give {parameters / 1e9:.0f} billion "
            f"parameters; the limit is {MAX_PARAMETERS / 1e9:.0f} billion",
        )
        check(
            len(self.grid_size) == 2,
            f"model.latent_size must be one integer or (rows, columns), got {self.latent_size!r}",
        )
        for side in self.grid_size:
            self.check_side("model.latent_size", side)
        rows, columns = (side // self.patch_size for side in self.grid_size)
        check(
            max(rows * columns, self.num_frames) * width <= MAX_TABLE,
            f"model.latent_size {self.grid_size} gives {rows * columns} tokens per frame, and "
            f"model.num_frames is {self.num_frames}: too many for position tables of width {width}",
        )

    def check_side(self, field: str, side: int) -> None:
        """Raise InputError unless ``side``, rows or columns of a latent, is a whole number of patches."""
        check(
            type(side) is int and 1 <= side <= MAX_SIDE,
            f"{field} must be an integer from 1 to {MAX_SIDE}, got {side!r}",
        )
        check(
            side % self.patch_size == 0,
            f"{field} is {side}, but must be a multiple of model.patch_size = {self.patch_size}; the nearest "
            f"is {nearest_multiple(side, self.patch_size)}",
        )


def nearest_multiple(value: int, factor: int) -> int:
    """Return the positive multiple of ``factor`` that is nearest to ``value``."""
    return max(round(value / factor), 1) * factor


def condition_shape(clips: int, num_images: int) -> tuple[int, ...]:
    """Return the shape of a batch's labels: (b,), with images (b, 1+i)."""
    if num_images:
        return clips, 1 + num_images
    return (clips,)


class Denoiser(nn.Module, SavedModel):
    """A model that predicts noise (or velocity) from noisy latents. Abstract: Latte and LatteText.

    ``model(z, t, **condition, num_images=i)`` returns (b f+i o h w) for noisy latents z (b f+i c h w) and
    timesteps t (b,) in 0...999; o = 2c with a learned variance, else c. The last ``num_images`` frames are
    images: each is denoised by itself.
    """

    patch: Any
    time_embedding: Any
    final_linear: nn.Linear

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
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

    def run_block(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Return ``block(*inputs)``, recomputed in the backward pass with ``gradient_checkpointing``."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

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
        check(t.shape == (b,), f"t has shape {tuple(t.shape)}, but must be ({b},): one timestep per clip")
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
