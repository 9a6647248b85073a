# SPDX-License-Identifier: Apache-2.0
"""Runs side by side on one page: curves overlaid, scores and whether they differ, clips of the same seed,
settings that differ.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from latte.checks import InputError, check, printable
from latte.evaluation.evaluate import EvaluateConfig
from latte.evaluation.manifest import compare, read_report
from latte.evaluation.metrics import METRICS
from latte.evaluation.protocols import Protocol
from latte.evaluation.scores import half_sample_interval
from latte.files import commit_file, reported
from latte.page import html
from latte.training.history import SCORES, History, check_comparable, column, read_history, read_json
from latte.training.report import curves, first_score, sample_parts, score_parts, score_title
from latte.training.resume import DEFAULTS, flatten

LEVEL = 0.95  # of the interval of a difference
UNCOMPARED = ("run.dir", "started", "commit")
MOST_RUNS = 12


@dataclass(frozen=True)
class Difference:
    """The score of ``run`` minus that of ``base`` at a step of both; without ``value`` the note says why."""

    base: str
    run: str
    step: int
    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def significant(self) -> bool | None:
        """Whether the interval of the difference leaves out 0; None if there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0


def open_runs(folders: Sequence[Path]) -> list[History]:
    """Return the runs, with names that differ; InputError with a line for each that cannot be compared."""
    check(len(folders) <= MOST_RUNS, f"{len(folders)} runs are too many for a page; give at most {MOST_RUNS}")
    found = []
    problems = []
    for folder in folders:
        try:
            run = read_history(folder)
            check_comparable(run)
            found.append(run)
        except InputError as error:
            problems.append(str(error))
    resolved = [run.folder.resolve() for run in found]
    if len(set(resolved)) < len(resolved):
        problems.append("the same run folder was given twice; leave one out")
    if problems:
        raise InputError("\n".join(problems))
    names = [run.name for run in found]
    same = [run for run in found if names.count(run.name) > 1]
    return [replace(run, name=printable(str(run.folder))) if run in same else run for run in found]


def write_comparison(runs: Sequence[History], path: Path) -> list[Difference]:
    """Write the page of several runs and return the differences of their scores from the first run's."""
    found = differences(runs)
    steps = ", ".join(f"{run.name} at step {run.step:,}" for run in runs)
    parts = [html.table(list(summaries(runs)[0]), [list(row.values()) for row in summaries(runs)])]
    parts += [*curves(runs), *score_parts(runs)]
    if found:
        parts.append(html.section("Differences of scores", *difference_parts(runs, found)))
    if clips := sample_parts(runs):
        parts.append(html.section("Samples of the same seeds", *clips))
    rows = setting_rows(runs)
    names = [run.name for run in runs]
    parts.append(html.section("Settings that differ", html.table(["setting", *names], rows)))
    page = html.page(f"{len(runs)} runs compared", f"{steps}.", *parts)
    with reported("the comparison", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        commit_file(path, page)
    return found


def summaries(runs: Sequence[History]) -> list[dict[str, object]]:
    """Return for each run: name, step, newest loss, best held-out loss, newest score, speed, time."""
    rows = []
    for run in runs:
        losses = column(run.held_out, "validation/loss")[1]
        loss_steps, values = run.values("loss")
        loss = html.number(values[-1])
        if loss_steps[-1] < run.step:
            loss += f" (step {loss_steps[-1]:,})"
        row: dict[str, object] = {"run": run.name, "step": run.step, "loss": loss}
        row["lowest held-out loss"] = html.number(min(losses)) if losses else "-"
        row["newest score"] = "-"
        if run.scores:
            key = first_score(run.scores[-1])
            row["newest score"] = f"{html.number(run.scores[-1][key])} ({score_title(run.scores[-1], key)})"
        for name, key in (("clips a second", "clips_per_second"), ("seconds", "seconds")):
            values = run.values(key)[1]
            row[name] = html.number(values[-1]) if values else "-"
        rows.append(row)
    return rows


def setting_rows(runs: Sequence[History]) -> list[tuple[str, ...]]:
    """Return (key, value of each run) of the settings, the device and the versions that are not all equal."""
    flat = [flatten(run.config) | flatten(read_json(run.folder / "env.json")) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key not in UNCOMPARED)
    rows = [(key, *(values.get(key, DEFAULTS.get(key, "-")) for values in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def differences(runs: Sequence[History]) -> list[Difference]:
    """Return the difference of each run's score from the first run's, at the newest step of both."""
    found = []
    base = runs[0]
    for run in runs[1:]:
        shared = {line["step"] for line in base.scores} & {line["step"] for line in run.scores}
        if shared:
            found.append(difference(base, run, max(shared)))
        elif base.scores and run.scores:
            found.append(Difference(base.name, run.name, 0, note="the runs have no scored step in common"))
    return found


def difference(base: History, run: History, step: int) -> Difference:
    """Return the difference at ``step``, with an interval if the features of both were kept.

    Both halves of the same real clips are scored against halves of both fakes, with clips of the same seed
    in the same half (see ``half_sample_interval``), so that what both share cancels.
    """
    folders = [one.folder / SCORES / f"step-{step:07d}" for one in (base, run)]
    result = Difference(base.name, run.name, step)
    try:
        first, second = (read_report(folder / "manifest.json") for folder in folders)
        compared = compare(second, first, base.name)
        real, fake = read_features(folders[0])
        other_real, other_fake = read_features(folders[1])
    except InputError as error:
        return replace(result, note=str(error))
    result = replace(result, value=compared["difference"])
    if not torch.equal(real, other_real) or len(fake) != len(other_fake):
        return replace(result, note="the runs were scored against different clips, or with different numbers")
    config = EvaluateConfig.of(first["replay"]["config"], folders[0])
    metric, protocol = first["metric"], config.chosen_protocol
    interval = paired_interval(metric, protocol, real, fake, other_fake)
    return replace(result, low=interval[0], high=interval[1])


def paired_interval(
    metric: str, protocol: Protocol, real: Tensor, fake: Tensor, other: Tensor
) -> tuple[float, float]:
    """Return the LEVEL interval of score(other) - score(fake), rows (n k) against ``real`` (m k)."""
    width = fake.shape[1]

    def gap(a: Tensor, pair: Tensor) -> float:
        compute = METRICS[metric].compute
        return compute(a, pair[:, width:], protocol) - compute(a, pair[:, :width], protocol)

    found = half_sample_interval(gap, real, torch.cat([fake, other], 1), LEVEL)
    return found.low, found.high


def read_features(folder: Path) -> tuple[Tensor, Tensor]:
    """Return the kept features of both sides (n k), (m k); InputError if they are not there."""
    try:
        real, fake = (
            safetensors.torch.load_file(folder / f"{side}.safetensors")["features"]
            for side in ("real", "fake")
        )
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(
            f"{printable(str(folder))} has no features that can be read ({type(error).__name__})"
        ) from None
    return real, fake


def difference_parts(runs: Sequence[History], found: Sequence[Difference]) -> list[html.Html]:
    """Return the table of the differences and how to read it."""
    rows = []
    for one in found:
        verdict = {True: "significant", False: "not significant", None: one.note}[one.significant]
        interval = "-"
        if one.low is not None and one.high is not None:
            interval = f"{html.number(one.low)} to {html.number(one.high)}"
        value = "-" if one.value is None else html.number(one.value)
        rows.append((f"{one.run} minus {one.base}", one.step, value, interval, verdict))
    text = (
        "Half-subsamples of the same real clips and of both sides, clips of the same seed together. It is "
        "about these two models: another seed of training may give another difference."
    )
    columns = ["scores", "step", "difference", f"{LEVEL:.0%} interval", "verdict"]
    return [html.table(columns, rows), html.prose(text)]


def result_of(runs: Sequence[History], found: Sequence[Difference], path: Path) -> dict[str, Any]:
    """Return what ``latte report --json`` prints."""
    return {
        "report": str(path),
        "runs": [{"run": str(run.folder), "step": run.step, **newest(run)} for run in runs],
        "differences": [{**asdict(one), "significant": one.significant} for one in found],
    }


def newest(run: History) -> Mapping[str, Any]:
    """Return the newest loss, held-out loss and score of a run; None for what it has not."""
    found: dict[str, Any] = {"loss": run.values("loss")[1][-1], "held_out_loss": None, "score": None}
    if run.held_out:
        found["held_out_loss"] = run.held_out[-1]["validation/loss"]
    if run.scores:
        line = run.scores[-1]
        keys = ("step", "protocol", "metric", "interval")
        found["score"] = {"value": line[first_score(line)], **{key: line.get(key) for key in keys}}
    return json.loads(json.dumps(found))
