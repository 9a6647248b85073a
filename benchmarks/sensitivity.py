# SPDX-License-Identifier: Apache-2.0
"""Which damage a detector sees: python benchmarks/sensitivity.py [--detector builtin --clips 256 --frames 16].

Procedural clips are compared with other ones that were damaged, each kind of damage in growing strengths. A JSON line each: the Frechet
distance, its half-sample interval, and whether that lies wholly above the undamaged clips' interval. A last line per kind says whether the
distance rose at every step, and from which strength on it was above.
Axes: b clips, t frames, h w c height width channels.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from latte.data.procedural import draw_scene, render
from latte.evaluation.detectors import Detector, build_detector
from latte.evaluation.frechet import frechet_distance
from latte.evaluation.statistics import half_sample_interval
from latte.runtime import generator

REAL_SEED, FAKE_SEED = 9_100_000, 9_200_000  # scenes that neither a recipe nor the detector's training draws
SIZE = 64


def draw_clips(seed: int, count: int, frames: int, speed: float = 1.0) -> Tensor:
    """``count`` procedural clips, moving ``speed`` times as fast: uint8 (b t h w c)."""
    scenes = [draw_scene(seed, index, frames) for index in range(count)]
    return torch.stack([torch.from_numpy(render(replace(s, speed=s.speed * speed), frames, SIZE, SIZE)) for s in scenes])


def to_bytes(x: Tensor) -> Tensor:
    """float -> uint8, rounded and clamped."""
    return x.round().clamp(0, 255).to(torch.uint8)


def blur(clip: Tensor, sigma: float, _: torch.Generator) -> Tensor:
    """Gaussian blur of ``sigma`` pixels, edges repeated: (t h w c) -> the same."""
    if sigma == 0:
        return clip
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum())[None, None]
    x = clip.permute(0, 3, 1, 2).float().flatten(0, 1)[:, None]
    x = F.pad(x, [reach] * 4, mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel[:, :, None]), kernel[..., None])
    return to_bytes(x.unflatten(0, (len(clip), 3))[:, :, 0].permute(0, 2, 3, 1))


def noise(clip: Tensor, std: float, draw: torch.Generator) -> Tensor:
    """Gaussian noise of ``std`` grey levels, other in each frame."""
    return to_bytes(clip.float() + std * torch.randn(clip.shape, generator=draw))


def shuffle(clip: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """``share`` of the frames, drawn at random, change places in a circle."""
    places = torch.randperm(len(clip), generator=draw)[: round(share * len(clip))]
    order = torch.arange(len(clip))
    order[places] = places.roll(1)
    return clip[order]


def freeze(clip: Tensor, share: float, _: torch.Generator) -> Tensor:
    """The last ``share`` of the frames stand still."""
    last = len(clip) - 1
    return clip[torch.arange(len(clip)).clamp(max=max(last - round(share * last), 0))]


def turn_hue(clip: Tensor, degrees: float, _: torch.Generator) -> Tensor:
    """Colours turned about the grey axis by ``degrees``."""
    angle = math.radians(degrees)
    a, b = math.cos(angle), math.sin(angle) / math.sqrt(3)
    same, other = a + (1 - a) / 3, (1 - a) / 3
    matrix = torch.tensor([[same, other - b, other + b], [other + b, same, other - b], [other - b, other + b, same]])
    return to_bytes(clip.float() @ matrix.T)


Damage = Callable[[Tensor, float, torch.Generator], Tensor]
DAMAGES: dict[str, tuple[Damage | None, str, tuple[float, ...]]] = {
    "blur": (blur, "sigma, pixels", (0, 1, 2, 3, 4)),
    "noise": (noise, "std, grey levels", (0, 8, 16, 32, 64)),
    "shuffled": (shuffle, "share of frames", (0, 0.25, 0.5, 0.75, 1)),
    "frozen": (freeze, "share of frames", (0, 0.25, 0.5, 0.75, 1)),
    "speed": (None, "factor", (1, 0.85, 0.7, 0.5, 0.25)),
    "hue": (turn_hue, "degrees", (0, 10, 20, 40, 80)),
}


def damaged(name: str, strength: float, count: int, frames: int) -> Tensor:
    """The fake side: the same ``count`` scenes for every kind and strength, uint8 (b t h w c)."""
    damage = DAMAGES[name][0]
    if damage is None:
        return draw_clips(FAKE_SEED, count, frames, strength)
    clips = draw_clips(FAKE_SEED, count, frames)
    return torch.stack([damage(clip, strength, generator("sensitivity", name, index)) for index, clip in enumerate(clips)])


def measure_kind(name: str, detector: Detector, real: Tensor, clean: Tensor, frames: int, shared: dict) -> dict:
    """Print a line per strength of damage ``name`` and the summary, which is returned; ``real`` and ``clean`` are banks (n k)."""
    _, unit, strengths = DAMAGES[name]
    found, began = [], time.perf_counter()
    for i, strength in enumerate(strengths):
        bank = detector(damaged(name, strength, len(clean), frames)) if i else clean
        found.append(half_sample_interval(frechet_distance, real, bank))
        line = {"what": f"sensitivity {name}", "strength": strength, "unit": unit, "above": found[-1].low > found[0].high}
        line |= {key: round(getattr(found[-1], key), 4) for key in ("value", "low", "high")}
        print(json.dumps(line | shared), flush=True)
    above = [interval.low > found[0].high for interval in found]
    summary: dict = {"what": f"sensitivity {name} summary", "unit": unit}
    summary["rises"] = all(a.value < b.value for a, b in pairwise(found))
    summary["above_from"] = next((strengths[i] for i in range(len(found)) if all(above[i:])), None)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(summary | shared), flush=True)
    return summary


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Print a JSON line per kind and strength, and one per kind; returns the latter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--detector", default="builtin")
    parser.add_argument("--clips", type=int, default=256, help="a side; the protocol's number")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--kinds", nargs="*", default=list(DAMAGES), choices=list(DAMAGES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    detector = build_detector(options.detector)
    real, clean = (detector(draw_clips(seed, options.clips, options.frames)) for seed in (REAL_SEED, FAKE_SEED))
    shared = {"detector": options.detector, "tensors_sha256": detector.tensors_sha256[:16], "clips": options.clips}
    shared |= {"frames": options.frames, "commit": measure.commit(), "machine": measure.machine(torch.device("cpu"))}
    return [measure_kind(name, detector, real, clean, options.frames, shared) for name in options.kinds]


if __name__ == "__main__":
    main()
