# SPDX-License-Identifier: Apache-2.0
"""Train every arm with every seed, measuring as it goes; whatever is measured already is not done again.

A run goes to its next point by the ordinary way of training and resuming, so it is bit for bit the run that ``latte train`` would make,
and a sweep that was stopped anywhere goes on from the last checkpoint of the run it was in. Every measured point is a line of
results.jsonl; ablation.json holds what all runs of the folder have in common.
"""

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from latte.ablate.axes import BASELINE, Arm
from latte.ablate.grading import (
    Material,
    Part,
    can_grade,
    draw_clips,
    heldout_loss,
    label_accuracy,
    open_material,
)
from latte.build import Job, build_model, check_classes
from latte.checkpoint.lock import run_lock
from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError, RunError, require
from latte.config.run import RunConfig, flat
from latte.data.datasets import Dataset
from latte.evaluation.networks.builtin import MIN_FRAMES
from latte.evaluation.scores import builtin_score
from latte.files import commit_file, reported
from latte.interop.dit import init_from_dit
from latte.training.callbacks import saved_metrics
from latte.training.signals import StopRequest

RESULTS, COMMON = "results.jsonl", "ablation.json"
RANGES = {
    "heldout_loss": "heldout_range",
    "label_accuracy": "label_range",
    "score": "score_range",
}  # of a measure: its range over seeds
PLACES = (
    "run.dir",
    "run.seed",
    "data.root",
    "codec.path",
)  # data and codec may move: the runs know them by their content
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """``base`` is the recipe ``run`` with the settings ``words``.

    Every run is measured at ``points`` steps, by ``heldout`` clips and by ``graded`` generated ones (0: none; 2 and more have a score,
    as many training clips beside them). ``dit`` is the file that the arms of axis init start from. InputError for what cannot be.
    """

    base: RunConfig
    run: str
    words: tuple[str, ...]
    axes: tuple[str, ...]
    out: Path
    seeds: tuple[int, ...]
    points: int = 8
    heldout: int = 64
    graded: int = 32
    dit: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("points", 1), ("heldout", 1), ("graded", 0)):
            require(
                getattr(self, name) >= least,
                f"--{name}",
                getattr(self, name),
                "it counts something",
                f"give {least} or more",
            )
        require(
            self.base.text.name is None,
            "text.name",
            self.base.text.name,
            "the axes are those of a model without text",
            "give a recipe without it, such as shapes-tiny",
        )
        require(len(self.axes) > 0, "--axes", "empty", "it says what to vary", "give e.g. variant,patch")
        require(
            len(self.seeds) > 0,
            "--seeds",
            "empty",
            "every arm is trained with each of them",
            "give e.g. 0,1,2",
        )
        require(
            len(set(self.seeds)) == len(self.seeds),
            "--seeds",
            self.seeds,
            "a seed is there twice",
            "give different ones, e.g. 0,1,2",
        )

    @property
    def steps(self) -> list[int]:
        """The steps after which a run is measured, the last one among them."""
        total = self.base.train.steps
        return sorted({max(1, round(total * k / self.points)) for k in range(1, self.points + 1)})

    def common(self) -> dict[str, Any]:
        """What all runs of ``out`` share, as plain data."""
        settings = {key: value for key, value in flat(self.base).items() if key not in PLACES}
        asked = {"--points": self.points, "--heldout": self.heldout, "--graded": self.graded}
        return json.loads(json.dumps(settings | asked))

    def command(self) -> str:
        """The command line of this sweep."""
        given = [
            f"--{name}={value}" for name, value in (("dit", self.dit), ("out", self.out)) if value is not None
        ]
        seeds = ",".join(map(str, self.seeds))
        counts = [f"--points={self.points}", f"--heldout={self.heldout}", f"--graded={self.graded}"]
        return shlex.join(
            [
                "latte",
                "ablate",
                self.run,
                f"--axes={','.join(self.axes)}",
                f"--seeds={seeds}",
                *counts,
                *given,
                *self.words,
            ]
        )

    def train_command(self, arm: Arm) -> str:
        """The command that trains an arm outside the sweep, on the held-out clips, too, where those are files."""
        settings = [f"{key}={'null' if value is None else value}" for key, value in arm.overrides.items()]
        return shlex.join(
            [
                "latte",
                "train",
                self.run,
                *self.words,
                *settings,
                f"run.seed={self.seeds[0]}",
                f"run.dir=runs/{arm.run}",
            ]
        )


@dataclass(frozen=True)
class Point:
    """One line of results.jsonl. ``seconds`` are those of training so far; ``label_accuracy`` and
    ``score`` (the built-in detector's, less is better) are None where they cannot be told.
    """

    arm: str
    seed: int
    step: int
    heldout_loss: float
    label_accuracy: float | None
    seconds: float
    score: float | None = None


def settle(config: RunConfig) -> RunConfig:
    """A recipe as the base of a sweep: no samples while training, the last checkpoint only, no folder or seed of its own."""
    return replace(
        config,
        train=replace(config.train, sample_every=0, keep_last=1),
        run=replace(config.run, dir=None, seed=0),
    )


def sweep(
    plan: Plan, arms: Sequence[Arm], device: torch.device, say: Say, finished: Callable[[], None]
) -> int:
    """Train and measure all that is missing in ``plan.out``; 0, or the exit code of a signal, heard after the checkpoint.

    ``finished()`` is called after every run. InputError for a folder of another sweep, and before any training for parts that do not
    fit; RunError, once the others are done, for runs that failed (a loss that is not finite, a full disk) or cannot be measured any more.
    """
    require(
        os.environ.get("WORLD_SIZE", "1") == "1",
        "WORLD_SIZE",
        os.environ.get("WORLD_SIZE"),
        "a sweep is one process",
        "start latte ablate without torchrun",
    )
    runs, points = {arm.run: arm for arm in arms}, read_points(plan.out)
    todo = [(arm, seed) for seed in plan.seeds for arm in runs.values() if missing(plan, points, arm, seed)]
    materials = (
        open_material([arm.config for arm in runs.values()], device, plan.heldout, plan.graded)
        if todo
        else {}
    )
    common = agree(plan, [material.dataset for material in materials.values()])
    say(
        f"{len(runs)} arms, {len(plan.seeds)} seeds: {len(todo)} of {len(runs) * len(plan.seeds)} runs are to be trained"
    )
    for arm in {arm.run: arm for arm, _ in todo}.values():
        check_classes(arm.config.model.num_classes, materials[arm.config.data].dataset.classes)
        fresh(plan, arm, plan.seeds[0])
    failures: list[str] = []
    with run_lock(plan.out), StopRequest() as stop:
        if todo:
            with reported("the sweep's settings", plan.out):
                commit_file(plan.out / COMMON, json.dumps(common, indent=1) + "\n")
        for number, (arm, seed) in enumerate(todo, 1):
            begin = f"run {number} of {len(todo)}: {arm.run} seed {seed}"
            tell = partial(_tell, say, begin)
            try:
                code = stop.code or train(plan, arm, seed, materials[arm.config.data], device, stop, tell)
            except RunError as error:
                tell(f"failed: {error}")
                failures.append(f"{arm.run} seed {seed}: {error}")
                continue
            if code:
                return code
            finished()
    if failures:
        raise RunError("\n".join(failures))
    return 0


def _tell(say: Say, begin: str, line: str) -> None:
    say(f"{begin} {line}")


def agree(plan: Plan, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """What all runs of the folder have in common; InputError with every difference from what its runs were trained with, if there are any.

    ``datasets``: those of the arms, none when nothing is to be trained.
    """
    file, mine = plan.out / COMMON, plan.common()
    if parts := {dataset.digest for dataset in datasets if isinstance(dataset, Part)}:
        mine["training clips"] = sorted(parts)
    if not file.exists():
        return mine
    try:
        noted = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); give another --out") from error
    lines = [
        f"  {key}: there it is {noted.get(key)!r}, you gave {value!r}"
        for key, value in mine.items()
        if noted.get(key) != value
    ]
    if lines:
        raise InputError(
            "\n".join(
                [
                    f"--out {plan.out} holds a sweep of another recipe; give its own settings, or another --out:",
                    *lines,
                ]
            )
        )
    return mine


def read_points(out: Path) -> dict[tuple[str, int], dict[int, Point]]:
    """results.jsonl -> (arm's run, seed) -> step -> Point. Half a line of a killed process is passed over."""
    found: dict[tuple[str, int], dict[int, Point]] = {}
    path = out / RESULTS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            point = Point(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found.setdefault((point.arm, point.seed), {})[point.step] = point
    return found


def missing(
    plan: Plan, points: Mapping[tuple[str, int], Mapping[int, Point]], arm: Arm, seed: int
) -> list[int]:
    """The steps of a run that are not measured yet."""
    return [step for step in plan.steps if step not in points.get((arm.run, seed), {})]


def folder(plan: Plan, arm: Arm, seed: int) -> Path:
    """Where a run lives."""
    return plan.out / arm.run / f"seed-{seed}"


def fresh(plan: Plan, arm: Arm, seed: int) -> Any:
    """The arm's model before its first step; InputError for a DiT that is not given or does not fit."""
    model = build_model(arm.config.model, seed)
    if arm.mapping is not None:
        if plan.dit is None:
            raise InputError(
                "--axes init starts from the weights of a DiT, but --dit is missing; give its file, e.g. DiT-XL-2-256x256.pt"
            )
        init_from_dit(model, plan.dit, arm.mapping)
    return model


def train(
    plan: Plan, arm: Arm, seed: int, material: Material, device: torch.device, stop: StopRequest, say: Say
) -> int:
    """Take one run from point to point, measuring at each; 0 or the exit code of a signal."""
    where, todo = folder(plan, arm, seed), missing(plan, read_points(plan.out), arm, seed)
    config = replace(arm.config, run=replace(arm.config.run, dir=str(where), seed=seed))
    job = Job(config, fresh(plan, arm, seed), material.dataset, material.codec, device)
    where.mkdir(parents=True, exist_ok=True)
    for step in todo:
        with open(where / "train.log", "a", encoding="utf-8") as log, redirect_stderr(log):
            result = job.train(until=step)
        if result["interrupted"]:
            return result["interrupted"]
        if result["step"] != step:
            raise RunError(
                f"{where} is at step {result['step']}, but step {step} is not in {plan.out / RESULTS} and can be measured no "
                f"more; delete {where} to train it again"
            )
        point = measure(plan, arm, seed, job, material, result)
        append(plan.out / RESULTS, point)
        graded = "" if point.label_accuracy is None else f", {point.label_accuracy:.0%} of the clips obey"
        say(f"step {step} of {plan.steps[-1]}: held-out loss {point.heldout_loss:.4f}{graded}")
        if stop.code:
            return stop.code
    return 0


def measure(
    plan: Plan, arm: Arm, seed: int, job: Job, material: Material, result: Mapping[str, Any]
) -> Point:
    """The averaged weights of the checkpoint that ``result`` of training names, examined."""
    checkpoint = load_checkpoint(Path(result["checkpoint"]), only={"ema"})
    job.model.load_state_dict(checkpoint.tensors["ema"])
    loss, accuracy, score = heldout_loss(job.model, arm.config, material.exam), None, None
    if plan.graded and material.codec is not None:
        clips = draw_clips(job.model, arm.config, material.codec, plan.graded)
        accuracy = label_accuracy(clips) if can_grade(arm.config, material.dataset) else None
        score = (
            builtin_score(material.real, clips) if plan.graded > 1 and len(clips[0]) >= MIN_FRAMES else None
        )
    return Point(arm.run, seed, result["step"], loss, accuracy, saved_metrics(checkpoint.state)["seconds"], score)


def append(path: Path, point: Point) -> None:
    """Add a line, on the disk before this returns; RunError when it refuses."""
    with reported("the results", path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(point)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def summary(plan: Plan, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One entry per arm of every axis: medians over the seeds that have come to the last step, None before the first has."""
    points, entries = read_points(plan.out), []
    for arm in arms:
        last = {
            seed: found[plan.steps[-1]]
            for seed in plan.seeds
            if plan.steps[-1] in (found := points.get((arm.run, seed), {}))
        }
        found = {
            name: [getattr(point, name) for point in last.values() if getattr(point, name) is not None]
            for name in RANGES
        }
        middles = {name: median(numbers) if numbers else None for name, numbers in found.items()}
        ranges = {
            RANGES[name]: [min(numbers), max(numbers)] if numbers else None for name, numbers in found.items()
        }
        entries.append(
            {
                "name": arm.name,
                "axis": arm.axis,
                "run": str(plan.out / arm.run),
                "baseline": arm.run == BASELINE,
                "seeds": list(last),
                **middles,
                **ranges,
                "parameters": arm.cost.parameters,
                "operations": arm.cost.operations,
                "seconds": round(median(point.seconds for point in last.values()), 1) if last else None,
            }
        )
    return entries
