# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video make a clip, and the way from its pixels to the model's range and back.

Three rules choose frames: "strict" keeps an even stride (the paper); "linspace" spreads the frames over
frames * interval as the released code does for FaceForensics and UCF101 (16 * 3 gives steps 3, 3, ..., 4);
"time" goes by the frames' time stamps, so that videos of different or uneven frame rates move at one speed.
Every rule also allows the last possible start. Axes: f = t frames, c channels, h height, w width.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from latte.checks import InputError, check, choose


def span(frames: int, interval: int) -> int:
    """Return the number of consecutive source frames under a clip with an even stride: (frames - 1) *
    interval + 1.
    """
    return (frames - 1) * interval + 1


@dataclass(frozen=True)
class ClipRule:
    """How the frames of a clip are chosen. Raises InputError on construction for impossible values.

    With "time", consecutive frames are interval / fps seconds apart, so interval 3 at fps 25 means 0.12 s in
    every video.
    """

    frames: int = 16  # frames of a clip, at least 1
    interval: int = 1  # source frames from one frame to the next, at least 1
    rule: str = "strict"  # "strict" | "linspace" | "time"
    fps: float | None = None  # frame rate that interval refers to, for "time" alone
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check(self.frames >= 1, f"frames must be at least 1, got {self.frames}")
        check(self.interval >= 1, f"interval must be at least 1, got {self.interval}")
        choose("rule", self.rule, RULES)
        if self.rule == "time":
            check(
                self.fps is not None and self.fps > 0,
                f'fps must be positive with rule "time", got {self.fps}; give e.g. fps=25',
            )
        else:
            check(
                self.fps is None,
                f'fps is {self.fps}, but rule "{self.rule}" does not use it; leave it out or set rule="time"',
            )

    @property
    def span(self) -> int | None:
        """Number of source frames that the clip needs, or None for "time" (it depends on the video)."""
        if self.rule == "time":
            return None
        if self.rule == "strict":
            return span(self.frames, self.interval)
        return self.frames * self.interval

    @property
    def seconds(self) -> float:
        """Time between the first and the last frame of a clip of rule "time"."""
        return (self.frames - 1) * self.interval / (self.fps or 1)

    def num_starts(self, num_frames: int, times: Sequence[float] = ()) -> int:
        """Return the number of possible first frames in a video of ``num_frames`` at ``times`` (seconds); 0:
        too short.
        """
        return RULES[self.rule][0](self, num_frames, times)

    def frames_at(self, start: int, times: Sequence[float] = ()) -> list[int]:
        """Return the frame numbers of the clip that starts at frame ``start``."""
        return RULES[self.rule][1](self, start, times)

    def needs(self, num_frames: int, times: Sequence[float] = ()) -> str | None:
        """Return None when the clip fits the video, otherwise 'code: sentence' (the form of
        skipped.jsonl).
        """
        if self.rule == "time" and not times:
            return 'no-times: its frames have no times, which rule "time" needs'
        if self.num_starts(num_frames, times) > 0:
            return None
        if self.rule == "time":
            lasts = f"it lasts {times[-1] - times[0]:.3f} s"
            clip = f"{self.frames} frames, {self.interval} / {self.fps} s apart, need {self.seconds:.3f} s"
            return f"too-short: {lasts}, {clip}"
        clip = f"{self.frames} frames, interval {self.interval}, {self.rule}"
        return f"too-short: {num_frames} frames decode, a clip spans {self.span} ({clip})"


def _strict_at(rule: ClipRule, start: int, times: Sequence[float]) -> list[int]:
    return [start + i * rule.interval for i in range(rule.frames)]


def _linspace_at(rule: ClipRule, start: int, times: Sequence[float]) -> list[int]:
    window = rule.frames * rule.interval
    return [start + (i * (window - 1)) // max(rule.frames - 1, 1) for i in range(rule.frames)]


def _counted_starts(rule: ClipRule, num_frames: int, times: Sequence[float]) -> int:
    return max(0, num_frames - (rule.span or 0) + 1)


def _time_at(rule: ClipRule, start: int, times: Sequence[float]) -> list[int]:
    """The frames nearest in time (the earlier of two equally near) to start, start + interval / fps, ..."""
    chosen = []
    for i in range(rule.frames):
        moment = times[start] + i * rule.interval / (rule.fps or 1)
        after = min(bisect_left(times, moment), len(times) - 1)
        if after > start and moment - times[after - 1] <= times[after] - moment:
            after -= 1  # the frame before is nearer
        chosen.append(after)
    return chosen


def _timed_starts(rule: ClipRule, num_frames: int, times: Sequence[float]) -> int:
    """Starts whose last moment is at most half a step after the last frame (time stamps are rounded)."""
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
    """Return the frame numbers of one clip, its start uniform over all possible ones (the first without a
    ``generator``).

    ``times`` in seconds are needed by "time" alone. InputError when the video is too short for the rule.
    """
    reason = rule.needs(num_frames, times)
    if reason:
        raise InputError(
            f"no clip fits this video ({reason}); use longer videos, fewer frames or a smaller interval"
        )
    starts = rule.num_starts(num_frames, times)
    start = 0
    if generator:
        start = int(torch.randint(starts, (), generator=generator))
    return rule.frames_at(start, times)


def crop_box(h: int, w: int, height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of the largest box of the aspect height x width in h x w, in whole pixels."""
    if h * width < w * height:
        return h, max(1, round(h * width / height))
    return max(1, round(w * height / width)), w


def centre_crop_resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return uint8 (t height width c) of uint8 (t h w c): the largest centred box of the target's aspect,
    then one resize.

    The box is rounded to whole pixels. Frames of the right size are returned unchanged. The filter is torch's
    bicubic with antialias on uint8, within one level of Pillow's bicubic and several times as fast.
    """
    check(height > 0 and width > 0, f"resolution must be positive, got {(height, width)}")
    h, w = frames.shape[1:3]
    if (h, w) == (height, width):
        return frames
    box_h, box_w = crop_box(h, w, height, width)
    top = (h - box_h) // 2
    left = (w - box_w) // 2
    box = np.ascontiguousarray(frames[:, top : top + box_h, left : left + box_w])
    pixels = torch.from_numpy(box).permute(0, 3, 1, 2)  # (t c h w)
    resized = interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()  # (t h w c)


def flip_horizontal(video: Tensor) -> Tensor:
    """Return (... h w) mirrored left to right."""
    return video.flip(-1)


def to_float(frames: np.ndarray) -> Tensor:
    """Return uint8 (t h w c) in [0, 255] as float32 (f c h w) in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)  # (f c h w)
    return pixels.to(torch.float32).div_(127.5).sub_(1).contiguous()


def to_uint8(video: Tensor) -> np.ndarray:
    """Return float (... f c h w) in [-1, 1], clamped, as uint8 (... f h w c): the exact inverse of
    ``to_float``.
    """
    levels = video.detach().to("cpu", torch.float32).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.movedim(-3, -1).contiguous().numpy()  # (... f h w c)
