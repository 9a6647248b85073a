# SPDX-License-Identifier: Apache-2.0
"""Conditioning frames.

They come out as they went in, nothing else changes when there are none, and the others follow them.
"""

import pytest
import torch
from support import noise, wake

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.frame_conditioning import condition_on_frames, restore_frames
from latte.diffusion.process import Flow
from latte.diffusion.samplers import SAMPLERS, sample
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig
from latte.runtime import SampleNoise

SHAPE = (4, 4, 4, 4)  # f c h w
SMALL = {"depth": 2, "width": 16, "heads": 2, "num_frames": 4, "latent_size": 4}
FIRST = torch.tensor([True, False, False, False])
STEPS = 6


def denoiser(kind: str, learn_sigma: bool = True):
    """A model of random weights with its condition bound, two clips at a time."""
    if kind == "text":
        text = noise(2, 5, 6)
        model = wake(LatteText(TextConfig(**SMALL, caption_channels=6, learn_sigma=learn_sigma))).eval()
        return lambda z, t: model(z, t, text)
    return wake(Latte(ModelConfig(**SMALL, learn_sigma=learn_sigma))).eval()


def process_for(sampler: str):
    return build_process(
        DiffusionConfig(
            objective="rectified_flow" if sampler == "flow" else "v" if sampler == "dpmpp" else "paper"
        )
    )


def draw(sampler, denoise, process, steps=STEPS, seeds=(0, 1), shape=SHAPE):
    return sample(sampler, denoise, process, SampleNoise(seeds), shape, steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["class", "text"])
def test_the_conditioning_frames_come_out_and_the_others_are_not_read(kind, sampler):
    process, known = process_for(sampler), noise(2, *SHAPE, seed=3)
    denoise = denoiser(kind, learn_sigma=sampler != "flow")
    for mask in (FIRST, torch.tensor([[True, False, False, True], [False, True, False, False]])):
        z = draw(sampler, condition_on_frames(denoise, process, known, mask), process)
        given = mask.expand(2, 4)
        assert float((z - known)[given].abs().max()) < 1e-4, "to rounding by itself"
        exact = restore_frames(z, known, mask)
        assert torch.equal(exact[given], known[given])
        assert torch.equal(exact[~given], z[~given])
        other = torch.where(given.view(2, 4, 1, 1, 1), known, torch.nan)
        assert torch.equal(draw(sampler, condition_on_frames(denoise, process, other, mask), process), z)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_frames_known_is_that_clip_and_none_is_the_plain_sampler(sampler):
    process, known, denoise = (
        process_for(sampler),
        noise(2, *SHAPE, seed=3),
        denoiser("class", sampler != "flow"),
    )
    everything, nothing = torch.ones(4, dtype=torch.bool), torch.zeros(2, 4, dtype=torch.bool)
    z = draw(sampler, condition_on_frames(denoise, process, known, everything), process)
    assert float((z - known).abs().max()) < 1e-4
    assert torch.equal(restore_frames(z, known, everything), known)
    plain = draw(sampler, denoise, process)
    assert torch.equal(draw(sampler, condition_on_frames(denoise, process, known, nothing), process), plain)
    assert torch.equal(restore_frames(plain, known, nothing), plain)


@pytest.mark.parametrize("strength", [0.0, 40.0])
def test_a_clip_does_not_depend_on_the_clips_beside_it(strength):
    process, known, model = process_for("ddim"), noise(2, *SHAPE, seed=3), denoiser("class")
    both = draw("ddim", condition_on_frames(model, process, known, FIRST, strength), process)
    for row in (0, 1):
        alone = draw(
            "ddim",
            condition_on_frames(model, process, known[row : row + 1], FIRST, strength),
            process,
            seeds=[row],
        )
        torch.testing.assert_close(alone[0], both[row], rtol=1e-4, atol=1e-5)


def test_conditioning_frames_follow_the_forward_process():
    """Ancestral sampling visits z_t of the conditioning frames as q(z_t | z_0) has it.

    Right mean and spread in the middle of the way.
    """
    process, seen = process_for("ddpm"), {}

    def model(z, t):
        seen[int(t[0])] = z
        return torch.cat([z, z], 2)

    known = torch.full((400, 2, 1, 4, 4), 3.0)
    draw(
        "ddpm",
        condition_on_frames(model, process, known, torch.tensor([True, False]), 0.0),
        process,
        25,
        range(400),
        known.shape[1:],
    )
    assert len(seen) == 25
    for t in sorted(seen)[5:20:5]:
        given, a = seen[t][:, 0], float(process.signal[t])
        assert abs(float(given.mean()) - 3 * a) < 0.05
        assert abs(float(given.std()) - float(process.noise[t])) < 0.02


def equal_frames(process):
    """The exact denoiser of clips whose frames are one and the same draw of a standard normal.

    E[z_0 | z_t] is their common part.
    """

    def denoise(z, t):
        a, s = process.at("signal", t, z), process.at("noise", t, z)
        z0 = (a * z.sum(1, keepdim=True) / (z.shape[1] * a**2 + s**2)).expand_as(z)
        return process.target(z0, t, (z - a * z0) / s)

    return denoise


@pytest.mark.parametrize("objective", ["paper", "v", "rectified_flow"])
def test_the_other_frames_follow_the_given_ones(objective):
    process = build_process(DiffusionConfig(objective=objective))
    sampler = "flow" if isinstance(process, Flow) else "ddim"
    shape, mask = (2, 1, 2, 2), torch.tensor([True, False])
    known = noise(64, *shape, seed=3)
    far = {}
    for strength in (0.0, 1.0):
        z = draw(
            sampler,
            condition_on_frames(equal_frames(process), process, known, mask, strength),
            process,
            50,
            range(64),
            shape,
        )
        far[strength] = float((z[:, 1] - known[:, 0]).square().mean())
    plain = draw(sampler, equal_frames(process), process, 50, range(64), shape)
    assert float((plain[:, 1] - known[:, 0]).square().mean()) > 1.5, "two independent draws differ by 2"
    assert far[1.0] < 1e-9 < 0.01 < far[0.0], far


@pytest.mark.parametrize("objective", ["paper", "v", "rectified_flow"])
@pytest.mark.parametrize(("frames", "given"), [(2, 1), (5, 1), (5, 4)])
def test_at_strength_one_the_others_get_their_expectation_however_many_frames_are_given(
    objective, frames, given
):
    """E[z_0 | z_t, the conditioning frames] of equal_frames is their content, at every timestep.

    Half the strength goes half of the way.
    """
    process = build_process(DiffusionConfig(objective=objective))
    z, known, mask = (
        noise(6, frames, 1, 2, 2),
        noise(6, 1, 1, 2, 2, seed=3).expand(-1, frames, -1, -1, -1),
        torch.arange(frames) < given,
    )
    t = torch.tensor([10, 200, 400, 600, 800, 990])
    read = {
        s: process.estimate(condition_on_frames(equal_frames(process), process, known, mask, s)(z, t), z, t)[
            0
        ][:, given:]
        for s in (0.0, 0.5, 1.0)
    }
    torch.testing.assert_close(read[1.0], known[:, given:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(read[0.5], (read[0.0] + read[1.0]) / 2, rtol=1e-3, atol=1e-3)
    assert float((read[0.0] - known[:, given:]).abs().mean()) > 0.2


def test_a_slope_that_belongs_to_no_covariance_pulls_at_nothing():
    process, known, t = process_for("ddim"), noise(2, *SHAPE, seed=3), torch.tensor([500, 500])

    def wrong(z, t):
        """As noise: the guess for every frame falls when one of them rises."""
        return 8 * z.mean(1, keepdim=True).expand_as(z)

    alone, pulled = (
        condition_on_frames(wrong, process, known, FIRST, strength)(noise(2, *SHAPE), t)
        for strength in (0.0, 1.0)
    )
    torch.testing.assert_close(pulled, alone, rtol=1e-5, atol=1e-5)


def test_a_model_is_asked_once_a_step_and_leaves_no_gradient():
    calls, model, process, known = [], denoiser("class"), process_for("ddim"), noise(2, *SHAPE, seed=3)

    def counted(z, t):
        calls.append(z.requires_grad)
        return model(z, t)

    for strength in (0.0, 1.0):
        z = draw("ddim", condition_on_frames(counted, process, known, FIRST, strength), process)
        assert not z.requires_grad
    assert calls == [False] * STEPS + [True] * STEPS
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("known", "mask", "strength", "message"),
    [
        (noise(2, 4, 4, 4), FIRST, 1.0, "conditioning frames have shape"),
        (
            noise(2, *SHAPE),
            FIRST[:3],
            1.0,
            r"mask is torch.bool of shape \(3,\).*need bool \(4,\) or \(2, 4\)",
        ),
        (noise(2, *SHAPE), FIRST.float(), 1.0, "mask is torch.float32"),
        (noise(2, *SHAPE), FIRST, -1.0, "strength"),
        (noise(2, *SHAPE), FIRST, float("nan"), "strength"),
    ],
)
def test_what_does_not_fit_is_refused(known, mask, strength, message):
    with pytest.raises(InputError, match=message):
        condition_on_frames(denoiser("class"), process_for("ddim"), known, mask, strength)
