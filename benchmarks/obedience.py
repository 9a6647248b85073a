# SPDX-License-Identifier: Apache-2.0
"""How many clips show what was requested: python benchmarks/obedience.py MODEL [--count 500] [--every].

A text model gets captions of combinations that were held out of its training, and as many of those that it
was trained on; kind, colour, direction and consistency are read from the pixels. A class model of moving
shapes gets its labels in turn. Every share has its 95 % interval (Wilson's). The scenes are those that the
model records; --scenes, --language and --hold-out are for one that does not record them. With --every there
is a curve over all checkpoints of a run. Seeds of noise and of captions count up from --seed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch

from latte.checkpoint.run import list_checkpoints, step_of
from latte.checks import InputError, check
from latte.data.procedural import DIRECTIONS, caption_of, read_motion, split_combinations
from latte.data.world.grading import Share, grade
from latte.data.world.scenes import caption, sample_scene
from latte.inference.generate import changed
from latte.inference.pipeline import VideoPipeline

REPORT_EVERY = 50  # clips
SIDES = ("held_out", "trained")  # of a text model's captions
DETAILS = ("coherent", "keeps_colour", "keeps_size", "keeps_shape")  # of the consistency of a moving shape


@dataclass(frozen=True)
class Request:
    """What one clip has to show, part by part, and the prompt or the class that asks for it."""

    parts: dict[str, str]
    prompt: str | None = None
    label: int | None = None


Read = Callable[[np.ndarray], list[dict[str, Any]]]
"""Clips (b t h w c) -> for each the parts that its pixels show, ``consistent`` and further flags."""


def read_world(clips: np.ndarray) -> list[dict[str, Any]]:
    """Read scenes of the world."""
    return [vars(found) for found in grade(clips)]


def read_shapes(clips: np.ndarray) -> list[dict[str, Any]]:
    """Read moving shapes."""
    motions = [read_motion(clip) for clip in clips]
    flags = ("consistent", *DETAILS)
    return [
        {"kind": motion.shape, "colour": motion.colour, "direction": motion.direction}
        | {flag: getattr(motion, flag) for flag in flags}
        for motion in motions
    ]


def world_requests(count: int, seed: int, hold_out: int, held: bool, language: str) -> list[Request]:
    """Return the captions of ``count`` scenes, kinds in turn."""
    scenes = [sample_scene(seed, index, hold_out, held) for index in range(count)]
    names = ("kind", "colour", "direction")
    return [
        Request(dict(zip(names, scene.combination, strict=True)), caption(scene, language))
        for scene in scenes
    ]


def shape_requests(count: int, seed: int, hold_out: int, held: bool, language: str) -> list[Request]:
    """Return ``count`` captions of moving shapes, the combinations in turn."""
    pool = split_combinations(hold_out)[held]
    chosen = [pool[index % len(pool)] for index in range(count)]
    names = ("kind", "colour", "direction")
    return [Request(dict(zip(names, parts, strict=True)), caption_of(*parts)) for parts in chosen]


SCENES = {"world": (world_requests, read_world), "shapes": (shape_requests, read_shapes)}


def label_requests(classes: Sequence[str], count: int) -> list[Request]:
    """Return ``count`` requests for the four directions in turn; InputError for other classes."""
    if list(classes) != list(DIRECTIONS):
        raise InputError(
            f"the model's classes are {', '.join(classes) or 'none'}, but only the directions of moving "
            f"shapes can be read from pixels ({', '.join(DIRECTIONS)}); give a model of recipe shapes"
        )
    numbers = [index % len(classes) for index in range(count)]
    return [Request({"direction": classes[number]}, label=number) for number in numbers]


def requests_of(pipe: VideoPipeline, options: argparse.Namespace) -> tuple[dict[str, list[Request]], Read]:
    """Return {side: requests} for the model, and what reads its clips."""
    if pipe.reader is None:
        return {"labels": label_requests(pipe.classes, options.count)}, read_shapes
    data = dict(pipe.about.get("data") or {})
    scenes = options.scenes or (data.get("kind") == "procedural" and data.get("scenes", "shapes"))
    check(
        scenes in SCENES,
        f"{pipe.name} does not record its captions; give --scenes {' or '.join(SCENES)} and --hold-out",
    )
    make, read = SCENES[scenes]
    hold_out = data.get("hold_out", 0) if options.hold_out is None else options.hold_out
    language = options.language or data.get("language") or "en"
    sides = [side for side in SIDES if hold_out or side != "held_out"]
    requested = {
        side: make(options.count, options.seed, hold_out, side == "held_out", language) for side in sides
    }
    return requested, read


def shares(requests: Sequence[Request], found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the share of clips that are right in each part and in all, and that are consistent."""
    right = {
        part: [read[part] == request.parts[part] for request, read in zip(requests, found, strict=True)]
        for part in requests[0].parts
    }
    flags = {flag: [read[flag] for read in found] for flag in ("consistent", *DETAILS) if flag in found[0]}
    everything = [all(row) for row in zip(*right.values(), flags["consistent"], strict=True)]
    columns = {**right, **flags, "all": everything}
    counted = {name: Share.of(column) for name, column in columns.items()}
    return {name: {"share": share.value, "interval": list(share.interval)} for name, share in counted.items()}


def grouped(requests: Sequence[Request], found: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the shares by kind, or by direction where no kind was requested."""
    part = "kind" if "kind" in requests[0].parts else "direction"
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.parts[part], []).append(index)
    tables = {
        name: shares([requests[index] for index in rows], [found[index] for index in rows])
        for name, rows in groups.items()
    }
    return {name: {key: value["share"] for key, value in table.items()} for name, table in tables.items()}


def evaluate(source: str | Path, options: argparse.Namespace) -> dict[str, Any]:
    """Generate and read the clips of one model."""
    began = time.perf_counter()
    pipe = VideoPipeline.from_pretrained(source, device=options.device, dtype=options.dtype)
    config = changed(pipe.sample, steps=options.steps, guidance=options.guidance)
    requested, read = requests_of(pipe, options)
    line: dict[str, Any] = {"model": str(source), "clips": options.count, "seed": options.seed}
    line |= {"sampler": config.sampler, "steps": config.steps, "guidance": config.guidance}
    for side, requests in requested.items():
        prompts = [request.prompt for request in requests if request.prompt is not None] or None
        labels = [request.label for request in requests if request.label is not None] or None
        seeds = range(options.seed, options.seed + options.count)
        found = []
        for _, clip in pipe.generate(seeds, labels, prompts, config=config):
            found += read(clip[None])
            if len(found) % REPORT_EVERY == 0:
                print(f"{source} {side} {len(found)}/{options.count}", file=sys.stderr, flush=True)
        line[side] = shares(requests, found) | {"groups": grouped(requests, found)}
    return line | {"weights_sha256": pipe.weights, "seconds": round(time.perf_counter() - began, 1)}


def effort(run: Path, step: int) -> dict[str, Any]:
    """Return what the run had spent by ``step``, from its metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    near = max((line for line in lines if line["step"] <= step), key=lambda line: line["step"], default={})
    spent = {"train_seconds": "seconds", "train_cpu_seconds": "cpu_seconds", "loss": "loss"}
    return {"step": step} | {name: near.get(key) for name, key in spent.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin")
    parser.add_argument("--count", type=int, default=500, help="clips of each side")
    parser.add_argument("--seed", type=int, default=100_000, help="larger than any seed used elsewhere")
    parser.add_argument("--every", action="store_true", help="all the checkpoints of the run")
    parser.add_argument("--scenes", choices=list(SCENES), help="what a model shows that does not record it")
    parser.add_argument("--hold-out", type=int, help="data.hold_out of its training")
    parser.add_argument("--language", help="of the captions: en, zh or mixed")
    parser.add_argument("--guidance", type=float, help="the model's own by default")
    parser.add_argument("--steps", type=int, help="the model's own by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    check(options.count >= 1, f"--count must be at least 1, got {options.count}")
    torch.set_num_threads(options.threads)
    curve = []
    if options.every:
        found = list_checkpoints(Path(options.model))
        check(bool(found), f"--every is for a run, but {options.model} has no checkpoints; leave it out")
        for path in sorted(found, key=step_of):
            spent = effort(Path(options.model), step_of(path))
            curve.append(evaluate(path, options) | spent)
    last = curve[-1] if curve else evaluate(options.model, options)
    line = {"what": Path(__file__).stem, **last, "commit": measure.commit()}
    if curve:
        line["curve"] = curve
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
