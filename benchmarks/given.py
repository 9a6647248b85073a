# SPDX-License-Identifier: Apache-2.0
"""Conditioning frames: python benchmarks/given.py [MODEL] [--given first both middle] [--strengths 0 40].

New procedural clips, or with ``--videos`` those of a folder, are generated again from their first frame,
their first and last, or their middle one, at several guidance strengths; one JSON line each. Measured in
pixels: are the conditioning frames reproduced, do the other frames agree with them, is there a jump beside
them. Strength 0 is replacement alone.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from latte.checks import check
from latte.data.clips import centre_crop_resize, to_float, to_uint8
from latte.data.media import VIDEO_SUFFIXES, probe, read_frames
from latte.data.procedural import Scene, draw_scene, read_motion, render
from latte.diffusion.frame_conditioning import DEFAULT_STRENGTH
from latte.inference.pipeline import VideoPipeline

GIVEN = {
    "first": lambda frames: [0],
    "both": lambda frames: [0, frames - 1],
    "middle": lambda frames: [frames // 2],
}
Clip = tuple[ndarray, Scene | None]


def add_arguments(parser: argparse.ArgumentParser, seed: int) -> None:
    """Add the options that this benchmark and ``longer`` share."""
    parser.add_argument("model", nargs="?", default="builtin-shapes")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument(
        "--seed",
        type=int,
        default=seed,
        help="of the scenes and of the clips drawn, beyond all that was trained on",
    )
    parser.add_argument(
        "--videos",
        type=Path,
        help="a folder of real clips instead of procedural ones; nothing is read as a shape then",
    )
    parser.add_argument("--codec-path", help="where the autoencoder's weights are")
    parser.add_argument("--no-labels", action="store_true", help="generate without labels")
    parser.add_argument("--sampler", help="default: the model's own")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--threads", type=int, default=1)


def load(options: argparse.Namespace) -> VideoPipeline:
    """Return the model of the options, with their sampler."""
    torch.set_num_threads(options.threads)
    trained = VideoPipeline.from_pretrained(
        options.model, device="cpu", codec_path=options.codec_path, dtype="fp32"
    )
    chosen = {key: value for key in ("sampler", "steps") if (value := getattr(options, key)) is not None}
    return replace(trained, sample=replace(trained.sample, **chosen)) if chosen else trained


def procedural(trained: VideoPipeline, count: int, seed: int, frames: int) -> list[Clip]:
    """Return ``count`` unseen clips, uint8 (t h w c), and their scenes."""
    scenes = [draw_scene(seed, index, frames) for index in range(count)]
    return [(render(scene, frames, *trained.frame_size()), scene) for scene in scenes]


def videos(trained: VideoPipeline, folder: Path, frames: int, count: int | None = None) -> list[Clip]:
    """Return the first ``frames`` frames of ``count`` videos in ``folder`` that have as many, uint8 (t h w
    c), cropped to the model's size.
    """
    found = (probe(path) for path in sorted(folder.rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES)
    long = [info for info in found if info.frames >= frames][:count]
    return [
        (centre_crop_resize(read_frames(info, range(frames)), *trained.frame_size()), None) for info in long
    ]


def condition_of(trained: VideoPipeline, scene: Scene | None, label: bool = True) -> dict[str, Any]:
    """Return the condition of a scene: its caption, its label, or nothing."""
    if trained.reader:
        return {"prompts": [scene.caption if scene else ""]}
    return {"labels": [scene.direction]} if scene and label and trained.classes else {}


def alone(trained: VideoPipeline, picture: ndarray) -> ndarray:
    """Return one frame, uint8 (h w c), after the codec encoded and decoded it as an image."""
    with torch.no_grad():
        return to_uint8(trained.codec.decode(trained.codec.encode(to_float(picture[None])[None])))[0, 0]


def steps(clip: ndarray) -> ndarray:
    """Return the mean absolute difference of adjacent frames of uint8 (t h w c) in grey levels, (t-1,)."""
    return np.abs(np.diff(clip.astype(np.float64), axis=0)).mean((1, 2, 3))


def grade(clip: ndarray, scene: Scene, given: Sequence[int]) -> dict[str, float]:
    """Return whether a clip (t h w c) shows the scene, apart from the conditioning frames, as one shape
    throughout, and whether it moves in its direction.
    """
    whole, beside = read_motion(clip), read_motion(np.delete(clip, given, axis=0))
    right = {part: getattr(beside, part) == getattr(scene, part) for part in ("colour", "shape")} | {
        "coherent": whole.coherent
    }
    return {**right, "all": all(right.values()), "direction": whole.direction == scene.direction}


def compare(clip: ndarray, true: ndarray, decoded: ndarray, given: Sequence[int]) -> dict[str, float]:
    """Compare a clip with the true one, each (t h w c); ``decoded``: true conditioning frames through the
    codec, each as an image.

    ``worst`` and ``error`` are the largest and the mean squared difference of a conditioning frame from
    ``decoded`` in grey levels. ``step`` is the mean step between a conditioning frame and its neighbours,
    ``step_true`` the same of the true clip, ``step_beside`` the mean of the other steps. ``contrast`` is the
    mean standard deviation of the other frames relative to the conditioning frames.
    """
    off = clip[list(given)].astype(np.float64) - decoded
    at = sorted({step for frame in given for step in (frame - 1, frame) if 0 <= step < len(clip) - 1})
    own = steps(clip)
    return {
        "worst": float(np.abs(off).max()),
        "error": float((off**2).mean()),
        "step": own[at].mean(),
        "step_true": steps(true)[at].mean(),
        "step_beside": np.delete(own, at).mean(),
        "contrast": np.delete(clip, given, axis=0).std((1, 2, 3)).mean()
        / max(clip[list(given)].std((1, 2, 3)).mean(), 1e-6),
    }


def measure(
    trained: VideoPipeline, clips: Sequence[Clip], which: str, strength: float, seed: int, label: bool = True
) -> dict[str, Any]:
    """Return means over ``clips`` of ``grade`` and ``compare``, generated from frames GIVEN[which] with
    ``strength``.

    ``psnr`` is that of all conditioning frames, in dB, None when they are equal.
    """
    began, rows = time.perf_counter(), []
    for index, (true, scene) in enumerate(clips):
        given = GIVEN[which](len(true))
        pictures = {frame: true[frame] for frame in given}
        options = {
            **condition_of(trained, scene, label),
            "conditioning_frames": pictures,
            "conditioning_strength": strength,
            "frames": len(true),
        }
        ((_, clip),) = trained.generate([seed + index], **options)
        decoded = np.stack([alone(trained, true[frame]) for frame in given])
        rows.append(compare(clip, true, decoded, given) | (grade(clip, scene, given) if scene else {}))
    means = {key: float(mean(float(row[key]) for row in rows)) for key in rows[0]}
    error = means.pop("error")
    means |= {
        "worst": max(row["worst"] for row in rows),
        "psnr": 10 * math.log10(255**2 / error) if error else None,
    }
    return {
        "what": "conditioning frames",
        **{
            "model": trained.name,
            "given": which,
            "strength": strength,
            "labels": label,
            "clips": len(rows),
            "seed": seed,
        },
        **{
            "sampler": trained.sample.sampler,
            "steps": trained.sample.steps,
            "guidance": trained.sample.guidance,
        },
        **{key: value if value is None else round(value, 3) for key, value in means.items()},
        **{"weights_sha256": trained.weights, "seconds": round(time.perf_counter() - began, 1)},
    }


def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print one JSON line per choice of frames and strength."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, 300_000)
    parser.add_argument("--given", nargs="+", default=list(GIVEN), choices=GIVEN)
    parser.add_argument("--strengths", nargs="+", type=float, default=[0.0, DEFAULT_STRENGTH])
    options = parser.parse_args(words)
    trained, count, seed = load(options), options.count, options.seed
    frames = trained.codec.frames(trained.model.config.num_frames)
    clips = (
        videos(trained, options.videos, frames, count)
        if options.videos
        else procedural(trained, count, seed, frames)
    )
    check(
        bool(clips),
        f"--videos {options.videos} has no video of {frames} frames; give a folder of longer clips",
    )
    lines = []
    for which in options.given:
        for strength in options.strengths:
            lines.append(measure(trained, clips, which, strength, seed, not options.no_labels))
            print(json.dumps(lines[-1]), flush=True)
    return lines


if __name__ == "__main__":
    main()
