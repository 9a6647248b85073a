# SPDX-License-Identifier: Apache-2.0
"""The sweep as an HTML page: per axis the curves, the settings, their cost, the paper's conclusions."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from latte import __version__
from latte.ablate.axes import BASELINE, LeftOut, Setting
from latte.ablate.claims import CONCLUSIONS, RULE, UNMEASURED, Claim, Conclusions, verdict
from latte.ablate.metrics import CLIPS, METRICS, Metric
from latte.ablate.plan import Plan, Points, read_points, summary
from latte.page import html as page
from latte.page import plots

CLIP_WIDTH = 112  # pixels on the page
Values = Mapping[int, float]
"""Seed -> value."""


def verdict_columns() -> list[str]:
    """Return the titles of a table of verdicts."""
    return ["the paper concludes", "where", *(f"here, by {metric.title}" for metric in METRICS.values())]


def values(points: Points, setting: Setting, plan: Plan, metric: str, step: int) -> dict[int, float]:
    """Return the metric of ``setting`` at ``step`` for the seeds that have it."""
    found = {}
    for seed in plan.seeds:
        point = points.get((setting.run, seed), {}).get(step)
        value = None if point is None else point.values[metric]
        if value is not None:
            found[seed] = value
    return found


def trace(name: str, by_step: Mapping[int, Values]) -> plots.Series:
    """Return the median over seeds as a line; at each point it touches the lowest and highest seed."""
    x: list[float] = []
    y: list[float] = []
    for step, by_seed in by_step.items():
        numbers = list(by_seed.values())
        if not numbers:
            continue
        middle = median(numbers)
        line = [middle]
        if len(numbers) > 1:
            line = [middle, min(numbers), max(numbers), middle]
        x += [step] * len(line)
        y += line
    return plots.Series(name, x, y)


def label(setting: Setting) -> str:
    """Return the setting's name, marked when it is the baseline."""
    if setting.run == BASELINE:
        return f"{setting.name} (baseline)"
    return setting.name


def curves(points: Points, settings: Sequence[Setting], plan: Plan) -> Iterator[page.Html]:
    """Yield a plot per measured metric, and of its difference from the baseline where it has one."""
    base = next(setting for setting in settings if setting.run == BASELINE)
    alike = {
        name: [s for s in settings if m.comparable(s) == m.comparable(base)] for name, m in METRICS.items()
    }
    fewest = min(alike.values(), key=len)
    # Settings that every metric compares come first, so that a setting has one colour in all plots.
    ordered = [*fewest, *(setting for setting in settings if setting not in fewest)]
    for name, metric in METRICS.items():
        by_run = {
            setting.run: {step: values(points, setting, plan, name, step) for step in plan.steps}
            for setting in ordered
        }
        yield from metric_plot(metric, ordered, by_run, plan)
        if metric.difference:
            yield from difference_plot(metric, alike[name], base, by_run, plan)


def caption(plan: Plan) -> str:
    """Return how to read the lines of a plot."""
    if len(plan.seeds) > 1:
        return "Line: median over seeds; vertical strokes: lowest to highest seed."
    return "One seed."


def metric_plot(
    metric: Metric, settings: Sequence[Setting], by_run: Mapping[str, Mapping[int, Values]], plan: Plan
) -> Iterator[page.Html]:
    """Yield the curves of one metric, or a sentence when it is 0 everywhere."""
    lines = [trace(label(setting), by_run[setting.run]) for setting in settings]
    title = f"{settings[0].axis}: {metric.title}"
    direction = "Lower is better." if metric.lower_is_better else "Higher is better."
    if any(y for line in lines for y in line.y):
        yield plots.line_plot(
            title,
            lines,
            "step",
            metric.unit or metric.title,
            log_y=metric.log_scale,
            caption=f"{direction} {caption(plan)}",
        )
    elif any(line.x for line in lines):
        yield page.prose(
            f"{metric.title.capitalize()} is 0 for every setting at every point: such a short training of "
            "such a small model generates no clear shape."
        )


def difference_plot(
    metric: Metric,
    settings: Sequence[Setting],
    base: Setting,
    by_run: Mapping[str, Mapping[int, Values]],
    plan: Plan,
) -> Iterator[page.Html]:
    """Yield the curves of the difference from the baseline, seed by seed."""
    lines = []
    for setting in settings:
        gaps = {
            step: {
                seed: value - by_run[base.run][step][seed]
                for seed, value in by_seed.items()
                if seed in by_run[base.run][step]
            }
            for step, by_seed in by_run[setting.run].items()
        }
        lines.append(trace(label(setting), gaps))
    if any(line.x for line in lines[1:]):
        title = f"{base.axis}: {metric.title} minus that of {base.name}"
        text = f"Seed by seed; below 0 is better. {caption(plan)}"
        yield plots.line_plot(title, lines, "step", "difference", caption=text)


def ranged(middle: float | None, spread: Sequence[float] | None) -> str:
    """Return '0.31 (0.3 to 0.33)', a dash for nothing, one number for one seed."""
    if middle is None or spread is None:
        return "-"
    low, high = spread
    text = page.number(middle)
    if low < high:
        text += f" ({page.number(low)} to {page.number(high)})"
    return text


def costs(settings: Sequence[Setting], entries: Sequence[Mapping[str, Any]]) -> page.Html:
    """Return the table of the settings: what they cost and where they ended."""
    titles = [metric.title for metric in METRICS.values()]
    columns = ["setting", "parameters", "operations per clip", "training, s", *titles, "seeds"]
    rows = []
    for setting, entry in zip(settings, entries, strict=True):
        seconds = "-" if entry["seconds"] is None else page.number(entry["seconds"])
        measured = [ranged(entry[name], entry[metric.range_key]) for name, metric in METRICS.items()]
        cost = (entry["parameters"], entry["operations"], seconds)
        rows.append((label(setting), *cost, *measured, len(entry["seeds"])))
    return page.table(columns, rows)


def judged(claim: Claim, settings: Sequence[Setting], points: Points, plan: Plan) -> tuple[str, ...]:
    """Return a row: the claim, where the paper makes it, and the verdict by each metric."""
    step = plan.steps[0] if claim.early else plan.steps[-1]
    by_name = {setting.name: setting for setting in settings}
    involved = [by_name[name] for pair in claim.pairs for name in pair if name in by_name]
    row = [claim.text, claim.place]
    for name, metric in METRICS.items():
        found = {setting.name: values(points, setting, plan, name, step) for setting in settings}
        alike = len({metric.comparable(setting) for setting in involved}) <= 1
        row.append(verdict(claim.pairs, found, metric.sign) if alike else UNMEASURED)
    return tuple(row)


def claims(
    conclusions: Conclusions, settings: Sequence[Setting], points: Points, plan: Plan
) -> list[tuple[str, ...]]:
    """Return the rows of an axis."""
    names = [setting.name for setting in settings]
    return [judged(claim, settings, points, plan) for claim in conclusions.claims_about(names)]


def clips(settings: Sequence[Setting], plan: Plan) -> list[page.Html]:
    """Return the newest kept clips of every setting, those of the same seed and label in the same place."""
    seed = plan.seeds[0]
    rows = []
    for setting in settings:
        files = sorted((plan.folder(setting, seed) / CLIPS).glob("*.mp4"))
        if files:
            shown = (page.media(path, f"clip {path.stem}", width=CLIP_WIDTH) for path in files)
            rows += [page.tag("h3", {}, label(setting)), page.gallery(*shown)]
    if rows:
        rows.insert(0, page.prose(f"Generated clips of training seed {seed}, the same seeds and labels:"))
    return rows


def axis_section(
    axis: str, settings: Sequence[Setting], left: Sequence[LeftOut], points: Points, plan: Plan
) -> page.Html:
    """Return everything about one axis."""
    chosen = [setting for setting in settings if setting.axis == axis]
    conclusions = CONCLUSIONS.get(axis, Conclusions())
    parts: list[page.Html] = []
    if conclusions.note:
        parts.append(page.prose(conclusions.note))
    parts += [*curves(points, chosen, plan), costs(chosen, summary(plan, chosen)), *clips(chosen, plan)]
    if rows := claims(conclusions, chosen, points, plan):
        parts.append(page.table(verdict_columns(), rows))
    else:
        parts.append(page.prose("The paper draws no conclusion about this axis."))
    if absent := [(one.name, one.reason) for one in left if one.axis == axis]:
        parts += [page.prose("Left out:"), page.table(["setting", "why"], absent)]
    commands = [plan.train_command(setting) for setting in chosen if setting.mapping is None]
    parts += [page.prose("To train one run of each setting by itself:"), page.command("\n".join(commands))]
    return page.section(f"Axis {axis}", *parts)


def method(plan: Plan, settings: Sequence[Setting]) -> page.Html:
    """Return how it was measured, and by which rule the verdicts are given."""
    base = plan.base
    source = "the tenth of the videos with the smallest hashes of their names, which no setting trains on"
    if base.data.kind == "procedural":
        source = "procedural clips of a seed that no training uses"
    steps = ", ".join(f"{step:,}" for step in plan.steps)
    text = (
        f"Every run has {plan.steps[-1]:,} steps of {base.train.global_batch} clips; with the same seed "
        f"all settings see the same clips in the same order. Measured after {steps} steps with the EMA "
        f"weights. Held-out loss: mean squared error of the predicted noise on {plan.heldout} clips "
        f"({source}); clips, timesteps and noise are the same for all. Clips are generated with "
        f"{base.sample.sampler}, {base.sample.steps} steps, guidance {base.sample.guidance:g}."
    )
    entries = summary(plan, settings)
    for name, metric in METRICS.items():
        if metric.explanation and any(entry[name] is not None for entry in entries):
            text += " " + metric.explanation.format(count=plan.generated)
    parts = (page.prose(text), page.prose(RULE), page.command(plan.command()))
    return page.section("How it was measured", *parts)


def show(plan: Plan, settings: Sequence[Setting], left: Sequence[LeftOut], device: torch.device) -> page.Html:
    """Return the page, of whatever has been measured so far."""
    points = read_points(plan.out)
    runs = {
        (setting.run, seed): points.get((setting.run, seed), {})
        for setting in settings
        for seed in plan.seeds
    }
    done = [found for found in runs.values() if plan.steps[-1] in found]
    rows = []
    for axis in plan.axes:
        chosen = [setting for setting in settings if setting.axis == axis]
        rows += [(axis, *row) for row in claims(CONCLUSIONS.get(axis, Conclusions()), chosen, points, plan)]
    seconds = sum(max((point.seconds for point in found.values()), default=0.0) for found in runs.values())
    machine = {
        "device": device,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "latte": __version__,
    }
    tiles = {
        "runs finished": f"{len(done)} of {len(runs)}",
        "steps each": f"{plan.steps[-1]:,}",
        "seconds of training in total": f"{seconds:,.0f}",
    }
    parts = [page.tiles(tiles)]
    if rows:
        parts.append(page.section("The paper's conclusions", page.table(["axis", *verdict_columns()], rows)))
    parts.append(method(plan, settings))
    parts += [axis_section(axis, settings, left, points, plan) for axis in plan.axes]
    parts.append(page.section("This machine", page.table(["", ""], list(machine.items()))))
    num_settings = len({setting.run for setting in settings})
    lead = f"{', '.join(plan.axes)}: {num_settings} settings, {len(plan.seeds)} seeds."
    return page.page(f"Ablation of {plan.run}", lead, *parts)
