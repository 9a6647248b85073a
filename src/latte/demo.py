# SPDX-License-Identifier: Apache-2.0
"""The whole job in a few minutes, offline: draw clips from a trained model, grade them, train a small new
model, show all of it.

The graded property is the one that can be read back from pixels without any other network: does the shape
move where its label says?
Axes: t frames, h height, w width, c channels.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latte import __version__
from latte import page as report
from latte.build import Job, build
from latte.checks import InputError, require
from latte.config.run import load_run
from latte.data.procedural import DIRECTIONS, Motion, read_motion
from latte.files import reported
from latte.inference.outputs import write_clips
from latte.inference.pipeline import VideoPipeline
from latte.inference.requests import SampleRequest
from latte.runtime import resolve_device, resolve_dtype

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
WINDOW = 20  # steps that the drawn mean of the loss covers
Tell = Callable[[str, int, int], Callable[[int, int], None]]


@dataclass(frozen=True)
class DemoConfig:
    """``shown`` clips are written, ``graded`` are drawn and judged (the shown ones among them), ``seconds``
    are for training.

    The new model is recipe ``shapes`` with SMALL and then ``overrides``; it draws and grades ``graded_after``
    clips. InputError for counts and times that cannot be.
    """

    out: Path
    model: str = "builtin"
    shown: int = 16
    graded: int = 64
    graded_after: int = 16
    seconds: float = 60.0
    seed: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.shown >= 1, "--count", self.shown, "it counts clips", "give 1 or more")
        require(
            self.graded >= self.shown,
            "--graded",
            self.graded,
            f"{self.shown} clips are shown and graded",
            f"give {self.shown} or more",
        )
        require(
            0 < self.seconds <= 86_400, "--seconds", self.seconds, "it is the time to train", "give e.g. 60"
        )
        require(self.seed >= 0, "--seed", self.seed, "seeds count from 0", "give 0 or more")


@dataclass(frozen=True)
class Grades:
    """What ``read_motion`` says of each clip beside the direction that was asked for."""

    asked: Sequence[str]
    motions: Sequence[Motion]

    @property
    def obeyed(self) -> int:
        """How many clips move where their label says."""
        return sum(motion.direction == name for name, motion in zip(self.asked, self.motions, strict=True))

    @property
    def accuracy(self) -> float:
        """The share of them."""
        return self.obeyed / len(self.asked)

    @property
    def coherent(self) -> float:
        """Share of clips with one compact shape in every frame."""
        return sum(motion.coherent for motion in self.motions) / len(self.motions)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (Wilson's, which holds for shares near 0 and 1)."""
        n, p, z = len(self.asked), self.accuracy, 1.959964
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, round(centre - half, 9)), min(1.0, round(centre + half, 9))

    def counts(self) -> list[list[int]]:
        """A row per direction asked for; columns: how many moved up, down, left, right, and how many
        cannot be told.
        """
        pairs = [(name, motion.direction) for name, motion in zip(self.asked, self.motions, strict=True)]
        return [[pairs.count((name, read)) for read in (*NAMES, None)] for name in NAMES]


@dataclass(frozen=True)
class Drawn:
    """The clips of one model: the folder of those shown, sheet and gif of them, the grades of all, and the
    seconds it took.
    """

    requests: Sequence[SampleRequest]
    folder: Path
    sheet: Path
    gif: Path
    grades: Grades
    seconds: float


@dataclass(frozen=True)
class Learnt:
    """The training of the new model: its job, the command that repeats it, its curve, and the seconds it
    took.
    """

    job: Job
    command: str
    steps: Sequence[int]
    losses: Sequence[float]
    seconds: float


def draw(
    trained: VideoPipeline, folder: Path, shown: int, graded: int, seed: int, dtype: torch.dtype, tell: Tell
) -> Drawn:
    """Draw ``graded`` clips, labels going round, write the first ``shown`` of them into ``folder``, grade
    all.

    InputError unless the model's classes are the four directions.
    """
    if tuple(trained.classes) != NAMES:
        raise InputError(
            f"model {trained.name} has the classes {trained.classes or 'none'}, but the demo grades moving shapes with "
            f"{', '.join(NAMES)}; give a model of recipe shapes"
        )
    began, clips, batch = time.perf_counter(), {}, trained.sample.batch
    requests = [
        SampleRequest(seed + index, index % len(NAMES), NAMES[index % len(NAMES)]) for index in range(graded)
    ]
    parts = -(-shown // batch) + -(-(graded - shown) // batch)

    def ask(number: int, part: Sequence[SampleRequest]) -> Iterator[tuple[int, np.ndarray]]:
        seeds, labels = [wish.seed for wish in part], [str(wish.word) for wish in part]
        for seed_of, clip in trained.generate(
            seeds, labels, dtype=dtype, progress=tell(f"draw {graded} clips", number, parts)
        ):
            clips[seed_of] = clip
            yield seed_of, clip

    facts = {"weights": trained.weights, "codec": trained.codec.fingerprint, "dtype": str(dtype)}
    sheet, gif = write_clips(folder, requests[:shown], ask, facts, batch, trained.sample.fps)
    for number, start in enumerate(range(shown, graded, batch), start=-(-shown // batch)):
        list(ask(number, requests[start : start + batch]))
    grades = Grades(
        [str(wish.word) for wish in requests], [read_motion(clips[wish.seed]) for wish in requests]
    )
    return Drawn(requests[:shown], folder, sheet, gif, grades, time.perf_counter() - began)


def learn(config: DemoConfig, device: str, say: Callable[[str], None]) -> Learnt:
    """Train a small new model by recipe ``shapes`` for about ``config.seconds``: a few steps to see how
    fast this machine is, then the rest, resumed from their checkpoint. Leaves with 130 or 143 when a
    signal stops it, everything saved.
    """
    began, run = time.perf_counter(), config.out / "run"
    changes = [*SMALL, *config.overrides]
    words = [
        *changes,
        f"run.dir={run}",
        f"run.seed={config.seed}",
        "train.sample_every=0",
        "train.keep_last=1",
        "train.log_every=1",
    ]

    def train(steps: int) -> tuple[Job, list[dict[str, float]]]:
        job = build(load_run("shapes", [*words, f"train.steps={steps}"])[0], device)
        if code := job.train()["interrupted"]:
            raise SystemExit(code)
        return job, [
            json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]

    say(f"training a small new model: {PROBE_STEPS} steps to see how fast this machine is")
    first = train(PROBE_STEPS)[1]
    pace = (first[-1]["seconds"] - first[1]["seconds"]) / (first[-1]["step"] - first[1]["step"])
    left = config.seconds - first[-1]["seconds"]
    steps = PROBE_STEPS + max(1, round(left / pace))
    say(f"{pace:.3f} s a step: going on to step {steps}, about {max(left, pace):.0f} s")
    job, lines = train(steps)
    command = " ".join(
        [
            "latte train shapes",
            *changes,
            f"train.steps={steps}",
            f"run.seed={config.seed}",
            "run.dir=runs/small",
        ]
    )
    return Learnt(
        job,
        command,
        [int(line["step"]) for line in lines],
        [line["loss"] for line in lines],
        time.perf_counter() - began,
    )


def run_demo(
    config: DemoConfig, device: str, dtype: str, tell: Tell, say: Callable[[str], None]
) -> dict[str, Any]:
    """Do everything -> what ``latte demo --json`` prints. ``tell`` makes progress functions, ``say`` takes
    lines for people.
    """
    began = time.perf_counter()
    require(
        not (config.out / "run").exists(),
        "--out",
        str(config.out),
        "an earlier demo trained there",
        "give another folder",
    )
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    trained = VideoPipeline.from_pretrained(config.model, device=device, dtype="fp32")
    say(f"drawing {config.graded} clips from model {config.model}")
    shown = draw(trained, config.out / "clips", config.shown, config.graded, config.seed, precision, tell)
    learnt = learn(config, device, say)
    say("drawing clips from the new model")
    small = VideoPipeline.from_pretrained(learnt.job.config.run.dir or "", device=device, dtype="fp32")
    after = draw(
        small, config.out / "new-clips", len(NAMES), config.graded_after, config.seed, precision, tell
    )
    seconds = time.perf_counter() - began
    page = config.out / "report.html"
    with reported("the report", page):
        page.write_text(show(config, trained, shown, learnt, after, where, seconds), encoding="utf-8")
    return {
        "clips": [
            {"path": str(shown.folder / wish.file), "seed": wish.seed, "label": wish.word}
            for wish in shown.requests
        ],
        "report": str(page),
        "label_accuracy": shown.grades.accuracy,
        "interval": shown.grades.interval(),
        "graded": config.graded,
        "sheet": str(shown.sheet),
        "gif": str(shown.gif),
        "run": str(learnt.job.config.run.dir),
        "loss": [learnt.losses[0], report.smooth(learnt.losses, WINDOW)[-1]],
        "new_label_accuracy": after.grades.accuracy,
        "seconds": round(seconds, 1),
    }


def show(
    config: DemoConfig,
    trained: VideoPipeline,
    shown: Drawn,
    learnt: Learnt,
    after: Drawn,
    device: torch.device,
    seconds: float,
) -> report.Html:
    """The page."""
    mean = report.smooth(learnt.losses, WINDOW)
    curve = [
        report.Series("every step", learnt.steps, learnt.losses, faint=True),
        report.Series(f"mean of {WINDOW}", learnt.steps, mean),
    ]
    size, sizes = parameters(trained.model), parameters(learnt.job.model)
    sample = f"latte sample {config.model} --count {config.shown} --seed {config.seed}"
    machine = {
        "device": device,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    machine |= {"torch": torch.__version__, "latte": __version__}
    times = [
        ("draw and grade", shown.seconds),
        ("train", learnt.seconds),
        ("draw from the new model", after.seconds),
        ("all", seconds),
    ]
    return report.page(
        "Latte, the whole job",
        f"Drawn, graded and trained on this machine in {seconds:.0f} seconds, without a network.",
        report.tiles(
            {
                f"of {config.graded} clips move as asked": f"{shown.grades.accuracy:.1%}",
                f"loss of the new model, {learnt.losses[0]:.2f} at first": f"{mean[-1]:.2f}",
                "steps that it was trained": f"{learnt.steps[-1]:,}",
                "seconds in all": f"{seconds:.0f}",
            }
        ),
        report.section(
            "Clips from the trained model",
            report.prose(
                f"Model {config.model}, {size} parameters, {trained.sample.steps} steps of {trained.sample.sampler}, guidance "
                f"{trained.sample.guidance:g}. Each clip was asked to move in one direction: {', '.join(NAMES)}, and again."
            ),
            report.media(
                shown.gif, "All clips at once; labels go round from left to right, row by row.", width=512
            ),
            report.row(
                *(
                    report.media(shown.folder / wish.file, str(wish.word), width=128)
                    for wish in shown.requests[: len(NAMES)]
                )
            ),
            report.media(shown.sheet, "The same clips: a row a clip, a column a frame."),
            report.command(sample),
        ),
        report.section(
            "Do they obey?",
            *graded(shown.grades),
            report.command(f"latte demo --graded {config.graded} --seed {config.seed}"),
        ),
        report.section(
            "A small new model",
            report.prose(
                f"{sizes} parameters from nothing, {learnt.job.config.train.global_batch} procedural clips a step."
            ),
            report.line_plot("Training loss", curve, "step", "loss", log_y=True),
            report.command(learnt.command),
            report.media(
                after.sheet,
                f"What it draws after {learnt.steps[-1]:,} steps. Shapes come first; their motion takes longer.",
            ),
            *graded(after.grades),
        ),
        report.section(
            "This machine",
            report.table(["what", "seconds"], times),
            report.table(["", ""], list(machine.items())),
        ),
    )


def graded(grades: Grades) -> list[report.Html]:
    """The sentence and the table of a set of grades."""
    low, high = grades.interval()
    sentence = f"{grades.obeyed} of {len(grades.asked)} clips move as asked ({low:.1%} to {high:.1%} with 95 % confidence), measured by the "
    sentence += f"path of the shape's centre; {grades.coherent:.1%} show one compact shape in every frame."
    rows = [(name, *counts) for name, counts in zip(NAMES, grades.counts(), strict=True)]
    return [
        report.prose(sentence),
        report.table(["asked", *(f"moves {name}" for name in NAMES), "unclear"], rows),
    ]


def parameters(model: torch.nn.Module) -> str:
    """'2.6 million'."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2g} million"
