# SPDX-License-Identifier: Apache-2.0
"""``latte distill``: a student that needs few steps, from a trained model."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.cli.options import Debug, Device, Json, TrainDtype, configure_logging, print_result, progress_line

if TYPE_CHECKING:
    from latte.inference.trajectories import Teacher
    from latte.training.config import TrainConfig

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="The teacher: a run folder, a weights folder, a hub id, or builtin-shapes."
    ),
]
Steps = Annotated[int, typer.Option(help="Steps of the student.")]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale that the student shall contain; the teacher's by default."),
]
Split = Annotated[int, typer.Option(metavar="N", help="Steps of the teacher in each step of the student.")]
Clips = Annotated[int, typer.Option(help="Trajectories of the teacher that are learned from.")]
TrainSteps = Annotated[int, typer.Option(help="Optimizer steps.")]
Batch = Annotated[int, typer.Option(help="Intervals per optimizer step.")]
Rate = Annotated[float, typer.Option("--lr", help="Peak learning rate.")]
Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="The run's folder; runs/MODEL-Nsteps by default.")
]
Seed = Annotated[int, typer.Option(help="Seed of noise and of the order of the trajectories.")]
FIRST_SEED = 1 << 40  # of the teacher's noise: not the seeds that samples have


def distill(
    model: Model,
    steps: Steps = 4,
    guidance: Guidance = None,
    split: Split = 5,
    clips: Clips = 2048,
    train_steps: TrainSteps = 2000,
    batch: Batch = 64,
    lr: Rate = 3e-4,
    out: Out = None,
    device: Device = "auto",
    dtype: TrainDtype = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Distil a model to few steps, its guidance inside. The same command on the same folder resumes.

    First the teacher's trajectories are written to FOLDER/trajectories, then the student is trained on them.
    Sample from the folder as from any run: it has its own steps.
    """
    from latte.checks import check, command_line
    from latte.diffusion.guidance import Distilled
    from latte.inference.pipeline import VideoPipeline
    from latte.inference.trajectories import Teacher
    from latte.training.config import TrainConfig
    from latte.training.step import with_dtype

    configure_logging()
    check(clips >= 1, f"--clips must be at least 1, got {clips}")
    pipe = VideoPipeline.from_pretrained(model, device=device, dtype=dtype or "auto")
    scale = guidance if guidance is not None else pipe.sample.guidance
    teacher = Teacher(pipe, Distilled(steps, scale, pipe.weights), split, FIRST_SEED * (1 + seed))
    config = TrainConfig(
        steps=train_steps,
        global_batch=batch,
        lr=lr,
        warmup_steps=train_steps // 20,
        decay_steps=train_steps // 4,
        ema_decay=0.995,
        ema_warmup=True,
        clip_norm=1.0,
        dtype=dtype or "auto",
        checkpoint_every=max(train_steps // 10, 1),
        log_every=20,
    )
    folder = out or Path("runs") / f"{Path(pipe.name).name}-{steps}steps"
    config = with_dtype(config, pipe.model.config, pipe.device, folder)
    result = distil(teacher, config, folder, clips, seed, progress_line("teacher", 0, 1, count=clips))
    code = result.pop("interrupted")
    lines = [f"{key}: {result[key]}" for key in ("run", "step", "loss", "checkpoint")]
    if code:
        lines.append("stopped; to resume, give the same command again")
    else:
        lines.append(f"to generate clips: {command_line('sample', result['run'])}")
    print_result(result, as_json, lines)
    if code:
        raise typer.Exit(code)


def distil(
    teacher: "Teacher",
    config: "TrainConfig",
    folder: Path,
    clips: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the teacher's trajectories and train the student; return what ``latte.train`` returns."""
    from latte.diffusion.guidance import STUDENT_SAMPLERS
    from latte.interop.coverage import build
    from latte.training.custom import run_record
    from latte.training.distill import IntervalObjective, Trajectories, write_trajectories
    from latte.training.train import train

    pipe = teacher.pipe
    distilled = asdict(teacher.distilled)
    facts = {**distilled, "split": teacher.split, "first_seed": teacher.first_seed, "dtype": str(pipe.dtype)}
    facts["codec"] = pipe.codec.fingerprint
    place = folder / "trajectories"
    write_trajectories(place, clips, facts, teacher, progress)
    student = build(replace(pipe.model.config, class_dropout=0.0), seed)
    student.load_state_dict(pipe.model.state_dict())
    sampler = STUDENT_SAMPLERS[pipe.prediction]
    sample = replace(
        pipe.sample,
        **{"sampler": sampler, "steps": teacher.distilled.steps, "guidance": 1.0, "eta": 0.0},
        **dict.fromkeys(("order", "guidance_interval", "cache")),
    )
    record = run_record(student, pipe.codec, pipe.diffusion, config, None, seed)
    return train(
        model=student,
        dataset=Trajectories(place, clips, pipe.classes, facts),
        config=config,
        run_dir=folder,
        diffusion=pipe.diffusion,
        seed=seed,
        device=pipe.device,
        objective=IntervalObjective(teacher.timesteps),
        facts={"distilled": distilled},
        record={**record, "sample": sample.recorded()},
        workers=0,
    )
