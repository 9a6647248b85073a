# SPDX-License-Identifier: Apache-2.0
"""Label accuracy of a model of procedural clips: python benchmarks/label_accuracy.py RUN [--every].

Generates ``--count`` clips (seeds from ``--seed`` up, classes in turn) with the run's ``sample`` settings,
and reads from the pixels how the shape moves and whether it keeps its colour, size and outline. One line for
the newest checkpoint, or with ``--every`` one per checkpoint; a weights folder or 'builtin' works too.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from latte.checkpoint.run import list_checkpoints
from latte.data.shape_grading import read_motion
from latte.inference.pipeline import VideoPipeline


def measure(source: str | Path, count: int, seed: int) -> dict:
    """Return the fractions of ``count`` clips that follow their label, that show one shape in every frame,
    and that keep its colour, size and outline.
    """
    began = time.perf_counter()
    pipe = VideoPipeline.from_pretrained(source, device="cpu", dtype="fp32")
    names = pipe.classes
    labels = [index % len(names) for index in range(count)]
    motions = [read_motion(clip) for _, clip in pipe.generate(range(seed, seed + count), labels)]
    right = [motion.direction == names[label] for motion, label in zip(motions, labels, strict=True)]
    by_class = {
        name: sum(right[index :: len(names)]) / len(right[index :: len(names)])
        for index, name in enumerate(names)
    }
    return {
        "what": "label accuracy",
        "model": str(source),
        "clips": count,
        "seed": seed,
        "sampler": pipe.sample.sampler,
        "steps": pipe.sample.steps,
        "guidance": pipe.sample.guidance,
        "label_accuracy": sum(right) / count,
        "by_class": by_class,
        **{
            part: sum(getattr(motion, part) for motion in motions) / count
            for part in ("coherent", "keeps_colour", "keeps_size", "keeps_shape", "consistent")
        },
        "weights_sha256": pipe.weights,
        "seconds": round(time.perf_counter() - began, 1),
    }


def effort(run: Path, step: int) -> dict:
    """Return what the run had spent by ``step``, from its metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    near = max((line for line in lines if line["step"] <= step), key=lambda line: line["step"], default={})
    return {
        "step": step,
        "train_seconds": near.get("seconds"),
        "train_cpu_seconds": near.get("cpu_seconds"),
        "loss": near.get("loss"),
    }


def main() -> None:
    """Print one JSON line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", action="store_true", help="all the checkpoints of the run")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoints = (
        sorted(list_checkpoints(Path(options.model)), key=lambda path: int(path.name.split("-")[1]))
        if options.every
        else []
    )
    for source in checkpoints or [options.model]:
        line = measure(source, options.count, options.seed)
        if checkpoints:
            line |= effort(Path(options.model), int(Path(source).name.split("-")[1]))
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
