# SPDX-License-Identifier: Apache-2.0
"""The data section of a run's configuration: which clips, at which size. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from latte.checks import InputError, check, check_name, choose
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
        "circles": Later(
            "latte.data.world.circles:CircleScenes", "stars that go round in circles, for fine-tuning"
        ),
    }
)


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
    scenes: str = "shapes"  # what procedural clips show: shapes, world or circles
    language: str | None = None  # captions of scenes of the world: en, zh or mixed; null: en
    captions: str | None = None  # auto, or a csv or jsonl file of captions; null: none are read
    workers: int | None = (
        None  # processes that load clips; null: 0 on the CPU, otherwise 4; 0: the training process
    )
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
    ("root", "interval", "rule", "fps", "flip", "labels", *_VIDEOS, "hold_out", "captions", *BUCKET_KEYS),
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
