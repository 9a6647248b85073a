# SPDX-License-Identifier: Apache-2.0
"""Latent shards of a codec that compresses time as a side: frames of video, as they were encoded."""

import numpy as np
import pytest
import torch

from latte.checks import InputError
from latte.data.clips import to_float, to_uint8
from latte.data.datasets import DataConfig
from latte.data.encode import encode_dataset
from latte.evaluation.sources import open_side
from temporal import TimeCodec, time_codec
from tiny_detector import write_side

pytestmark = pytest.mark.usefixtures("time_codecs")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two videos of 11 frames of 24 x 24."""
    return write_side(tmp_path_factory.mktemp("videos"), range(2), frames=11)


def encoded(videos, out, codec, **changes):
    """A folder of latents of windows of 5 frames."""
    options = {name: changes.pop(name) for name in ("stride",) if name in changes}
    data = DataConfig(root=str(videos), resolution=24, frames=5, labels=False, **changes)
    encode_dataset(data, codec, out, dtype="float32", **options)
    return out


def decoded(codec: TimeCodec, frames: np.ndarray) -> np.ndarray:
    """A clip, uint8 (t h w c), after the codec."""
    with torch.no_grad():
        return np.asarray(to_uint8(codec.decode(codec.encode(to_float(frames)[None]))))[0]


def test_frames_are_those_of_the_windows_that_were_encoded(videos, tmp_path):
    codec = time_codec()
    side = open_side("real", encoded(videos, tmp_path / "latents", codec), tmp_path / "probes")
    whole = open_side("real", videos, tmp_path / "probes")
    assert [(s.frames, s.height, s.width, s.codec) for s in side.sources] == [
        (11, 24, 24, "latents of time")
    ] * 2
    frames = whole.read(whole.sources[1].id, range(11))
    windows = {start: decoded(codec, frames[start : start + 5]) for start in (0, 5, 6)}
    expected = np.concatenate([windows[0], windows[5], windows[6][4:]])
    id = side.sources[1].id
    np.testing.assert_array_equal(side.read(id, range(11)), expected)
    for indices in ([5, 6, 7, 8, 9], [10, 3], [2, 4, 6, 8], [7]):
        np.testing.assert_array_equal(side.read(id, indices), expected[indices])
    assert not np.array_equal(expected, decoded(codec, frames[:9])), "a clip that starts elsewhere differs"


@pytest.mark.parametrize("changes", [{"interval": 2}, {"stride": 6}])
def test_windows_that_leave_out_frames_are_no_side(videos, tmp_path, changes):
    folder = encoded(videos, tmp_path / "latents", time_codec(), **changes)
    with pytest.raises(
        InputError, match=r"windows that leave out frames, first frame \d+ of .*data.interval=1"
    ):
        open_side("real", folder, tmp_path / "probes")
