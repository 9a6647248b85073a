# SPDX-License-Identifier: Apache-2.0
"""Which corruptions a detector detects: python benchmarks/sensitivity.py [--detector builtin --clips 256].

Procedural clips (or, with --videos, one half of a folder) are compared with others that were corrupted, each
kind in increasing strengths. A JSON line each: the Frechet distance, its half-sample interval, and whether
that is entirely above the interval of clean clips. A last line per kind: whether the distance increased at
every step, and from which strength on it was above.
Axes: b clips, t frames, h w c height width channels.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import measure
import torch
from torch import Tensor

from latte.data.media import VIDEO_SUFFIXES, read_frames
from latte.data.procedural import draw_scene, render
from latte.evaluation.detectors import Detector, build_detector
from latte.evaluation.frechet import frechet_distance
from latte.evaluation.scores import half_sample_interval
from latte.runtime import generator
from tools import corruptions

REAL_SEED, FAKE_SEED = 9_100_000, 9_200_000  # scenes that no recipe and no detector training uses
SIZE = 64


def render_clips(seed: int, count: int, frames: int, speed: float = 1.0) -> Tensor:
    """Return ``count`` procedural clips, ``speed`` times as fast: uint8 (b t h w c)."""
    scenes = [draw_scene(seed, index, frames) for index in range(count)]
    return torch.stack(
        [torch.from_numpy(render(replace(s, speed=s.speed * speed), frames, SIZE, SIZE)) for s in scenes]
    )


def read_clips(folder: Path, frames: int) -> tuple[Tensor, Tensor]:
    """Return the first ``frames`` frames of the videos in ``folder``, alternating between two sides: uint8 (b
    t h w c).
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    clips = [torch.from_numpy(read_frames(path, range(frames))) for path in paths]
    half = len(clips) // 2
    return torch.stack(clips[: 2 * half : 2]), torch.stack(clips[1 : 2 * half : 2])


CHANGES = {
    "blur": corruptions.blur,
    "noise": corruptions.noise,
    "shuffled": corruptions.shuffle,
    "frozen": corruptions.freeze,
    "hue": corruptions.shift_hue,
    "dimmed": corruptions.dim,
    "jpeg": corruptions.compress,
}
CORRUPTIONS = {  # unit and strengths
    "blur": ("sigma, pixels", (0, 1, 2, 3, 4)),
    "noise": ("std, grey levels", (0, 8, 16, 32, 64)),
    "shuffled": ("share of frames", (0, 0.25, 0.5, 0.75, 1)),
    "frozen": ("share of frames", (0, 0.25, 0.5, 0.75, 1)),
    "speed": ("factor", (1, 0.85, 0.7, 0.5, 0.25)),
    "hue": ("degrees", (0, 10, 20, 40, 80)),
    "dimmed": (
        "share of light",
        (0, 0.05, 0.1, 0.2, 0.4),
    ),  # this and the following were not in the training of the built-in detector
    "jpeg": ("100 - quality", (0, 10, 30, 60, 90)),
    "repeated": ("share of clips", (0, 0.25, 0.5, 0.75, 0.95)),
}


def corrupt(name: str, strength: float, clean: Tensor) -> Tensor:
    """Return ``clean`` (b t h w c) corrupted; the random choices are the same for every strength."""
    if name == "speed":
        return render_clips(FAKE_SEED, len(clean), clean.shape[1], strength)
    if name == "repeated":  # a fraction of the clips is repeated, as by a model with mode collapse
        return clean[torch.arange(len(clean)) % max(round((1 - strength) * len(clean)), 1)]
    change = CHANGES[name]
    return torch.stack(
        [change(clip, strength, generator("sensitivity", name, index)) for index, clip in enumerate(clean)]
    )


def measure_kind(
    name: str, detector: Detector, real: Tensor, clips: Tensor, clean: Tensor, shared: dict
) -> dict:
    """Print a line per strength of ``name`` on ``clips``, and a summary, which is returned; ``real``,
    ``clean`` (n k).
    """
    unit, strengths = CORRUPTIONS[name]
    found = []
    began = time.perf_counter()
    for i, strength in enumerate(strengths):
        features = detector(corrupt(name, strength, clips)) if i else clean
        found.append(half_sample_interval(frechet_distance, real, features))
        line = {
            "what": f"sensitivity {name}",
            "strength": strength,
            "unit": unit,
            "above": found[-1].low > found[0].high,
        }
        line |= {key: round(getattr(found[-1], key), 4) for key in ("value", "low", "high")}
        print(json.dumps(line | shared), flush=True)
    above = [interval.low > found[0].high for interval in found]
    summary: dict = {"what": f"sensitivity {name} summary", "unit": unit}
    summary["rises"] = all(a.value < b.value for a, b in pairwise(found))
    summary["above_from"] = next((strengths[i] for i in range(len(found)) if all(above[i:])), None)
    summary |= {"seconds": round(time.perf_counter() - began, 1), **shared}
    print(json.dumps(summary), flush=True)
    return summary


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Print a JSON line per kind and strength, and one per kind, which are returned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--detector", default="builtin")
    parser.add_argument("--clips", type=int, default=256, help="per side; default: the protocol's number")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument(
        "--videos", type=Path, help="a folder of videos of one size, halved, instead of procedural clips"
    )
    parser.add_argument("--kinds", nargs="*", choices=list(CORRUPTIONS))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    detector = build_detector(options.detector)
    kinds = options.kinds or [name for name in CORRUPTIONS if name != "speed" or not options.videos]
    if options.videos and "speed" in kinds:
        parser.error("the speed of videos cannot be changed; remove speed from --kinds")
    if options.videos:
        sides = read_clips(options.videos, options.frames)
    else:
        sides = tuple(render_clips(seed, options.clips, options.frames) for seed in (REAL_SEED, FAKE_SEED))
    real, clean = (detector(clips) for clips in sides)
    shared = {
        "clips_of": options.videos.name if options.videos else "procedural",
        "clips": len(clean),
        "frames": options.frames,
    }
    shared |= {"detector": options.detector, "tensors_sha256": detector.tensors_sha256[:16]}
    shared |= {"commit": measure.commit(), "machine": measure.machine(torch.device("cpu"))}
    return [measure_kind(name, detector, real, sides[1], clean, shared) for name in kinds]


if __name__ == "__main__":
    main()
