# SPDX-License-Identifier: Apache-2.0
"""report.html of a run folder: curves, scores, samples over time, settings, data, environment, in one file
that loads nothing from elsewhere.

It is made from the files of the folder alone. ``RunReport`` writes it again while the run trains.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latte.checks import command_line, duration, printable
from latte.files import commit_file, reported
from latte.page import html
from latte.page.plots import Series, line_plot, smooth
from latte.training.callbacks import Callback, TrainEvent
from latte.training.history import SCORES, History, column, data_rows, environment_rows, read_history, text
from latte.training.trackers import one_line

FILE = "report.html"
SHARE = 0.005  # of the time of a run that writing its report may take
INTERVAL = 60.0  # seconds between two reports, unless something new is due
VIDEO_BYTES = 8 << 20  # of embedded clips; base64 makes them a third larger
MOST_STEPS = 24  # of samples that the slider has
MOST_CLIPS = 16  # of a step
SMALL = 128  # pixels that the longer side of a clip gets at least
CURVES = {  # key of metrics.jsonl: title, axis
    "loss": ("Loss", "loss"),
    "grad_norm": ("Gradient norm", "norm before clipping"),
    "lr": ("Learning rate", "learning rate"),
    "clips_per_second": ("Throughput", "clips a second"),
}
SMOOTHED = ("loss", "grad_norm", "clips_per_second")
Changes = tuple[str, Sequence[tuple[str, str, str]]]
"""What settings are compared with, and (key, there, here) of those that differ."""


class RunReport(Callback):
    """Writes report.html at the start, after samples, scores, held-out losses and checkpoints, every
    INTERVAL seconds, and at the end; all but the last at no more than SHARE of the time.

    ``changes`` says which settings of a run folder differ from its recipe. A failure is printed once, and
    training continues.
    """

    def __init__(self, changes: Callable[[Path], Changes] | None = None):
        self.changes = changes
        self.failed = False

    def on_start(self, event: TrainEvent) -> None:
        """Write the page of what is there already."""
        self.started = time.perf_counter()
        self.written = self.started
        self.spent = 0.0
        self.due = False
        self.write(event)

    def on_validation(self, event: TrainEvent, metrics: Mapping[str, float]) -> None:
        """Note that there is something new."""
        self.due = True

    def on_samples(self, event: TrainEvent, paths: Sequence[Path]) -> None:
        """Note that there is something new."""
        self.due = True

    def on_checkpoint(self, event: TrainEvent, path: Path) -> None:
        """Note that there is something new."""
        self.due = True

    def on_step(self, event: TrainEvent) -> None:
        """Write the page, once for all that is new, if that may be done now."""
        now = time.perf_counter()
        due = self.due or (event.metrics is not None and now - self.written >= INTERVAL)
        if due and self.spent <= SHARE * (now - self.started):
            with event.accumulator.pause():
                self.write(event)

    def on_end(self, event: TrainEvent) -> None:
        """Write the page of the whole run."""
        self.write(event)

    def write(self, event: TrainEvent) -> None:
        """Write the page; print the first error."""
        if self.failed:
            return
        began = time.perf_counter()
        try:
            write_report(event.run_dir, self.changes)
        except Exception as error:
            self.failed = True
            print(
                f"warning: {FILE} could not be written at step {event.step} ({one_line(error)}); training "
                f"continues without it, and latte report {printable(str(event.run_dir))} writes it later",
                file=sys.stderr,
            )
        self.due = False
        self.written = time.perf_counter()
        self.spent += self.written - began


def write_report(
    folder: Path, changes: Callable[[Path], Changes] | None = None, path: Path | None = None
) -> Path:
    """Write the page of a run folder, by default as its FILE, and return its path; InputError if it is no
    run folder.
    """
    run = read_history(folder)
    path = path or folder / FILE
    with reported("the report", path):
        commit_file(path, run_page(run, changes(folder) if changes else None))
    return path


def run_page(run: History, changes: Changes | None) -> html.Html:
    """Return the page of one run."""
    total = (run.config.get("train") or {}).get("steps", run.step)
    parts = [html.tiles(headline(run)), *curves([run]), *score_parts([run])]
    if clips := sample_parts([run]):
        parts.append(html.section("Samples", *clips))
    parts += [settings_section(run, changes), html.section("Data", html.table(["", ""], data_rows(run)))]
    parts.append(html.section("Environment", html.table(["", ""], environment_rows(run))))
    following = "train" if run.step < total else "sample"
    parts.append(html.section("Next", html.command(command_line(following, run.folder))))
    return html.page(f"Run {run.name}", f"Step {run.step:,} of {total:,}.", *parts)


def headline(run: History) -> dict[str, object]:
    """Return the newest values for the top of the page."""
    tiles: dict[str, object] = {}
    if run.metrics:
        last = run.metrics[-1]
        for key, name in (("loss", "loss"), ("clips_per_second", "clips a second")):
            if isinstance(last.get(key), int | float):
                if last["step"] < run.step:
                    name += f" at step {last['step']:,}"
                tiles[name] = html.number(last[key])
        if isinstance(last.get("seconds"), int | float):
            tiles["trained for"] = duration(last["seconds"])
    if run.held_out:
        tiles["held-out loss"] = html.number(run.held_out[-1]["validation/loss"])
    if run.scores:
        key = first_score(run.scores[-1])
        tiles[score_title(run.scores[-1], key)] = html.number(run.scores[-1][key])
    return tiles or {"no metrics yet": "-"}


def curves(runs: Sequence[History]) -> list[html.Html]:
    """Return a plot of each metric, and of the held-out loss, with a line for each run."""
    parts = [plot for key in CURVES for plot in metric_plot(runs, key)]
    parts[1:1] = held_out_plots(runs)
    if not parts:
        return []
    return [html.section("Curves", *parts)]


def metric_plot(runs: Sequence[History], key: str) -> list[html.Html]:
    """Return the plot of a metric: its lines, and where they are noisy their running mean."""
    title, axis = CURVES[key]
    lines = []
    window = 1
    for colour, run in enumerate(runs):
        steps, values = run.values(key)
        name = run.name if len(runs) > 1 else "mean"
        if key in SMOOTHED:
            window = max(1, len(values) // 40)
        if window > 1:
            lines.append(Series("", steps, values, faint=True, colour=colour))
            values = smooth(values, window)
        lines.append(Series(name, steps, values, colour=colour))
    if not any(line.x for line in lines):
        return []
    caption = f"Running mean of {window} lines; faint: each line." if window > 1 else ""
    return [line_plot(title, lines, "step", axis, toggle=True, log_y=key == "loss", caption=caption)]


def held_out_plots(runs: Sequence[History]) -> list[html.Html]:
    """Return the plot of the held-out loss, and its parts by ranges of timesteps."""
    keys = [key for key in held_out_keys(runs) if key != "validation/loss"]
    lines = [Series(run.name, *column(run.held_out, "validation/loss")) for run in runs]
    if not any(line.x for line in lines):
        return []
    text = "EMA weights on clips that are not trained on; clips, noise and timesteps are fixed."
    parts = [line_plot("Held-out loss", lines, "step", "loss", toggle=True, caption=text)]
    if not keys:
        return parts
    names = {key: f"timesteps {key.rpartition('_t')[2].replace('-', ' to ')}" for key in keys}
    if len(runs) == 1:
        lines = [Series(name, *column(runs[0].held_out, key)) for key, name in names.items()]
        ranges = [line_plot("Held-out loss by timesteps", lines, "step", "loss", toggle=True)]
    else:
        ranges = [
            line_plot(
                f"Held-out loss, {name}",
                [Series(run.name, *column(run.held_out, key)) for run in runs],
                "step",
                "loss",
            )
            for key, name in names.items()
        ]
        summary = html.tag("summary", {}, "by range of timesteps")
        ranges = [html.tag("details", {}, summary, *ranges)]
    return [*parts, *ranges]


def held_out_keys(runs: Sequence[History]) -> list[str]:
    """Return the names of the held-out losses in the order of the timesteps."""
    keys = dict.fromkeys(key for run in runs for line in run.held_out for key in line)
    return [key for key in keys if key.startswith("validation/loss")]


def first_score(line: Mapping[str, Any]) -> str:
    """Return the key of the score that decides, the first of a line."""
    return next(key for key in line if key.startswith("score/"))


def score_title(line: Mapping[str, Any], key: str) -> str:
    """Return the name of a score: that of the evaluation if it has one."""
    name = key.removeprefix("score/")
    if name == line.get("metric"):
        return str(line.get("title") or f"{name}, protocol {line.get('protocol')}")
    return ", protocol ".join([name, *filter(None, [line.get("protocol")])])


def score_parts(runs: Sequence[History]) -> list[html.Html]:
    """Return the curve of the scores with their intervals, and the table of the newest ones."""
    lines = []
    titles = {}
    for colour, run in enumerate(runs):
        if not run.scores:
            continue
        key = first_score(run.scores[-1])
        titles[score_title(run.scores[-1], key)] = True
        steps, values = column(run.scores, key)
        ends = [line.get("interval") or (line[key], line[key]) for line in run.scores if key in line]
        low, high = ([float(end[k]) for end in ends] for k in (0, 1))
        lines.append(Series(run.name, steps, values, colour=colour, low=low, high=high))
    if not lines:
        return []
    caption = "Of clips of the EMA weights against those that the run trains on. Strokes: 90 % intervals."
    title = " / ".join(titles)
    plot = line_plot(title, lines, "step", "score", toggle=True, caption=caption)
    return [html.section("Scores", plot, score_table(runs)), *memorisation_parts(runs)]


def memorisation_parts(runs: Sequence[History]) -> list[html.Html]:
    """Return the section about memorised training clips of the runs that were scored with held-out clips."""
    lines = []
    parts = []
    for colour, run in enumerate(runs):
        measured = [line for line in run.scores if isinstance(line.get("memorisation"), Mapping)]
        if not measured:
            continue
        found = [line["memorisation"]["relative"] for line in measured]
        value, low, high = ([one[key] for one in found] for key in ("value", "low", "high"))
        steps = [line["step"] for line in measured]
        lines.append(Series(run.name, steps, value, colour=colour, low=low, high=high))
        parts.append(html.prose(f"{run.name}, step {steps[-1]:,}: {measured[-1]['memorisation']['verdict']}"))
        clips = sorted((run.folder / SCORES / f"step-{steps[-1]:07d}" / "nearest").glob("[0-9]*-*.mp4"))
        clips.sort(key=lambda path: (int(path.stem.partition("-")[0]), "held-out" in path.stem, path.stem))
        shown = [html.media(path, path.stem.partition("-")[2], width=SMALL) for path in clips]
        parts += [html.gallery(*shown[start : start + 3]) for start in range(0, len(shown), 3)]
    if not lines:
        return []
    caption = (
        "Distance of generated clips to the nearest training clip divided by that to the nearest held-out "
        "clip, compared with real clips: 1 for fresh clips, near 0 for copies. Strokes: 90 % intervals. "
        "Below: generated clips of the smallest ratios with their nearest clips."
    )
    plot = line_plot("Memorisation", lines, "step", "relative distance", toggle=True, caption=caption)
    return [html.section("Nearest training and held-out clips", plot, *parts)]


def score_table(runs: Sequence[History]) -> html.Html:
    """Return every measured score with its interval and floor, the newest first."""
    rows = []
    for run in runs:
        for line in reversed(run.scores):
            key = first_score(line)
            interval = " to ".join(html.number(float(end)) for end in line.get("interval") or ())
            floor = html.number(line.get("floor") or 0)
            rows.append((run.name, line["step"], html.number(line[key]), interval, floor))
    return html.table(["run", "step", "score", "90 % interval", "floor"], rows)


def sample_parts(runs: Sequence[History]) -> list[html.Html]:
    """Return the samples of the steps that all runs have, one at a time, same-seed clips side by side."""
    shared = set(runs[0].samples).intersection(*(run.samples for run in runs))
    steps = embeddable(sorted(shared), [run.samples for run in runs])
    if not steps:
        return []
    parts = [(f"{step:,}", step_clips(runs, step)) for step in steps]
    notes = []
    if len(steps) < len(shared):
        notes = [html.prose(f"{len(steps)} of {len(shared)} steps; the others are in samples/.")]
    return [*notes, html.slides("step", parts)]


def embeddable(steps: Sequence[int], samples: Sequence[Mapping[int, Sequence[Path]]]) -> list[int]:
    """Return evenly spaced steps, the newest included, whose clips take at most VIDEO_BYTES together."""
    for count in range(min(len(steps), MOST_STEPS), 0, -1):
        last = len(steps) - 1
        chosen = [steps[last - round(k * last / max(count - 1, 1))] for k in reversed(range(count))]
        files = [path for one in samples for step in chosen for path in one[step][:MOST_CLIPS]]
        if sum(path.stat().st_size for path in files) <= VIDEO_BYTES:
            return chosen
    return []


def step_clips(runs: Sequence[History], step: int) -> html.Html:
    """Return the clips of a step: of one run in a row, of several a row for each clip."""
    of_runs = [run.samples[step][:MOST_CLIPS] for run in runs]
    if len(runs) == 1:
        return html.row(*(clip(runs[0], path, caption_of(path)) for path in of_runs[0]))
    names = list(dict.fromkeys(path.name for path in of_runs[0]))
    rows = []
    for name in names:
        found = [(run, path) for run, paths in zip(runs, of_runs, strict=True) for path in paths]
        same = [(run, path) for run, path in found if path.name == name]
        rows.append(html.row(*(clip(run, path, f"{run.name}: {caption_of(path)}") for run, path in same)))
    return html.tag("div", {}, *rows)


def clip(run: History, path: Path, caption: str) -> html.Html:
    """Return a clip, enlarged if it is small, or the sheet of an older version."""
    sides = (run.config.get("data") or {}).get("resolution") or 0
    largest = max(sides) if isinstance(sides, list) else sides
    if path.suffix == ".mp4" and 0 < largest < SMALL:
        return html.media(path, caption, plays=False, width=SMALL)
    return html.media(path, caption, plays=False)


def caption_of(path: Path) -> str:
    """Return what the name of a file of samples says: 'seed 7, up' for seed-0007-0-up.mp4."""
    parts = path.stem.split("-", 3)
    if parts[0] == "seed" and len(parts) > 1 and parts[1].isdecimal():
        return ", ".join([f"seed {int(parts[1])}", *(part.replace("-", " ") for part in parts[3:])])
    return printable(path.stem)


def settings_section(run: History, changes: Changes | None) -> html.Html:
    """Return the settings that differ from the recipe, and all settings in a closed table."""
    parts = []
    if changes:
        name, rows = changes
        parts.append(html.prose(f"{len(rows)} settings differ from those of {name}."))
        if rows:
            parts.append(html.table(["setting", name, "this run"], rows))
    rows = [
        (f"{section}.{key}", text(value))
        for section, values in run.config.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
    ]
    summary = html.tag("summary", {}, "all settings")
    parts.append(html.tag("details", {}, summary, html.table(["setting", "value"], rows)))
    return html.section("Settings", *parts)
