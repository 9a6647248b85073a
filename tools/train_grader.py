# SPDX-License-Identifier: Apache-2.0
"""Train the grader of the procedural world: ``python -m tools.train_grader OUT.safetensors``.

Clips are rendered once; every step takes a batch, mirrors and reverses some of it (directions follow), and
adds blur, noise and frames of the class "other": no subject, two clips blended, a subject shown twice. The
state is kept in OUT.state, so a stopped run resumes. Axes: b batch, t frames, h height, w width, c channels.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from latte.data.world.grading import (
    BACKGROUND_NAMES,
    COLOUR_NAMES,
    DIRECTION_NAMES,
    KIND_NAMES,
    GraderNetwork,
    grade,
    largest_step,
    size_spread,
    to_input,
)
from latte.data.world.kinds import KINDS
from latte.data.world.scenes import Scene, render, sample_scene
from latte.runtime import generator

TRAIN_SEED, BOUND_SEED, TEST_SEED = 5_000_000, 5_100_000, 5_200_000  # no recipe samples these scenes
FRAMES = 16
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "none": "none"}
QUANTILE = 0.999  # of true clips that the bounds of size and step let pass


@dataclass(frozen=True)
class Labels:
    """Ground truth per clip as indices (b), and the size with its mask (1 where the kind has one)."""

    kind: Tensor
    colour: Tensor
    background: Tensor
    direction: Tensor
    size: Tensor
    sized: Tensor


def render_pool(seed: int, num_clips: int) -> tuple[Tensor, list[Scene]]:
    """Render clips of 16 frames of 64 x 64 -> uint8 (b t 64 64 3) and their scenes."""
    scenes = [sample_scene(seed, index) for index in range(num_clips)]
    return torch.from_numpy(np.stack([render(scene, FRAMES, 64, 64) for scene in scenes])), scenes


def labels_of(scenes: list[Scene]) -> Labels:
    """Collect the ground truth of some scenes."""
    sizes = [KINDS[scene.kind].size for scene in scenes]
    values = [
        0.0 if place is None else scene.numbers[place] for scene, place in zip(scenes, sizes, strict=True)
    ]
    return Labels(
        kind=torch.tensor([KIND_NAMES.index(scene.kind) for scene in scenes]),
        colour=torch.tensor([COLOUR_NAMES.index(scene.colour) for scene in scenes]),
        background=torch.tensor([BACKGROUND_NAMES.index(scene.background) for scene in scenes]),
        direction=torch.tensor([DIRECTION_NAMES.index(scene.direction) for scene in scenes]),
        size=torch.tensor(values),
        sized=torch.tensor([float(place is not None) for place in sizes]),
    )


def sample_batch(pool: Tensor, scenes: list[Scene], batch: int, step: int) -> tuple[Tensor, Labels]:
    """Return the clips (b t 3 64 64) in [-1, 1] and labels of one step, a function of ``step``."""
    draws = generator("grader", step)
    picks = torch.randint(len(pool), (batch,), generator=draws).tolist()
    chosen = [scenes[pick] for pick in picks]
    clips = to_input(pool[picks].numpy())
    for row in range(batch):
        mirror, reverse = (torch.rand(2, generator=draws) < 0.5).tolist()
        if mirror:
            clips[row] = clips[row].flip(-1)
            if chosen[row].direction in ("left", "right"):
                chosen[row] = replace(chosen[row], direction=OPPOSITE[chosen[row].direction])
        if reverse:
            clips[row] = clips[row].flip(0)
            chosen[row] = replace(chosen[row], direction=OPPOSITE[chosen[row].direction])
    labels = labels_of(chosen)
    spoil(clips, labels, draws)
    return soften(clips, draws), labels


def spoil(clips: Tensor, labels: Labels, draws: torch.Generator) -> None:
    """Turn the first eighth of the batch into "other".

    It is blended with another clip, emptied, or its subject is shown twice.
    """
    count = len(clips) // 8
    for row in range(count):
        way = int(torch.randint(3, (1,), generator=draws))
        if way == 0:
            clips[row] = 0.5 * clips[row] + 0.5 * clips[count + row]
        elif way == 1:
            clips[row] = clips[row, :, :, :, :1]  # the left edge, repeated: sky and ground without a subject
        else:
            shift = int(torch.randint(18, 46, (1,), generator=draws))
            median = clips[row].median(0).values
            moved = clips[row].roll(shift, -1)
            subject = (moved - median.roll(shift, -1)).abs().amax(1, keepdim=True) > 0.25
            clips[row] = torch.where(subject, moved, clips[row])
            if float(subject.float().mean()) < 0.004:
                clips[row] = 0.5 * clips[row] + 0.5 * clips[count + row]
    labels.kind[:count] = KIND_NAMES.index("other")


def soften(clips: Tensor, draws: torch.Generator) -> Tensor:
    """Blur half of the clips a little and add noise, as decoded samples are softer than rendered clips."""
    blurred = functional.avg_pool2d(clips.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand(len(clips), 1, 1, 1, 1, generator=draws) * (
        torch.rand(len(clips), 1, 1, 1, 1, generator=draws) < 0.5
    )
    clips = clips + share * (blurred.view_as(clips) - clips)
    noise = 0.08 * torch.rand(len(clips), 1, 1, 1, 1, generator=draws)
    return clips + noise * torch.randn(clips.shape, generator=draws)


def loss_of(network: GraderNetwork, clips: Tensor, labels: Labels) -> Tensor:
    """Sum the cross-entropies of all answers and the squared error of the size; "other" clips count for the
    kind alone.
    """
    reading = network(clips)
    known = labels.kind != KIND_NAMES.index("other")
    frames = clips.shape[1]

    def per_frame(logits: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(frames))

    loss = per_frame(reading.kind, labels.kind)
    loss = loss + per_frame(reading.colour[known], labels.colour[known])
    loss = loss + per_frame(reading.background[known], labels.background[known])
    loss = loss + functional.cross_entropy(reading.direction[known], labels.direction[known])
    sized = labels.sized[known][:, None]
    return loss + 10 * (sized * (reading.size[known] - labels.size[known][:, None]) ** 2).mean()


@torch.no_grad()
def set_bounds(network: GraderNetwork, num_clips: int) -> None:
    """Measure how far size and step of true clips spread, and store the limits of each kind."""
    pool, scenes = render_pool(BOUND_SEED, num_clips)
    kinds = labels_of(scenes).kind
    steps = torch.from_numpy(largest_step(pool.numpy()))
    spread = torch.cat([size_spread(network(to_input(part.numpy())).size) for part in pool.split(32)])
    for place, kind in enumerate(KINDS.values()):
        here = kinds == place
        network.size_bound[place] = 1.25 * spread[here].quantile(QUANTILE) if kind.size is not None else 2.0
        network.step_bound[place] = 1.25 * steps[here].quantile(QUANTILE) + 0.25


def accuracy(network: GraderNetwork, num_clips: int) -> dict[str, float]:
    """Grade fresh true clips: shares of right kinds, colours, directions, and of consistent clips."""
    pool, scenes = render_pool(TEST_SEED, num_clips)
    grades = [one for part in pool.split(32) for one in grade(part.numpy(), network)]
    pairs = list(zip(grades, scenes, strict=True))
    return {
        "kind": sum(g.kind == s.kind for g, s in pairs) / len(pairs),
        "colour": sum(g.colour == s.colour for g, s in pairs) / len(pairs),
        "direction": sum(g.direction == s.direction for g, s in pairs) / len(pairs),
        "consistent": sum(g.consistent for g, _ in pairs) / len(pairs),
    }


def main() -> None:
    """Train, set the bounds, print the accuracy on fresh clips as JSON, and write the weights in float16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--clips", type=int, default=3600)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    network = GraderNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.lr, weight_decay=1e-4)
    state, first = arguments.out.with_suffix(".state"), 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    pool, scenes = render_pool(TRAIN_SEED, arguments.clips)
    for step in range(first, arguments.steps):
        progress = step / arguments.steps
        optimizer.param_groups[0]["lr"] = arguments.lr * min(1.0, (step + 1) / 50) * (1 - progress)
        loss = loss_of(network, *sample_batch(pool, scenes, arguments.batch, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)
            torch.save(
                {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
                state,
            )
    network.eval()
    set_bounds(network, 200 * len(KINDS))
    for tensor in network.state_dict().values():
        tensor.copy_(tensor.half().float())
    print(json.dumps(accuracy(network, 100 * len(KINDS))))
    save_file(
        {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, arguments.out
    )


if __name__ == "__main__":
    main()
