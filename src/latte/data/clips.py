# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video make a clip, and from their pixels to the model's range and back.

Three rules choose frames: "strict" keeps an even stride (the paper), "linspace" spreads the frames over frames x interval as
the released code does for FaceForensics and UCF101 (16 x 3 gives steps 3, 3, ..., 4), "time" goes by the frames' time stamps, so
that videos of different or uneven frame rates move at one speed. Every rule draws the last possible start too.
Axes: f = t frames, c channels, h height, w width.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from latte.checks import InputError, choose, require


def span(frames: int, interval: int) -> int:
    """Number of consecutive source frames under a clip of ``frames`` with an even stride: (frames - 1) * interval + 1."""
    return (frames - 1) * interval + 1


@dataclass(frozen=True)
class ClipRule:
    """``frames`` frames, ``interval`` apart, by ``rule``: "strict" | "linspace" | "time".

    With "time", consecutive frames are interval / fps seconds apart, so interval 3 at fps 25 means 0.12 s in every video.
    """

    frames: int = 16
    interval: int = 1
    rule: str = "strict"
    fps: float | None = None
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.frames >= 1, "frames", self.frames, "a clip has at least one frame", "give 1 or more")
        require(
            self.interval >= 1, "interval", self.interval, "frames are at least 1 apart", "give 1 or more"
        )
        choose("rule", self.rule, RULES)
        if self.rule == "time":
            require(
                self.fps is not None and self.fps > 0,
                "fps",
                self.fps,
                'rule "time" needs a frame rate',
                "give e.g. fps=25",
            )
        else:
            require(
                self.fps is None,
                "fps",
                self.fps,
                f'rule "{self.rule}" goes by frame numbers',
                'leave fps out or take rule "time"',
            )

    @property
    def span(self) -> int | None:
        """Source frames that the clip needs, or None for "time" (it depends on the video)."""
        return (
            None
            if self.rule == "time"
            else span(self.frames, self.interval)
            if self.rule == "strict"
            else self.frames * self.interval
        )

    @property
    def seconds(self) -> float:
        """Time between the first and the last frame of a clip of rule "time"."""
        return (self.frames - 1) * self.interval / (self.fps or 1)

    def num_starts(self, num_frames: int, times: Sequence[float] = ()) -> int:
        """In how many places the clip can start in a video of ``num_frames`` frames at ``times`` (seconds); 0: it does not fit."""
        return RULES[self.rule][0](self, num_frames, times)

    def frames_at(self, start: int, times: Sequence[float] = ()) -> list[int]:
        """The frame numbers of the clip that starts at frame ``start``."""
        return RULES[self.rule][1](self, start, times)

    def needs(self, num_frames: int, times: Sequence[float] = ()) -> str | None:
        """None when the clip fits the video, otherwise 'code: sentence' with the numbers (the form of skipped.jsonl)."""
        if self.rule == "time" and not times:
            return 'no-times: its frames have no times, and rule "time" goes by them'
        if self.num_starts(num_frames, times) > 0:
            return None
        if self.rule == "time":
            lasts = f"it lasts {times[-1] - times[0]:.3f} s"
            return f"too-short: {lasts}, {self.frames} frames, {self.interval} / {self.fps} s apart, {self.seconds:.3f} s"
        return f"too-short: {num_frames} frames decode, a clip spans {self.span} ({self.frames} frames, interval {self.interval}, {self.rule})"


def _strict_at(rule: ClipRule, start: int, times: Sequence[float]) -> list[int]:
    return [start + i * rule.interval for i in range(rule.frames)]


def _linspace_at(rule: ClipRule, start: int, times: Sequence[float]) -> list[int]:
    window = rule.frames * rule.interval
    return [start + (i * (window - 1)) // max(rule.frames - 1, 1) for i in range(rule.frames)]


def _counted_starts(rule: ClipRule, num_frames: int, times: Sequence[float]) -> int:
    return max(0, num_frames - (rule.span or 0) + 1)


def _time_at(rule: ClipRule, start: int, times: Sequence[float]) -> list[int]:
    """The frames nearest in time (the earlier one of two equally near) to start, start + interval / fps, ..."""
    chosen = []
    for i in range(rule.frames):
        moment = times[start] + i * rule.interval / (rule.fps or 1)
        after = min(bisect_left(times, moment), len(times) - 1)
        chosen.append(
            after - 1 if after > start and moment - times[after - 1] <= times[after] - moment else after
        )
    return chosen


def _timed_starts(rule: ClipRule, num_frames: int, times: Sequence[float]) -> int:
    """Starts whose last moment lies at most half a step of the video behind its last frame (time stamps are rounded)."""
    if not times:
        return 0
    slack = 0.5 * (times[-1] - times[0]) / max(num_frames - 1, 1)
    return sum(1 for moment in times[:num_frames] if moment + rule.seconds <= times[-1] + slack)


RULES = {
    "strict": (_counted_starts, _strict_at),
    "linspace": (_counted_starts, _linspace_at),
    "time": (_timed_starts, _time_at),
}


def choose_frames(
    num_frames: int, rule: ClipRule, generator: torch.Generator | None = None, times: Sequence[float] = ()
) -> list[int]:
    """Frame numbers of one clip, its start uniform over every possible one (the first one without a ``generator``).

    InputError with the numbers when the video is too short for the rule; ``times`` in seconds are needed by "time" alone."""
    reason = rule.needs(num_frames, times)
    if reason:
        raise InputError(
            f"no clip fits this video ({reason}); use longer videos, fewer frames or a smaller interval"
        )
    starts = rule.num_starts(num_frames, times)
    return rule.frames_at(int(torch.randint(starts, (), generator=generator)) if generator else 0, times)


def centre_crop_resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (t h w c) -> uint8 (t height width c), for any source size: the largest centred box of the target's aspect (to the nearest
    whole pixel), then one resize. Frames of the right size come back unchanged.

    The filter is torch's bicubic with antialias on uint8, within one level of Pillow's bicubic and several times as fast."""
    require(height > 0 and width > 0, "resolution", (height, width), "sizes are positive", "give e.g. 256")
    h, w = frames.shape[1:3]
    if (h, w) == (height, width):
        return frames
    wide = h * width < w * height
    box_h, box_w = (h, max(1, round(h * width / height))) if wide else (max(1, round(w * height / width)), w)
    top, left = (h - box_h) // 2, (w - box_w) // 2
    box = torch.from_numpy(np.ascontiguousarray(frames[:, top : top + box_h, left : left + box_w])).permute(
        0, 3, 1, 2
    )
    return (
        interpolate(box, size=(height, width), mode="bicubic", antialias=True)
        .permute(0, 2, 3, 1)
        .contiguous()
        .numpy()
    )


def flip_horizontal(video: Tensor) -> Tensor:
    """(... h w) -> (... h w), mirrored left to right."""
    return video.flip(-1)


def to_float(frames: np.ndarray) -> Tensor:
    """uint8 (t h w c) in [0, 255] -> float32 (f c h w) in [-1, 1]."""
    return (
        torch.from_numpy(np.ascontiguousarray(frames))
        .permute(0, 3, 1, 2)
        .to(torch.float32)
        .div_(127.5)
        .sub_(1)
        .contiguous()
    )


def to_uint8(video: Tensor) -> np.ndarray:
    """float (... f c h w) in [-1, 1] (clamped) -> uint8 (... f h w c) in [0, 255]; the exact inverse of ``to_float``."""
    levels = video.detach().to("cpu", torch.float32).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().numpy()
