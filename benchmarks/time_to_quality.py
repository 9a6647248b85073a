# SPDX-License-Identifier: Apache-2.0
"""Processor time of training to a fixed quality: python benchmarks/time_to_quality.py RECIPE [KEY=VALUE ...].

Trains the recipe with every seed until the EMA weights meet all targets, or to train.steps. They are measured
every --every steps: the held-out loss (clips, noise and timesteps fixed; of files a tenth is held out, of
procedural clips another seed is used), and for procedural clips the label accuracy and the consistency of
generated clips. Measuring does not count. One JSON line; exit code 1 when a seed never met the targets.
Long runs resume: the same command on the same --out.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch
from torch import Tensor

from latte.ablate.metrics import HeldOut, open_ablation_data
from latte.ablate.metrics import measure as measure_quality
from latte.build import Job, build_model
from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError, check
from latte.config.run import RunConfig, load_run
from latte.diffusion.config import build_process
from latte.diffusion.process import VelocityPrediction
from latte.runtime import resolve_device

LEVELS = (100, 300, 500, 700, 850, 950)  # timesteps of 1000 whose error of v is reported
HIGHER = ("label_accuracy", "consistency")


@dataclass(frozen=True)
class Targets:
    """What the EMA weights must reach; None: whatever it is."""

    loss: float | None = None
    accuracy: float | None = None
    consistency: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in asdict(self).values() if value is not None]
        check(len(given) > 0, "no target is given; give --loss, --accuracy or --consistency")
        check(min(given) > 0, f"a target must be positive, got {min(given)}")
        for name in ("accuracy", "consistency"):
            value = getattr(self, name)
            check(value is None or value <= 1, f"--{name} is {value}, but it is a fraction of the clips")

    def met(self, found: dict[str, float | None]) -> bool:
        """Return whether ``found`` meets every target; InputError for one that cannot be measured."""
        limits = {"heldout_loss": self.loss, "label_accuracy": self.accuracy, "consistency": self.consistency}
        reached = True
        for name, target in limits.items():
            value = found[name]
            if target is None:
                continue
            if value is None:
                raise InputError(f"{name} cannot be measured for this recipe; leave its target out")
            reached &= value >= target if name in HIGHER else value <= target
        return reached


@torch.no_grad()
def velocity_errors(model: Any, config: RunConfig, held_out: HeldOut) -> dict[int, float]:
    """Return timestep -> mean squared error of v = signal eps - noise z_0 over the held-out clips."""
    process = build_process(config.diffusion)
    model.eval()
    found = {}
    for level in LEVELS:
        t = torch.full_like(held_out.t, level * config.diffusion.num_steps // 1000)
        total = 0.0
        for z0, eps, part, label in batches(held_out, t, config.train.global_batch):
            zt = process.add_noise(z0, part, eps)
            condition = {} if label is None or config.model.num_classes is None else {"label": label}
            prediction, _ = process.split(model(zt, process.original(part), **condition), zt)
            signal = process.at("signal", part, zt)
            noise = process.at("noise", part, zt)
            guess = VelocityPrediction.target(signal, noise, *process.estimate(prediction, zt, part))
            truth = VelocityPrediction.target(signal, noise, z0, eps)
            total += float((guess - truth).square().flatten(1).mean(1).double().sum())
        found[level] = total / len(t)
    return found


def batches(held_out: HeldOut, t: Tensor, size: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Return (z0, eps, t, label or None) in parts of ``size`` clips."""
    parts = [slice(start, start + size) for start in range(0, len(t), size)]
    label = held_out.label
    return [
        (held_out.z0[part], held_out.eps[part], t[part], None if label is None else label[part])
        for part in parts
    ]


def train_seed(
    config: RunConfig, data: Any, seed: int, targets: Targets, options: argparse.Namespace
) -> dict:
    """Return one seed's steps, processor minutes, quality at the end and every point on the way."""
    folder = Path(options.out) / f"seed-{seed}"
    config = replace(config, run=replace(config.run, dir=str(folder), seed=seed))
    job = Job(config, build_model(config.model, seed), data.dataset, data.codec, torch.device("cpu"))
    points: list[dict[str, Any]] = []
    last = config.train.steps
    for step in sorted({*range(options.every, last, options.every), last}):
        result = job.train(until=step)
        if result["interrupted"]:
            sys.exit(result["interrupted"])
        if result["step"] > step:  # of an earlier start
            continue
        checkpoint = load_checkpoint(Path(result["checkpoint"]), only={"ema", "model"})
        weights = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
        job.model.load_state_dict(checkpoint.tensors["ema"])
        found = measure_quality(job.model, config, data, options.count)
        errors = velocity_errors(job.model, config, data.held_out)
        job.model.load_state_dict(weights)
        seconds = checkpoint.state["metrics"]["cpu_seconds"]
        points.append({"step": step, "minutes": round(seconds / 60, 3), **found, "v_error": errors})
        print(json.dumps({"seed": seed, **points[-1]}), file=sys.stderr, flush=True)
        if targets.met(found):
            break
    reached = bool(points) and targets.met(points[-1])
    return {"seed": seed, "reached": reached, **(points[-1] if points else {}), "points": points}


def summary(config: RunConfig, seeds: list[dict], targets: Targets, words: list[str]) -> dict[str, Any]:
    """Return the JSON line: medians over the seeds that met the targets, and the range of their minutes."""
    met = [seed for seed in seeds if seed["reached"]]
    line: dict[str, Any] = {
        "what": "time to quality",
        "machine": measure.machine(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "recipe": words,
        "targets": asdict(targets),
        "reached": f"{len(met)} of {len(seeds)}",
        "processor_minutes": None,
        "spread_minutes": None,
        "steps": None,
        "clips": None,
    }
    if met:
        minutes = [seed["minutes"] for seed in met]
        steps = round(median(seed["step"] for seed in met))
        line |= {
            "processor_minutes": round(median(minutes), 2),
            "spread_minutes": [round(min(minutes), 2), round(max(minutes), 2)],
            "steps": steps,
            "clips": steps * config.train.global_batch,
        }
    return {**line, "seeds": seeds}


def main(arguments: list[str] | None = None) -> dict:
    """Train, print the line, exit with 1 unless every seed met the targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="a recipe or YAML file")
    parser.add_argument("words", nargs="*", help="settings, KEY=VALUE")
    parser.add_argument("--loss", type=float, help="held-out loss to reach")
    parser.add_argument("--accuracy", type=float, help="label accuracy to reach")
    parser.add_argument("--consistency", type=float, help="consistency to reach")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--every", type=int, default=250, help="steps between measurements")
    parser.add_argument("--heldout", type=int, default=64, help="held-out clips")
    parser.add_argument("--count", type=int, default=64, help="generated clips; 0: the held-out loss alone")
    parser.add_argument("--out", default="runs/time-to-quality")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_intermixed_args(arguments)
    torch.set_num_threads(options.threads)
    targets = Targets(options.loss, options.accuracy, options.consistency)
    check(options.every >= 1, f"--every must be at least 1, got {options.every}")
    config, _ = load_run(options.recipe, options.words)
    check(
        config.text.name is None,
        f"text.name is {config.text.name!r}, but only models of classes are measured; give another recipe",
    )
    quiet = replace(config.train, sample_every=0, keep_last=1)
    config = replace(config, train=quiet)
    data = open_ablation_data([config], resolve_device("cpu"), options.heldout, options.count)[config.data]
    seeds = [train_seed(config, data, int(seed), targets, options) for seed in options.seeds.split(",")]
    line = summary(config, seeds, targets, [options.recipe, *options.words])
    print(json.dumps(line), flush=True)
    missed = [str(seed["seed"]) for seed in seeds if not seed["reached"]]
    if missed:
        sys.exit(
            f"time to quality: seed {', '.join(missed)} did not reach the targets in {config.train.steps} "
            "steps; the last point of each is in the line above. Raise train.steps, or give a target nearer"
        )
    return line


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"time to quality: {error}")
