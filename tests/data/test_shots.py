# SPDX-License-Identifier: Apache-2.0
"""Known cuts, dissolves and fades are found at their frames; motion, flashes and light are none of them."""

import numpy as np
import pytest

from latte.data.shots import SIDE, Shot, find_shots


def scene(seed: int, t: int, speed: float = 0.1) -> np.ndarray:
    """uint8 thumbnails (t h w c) of a smooth picture that moves by ``speed`` pixels a frame."""
    random = np.random.default_rng(seed)
    phases = random.uniform(0, 2 * np.pi, (4, 3))
    places = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), -1) / SIDE * 2 * np.pi  # (h w 2)
    waves = random.integers(1, 3, (4, 2))
    color = random.uniform(60, 190, 3)
    frames = []
    for frame in range(t):
        moved = places + frame * speed / SIDE * 2 * np.pi
        picture = sum(
            np.sin((moved @ wave)[..., None] + phase) for wave, phase in zip(waves, phases, strict=True)
        )
        frames.append(np.clip(color + 30 * np.asarray(picture), 0, 255))
    return np.stack(frames).astype(np.uint8)


def mixed(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Dissolve from ``first`` into ``last``, of the same length."""
    share = (np.arange(len(first)) + 1)[:, None, None, None] / (len(first) + 1)
    return ((1 - share) * first + share * last).astype(np.uint8)


def changes(frames: np.ndarray) -> list[tuple[int, str]]:
    """(first frame, rule) of every shot after the first."""
    return [(shot.start, shot.rule) for shot in find_shots(frames)[1:]]


def test_every_cut_is_found_at_its_frame_and_nothing_else():
    random = np.random.default_rng(0)
    lengths = random.integers(12, 60, 60)
    frames = np.concatenate([scene(seed, t, random.uniform(0, 0.6)) for seed, t in enumerate(lengths)])
    truth = {int(place) for place in np.cumsum(lengths)[:-1]}
    found = {place for place, rule in changes(frames) if rule == "cut"}
    print(f"cuts {len(truth)}, found {len(found & truth)}, false {len(found - truth)}")
    assert len(truth) == 59
    assert len(found & truth) >= 0.98 * len(truth), "recall"
    assert len(found & truth) >= 0.98 * len(found), "precision"


@pytest.mark.parametrize("length", [8, 12, 16, 24])
def test_frames_of_a_dissolve_are_in_no_shot(length):
    first = scene(1, 40 + length, speed=0.02)
    last = scene(2, 40 + length, speed=0.02)
    frames = np.concatenate([first[:40], mixed(first[40:], last[:length]), last[length:]])
    before, after = find_shots(frames)
    assert (before.rule, after.rule) == ("start", "dissolve")
    assert abs(before.end - 40) <= 4
    assert abs(after.start - 40 - length) <= 4


@pytest.mark.parametrize("black", [1, 8])
def test_a_fade_through_black_is_in_no_shot(black):
    ramp = np.linspace(1, 0, 10)[:, None, None, None]
    first = scene(1, 40) * np.concatenate([np.ones((30, 1, 1, 1)), ramp])
    last = scene(2, 40) * np.concatenate([ramp[::-1], np.ones((30, 1, 1, 1))])
    frames = np.concatenate([first, np.zeros((black, SIDE, SIDE, 3)), last]).astype(np.uint8)
    before, after = find_shots(frames)
    assert (before.rule, after.rule) == ("start", "fade")
    assert 28 <= before.end <= 32
    assert 48 <= after.start - black <= 52


def test_a_black_leader_is_dropped():
    frames = np.concatenate([np.zeros((20, SIDE, SIDE, 3), np.uint8), scene(1, 30)])
    (shot,) = find_shots(frames)
    assert (shot.end, shot.rule) == (50, "fade")
    assert 20 <= shot.start <= 22


def flash(frames: np.ndarray) -> np.ndarray:
    frames[20:22] = 250
    return frames


def lamp(frames: np.ndarray) -> np.ndarray:
    frames[20:] = np.clip(1.6 * frames[20:].astype(float), 0, 255)
    return frames


def blink(frames: np.ndarray) -> np.ndarray:
    frames[20:26] = 0
    return frames


def shake(frames: np.ndarray) -> np.ndarray:
    for t in range(10, 40):
        frames[t] = np.roll(frames[t], (t * 5 % 3, t * 3 % 2), (0, 1))
    return frames


@pytest.mark.parametrize("disturb", [flash, lamp, blink, shake, lambda frames: frames])
def test_what_happens_within_a_shot_is_no_change_of_scene(disturb):
    assert find_shots(disturb(scene(3, 50, speed=0.02))) == [Shot(0, 50, "start")]


@pytest.mark.parametrize("t", [1, 2, 3, 20])
def test_a_video_without_a_change_is_one_shot(t):
    for frames in (scene(4, t), np.zeros((t, SIDE, SIDE, 3), np.uint8)):
        assert find_shots(frames) == [Shot(0, t, "start")]


def test_the_threshold_decides():
    frames = np.concatenate([scene(1, 30), scene(2, 30)])
    assert changes(frames) == [(30, "cut")]
    assert find_shots(frames, threshold=10) == [Shot(0, 60, "start")]
