# SPDX-License-Identifier: Apache-2.0
"""What a codec does to lengths and sizes, counted for causal codecs, others, and those of single frames."""

import pytest

from latte.autoencoder.compression import Compression
from latte.checks import InputError

CAUSAL = Compression(16, 8, 4)
GROUPS = Compression(4, 8, 4, causal=False)
FRAMES = Compression(4, 8)
PAIRS = Compression(16, 8, 4, latent_step=2)


@pytest.mark.parametrize(
    ("compression", "lengths"),
    [
        (CAUSAL, {1: 1, 5: 2, 9: 3, 17: 5, 49: 13, 121: 31}),
        (Compression(128, 32, 8), {1: 1, 9: 2, 17: 3, 121: 16}),
        (GROUPS, {4: 1, 8: 2, 88: 22}),
        (FRAMES, {1: 1, 2: 2, 16: 16, 17: 17}),
        (PAIRS, {1: 1, 9: 3, 17: 5, 49: 13}),
    ],
)
def test_lengths_there_and_back(compression, lengths):
    for frames, latent_frames in lengths.items():
        assert compression.latent_frames(frames) == latent_frames
        assert compression.frames(latent_frames) == frames


@pytest.mark.parametrize(
    ("compression", "frames", "nearest"),
    [
        (CAUSAL, 0, [1]),
        (CAUSAL, 2, [1, 5]),
        (CAUSAL, 16, [13, 17]),
        (CAUSAL, 18, [17, 21]),
        (GROUPS, 1, [4]),
        (GROUPS, 17, [16, 20]),
        (FRAMES, 0, [1]),
        (PAIRS, 5, [1, 9]),
        (PAIRS, 24, [17, 25]),
        (PAIRS, -8, [1]),
    ],
)
def test_other_lengths_are_refused_with_the_nearest_ones(compression, frames, nearest):
    assert compression.nearest_frames(frames) == nearest
    with pytest.raises(
        InputError, match="clip length is .*nearest valid.* " + " and ".join(map(str, nearest))
    ):
        compression.latent_frames(frames, "clip length")


@pytest.mark.parametrize(
    ("compression", "frames", "tube", "nearest"),
    [
        (CAUSAL, 17, 2, [13, 21]),  # 5 latent frames; 4 and 6
        (CAUSAL, 13, 2, [13]),
        (CAUSAL, 14, 3, [9, 21]),
        (CAUSAL, 1, 4, [13]),
        (FRAMES, 7, 4, [4, 8]),
        (Compression(16, 8, 4, latent_step=2), 17, 3, [9, 33]),  # 3 and 9 latent frames, odd ones alone
        (Compression(16, 8, 4, latent_step=2), 17, 2, []),
    ],
)
def test_lengths_that_codec_and_tube_divide(compression, frames, tube, nearest):
    found = compression.nearest_fitting(frames, lambda count: count % tube == 0, 4 * tube)
    assert found == nearest


@pytest.mark.parametrize("compression", [CAUSAL, GROUPS, FRAMES])
def test_every_frame_belongs_to_the_span_of_its_latent_frame(compression):
    total = compression.frames(5)
    spans = [compression.span(index) for index in range(5)]
    assert [frame for span in spans for frame in span] == list(range(total))
    for index, span in enumerate(spans):
        assert {compression.latent_index(frame) for frame in span} == {index}


def test_images_need_a_latent_of_their_own():
    assert CAUSAL.encodes_images
    assert FRAMES.encodes_images
    assert not GROUPS.encodes_images


def test_sizes_that_do_not_divide_are_refused():
    assert CAUSAL.latent_size(64, 96, "x") == (8, 12)
    with pytest.raises(InputError, match="frame width is 100, but codec 'x' needs a multiple of 8"):
        CAUSAL.latent_size(64, 100, "x")
