# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video a clip takes: rules on numbers of frames and their times alone. No torch here."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from latte.checks import check, check_name


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
        check_name("rule", self.rule, RULES)
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


def crop_box(h: int, w: int, height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of the largest box of the aspect height x width in h x w, in whole pixels."""
    if h * width < w * height:
        return h, max(1, round(h * width / height))
    return max(1, round(w * height / width)), w
