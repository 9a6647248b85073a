# SPDX-License-Identifier: Apache-2.0
"""Frames reach each network by its own resize and range, and a clip's features do not depend on the company
it came in.
"""

import numpy as np
import pytest
import torch
from reference.statistics import resize_loops
from support import noise
from torch import Tensor, nn

from latte.checks import InputError
from latte.evaluation import detectors
from latte.evaluation.detector_files import Weights
from latte.evaluation.detectors import (
    DETECTORS,
    RESIZES,
    Detector,
    DetectorSpec,
    Pixels,
    build_detector,
    full_precision,
)
from latte.evaluation.frechet import frechet_distance
from latte.evaluation.networks.layers import Conv, channels_last
from latte.runtime import generator


def clips(b, t, h, w, seed=0):
    """Random uint8 clips (b t h w 3)."""
    return torch.randint(0, 256, (b, t, h, w, 3), generator=generator(seed, "clips"), dtype=torch.uint8)


class Probe(nn.Module):
    """A small network over clips or frames, wide enough that its sums are not exact."""

    def __init__(self, axes: int):
        super().__init__()
        self.conv = Conv(3, 16, [3] * axes)
        self.conv.weight.data = noise(*self.conv.weight.shape)

    def forward(self, x: Tensor, layer: str = "mean") -> Tensor:
        """(b 3 ...) -> (b 16)."""
        y = self.conv(x).flatten(2)
        return y.mean(2) if layer == "mean" else y.amax(2)


def probe(unit="clip", group=1, **spec):
    """A detector around ``Probe``."""
    weights = Weights(channels_last(Probe(3 if unit == "clip" else 2)), "ab" * 32, "probe", 7, "cd" * 32)
    layers = {"mean": 16, "max": 16} if unit == "frame" else {"mean": 16}
    made = DetectorSpec(lambda path, sha256: weights, layers, Pixels(20), "a probe", unit, **spec)
    return Detector("probe", made, weights, made.pixels, "mean", group, "cpu")


@pytest.mark.parametrize("rule", RESIZES)
@pytest.mark.parametrize("size", [(10, 7), (5, 16), (12, 12)])
def test_resizes_equal_the_loops(rule, size):
    image = noise(12, 9, 3, dtype=torch.float64).numpy()
    found = RESIZES[rule](torch.from_numpy(image).permute(2, 0, 1)[None].float(), size)[0].permute(1, 2, 0)
    np.testing.assert_allclose(found, resize_loops(image, *size, rule), atol=1e-5)


def test_resize_rules_differ_as_measured():
    image = noise(1, 3, 64, 64).clamp(-1, 1)
    found = {rule: resize(image, (224, 224)) for rule, resize in RESIZES.items()}
    assert (
        float((found["half-pixel"] - found["tf1"]).abs().max()) > 0.3
    )  # 0.43 between the protocols' rules on 64 to 224


@pytest.mark.parametrize(
    ("pixels", "low", "high"),
    [
        (Pixels(), -1.0, 1.0),
        (Pixels(299, "tf1", values="(x - 128) / 128"), -1.0, 127 / 128),
        (Pixels(8, values="[0, 1]"), 0.0, 1.0),
    ],
)
def test_value_ranges(pixels, low, high):
    for value, expected in ((0, low), (255, high)):
        x = pixels.prepare(torch.full((1, 2, 16, 16, 3), value, dtype=torch.uint8))
        assert x.shape == (1, 3, 2, pixels.size, pixels.size)
        torch.testing.assert_close(x, torch.full_like(x, expected), rtol=0, atol=1e-6)


def test_channels_frames_and_clips_stay_in_order():
    frames = torch.arange(2 * 3 * 3, dtype=torch.uint8).reshape(2, 3, 1, 1, 3).expand(2, 3, 4, 4, 3)
    x = Pixels(4, values="[0, 1]").prepare(frames)
    torch.testing.assert_close(x[..., 0, 0] * 255, frames[:, :, 0, 0].float().transpose(1, 2))


def test_centre_crop_keeps_the_middle_of_the_longer_side():
    wide = clips(1, 1, 8, 13)
    squeezed, cropped = Pixels(4).prepare(wide), Pixels(4, crop="centre").prepare(wide)
    expected = resize_loops(wide[0, 0].double().numpy(), 4, 7, "half-pixel")[
        :, 1:5
    ]  # 13 * 4 / 8 = 6.5 is rounded up, 3 columns leave
    np.testing.assert_allclose(cropped[0, :, 0].permute(1, 2, 0), expected / 127.5 - 1, atol=1e-5)
    assert float((squeezed - cropped).abs().max()) > 0.1
    tall = wide.transpose(2, 3)
    torch.testing.assert_close(Pixels(4, crop="centre").prepare(tall), cropped.transpose(3, 4))
    square = clips(1, 1, 8, 8)
    assert torch.equal(Pixels(4).prepare(square), Pixels(4, crop="centre").prepare(square))


@pytest.mark.parametrize("wrong", [{"resize": "bicubic"}, {"crop": "center"}, {"values": "[-1,1]"}])
def test_unknown_pixel_rules_are_refused(wrong):
    with pytest.raises(InputError, match="is not one of"):
        Pixels(**wrong)


def test_published_detectors_state_their_protocol():
    table = {
        name: (spec.pixels, spec.unit, dict(spec.layers), spec.min_frames) for name, spec in DETECTORS.items()
    }
    half, tf1, caffe = Pixels(224), Pixels(299, "tf1", values="(x - 128) / 128"), Pixels(112, "align-corners")
    assert table["i3d"] == table["i3d400"] == table["random-i3d"] == (half, "clip", {"logits": 400}, 9)
    assert table["inception"] == (tf1, "frame", {"pool3": 2048, "logits": 1008}, 1)
    assert table["c3d"] == (caffe, "clip", {"logits": 101}, 16)
    assert all(80 < len(spec.card) < 500 for spec in DETECTORS.values())


def test_each_i3d_has_the_norm_eps_of_its_published_code(monkeypatch):
    monkeypatch.setattr(detectors, "find_weights", lambda name, network, path, sha256: name)
    monkeypatch.setattr(detectors, "load_converted", lambda name, network: (name, network.eps))
    assert DETECTORS["i3d"].open(None, None) == ("i3d", 1e-3)
    assert DETECTORS["i3d400"].open(None, None) == ("i3d400", 1e-5)
    assert DETECTORS["inception"].open(None, None) == ("inception", 1e-3)


@pytest.mark.parametrize("unit", ["clip", "frame"])
@pytest.mark.parametrize("group", [1, 3])
def test_features_do_not_depend_on_the_batch(unit, group):
    batch, detector = clips(7, 4, 24, 30), probe(unit, group)
    rows = detector.rows(4)
    whole = detector(batch)
    assert whole.shape == (7 * rows, 16)
    assert whole.dtype == torch.float32
    for sizes in ((1,) * 7, (2, 5), (4, 3)):
        parts = torch.cat([detector(part) for part in batch.split(sizes)])
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
        assert group > 1 or torch.equal(parts, whole)
    swapped = detector(batch.flip(0)).unflatten(0, (7, rows)).flip(0).flatten(0, 1)
    torch.testing.assert_close(swapped, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(probe(unit, 16)(batch), whole, rtol=1e-5, atol=1e-6)


def test_every_group_that_reaches_the_network_is_full():
    detector, seen = probe(group=4), []
    detector.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    detector(clips(6, 2, 8, 8))
    assert seen == [4, 4]


def test_frame_detectors_give_one_row_per_frame_in_clip_order():
    detector, batch = probe("frame", group=2), clips(2, 3, 24, 24)
    assert (detector.rows(3), probe().rows(3)) == (3, 1)
    expected = torch.cat([detector(batch[i : i + 1, j : j + 1]) for i in range(2) for j in range(3)])
    torch.testing.assert_close(detector(batch), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(detector(batch.numpy()), detector(batch))


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        (torch.zeros(1, 4, 8, 8, 3), "uint8"),
        (torch.zeros(4, 8, 8, 3, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.zeros(0, 4, 8, 8, 3, dtype=torch.uint8), "uint8"),
        (torch.zeros(1, 3, 8, 8, 3, dtype=torch.uint8), "probe. reads at least 4 frames per clip, got 3"),
        (torch.zeros(1, 7, 8, 8, 3, dtype=torch.uint8), "frames per clip, got 7"),
    ],
)
def test_wrong_clips_are_refused(frames, reason):
    with pytest.raises(InputError, match=reason):
        probe(min_frames=4, max_frames=6)(frames)


def test_exact_lengths_are_said():
    with pytest.raises(InputError, match="exactly 16"):
        probe(min_frames=16, max_frames=16)(clips(1, 15, 8, 8))


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'random-i3d'"):
        build_detector("random_i3d")
    with pytest.raises(InputError, match="layer is 'pool3'"):
        build_detector("random-i3d", layer="pool3")
    with pytest.raises(InputError, match="group must be at least 1, got 0"):
        build_detector("random-i3d", group=0)


def test_full_precision_is_restored():
    torch.set_float32_matmul_precision("high")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


RANDOM_I3D_SHA256 = "9d61f4267472d1c8717d7e080e43ba48e87705ccf31f741ab3a90490d6348952"


@pytest.fixture(scope="module")
def random_i3d():
    return build_detector("random-i3d")


def test_random_i3d_is_the_same_on_every_machine(random_i3d):
    assert random_i3d.sha256 == RANDOM_I3D_SHA256
    assert detectors.random_i3d(seed=1).sha256 != RANDOM_I3D_SHA256
    described = random_i3d.describe()
    assert described["dimension"] == random_i3d.dim == 400
    assert described["pixels"] == {
        "size": 224,
        "resize": "half-pixel",
        "crop": "none",
        "values": "[-1, 1]",
        "antialias": False,
    }
    with pytest.raises(InputError, match="reads no weight file"):
        detectors.random_i3d(path="x")


def test_random_i3d_separates_kinds_of_clips(random_i3d):
    smooth = [
        Pixels(64).prepare(clips(1, 9, 3, 3, seed=i))[0].permute(1, 2, 3, 0) * 127.5 + 127.5 for i in range(4)
    ]
    rough = [clip + 60 * noise(*clip.shape, seed=i) for i, clip in enumerate(smooth)]
    features = [
        random_i3d(torch.stack(side).clamp(0, 255).to(torch.uint8))
        for side in (smooth[:2], smooth[2:], rough[2:])
    ]
    assert frechet_distance(features[0], features[2]) > 1.5 * frechet_distance(features[0], features[1])
    values = torch.linalg.svdvals(
        torch.cat(features[:2]).double() - torch.cat(features[:2]).double().mean(0)
    ).square()
    assert (
        float(values.sum() ** 2 / values.square().sum()) > 2
    )  # an effective rank near 1 would mean one direction for all clips
