# SPDX-License-Identifier: Apache-2.0
"""The configurations of the denoisers, their checks, and the tables of the parts they name. No torch here.

To add a size, a patch embedding, a conditioning or a temporal position: one entry in its table.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from latte.checks import check, check_name, choose
from latte.model.variants import VARIANTS, Variant
from latte.tables import Later, Table

if TYPE_CHECKING:
    from latte.model.blocks import MLP, SwiGLU
    from latte.model.conditioning import Conditioning
    from latte.model.denoiser import Denoiser
    from latte.model.latte import Latte
    from latte.model.patches import CompressionPatch, UniformPatch
    from latte.model.positions import AbsoluteTime, RotaryTime
    from latte.model.text import LatteText

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
COARSE = 64  # latents of 2 x 64 and more count positions in steps of a half, of 3 x 64 in thirds, ...
PAIR_OF_BLOCKS = 28  # width^2 parameters: 3 attentions (4 each) and 2 MLPs (8 each)


def one_frame(config: Any) -> int:
    """Return 1, the latent frames of a token of a single frame."""
    return 1


def tube_frames(config: Any) -> int:
    """Return the latent frames of a token that covers a tube."""
    return config.tube


PATCHES: Table[str, Callable[["ModelConfig", int], "UniformPatch | CompressionPatch"]] = Table(
    {
        "uniform": Later(
            "latte.model.patches:UniformPatch", "a token is a patch of one frame", frames_per_token=one_frame
        ),
        "compression": Later(
            "latte.model.patches:CompressionPatch",
            "a token is a patch of model.tube frames",
            frames_per_token=tube_frames,
        ),
    }
)
CONDITIONINGS: Table[str, type["Conditioning"]] = Table(
    {
        "s_adaln": Later("latte.model.conditioning:SAdaLN", "timestep and class scale and shift every block"),
        "all_tokens": Later("latte.model.conditioning:AllTokens", "timestep and class are two more tokens"),
    }
)
TEMPORAL_POSITIONS: Table[str, Callable[[int], "AbsoluteTime | RotaryTime"]] = Table(
    {
        "absolute": Later("latte.model.positions:AbsoluteTime", "sine and cosine of the frame, added once"),
        "rotary": Later("latte.model.positions:RotaryTime", "rotary (RoPE), in every temporal attention"),
    }
)
MLPS: Table[str, Callable[[int], "MLP | SwiGLU"]] = Table(
    {
        "gelu": Later("latte.model.blocks:MLP", "two layers with GELU between, as in the paper"),
        "swiglu": Later("latte.model.blocks:SwiGLU", "gated by SiLU, with as many weights"),
    }
)


@dataclass(frozen=True)
class BlockOptions:
    """What a block may have beyond the paper's; the defaults are the paper's."""

    qk_norm: bool = False  # RMS norm of queries and keys in every head (Dehghani et al. 2023, 2302.05442)
    value_residual: bool = False  # attentions mix in the first one's values (Zhou et al. 2024, 2410.17897)
    mlp: str = "gelu"  # key of MLPS


OPTIONS = {**asdict(BlockOptions()), "pooled_caption": False}
"""Options of models and their defaults, which no stored configuration lists."""


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
    qk_norm: bool
    value_residual: bool
    mlp: str

    def stored(self) -> dict[str, Any]:
        """Return the fields as plain data, without options at their default, which older versions lack.

        Weights folders, checkpoints, run folders and hashes hold this.
        """
        values = asdict(cast(Any, self))
        return {name: value for name, value in values.items() if OPTIONS.get(name, ...) != value}

    @property
    def block_options(self) -> BlockOptions:
        """The fields that are options of blocks."""
        return BlockOptions(**{item.name: getattr(self, item.name) for item in fields(BlockOptions)})

    def refuse_options(self, layout: str) -> None:
        """Raise InputError for an option that ``layout`` has no place for."""
        for name, default in OPTIONS.items():
            value = getattr(self, name, default)
            check(
                value == default, f"model.{name} is {value}, but {layout} has no place for it; use --to latte"
            )

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
    def num_blocks(self) -> int:
        """Blocks of the forward pass."""
        return self.dimensions[0]

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
        check_name("model.size", self.size, SIZES)
        check_name("model.mlp", self.mlp, MLPS)
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


@dataclass(frozen=True)
class ModelConfig(DenoiserConfig):
    """The class-conditional or unconditional model; everything that decides the shapes of its weights."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    size: str = "XL"  # S, B, L or XL (Table 4): depth, width and heads unless given below
    depth: int | None = None  # blocks; null: as many as fit the parameters of the size (28 -> 23)
    width: int | None = None  # channels of a token, a multiple of 4
    heads: int | None = None  # attention heads, a divisor of width
    variant: int | str = 1  # arrangement of the blocks: 1 to 4 (Fig. 2), or joint
    patch: str = "uniform"  # how frames become tokens: uniform or compression (Sec. 3.3.1)
    patch_size: int = 2  # latent rows and columns of one patch
    tube: int = 2  # latent frames of one patch, with compression patches only
    conditioning: str = "s_adaln"  # of timestep and class: s_adaln or all_tokens (Sec. 3.3.2)
    temporal_position: str = "absolute"  # position of frames: absolute or rotary (Sec. 3.3.3)
    num_frames: int = 16  # latent frames of a training clip
    latent_size: int | tuple[int, int] = 32  # (rows, columns) of the latent; one number for a square
    latent_channels: int = 4  # channels of the latent, those of the autoencoder
    num_classes: int | None = None  # classes of the data; null: unconditional
    class_dropout: float = 0.1  # probability that a training clip gets the null class, for guidance
    learn_sigma: bool = True  # whether the output has variance channels beside the noise
    qk_norm: bool = False  # RMS norm of queries and keys, before positions
    value_residual: bool = False  # every attention mixes in the values of the first one
    mlp: str = "gelu"  # layers of a block's MLP: gelu, or swiglu with as many weights

    gated_time: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.variant, str) and self.variant.isdigit():
            object.__setattr__(self, "variant", int(self.variant))
        check_name("model.patch", self.patch, PATCHES)
        check_name("model.conditioning", self.conditioning, CONDITIONINGS)
        check_name("model.temporal_position", self.temporal_position, TEMPORAL_POSITIONS)
        self.check_dimensions(self.variant_spec.weight)
        depth, _, heads = self.dimensions
        self.variant_spec.check(depth, heads)
        check(0 <= self.class_dropout < 1, f"model.class_dropout must be in [0, 1), got {self.class_dropout}")
        tube = self.frames_per_token
        check(
            self.num_frames % tube == 0,
            f"model.num_frames is {self.num_frames}, but compression patches need a multiple of model.tube = "
            f"{tube}; the nearest is {nearest_multiple(self.num_frames, tube)}",
        )

    def build(self) -> "Latte":
        """Return a freshly initialised model."""
        from latte.model.latte import Latte

        return Latte(self)

    @property
    def variant_spec(self) -> Variant:
        """The entry of VARIANTS."""
        return choose("model.variant", self.variant, VARIANTS)

    @property
    def dimensions(self) -> tuple[int, int, int]:
        """(depth, width, heads) after size, overrides and the variant's parameter budget (Table 3)."""
        depth, width, heads = super().dimensions
        return self.variant_spec.depth(depth) if self.depth is None else depth, width, heads

    @property
    def frames_per_token(self) -> int:
        """Latent frames that one token covers."""
        return PATCHES.fact(self.patch, "frames_per_token")(self)


@dataclass(frozen=True)
class TextConfig(DenoiserConfig):
    """The text-to-video model; everything that decides the shapes of its weights."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    reads_text: ClassVar[bool] = True
    num_classes: ClassVar[None] = None

    size: str = "XL"  # S, B, L or XL (Table 4): depth, width and heads unless given below
    depth: int | None = None  # pairs of a spatial and a temporal block
    width: int | None = None  # channels of a token, a multiple of 4
    heads: int | None = None  # attention heads, a divisor of width
    patch_size: int = 2  # latent rows and columns of one patch
    num_frames: int = 16  # latent frames of a training clip
    latent_size: int | tuple[int, int] = 64  # (rows, columns) of the latent; one number for a square
    table_size: int | None = None  # side of the square grid that positions are scaled to; null: latent_size
    latent_channels: int = 4  # channels of the latent, those of the autoencoder
    caption_channels: int = 4096  # channels of the text encoder's features (4096 for T5 v1.1 XXL)
    learn_sigma: bool = True  # whether the output has variance channels beside the noise
    qk_norm: bool = False  # RMS norm of queries and keys, before positions
    value_residual: bool = False  # every attention mixes in the values of the first one
    mlp: str = "gelu"  # layers of a block's MLP: gelu, or swiglu with as many weights
    gated_time: bool = False  # whether the temporal table has a gate that opens from 0 to 1 in training
    pooled_caption: bool = False  # whether the caption's mean joins the timestep, for temporal blocks too

    def __post_init__(self) -> None:
        self.check_dimensions(PAIR_OF_BLOCKS)
        self.check_side("model.table_size", self.table_grid[0])

    def build(self) -> "LatteText":
        """Return a freshly initialised model."""
        from latte.model.text import LatteText

        return LatteText(self)

    @property
    def num_blocks(self) -> int:
        """Blocks of the forward pass: a spatial and a temporal one per pair."""
        return 2 * self.dimensions[0]

    @property
    def table_grid(self) -> tuple[int, int]:
        """(h, w) of the latent that positions are scaled to.

        A model keeps that of the weights it started from.
        """
        if self.table_size is None:
            return self.grid_size
        return self.table_size, self.table_size

    @property
    def spans(self) -> tuple[float, float]:
        """Range of row and column positions, the same at any latent size.

        They are the tokens of the table's grid, in smaller steps from 128 latents on.
        """
        down, across = (side // self.patch_size / max(side // COARSE, 1) for side in self.table_grid)
        return down, across
