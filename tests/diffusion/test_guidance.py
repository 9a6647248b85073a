# SPDX-License-Identifier: Apache-2.0
"""Laws of guidance: a wrapper with the interface of a denoise function."""

import pytest
import torch
from support import noise

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.guidance import check_interval, conditional, guidance_window, guided
from latte.model.conditioning import NULL_LABEL

LABEL = torch.tensor([2, 0, 5])
T = torch.tensor([700, 700, 700])


def labels(label=LABEL):
    """The condition and the null condition of a class model."""
    return {"label": label}, {"label": torch.full_like(label, NULL_LABEL)}


class Model:
    """Answers differently for every label and records its calls."""

    def __init__(self, learn_sigma=True, dtype=torch.float32):
        self.calls, self.learn_sigma, self.dtype = [], learn_sigma, dtype

    def __call__(self, z, t, label):
        self.calls.append((len(z), t.tolist(), label.tolist()))
        own = torch.sin(z * (label.view(-1, 1, 1, 1, 1) + 3)) + t.view(-1, 1, 1, 1, 1) / 1000
        return (torch.cat([own, torch.cos(own)], 2) if self.learn_sigma else own).to(self.dtype)


def halves(model, z):
    """The conditional and the null answer, each from a pass of its own."""
    return model(z, T, LABEL), model(z, T, torch.full_like(LABEL, NULL_LABEL))


def test_scale_one_is_the_conditional_model_in_one_pass():
    z, model = noise(3, 2, 4, 2, 2), Model()
    assert torch.equal(guided(model, *labels(), 1.0)(z, T), model(z, T, LABEL))
    assert model.calls[0] == (3, [700] * 3, [2, 0, 5])


def test_one_call_of_twice_the_batch_conditional_half_first():
    model = Model()
    guided(model, *labels(), 3.0)(noise(3, 2, 4, 2, 2), T)
    assert model.calls == [(6, [700] * 6, [2, 0, 5, -1, -1, -1])]


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 7.5])
def test_noise_is_extrapolated_and_variance_is_the_conditional_one(learn_sigma, scale):
    z, model = noise(3, 2, 4, 2, 2), Model(learn_sigma)
    c, u = halves(model, z)
    out = guided(model, *labels(), scale)(z, T)
    assert out.shape == c.shape
    torch.testing.assert_close(
        out[:, :, :4], (1 - scale) * u[:, :, :4] + scale * c[:, :, :4], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(out[:, :, 4:], c[:, :, 4:])


def test_half_precision_answers_are_combined_in_the_precision_of_z():
    z, model = noise(3, 2, 4, 2, 2), Model(dtype=torch.bfloat16)
    c, u = (half.float() for half in halves(model, z))
    out = guided(model, *labels(), 7.0)(z, T)
    assert out.dtype == torch.float32
    assert torch.equal(out[:, :, :4], u[:, :, :4] + 7.0 * (c[:, :, :4] - u[:, :, :4]))


def test_a_clips_guidance_does_not_depend_on_its_batch():
    z = noise(3, 2, 4, 2, 2)
    together = guided(Model(), *labels(), 4.0)(z, T)
    for row in range(3):
        assert torch.equal(
            guided(Model(), *labels(LABEL[row : row + 1]), 4.0)(z[row : row + 1], T[:1])[0], together[row]
        )


def test_a_window_guides_inside_and_costs_one_pass_outside():
    z, model = noise(3, 2, 4, 2, 2), Model()
    denoise = guided(model, *labels(), 4.0, window=(300, 700))
    full, plain = guided(Model(), *labels(), 4.0), conditional(Model(), labels()[0])
    for t, like, b in ((300, full, 6), (700, full, 6), (299, plain, 3), (701, plain, 3)):
        at = torch.full((3,), t)
        assert torch.equal(denoise(z, at), like(z, at))
        assert model.calls[-1][0] == b
    mixed = torch.tensor([299, 500, 701])
    rows = [plain(z, mixed)[0], full(z, mixed)[1], plain(z, mixed)[2]]
    assert torch.equal(denoise(z, mixed), torch.stack(rows))


@pytest.mark.parametrize("objective", ["paper", "rectified_flow"])
def test_an_interval_of_noise_levels_is_a_window_of_timesteps(objective):
    process = build_process(DiffusionConfig(objective=objective))
    first, last = guidance_window(process, (0.3, 5.0))
    level = process.noise / process.signal
    assert level[first - 1] < 0.3 <= level[first]
    assert level[last] <= 5.0 < level[last + 1]
    if objective == "rectified_flow":  # noise / signal = s / (1 - s) at s = (t + 1) / 1000
        assert (first, last) == (230, 832)
    assert guidance_window(process, None) is None
    assert guidance_window(process, (0.0, 1e9))[0] == 0


def test_an_interval_that_guides_nothing_is_refused():
    process = build_process(DiffusionConfig())
    with pytest.raises(InputError, match=r"\[200, 300\], but none of the 1000 noise levels from 0.01 to 157"):
        guidance_window(process, (200, 300))
    with pytest.raises(InputError, match=r"none of the 2 noise levels .* is inside.*widen it"):
        guidance_window(process, (0.3, 5), [10, 999])
    assert guidance_window(process, (0.3, 5), [10, 400, 999]) == guidance_window(process, (0.3, 5))


@pytest.mark.parametrize(
    "interval", [(5.0, 0.3), (1.0, 1.0), (-1.0, 2.0), (0.0, float("inf")), (float("nan"), 1.0), (1.0,)]
)
def test_a_reversed_or_impossible_interval_is_refused(interval):
    with pytest.raises(InputError, match=r"guidance_interval is .* must be .low, high."):
        check_interval(interval)


def test_an_unconditional_model_is_its_own_denoiser_and_cannot_be_guided():
    def model(z, t):
        return z

    z = noise(3, 2, 4, 2, 2)
    assert guided(model, {}, {}, 1.0)(z, T) is conditional(model, {})(z, T) is z
    with pytest.raises(InputError, match=r"guidance is 3\.0, but an unconditional model"):
        guided(model, {}, {}, 3.0)


@pytest.mark.parametrize(
    ("scale", "window"),
    [(-1.0, None), (float("nan"), None), (float("inf"), None), (1e30, None), (2.0, (700, 300))],
)
def test_bad_settings_are_refused(scale, window):
    with pytest.raises(InputError, match="guidance"):
        guided(Model(), *labels(), scale, window)


def caption_model(z, t, text, mask):
    """Learned variance; answers with the mean of what it may read."""
    read = (text * mask[..., None]).sum((1, 2)) / mask.sum(1)
    own = torch.sin(z * (read.view(-1, 1, 1, 1, 1) + 2))
    return torch.cat([own, own + 1], 2)


def test_any_condition_guides_as_labels_do():
    z, (text, null) = noise(3, 2, 4, 2, 2), noise(2, 3, 5, 6)
    full, short = torch.ones(3, 5, dtype=torch.bool), torch.arange(5) < torch.tensor([[1], [1], [2]])
    condition, other = {"text": text, "mask": full}, {"text": null, "mask": short}
    out = guided(caption_model, condition, other, 7.5)(z, T)
    c, u = caption_model(z, T, text, full), caption_model(z, T, null, short)
    assert torch.equal(out, torch.cat([(u + 7.5 * (c - u))[:, :, :4], c[:, :, 4:]], 2))
    assert torch.equal(guided(caption_model, condition, other, 1.0)(z, T), c)


def test_a_null_caption_of_another_length_is_refused():
    with pytest.raises(InputError, match=r"null condition has shapes .*\(3, 4, 6\).*pad both to one length"):
        guided(caption_model, {"text": noise(3, 5, 6)}, {"text": noise(3, 4, 6)}, 2.0)
