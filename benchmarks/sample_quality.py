# SPDX-License-Identifier: Apache-2.0
"""What a way of sampling costs and gives: python benchmarks/sample_quality.py [MODEL] --ways paper fast.

A way is a quality (``latte sample --quality``) or SAMPLER:STEPS[:GUIDANCE[:LOW,HIGH]], or ``own``: the
model's settings. For every seed the line has the evaluations of the model per clip, each guidance branch
counted, the Frechet distance by the built-in detector to ``--real`` real clips, label accuracy and
consistency; and the ratios to the first way, the mean over the seeds. The model is one of procedural shapes.
With ``--keep FOLDER`` clips are written there, and those that are there are not made again.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from latte.data.base import DataConfig
from latte.data.procedural import ShapeScenes, read_motion
from latte.evaluation.detectors import Detector, build_detector
from latte.evaluation.frechet import frechet_distance
from latte.inference.generate import SampleConfig, changed
from latte.inference.pipeline import VideoPipeline
from latte.inference.quality import QUALITIES

REAL_SEED = 9_300_000  # scenes that no recipe and no detector training uses
SEED_STEP = 100_000  # between the clips of two seeds
BATCH = 32


def settings_of(pipe: VideoPipeline, way: str) -> SampleConfig:
    """Return the settings that ``way`` names."""
    if way == "own" or way in QUALITIES:
        return pipe.settings(None if way == "own" else way)
    sampler, steps, *rest = way.split(":")
    interval = tuple(map(float, rest[1].split(","))) if len(rest) > 1 else None
    guidance = float(rest[0]) if rest else None
    return changed(
        pipe.sample, sampler=sampler, steps=int(steps), guidance=guidance, guidance_interval=interval
    )


def make_clips(
    pipe: VideoPipeline, way: str, seed: int, count: int, keep: Path | None
) -> tuple[np.ndarray, float]:
    """Return clips, uint8 (b t h w c), of classes in turn, and the evaluations of the model for each."""
    rows = 0

    def count_rows(_: Any, inputs: Any) -> None:
        nonlocal rows
        rows += len(inputs[0])

    parts = []
    total = 0
    hook = pipe.model.register_forward_pre_hook(count_rows)
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        place = (
            keep and keep / f"{way.replace(':', '_')}-{pipe.weights[:8]}-{seed}-{first}-{len(numbers)}.npz"
        )
        if place and place.exists():
            with np.load(place) as stored:
                clips = stored["clips"]
                rows = int(stored["rows"])
        else:
            rows = 0
            labels = [number % len(pipe.classes) for number in numbers]
            seeds = [SEED_STEP * seed + number for number in numbers]
            clips = np.stack(
                [
                    clip
                    for _, clip in pipe.generate(
                        seeds, labels, config=changed(settings_of(pipe, way), batch=BATCH)
                    )
                ]
            )
            if place:
                np.savez_compressed(place, clips=clips, rows=rows)
        parts.append(clips)
        total += rows
    hook.remove()
    return np.concatenate(parts), total / count


def grade(
    clips: np.ndarray, classes: Sequence[str], real: torch.Tensor, detector: Detector
) -> dict[str, Any]:
    """Return distance, label accuracy and consistency of ``clips``, whose classes take turns."""
    motions = [read_motion(clip) for clip in clips]
    right = [motion.direction == classes[index % len(classes)] for index, motion in enumerate(motions)]
    return {
        "distance": frechet_distance(real, detector(clips)),
        "label_accuracy": sum(right) / len(clips),
        "consistent": sum(motion.consistent for motion in motions) / len(clips),
    }


def mean_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of each value over the seeds, and the distance's smallest and largest."""
    means: dict[str, Any] = {key: statistics.fmean(run[key] for run in runs) for key in runs[0]}
    distances = [run["distance"] for run in runs]
    return means | {"distance_range": [min(distances), max(distances)]}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin-shapes")
    parser.add_argument("--ways", nargs="+", default=["paper", "high", "fast"])
    parser.add_argument("--count", type=int, default=128, help="clips per seed")
    parser.add_argument("--real", type=int, default=1024, help="real clips")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    pipe = VideoPipeline.from_pretrained(options.model, device="cpu", dtype="fp32")
    size = pipe.frame_size()
    data = DataConfig(kind="procedural", resolution=size, frames=pipe.num_frames, seed=REAL_SEED)
    scenes = ShapeScenes(data)
    detector = build_detector("builtin")
    real = detector(np.stack([scenes.render_clip(index) for index in range(options.real)]))
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    ways = {}
    for way in options.ways:
        runs = []
        for seed in options.seeds:
            clips, evaluations = make_clips(pipe, way, seed, options.count, options.keep)
            runs.append({"evaluations": evaluations, **grade(clips, pipe.classes, real, detector)})
        ways[way] = mean_of(runs)
    first = ways[options.ways[0]]
    for values in ways.values():
        values["times_fewer"] = first["evaluations"] / values["evaluations"]
        values["distance_ratio"] = values["distance"] / first["distance"]
    line = {"what": "sample_quality", **{key: value for key, value in vars(options).items() if key != "keep"}}
    line |= {"ways": ways, "weights_sha256": pipe.weights, "commit": measure.commit()}
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
