# SPDX-License-Identifier: Apache-2.0
"""The sweep as one HTML page: per axis the curves, the arms with their cost, and the paper's conclusions beside what was measured here."""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from latte import __version__
from latte import page as report
from latte.ablate.axes import BASELINE, Arm, LeftOut
from latte.ablate.results import FINDINGS, RULE, UNMEASURED, Claim, Finding, verdict
from latte.ablate.sweep import RANGES, Plan, Point, read_points, summary
from latte.data.datasets import DataConfig
from latte.diffusion.loss import OBJECTIVES

Points = Mapping[tuple[str, int], Mapping[int, Point]]
MEASURES = {"heldout_loss": 1, "label_accuracy": -1, "score": 1}  # 1: lower values are better


def values(points: Points, arm: Arm, plan: Plan, measure: str, step: int) -> dict[int, float]:
    """Seed -> what was measured of ``arm`` at ``step``, for the seeds that have it."""
    found = {seed: points.get((arm.run, seed), {}).get(step) for seed in plan.seeds}
    numbers = {seed: getattr(point, measure) for seed, point in found.items() if point is not None}
    return {seed: number for seed, number in numbers.items() if number is not None}


def trace(name: str, steps: Sequence[int], at: Callable[[int], Mapping[int, float]]) -> report.Series:
    """The median over seeds of ``at(step)`` as a line; at every point it goes down to the lowest seed and up to the highest, too."""
    x: list[float] = []
    y: list[float] = []
    for step in steps:
        if numbers := list(at(step).values()):
            middle = median(numbers)
            line = [middle, min(numbers), max(numbers), middle] if len(numbers) > 1 else [middle]
            x += [step] * len(line)
            y += line
    return report.Series(name, x, y)


def yardstick(arm: Arm) -> tuple[DataConfig, bool]:
    """Held-out losses of two arms can be compared when this is the same: the clips, and the path along which noise is added."""
    return arm.config.data, OBJECTIVES[arm.config.diffusion.objective].prediction == "flow"


def label(arm: Arm) -> str:
    """The arm's name, marked when it is the baseline."""
    return f"{arm.name} (baseline)" if arm.run == BASELINE else arm.name


def curves(points: Points, arms: Sequence[Arm], plan: Plan) -> Iterator[report.Html]:
    """The held-out loss, its difference from the baseline's, label obedience and the built-in score, as far as they are measured."""
    caption = (
        "Line: median over seeds; upright strokes: lowest to highest seed."
        if len(plan.seeds) > 1
        else "One seed."
    )
    axis, base = arms[0].axis, next(arm for arm in arms if arm.run == BASELINE)

    def read(arm: Arm, measure: str) -> Callable[[int], dict[int, float]]:
        return lambda step: values(points, arm, plan, measure, step)

    def gap(arm: Arm, step: int) -> dict[int, float]:
        mine, theirs = read(arm, "heldout_loss")(step), read(base, "heldout_loss")(step)
        return {seed: mine[seed] - theirs[seed] for seed in mine if seed in theirs}

    alike = [arm for arm in arms if yardstick(arm) == yardstick(base)]
    ordered = [
        *alike,
        *(arm for arm in arms if arm not in alike),
    ]  # so that an arm has one colour in all plots
    losses = [trace(label(arm), plan.steps, read(arm, "heldout_loss")) for arm in ordered]
    gaps = [trace(label(arm), plan.steps, partial(gap, arm)) for arm in alike]
    obeyed = [trace(label(arm), plan.steps, read(arm, "label_accuracy")) for arm in ordered]
    scored = [trace(label(arm), plan.steps, read(arm, "score")) for arm in ordered]
    if any(one.x for one in losses):
        yield report.line_plot(
            f"{axis}: held-out loss", losses, "step", "held-out loss", log_y=True, caption=caption
        )
    if any(one.x for one in gaps[1:]):
        name = f"{axis}: held-out loss less that of {base.name}"
        yield report.line_plot(
            name, gaps, "step", "difference", caption=f"Seed by seed; below 0 is better. {caption}"
        )
    if any(y for one in obeyed for y in one.y):
        yield report.line_plot(f"{axis}: label obedience", obeyed, "step", "share of clips", caption=caption)
    elif any(one.x for one in obeyed):
        yield report.prose(
            "Label obedience is 0 for every arm at every point: so short a training of so small a model draws no clear shape."
        )
    if any(one.x for one in scored):
        yield report.line_plot(
            f"{axis}: built-in score",
            scored,
            "step",
            "built-in score",
            log_y=True,
            caption=f"Less is better. {caption}",
        )


def ranged(middle: float | None, spread: Sequence[float] | None) -> str:
    """'0.31 (0.3 to 0.33)'; a dash for nothing, one number for one seed."""
    if middle is None or spread is None:
        return "-"
    low, high = spread
    return report.number(middle) + (f" ({report.number(low)} to {report.number(high)})" if low < high else "")


def costs(arms: Sequence[Arm], entries: Sequence[Mapping[str, Any]]) -> report.Html:
    """The table of the arms: what they cost and where they ended."""
    columns = [
        "arm",
        "parameters",
        "operations per clip",
        "training, s",
        "held-out loss",
        "label obedience",
        "built-in score",
        "seeds",
    ]
    rows = [
        (
            label(arm),
            entry["parameters"],
            entry["operations"],
            "-" if entry["seconds"] is None else report.number(entry["seconds"]),
            *(ranged(entry[measure], entry[RANGES[measure]]) for measure in MEASURES),
            len(entry["seeds"]),
        )
        for arm, entry in zip(arms, entries, strict=True)
    ]
    return report.table(columns, rows)


def judged(claim: Claim, arms: Sequence[Arm], points: Points, plan: Plan) -> tuple[str, ...]:
    """A row: the claim, where the paper makes it, and the verdict by each measure."""
    step, named, row = plan.steps[0 if claim.early else -1], {arm.name: arm for arm in arms}, []
    alike = len({yardstick(named[name]) for pair in claim.pairs for name in pair if name in named}) == 1
    for measure, sign in MEASURES.items():
        found = {arm.name: values(points, arm, plan, measure, step) for arm in arms}
        row.append(verdict(claim.pairs, found, sign) if alike or measure != "heldout_loss" else UNMEASURED)
    return claim.text, claim.place, *row


def claims(finding: Finding, arms: Sequence[Arm], points: Points, plan: Plan) -> list[tuple[str, ...]]:
    """The rows of an axis."""
    return [judged(claim, arms, points, plan) for claim in finding.claims_about([arm.name for arm in arms])]


VERDICTS = [
    "the paper concludes",
    "where",
    "here, by held-out loss",
    "here, by label obedience",
    "here, by built-in score",
]


def axis_section(
    axis: str, arms: Sequence[Arm], left: Sequence[LeftOut], points: Points, plan: Plan
) -> report.Html:
    """Everything about one axis."""
    mine = [arm for arm in arms if arm.axis == axis]
    finding = FINDINGS.get(axis, Finding())
    rows = claims(finding, mine, points, plan)
    absent = [(one.name, one.reason) for one in left if one.axis == axis]
    trainable = [plan.train_command(arm) for arm in mine if arm.mapping is None]
    return report.section(
        f"Axis {axis}",
        *([report.prose(finding.note)] if finding.note else []),
        *curves(points, mine, plan),
        costs(mine, summary(plan, mine)),
        *(
            [report.table(VERDICTS, rows)]
            if rows
            else [report.prose("The paper draws no conclusion about this axis.")]
        ),
        *([report.prose("Left out:"), report.table(["arm", "why"], absent)] if absent else []),
        report.prose("One run of each arm, by itself:"),
        report.command("\n".join(trainable)),
    )


def method(plan: Plan, arms: Sequence[Arm]) -> report.Html:
    """How it was measured, and by which rule the verdicts are given."""
    base = plan.base
    if base.data.kind == "procedural":
        source = "procedural clips of a seed that no training draws"
    else:
        source = "the tenth of the videos with the smallest hashes of their names, which no arm is trained on"
    graded = ""
    if any(entry["label_accuracy"] is not None for entry in summary(plan, arms)):
        graded = (
            f" Label obedience: the share of {plan.graded} generated clips ({base.sample.sampler}, {base.sample.steps} steps, "
            f"guidance {base.sample.guidance:g}) whose shape moves where the label says."
        )
    steps = ", ".join(f"{step:,}" for step in plan.steps)
    if any(entry["score"] is not None for entry in summary(plan, arms)):
        graded += (
            f" Built-in score: Frechet distance of the built-in detector's features, {plan.graded} generated clips to as many "
            "training clips; with so few it is high for perfect clips, too, and compares with nothing but this page."
        )
    text = (
        f"Every run has {plan.steps[-1]:,} steps of {base.train.global_batch} clips; of one seed all arms see the same clips in the "
        f"same order. Measured after {steps} steps with the averaged weights. Held-out loss: mean squared error of the predicted "
        f"noise on {plan.heldout} clips ({source}); clips, timesteps and noise are the same for all."
    )
    return report.section(
        "How it was measured", report.prose(text + graded), report.prose(RULE), report.command(plan.command())
    )


def show(plan: Plan, arms: Sequence[Arm], left: Sequence[LeftOut], device: torch.device) -> report.Html:
    """The page, of whatever has been measured so far."""
    points = read_points(plan.out)
    runs = {(arm.run, seed): points.get((arm.run, seed), {}) for arm in arms for seed in plan.seeds}
    done = [found[plan.steps[-1]] for found in runs.values() if plan.steps[-1] in found]
    rows = [
        (axis, *row)
        for axis in plan.axes
        for row in claims(
            FINDINGS.get(axis, Finding()), [arm for arm in arms if arm.axis == axis], points, plan
        )
    ]
    seconds = sum(max((point.seconds for point in found.values()), default=0.0) for found in runs.values())
    machine = {
        "device": device,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "latte": __version__,
    }
    return report.page(
        f"Ablation of {plan.run}",
        f"{', '.join(plan.axes)}: {len({arm.run for arm in arms})} arms, {len(plan.seeds)} seeds; the paper's conclusions beside ours.",
        report.tiles(
            {
                "runs finished": f"{len(done)} of {len(runs)}",
                "steps each": f"{plan.steps[-1]:,}",
                "seconds of training in all": f"{seconds:,.0f}",
            }
        ),
        *(
            [report.section("The paper's conclusions", report.table(["axis", *VERDICTS], rows))]
            if rows
            else []
        ),
        method(plan, arms),
        *(axis_section(axis, arms, left, points, plan) for axis in plan.axes),
        report.section("This machine", report.table(["", ""], list(machine.items()))),
    )
