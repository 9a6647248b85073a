# SPDX-License-Identifier: Apache-2.0
"""Settings of buckets that cannot be right, each refused with what to give instead."""

import pytest

from latte.autoencoder.compression import Compression
from latte.checks import InputError
from latte.data.bucket_settings import Grid, buckets_of
from latte.data.datasets import DataConfig

PLAIN = Grid("builtin", Compression(4, 8), patch_size=2)
TEMPORAL = Grid("builtin_temporal", Compression(4, 8, temporal_factor=4, causal=True), patch_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": "16x256"}, "data.buckets holds '16x256', but a bucket is frames x height x width"),
        ({"buckets": "0x256x256"}, "data.buckets holds '0x256x256', but a bucket is"),
        ({"buckets": ()}, "data.buckets is an empty list; give buckets such as 16x256x256, auto, or null"),
        ({"buckets": ("auto", "16x256x256")}, "data.buckets mixes auto with other buckets; give auto alone"),
        ({"buckets": ("16x256x256",) * 2}, "data.buckets lists 16x256x256 twice; list every bucket once"),
        (
            {"buckets": tuple(f"{frames}x256x256" for frames in range(1, 130))},
            "data.buckets lists 129 buckets; the limit is 128",
        ),
        (
            {"buckets": ("8x256x256", "8x512x256")},
            "data.buckets does not list 16x256x256, which data.frames and data.resolution give; "
            r".*list it too, or set data.frames=8 data.resolution=\[512,256\]",
        ),
        (
            {"bucket_pixels": 65536},
            "data.bucket_pixels is given, but data.buckets is not auto; leave it out, or",
        ),
        (
            {"buckets": "16x256x256", "bucket_lengths": (16, 8)},
            "data.bucket_lengths is given, but data.buckets is not auto",
        ),
        ({"buckets": "auto", "bucket_pixels": 0}, "data.bucket_pixels is 0, but it must be positive"),
        (
            {"buckets": "auto", "bucket_lengths": ()},
            r"data.bucket_lengths is \[\], but it must list different",
        ),
        (
            {"buckets": "auto", "bucket_lengths": (16, 16)},
            r"data.bucket_lengths is \[16, 16\], but it must list",
        ),
        (
            {"buckets": "auto", "bucket_lengths": (32, 16)},
            r"data.bucket_lengths is \[32, 16\], but its longest must be data.frames, which is 16",
        ),
        (
            {"buckets": "auto", "bucket_aspects": (2, 0.5, 3)},
            r"data.bucket_aspects is \[2, 0.5, 3\], but it must be \[smallest width / height, largest",
        ),
        ({"buckets": "auto", "bucket_aspects": (0.01, 2, 3)}, r"data.bucket_aspects is \[0.01, 2, 3\]"),
        ({"buckets": "auto", "bucket_aspects": (0.5, 2, 33)}, r".* of at most 32, e.g. \[0.5, 2, 5\]"),
        (
            {"kind": "latents", "buckets": "auto"},
            r"data.buckets is \('auto',\), but data.kind=latents does not read it; "
            ".*one set of latents has one size; train on the videos themselves",
        ),
    ],
)
def test_settings_that_cannot_be_right_are_refused(changes, message):
    with pytest.raises(InputError, match=f"^{message}"):
        DataConfig(**{"root": "."} | changes)


@pytest.mark.parametrize(
    ("grid", "names", "message"),
    [
        (
            PLAIN,
            ("16x256x256", "16x250x256"),
            r"data.buckets: 16x250x256 must have a height and a width that are multiples of 16 "
            r"\(codec 'builtin' reduces 8 times, model.patch_size is 2\); the nearest is 16x256x256$",
        ),
        (PLAIN, ("16x256x256", "16x256x3"), "data.buckets: 16x256x3 must .*; the nearest is 16x256x16$"),
        (
            TEMPORAL,
            ("17x256x256", "16x256x256"),
            "data.buckets: 16x256x256 has 16 frames, but codec 'builtin_temporal' takes clips of "
            "1 [+] 4 k frames; the nearest is 17x256x256$",
        ),
        (
            Grid("builtin", Compression(4, 8), 2, tube=2),
            ("16x256x256", "7x256x250"),
            "data.buckets: 7x256x250 has 7 frames, but codec 'builtin' and tubes of 2 latent frames take "
            "clips of 2 [+] 2 k frames; the nearest is 6x256x256$",
        ),
    ],
)
def test_buckets_that_codec_or_patches_do_not_divide_are_refused_with_the_nearest(grid, names, message):
    frames, height, width = map(int, names[0].split("x"))
    data = DataConfig(root=".", frames=frames, resolution=(height, width), buckets=names)
    with pytest.raises(InputError, match=f"^{message}"):
        buckets_of(data, grid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"bucket_pixels": 255},
            "data.bucket_pixels is 255, but the smallest frame that codec 'builtin' and model.patch_size=2 allow "
            "has 16 x 16 = 256 pixels; give more",
        ),
        (
            {"bucket_lengths": tuple(range(16, 0, -1)), "bucket_aspects": (0.25, 4, 31)},
            "data.bucket_lengths and data.bucket_aspects give .* buckets; the limit is 128",
        ),
        ({"frames": 17, "bucket_lengths": (17, 8)}, "data.bucket_lengths: 8x.* has 8 frames, but codec"),
        ({"resolution": 250}, "data.frames and data.resolution: 16x250x250 must have a height"),
    ],
)
def test_auto_buckets_that_do_not_fit_are_refused(changes, message):
    grid = TEMPORAL if changes.get("frames") == 17 else PLAIN
    with pytest.raises(InputError, match=f"^{message}"):
        buckets_of(DataConfig(root=".", buckets="auto", **changes), grid)
