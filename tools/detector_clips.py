# SPDX-License-Identifier: Apache-2.0
"""The training data of the built-in detector: procedural clips, three of five corrupted, each with labels of
its content.

Every label is known exactly from the scene and the corruption: direction, shape and colour, speed, size and
position, path length, which fraction of the steps is zero or wrong, and the blur, noise and hue shift of the
frames. A clip occurs at two speeds, backwards and mirrored, each with the labels that it then has.
Axes: b clips, t frames, c channels, h height, w width.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from latte.data.procedural import COLOURS, DIRECTIONS, SHAPES, Scene, draw_scene, render
from latte.evaluation.networks.builtin import SIZE
from latte.runtime import generator
from tools import corruptions

POOL_FRAMES = 16
STRENGTHS = {"shuffled": 1.0, "frozen": 1.0, "hue": 90.0, "blur": 4.5, "noise": 72.0}  # maximum of each kind
UNKNOWN = -100.0  # a class that the clip does not show; measures that it does not show are NaN
Pool = tuple[Tensor, list[Scene]]  # uint8 (b t h w c) and their scenes


def draw_pool(seed: int, num_clips: int) -> Pool:
    """Return ``num_clips`` scenes of 16 frames; four of every eight are slower than in any data set."""
    slower = torch.rand(num_clips, generator=generator(seed, "slower")).tolist()
    scenes = [draw_scene(seed, index, POOL_FRAMES) for index in range(num_clips)]
    scenes = [
        replace(scene, speed=scene.speed * slower[i]) if i // 4 % 2 else scene
        for i, scene in enumerate(scenes)
    ]
    clips = torch.empty(num_clips, POOL_FRAMES, SIZE, SIZE, 3, dtype=torch.uint8)
    for clip, scene in zip(clips, scenes, strict=True):
        clip.copy_(torch.from_numpy(render(scene, POOL_FRAMES, SIZE, SIZE)))
    return clips, scenes


def procedural_clips(seed: int, num_clips: int, frames: int) -> tuple[Tensor, Tensor]:
    """Return ``num_clips`` procedural clips, uint8 (b t h w c), and their labels (b 16)."""
    scenes = [draw_scene(seed, index, frames) for index in range(num_clips)]
    clips = torch.stack([torch.from_numpy(render(scene, frames, SIZE, SIZE)) for scene in scenes])
    return clips, torch.stack([labels_of(scene, torch.arange(frames)) for scene in scenes])


def draw_corruptions(random: torch.Generator) -> dict[str, float]:
    """Return {kind: strength}: no kind (two of five), one (two of five) or two (one of five); most strengths
    are small.
    """
    count = (0, 0, 1, 1, 2)[int(torch.randint(5, (), generator=random))]
    kinds = torch.randperm(len(STRENGTHS), generator=random)[:count].tolist()
    return {
        name: STRENGTHS[name] * float(torch.rand((), generator=random)) ** 1.5
        for i, name in enumerate(STRENGTHS)
        if i in kinds
    }


def show(
    clip: Tensor,
    scene: Scene,
    order: Tensor,
    mirrored: bool,
    strengths: dict[str, float],
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return the frames ``order`` (t,) of a scene's ``clip``, mirrored and corrupted, uint8 (t h w c), and
    labels (16,).

    ``order`` counts up or down in even steps; labels are class numbers, then ``MEASURES`` scaled to about
    unit range.
    """
    usual = int(order[1] - order[0])
    order = order[corruptions.shuffled_order(len(order), strengths.get("shuffled", 0.0), random)]
    order = order[corruptions.frozen_order(len(order), strengths.get("frozen", 0.0))]
    clip, degrees = (
        clip[order],
        strengths.get("hue", 0.0) * (1 if torch.rand((), generator=random) < 0.5 else -1),
    )
    if mirrored:
        clip = clip.flip(2)
    if degrees:
        clip = corruptions.shift_hue(clip, degrees, random)
    clip = corruptions.blur(clip, strengths.get("blur", 0.0), random)
    clip = corruptions.noise(clip, strengths["noise"], random) if "noise" in strengths else clip
    return clip, labels_of(
        scene, order, usual, mirrored, degrees, strengths.get("blur", 0.0), strengths.get("noise", 0.0)
    )


def labels_of(
    scene: Scene,
    order: Tensor,
    usual: int = 1,
    mirrored: bool = False,
    degrees: float = 0.0,
    blur: float = 0.0,
    noise: float = 0.0,
) -> Tensor:
    """Return the labels (16,), as ``OUTPUTS``, of the frames ``order`` of ``scene``, whose regular step is
    ``usual``.

    Class numbers first, then the measures, shifted and scaled to about unit range; pixels and grey levels are
    logarithmic.
    """
    step = order.diff()
    frozen = (step == 0).float().mean().item()
    erratic = ((step != 0) & (step != usual)).float().mean().item()
    steady = erratic == 0 and frozen <= 0.8
    way = torch.tensor(DIRECTIONS[scene.direction])
    centre = torch.tensor(scene.start) + way * (scene.speed * order.float().mean())
    if mirrored:
        way, centre = way * torch.tensor([-1.0, 1.0]), torch.stack([1 - centre[0], centre[1]])
    ways = [tuple(pair) for pair in DIRECTIONS.values()]
    direction = ways.index(tuple((way * math.copysign(1, usual)).tolist())) if steady else UNKNOWN
    colour = list(COLOURS).index(scene.colour) if abs(degrees) < 5 else UNKNOWN
    shown = (
        corruptions.hue_matrix(degrees) @ torch.tensor(COLOURS[scene.colour], dtype=torch.float32)
    ).clamp(0, 255) / 127.5 - 1
    speed = (scene.speed * abs(usual) - 0.035) / 0.02 if steady else math.nan
    path = math.log2(1 + scene.speed * step.abs().float().mean().item() / 0.02)
    measures = [
        speed,
        (scene.size - 0.155) / 0.015,
        *((centre - 0.5) / 0.2).tolist(),
        *shown.tolist(),
        path,
        2 * frozen,
        2 * erratic,
        math.log2(1 + blur),
        math.log2(1 + noise / 8),
        abs(degrees) / 40 if scene.colour != "white" else 0.0,
    ]
    return torch.tensor([direction, SHAPES.index(scene.shape), colour, *measures])


def to_input(clips: Tensor) -> Tensor:
    """Return uint8 (b t h w c) as float (b c t h w) in [-1, 1], as the detector's ``Pixels`` do."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def draw_batch(pool: Pool, batch: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return the clips uint8 (b t h w c) and labels (b 16) of one step, a function of (seed, step).

    Steps alternate: ``batch`` clips of 8 frames, of 8 frames with stride 2, and half as many of 16 frames.
    """
    random = generator(seed, "detector", step)
    frames, stride, count = ((8, 1, batch), (8, 2, batch), (16, 1, max(batch // 2, 1)))[step % 3]
    found = []
    for pick in torch.randint(len(pool[0]), (count,), generator=random).tolist():
        start = int(torch.randint(POOL_FRAMES - (frames - 1) * stride, (), generator=random))
        order = start + stride * torch.arange(frames)
        backwards, mirrored = (torch.rand(2, generator=random) < 0.5).tolist()
        order = order.flip(0) if backwards else order
        found.append(show(pool[0][pick], pool[1][pick], order, mirrored, draw_corruptions(random), random))
    clips, labels = zip(*found, strict=True)
    return torch.stack(clips), torch.stack(labels)
