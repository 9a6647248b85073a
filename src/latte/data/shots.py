# SPDX-License-Identifier: Apache-2.0
"""Shots of a video: where it cuts, dissolves or fades from one scene to the next.

A frame is looked at as a thumbnail. At a cut the picture jumps, by much more than from frame to frame around
it, and does not come back, as it does after a flash. In a dissolve the frames between two different pictures
are mixtures of both. A fade passes through black. Axes: t frames, h height, w width, c channels (RGB).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SIDE = 16  # pixels of a thumbnail: motion within a shot changes it little, another scene nearly all of it
AROUND = 8  # frames before and after, whose median change is what is usual there
FLASH = 2  # frames that a flash may last
JUMP = 30.0  # mean change in grey levels that is a cut at twice the usual change
SMALL_JUMP = 15.0  # that is one at CALM times the usual change: another camera in the same room
BUSY = 2.0
CALM = 8.0
HALF_LENGTHS = (4, 6, 9, 13)  # of dissolves, in frames
MIXED = (
    0.12  # largest distance of a frame in a dissolve from the mixture of its ends, in parts of their distance
)
SAME_PICTURE = (
    0.6  # correlation of the ends of a dissolve from which on they are one picture in another light
)
SAME_SCENE = 0.9  # correlation from which on the scene after a jump or a fade is the one before it
BLACK = 10.0  # grey levels: mean and standard deviation of a black frame are below
BRIGHT = 30.0  # mean of the picture on one side of a fade at least: a lamp that blinks at night is no fade
RAMP = 30  # frames that a fade lasts at most, each way


@dataclass(frozen=True)
class Shot:
    """Frames ``start`` to ``end`` - 1; ``rule`` is what begins it: start, cut, dissolve or fade."""

    start: int
    end: int
    rule: str


@dataclass(frozen=True)
class Change:
    """A change of scene: frames ``start`` to ``end`` - 1 belong to neither; none do at a cut."""

    start: int
    end: int
    rule: str


def find_shots(thumbnails: np.ndarray, threshold: float = 1.0) -> list[Shot]:
    """Return the shots of uint8 thumbnails (t h w c), in order; one shot when there is no change of scene.

    ``threshold`` multiplies the change that makes a cut: below 1 finds more, above 1 fewer. Frames of
    dissolves and fades are in no shot.
    """
    length = len(thumbnails)
    black = is_black(thumbnails)
    places = find_cuts(thumbnails, threshold)
    cuts = [Change(t, t, "cut") for t in places if not (black[t - 1] or black[t])]
    found = without_overlaps([*find_fades(thumbnails), *cuts, *find_dissolves(thumbnails)])
    edges = [Change(0, 0, "start"), *found, Change(length, length, "end")]
    return [
        Shot(before.end, after.start, before.rule)
        for before, after in pairwise(edges)
        if after.start > before.end
    ]


def without_overlaps(changes: list[Change]) -> list[Change]:
    """Return ``changes`` in order of time; of those that touch, the first in the list stays."""
    kept: list[Change] = []
    for change in changes:
        if all(change.end + 1 < other.start or other.end + 1 < change.start for other in kept):
            kept.append(change)
    return sorted(kept, key=lambda change: change.start)


def changes_by(thumbnails: np.ndarray, step: int) -> np.ndarray:
    """Return the mean absolute change from frame t - step to t, float64 (t), 0 for the first ``step``."""
    found = np.zeros(len(thumbnails))
    for t in range(step, len(thumbnails)):
        found[t] = difference(thumbnails[t - step], thumbnails[t])
    return found


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean absolute difference of two thumbnails in grey levels."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def find_cuts(thumbnails: np.ndarray, threshold: float) -> list[int]:
    """Return the frames at which another scene begins from one frame to the next."""
    changes = changes_by(thumbnails, 1)
    jumps = changes.copy()
    for step in range(2, FLASH + 2):  # after a flash the picture is what it was before it
        longer = changes_by(thumbnails, step)
        jumps = np.minimum(jumps, longer)
        ahead = np.full_like(jumps, np.inf)
        ahead[: len(jumps) - step + 1] = longer[step - 1 :]
        jumps[1:] = np.minimum(jumps, ahead)[1:]
    ratios = jumps / (usual(changes) + 1)
    large = (jumps >= JUMP * threshold) & (ratios >= BUSY)
    small = (jumps >= SMALL_JUMP * threshold) & (ratios >= CALM)
    return [
        int(t)
        for t in np.flatnonzero(large | small)
        if changes[t] == changes[t - 1 : t + 2].max()
        and correlation(thumbnails[t - 1], thumbnails[t]) < SAME_SCENE
    ]


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of two thumbnails, which no change of brightness and contrast alters; 0 when one
    is of one colour.
    """
    first = one.astype(np.float64).ravel() - one.mean()
    second = other.astype(np.float64).ravel() - other.mean()
    scale = np.sqrt(first @ first * (second @ second))
    return float(first @ second / scale) if scale > 0 else 0.0


def usual(changes: np.ndarray) -> np.ndarray:
    """Return the median of AROUND values before and after each of ``changes`` (t), itself left out."""
    padded = np.pad(changes, AROUND, constant_values=np.nan)
    padded[AROUND] = np.nan  # the first frame has no change
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * AROUND + 1)
    others = np.delete(windows, AROUND, axis=1)  # (t, 2 AROUND)
    found = np.zeros(len(changes))
    known = ~np.isnan(others).all(axis=1)
    found[known] = np.nanmedian(others[known], axis=1)
    return found


def is_black(thumbnails: np.ndarray) -> np.ndarray:
    """Return whether each frame is black, bool (t)."""
    return (thumbnails.mean((1, 2, 3)) < BLACK) & (thumbnails.std((1, 2, 3)) < BLACK)


def find_fades(thumbnails: np.ndarray) -> Iterator[Change]:
    """Yield the runs of black frames with the ramps into and out of them, unless the scene comes back."""
    level = thumbnails.mean((1, 2, 3))
    black = is_black(thumbnails)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], black.view(np.int8), [0]])))
    for start, end in edges.reshape(-1, 2):
        first = int(start)
        while first > max(0, start - RAMP) and level[first - 1] > level[first] + 0.5:
            first -= 1
        after = int(end)
        while after < min(len(level), end + RAMP) and level[after] > level[after - 1] + 0.5:
            after += 1
        ends = [thumbnails[t] for t in (first - 1, after) if 0 <= t < len(level)]
        returns = len(ends) == 2 and correlation(*ends) >= SAME_SCENE
        if not returns and max((end.mean() for end in ends), default=0) >= BRIGHT:
            yield Change(first, after, "fade")


def find_dissolves(thumbnails: np.ndarray) -> Iterator[Change]:
    """Yield where frames are mixtures of the two pictures before and after them, the longest first."""
    found = []
    for half in HALF_LENGTHS:
        for t in range(half, len(thumbnails) - half):
            distance = difference(thumbnails[t - half], thumbnails[t + half])
            if distance < JUMP:
                continue
            residual = mixture_residual(thumbnails[t - half : t + half + 1].astype(np.float32)) / distance
            if residual < MIXED:
                found.append((-half, residual, t - half + 1, t + half))
    for _, _, start, end in sorted(found):
        yield Change(start, end, "dissolve")


def mixture_residual(window: np.ndarray) -> float:
    """Return how far float32 frames (t h w c) are from mixing from the first into the last, in grey levels;
    infinity when both show one picture in another light.
    """
    first = window[0]
    last = window[-1]
    if correlation(first, last) > SAME_PICTURE:
        return float("inf")
    quarters = [len(window) // 4, len(window) // 2, len(window) - 1 - len(window) // 4]
    shares = [place / (len(window) - 1) for place in quarters]
    residuals = [
        np.abs(window[place] - (1 - share) * first - share * last).mean()
        for place, share in zip(quarters, shares, strict=True)
    ]
    return float(max(residuals))
