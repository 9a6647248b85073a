# SPDX-License-Identifier: Apache-2.0
"""What is drawn is what is measured: direction, colour and shape of a clip can be read back from its pixels
alone.
"""

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from latte.checks import InputError
from latte.data.procedural import (
    COLOURS,
    DIRECTIONS,
    GROUND,
    SHAPES,
    draw_scene,
    read_motion,
    render,
    split_combinations,
)

SIZES = [(8, 32, 32), (8, 64, 64), (16, 48, 40)]


@pytest.mark.parametrize(("frames", "height", "width"), SIZES)
def test_the_measured_scene_is_the_drawn_one(frames, height, width):
    wrong = []
    for index in range(120):
        scene = draw_scene(3, index, frames)
        seen = read_motion(render(scene, frames, height, width))
        if (seen.direction, seen.colour, seen.shape, seen.coherent) != (
            scene.direction,
            scene.colour,
            scene.shape,
            True,
        ):
            wrong.append((index, scene.caption, seen))
    assert not wrong, f"{len(wrong)} of 120: {wrong[:3]}"


def test_the_shape_stays_inside_the_frame_and_keeps_its_area():
    for index in range(120):
        frames = render(draw_scene(1, index, 8), 8, 64, 64)
        assert read_motion(frames).consistent
        ground = (frames == np.array(GROUND, np.uint8)).all(-1)
        assert ground[:, [0, -1]].all()
        assert ground[:, :, [0, -1]].all()
        areas = (~ground).sum((1, 2))
        assert areas.min() > 0.7 * areas.max()


def test_a_clip_is_a_function_of_seed_and_index():
    torch.manual_seed(1)
    first = [render(draw_scene(0, i, 8), 8, 32, 32) for i in (0, 5, 10**9)]
    torch.manual_seed(2)
    again = [render(draw_scene(0, i, 8), 8, 32, 32) for i in (10**9, 5, 0)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert draw_scene(0, 5, 8) != draw_scene(1, 5, 8)
    assert len({draw_scene(0, i, 8) for i in range(500)}) == 500


def test_labels_captions_and_attributes_are_even():
    scenes = [draw_scene(0, i, 8) for i in range(1440)]
    assert Counter(s.label for s in scenes) == dict.fromkeys(range(4), 360)
    assert all(list(DIRECTIONS)[s.label] == s.direction for s in scenes)
    counts = Counter((s.shape, s.colour) for s in scenes)
    assert set(counts) == set(product(SHAPES, COLOURS))
    assert sum((n - 80) ** 2 / 80 for n in counts.values()) < 40.8, (
        "chi-squared with 17 degrees of freedom, 0.1 % level"
    )
    assert scenes[0].caption == f"a {scenes[0].colour} {scenes[0].shape} moves {scenes[0].direction}"


@pytest.mark.parametrize("n", [2, 3, 6, 10, 72])
def test_one_combination_in_n_is_held_out_and_never_drawn(n):
    drawn, held = split_combinations(n)
    assert (len(held), len({*drawn, *held})) == (72 // n, 72)
    scenes = [draw_scene(0, index, 8, hold_out=n) for index in range(3000)]
    seen = Counter((scene.shape, scene.colour, scene.direction) for scene in scenes)
    assert set(seen) == set(drawn)
    assert Counter(scene.direction for scene in scenes) == dict.fromkeys(DIRECTIONS, 750)
    assert min(seen.values()) > 750 / 18 / 2, "even enough"


def test_of_the_held_out_every_pair_of_attributes_is_still_drawn():
    drawn, held = split_combinations(6)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert {(place[one], place[other]) for place in drawn} == {
            (place[one], place[other]) for place in (*drawn, *held)
        }
    for attribute in range(3):
        assert len(set(Counter(place[attribute] for place in held).values())) == 1, (
            "every value is held out equally often"
        )


def test_nothing_held_out_changes_nothing():
    assert split_combinations(0)[1] == ()
    scene = draw_scene(3, 14, 8)
    assert (scene.caption, scene.size, scene.speed) == (
        "a magenta circle moves left",
        0.14378584044262058,
        0.06180921978474322,
    )
    other = draw_scene(3, 14, 8, hold_out=6)
    assert (other.size, other.speed, other.start, other.direction) == (
        scene.size,
        scene.speed,
        scene.start,
        scene.direction,
    )


@pytest.mark.parametrize("n", [1, -6, 73])
def test_a_share_that_cannot_be_held_out_is_refused(n):
    with pytest.raises(InputError, match=f"data.hold_out is {n}"):
        split_combinations(n)


def test_the_speed_does_not_depend_on_the_frame_count():
    slow, fast = draw_scene(0, 7, 16), draw_scene(0, 7, 8)
    assert slow.speed * 15 == pytest.approx(fast.speed * 7)
    last = [render(scene, frames, 32, 32)[-1] for scene, frames in ((slow, 16), (fast, 8))]
    np.testing.assert_array_equal(*last)


def test_what_is_not_a_moving_shape_is_not_taken_for_one():
    scene = draw_scene(0, 5, 8)
    frozen = np.repeat(render(draw_scene(0, 1, 8), 8, 32, 32)[:1], 8, 0)
    assert read_motion(frozen).direction is None
    empty = np.broadcast_to(np.array(GROUND, np.uint8), (8, 32, 32, 3))
    assert read_motion(empty) == read_motion(np.zeros((8, 32, 32, 3), np.uint8))
    assert not read_motion(empty).coherent
    two = np.maximum(
        render(draw_scene(0, 0, 8), 8, 64, 64), render(draw_scene(0, 0, 8), 8, 64, 64)[:, ::-1, ::-1]
    )
    split = [
        i
        for i in range(40)
        if not read_motion(np.maximum(*(render(draw_scene(s, i, 8), 8, 64, 64) for s in (0, 1)))).coherent
    ]
    assert len(split) > 10, "two shapes in one clip are seen as two"
    assert two.shape == (8, 64, 64, 3)
    red, blue = (render(replace(scene, colour=name), 8, 64, 64) for name in ("red", "blue"))
    assert read_motion(red).consistent
    turning = read_motion(np.concatenate([red[:5], blue[5:]]))
    assert (turning.direction, turning.coherent, turning.keeps_colour) == (scene.direction, True, False)
    growing = np.stack([render(replace(scene, size=0.13 + 0.006 * t), 8, 64, 64)[t] for t in range(8)])
    assert (read_motion(growing).coherent, read_motion(growing).keeps_size) == (True, False)
    square = render(replace(scene, shape="square"), 8, 64, 64)
    reshaped = read_motion(
        np.concatenate([render(replace(scene, shape="circle"), 8, 64, 64)[:4], square[4:]])
    )
    assert (reshaped.coherent, reshaped.keeps_shape, reshaped.consistent) == (True, False, False)
    backwards = render(draw_scene(0, 2, 8), 8, 32, 32)[::-1]
    assert read_motion(backwards).direction == "right"
    assert draw_scene(0, 2, 8).direction == "left"
