# SPDX-License-Identifier: Apache-2.0
"""Circling stars: their motion is read back from the pixels, and no scene of the world moves like them."""

from dataclasses import replace

import numpy as np
import pytest

from latte.checks import InputError
from latte.data.config import DataConfig
from latte.data.world.circles import turns

CIRCLES = DataConfig(
    kind="procedural", scenes="circles", language="mixed", resolution=64, frames=17, hold_out=8
)


def test_a_clip_is_one_round_clockwise():
    scenes = CIRCLES.scene_set
    for index in range(12):
        clip = scenes.render_clip(index)
        assert turns(clip) == pytest.approx(1.0, abs=0.05)
        assert turns(clip[::-1]) == pytest.approx(-1.0, abs=0.05)
        assert turns(clip[:, ::-1]) == pytest.approx(-1.0, abs=0.05), "a mirror image turns the other way"
        assert scenes.read_label(clip[::-1]) is None
        assert scenes.read_label(np.repeat(clip[:1], 17, 0)) is None


def test_no_scene_of_the_world_goes_round():
    circles, world = CIRCLES.scene_set, replace(CIRCLES, scenes="world").scene_set
    assert [circles.read_label(world.render_clip(index)) for index in range(36)] == [None] * 36


def test_a_frame_is_a_function_of_seed_index_and_time():
    scenes, longer = CIRCLES.scene_set, replace(CIRCLES, frames=25).scene_set
    assert np.array_equal(scenes.render_clip(3), longer.render_clip(3)[:17])
    assert not np.array_equal(scenes.render_clip(3), replace(CIRCLES, seed=1).scene_set.render_clip(3))
    assert np.array_equal(longer.render_clip(3)[0], longer.render_clip(3)[16]), "a round takes 16 frames"


def test_captions_name_both_colours_in_both_languages_and_some_pairs_are_held_out():
    scenes = CIRCLES.scene_set
    seen = {scenes.caption(index) for index in range(200)}
    assert seen <= set(scenes.captions)
    assert len(seen) > 0.8 * len(scenes.captions)
    assert not set(scenes.captions) & set(scenes.held_out_captions)
    assert (len(scenes.captions), len(scenes.held_out_captions)) == (68, 8)
    assert "a red star goes round in circles on a blue ground" in scenes.captions
    assert "an orange star goes round in circles on a blue ground" in scenes.captions
    english = replace(CIRCLES, language=None).scene_set
    assert set(english.captions) < set(scenes.captions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "de"}, "data.language is 'de'"),
        ({"hold_out": 1}, r"data.hold_out must be 0 or in \[2, 38\] for data.scenes=circles, got 1"),
        ({"hold_out": 39}, "got 39"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(CIRCLES, **changes)
