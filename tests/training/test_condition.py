# SPDX-License-Identifier: Apache-2.0
"""A text model trains as a class model does: the same step however it is split, captions dropped by each
clip's own stream.
"""

import pytest
import torch
from support import noise, wake

from latte.checks import InputError
from latte.data.captions import encode_captions
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.model.text import LatteText, TextConfig
from latte.runtime import generator
from latte.text.encoders import BuiltinEncoder
from latte.training.condition import CaptionReader
from latte.training.step import Task, backward

TINY = TextConfig(depth=1, width=16, heads=2, num_frames=3, latent_size=4, caption_channels=64)
VIDEO = noise(6, 3, 4, 4, 4)
CAPTIONS = ["red", "a blue one", "", "green left", "red", "up"]
FEATURES = encode_captions(BuiltinEncoder(4), CAPTIONS)


def tiny_model() -> LatteText:
    """The same awake model every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wake(LatteText(TINY))


def task(model=None, **changes) -> Task:
    """A task of six clips."""
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


def gradient(
    task: Task, positions=range(6), dropout=0.3, captions=CAPTIONS, video=VIDEO
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss mse vlb), and the whole gradient in one row."""
    given = CaptionReader(FEATURES, dropout)([captions[position] for position in positions])
    losses = backward(task, 5, positions, video[list(positions)], given)
    return losses, torch.cat(
        [parameter.grad.flatten() for parameter in task.model.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_accumulation_equals_the_large_batch(micro_batch):
    whole, split = gradient(task()), gradient(task(micro_batch=micro_batch))
    torch.testing.assert_close(split[0], whole[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(split[1], whole[1], rtol=1e-4, atol=1e-6)


def test_the_shares_of_processes_add_up_to_the_step_of_one():
    whole, shares = gradient(task()), [gradient(task(), range(start, start + 3)) for start in (0, 3)]
    torch.testing.assert_close(shares[0][0] + shares[1][0], whole[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(shares[0][1] + shares[1][1], whole[1], rtol=1e-4, atol=1e-6)


def seen_by(dropout: float, captions=CAPTIONS, images: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches the model of a step: text, mask."""
    model, seen = tiny_model(), []

    def forward(z, t, text, mask, num_images):
        seen.append((text, mask))
        return model(z, t, text, mask, num_images)

    video = torch.cat([VIDEO, noise(6, images, 4, 4, 4, seed=1)], 1) if images else VIDEO
    gradient(task(model, forward=forward, num_images=images), dropout=dropout, captions=captions, video=video)
    return seen[0]


def test_a_dropped_caption_is_the_empty_one_by_the_draw_of_its_place():
    streams = [generator(7, "train", 5, position) for position in range(6)]
    for stream in streams:
        torch.randint(1000, (1,), generator=stream)
        torch.randn(3, 4, 4, 4, generator=stream)
    drop = [torch.rand((), generator=stream).item() < 0.3 for stream in streams]
    assert 0 < sum(drop) < 6
    expected = FEATURES(["" if gone else caption for caption, gone in zip(CAPTIONS, drop, strict=True)])
    text, mask = seen_by(0.3)
    assert torch.equal(text, expected[0])
    assert torch.equal(mask, expected[1])
    assert torch.equal(seen_by(0.0)[0], FEATURES(CAPTIONS)[0])


def test_images_have_captions_of_their_own_and_are_dropped_with_their_clip():
    captions = [[caption, "up", "red"] for caption in CAPTIONS]
    full, part = seen_by(0.0, captions, images=2), seen_by(0.3, captions, images=2)
    assert torch.equal(full[0][:, 1], FEATURES(["up"] * 6)[0])
    empty = FEATURES([""])[0][0]
    gone = [bool((row == empty).all()) for row in part[0]]
    assert 0 < sum(gone) < 6
    assert all(
        torch.equal(now, before)
        for now, before, dropped in zip(part[0], full[0], gone, strict=True)
        if not dropped
    )


@pytest.mark.parametrize("given", [None, torch.zeros(6, dtype=torch.int64)])
def test_labels_instead_of_captions_are_refused(given):
    with pytest.raises(InputError, match="the data have no captions"):
        backward(task(), 5, range(6), VIDEO, given)


def test_the_caption_changes_the_gradient():
    one, other = gradient(task(), dropout=0.0), gradient(task(), dropout=0.0, captions=CAPTIONS[::-1])
    assert (one[1] - other[1]).abs().max() > 1e-4
