# SPDX-License-Identifier: Apache-2.0
"""C3D against a plain port at small widths; the full width only on the meta device."""

import pytest
import torch
from reference.c3d import PlainC3D
from support import noise

from latte.checks import InputError
from latte.evaluation.networks import c3d
from latte.evaluation.networks.layers import channels_last


def pair(classes, width, hidden):
    """A plain port with random weights and ours with the same."""
    torch.manual_seed(classes)
    plain = PlainC3D(classes, width, hidden)
    plain.mean.copy_(noise(3, 16, 112, 112).abs() * 60)
    ours = c3d.C3D(classes, width, hidden)
    ours.load_state_dict(plain.state_dict())
    return plain.eval(), channels_last(ours)


@pytest.mark.parametrize(("classes", "width", "hidden"), [(5, 2, 16), (101, 4, 32), (10, 8, 64)])
@torch.inference_mode()
def test_logits_equal_the_plain_port(classes, width, hidden):
    plain, ours = pair(classes, width, hidden)
    clip = noise(2, 3, 16, 112, 112, seed=width).clamp(-1, 1)
    expected = plain(clip)
    assert expected.std() > 0
    torch.testing.assert_close(ours(clip), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_published_number_of_parameters():
    with torch.device("meta"):
        network = c3d.C3D()
    assert sum(parameter.numel() for parameter in network.parameters()) == 78_409_573
    assert set(c3d.SCHEMES["torch"].names) == set(network.state_dict())
    assert len(c3d.SCHEMES["chainer"].names) == 23


def test_the_mean_clip_is_cropped_as_published():
    mean = noise(3, 16, 128, 171)
    assert torch.equal(c3d.crop_mean(mean), mean[:, :, 8:120, 8:120])
    weight = noise(4, 3, 3, 3, 3)
    assert c3d.crop_mean(weight) is weight


@torch.inference_mode()
def test_red_and_blue_are_swapped_and_the_mean_taken_off():
    _, ours = pair(5, 2, 16)
    seen = []
    ours.conv1a.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    red = torch.tensor([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, 16, 112, 112)
    ours(red)
    for channel, expected in enumerate((0.0, 128.0, 256.0)):  # blue, green, red
        torch.testing.assert_close(seen[0][0, channel], expected - ours.mean[channel])


@pytest.mark.parametrize("shape", [(1, 3, 15, 112, 112), (1, 3, 17, 112, 112), (1, 3, 16, 128, 128)])
def test_other_clips_are_refused(shape):
    _, ours = pair(5, 2, 16)
    with pytest.raises(InputError, match="16 frames of 112 x 112"):
        ours(torch.zeros(shape))
