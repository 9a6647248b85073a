# SPDX-License-Identifier: Apache-2.0
"""FID's Inception-v3 against a plain port with public names."""

import pytest
import torch
from reference.i3d import wake_norms
from reference.inception import PlainInception
from support import noise

from latte.checks import InputError
from latte.evaluation.detector_files import rename
from latte.evaluation.networks import inception
from latte.evaluation.networks.layers import Conv, channels_last, fold_norms


@pytest.fixture(scope="module")
def plain():
    return wake_norms(PlainInception(), seed=1)


@pytest.fixture(scope="module")
def ours(plain):
    network = inception.Inception()
    network.load_state_dict(
        fold_norms(rename(plain.state_dict(), inception.NETWORK, "the plain port"), inception.NORM_EPS)
    )
    return channels_last(network)


@pytest.mark.parametrize("size", [(75, 75), (107, 139), (299, 299)])
@torch.inference_mode()
def test_features_equal_the_plain_port(plain, ours, size):
    frames = noise(1, 3, *size, seed=size[0])
    for layer, expected in zip(("pool3", "logits"), plain(frames), strict=True):
        assert expected.std() > 0.01
        torch.testing.assert_close(
            ours(frames, layer), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
        )


def test_all_566_public_keys_are_used(plain):
    names = inception.SCHEMES["pytorch-fid"].names
    assert set(names) == set(plain.state_dict())
    assert len(names) == 566
    assert sum(isinstance(module, Conv) for module in inception.Inception().modules()) == 94


@torch.inference_mode()
def test_score_logits_leave_the_bias_out(ours):
    frames = noise(1, 3, 75, 75)
    before = ours(frames, "logits")
    bias = ours.fc.bias.clone()
    ours.fc.bias.add_(5)
    assert torch.equal(ours(frames, "logits"), before)
    ours.fc.bias.copy_(bias)


def test_an_unknown_layer_is_refused(ours):
    with pytest.raises(InputError, match="pool3, logits; did you mean 'pool3'"):
        ours(torch.zeros(1, 3, 75, 75), "pool")
