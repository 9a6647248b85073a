# SPDX-License-Identifier: Apache-2.0
"""Longer clips.

One window is the plain sample, a chain keeps what it has drawn, no call sees more than a window, and a seed
is a clip.
"""

from itertools import pairwise

import pytest
import torch
from support import noise, wake

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.frame_conditioning import condition_on_frames, restore_frames
from latte.diffusion.long_video import (
    CHAIN_STRENGTH,
    LONG_VIDEO_METHODS,
    edge_weights,
    in_windows,
    shuffled_noise,
    window_starts,
)
from latte.diffusion.samplers import sample
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig
from latte.runtime import SampleNoise

SMALL = {"depth": 2, "width": 16, "heads": 2, "num_frames": 4, "latent_size": 4}
PROCESS = build_process(DiffusionConfig())
STEPS = 5
T = torch.tensor([500, 500])


def denoiser(kind: str = "class"):
    if kind == "text":
        model = wake(LatteText(TextConfig(**SMALL, caption_channels=6))).eval()
        return lambda z, t: model(z, t, noise(1, 5, 6).expand(len(z), -1, -1))
    return wake(Latte(ModelConfig(**SMALL))).eval()


def walker(sampler: str = "ddim"):
    def walk(denoise, draw, known, mask, pull, progress):
        z = sample(
            sampler,
            condition_on_frames(denoise, PROCESS, known, mask, 2.0 * pull),
            PROCESS,
            draw,
            known.shape[1:],
            STEPS,
            progress=progress,
        )
        return restore_frames(z, known, mask)

    return walk


def draw(
    choice, denoise, frames, sampler="ddim", seeds=(0, 1), window=4, overlap=2, given=None, progress=None
):
    """A clip of ``frames``; ``given``: {frame: latents (c h w)}."""
    known, mask = torch.zeros(1, frames, 4, 4, 4), torch.zeros(frames, dtype=torch.bool)
    for frame, z in (given or {}).items():
        known[:, frame], mask[frame] = z, True
    return LONG_VIDEO_METHODS[choice](
        walker(sampler), denoise, SampleNoise(seeds), known, mask, window, overlap, progress
    )


@pytest.mark.parametrize("choice", LONG_VIDEO_METHODS)
@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("frames", [3, 4])
def test_a_clip_that_fits_into_one_window_is_the_plain_sample_bit_for_bit(choice, kind, frames):
    denoise = denoiser(kind)
    for sampler in ("ddpm", "dpmpp"):
        plain = sample(sampler, denoise, PROCESS, SampleNoise([0, 1]), (frames, 4, 4, 4), STEPS)
        assert torch.equal(draw(choice, denoise, frames, sampler), plain)


@pytest.mark.parametrize("choice", LONG_VIDEO_METHODS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_a_clip_does_not_depend_on_the_clips_beside_it_and_no_call_is_longer_than_a_window(choice, sampler):
    model, seen = denoiser(), set()

    def denoise(z, t):
        seen.add(z.shape[1])
        return model(z, t)

    both = draw(choice, denoise, 9, sampler)
    assert both.shape == (2, 9, 4, 4, 4)
    for row in (0, 1):
        torch.testing.assert_close(
            draw(choice, denoise, 9, sampler, seeds=[row])[0], both[row], rtol=1e-4, atol=1e-5
        )
    assert float((both[0] - both[1]).abs().mean()) > 0.1
    assert seen == {4}


@pytest.mark.parametrize("choice", LONG_VIDEO_METHODS)
def test_conditioning_frames_are_in_the_clip_and_change_the_others(choice):
    first, last = noise(4, 4, 4, seed=5), noise(4, 4, 4, seed=6)
    plain = draw(choice, denoiser(), 7)
    z = draw(choice, denoiser(), 7, given={0: first, 6: last})
    assert torch.equal(z[:, 0], first.expand(2, -1, -1, -1))
    assert torch.equal(z[:, 6], last.expand(2, -1, -1, -1))
    assert min(float((z[:, frame] - plain[:, frame]).abs().mean()) for frame in range(1, 6)) > 0.01


def test_a_chain_is_one_window_after_the_other_each_given_the_end_of_the_one_before():
    denoise, stream = denoiser(), SampleNoise([0, 1])
    z = draw("chained", denoise, 9, overlap=1)  # windows at 0, 3 and 5: the last one shares two frames
    first = sample("ddim", denoise, PROCESS, stream, (4, 4, 4, 4), STEPS)
    assert torch.equal(z[:, :4], first), "what is drawn is never touched again"
    for start, shared in ((3, 1), (5, 2)):
        known, mask = z[:, start : start + 4], torch.arange(4) < shared
        own = sample(
            "ddim",
            condition_on_frames(denoise, PROCESS, known, mask, 2.0 * CHAIN_STRENGTH),
            PROCESS,
            stream,
            (4, 4, 4, 4),
            STEPS,
        )
        assert torch.equal(z[:, start + shared : start + 4], own[:, shared:])


def test_the_progress_of_a_chain_counts_all_its_windows():
    seen = []
    draw("chained", denoiser(), 8, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(done, 3 * STEPS) for done in range(1, 3 * STEPS + 1)]


@pytest.mark.parametrize(("frames", "window", "stride"), [(3, 4, 2), (4, 4, 4), (19, 8, 4), (13, 6, 1)])
def test_repeated_noise_is_the_first_windows_frames_in_other_orders(frames, window, stride):
    z = shuffled_noise(SampleNoise([0, 1, 2]), window, stride)((frames, 2, 3))
    first = SampleNoise([0, 1, 2])((min(frames, window), 2, 3))
    assert z.shape == (3, frames, 2, 3)
    assert torch.equal(z[:, :window], first)
    for row in range(3):
        alone = shuffled_noise(SampleNoise([row]), window, stride)((frames, 2, 3))
        assert torch.equal(z[row], alone[0]), "from the sample's own stream"
        for start in range(0, frames - window + 1, stride):
            assert sorted(map(float, z[row, start : start + window, 0, 0])) == sorted(
                map(float, first[row, :, 0, 0])
            )


def test_repeated_noise_is_standard_normal_in_every_frame_and_its_order_is_free():
    z = shuffled_noise(SampleNoise(range(2000)), 4, 3)((10, 2))
    assert (z.mean((0, 2)).abs() < 0.08).all()
    assert ((z.std((0, 2)) - 1).abs() < 0.06).all()
    places = (z[:, 4:7, None, 0] == z[:, None, :3, 0]).float().mean(0)
    assert ((places - 1 / 3).abs() < 0.05).all(), (
        "each of the three frames that leave comes back first, second or third alike"
    )
    assert torch.equal(z, shuffled_noise(SampleNoise(range(2000)), 4, 3)((10, 2)))


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
    """Every frame becomes the mean of its window."""
    return z.mean(1, keepdim=True).expand_as(z)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_windows_influence_each_other_through_the_overlap(sampler):
    """12 frames, 4 at a time: what the first frame is moves windows that it is not in.

    Without an overlap it does not.
    """
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
