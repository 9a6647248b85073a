# SPDX-License-Identifier: Apache-2.0
"""I3D against a plain port, its public names, its limits; published FVD values if the weights exist."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.i3d import PlainI3D, names_of_hassony2, tensorflow_variables, wake_norms
from support import noise

from latte.checks import InputError
from latte.evaluation.detector_files import FILES, cache_dir, import_weights, load_converted, rename
from latte.evaluation.detectors import Pixels
from latte.evaluation.frechet import frechet_distance
from latte.evaluation.networks import i3d
from latte.evaluation.networks.layers import (
    Conv,
    channels_last,
    convolve,
    fold_norms,
    max_pool_same,
    same_padding,
)


@pytest.fixture(scope="module")
def plain():
    return wake_norms(PlainI3D(), seed=0)


@pytest.fixture(scope="module")
def ours(plain):
    network = i3d.I3D()
    network.load_state_dict(
        fold_norms(rename(plain.state_dict(), i3d.NETWORK, "the plain port"), i3d.NORM_EPS)
    )
    return channels_last(network)


@pytest.mark.parametrize("frames", [9, 16, *(pytest.param(n, marks=pytest.mark.nightly) for n in (10, 17))])
@torch.inference_mode()
def test_logits_equal_the_plain_port(plain, ours, frames):
    clip = noise(1, 3, frames, 224, 224, seed=frames)
    expected = plain(clip)
    assert expected.std() > 0.1  # the comparison would be empty if the random network were silent
    torch.testing.assert_close(ours(clip), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_every_public_key_is_used_under_three_namings(plain):
    state = plain.state_dict()
    ours_by_scheme = {name: set(scheme.names) for name, scheme in i3d.SCHEMES.items()}
    assert ours_by_scheme["piergiaj"] == set(state)
    assert ours_by_scheme["hassony2"] == set(names_of_hassony2())
    assert {name: len(keys) for name, keys in ours_by_scheme.items()} == {
        "piergiaj": 344,
        "hassony2": 344,
        "tensorflow": 230,
    }
    assert {f"{name}:0" for name in ours_by_scheme["tensorflow"]} == set(tensorflow_variables(plain))


def test_all_namings_lead_to_the_same_network(plain):
    state = plain.state_dict()
    expected = fold_norms(rename(state, i3d.NETWORK, "piergiaj"), i3d.NORM_EPS)
    renamed = dict(zip(names_of_hassony2(), state.values(), strict=True))
    assert all(tuple(renamed[name].shape) == shape for name, shape in names_of_hassony2().items())
    found = fold_norms(
        rename({f"module.{k}": v for k, v in renamed.items()}, i3d.NETWORK, "hassony2"), i3d.NORM_EPS
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    with torch.no_grad():  # the TF graph has no gains
        for module in plain.modules():
            if isinstance(module, torch.nn.BatchNorm3d):
                module.weight.fill_(1)
    expected = fold_norms(rename(plain.state_dict(), i3d.NETWORK, "piergiaj"), i3d.NORM_EPS)
    found = fold_norms(rename(tensorflow_variables(plain), i3d.NETWORK, "tensorflow"), i3d.NORM_EPS)
    assert found.keys() == expected.keys() == i3d.I3D().state_dict().keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_published_sizes(plain):
    state = plain.state_dict()
    assert sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point()) == 12_711_824
    with torch.device("meta"):
        assert sum(isinstance(module, Conv) for module in i3d.I3D().modules()) == 58


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (3, 1), (2, 2), (1, 2)])
def test_same_padding_is_tensorflows(size, kernel, stride):
    before, after = same_padding(size, kernel, stride)
    outputs = -(-size // stride)
    assert (size + before + after - kernel) // stride + 1 == outputs or (
        kernel < stride and before == after == 0
    )
    assert before <= after <= before + 1


def test_same_padding_at_the_first_convolution():
    assert same_padding(224, 7, 2) == (2, 3)  # a symmetric 3 is the classic mistake of public ports
    assert same_padding(17, 7, 2) == (3, 3)


@pytest.mark.parametrize("length", range(4, 9))
@pytest.mark.parametrize(
    ("kernel", "stride"),
    [((3, 3, 3), (2, 2, 2)), ((1, 3, 3), (1, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))],
)
def test_pools_pad_with_zeros(length, kernel, stride):
    x = noise(2, 3, length, length + 1, 5, seed=length).relu()
    pads = [
        amount
        for n, k, s in list(zip(x.shape[2:], kernel, stride, strict=True))[::-1]
        for amount in same_padding(n, k, s)
    ]
    expected = torch.nn.functional.max_pool3d(torch.nn.functional.pad(x, pads), kernel, stride)
    assert torch.equal(max_pool_same(x, kernel, stride), expected)


@pytest.mark.parametrize("axes", [2, 3])
def test_both_kernels_convolve_alike(axes):
    x, weight, bias = noise(1, 5, *(6,) * axes), noise(4, 5, *(3,) * axes, seed=1), noise(4)
    found = convolve(x, weight, bias, [2] * axes, [1] * axes)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        expected = convolve(x, weight, bias, [2] * axes, [1] * axes)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 224, 224), (7, 224, 224), (9, 256, 256), (9, 192, 192)])
def test_clips_it_cannot_read_are_refused(ours, shape):
    with pytest.raises(InputError, match="at least 9 frames of 224 x 224"):
        ours(torch.zeros(1, 3, *shape))


# Published values, tested if the weights are in the detector cache or beside the project.


def published_i3d(name):
    """The network ``name`` with its real weights and the TF graph's eps, or a skip that names the file."""
    file = next(file for file in FILES if file.detector == name)
    places = [
        *cache_dir().glob(f"{name}-{file.sha256[:8]}.safetensors"),
        Path(__file__).parents[3] / "shared" / "weights" / file.name,
    ]
    found = [place for place in places if place.is_file()]
    if not found:
        pytest.skip(f"{file.name} is neither in {cache_dir()} nor in ../shared/weights")
    if found[0].suffix == ".safetensors":
        return load_converted(found[0], i3d.NETWORK).network
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATTE_DETECTOR_DIR", folder)
        return load_converted(import_weights(name, i3d.NETWORK, found[0]), i3d.NETWORK).network


def constant_clips_fvd(network, frames, pixels):
    """Squared distance between black and white clips of 64 x 64: both sets have no spread."""
    black, white = (
        network(pixels.prepare(torch.full((1, frames, 64, 64, 3), v, dtype=torch.uint8))) for v in (0, 255)
    )
    return float((white.double() - black.double()).square().sum())


TABLE = (569.23, 486.36, 551.96, 146.37, 174.86, 133.70, 152.92, 357.74, 382.47, 306.74, 338.42)
TABLE += (78.17, 82.33, 64.59, 66.06, 314.48, 316.69, 288.97, 287.78, 152.15, 151.26)


@pytest.mark.parametrize(
    ("name", "frames", "pixels", "expected", "tolerance"),
    [
        ("i3d", 30, Pixels(crop="centre"), 151.25648496845326, 1.0),
        ("i3d400", 30, Pixels(crop="centre"), 151.39244, 1.0),
        ("i3d", 15, Pixels(crop="centre"), 134.24, 1.5),
        ("i3d400", 15, Pixels(resize="tf1"), 131, 3.0),
    ],
)
@torch.inference_mode()
def test_published_fvd_of_black_against_white(name, frames, pixels, expected, tolerance):
    assert abs(constant_clips_fvd(published_i3d(name), frames, pixels) - expected) < tolerance


@torch.inference_mode()
def test_published_table_of_lengths():
    network = published_i3d("i3d")
    found = [constant_clips_fvd(network, frames, Pixels(crop="centre")) for frames in range(10, 31)]
    np.testing.assert_allclose(found, TABLE, atol=1.0)


@torch.inference_mode()
def test_published_fvd_of_noise():
    network = published_i3d("i3d")
    features = []
    for seed in (1, 2):
        clips = torch.from_numpy(np.random.RandomState(seed).rand(128, 16, 224, 224, 3).astype(np.float32))
        features.append(torch.cat([network(clip[None].permute(0, 4, 1, 2, 3)) for clip in clips]))
    assert frechet_distance(features[1], features[0], ddof=1) == pytest.approx(10.138084766713924, rel=1e-3)
