# SPDX-License-Identifier: Apache-2.0
"""G4 and G5: training XL/2 from latents, and how many clips fit: python benchmarks/gpu/train.py [--smoke].

Compared with a loop organised as the released one is: its model in TF32, clips encoded in every step,
AdamW and EMA tensor by tensor, the loss read in every step. FP8 training is not offered by the package.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from clip import codec
from goals import Run, measure
from plain import PlainLatte

from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.interop.coverage import build
from latte.profile.flops import count
from latte.profile.step_time import TrainingStep
from latte.profile.timing import make_busy
from latte.training.config import TrainConfig

PEAK = 989e12  # dense bf16 operations a second of the data sheet of H100 and H200
BATCHES = (8, 16, 24, 32, 40, 48, 64)
LOSS_STEPS = 8


def settings(run: Run, **changes: object) -> TrainConfig:
    """The settings of a step: bf16, clipping from the first step."""
    plain = TrainConfig(global_batch=1, lr=1e-4, clip_norm=1.0, dtype="bf16")
    return replace(plain, **changes)


def step_of(run: Run, clips: int, compiled: bool = False, **changes: object) -> TrainingStep:
    """A step of ``clips`` clips of XL/2; compiled with the smoke run's compiler if it is one."""
    config = settings(run, **changes)
    model = make_busy(build(run.config(), 0))
    step = TrainingStep(model, build_process(DiffusionConfig()), "paper", config, clips, run.device)
    if compiled:
        for block in model.blocks:
            block.compile(backend="eager" if run.smoke else "inductor")
    return step


def released_step(run: Run, clips: int) -> Callable[[], None]:
    """A step as the released loop does it, from video."""
    model = make_busy(run.config().build()).to(run.device).train()
    plain = PlainLatte(model)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, foreach=False)
    process = build_process(DiffusionConfig())
    config = model.config
    encode = codec(run).encode
    height, width = (8 * side for side in config.grid_size)
    video = torch.rand(clips, config.num_frames, 3, height, width, device=run.device) * 2 - 1
    label = torch.zeros(clips, dtype=torch.long, device=run.device)

    def step() -> None:
        with torch.no_grad():
            z0 = encode(video)
        t = torch.randint(0, process.num_steps, (clips,), device=run.device)
        eps = torch.randn_like(z0)
        loss = OBJECTIVES["paper"](lambda z, t: plain(z, t, label), process, z0, t, eps).total.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(0.9999).add_(weight, alpha=1 - 0.9999)
        loss.item()

    return step


def check_losses(run: Run) -> dict[str, list[float]]:
    """Compiled and recomputing steps must have the losses of the plain one; return the first of each."""
    clips = 2
    ways = {"eager": {}, "recompute": {"recompute": True}, "compiled": {"compiled": True}}
    losses = {}
    for name, changes in ways.items():
        step = step_of(run, clips, **changes)
        found = []
        for _ in range(LOSS_STEPS):
            terms = step.gradient()
            step.update(terms)
            found.append(float(terms[0]))
        losses[name] = found
        del step
    for name, found in losses.items():
        for value, exact in zip(found, losses["eager"], strict=True):
            run.require(
                abs(value - exact) < 0.02 * abs(exact), f"{name}: losses {found}, eager {losses['eager']}"
            )
    return losses


def speed(run: Run) -> None:
    """G4."""
    losses = check_losses(run)
    run.save("G4 losses", losses=losses)
    clips = 2 if run.smoke else 16
    operations = 3.0 * count(run.config()).operations
    ways = {}
    for name, changes in {
        "eager": {},
        "recompute": {"recompute": True},
        "compiled": {"compiled": True},
        "compiled, recompute": {"compiled": True, "recompute": True},
    }.items():
        step = step_of(run, clips, **changes)
        task = measure.Task("step", lambda step=step: step.update(step.gradient()), operations * clips)
        times = run.times([task])
        rate = clips / times.median("step")
        ways[name] = {
            "clips_per_second": round(rate, 3),
            "share_of_matmul": run.share(times, task),
            "share_of_data_sheet": round(operations * rate / PEAK, 4),
        }
        del step, task
        empty(run)
    fastest = max(ways, key=lambda name: ways[name]["clips_per_second"])
    run.save("G4 training step", way=fastest, clips=clips, **ways[fastest], ways=ways)
    local = 2 if run.smoke else 5
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    times = run.times([measure.Task("released", released_step(run, local))])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    rate = local / times.median("released")
    ratio = round(ways[fastest]["clips_per_second"] / rate, 2)
    run.save(
        "G4 training against released", ratio=ratio, clips=local, released_clips_per_second=round(rate, 3)
    )


def empty(run: Run) -> None:
    """Give cached memory back and start to count its peak again."""
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def largest_batch(run: Run) -> None:
    """G5: the peak of a step without checkpointing of blocks, for growing batches until one does not fit."""
    found = {}
    for recompute in (False, True):
        peaks = {}
        for clips in (1, 2) if run.smoke else BATCHES:
            empty(run)
            try:
                step = step_of(run, clips, recompute=recompute)
                step.update(step.gradient())
            except torch.OutOfMemoryError:
                break
            finally:
                step = None
            peaks[clips] = 0.0 if run.smoke else round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["recompute" if recompute else "plain"] = peaks
    largest = {name: max(peaks, default=0) for name, peaks in found.items()}
    run.save("G5 clips in one step", largest_batch=max(largest.values()), largest=largest, peak_gib=found)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both."""
    run = Run(__doc__.splitlines()[0], argv)
    speed(run)
    largest_batch(run)


if __name__ == "__main__":
    main()
