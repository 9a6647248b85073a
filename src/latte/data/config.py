# SPDX-License-Identifier: Apache-2.0
"""The data section of a run's configuration: which clips, at which size. No torch here."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from latte.checks import InputError, check, check_name, choose, printable
from latte.data.bucket_settings import AUTO_KEYS, check_settings
from latte.data.clip_rule import ClipRule
from latte.data.layouts import LAYOUTS
from latte.tables import Later, Table

if TYPE_CHECKING:
    from latte.data.base import SceneSet

# Value of data.scenes -> the clips of data.kind=procedural.
PROCEDURAL: Table[str, Callable[["DataConfig"], "SceneSet"]] = Table(
    {
        "shapes": Later("latte.data.procedural:ShapeScenes", "one shape that moves up, down, left or right"),
        "world": Later("latte.data.world.dataset:WorldScenes", "nine kinds of scenes, English and Chinese"),
        "curtains": Later("latte.data.world.curtains:CurtainScenes", "curtains that open, for fine-tuning"),
    }
)

MAX_WINDOW = 10_000  # clips after which the sets of a mix have their exact shares


@dataclass(frozen=True)
class MixPart:
    """One of the sets of ``data.mix``. A key left None has the value of the data section."""

    weight: float = 1.0  # its share of the clips of a batch, relative to the other sets
    images: bool = False  # gives only images behind clips (train.num_images), no clips
    name: str | None = None  # begins the keys of its clips; null: the last part of root, or the scenes
    kind: str | None = None
    root: str | None = None
    interval: int | None = None
    rule: str | None = None
    fps: float | None = None
    flip: bool | None = None
    captions: str | None = None
    seed: int | None = None
    num_clips: int | None = None
    scenes: str | None = None
    language: str | None = None
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def stored(self) -> dict[str, Any]:
        """Return what was given, as plain data."""
        return {key: value for key, value in asdict(self).items() if value not in (None, False)}

    def own(self) -> dict[str, Any]:
        """Return the keys of the data section that this set has a value of its own for."""
        shared = ("weight", "images", "name")
        return {key: value for key, value in asdict(self).items() if value is not None and key not in shared}


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest whole numbers in the ratios of ``weights``; InputError when they are not positive,
    or their sum is above MAX_WINDOW.
    """
    for weight in weights:
        check(
            0 < weight < math.inf,
            f"data.mix: weight must be positive, got {weight:g}; leave out a set that is not used",
        )
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(value.denominator for value in exact))
    whole = [int(value * scale) for value in exact]
    whole = [value // math.gcd(*whole) for value in whole]
    check(
        sum(whole) <= MAX_WINDOW,
        f"data.mix: the weights {', '.join(f'{weight:g}' for weight in weights)} are exact only after "
        f"{sum(whole):,} clips, and the limit is {MAX_WINDOW:,}; round them, e.g. to 0.7 and 0.3",
    )
    return tuple(whole)


@dataclass(frozen=True)
class DataConfig:
    """Which clips a run uses, and at which size. InputError on construction for a value out of range.

    A key that the kind does not read must be left out (table UNREAD).
    """

    kind: str = "folder"  # folder, latents, procedural, faceforensics, skytimelapse, ucf101 or taichi
    root: str | None = None  # the folder of videos or of latents
    resolution: int | tuple[int, int] = 256  # side, or (height, width), of the frames in pixels
    frames: int = 16  # frames per clip
    interval: int = 1  # distance of two frames of a clip, in source frames
    rule: str | None = None  # how frames are chosen: strict, linspace or time; null: time if rates differ
    fps: float | None = None  # frame rate of a clip, for rule "time"
    buckets: tuple[str, ...] | None = None  # frames x height x width of a batch's clips, a list or auto
    bucket_pixels: int | None = None  # height x width of auto buckets; null: that of data.resolution
    bucket_aspects: tuple[float, float, int] | None = (
        None  # smallest and largest width / height, and how many
    )
    bucket_lengths: tuple[int, ...] | None = None  # frames of auto buckets; null: data.frames, 1/2 and 1/4
    flip: bool = False  # mirror half of the clips at random
    labels: bool = True  # classes from <root>/<class>/<clip>
    seed: int = 0  # seed of procedural clips
    num_clips: int | None = None  # number of procedural clips; null: unlimited
    hold_out: int | float | str = 0  # a share or a file list of videos; N: of procedural captions, 1 in N
    scenes: str = "shapes"  # what procedural clips show: shapes, world or curtains
    language: str | None = None  # captions of scenes of the world: en, zh or mixed; null: en
    captions: str | None = None  # auto, or a csv or jsonl file of captions; null: none are read
    workers: int | None = (
        None  # processes that load clips; null: 0 on the CPU, otherwise 4; 0: the training process
    )
    mix: tuple[MixPart, ...] | None = None  # several sets with weights: [{root: A, weight: 3}, {root: B}]
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        unread = choose("data.kind", self.kind, UNREAD)
        for name in ("buckets", "bucket_aspects", "bucket_lengths"):
            value = getattr(self, name)
            if value is not None:  # JSON and YAML have lists; in Python one text is one bucket
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in unread and value not in (field.default, OLD_DEFAULTS.get(field.name)):
                raise InputError(
                    f"data.{field.name} is {value!r}, but data.kind={self.kind} does not read it; "
                    f"leave it out ({unread[field.name]})"
                )
        check(
            min(self.size) > 0,
            f"data.resolution must be positive, got {self.resolution}; give e.g. 256 or [256, 320] (height, "
            "width)",
        )
        check(
            self.num_clips is None or self.num_clips > 0,
            f"data.num_clips must be at least 1, or null for an unlimited number, got {self.num_clips}",
        )
        check(
            self.workers is None or self.workers >= 0, f"data.workers must be at least 0, got {self.workers}"
        )
        check_name("data.scenes", self.scenes, PROCEDURAL)
        self._check_hold_out()
        if self.kind == "procedural":
            _ = self.scene_set  # refuses what does not fit the scenes
        _ = self.clip_rule  # refuses impossible frames, interval, rule, fps
        check_settings(self)
        if self.mix is not None:
            object.__setattr__(self, "mix", tuple(self.mix))
            check_mix(self)

    def _check_hold_out(self) -> None:
        """InputError for a share out of range, or a number of captions where clips have files."""
        given = self.hold_out
        if isinstance(given, float):
            check(
                0 <= given < 1,
                f"data.hold_out is {given}, but a share of the videos must be in [0, 1); give e.g. 0.1",
            )
        if isinstance(given, int) and given != 0 and self.kind != "procedural":
            raise InputError(
                f"data.hold_out is {given}, which holds out captions of procedural clips; "
                "give a share of the videos such as 0.1, or a text file that lists them"
            )
        check(given != "", "data.hold_out is empty; give a share such as 0.1, or a text file of videos")

    @property
    def held_out_captions(self) -> int:
        """Of procedural captions one in so many never appears; 0: all appear."""
        if isinstance(self.hold_out, int):
            return self.hold_out
        return 0

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the frames in pixels."""
        if isinstance(self.resolution, int):
            return self.resolution, self.resolution
        height, width = self.resolution
        return height, width

    @property
    def scene_set(self) -> "SceneSet":
        """The procedural clips of ``scenes``."""
        return choose("data.scenes", self.scenes, PROCEDURAL)(self)

    @property
    def clip_rule(self) -> ClipRule:
        """How the frames of a clip are chosen. A dataset of files settles an open ``rule`` by their rates."""
        return self.clip_rule_of(self.frames)

    def clip_rule_of(self, frames: int) -> ClipRule:
        """Return how the frames of a clip of ``frames`` are chosen; one frame needs no times."""
        rule = self.rule or ("strict" if self.fps is None else "time")
        if frames == 1 and frames != self.frames:
            return ClipRule(1)
        return ClipRule(frames, self.interval, rule, self.fps)

    @property
    def sets(self) -> dict[str, tuple[MixPart, "DataConfig"]]:
        """Name -> (entry, configuration) of each set of ``mix``; {} without."""
        return {name_of(self, part): (part, config_of(self, part)) for part in self.mix or ()}

    def unused_images(self, num_images: int) -> list[str]:
        """Return a problem for sets of images that ``num_images`` images behind a clip would not use."""
        if num_images or not any(part.images for part in self.mix or ()):
            return []
        return [
            "data.mix has sets of images, but train.num_images is 0, so they would not be used; give "
            "train.num_images, or leave them out"
        ]

    def stored(self) -> dict[str, Any]:
        """Return all values as plain data, of a mix what was given."""
        values = asdict(self)
        del values["mix"]
        if self.mix is not None:
            values["mix"] = [part.stored() for part in self.mix]
        return values

    def without_buckets(self) -> "DataConfig":
        """Return the same clips, all of ``frames`` frames at ``resolution``."""
        return replace(self, **dict.fromkeys(BUCKET_KEYS))

    def describe_clips(self) -> dict[str, Any]:
        """Return what decides how clips are cut from videos, as plain data."""
        return {
            "resolution": list(self.size),
            "frames": self.frames,
            "interval": self.interval,
            "rule": self.rule,
            "fps": self.fps,
            "flip": self.flip,
        }


def name_of(config: DataConfig, part: MixPart) -> str:
    """Return the name of a set of ``config.mix``."""
    kind = part.kind or config.kind
    if part.name is not None:
        return part.name
    if part.root is not None:
        return Path(part.root).name
    return part.scenes or config.scenes if kind == "procedural" else kind


def config_of(config: DataConfig, part: MixPart) -> DataConfig:
    """Return the configuration of a set of ``config.mix`` by itself; InputError, naming it, for a bad one."""
    changes: dict[str, Any] = {"mix": None, "hold_out": config.held_out_captions}
    if part.images:
        changes |= {"frames": 1, "interval": 1, "rule": None, "fps": None}
    try:
        return replace(config, **changes, **part.own())
    except InputError as error:
        raise InputError(f"data.mix, set {printable(name_of(config, part))}: {error}") from None


def check_mix(config: DataConfig) -> None:
    """InputError for sets of ``config.mix`` that cannot be used together."""
    mix = config.mix or ()
    check(len(mix) > 0, "data.mix is an empty list; give e.g. [{root: A, weight: 3}, {root: B}], or null")
    check(config.root is None, f"data.root is {config.root}, but data.mix names the folders; leave one out")
    check(
        config.buckets is None,
        "data.buckets and data.mix are both given, but all clips of a mix have one shape; leave one out",
    )
    names = [name_of(config, part) for part in mix]
    for name, part in zip(names, mix, strict=True):
        shown = printable(name)
        check(
            names.count(name) == 1,
            f"data.mix has {names.count(name)} sets named {shown}; give each a name: {{name: A, root: ...}}",
        )
        check(name != "" and "/" not in name, f"data.mix: name is {shown!r}, but it must be text without /")
        kind = part.kind or config.kind
        check(
            (kind == "latents") == (config.kind == "latents"),
            f"data.mix, set {shown}: kind is {kind}, but data.kind is {config.kind}, and a batch has either "
            "latents or frames; encode the videos (latte data encode), or train on videos alone",
        )
        check(kind != "custom", f"data.mix, set {shown}: kind is custom, which only Python can make")
        config_of(config, part)
    check(not all(part.images for part in mix), "data.mix has only sets of images; give one without images")
    for images in (False, True):
        whole_weights([part.weight for part in mix if part.images == images] or [1.0])


BUCKET_KEYS = ("buckets", *AUTO_KEYS)
OLD_DEFAULTS = {"rule": "strict"}  # of 0.1.0, whose runs have every key in their config.yaml

# Kind of dataset -> keys of DataConfig that it does not read, with the reason.
_VIDEOS = dict.fromkeys(("seed", "num_clips", "scenes", "language"), "it belongs to procedural clips")
_PROCEDURAL = {
    "root": "procedural clips need no files",
    "interval": "their speed does not depend on it",
    "rule": "all frames are rendered",
    "fps": "all frames are rendered",
    "flip": "a mirror image would turn left into right",
    "captions": "they are generated too",
}
_CUSTOM = dict.fromkeys(
    (
        "root",
        "interval",
        "rule",
        "fps",
        "flip",
        "labels",
        *_VIDEOS,
        "hold_out",
        "captions",
        *BUCKET_KEYS,
        "mix",
    ),
    "the clips come from a dataset in Python",
)
_LATENTS = {
    **_VIDEOS,
    **dict.fromkeys(BUCKET_KEYS, "one set of latents has one size; train on the videos themselves"),
    "captions": "they are in the manifest of the latents, if the encoded videos had any",
}
UNREAD = {
    "folder": _VIDEOS,
    **dict.fromkeys(LAYOUTS, _VIDEOS),
    "procedural": _PROCEDURAL,
    "latents": _LATENTS,
    "custom": _CUSTOM,  # written by latte.train for a dataset that it got from Python
}
