# SPDX-License-Identifier: Apache-2.0
"""Which frames make a clip, and pixels that survive the way there and back."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import noise

from latte.checks import InputError
from latte.data.clip_rule import RULES, ClipRule, span
from latte.data.clips import centre_crop_resize, choose_frames, flip_horizontal, to_float, to_uint8
from latte.runtime import generator


def rule_of(name: str, frames: int, interval: int) -> ClipRule:
    return ClipRule(frames, interval, name, 25.0 if name == "time" else None)


@pytest.mark.parametrize("name", RULES)
@given(
    frames=st.integers(1, 20), interval=st.integers(1, 6), extra=st.integers(0, 30), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_a_clip_has_its_frames_in_order_inside_the_video(name, frames, interval, extra, seed):
    rule = rule_of(name, frames, interval)
    num_frames = (rule.span or span(frames, interval)) + extra
    times = [i / 25 for i in range(num_frames)]
    chosen = choose_frames(num_frames, rule, generator(seed), times)
    assert len(chosen) == frames
    assert 0 <= chosen[0] <= chosen[-1] < num_frames
    steps = np.diff(chosen)
    if name == "linspace":
        reach = frames * interval - 1 if frames > 1 else 0
        assert chosen[-1] - chosen[0] == reach
        assert set(steps) <= {reach // max(frames - 1, 1), -(-reach // max(frames - 1, 1))}
    else:
        assert (steps == interval).all()


def test_the_released_code_spreads_sixteen_frames_unevenly():
    chosen = ClipRule(16, 3, "linspace").frames_at(0)
    assert chosen == np.linspace(0, 47, 16, dtype=int).tolist()
    assert sorted(np.diff(chosen)) == [3] * 13 + [4] * 2
    assert ClipRule(16, 3).frames_at(2) == list(range(2, 48, 3))
    assert (ClipRule(16, 3).span, ClipRule(16, 3, "linspace").span) == (46, 48)


@pytest.mark.parametrize("name", RULES)
def test_every_start_is_drawn_the_last_one_too_and_equally_often(name):
    rule = rule_of(name, 4, 2)
    num_frames = (rule.span or 7) + 4
    times = [i / 25 for i in range(num_frames)]
    draw = generator("starts", name)
    counts = Counter(choose_frames(num_frames, rule, draw, times)[0] for _ in range(1000))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert min(counts.values()) > 140, counts  # 200 expected, standard deviation 12.6
    assert choose_frames(num_frames, rule, None, times)[0] == 0


@pytest.mark.parametrize("name", RULES)
def test_a_video_one_frame_too_short_is_refused_with_the_numbers(name):
    rule = rule_of(name, 8, 3)
    needed = rule.span or 22
    times = [i / 25 for i in range(needed)]
    assert rule.num_starts(needed, times) == 1
    assert rule.needs(needed, times) is None
    with pytest.raises(InputError, match=r"too-short: .*8 frames") as refusal:
        choose_frames(needed - 1, rule, generator(0), times[:-1])
    assert ("0.840" if name == "time" else str(needed - 1)) in str(refusal.value)


@given(
    st.lists(st.integers(5, 300), min_size=30, max_size=60),
    st.integers(2, 8),
    st.integers(1, 3),
    st.sampled_from([5.0, 10.0, 23.976]),
)
@settings(deadline=None, max_examples=50)
def test_by_time_no_frame_is_nearer_than_the_chosen_one(delays, frames, interval, fps):
    times = (np.cumsum(delays) / 1000).tolist()
    rule = ClipRule(frames, interval, "time", fps)
    for start in range(rule.num_starts(len(times), times)):
        chosen = rule.frames_at(start, times)
        assert chosen[0] == start
        assert chosen == sorted(chosen)
        for i, index in enumerate(chosen):
            moment = times[start] + i * interval / fps
            assert abs(times[index] - moment) <= min(abs(t - moment) for t in times) + 1e-9


def test_by_time_a_mixed_set_moves_at_one_speed_and_rounded_stamps_do_no_harm():
    rule = ClipRule(8, 1, "time", 10.0)
    assert rule.frames_at(0, [i / 30 for i in range(40)]) == list(range(0, 24, 3))
    assert rule.frames_at(5, [i / 10 for i in range(40)]) == list(range(5, 13))
    milliseconds = [round(1000 * i / 30) / 1000 for i in range(31)]
    thirty = ClipRule(16, 2, "time", 30.0)
    assert thirty.num_starts(31, milliseconds) == 1
    assert thirty.frames_at(0, milliseconds) == list(range(0, 31, 2))
    with pytest.raises(InputError, match="no-times"):
        choose_frames(40, rule, generator(0), [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 0},
        {"interval": 0},
        {"rule": "strickt"},
        {"rule": "time"},
        {"rule": "time", "fps": 0.0},
        {"fps": 8.0},
    ],
)
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(InputError, match="|".join(wrong)):
        ClipRule(**wrong)


def test_floats_and_back_lose_nothing():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    there = to_float(levels)
    assert there.shape == (1, 3, 16, 16)
    assert (float(there.min()), float(there.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_uint8(there), levels)
    assert to_uint8(
        torch.tensor([-9.0, 9.0, float(there.min())])[:, None, None].expand(3, 1, 1)
    ).ravel().tolist() == [0, 255, 0]
    assert to_uint8(noise(2, 4, 3, 5, 6)).shape == (2, 4, 5, 6, 3)


def test_flipping_twice_is_the_identity_and_once_is_not():
    video = noise(2, 3, 4, 5)
    assert torch.equal(flip_horizontal(flip_horizontal(video)), video)
    assert torch.equal(flip_horizontal(video)[..., 0], video[..., -1])


def grain(t: int, height: int, width: int) -> np.ndarray:
    return to_uint8(noise(t, 3, height, width, seed=height * width) * 0.4)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64), st.integers(1, 64))
@settings(deadline=None, max_examples=60)
def test_every_source_size_gives_the_exact_size(h, w, height, width):
    assert (
        centre_crop_resize(np.full((2, h, w, 3), 77, np.uint8), height, width).tolist()
        == np.full((2, height, width, 3), 77).tolist()
    )


@pytest.mark.parametrize(
    ("source", "target", "box"),
    [
        ((60, 90), (32, 32), (15, 0, 75, 60)),
        ((90, 60), (32, 32), (0, 15, 60, 75)),
        ((40, 100), (20, 40), (10, 0, 90, 40)),
        ((24, 24), (48, 48), (0, 0, 24, 24)),
    ],
)
def test_the_centre_is_cut_and_shrunk_as_pillow_does(source, target, box):
    frames = grain(2, *source)
    ours = centre_crop_resize(frames, *target)
    pillow = [Image.fromarray(f).crop(box).resize(target[::-1], Image.Resampling.BICUBIC) for f in frames]
    assert np.abs(ours.astype(int) - np.stack([np.asarray(image) for image in pillow])).max() <= 1


def test_shrinking_does_not_alias_and_the_right_size_is_left_alone():
    stripes = np.zeros((1, 128, 128, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert np.abs(centre_crop_resize(stripes, 32, 32)[:, :, 2:-2].astype(int) - 127.5).max() <= 2
    frames = grain(1, 32, 48)
    assert centre_crop_resize(frames, 32, 48) is frames
    with pytest.raises(InputError, match="resolution"):
        centre_crop_resize(frames, 0, 48)
