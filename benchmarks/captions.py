# SPDX-License-Identifier: Apache-2.0
"""Caption accuracy of a text model on unseen combinations: python benchmarks/captions.py RUN [--seen]
[--every].

Generates ``--count`` clips (seeds from ``--seed`` up) with the run's ``sample`` settings. Their captions are
the combinations that ``data.hold_out`` kept out of training, in turn, or with ``--seen`` those trained on.
Shape, colour and direction are read from the pixels. One line for the newest checkpoint, or with ``--every``
one per checkpoint; a weights folder works too, with ``--hold-out``.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from label_accuracy import effort

from latte.checkpoint.run import list_checkpoints
from latte.checks import InputError
from latte.config.run import load_run
from latte.data.procedural import Combination, caption_of, split_combinations
from latte.data.shape_grading import read_motion
from latte.inference.pipeline import VideoPipeline

PARTS = ("shape", "colour", "direction")  # in the order of a combination


def measure(source: str | Path, combinations: list[Combination], count: int, seed: int) -> dict:
    """Return the fractions of ``count`` clips that are right in each part and in ``all``, and that hold
    together.
    """
    began = time.perf_counter()
    requested = [combinations[index % len(combinations)] for index in range(count)]
    prompts = [caption_of(*combination) for combination in requested]
    pipe = VideoPipeline.from_pretrained(source, device="cpu", prompts=prompts, dtype="fp32")
    motions = [read_motion(clip) for _, clip in pipe.generate(range(seed, seed + count), prompts=prompts)]
    right = [
        [getattr(motion, part) == word for part, word in zip(PARTS, combination, strict=True)]
        for motion, combination in zip(motions, requested, strict=True)
    ]
    return {
        "what": "captions",
        "model": str(source),
        "clips": count,
        "seed": seed,
        "combinations": len(combinations),
        "sampler": pipe.sample.sampler,
        "steps": pipe.sample.steps,
        "guidance": pipe.sample.guidance,
        **{part: sum(row[index] for row in right) / count for index, part in enumerate(PARTS)},
        "all": sum(map(all, right)) / count,
        "coherent": sum(motion.coherent for motion in motions) / count,
        "consistent": sum(motion.consistent for motion in motions) / count,
        "weights_sha256": pipe.weights,
        "seconds": round(time.perf_counter() - began, 1),
    }


def combinations_of(model: str, hold_out: int | None, seen: bool) -> list[Combination]:
    """Return the combinations held out from a run, or with ``seen`` those it was trained on.

    InputError for a run that was trained on everything.
    """
    share = load_run(model)[0].data.hold_out if hold_out is None else hold_out
    seen_in_training, held = split_combinations(share)
    if not held and not seen:
        raise InputError(
            "data.hold_out is 0, so nothing was held out from training; give --seen, or a run with it"
        )
    return list(seen_in_training if seen else held)


def main() -> None:
    """Print one JSON line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=100_000, help="larger than any seed used elsewhere")
    parser.add_argument("--seen", action="store_true", help="the combinations that were trained on")
    parser.add_argument(
        "--hold-out", type=int, help="data.hold_out of the run that a folder of weights comes from"
    )
    parser.add_argument("--every", action="store_true", help="all the checkpoints of the run")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    combinations = combinations_of(options.model, options.hold_out, options.seen)
    checkpoints = (
        sorted(list_checkpoints(Path(options.model)), key=lambda path: int(path.name.split("-")[1]))
        if options.every
        else []
    )
    for source in checkpoints or [options.model]:
        line = {**measure(source, combinations, options.count, options.seed), "held_out": not options.seen}
        if checkpoints:
            line |= effort(Path(options.model), int(Path(source).name.split("-")[1]))
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
