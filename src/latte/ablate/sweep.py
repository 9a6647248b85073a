# SPDX-License-Identifier: Apache-2.0
"""Train every setting with every seed, measuring as it goes; what is measured already is not repeated.

A run advances to its next point by ordinary training and resuming, so it is bit for bit the run that ``latte
train`` makes, and a sweep that was stopped anywhere resumes from the last checkpoint of its current run.
Several processes take runs in turn, each trained by one. Everything that can be checked (axes, weights,
classes, metrics, disk) is checked before the first step.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latte.ablate.axes import Setting
from latte.ablate.metrics import CLIPS, METRICS, AblationData, measure, open_ablation_data
from latte.ablate.plan import (
    COMMON,
    PART,
    Plan,
    Point,
    append,
    check_same_sweep,
    merge_points,
    missing_steps,
    read_points,
)
from latte.build import Job, build_model, check_classes
from latte.checkpoint.lock import run_lock
from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError, RunError, check, duration
from latte.data.datasets import DataConfig
from latte.data.hold_out import Subset
from latte.distributed import ALONE, Group
from latte.files import commit_file, reported
from latte.interop.dit import init_from_dit
from latte.runtime import StopRequest, alone, world_size
from latte.training.callbacks import saved_metrics

Log = Callable[[str], None]
Run = tuple[Setting, int]
"""A setting and a seed."""

CHECKPOINT_BYTES = 16  # per parameter: weights, EMA and the two moments of AdamW, in float32


def sweep(
    plan: Plan,
    settings: Sequence[Setting],
    device: torch.device,
    log: Log,
    on_run_end: Callable[[], None],
    ranks: Group = ALONE,
) -> int:
    """Train and measure all that is missing in ``plan.out``; return 0, or the exit code of a signal.

    ``on_run_end()`` is called after every run of rank 0. All processes of ``ranks`` must call it. InputError
    for a folder of another sweep, and before any training for parts that do not fit; RunError for a full
    disk, and once the others are done for runs that failed.
    """
    size = world_size()
    check(size == ranks.size, f"{size} processes do not share this sweep; pass ranks=, a command_group")
    unique = {setting.run: setting for setting in settings}
    runs = [(setting, seed) for seed in plan.seeds for setting in unique.values()]
    missing = ranks.run_on_rank0(missing_points, plan, runs)
    todo = [run for run, steps in zip(runs, missing, strict=True) if steps]
    data: dict[DataConfig, AblationData] = {}
    if todo:
        configs = [setting.config for setting in unique.values()]
        data = ranks.after_rank0(open_ablation_data, configs, device, plan.heldout, plan.generated)
    subsets = [part.dataset.digest for part in data.values() if isinstance(part.dataset, Subset)]
    common = ranks.run_on_rank0(check_same_sweep, plan, subsets)
    log(f"{len(unique)} settings, {len(plan.seeds)} seeds: {len(todo)} of {len(runs)} runs are to be trained")
    ranks.run_on_rank0(check_runs, plan, todo, data, log)
    left = TimeLeft(-(-sum(missing) // size))
    with run_lock(plan.out) if ranks.rank == 0 else nullcontext(), StopRequest() as stop:
        if todo:
            ranks.run_on_rank0(write_common, plan, common)
        if size > 1:
            plan = replace(plan, results=PART.format(ranks.rank))
        failures: list[str] = []
        for number in ranks.share(len(todo)):
            setting, seed = todo[number]
            label = f"run {number + 1} of {len(todo)}: {setting.run} seed {seed}"
            part = data[setting.config.data]
            try:
                with alone():
                    code = stop.code or train(
                        plan, (setting, seed), part, device, stop, left.labelled(log, label)
                    )
            except RunError as error:
                log(f"{label} failed: {error}")
                failures.append(f"{setting.run} seed {seed}: {error}")
                continue
            if code:
                return code
            if ranks.rank == 0:
                on_run_end()
        failures = [line for lines in ranks.gather(failures) for line in lines]
        ranks.run_on_rank0(missing_points, plan, runs)
    if failures:
        raise RunError("\n".join(failures))
    return 0


def missing_points(plan: Plan, runs: Sequence[Run]) -> list[int]:
    """Return how many points of each run are to be measured, after merging those of several processes."""
    merge_points(plan, [(setting.run, seed) for setting, seed in runs])
    points = read_points(plan.out)
    return [len(missing_steps(plan, points, setting, seed)) for setting, seed in runs]


def write_common(plan: Plan, common: Mapping[str, Any]) -> None:
    """Write what all runs of the sweep share."""
    with reported("the sweep's settings", plan.out):
        commit_file(plan.out / COMMON, json.dumps(common, indent=1) + "\n")


class TimeLeft:
    """The time that ``missing`` points will take, from those that are done."""

    def __init__(self, missing: int):
        self.missing = missing
        self.done = 0
        self.started = time.monotonic()

    def labelled(self, log: Log, label: str) -> Log:
        """Return what logs a line for each measured point, with the time left of the whole sweep."""

        def log_point(line: str) -> None:
            self.done += 1
            per_point = (time.monotonic() - self.started) / self.done
            left = duration(per_point * max(self.missing - self.done, 0))
            log(f"{label} {line}, about {left} left")

        return log_point


def check_runs(plan: Plan, todo: Sequence[Run], data: Mapping[DataConfig, AblationData], log: Log) -> None:
    """Check classes, weights to start from and the disk; log the metrics that cannot be measured."""
    unique = {setting.run: setting for setting, _ in todo}
    for setting in unique.values():
        part = data[setting.config.data]
        check_classes(setting.config.model.num_classes, part.dataset.classes)
        initial_model(plan, setting, plan.seeds[0])
    for name, metric in METRICS.items():
        reasons = {
            metric.unavailable(setting.config, data[setting.config.data], plan.generated)
            for setting in unique.values()
        }
        for reason in sorted(reasons - {""}):
            log(f"{metric.title} ({name}) is not measured: {reason}")
    check_disk(plan, todo)


def check_disk(plan: Plan, todo: Sequence[Run]) -> None:
    """Raise RunError unless the last checkpoints of all runs, and one in writing, fit on the disk."""
    sizes = [
        CHECKPOINT_BYTES * setting.cost.parameters
        for setting, seed in todo
        if not (plan.folder(setting, seed) / "checkpoints").exists()
    ]
    largest = max((CHECKPOINT_BYTES * setting.cost.parameters for setting, _ in todo), default=0)
    needed = sum(sizes) + largest
    existing = plan.out.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise RunError(
            f"the checkpoints of {len(todo)} runs need {needed:,} bytes in {plan.out}, but {free:,} are "
            "free; make room, or give another --out, fewer axes or fewer seeds"
        )


def initial_model(plan: Plan, setting: Setting, seed: int) -> Any:
    """Return the setting's initial model; InputError for a DiT that is missing or does not fit."""
    model: Any = build_model(setting.config.model, seed)  # a Latte: ablations have no text models
    if setting.mapping is not None:
        if plan.dit is None:
            raise InputError(
                "--axes init starts from the weights of a DiT, but --dit is missing; "
                "give its file, e.g. DiT-XL-2-256x256.pt"
            )
        init_from_dit(model, plan.dit, setting.mapping)
    return model


def train(plan: Plan, run: Run, data: AblationData, device: torch.device, stop: StopRequest, log: Log) -> int:
    """Take one run from point to point, measuring at each; return 0 or the exit code of a signal."""
    setting, seed = run
    folder = plan.folder(setting, seed)
    config = replace(setting.config, run=replace(setting.config.run, dir=str(folder), seed=seed))
    job = Job(config, initial_model(plan, setting, seed), data.dataset, data.codec, device)
    with reported("the run", folder):
        folder.mkdir(parents=True, exist_ok=True)
    for step in missing_steps(plan, read_points(plan.out), setting, seed):
        result = train_until(job, folder, step)
        if result["interrupted"]:
            return result["interrupted"]
        if result["step"] != step:
            raise RunError(
                f"{folder} is at step {result['step']}, but step {step} is not in {plan.out / plan.results} "
                f"and can no longer be measured; delete {folder} to train it again"
            )
        point = measure_run(plan, run, job, data, result)
        append(plan.out / plan.results, point)
        log(f"step {step} of {plan.steps[-1]}: {describe(point)}")
        if stop.code:
            return stop.code
    return 0


def train_until(job: Job, folder: Path, step: int) -> dict[str, Any]:
    """Train to ``step``, the log of training in ``folder``."""
    with reported("the log", folder):
        file = open(folder / "train.log", "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    with file, redirect_stderr(file):
        return job.train(until=step)


def measure_run(plan: Plan, run: Run, job: Job, data: AblationData, result: Mapping[str, Any]) -> Point:
    """Return the metrics of the EMA weights of the checkpoint that ``result`` of training names."""
    setting, seed = run
    checkpoint = load_checkpoint(Path(result["checkpoint"]), only={"ema"})
    job.model.load_state_dict(checkpoint.tensors["ema"])
    values = measure(job.model, setting.config, data, plan.generated, plan.folder(setting, seed) / CLIPS)
    return Point(setting.run, seed, result["step"], saved_metrics(checkpoint.state)["seconds"], values)


def describe(point: Point) -> str:
    """Return the metrics of a point as text: 'held-out loss 0.1234, label accuracy 25.0%'."""
    return ", ".join(
        f"{METRICS[name].title} {value:{METRICS[name].number_format}}"
        for name, value in point.values.items()
        if value is not None
    )
