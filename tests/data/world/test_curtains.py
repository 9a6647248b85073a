# SPDX-License-Identifier: Apache-2.0
"""Opening curtains: their motion is read back from the pixels, and no scene of the world looks like them."""

from dataclasses import replace

import numpy as np
import pytest

from latte.checks import InputError
from latte.data.config import DataConfig
from latte.data.world.curtains import gap_at, render_frame

CURTAINS = DataConfig(
    kind="procedural", scenes="curtains", language="mixed", resolution=64, frames=17, hold_out=8
)
RED, BLUE = (226, 48, 44), (26, 36, 78)


def clip_of(gaps, pairs=(("red", "blue"),) * 17):
    """A clip (t 64 64 3) of these gaps."""
    return np.stack([render_frame(pair, gap, 64, 64) for gap, pair in zip(gaps, pairs, strict=True)])


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48)])
def test_a_curtain_opens_from_the_middle_to_both_sides(size):
    height, width = size
    scenes = replace(CURTAINS, resolution=size, frames=25).scene_set
    for index in range(8):
        clip = scenes.render_clip(index).astype(int)
        assert (clip == clip[:, :1]).all(), "every row is the same"
        assert (clip == clip[:, :, ::-1]).all(), "both halves are the same"
        wall = (abs(clip[:, 0] - clip[0, 0, 0]).max(-1) > 30).mean(-1)  # (t) a share of the width
        assert wall[0] < 0.1
        assert 0.4 < wall[8] < 0.6
        assert np.diff(wall).min() >= 0
        assert wall[-1] == 1, "it stays open"
    frame = render_frame(("red", "blue"), 0.5, height, width)
    assert tuple(frame[0, 0]) == RED
    assert tuple(frame[height // 2, width // 2]) == BLUE


def test_an_opening_curtain_is_read_from_the_pixels():
    scenes = CURTAINS.scene_set
    noise = np.random.default_rng(0).normal(0, 15, (17, 64, 64, 3))
    for index in range(12):
        clip = scenes.render_clip(index)
        noisy = np.clip(clip + noise, 0, 255).astype(np.uint8)
        for shown in (clip, noisy):
            assert scenes.read_label(shown) == 0
            assert scenes.is_consistent(shown)
        assert scenes.read_label(clip[::-1]) is None, "it closes"
        assert scenes.read_label(np.repeat(clip[8:9], 17, 0)) is None, "it stands still"
        assert scenes.read_label(np.roll(clip, 32, 2)) is None, "it opens at the sides"
    sides = [
        np.roll(frame, -round(gap * 32), 1) for gap, frame in zip(gaps_of(), clip_of(gaps_of()), strict=True)
    ]
    assert scenes.read_label(np.stack(sides)) is None, "it opens from the left"
    assert scenes.read_label(clip_of([0] * 8 + [1] * 9)) is None, "it vanishes"
    faint = clip_of(gaps_of()) // 8 + 100
    assert scenes.read_label(faint) is None, "hardly visible"


def gaps_of():
    """The gaps of a middle curtain."""
    return [gap_at(frame / 8) for frame in range(17)]


def test_no_scene_of_the_world_is_a_curtain():
    curtains, world = CURTAINS.scene_set, replace(CURTAINS, scenes="world").scene_set
    assert [curtains.read_label(world.render_clip(index)) for index in range(36)] == [None] * 36


@pytest.mark.parametrize("place", [0, 1])
def test_a_change_of_colour_is_inconsistent(place):
    later = ("orange", "blue") if place == 0 else ("red", "grey")
    clip = clip_of(gaps_of(), [("red", "blue")] * 5 + [later] * 5 + [("red", "blue")] * 7)
    scenes = CURTAINS.scene_set
    assert scenes.read_label(clip) == 0
    assert not scenes.is_consistent(clip)


def test_a_jump_is_inconsistent():
    clip = clip_of(gaps_of())
    scenes = CURTAINS.scene_set
    assert scenes.is_consistent(clip)
    assert not scenes.is_consistent(np.concatenate([clip[:6], clip[9:]]))


def test_a_clip_depends_on_seed_and_index_only():
    scenes, longer = CURTAINS.scene_set, replace(CURTAINS, frames=25).scene_set
    assert np.array_equal(scenes.render_clip(3), longer.render_clip(3)[:17])
    assert not np.array_equal(scenes.render_clip(3), replace(CURTAINS, seed=1).scene_set.render_clip(3))
    clips = {scenes.render_clip(index).tobytes() for index in range(40)}
    assert len(clips) > 34, "clips of one pair of colours differ"


def test_captions_name_both_colours_in_both_languages_and_some_pairs_are_held_out():
    scenes = CURTAINS.scene_set
    seen = {scenes.caption(index) for index in range(200)}
    assert seen <= set(scenes.captions)
    assert len(seen) > 0.8 * len(scenes.captions)
    assert not set(scenes.captions) & set(scenes.held_out_captions)
    assert (len(scenes.captions), len(scenes.held_out_captions)) == (68, 8)
    assert "a red curtain opens in front of a blue wall" in scenes.captions
    assert "an orange curtain opens in front of a blue wall" in scenes.captions
    assert "红色的幕布在蓝色的墙前拉开" in scenes.captions
    english = replace(CURTAINS, language=None).scene_set
    assert set(english.captions) < set(scenes.captions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "de"}, "data.language is 'de'"),
        ({"hold_out": 1}, r"data.hold_out must be 0 or in \[2, 38\] for data.scenes=curtains, got 1"),
        ({"hold_out": 39}, "got 39"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(CURTAINS, **changes)
