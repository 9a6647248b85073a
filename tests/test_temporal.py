# SPDX-License-Identifier: Apache-2.0
"""The codecs that the tests use for compressed time do what their docstrings say."""

import pytest
import torch
from support import noise

from temporal import BlockCodec, DrawnTimeCodec, TimeCodec, time_codec

pytestmark = pytest.mark.usefixtures("time_codecs")


def test_lengths_shapes_and_the_way_back():
    codec = time_codec()
    clip = noise(2, 9, 3, 4, 6).clamp(-1, 1)
    clip[:, 1:5] = clip[:, 1:2]
    clip[:, 5:] = clip[:, 5:6]
    latent = codec.encode(clip)
    assert latent.shape == (2, 3, 12, 2, 3)
    torch.testing.assert_close(codec.decode(latent), clip, rtol=0, atol=1e-6)


def test_a_prefix_is_exact_and_another_start_differs():
    codec, clip = time_codec(), noise(1, 13, 3, 4, 4)
    latent = codec.encode(clip)
    assert torch.equal(codec.encode(clip[:, :9]), latent[:, :3])
    assert torch.equal(codec.encode(clip[:, :1]), latent[:, :1])
    assert (codec.encode(clip[:, 4:])[:, 1:] - latent[:, 2:]).abs().max() > 0.1


def test_the_others():
    assert not time_codec(BlockCodec).encodes_images
    codec, clip = time_codec(DrawnTimeCodec), noise(1, 5, 3, 4, 4)
    drawn = codec.encode(clip, torch.Generator().manual_seed(0))
    assert (drawn - codec.encode(clip)).std() > 0.5
    assert isinstance(codec, TimeCodec)
