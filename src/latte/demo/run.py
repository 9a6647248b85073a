# SPDX-License-Identifier: Apache-2.0
"""The whole workflow in two minutes, offline: clips from sentences and from an image, grades, a fine-tuning
on a motion that the model does not know, and a page.

Everything that is graded is read from the pixels: kind, colour, direction and consistency of scenes whose
combination was held out of training, and whether a curtain opens, before and after.
Axes: t frames, h height, w width, c channels.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latte.build import Job, build
from latte.checks import InputError, check, command_line
from latte.config.run import load_run
from latte.data.datasets import ProceduralDataset
from latte.data.world.curtains import CurtainScenes
from latte.data.world.grading import Share, grade
from latte.data.world.scenes import Scene, caption, render_frame, sample_scene
from latte.data.writers import contact_sheet, write_gif, write_mp4
from latte.demo.page import Clips, Result, Tuned, report
from latte.diffusion.config import build_process
from latte.diffusion.loss import OBJECTIVES
from latte.distributed import Group
from latte.files import reported
from latte.inference.generate import changed
from latte.inference.outputs import check_output_folder
from latte.inference.pipeline import VideoPipeline
from latte.inference.requests import SampleRequest
from latte.inference.sheets import evenly_spaced
from latte.model.denoiser import Denoiser
from latte.runtime import resolve_device, resolve_dtype
from latte.training.condition import CaptionReader
from latte.training.step import Task
from latte.training.validation import Validation

SENTENCES = (
    "a yellow ball bounces right over a blue floor",
    "a person in green clothes walks to the left",
    "一颗黄色的星星向上移动",
    "purple fireworks burst in the night sky",
    "snow falls on a red house, blown to the right",
    "绿色的海浪向左翻滚",
    "a blue cube spins left on a brown ground",
    "一个红色的钟摆在摆动",
    "white clouds move to the right across a pink sky",
)
STAR = Scene("star", "red", "blue", "right", (0.5, 0.0, 0.5, 0.5, *[0.5] * 12))
STAR_TIME = 1.75  # seconds: the star is in the middle
FROM_IMAGE = tuple(f"a red star moves {way} on a blue ground" for way in ("left", "right", "up"))
GUIDED = "a pink ball bounces to the left"
SCALES = (1.0, 4.0)
NEW_CLIPS = 4
BASE = "builtin"  # the recipe of the model and of its fine-tuning
TUNING = (
    "data.scenes=curtains",
    "train.global_batch=8",
    "train.lr=2e-3",
    "train.warmup_steps=5",
    "train.decay_steps=0",  # how many steps there will be is only known after the first ones
    "train.ema_decay=0.9",
    "train.frame_noise=0",
)
PROBE_STEPS = 4  # the first of them is slower: caches, memory, threads
HELD_OUT_SEED = 9_000_000  # of curtains that are not trained on
HELD_OUT_CLIPS = 16
PARTS = ("kind", "colour", "direction")
MAX_CLIPS = 100_000
Progress = Callable[[str, int, int], Callable[[int, int], None]]
"""(what, part, parts) -> the progress function of that part."""
Note = Callable[[str], None]


@dataclass(frozen=True)
class DemoConfig:
    """Settings of a demo; InputError on construction for values out of range.

    The fine-tuning is recipe ``builtin`` with TUNING and then ``overrides``.
    """

    out: Path
    model: str = "builtin"
    graded: int = 27  # clips of held-out combinations
    seconds: float = 50.0  # training time
    seed: int = 0
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(1 <= self.graded <= MAX_CLIPS, f"--graded must be from 1 to {MAX_CLIPS:,}, got {self.graded}")
        check(0 < self.seconds <= 86_400, f"--seconds must be in (0, 86400], got {self.seconds}")
        check(0 <= self.seed < 2**62, f"--seed must be in [0, 2^62), got {self.seed}")


@dataclass
class Studio:
    """What generates the clips of the demo: the pipeline, where they go, and what receives the progress."""

    pipe: VideoPipeline
    out: Path
    seed: int
    progress: Progress

    def make(self, name: str, prompts: Sequence[str], **options: Any) -> Clips:
        """Generate a clip for each prompt, seeds counting up, and write them into folder ``name``."""
        seeds = range(self.seed, self.seed + len(prompts))
        requests = [SampleRequest(seed, prompt=text) for seed, text in zip(seeds, prompts, strict=True)]
        advance = self.progress(f"generate {name}", 0, 1)
        made = self.pipe.generate(seeds, prompts=list(prompts), progress=advance, **options)
        clips = Clips(requests, self.out / name, [frames for _, frames in made])
        with reported("clips", clips.folder):
            clips.folder.mkdir(parents=True, exist_ok=True)
            for file, frames in zip(clips.files, clips.frames, strict=True):
                write_mp4(file, frames, self.pipe.sample.fps)
        return clips


def open_model(config: DemoConfig, device: str, dtype: torch.dtype) -> VideoPipeline:
    """Load the model; InputError unless it reads captions of the world."""
    pipe = VideoPipeline.from_pretrained(config.model, device=device, dtype=dtype)
    scenes = dict(pipe.about.get("data") or {}).get("scenes")
    if pipe.reader is None or scenes != "world":
        raise InputError(
            f"model {pipe.name} does not read captions of data.scenes=world, which the demo grades; give "
            "builtin, or a model of recipe builtin"
        )
    return pipe


def grade_held_out(studio: Studio, count: int) -> tuple[Path, dict[str, Share]]:
    """Generate ``count`` clips of combinations that were held out of training; return their contact sheet and
    the share that is right in each part, in all, and consistent.
    """
    hold_out = dict(studio.pipe.about["data"]).get("hold_out", 0)
    scenes = [sample_scene(studio.seed, index, hold_out, bool(hold_out)) for index in range(count)]
    clips = studio.make("held-out", [caption(scene, "mixed") for scene in scenes])
    found = grade(np.stack(clips.frames))
    right = [
        [getattr(read, part) == getattr(scene, part) for part in PARTS]
        for read, scene in zip(found, scenes, strict=True)
    ]
    shares = {part: Share.of([row[place] for row in right]) for place, part in enumerate(PARTS)}
    shares["all three"] = Share.of([all(row) for row in right])
    shares["consistent"] = Share.of([read.consistent for read in found])
    sheet = clips.folder / "sheet.png"
    with reported("the contact sheet", sheet):
        contact_sheet([frames[::4] for frames in clips.frames], scale=1).save(sheet)
    return sheet, shares


def validation_of(job: Job, model: Denoiser) -> Validation:
    """Return what measures the loss on curtains that are not trained on."""
    config = job.config
    assert job.captions
    data = ProceduralDataset(replace(config.data, seed=HELD_OUT_SEED, num_clips=HELD_OUT_CLIPS))
    task = Task(
        model=model,
        forward=model,
        process=build_process(config.diffusion),
        objective=OBJECTIVES[config.diffusion.objective],
        codec=job.codec,
        seed=config.run.seed,
        global_batch=config.train.global_batch,
        micro_batch=None,
        device=job.device,
        dtype=resolve_dtype(config.train.dtype, job.device),
    )
    return Validation(task, model, data, CaptionReader(job.captions, 0.0), HELD_OUT_CLIPS, Group())


def tuning_of(config: DemoConfig, pipe: VideoPipeline) -> list[str]:
    """Return the settings of the fine-tuning that differ from BASE, with the blocks that the model has."""
    pooled = str(getattr(pipe.model.config, "pooled_caption", False)).lower()
    return [*TUNING, f"train.init={config.model}", f"text.pooled_caption={pooled}", *config.overrides]


def fine_tune(config: DemoConfig, studio: Studio, device: str, note: Note) -> Tuned:
    """Fine-tune for about ``config.seconds``: a few steps to measure the speed, then resume.

    Exits with 130 or 143 when a signal stops it, with a checkpoint saved.
    """
    began = time.perf_counter()
    run = config.out / "run"
    changes = tuning_of(config, studio.pipe)
    fixed = ["train.sample_every=0", "train.keep_last=1", "train.log_every=1", "train.report=false"]
    words = [*changes, f"run.dir={run}", f"run.seed={config.seed}", *fixed]

    def train(steps: int) -> tuple[Job, list[dict[str, float]]]:
        job = build(load_run(BASE, [*words, f"train.steps={steps}"])[0], device)
        if code := job.train()["interrupted"]:
            raise SystemExit(code)
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        return job, [json.loads(line) for line in text.splitlines()]

    first = build(load_run(BASE, [*words, f"train.steps={PROBE_STEPS}"])[0], device)
    prompts = evenly_spaced(first.config.data.scene_set.held_out_captions, NEW_CLIPS)
    before = studio.make("before", prompts)
    validation = validation_of(first, studio.pipe.model)
    losses = [validation()["validation/loss"]]
    note(f"fine-tuning on a new motion: {PROBE_STEPS} steps to measure the speed of this machine")
    lines = train(PROBE_STEPS)[1]
    pace = (lines[-1]["seconds"] - lines[1]["seconds"]) / (lines[-1]["step"] - lines[1]["step"])
    left = config.seconds - lines[-1]["seconds"]
    steps = PROBE_STEPS + max(1, round(left / pace))
    note(f"{pace:.3f} s per step: resuming to step {steps}, about {max(left, pace):.0f} s")
    _, lines = train(steps)
    tuned = VideoPipeline.from_pretrained(run, device=device, dtype=studio.pipe.dtype)
    validation.task = replace(validation.task, model=tuned.model)
    losses.append(validation()["validation/loss"])
    after = replace(studio, pipe=tuned).make("after", prompts)
    repeat = [*changes, f"train.steps={steps}", f"run.seed={config.seed}", "run.dir=runs/curtains"]
    return Tuned(
        command_line("train", BASE, *repeat),
        [int(line["step"]) for line in lines],
        [line["loss"] for line in lines],
        (losses[0], losses[1]),
        before,
        after,
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
    precision = resolve_dtype(dtype, resolve_device(device))
    pipe = open_model(config, device, precision)
    build(load_run(BASE, tuning_of(config, pipe))[0], device)  # wrong settings are found before the work
    studio = Studio(pipe, config.out, config.seed, progress)
    note(f"generating clips with model {config.model}")
    shown = studio.make("clips", SENTENCES)
    picture = config.out / "first-frame.png"
    first = render_frame(STAR, STAR_TIME, *pipe.frame_size())
    with reported("the first frame", picture):
        Image.fromarray(first).save(picture)
        gif = shown.folder / "clips.gif"
        write_gif(gif, mosaic(shown.frames), pipe.sample.fps)
    moved = studio.make("from-image", FROM_IMAGE, conditioning_frames={0: first})
    guided = [
        studio.make(f"guidance-{scale:g}", [GUIDED], config=changed(pipe.sample, guidance=scale))
        for scale in SCALES
    ]
    sheet, shares = grade_held_out(studio, config.graded)
    made = time.perf_counter() - began
    tuned = fine_tune(config, studio, device, note)
    seconds = time.perf_counter() - began
    result = Result(
        config.model,
        config.seed,
        pipe,
        shown,
        picture,
        moved,
        GUIDED,
        dict(zip(SCALES, guided, strict=True)),
        sheet,
        shares,
        tuned,
        new_motion_of(tuned, pipe),
        made,
        seconds,
    )
    page = config.out / "report.html"
    with reported("the report", page):
        page.write_text(report(result), encoding="utf-8")
    return summary(config, result) | {"report": str(page), "gif": str(gif)}


def summary(config: DemoConfig, result: Result) -> dict[str, Any]:
    """Return the numbers and files of ``latte demo --json``."""
    shown = zip(result.shown.files, result.shown.requests, strict=True)
    clips = [{"path": str(file), "seed": request.seed, "prompt": request.prompt} for file, request in shown]
    shares = result.shares
    return {
        "clips": clips,
        "label_accuracy": shares["all three"].value,
        "interval": shares["all three"].interval,
        "consistency": shares["consistent"].value,
        **{f"{part}_accuracy": shares[part].value for part in PARTS},
        "graded": config.graded,
        "sheet": str(result.sheet),
        "run": str(config.out / "run"),
        "loss": list(result.tuned.held_out),
        "new_motion": [share.value for share in result.new_motion],
        "steps": result.tuned.steps[-1],
        "seconds": round(result.seconds, 1),
    }


def new_motion_of(tuned: Tuned, pipe: VideoPipeline) -> tuple[Share, Share]:
    """Return how many of the clips before and after show a curtain that opens."""
    config = load_run(BASE, ["data.scenes=curtains"])[0].data
    scenes = CurtainScenes(replace(config, resolution=pipe.frame_size(), frames=pipe.num_frames))
    before, after = (
        Share.of([scenes.read_label(frames) == 0 for frames in clips.frames])
        for clips in (tuned.before, tuned.after)
    )
    return before, after


def mosaic(clips: Sequence[np.ndarray]) -> np.ndarray:
    """Return nine clips (t h w c) as one, three rows of three."""
    rows = [np.concatenate(clips[start : start + 3], axis=2) for start in range(0, 9, 3)]
    return np.concatenate(rows, axis=1)  # (t 3h 3w c)
