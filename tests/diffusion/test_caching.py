# SPDX-License-Identifier: Apache-2.0
"""The step cache: what it evaluates, what it repeats, and that clips do not depend on each other."""

import pytest
import torch
from support import noise

from latte.checks import InputError
from latte.diffusion.caching import StepCache
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.frame_conditioning import condition_on_frames
from latte.diffusion.guidance import guided
from latte.diffusion.long_video import in_windows
from latte.diffusion.samplers import SAMPLERS, indices, sample
from latte.runtime import SampleNoise

SHAPE = (2, 3, 4, 4)
STEPS = 20
PROCESS = build_process(DiffusionConfig(objective="v"))
FLOW = build_process(DiffusionConfig(objective="rectified_flow"))
LABEL = torch.tensor([2, 0, 5])


class Model:
    """A smooth model that records the labels and timesteps of its rows; outputs have variance channels."""

    def __init__(self):
        self.rows = []

    def __call__(self, z, t, label):
        self.rows += list(zip(t.tolist(), label.tolist(), strict=True))
        own = torch.tanh(z + (label.view(-1, 1, 1, 1, 1) % 7) / 7) * (1 + t.view(-1, 1, 1, 1, 1) / 2000)
        return torch.cat([own, torch.sin(own)], 2)


def visited(name="dpmpp", process=PROCESS, steps=STEPS):
    return indices(SAMPLERS[name], process.num_steps, steps)


def run(threshold, label=LABEL, seeds=(1, 2, 3), name="dpmpp", scale=2.0, window=None, process=PROCESS):
    """(sample, model, cache) with guidance and a cache."""
    model = Model()
    cache = StepCache(model, threshold, visited(name, process), len(label)) if threshold else model
    denoise = guided(cache, {"label": label}, {"label": torch.full_like(label, -1)}, scale, window)
    return sample(name, denoise, process, SampleNoise(seeds), SHAPE, STEPS), model, cache


NAMES = [(name, PROCESS) for name in SAMPLERS if name != "flow"]
NAMES += [(name, FLOW) for name in SAMPLERS if "flow" in SAMPLERS[name].predictions]


@pytest.mark.parametrize(("name", "process"), NAMES)
def test_a_threshold_that_is_never_reached_changes_nothing(name, process):
    plain, model, _ = run(None, name=name, process=process)
    same, cached, cache = run(1e-9, name=name, process=process)
    assert torch.equal(plain, same)
    assert cached.rows == model.rows
    assert cache.num_evaluated == cache.num_calls == len(model.rows)


@pytest.mark.parametrize(("name", "process"), NAMES)
def test_fewer_evaluations_give_nearly_the_same_sample(name, process):
    plain, model, _ = run(None, name=name, process=process)
    near, cached, cache = run(0.1, name=name, process=process)
    far, fewest, _ = run(1.0, name=name, process=process)
    assert len(fewest.rows) < 0.9 * len(model.rows)
    assert (cache.num_evaluated, cache.num_calls) == (len(cached.rows), len(model.rows))
    if name == "ddpm":  # its noise changes every output, so that little can be repeated
        return
    assert len(fewest.rows) < len(cached.rows) < 0.9 * len(model.rows)
    distances = [(other - plain).square().mean().sqrt() for other in (near, far)]
    assert 0 < distances[0] < distances[1]
    assert distances[0] < 0.1 * plain.std()


def test_the_first_steps_and_the_last_are_evaluated():
    _, model, _ = run(1.0)
    steps = sorted({t for t, _ in model.rows}, reverse=True)
    assert steps[:2] == visited()[::-1][:2]
    assert steps[-1] == visited()[0]
    assert len(steps) < STEPS


def test_a_clip_does_not_depend_on_its_batch():
    together, model, _ = run(0.15)
    for row in range(3):
        alone, one, _ = run(0.15, LABEL[row : row + 1], (row + 1,))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-6, atol=1e-6)
        label = LABEL[row].item()
        assert [t for t, own in one.rows if own == label] == [t for t, own in model.rows if own == label]
    steps = [[t for t, own in model.rows if own == label] for label in LABEL.tolist()]
    assert len({tuple(own) for own in steps}) > 1, "all clips decided alike, so the test is empty"


def test_both_halves_of_guidance_are_evaluated_together():
    _, model, _ = run(0.15, LABEL[:1], (1,))
    conditional = [t for t, own in model.rows if own == 2]
    assert conditional == [t for t, own in model.rows if own == -1]


def test_guidance_that_begins_or_ends_in_between_is_evaluated():
    timesteps = visited()
    window = timesteps[6], timesteps[13]
    _, model, _ = run(0.5, LABEL[:1], (1,), window=window)
    without = [t for t, own in model.rows if own == -1]
    assert without
    assert all(window[0] <= t <= window[1] for t in without)
    assert without[0] == window[1], "the null half has nothing to repeat when the window begins"
    exact, plain, _ = run(None, LABEL[:1], (1,), window=window)
    near, _, _ = run(0.1, LABEL[:1], (1,), window=window)
    assert (near - exact).square().mean().sqrt() < 0.1 * exact.std()
    assert len(model.rows) < len(plain.rows)


def test_a_repeated_output_is_the_input_plus_what_was_added():
    outputs = iter([torch.full((1, *SHAPE), value) for value in (1.0, 1.01, 9.0)])
    cache = StepCache(lambda z, t: next(outputs), 0.5, [0, 1, 2, 3, 4], 1)
    z = [torch.full((1, *SHAPE), value) for value in (0.0, 0.1, 0.3, 0.5)]
    found = [cache(z[i], torch.tensor([4 - i])) for i in range(4)]
    assert [value.mean().item() for value in found] == pytest.approx([1.0, 1.01, 1.21, 1.41])
    assert cache.num_evaluated == 2


def test_the_sum_of_the_changes_is_compared_with_the_threshold():
    """k = 0.1 / 0.1 = 1 and |v| = 1.1: each move by 0.1 adds 0.0909."""
    for threshold, evaluated in ((0.08, 4), (0.1, 3), (0.19, 2)):
        outputs = iter(torch.full((1, *SHAPE), 1 + i / 10) for i in range(9))
        cache = StepCache(lambda z, t, outputs=outputs: next(outputs), threshold, range(5), 1)
        for i in range(4):
            cache(torch.full((1, *SHAPE), i / 10), torch.tensor([4 - i]))
        assert cache.num_evaluated == evaluated, threshold


def test_windows_of_a_long_video_have_memories_of_their_own():
    model = Model()
    cache = StepCache(model, 0.1, visited(), 1)
    label = torch.tensor([3])
    denoise = in_windows(guided(cache, {"label": label}, {}, 1.0), 2, 1)
    plain = in_windows(guided(Model(), {"label": label}, {}, 1.0), 2, 1)
    near, exact = (
        sample("dpmpp", call, PROCESS, SampleNoise([1]), (4, 3, 4, 4), STEPS) for call in (denoise, plain)
    )
    assert cache.num_calls == 3 * STEPS
    assert cache.num_evaluated < 0.8 * cache.num_calls
    assert (near - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_a_second_sample_starts_anew():
    """Chained windows call one model for several samples."""
    model = Model()
    cache = StepCache(model, 0.15, visited(), 1)
    denoise = guided(cache, {"label": LABEL[:1]}, {}, 1.0)
    first, second = (sample("dpmpp", denoise, PROCESS, SampleNoise([1]), SHAPE, STEPS) for _ in range(2))
    assert torch.equal(first, second)
    half = len(model.rows) // 2
    assert model.rows[:half] == model.rows[half:]


def test_frame_guidance_is_refused_and_replacement_is_not():
    frames = noise(1, *SHAPE)
    mask = torch.tensor([True, False])
    for strength in (0.0, 2.0):
        cache = StepCache(lambda z, t: torch.tanh(z), 0.1, visited(), 1)
        denoise = condition_on_frames(cache, PROCESS, frames, mask, strength)
        if strength:
            with pytest.raises(InputError, match="cannot be used with guidance by conditioning frames"):
                sample("dpmpp", denoise, PROCESS, SampleNoise([1]), SHAPE, STEPS)
        else:
            z = sample("dpmpp", denoise, PROCESS, SampleNoise([1]), SHAPE, STEPS)
            torch.testing.assert_close(z[:, :1], frames[:, :1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(InputError, match=r"cache is .* must be above 0 and at most 1"):
        StepCache(Model(), threshold, visited(), 1)


@pytest.mark.parametrize("steps", [1, 3])
def test_too_few_steps_are_refused(steps):
    with pytest.raises(InputError, match=f"cache needs at least 4 steps, .* but there are {steps}"):
        StepCache(Model(), 0.1, visited(steps=steps), 1)
