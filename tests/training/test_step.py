# SPDX-License-Identifier: Apache-2.0
"""A step is the same however it is split, against a slow version that takes one clip after the other."""

from dataclasses import replace

import pytest
import torch
from support import noise

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.runtime import generator
from latte.training.step import Task, backward
from tiny_runs import TINY, tiny_model

VIDEO, LABEL = noise(6, 3, 4, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def task(model=None, **changes) -> Task:
    model = model or tiny_model()
    parts = {
        "process": build_process(DiffusionConfig()),
        "objective": OBJECTIVES["paper"],
        "codec": None,
        "seed": 7,
        "global_batch": 6,
        "micro_batch": None,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    return Task(**{"model": model, "forward": model, **parts, **changes})


def gradient(task: Task, positions=range(6), step: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss mse vlb), and the whole gradient in one row."""
    losses = backward(task, step, positions, VIDEO[list(positions)], LABEL[list(positions)])
    return losses, torch.cat([parameter.grad.flatten() for parameter in task.model.parameters()])


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_bucket_of_another_batch_is_averaged_over_its_own_clips(micro_batch):
    """The gradient of a step does not grow with the clips that its bucket takes."""
    own, bucket = tiny_model(), tiny_model()
    losses, expected = gradient(task(own))
    found = backward(task(bucket, global_batch=12, micro_batch=micro_batch), 5, range(6), VIDEO, LABEL, 6)
    torch.testing.assert_close(found, losses)
    grads = torch.cat([parameter.grad.flatten() for parameter in bucket.parameters()])
    assert grads.abs().max() > 0
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_it_is_the_mean_over_clips_taken_one_by_one_with_the_draws_of_their_places():
    """L_simple written out: eps of sqrt(a) z + sqrt(1 - a) eps, a the cumulated product of 1 - beta, a
    label dropped with p.
    """
    model, other = (tiny_model(replace(TINY, learn_sigma=False)) for _ in range(2))
    losses, found = gradient(task(model))
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    total, dropped = 0.0, 0
    for position in range(6):
        stream = generator(7, "train", 5, position)
        t = torch.randint(1000, (1,), generator=stream)
        eps = torch.randn(3, 4, 4, 4, generator=stream)
        drop = torch.rand(1, generator=stream).item() < TINY.class_dropout
        dropped += drop
        a = alphas_cumprod[t].item()
        zt = a**0.5 * VIDEO[position] + (1 - a) ** 0.5 * eps
        loss = (
            other(zt[None], t, torch.tensor([-1 if drop else int(LABEL[position])])) - eps
        ).square().mean() / 6
        loss.backward()
        total += loss.item()
    assert 0 < dropped < 6
    torch.testing.assert_close(losses, torch.tensor([total, total, 0.0]))
    torch.testing.assert_close(
        found, torch.cat([parameter.grad.flatten() for parameter in other.parameters()]), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5, 100])
def test_accumulation_equals_the_large_batch(micro_batch):
    whole, split = gradient(task()), gradient(task(micro_batch=micro_batch))
    torch.testing.assert_close(split[0], whole[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(split[1], whole[1], rtol=1e-4, atol=1e-6)


def test_shares_of_several_processes_add_up_to_the_whole():
    whole = gradient(task())
    shares = [gradient(task(), positions) for positions in (range(0, 3), range(3, 6))]
    torch.testing.assert_close(shares[0][0] + shares[1][0], whole[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(shares[0][1] + shares[1][1], whole[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("change", [{"step": 6}, {"seed": 8}, {"class_dropout": 0.9}])
def test_every_part_of_the_key_counts(change):
    step, model = (
        change.pop("step", 5),
        tiny_model(replace(TINY, class_dropout=change.pop("class_dropout", 0.3))),
    )
    assert not torch.equal(gradient(task(model, **change), step=step)[0], gradient(task())[0])


def test_half_precision_stays_inside_the_model():
    seen = []

    def objective(denoise, process, z0, t, eps):
        output = denoise(z0, t)
        seen.append((z0.dtype, eps.dtype, output.dtype))
        return OBJECTIVES["paper"](denoise, process, z0, t, eps)

    exact, half = gradient(task()), gradient(task(dtype=torch.bfloat16, objective=objective))
    assert seen == [(torch.float32,) * 3]
    assert not torch.equal(half[1], exact[1])
    assert (half[1] - exact[1]).norm() < 0.05 * exact[1].norm()
    assert half[1].dtype == torch.float32


class NoisyCodec:
    """Frames (b f 3 8 8) to latents (b f 4 4 4): a mean over 2 x 2 pixels plus noise from the generator."""

    def encode(self, frames: torch.Tensor, stream: torch.Generator) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        small = frames.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-1, -3))
        latent = torch.cat([small, small[:, :, :1]], dim=2)
        return latent + torch.randn(latent.shape, generator=stream)


def test_frames_are_encoded_by_place_not_by_batch():
    seen = []

    def objective(denoise, process, z0, t, eps):
        seen.append(z0)
        return OBJECTIVES["paper"](denoise, process, z0, t, eps)

    frames = torch.zeros(6, 3, 3, 8, 8)
    for micro_batch in (6, 4):
        backward(
            task(codec=NoisyCodec(), objective=objective, micro_batch=micro_batch), 5, range(6), frames, LABEL
        )
    assert [len(z0) for z0 in seen] == [6, 4, 2]
    assert torch.equal(seen[0], torch.cat(seen[1:]))
    assert len({tuple(z0.flatten()[:3].tolist()) for z0 in seen[0]}) == 6


def test_images_share_their_clips_timestep_and_bring_labels_of_their_own():
    model, calls = tiny_model(), []

    def forward(zt, t, label, num_images):
        calls.append((zt.shape, label, num_images))
        return model(zt, t, label, num_images)

    images = noise(6, 2, 4, 4, 4, seed=3)
    labels = torch.stack([LABEL, LABEL.flip(0), LABEL], dim=1)
    backward(
        task(model, forward=forward, num_images=2), 5, range(6), torch.cat([VIDEO, images], dim=1), labels
    )
    (shape, label, num_images) = calls[0]
    assert (shape, num_images) == ((6, 5, 4, 4, 4), 2)
    assert all(
        torch.equal(row, given) or row.tolist() == [-1, -1, -1]
        for row, given in zip(label, labels, strict=True)
    )
    labels[3, 1] = 3
    with pytest.raises(InputError, match="label is 3"):
        backward(task(num_images=2), 5, range(6), torch.cat([VIDEO, images], dim=1), labels)


def test_labels_the_model_does_not_have_are_refused_and_an_unconditional_one_takes_none():
    with pytest.raises(InputError, match="label is 3, but the model has classes 0 to 2"):
        backward(task(), 1, range(6), VIDEO, LABEL + 1)
    with pytest.raises(InputError, match="label is -1"):
        backward(task(), 1, range(6), VIDEO, LABEL - 1)
    with pytest.raises(InputError, match="the data have no labels"):
        backward(task(), 1, range(6), VIDEO, None)
    assert (
        backward(task(tiny_model(replace(TINY, num_classes=None))), 1, range(6), VIDEO, LABEL + 100)
        .isfinite()
        .all()
    )
