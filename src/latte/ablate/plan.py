# SPDX-License-Identifier: Apache-2.0
"""The plan of a sweep and its points: a line each in results.jsonl; ablation.json has what all runs share."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from latte.ablate.axes import BASELINE, Setting
from latte.ablate.metrics import METRICS
from latte.checks import InputError, check, command_line
from latte.config.run import RunConfig, flat
from latte.files import commit_file, reported

RESULTS = "results.jsonl"
PART = "results-{}.jsonl"  # of one of several processes, by its rank
COMMON = "ablation.json"
LOCATIONS = (
    "run.dir",
    "run.seed",
    "data.root",
    "codec.path",
)  # may change: runs know data and codec by content


@dataclass(frozen=True)
class Plan:
    """``base`` is the recipe ``run`` with overrides ``words``; ``dit``: weights for axis init.

    Every run is measured at ``points`` steps, with ``heldout`` clips for the loss and ``generated`` generated
    ones (0: none). InputError for counts, seeds or a recipe that cannot be swept.
    """

    base: RunConfig
    run: str
    words: tuple[str, ...]
    axes: tuple[str, ...]
    out: Path
    seeds: tuple[int, ...]
    points: int = 8
    heldout: int = 64
    generated: int = 32
    dit: str | None = None
    results: str = RESULTS  # the file that this process adds points to

    def __post_init__(self) -> None:
        for name, minimum in (("points", 1), ("heldout", 1), ("generated", 0)):
            value = getattr(self, name)
            check(value >= minimum, f"--{name} must be at least {minimum}, got {value}")
        check(
            self.base.text.name is None,
            f"text.name is {self.base.text.name!r}, but the axes are those of a model without text; "
            "give a recipe without it, such as shapes-tiny",
        )
        check(len(self.axes) > 0, "--axes is empty; give what to vary, e.g. variant,patch")
        check(len(self.seeds) > 0, "--seeds is empty; give e.g. 0,1,2")
        check(len(set(self.seeds)) == len(self.seeds), f"--seeds names a seed twice: {self.seeds}")
        check(self.out.is_dir() or not os.path.lexists(self.out), f"--out {self.out} is not a folder")

    @property
    def steps(self) -> list[int]:
        """The steps after which a run is measured, the last one among them."""
        total = self.base.train.steps
        return sorted({max(1, round(total * k / self.points)) for k in range(1, self.points + 1)})

    def common(self) -> dict[str, Any]:
        """Return what all runs of ``out`` share, as plain data."""
        config = {key: value for key, value in flat(self.base).items() if key not in LOCATIONS}
        counts = {"--points": self.points, "--heldout": self.heldout, "--generated": self.generated}
        return json.loads(json.dumps(config | counts))

    def command(self) -> str:
        """Return the command line of this sweep."""
        given = {"dit": self.dit, "out": self.out}
        options = [f"--{name}={value}" for name, value in given.items() if value is not None]
        seeds = ",".join(map(str, self.seeds))
        counts = [f"--{name}={getattr(self, name)}" for name in ("points", "heldout", "generated")]
        axes = f"--axes={','.join(self.axes)}"
        return command_line("ablate", self.run, axes, f"--seeds={seeds}", *counts, *options, *self.words)

    def train_command(self, setting: Setting) -> str:
        """Return the command that trains a setting outside the sweep (then on held-out videos, too)."""
        changes = {key: "null" if value is None else value for key, value in setting.overrides.items()}
        words = [f"{key}={value}" for key, value in changes.items()]
        places = [f"run.seed={self.seeds[0]}", f"run.dir=runs/{setting.run}"]
        return command_line("train", self.run, *self.words, *words, *places)

    def folder(self, setting: Setting, seed: int) -> Path:
        """Return the folder of a run."""
        return self.out / setting.run / f"seed-{seed}"


@dataclass(frozen=True)
class Point:
    """One line of results.jsonl: run, step, seconds of training so far, a value (or None) per metric."""

    setting: str
    seed: int
    step: int
    seconds: float
    values: dict[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the line as plain data, the metrics beside the rest."""
        return {
            "setting": self.setting,
            "seed": self.seed,
            "step": self.step,
            **self.values,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Point":
        """Return the point of a line, also of version 0.1.0, where a setting is an arm."""
        setting = line["setting"] if "setting" in line else line["arm"]
        values = {name: line.get(name) for name in METRICS}
        return cls(setting, line["seed"], line["step"], line["seconds"], values)


Points = Mapping[tuple[str, int], Mapping[int, Point]]
"""(run of a setting, seed) -> step -> Point."""


def base_config(config: RunConfig) -> RunConfig:
    """Return a recipe as the base of a sweep: no samples, one checkpoint, no folder or seed of its own."""
    return replace(
        config,
        train=replace(
            config.train, sample_every=0, score_every=0, validate_every=0, keep_best=None, keep_last=1
        ),
        run=replace(config.run, dir=None, seed=0),
    )


def read_points(out: Path) -> dict[tuple[str, int], dict[int, Point]]:
    """Return the points of results.jsonl. Incomplete lines of a killed process are skipped."""
    found: dict[tuple[str, int], dict[int, Point]] = {}
    for path in [out / RESULTS, *sorted(out.glob(PART.format("*")))]:
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                point = Point.from_json(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue
            found.setdefault((point.setting, point.seed), {})[point.step] = point
    return found


def merge_points(plan: Plan, runs: Iterable[tuple[str, int]]) -> None:
    """Write the points that several processes have added into one file, in the order of ``runs`` (setting,
    seed) and steps; do nothing without any.
    """
    parts = list(plan.out.glob(PART.format("*")))
    if not parts:
        return
    points = read_points(plan.out)
    order = dict.fromkeys([*runs, *points])
    lines = [points[run][step].to_json() for run in order for step in sorted(points.get(run, {}))]
    with reported("the results", plan.out / RESULTS):
        commit_file(plan.out / RESULTS, "".join(json.dumps(line) + "\n" for line in lines))
        for path in parts:
            path.unlink()


def append(path: Path, point: Point) -> None:
    """Add a line, on the disk before this returns; RunError when it cannot be written."""
    with reported("the results", path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(point.to_json()) + "\n")
        file.flush()
        os.fsync(file.fileno())


def missing_steps(plan: Plan, points: Points, setting: Setting, seed: int) -> list[int]:
    """Return the steps of a run that are not measured yet."""
    return [step for step in plan.steps if step not in points.get((setting.run, seed), {})]


def check_same_sweep(plan: Plan, digests: Sequence[str]) -> dict[str, Any]:
    """Return what all runs of the folder share; InputError with every difference from its earlier runs.

    ``digests``: of the training clips, none when nothing is to be trained.
    """
    file = plan.out / COMMON
    common = plan.common()
    if digests:
        common["training clips"] = sorted(set(digests))
    if not file.exists():
        return common
    try:
        earlier = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}); give another --out") from error
    if "--graded" in earlier:  # of version 0.1.0
        earlier["--generated"] = earlier.pop("--graded")
    lines = [
        f"  {key}: the folder has {earlier.get(key)!r}, you gave {value!r}"
        for key, value in common.items()
        if key in earlier and earlier[key] != value
    ]
    if lines:
        first = f"--out {plan.out} holds a sweep with other settings; use the same ones, or another --out:"
        raise InputError("\n".join([first, *lines]))
    return common


def summary(plan: Plan, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Return an entry per setting: medians and ranges over the seeds that reached the last step, or None."""
    points = read_points(plan.out)
    entries = []
    for setting in settings:
        runs = {seed: points.get((setting.run, seed), {}).get(plan.steps[-1]) for seed in plan.seeds}
        last = {seed: point for seed, point in runs.items() if point is not None}
        entry: dict[str, Any] = {
            "name": setting.name,
            "axis": setting.axis,
            "run": str(plan.out / setting.run),
            "baseline": setting.run == BASELINE,
            "seeds": list(last),
            "parameters": setting.cost.parameters,
            "operations": setting.cost.operations,
            "seconds": round(median(point.seconds for point in last.values()), 1) if last else None,
        }
        for name, metric in METRICS.items():
            found = (point.values[name] for point in last.values())
            values = [value for value in found if value is not None]
            entry[name] = median(values) if values else None
            entry[metric.range_key] = [min(values), max(values)] if values else None
        entries.append(entry)
    return entries
