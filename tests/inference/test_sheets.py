# SPDX-License-Identifier: Apache-2.0
"""The shapes of a sample sheet: spread over the buckets, every clip in one."""

import pytest

from latte.data.buckets import Bucket, Buckets
from latte.inference.generate import SampleConfig
from latte.inference.sheets import evenly_spaced, row_captions, sheet_parts

CONFIG = SampleConfig(batch=6)
SQUARE = Bucket(8, 64, 64, tokens=100)
WIDE = Bucket(8, 48, 80, tokens=95)
TALL = Bucket(8, 80, 48, tokens=95)
LONG = Bucket(16, 64, 64, tokens=200)
HUGE = Bucket(99, 64, 64, tokens=9000)


def test_without_buckets_all_clips_have_the_shape_of_the_model():
    (part,) = sheet_parts(None, 4, CONFIG)
    assert (range(4)[part.clips], part.config, part.frames, part.size) == (range(4), CONFIG, None, None)
    assert row_captions(["up", "down"], [part], 2) == ["up", "down"]
    assert row_captions(None, [part], 2) is None


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_every_clip_has_one_shape_and_the_shapes_take_turns(count):
    buckets = Buckets(SQUARE, (SQUARE, WIDE, TALL, LONG))
    parts = sheet_parts(buckets, count, CONFIG)
    taken = sorted(clip for part in parts for clip in range(count)[part.clips])
    assert taken == list(range(count))
    assert len(parts) == min(count, 4)
    if count >= 4:
        assert [part.name for part in parts] == ["8x80x48", "8x64x64", "16x64x64", "8x48x80"], "by aspect"
        assert row_captions(["a"] * count, parts, count)[3] == "a, 8x48x80"
        assert row_captions(None, parts, count)[2] == "16x64x64"


def test_fewer_clips_of_a_larger_bucket_are_generated_at_once():
    parts = sheet_parts(Buckets(SQUARE, (SQUARE, WIDE, LONG, HUGE)), 4, CONFIG)
    assert {part.name: part.config.batch for part in parts} == {
        "8x64x64": 6,
        "16x64x64": 3,
        "99x64x64": 1,
        "8x48x80": 6,
    }


def test_evenly_spaced_items_are_at_most_as_many_as_there_are():
    assert evenly_spaced("abcdef", 3) == ["a", "c", "e"]
    assert evenly_spaced("ab", 3) == ["a", "b"]
    assert evenly_spaced("ab", 0) == []
