# SPDX-License-Identifier: Apache-2.0
"""Noise levels of training: their distributions, a level per frame, and that the default is as before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import noise, wake

from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError
from latte.config.run import load_run
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES, UNIFORM, TimestepDraw, two_levels
from latte.model.text import LatteText, TextConfig
from latte.runtime import generator
from latte.training.between_blocks import check_network
from latte.training.step import StepOptions, Task, frame_timesteps
from tiny_runs import SHORT, TINY, run, tiny_model

PROCESS = build_process(DiffusionConfig())


def task(options: StepOptions) -> Task:
    model: Any = None
    device = torch.device("cpu")
    objective = OBJECTIVES["paper"]
    return Task(model, model, PROCESS, objective, None, 7, 4, None, device, torch.float32, options=options)


def test_the_default_draw_is_the_released_codes():
    found = UNIFORM(PROCESS, 100, generator(0))
    assert torch.equal(found, torch.randint(1000, (100,), generator=generator(0)))


def test_logit_normal_has_the_quantiles_of_a_sigmoid_of_a_normal():
    t = TimestepDraw("logit_normal")(PROCESS, 40_000, generator(0)).double() / 1000
    points = torch.tensor([0.1587, 0.5, 0.8413], dtype=torch.float64)  # of -1, 0 and 1
    expected = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).sigmoid()
    torch.testing.assert_close(torch.quantile(t, points), expected, rtol=0, atol=0.006)


def test_a_shift_moves_the_median_as_equation_23_says():
    t = TimestepDraw("uniform", 3.0)(PROCESS, 40_000, generator(0)).double() / 1000
    assert t.median().item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.006)
    assert t.max() < 1
    same = TimestepDraw("logit_normal", 1.0)(PROCESS, 50, generator(0))
    assert torch.equal(same, TimestepDraw("logit_normal")(PROCESS, 50, generator(0)))


def test_frames_have_one_of_two_levels_about_equally_often():
    first = torch.tensor([10])
    second = torch.tensor([900])
    found = two_levels(first, second, 4000, generator(0))
    assert set(found.tolist()) == {10, 900}
    assert 0.47 < (found == 900).float().mean() < 0.53


def test_the_share_of_mixed_clips_is_the_setting_and_the_others_keep_their_level():
    t = torch.arange(400)
    streams = [generator(index) for index in range(400)]
    found = frame_timesteps(task(StepOptions(frame_noise=0.25)), t, 8, streams)
    mixed = (found != t[:, None]).any(1)
    assert found.shape == (400, 8)
    assert 0.18 < mixed.float().mean() < 0.32
    assert all(len(set(row)) == 2 for row in found[mixed].tolist())


@pytest.mark.parametrize("objective", ["paper", "v", "min_snr", "v_min_snr", "z0"])
def test_equal_levels_of_all_frames_are_the_level_of_the_clip(objective):
    process = build_process(DiffusionConfig(objective=objective))
    model = tiny_model()
    z0 = noise(2, 3, 4, 4, 4)
    eps = noise(2, 3, 4, 4, 4, seed=1)
    label = torch.tensor([1, 2])
    t = torch.tensor([0, 700])
    per_frame = t[:, None].expand(2, 3)

    def denoise(zt, timesteps):
        return model(zt, timesteps, label)

    clip = OBJECTIVES[objective](denoise, process, z0, t, eps)
    frames = OBJECTIVES[objective](denoise, process, z0, per_frame, eps)
    for one, other in zip(clip, frames, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_loss_of_mixed_levels_is_that_of_each_frame_at_its_own():
    process = build_process(DiffusionConfig(objective="v_min_snr"))
    z0 = noise(1, 2, 4, 2, 2, dtype=torch.float64)
    eps = noise(1, 2, 4, 2, 2, seed=1, dtype=torch.float64)
    t = torch.tensor([[100, 800]])
    found = OBJECTIVES["v_min_snr"](lambda zt, t: 0.5 * zt, process, z0, t, eps)
    total = 0.0
    for frame in range(2):
        a = process.alphas_cumprod[t[0, frame]].item()
        x, e = z0[0, frame], eps[0, frame]
        error = 0.5 * (a**0.5 * x + (1 - a) ** 0.5 * e) - (a**0.5 * e - (1 - a) ** 0.5 * x)
        snr = a / (1 - a)
        total += min(snr, 5) / (snr + 1) * error.square().mean().item() / 2
    assert found.total.item() == pytest.approx(total, rel=1e-6)


def test_a_frame_is_conditioned_on_its_own_level():
    model = tiny_model().eval()
    z = noise(1, 3, 4, 4, 4)
    label = torch.tensor([1])
    with torch.no_grad():
        even = model(z, torch.tensor([[500, 500, 500]]), label)
        mixed = model(z, torch.tensor([[500, 20, 500]]), label)
        torch.testing.assert_close(even, model(z, torch.tensor([500]), label))
    assert not torch.allclose(even[:, 1], mixed[:, 1], atol=1e-4)


def test_a_text_model_takes_a_level_per_frame():
    config = TextConfig(depth=1, width=16, heads=2, num_frames=3, latent_size=4, caption_channels=8)
    model = wake(LatteText(config)).eval()
    z = noise(1, 3, 4, 4, 4)
    text = noise(1, 5, 8)
    with torch.no_grad():
        even = model(z, torch.tensor([[500, 500, 500]]), text)
        torch.testing.assert_close(even, model(z, torch.tensor([500]), text))


@pytest.mark.parametrize("t", [torch.zeros(2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)])
def test_timesteps_of_another_shape_are_refused(t):
    with pytest.raises(InputError, match=r"one timestep per clip, or without images and tubes \(1, 3\)"):
        tiny_model()(noise(1, 3, 4, 4, 4), t, torch.tensor([0]))


@pytest.mark.parametrize(
    "changes", [{"frame_noise": 0.5}, {"timesteps": "logit_normal", "timestep_shift": 2.0}]
)
def test_a_run_with_it_resumes_bit_for_bit_and_records_it(tmp_path, changes):
    config = replace(SHORT, steps=6, **changes)
    whole = run(tmp_path / "whole", config)
    for steps in (3, 6):
        parts = run(tmp_path / "parts", replace(config, steps=steps))
    plain = run(tmp_path / "plain", replace(SHORT, steps=6))
    assert parts["weights_sha256"] == whole["weights_sha256"] != plain["weights_sha256"]
    recorded = load_checkpoint(Path(whole["checkpoint"])).state["settings"]
    assert changes.items() <= recorded.items()
    assert not changes.keys() & load_checkpoint(Path(plain["checkpoint"])).state["settings"].keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.frame_noise=1.5"], r"a fraction of the clips, but it must be in \[0, 1\]"),
        (["train.frame_noise=nan"], r"must be a number"),
        (["train.timestep_shift=0"], r"it must be positive and finite; 1 shifts nothing"),
        (["train.timesteps=normal"], r"which is not one of uniform, logit_normal"),
        (["train.frame_noise=0.5", "train.num_images=2"], r"images have the noise level of their clip"),
        (["train.frame_noise=0.5", "model.patch=compression"], r"covers 2 latent frames, which have one"),
    ],
)
def test_what_does_not_fit_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        load_run("shapes-tiny", words)


def test_a_model_from_python_is_checked_too():
    config = replace(TINY, patch="compression", num_frames=4)
    with pytest.raises(InputError, match=r"give model\.patch=uniform"):
        check_network(replace(SHORT, frame_noise=0.5), config)
