# SPDX-License-Identifier: Apache-2.0
"""Clips longer than the model's: python benchmarks/longer.py [MODEL] [--times 2 4] [--methods plain
freenoise].

One JSON line per length and method, and one for real clips of that length (procedural ones, or with
``--videos`` those of a folder that are long enough). ``plain`` runs the model on more frames than it was
trained with. Measured in pixels: seams, motion, whether the scene stays the same, and drift, from the clip's
first part of the model's length to its last.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from given import add_arguments, condition_of, load, procedural, steps, videos
from numpy import ndarray

from latte.data.procedural import draw_scene, read_motion
from latte.data.writers import contact_sheet
from latte.diffusion.long_video import LONG_VIDEO_METHODS
from latte.inference.pipeline import VideoPipeline

METHODS = ("plain", *LONG_VIDEO_METHODS)


def continuity(clip: ndarray, length: int) -> dict[str, float]:
    """Of a clip (t h w c), pieces of ``length`` frames: ``step`` is the median of its steps in grey levels,
    ``seam`` the largest over it.

    From the first piece to the last: ``motion`` compares their mean steps, ``detail`` their mean differences
    of neighbouring pixels and ``contrast`` their standard deviations, as ratios; ``level`` is the change of
    the mean, in grey levels. ``away`` is how far the last frame is from the first, mean absolute difference.
    """
    own, first, last = steps(clip), clip[:length].astype(np.float64), clip[-length:].astype(np.float64)
    sharp = [np.abs(np.diff(piece, axis=2)).mean() for piece in (first, last)]
    return {
        "step": float(np.median(own)),
        "seam": float(own.max() / max(np.median(own), 1e-6)),
        "motion": float(own[1 - length :].mean() / max(own[: length - 1].mean(), 1e-6)),
        "detail": float(sharp[1] / max(sharp[0], 1e-6)),
        "contrast": float(last.std() / max(first.std(), 1e-6)),
        "level": float(abs(last.mean() - first.mean())),
        "away": float(np.abs(last[-1] - first[0]).mean()),
    }


def sameness(clip: ndarray, length: int) -> dict[str, bool]:
    """Is there one compact shape in every frame, and has every piece of ``length`` frames the colour and
    the shape of the first?
    """
    pieces = [read_motion(clip[start : start + length]) for start in range(0, len(clip) - length + 1, length)]
    kept = {part: len({getattr(piece, part) for piece in pieces}) == 1 for part in ("colour", "shape")}
    whole = all(piece.coherent for piece in pieces)
    return {
        "one_shape": whole,
        "same_colour": whole and kept["colour"],
        "same_shape": whole and kept["shape"],
        "same": whole and all(kept.values()),
    }


def judge(clips: Iterable[ndarray], length: int, shapes: bool) -> dict[str, Any]:
    """Medians over clips (t h w c) of ``continuity``, with ``shapes`` shares of ``sameness``, and how many
    there are.
    """
    clips = list(clips)
    rows = [continuity(clip, length) for clip in clips]
    found: dict[str, Any] = {"clips": len(clips)} | {
        key: round(median(row[key] for row in rows), 3) for key in rows[0]
    }
    if shapes:
        kept = [sameness(clip, length) for clip in clips]
        found |= {key: round(mean(row[key] for row in kept), 3) for key in kept[0]}
    return found


def generate(trained: VideoPipeline, method: str, frames: int, options: argparse.Namespace) -> list[ndarray]:
    """Return ``options.count`` clips of ``frames`` frames by ``method``, with the labels or captions of
    procedural scenes where the model has any.
    """
    how: dict[str, Any] = {"frames": frames}
    if method != "plain":
        how |= {"window": trained.model.config.num_frames, "longer": method, "overlap": options.overlap}
    if options.strength is not None:
        how["conditioning_strength"] = options.strength
    conditions: dict[str, list] = {}
    for index in range(options.count):
        scene = None if options.videos else draw_scene(options.seed, index, frames)
        for key, value in condition_of(trained, scene, not options.no_labels).items():
            conditions.setdefault(key, []).extend(value)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*more than the .* the model was trained on"
        )  # that is what plain is about
        return [
            clip
            for _, clip in trained.generate(
                range(options.seed, options.seed + options.count), **conditions, **how
            )
        ]


def real(trained: VideoPipeline, frames: int, options: argparse.Namespace) -> list[ndarray]:
    """Return real clips of ``frames`` frames (t h w c); none when the videos are shorter."""
    if options.videos:
        return [clip for clip, _ in videos(trained, options.videos, frames)]
    return [clip for clip, _ in procedural(trained, options.count, options.seed, frames)]


def arguments() -> argparse.ArgumentParser:
    """Return the parser of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser, 400_000)
    parser.add_argument(
        "--times", nargs="+", type=int, default=[2], help="lengths, as multiples of the model's latent frames"
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--overlap",
        type=int,
        help="latent frames that neighbouring windows share; each method's own by default",
    )
    parser.add_argument("--strength", type=float, help="guidance strength of conditioning frames in chains")
    parser.add_argument("--sheets", type=Path, help="folder for a contact sheet per line")
    return parser


def main(words: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print one JSON line per length and method."""
    options = arguments().parse_args(words)
    trained, lines = load(options), []
    length = trained.codec.frames(trained.model.config.num_frames)
    settings = {
        "overlap": options.overlap,
        "strength": options.strength,
        "labels": not options.no_labels,
        "seed": options.seed,
    }
    settings |= {
        "sampler": trained.sample.sampler,
        "steps": trained.sample.steps,
        "guidance": trained.sample.guidance,
    }
    for times in options.times:
        frames = trained.codec.frames(trained.model.config.num_frames * times)
        variants: dict[str, Callable[[], list[ndarray]]] = {
            "real": lambda frames=frames: real(trained, frames, options)
        }
        for method in options.methods:
            variants[method] = lambda frames=frames, method=method: generate(trained, method, frames, options)
        for name, variant in variants.items():
            began, clips = time.perf_counter(), variant()
            if not clips:
                continue
            line = {
                "what": "longer clips",
                "model": trained.name,
                "method": name,
                "frames": frames,
                "window": length,
            }
            line |= {} if name == "real" else settings
            line |= judge(clips, length, not options.videos)
            lines.append(
                line | {"weights_sha256": trained.weights, "seconds": round(time.perf_counter() - began, 1)}
            )
            print(json.dumps(lines[-1]), flush=True)
            if options.sheets:
                options.sheets.mkdir(parents=True, exist_ok=True)
                contact_sheet([clip[:: max(frames // 16, 1)] for clip in clips[:8]], scale=1).save(
                    options.sheets / f"{name}-{frames}.png"
                )
    return lines


if __name__ == "__main__":
    main()
