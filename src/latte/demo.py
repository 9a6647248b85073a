# SPDX-License-Identifier: Apache-2.0
"""The whole workflow in a few minutes, offline: generate clips, grade them, train a small model, write a
page.

The graded property is the one that can be read from pixels without another network: does the shape move in
the direction of its label?
Axes: t frames, h height, w width, c channels.
"""

import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latte import __version__
from latte.build import Job, build
from latte.checks import InputError, check, command_line
from latte.config.run import load_run
from latte.data.shape_grading import DIRECTIONS, Motion, read_motion
from latte.data.world.grading import Share
from latte.files import reported
from latte.inference.outputs import check_output_folder, write_clips
from latte.inference.pipeline import VideoPipeline
from latte.inference.requests import SampleRequest
from latte.page import html, plots

NAMES = tuple(DIRECTIONS)
SMALL = (
    "model.depth=6",
    "model.width=96",
    "data.resolution=32",
    "train.global_batch=16",
    "train.lr=2e-3",
    "train.ema_decay=0.98",
    "train.decay_steps=0",  # how many steps there will be is only known after the first ones
)
PROBE_STEPS = 6  # the first of them is slower: caches, memory, threads
WINDOW = 20  # steps in the plotted mean of the loss
MAX_CLIPS = 100_000
Progress = Callable[[str, int, int], Callable[[int, int], None]]
"""(what, part, parts) -> the progress function of that part."""
Note = Callable[[str], None]


@dataclass(frozen=True)
class DemoConfig:
    """Settings of a demo; InputError on construction for values out of range.

    The small model is recipe ``shapes`` with SMALL and then ``overrides``.
    """

    out: Path
    model: str = "builtin-shapes"
    shown: int = 16  # clips that are written
    graded: int = 64  # clips that are generated and graded, the shown ones included
    graded_after: int = 16  # clips of the small model that are graded
    seconds: float = 60.0  # training time of the small model
    seed: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self.shown >= 1, f"--count must be at least 1, got {self.shown}")
        check(
            self.shown <= self.graded <= MAX_CLIPS,
            f"--graded must be from --count ({self.shown}) to {MAX_CLIPS:,}, got {self.graded}",
        )
        check(0 < self.seconds <= 86_400, f"--seconds must be in (0, 86400], got {self.seconds}")
        check(0 <= self.seed < 2**62, f"--seed must be in [0, 2^62), got {self.seed}")


@dataclass(frozen=True)
class Grades:
    """The motion that ``read_motion`` finds in each clip, beside the requested direction."""

    asked: Sequence[str]
    motions: Sequence[Motion]

    @property
    def num_correct(self) -> int:
        """Return how many clips move in the requested direction."""
        return sum(motion.direction == name for name, motion in zip(self.asked, self.motions, strict=True))

    @property
    def accuracy(self) -> float:
        """Return the fraction of clips that move in the requested direction."""
        return self.num_correct / len(self.asked)

    @property
    def coherent(self) -> float:
        """Return the fraction of clips with one compact shape in every frame."""
        return sum(motion.coherent for motion in self.motions) / len(self.motions)

    @property
    def consistent(self) -> float:
        """Return the fraction of clips whose shape keeps its colour, size and outline."""
        return sum(motion.consistent for motion in self.motions) / len(self.motions)

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the accuracy (Wilson's, which holds near 0 and 1)."""
        return Share(self.num_correct, len(self.asked)).interval

    def counts(self) -> list[list[int]]:
        """Return a row per requested direction: how many moved up, down, left, right, and how many are
        unclear.
        """
        pairs = [(name, motion.direction) for name, motion in zip(self.asked, self.motions, strict=True)]
        return [[pairs.count((name, read)) for read in (*NAMES, None)] for name in NAMES]


@dataclass(frozen=True)
class Generated:
    """The clips of one model: folder, sheet and gif of those shown, the grades of all, and the time it
    took.
    """

    requests: Sequence[SampleRequest]
    folder: Path
    sheet: Path
    gif: Path
    grades: Grades
    seconds: float


@dataclass(frozen=True)
class Trained:
    """The training of the small model: its job, the command that repeats it, its curve, and the time it
    took.
    """

    job: Job
    command: str
    steps: Sequence[int]
    losses: Sequence[float]
    seconds: float


def generate(
    pipe: VideoPipeline, folder: Path, shown: int, graded: int, seed: int, progress: Progress
) -> Generated:
    """Generate ``graded`` clips, labels in turn, write the first ``shown`` into ``folder``, and grade all.

    InputError unless the model's classes are the four directions.
    """
    if tuple(pipe.classes) != NAMES:
        raise InputError(
            f"model {pipe.name} has the classes {pipe.classes or 'none'}, but the demo grades moving shapes "
            f"with {', '.join(NAMES)}; give a model of recipe shapes"
        )
    began = time.perf_counter()
    batch = pipe.sample.batch
    clips: dict[int, np.ndarray] = {}
    labels = [index % len(NAMES) for index in range(graded)]
    requests = [SampleRequest(seed + index, label, NAMES[label]) for index, label in enumerate(labels)]
    shown_parts = -(-shown // batch)
    parts = shown_parts + -(-(graded - shown) // batch)

    def run(number: int, part: Sequence[SampleRequest]) -> Iterator[tuple[int, np.ndarray]]:
        advance = progress(f"generate {graded} clips", number, parts)
        words = [str(request.word) for request in part]
        for clip_seed, clip in pipe.generate([request.seed for request in part], words, progress=advance):
            clips[clip_seed] = clip
            yield clip_seed, clip

    facts = {"weights": pipe.weights, "codec": pipe.codec.fingerprint, "dtype": str(pipe.dtype)}
    sheet, gif = write_clips(folder, requests[:shown], run, facts, batch, pipe.sample.fps)
    for number, start in enumerate(range(shown, graded, batch), start=shown_parts):
        list(run(number, requests[start : start + batch]))
    asked = [str(request.word) for request in requests]
    grades = Grades(asked, [read_motion(clips[request.seed]) for request in requests])
    return Generated(requests[:shown], folder, sheet, gif, grades, time.perf_counter() - began)


def train_small(config: DemoConfig, device: str, note: Note) -> Trained:
    """Train the small model for about ``config.seconds``: a few steps to measure the speed, then resume.

    Exits with 130 or 143 when a signal stops it, with a checkpoint saved.
    """
    began = time.perf_counter()
    run = config.out / "run"
    changes = [*SMALL, *config.overrides]
    fixed = ["train.sample_every=0", "train.keep_last=1", "train.log_every=1"]
    words = [*changes, f"run.dir={run}", f"run.seed={config.seed}", *fixed]

    def train(steps: int) -> tuple[Job, list[dict[str, float]]]:
        job = build(load_run("shapes", [*words, f"train.steps={steps}"])[0], device)
        if code := job.train()["interrupted"]:
            raise SystemExit(code)
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        return job, [json.loads(line) for line in text.splitlines()]

    note(f"training a small model: {PROBE_STEPS} steps to measure the speed of this machine")
    first = train(PROBE_STEPS)[1]
    pace = (first[-1]["seconds"] - first[1]["seconds"]) / (first[-1]["step"] - first[1]["step"])
    left = config.seconds - first[-1]["seconds"]
    steps = PROBE_STEPS + max(1, round(left / pace))
    note(f"{pace:.3f} s per step: resuming to step {steps}, about {max(left, pace):.0f} s")
    job, lines = train(steps)
    repeat = [*changes, f"train.steps={steps}", f"run.seed={config.seed}", "run.dir=runs/small"]
    return Trained(
        job,
        command_line("train", "shapes", *repeat),
        [int(line["step"]) for line in lines],
        [line["loss"] for line in lines],
        time.perf_counter() - began,
    )


def run_demo(config: DemoConfig, device: str, dtype: str, progress: Progress, note: Note) -> dict[str, Any]:
    """Run the demo and return what ``latte demo --json`` prints. ``note`` receives lines about progress."""
    began = time.perf_counter()
    check_output_folder(config.out)
    check(
        not (config.out / "run").exists(),
        f"--out {str(config.out)!r} holds the training of an earlier demo; give another folder",
    )
    build(
        load_run("shapes", [*SMALL, *config.overrides])[0], device
    )  # wrong settings are found before the work
    pipe = VideoPipeline.from_pretrained(config.model, device=device, dtype=dtype)
    note(f"generating {config.graded} clips with model {config.model}")
    shown = generate(pipe, config.out / "clips", config.shown, config.graded, config.seed, progress)
    trained = train_small(config, device, note)
    note("generating clips with the small model")
    small = VideoPipeline.from_pretrained(config.out / "run", device=device, dtype=pipe.dtype)
    folder = config.out / "new-clips"
    after = generate(small, folder, len(NAMES), config.graded_after, config.seed, progress)
    seconds = time.perf_counter() - began
    page = config.out / "report.html"
    with reported("the report", page):
        page.write_text(report(config, pipe, shown, trained, after, seconds), encoding="utf-8")
    clips = [{"path": str(shown.folder / request.file), "seed": request.seed} for request in shown.requests]
    return {
        "clips": [
            clip | {"label": request.word} for clip, request in zip(clips, shown.requests, strict=True)
        ],
        "report": str(page),
        "label_accuracy": shown.grades.accuracy,
        "interval": shown.grades.interval(),
        "consistency": shown.grades.consistent,
        "graded": config.graded,
        "sheet": str(shown.sheet),
        "gif": str(shown.gif),
        "run": str(config.out / "run"),
        "loss": [trained.losses[0], plots.smooth(trained.losses, WINDOW)[-1]],
        "new_label_accuracy": after.grades.accuracy,
        "new_consistency": after.grades.consistent,
        "seconds": round(seconds, 1),
    }


def report(
    config: DemoConfig,
    pipe: VideoPipeline,
    shown: Generated,
    trained: Trained,
    after: Generated,
    seconds: float,
) -> html.Html:
    """Return the page."""
    mean = plots.smooth(trained.losses, WINDOW)
    graded = command_line("demo", "--graded", config.graded, "--seed", config.seed)
    tiles = {
        f"of {config.graded} clips move as requested": f"{shown.grades.accuracy:.1%}",
        "keep colour, size and outline": f"{shown.grades.consistent:.1%}",
        f"loss of the small model, {trained.losses[0]:.2f} at first": f"{mean[-1]:.2f}",
        "training steps": f"{trained.steps[-1]:,}",
        "seconds in total": f"{seconds:.0f}",
    }
    return html.page(
        "Latte, the whole workflow",
        f"Generated, graded and trained on this machine in {seconds:.0f} seconds, offline.",
        html.tiles(tiles),
        clips_section(config, pipe, shown),
        html.section("Label accuracy", *accuracy(shown.grades), html.command(graded)),
        training_section(trained, mean, after),
        machine_section(pipe.device, shown, trained, after, seconds),
    )


def clips_section(config: DemoConfig, pipe: VideoPipeline, shown: Generated) -> html.Html:
    """Return the section with the pretrained model's clips."""
    settings = pipe.sample
    first = shown.requests[: len(NAMES)]
    return html.section(
        "Clips of the pretrained model",
        html.prose(
            f"Model {config.model}, {parameters(pipe.model)} parameters, {settings.steps} steps of "
            f"{settings.sampler}, guidance {settings.guidance:g}. The requested directions are "
            f"{', '.join(NAMES)}, in turn."
        ),
        html.media(shown.gif, "All clips at once, labels in turn, row by row.", width=512),
        html.row(*(html.media(shown.folder / item.file, str(item.word), width=128) for item in first)),
        html.media(shown.sheet, "The same clips: one per row, one frame per column."),
        html.command(command_line("sample", config.model, "--count", config.shown, "--seed", config.seed)),
    )


def training_section(trained: Trained, mean: Sequence[float], after: Generated) -> html.Html:
    """Return the section with the small model: its loss, its clips and their grades."""
    curve = [
        plots.Series("every step", trained.steps, trained.losses, faint=True),
        plots.Series(f"mean of {WINDOW}", trained.steps, mean),
    ]
    size = parameters(trained.job.model)
    batch = trained.job.config.train.global_batch
    caption = f"Its clips after {trained.steps[-1]:,} steps. Shapes come first, motion takes longer."
    return html.section(
        "A small model",
        html.prose(f"{size} parameters, trained from scratch on {batch} procedural clips per step."),
        plots.line_plot("Training loss", curve, "step", "loss", log_y=True),
        html.command(trained.command),
        html.media(after.sheet, caption),
        *accuracy(after.grades),
    )


def machine_section(
    device: torch.device, shown: Generated, trained: Trained, after: Generated, seconds: float
) -> html.Html:
    """Return the section with times and versions."""
    times = [
        ("generate and grade", shown.seconds),
        ("train", trained.seconds),
        ("generate with the small model", after.seconds),
        ("total", seconds),
    ]
    machine = {
        "device": device,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "latte": __version__,
    }
    return html.section(
        "This machine", html.table(["what", "seconds"], times), html.table(["", ""], list(machine.items()))
    )


def accuracy(grades: Grades) -> list[html.Html]:
    """Return the sentence and the table of a set of grades."""
    low, high = grades.interval()
    sentence = (
        f"{grades.num_correct} of {len(grades.asked)} clips move as requested ({low:.1%} to {high:.1%} with "
        f"95 % confidence), measured by the path of the shape's centre; {grades.coherent:.1%} show one "
        f"compact shape in every frame, and {grades.consistent:.1%} keep its colour, size and outline."
    )
    rows = [(name, *counts) for name, counts in zip(NAMES, grades.counts(), strict=True)]
    columns = ["requested", *(f"moves {name}" for name in NAMES), "unclear"]
    return [html.prose(sentence), html.table(columns, rows)]


def parameters(model: torch.nn.Module) -> str:
    """Return the number of parameters as text such as '2.6 million'."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2g} million"
