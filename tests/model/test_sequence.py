# SPDX-License-Identifier: Apache-2.0
"""Three processes that share a clip compute the output and the gradients of one, for numbers of frames,
tokens and heads that three does not divide.
"""

from typing import Any

import pytest
import torch
from support import wake

from latte.checks import InputError
from latte.distributed import process_group
from latte.inference.generate import SampleConfig
from latte.inference.pipeline import VideoPipeline
from latte.model.latte import Latte, ModelConfig
from latte.model.sequence import SequenceParallel, check_sequence, share_sequence
from latte.model.text import LatteText, TextConfig
from several import next_group, together
from tiny import tiny_trained

SIZES = {"depth": 2, "width": 32, "heads": 4, "num_frames": 5, "latent_size": 4, "latent_channels": 4}
TEXT = TextConfig(**SIZES, caption_channels=12)
OPTIONS = {"qk_norm": True, "value_residual": True, "mlp": "swiglu"}
CLASSES = ModelConfig(**SIZES, num_classes=3)
CASES: dict[str, tuple[Any, int]] = {  # configuration, images behind the clip
    "interleaved": (CLASSES, 0),
    "late fusion": (ModelConfig(**SIZES, variant=2, temporal_position="rotary"), 0),
    "sequential": (ModelConfig(**SIZES, variant=3, num_classes=3), 4),
    "parallel": (ModelConfig(**SIZES, variant=4, **OPTIONS), 0),
    "joint": (ModelConfig(**SIZES, variant="joint", num_classes=3), 4),
    "tubes": (ModelConfig(**{**SIZES, "num_frames": 10}, patch="compression", tube=2), 3),
    "all tokens": (ModelConfig(**SIZES, conditioning="all_tokens", num_classes=3), 0),
    "options": (ModelConfig(**SIZES, num_classes=3, **OPTIONS), 0),
    "text": (TEXT, 3),
    "text with options": (TextConfig(**SIZES, caption_channels=12, **OPTIONS), 0),
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"recompute": True, "gradient_checkpointing": True},
    "frame noise": {"frame_timesteps": True},
}


def computed(config: Any, images: int, mode: dict[str, Any], team: Any) -> list[torch.Tensor]:
    """Return the output and the gradient of every weight, of a fixed loss."""
    torch.manual_seed(0)
    kind = LatteText if isinstance(config, TextConfig) else Latte
    model: Any = wake(kind(config)).train()
    frames = config.num_frames + images
    condition = model.example_condition(2, images, 3)
    if "text" in condition:
        condition["text"] = torch.randn(condition["text"].shape)
        condition["mask"][:, ..., 2:] = False
    z = torch.randn(2, frames, 4, 4, 4)
    t = torch.tensor([3, 700])
    if mode.get("frame_timesteps") and not images and config.frames_per_token == 1:
        t = torch.randint(1000, (2, frames))
    weights = torch.randn(model(z, t, **condition, num_images=images).shape)
    model.recompute(mode.get("recompute", False))
    model.gradient_checkpointing = mode.get("gradient_checkpointing", False)
    share_sequence(model, team)
    output = model(z, t, **condition, num_images=images)
    (output * weights).sum().backward()
    gradients = [weight.grad if weight.grad is not None else 0 * weight for weight in model.parameters()]
    return [output.detach(), *gradients]


def all_cases(rank: int) -> dict[tuple[str, str], float]:
    """Return the largest difference of any case: of outputs, and of gradients summed over the processes."""
    found = {}
    with process_group(torch.device("cpu")) as group:
        team = group.teams(3)
        for name, (config, images) in CASES.items():
            for mode, settings in MODES.items():
                expected = computed(config, images, settings, None)
                output, *gradients = computed(config, images, settings, team)
                group.all_reduce(gradients)
                pairs = list(zip([output, *gradients], expected, strict=True))
                least = max(float(b.abs().max()) for _, b in pairs[1:]) / 1000  # that of key biases is 0
                found[name, mode] = max(
                    float((a - b).abs().max()) / max(float(b.abs().max()), least) for a, b in pairs
                )
    return found


def sampled(team: Any, pipe: VideoPipeline) -> torch.Tensor:
    """Return the latents (f c h w) of a clip at the end of sampling, in windows of 3 of its 5 frames too."""
    share_sequence(pipe.model, team)
    found: list[torch.Tensor] = []
    config = SampleConfig(sampler="ddim", steps=3, guidance=2.0)
    for frames, window in ((3, None), (5, 3)):
        more = {"estimates": found.append} if window is None else {"window": window}
        clips = list(pipe.generate([7], [1], config=config, frames=frames, **more))
        found.append(torch.from_numpy(clips[0][1]).float() / 255)
    return torch.cat([tensor.flatten() for tensor in found])


def sampled_both_ways(rank: int) -> float:
    """Return the largest difference of what three processes sample together from what one does."""
    with process_group(torch.device("cpu")) as group:
        pipe = tiny_trained()
        difference = sampled(group.teams(3), pipe) - sampled(None, pipe)
    return float(difference.abs().max())


def both(rank: int) -> tuple[dict[tuple[str, str], float], float]:
    found = all_cases(rank)
    next_group()
    return found, sampled_both_ways(rank)


@pytest.fixture(scope="module")
def answers() -> list[tuple[dict[tuple[str, str], float], float]]:
    return together(3, both)


@pytest.fixture(scope="module")
def differences(answers) -> list[dict[tuple[str, str], float]]:
    return [found for found, _ in answers]


def test_three_processes_sample_the_clip_of_one(answers):
    """Frames are uint8, so that rounding may move one by 1/255; latents are within 1e-5."""
    assert all(difference < 1e-5 for _, difference in answers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_three_processes_compute_what_one_does(differences, name, mode):
    for found in differences:
        assert found[name, mode] < 1e-4


def test_frames_tokens_and_heads_are_divided_as_evenly_as_possible():
    parts = [SequenceParallel(rank, 3, None).part(5) for rank in range(3)]
    assert [range(5)[part] for part in parts] == [range(2), range(2, 4), range(4, 5)]


@pytest.mark.parametrize(
    ("config", "size", "images", "message"),
    [
        (CLASSES, 6, 0, r"there are only 5 frames \(in tokens\); give a number from 1 to 4"),
        (CLASSES, 5, 0, "there are only 4 tokens of a frame; give a number from 1 to 4"),
        (CLASSES, 4, 2, "there are only 2 images behind each clip; give a number from 1 to 2"),
        (
            ModelConfig(**{**SIZES, "heads": 2}, variant="joint"),
            3,
            0,
            "only 2 heads; give a number from 1 to 2",
        ),
    ],
)
def test_more_processes_than_parts_are_refused(config, size, images, message):
    with pytest.raises(InputError, match=message):
        check_sequence(config, size, "train.sequence_parallel", images=images)
    check_sequence(CLASSES, 4, "train.sequence_parallel")
