# SPDX-License-Identifier: Apache-2.0
"""Buckets from settings, the bucket that a clip goes to, and the batch of a bucket."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latte.autoencoder.compression import Compression
from latte.checks import InputError
from latte.data.bucket_settings import Grid, buckets_of, size_near
from latte.data.buckets import Bucket, Buckets, check_world, lost_share, upscaled
from latte.data.clips import centre_crop_resize
from latte.data.datasets import DataConfig

PLAIN = Grid("builtin", Compression(4, 8), patch_size=2)
TEMPORAL = Grid("builtin_temporal", Compression(4, 8, temporal_factor=4, causal=True), patch_size=2)


def listed(*names: str, grid: Grid = PLAIN, **changes) -> Buckets:
    frames, height, width = map(int, names[0].split("x"))
    data = DataConfig(root=".", frames=frames, resolution=(height, width), buckets=names, **changes)
    found = buckets_of(data, grid)
    assert found is not None
    return found


def names_of(buckets: Buckets | None) -> list[str]:
    assert buckets is not None
    return [str(bucket) for bucket in buckets.shapes]


def auto(grid: Grid = PLAIN, **changes) -> Buckets | None:
    return buckets_of(
        DataConfig(root=".", **({"frames": 16, "resolution": 256, "buckets": "auto"} | changes)), grid
    )


def test_without_the_setting_there_are_no_buckets():
    assert buckets_of(DataConfig(root="."), PLAIN) is None


def test_listed_buckets_have_their_latents_and_tokens():
    plain = listed("16x256x256", "8 x 128 × 512")
    assert plain.shapes == (
        Bucket(16, 256, 256, (16, 32, 32), 16 * 16 * 16),
        Bucket(8, 128, 512, (8, 16, 64), 8 * 8 * 32),
    )
    temporal = listed("17x64x64", "1x64x128", grid=replace(TEMPORAL, tube=1))
    assert [bucket.latent for bucket in temporal.shapes] == [(5, 8, 8), (1, 8, 16)]
    assert [bucket.tokens for bucket in temporal.shapes] == [5 * 16, 1 * 32]
    tubes = listed("16x64x64", "4x64x64", grid=replace(PLAIN, tube=2))
    assert [bucket.tokens for bucket in tubes.shapes] == [8 * 16, 2 * 16]
    assert plain.extent == (16, 32, 64)
    assert (plain.has_images, temporal.has_images) == (False, True)


def test_auto_buckets_are_every_length_at_every_aspect():
    assert names_of(auto()) == [
        f"{frames}x{height}x{width}"
        for frames in (16, 8, 4)
        for height, width in ((336, 192), (288, 224), (256, 256), (224, 288), (192, 336))
    ]
    assert names_of(auto(grid=TEMPORAL, frames=17, bucket_aspects=(1, 1, 1))) == [
        "17x256x256",
        "9x256x256",
        "5x256x256",
    ]
    chosen = auto(bucket_aspects=(0.5, 2, 3), bucket_lengths=(1, 16), bucket_pixels=128 * 128)
    assert names_of(chosen) == [
        f"{frames}x{size}" for frames in (16, 1) for size in ("160x80", "128x128", "256x256", "80x160")
    ]


@given(st.floats(1 / 16, 16), st.integers(1, 400), st.sampled_from([8, 16, 32]))
def test_sizes_have_at_most_the_pixels_and_portrait_is_landscape_on_its_side(aspect, area, unit):
    pixels = area * unit * unit
    height, width = size_near(aspect, pixels, unit)
    assert height % unit == width % unit == 0
    assert 0 < height * width <= pixels
    assert size_near(1 / aspect, pixels, unit) == (width, height) or abs(aspect - 1) < 1e-9


@given(*(st.integers(1, 300) for _ in range(2)), *(st.integers(1, 12) for _ in range(2)))
def test_the_lost_share_is_what_the_crop_drops(height, width, rows, columns):
    """The largest box of the aspect, in float64; the crop itself keeps whole pixels."""
    bucket = Bucket(1, 8 * rows, 8 * columns)
    aspect = columns / rows
    kept = min(height, width / aspect) * min(width, height * aspect) / (height * width)
    assert lost_share(height, width, bucket) == pytest.approx(1 - kept, abs=1 / min(height, width))
    assert 0 <= lost_share(height, width, bucket) < 1


def test_the_lost_share_is_counted_in_the_cropped_frames():
    frames = np.zeros((1, 40, 100, 3), np.uint8)
    frames[0, :, :30] = 255  # as much of the left as a square from the middle drops
    assert lost_share(40, 100, Bucket(1, 16, 16)) == 0.6
    assert centre_crop_resize(frames, 16, 16).max() == 0
    frames[0, :, 30] = 255
    assert centre_crop_resize(frames, 16, 16).max() > 0


FIVE = listed("16x256x256", "16x192x336", "16x336x192", "8x256x256", "8x192x336")


@pytest.mark.parametrize(
    ("height", "width", "fits", "bucket"),
    [
        (256, 256, (16, 8), "16x256x256"),
        (1080, 1920, (16, 8), "16x192x336"),
        (1920, 1080, (16, 8), "16x336x192"),
        (1080, 1920, (8,), "8x192x336"),
        (1920, 1080, (8,), "8x256x256"),  # no portrait bucket is short enough
        (480, 640, (16, 8), "16x256x256"),  # 4:3 loses 25 % in a square, 24 % in 7:4: equal, the larger one
        (200, 300, (16, 8), "16x192x336"),  # 3:2 loses a third in a square, 14 % in 7:4
        (100, 100, (16, 8), "16x256x256"),
    ],
)
def test_a_clip_goes_to_the_bucket_that_crops_it_least(height, width, fits, bucket):
    refused = {length: None if length in fits else "too-short: of course" for length in (16, 8)}
    assert str(FIVE.shapes[FIVE.place(height, width, refused)]) == bucket


def test_of_equal_buckets_it_is_one_without_upscaling_the_largest_that_is_filled():
    sizes = listed("4x128x128", "4x256x256", "4x64x64")
    chosen = {
        side: str(sizes.shapes[sizes.place(side, side, {4: None})]) for side in (40, 64, 127, 128, 255, 999)
    }
    assert chosen == {
        40: "4x64x64",
        64: "4x64x64",
        127: "4x64x64",
        128: "4x128x128",
        255: "4x128x128",
        999: "4x256x256",
    }
    assert upscaled(127, 500, sizes.shapes[0])
    assert not upscaled(128, 500, sizes.shapes[0])


@given(st.integers(16, 2000), st.integers(16, 2000), st.sets(st.sampled_from([16, 8])))
def test_no_other_bucket_that_fits_crops_noticeably_less(height, width, fits):
    refused = {length: None if length in fits else f"too-short: {length}" for length in (16, 8)}
    found = FIVE.place(height, width, refused)
    lost = {
        i: lost_share(height, width, bucket) for i, bucket in enumerate(FIVE.shapes) if bucket.frames in fits
    }
    if not fits:
        assert found == "too-short: 8", "the reason is that of the shortest bucket"
    elif isinstance(found, str):
        assert min(lost.values()) > 0.5
        assert found.startswith(f"size: its frames of {width}x{height} would lose ")
    else:
        assert lost[found] <= min(lost.values()) + 0.02
        assert FIVE.shapes[found].frames == max(fits) or all(
            lost[i] > min(lost.values()) + 0.02 for i in lost if FIVE.shapes[i].frames == max(fits)
        )


def test_the_batch_of_a_bucket_has_the_tokens_of_the_reference():
    buckets = listed("16x256x256", "8x256x256", "4x256x256", "16x192x336", "16x336x336", "16x512x512")
    assert buckets.batch_sizes(8) == (8, 16, 32, 8, 4, 2)
    assert buckets.batch_sizes(6) == (6, 12, 24, 6, 3, 1)
    for global_batch in range(4, 40):
        buckets.check_budget(global_batch)
        for bucket, size in zip(buckets.shapes, buckets.batch_sizes(global_batch), strict=True):
            assert size % global_batch == 0 or global_batch % size == 0
            assert size * bucket.tokens <= 1.1 * global_batch * buckets.reference.tokens
    assert buckets.used([1, 0, 0, 2, 0, 0]).shapes == (buckets.shapes[0], buckets.shapes[3])


def test_a_budget_that_holds_no_clip_is_refused_with_the_least_that_does():
    buckets = listed("16x256x256", "16x512x512")
    with pytest.raises(
        InputError,
        match=r"^train.global_batch is 2 clips of 16x256x256, a budget of 9,011 tokens a step, but one "
        r"clip of bucket 16x512x512 has 16,384; give train.global_batch=4, or leave that bucket out$",
    ):
        check_world(2, 1, buckets)
    check_world(4, 1, buckets)


def test_processes_that_cannot_share_every_batch_are_refused():
    buckets = listed("16x256x256", "16x512x512")
    check_world(8, 2, buckets)
    with pytest.raises(InputError, match=r"bucket 16x512x512 batches of 2 clips .* train.global_batch=16$"):
        check_world(8, 4, buckets)
    with pytest.raises(InputError, match=r"which 3 processes cannot share evenly; give a multiple of 3$"):
        check_world(8, 3, buckets)
