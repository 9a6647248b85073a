# SPDX-License-Identifier: Apache-2.0
"""What the files of a run folder report about the run, whether it is complete, being written or of an older
version: settings, curves, scores, samples.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from latte.checkpoint.run import STATE, list_checkpoints
from latte.checks import InputError, beside, check, nearest, printable
from latte.data.skipped import reasons
from latte.training.callbacks import step_of

SAMPLES = "samples"  # folders of a run
SCORES = "scores"
Line = Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """A run so far. Lines are those of the files, steps ascending."""

    folder: Path
    name: str  # of the folder
    config: Mapping[str, Any]  # config.yaml
    metrics: Sequence[Line]  # metrics.jsonl
    held_out: Sequence[Line]  # lines of validation.jsonl with the held-out loss
    scores: Sequence[Line]  # its lines with scores, each with its manifest if there is one
    samples: Mapping[int, Sequence[Path]]  # step -> clips, or the sheet where an older version wrote no clips

    @property
    def step(self) -> int:
        """The last step with a line, 0 without any."""
        return max((line["step"] for line in (*self.metrics, *self.held_out)), default=0)

    def values(self, key: str) -> tuple[list[float], list[float]]:
        """Return (steps, values) of the metrics' lines that have ``key``."""
        return column(self.metrics, key)


def column(lines: Sequence[Line], key: str) -> tuple[list[float], list[float]]:
    """Return (steps, values) of the lines that have a number under ``key``."""
    found = [line for line in lines if isinstance(line.get(key), int | float)]
    return [line["step"] for line in found], [line[key] for line in found]


def read_history(folder: Path) -> History:
    """Return what is there of a run; InputError for a folder without a readable config.yaml."""
    name = printable(str(folder))
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = "does not exist"
        hint = nearest(name, map(printable, beside(folder)))
        if folder.exists():
            reason = f"has no config.yaml that can be read ({type(error).__name__})"
            hint = ""
        raise InputError(f"{name} {reason}; give a run folder, which latte train writes{hint}") from None
    check(isinstance(config, dict), f"{name}: config.yaml holds no settings; give a run folder")
    lines = list(read_lines(folder / "validation.jsonl"))
    scores = [with_manifest(folder, line) for line in lines if any(key.startswith("score/") for key in line)]
    return History(
        folder,
        printable(folder.resolve().name),
        config,
        list(read_lines(folder / "metrics.jsonl")),
        [line for line in lines if "validation/loss" in line],
        scores,
        dict(samples_of(folder)),
    )


def check_comparable(run: History) -> None:
    """InputError for a run without anything to compare."""
    name = printable(str(run.folder))
    every = (run.config.get("train") or {}).get("log_every", "some")
    check(
        bool(run.metrics),
        f"{name} has no metrics yet; wait until it has trained {every} steps, or leave it out",
    )
    check(
        bool(run.values("loss")[0]),
        f"{name} was written by another version of latte: metrics.jsonl has {', '.join(run.metrics[-1])}, "
        "but no loss; leave it out",
    )


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the complete lines of a .jsonl file that have a step; nothing for a missing file."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines(keepends=True):
        if step_of(line) < float("inf"):
            yield json.loads(line)


def with_manifest(folder: Path, line: Line) -> Line:
    """Return a line of scores with the evaluation's results (metric, interval, ...) if they were kept."""
    path = folder / SCORES / f"step-{line['step']:07d}" / "manifest.json"
    return {**line, **read_json(path)}


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file that holds a mapping; {} for a missing or damaged one."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def samples_of(folder: Path) -> Iterator[tuple[int, list[Path]]]:
    """Yield (step, clips) of the samples, the sheet alone where there are no clips."""
    for sheet in sorted((folder / SAMPLES).glob("step-*.png")):
        number = sheet.stem.removeprefix("step-")
        if number.isdecimal():
            yield int(number), sorted(sheet.with_suffix("").glob("*.mp4")) or [sheet]


def data_rows(run: History) -> list[tuple[str, str]]:
    """Return what is known about the data: settings, numbers of clips and classes, skipped files."""
    settings = run.config.get("data") or {}
    rows = [(str(key), text(value)) for key, value in settings.items() if value is not None]
    checkpoints = list_checkpoints(run.folder)
    facts = read_json(checkpoints[-1] / STATE).get("facts", {}).get("data", {}) if checkpoints else {}
    for name, key in (("clips to train on", "clips"), ("classes", "classes")):
        if facts.get(key):
            rows.append((name, text(facts[key])))
    measured = (run.config.get("train") or {}).get("validate_clips")
    if run.held_out and measured:
        rows.append(("held-out loss measured on", f"at most {measured} clips"))
    try:
        lines = (run.folder / "skipped.jsonl").read_text("utf-8").splitlines()
        skipped = [json.loads(line) for line in lines]
        rows.append(("skipped files", f"{len(skipped)} ({reasons(skipped)}), see skipped.jsonl"))
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # no file was skipped, or the list is damaged
    return rows


def environment_rows(run: History) -> list[tuple[str, str]]:
    """Return when, where and with what the run was started last, and its command."""
    found = read_json(run.folder / "env.json")
    packages = found.pop("packages", {})
    rows = [(key, text(value)) for key, value in found.items() if value is not None]
    if isinstance(packages, dict):
        rows.append(("packages", ", ".join(f"{name} {version}" for name, version in packages.items())))
    return rows


def text(value: object) -> str:
    """Return plain data as text: '8', '64 x 64' would be '64, 64', a mapping as JSON."""
    if isinstance(value, list | tuple):
        shown = ", ".join(text(part) for part in value[:12])
        return f"{shown}, ... ({len(value)})" if len(value) > 12 else shown
    if isinstance(value, Mapping):
        return json.dumps(value)
    return printable(str(value))
