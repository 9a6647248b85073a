# SPDX-License-Identifier: Apache-2.0
"""Sliding windows: one is the plain sampler, several cover every frame, and their memory is that of one."""

from itertools import pairwise

import pytest
import torch
from support import noise, wake

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.frame_conditioning import condition_on_frames, restore_frames
from latte.diffusion.long_video import edge_weights, in_windows, window_starts
from latte.diffusion.samplers import sample
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig
from latte.runtime import SampleNoise

SMALL = {"depth": 2, "width": 16, "heads": 2, "num_frames": 4, "latent_size": 4}
T = torch.tensor([500, 500])


def denoiser(kind: str):
    if kind == "text":
        model = wake(LatteText(TextConfig(**SMALL, caption_channels=6))).eval()
        return lambda z, t: model(z, t, noise(1, 5, 6).expand(len(z), -1, -1))
    return wake(Latte(ModelConfig(**SMALL))).eval()


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("frames", [1, 3, 4])
@torch.no_grad()
def test_one_window_is_the_plain_sampler_bit_for_bit(kind, frames):
    process, denoise = build_process(DiffusionConfig()), denoiser(kind)
    for sampler in ("ddpm", "dpmpp"):
        plain = sample(sampler, denoise, process, SampleNoise([0, 1]), (frames, 4, 4, 4), 5)
        assert torch.equal(
            sample(sampler, in_windows(denoise, 4), process, SampleNoise([0, 1]), (frames, 4, 4, 4), 5), plain
        )


@pytest.mark.parametrize(
    ("frames", "length", "overlap", "starts"),
    [
        (4, 4, 2, [0]),
        (2, 4, 2, [0]),
        (5, 4, 2, [0, 1]),
        (8, 4, 2, [0, 2, 4]),
        (9, 4, 2, [0, 2, 4, 5]),
        (8, 4, 0, [0, 4]),
        (12, 4, 3, [*range(9)]),
    ],
)
def test_windows_cover_every_frame(frames, length, overlap, starts):
    assert window_starts(frames, length, overlap) == starts
    covered = {frame for start in starts for frame in range(start, min(start + length, frames))}
    assert covered == set(range(frames))
    assert all(second - first <= length - overlap for first, second in pairwise(starts))


@pytest.mark.parametrize("kind", ["class", "text"])
@torch.no_grad()
def test_overlapping_frames_get_the_weighted_mean_of_the_windows_answers(kind):
    denoise, z = denoiser(kind), noise(2, 7, 4, 4, 4)
    answer = in_windows(denoise, 4, 2)(z, T)
    parts = {start: denoise(z[:, start : start + 4], T) for start in (0, 2, 3)}
    assert edge_weights(4).tolist() == [1, 2, 2, 1]
    for frame in range(7):
        inside = {start: [1, 2, 2, 1][frame - start] for start in parts if 0 <= frame - start < 4}
        expected = sum(weight * parts[start][:, frame - start] for start, weight in inside.items()) / sum(
            inside.values()
        )
        torch.testing.assert_close(answer[:, frame], expected, rtol=1e-5, atol=1e-6)


def test_a_model_of_single_frames_does_not_notice_and_no_call_is_longer_than_a_window():
    seen = []

    def denoise(z, t):
        seen.append(z.shape[1])
        return torch.sin(z) + t.view(-1, 1, 1, 1, 1) / 1000

    z = noise(2, 19, 4, 4, 4)
    torch.testing.assert_close(in_windows(denoise, 8, 5)(z, T), denoise(z, T), rtol=1e-6, atol=1e-6)
    assert seen == [8] * 5 + [19]


def blend(z, t):
    """Every frame is told the mean of its window."""
    return z.mean(1, keepdim=True).expand_as(z)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_windows_tell_each_other_through_the_overlap(sampler):
    """12 frames, 4 at a time: what the first frame is moves windows that it is not in; without an overlap it does not."""
    process, known = build_process(DiffusionConfig()), noise(1, 12, 4, 4, 4, seed=3)
    mask = torch.arange(12) == 0
    moved = {}
    for overlap in (0, 2):
        ends = []
        for size in (0.0, 5.0):
            wrapped = condition_on_frames(in_windows(blend, 4, overlap), process, known + size, mask, 0.0)
            z = restore_frames(
                sample(sampler, wrapped, process, SampleNoise([0]), (12, 4, 4, 4), 6), known + size, mask
            )
            assert torch.equal(z[:, 0], (known + size)[:, 0])
            ends.append(z)
        moved[overlap] = (ends[1] - ends[0]).abs().amax((0, 2, 3, 4))
    assert moved[0][1:4].min() > 0.01
    assert moved[0][4:].max() == 0
    assert moved[2][4:8].min() > 1e-3


@pytest.mark.parametrize(("length", "overlap"), [(0, 0), (4, 4), (4, -1), (4, 9)])
def test_windows_that_do_not_move_on_are_refused(length, overlap):
    with pytest.raises(InputError, match=r"overlap is|window must be"):
        in_windows(denoiser("class"), length, overlap)
