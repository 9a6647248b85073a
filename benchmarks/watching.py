# SPDX-License-Identifier: Apache-2.0
"""What it costs to watch a run, as a share of its processor time, and how large its report gets.

python benchmarks/watching.py [RECIPE] [KEY=VALUE ...]. A run of the recipe is trained with TensorBoard and
the report on; the processor seconds inside each callback are divided by those of the run. So the numbers hold
on a busy machine, and the cost of each part is known from one run. Then the report of a made-up run of 10,000
steps is written: a line a step, 100 held-out losses, 20 scores, 20 steps with 8 clips each.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import measure
import torch

from latte.build import build
from latte.config.run import load_run
from latte.training.callbacks import MetricsAccumulator, MetricsFile, ProgressBar, ValidationFile
from latte.training.report import RunReport, write_report
from latte.training.trackers import Tracker

START = "start"
EVENTS = ("on_start", "on_step", "on_validation", "on_samples", "on_checkpoint", "on_end")
WATCHERS = {  # what is timed: name in the result, methods
    MetricsAccumulator: ("off", ("add", "line")),
    MetricsFile: ("off", EVENTS),
    ValidationFile: ("off", ("on_validation",)),
    ProgressBar: ("off", EVENTS),
    Tracker: ("tensorboard", EVENTS),
    RunReport: ("report", EVENTS),
}


def timed(seconds: dict[str, float], name: str, method: Callable) -> Callable:
    """Return ``method`` with its processor seconds added to ``seconds[name]``."""

    def call(*arguments: Any, **settings: Any) -> Any:
        start = time.process_time()
        try:
            return method(*arguments, **settings)
        finally:
            seconds[name] += time.process_time() - start

    return call


def cost_of_watching(recipe: str, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return the share of the run's processor time that each way of watching takes, and the run's steps.

    What happens once, at the start, is given in seconds. The time of samples, scores and held-out losses is
    not part of the shares: they are what is watched.
    """
    fixed = ["train.trackers=[tensorboard]", f"run.dir={folder}"]
    job = build(load_run(recipe, [*words, *fixed])[0], "cpu")
    seconds: dict[str, float] = defaultdict(float)
    with ExitStack() as patches:
        for kind, (name, methods) in WATCHERS.items():
            for method in methods:
                if method in vars(kind):
                    counted = f"{name} {START}" if method == "on_start" else name
                    new = timed(seconds, counted, vars(kind)[method])
                    patches.enter_context(patch.object(kind, method, new))
        start = time.process_time()
        job.train()
        total = time.process_time() - start
    steps = job.config.train.steps
    once = {name: round(value, 3) for name, value in seconds.items() if name.endswith(START)}
    total -= sum(once.values())
    shares = {name: round(value / total, 5) for name, value in seconds.items() if name not in once}
    per_step = round(total / steps, 4)
    return {"steps": steps, "processor_seconds_per_step": per_step, "shares": shares, "once": once}


def made_up_run(folder: Path, steps: int, clip_bytes: int) -> Path:
    """Write a run folder of ``steps`` steps whose clips are random bytes."""
    draw = torch.Generator().manual_seed(0)
    noise = torch.rand(steps, generator=draw).tolist()
    folder.mkdir()
    (folder / "config.yaml").write_text(f"train: {{steps: {steps}}}\ndata: {{resolution: 64}}\n")
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            values = {"loss": 1 / step + noise[step - 1], "grad_norm": noise[-step], "lr": 1e-4}
            file.write(json.dumps({"step": step, **values, "clips_per_second": 8.0, "seconds": step}) + "\n")
    lines = [{"step": step, "validation/loss": noise[step - 1]} for step in range(100, steps + 1, 100)]
    lines += [{"step": step, "score/fvd": noise[step - 1]} for step in range(500, steps + 1, 500)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(500, steps + 1, 500):
        clips = folder / "samples" / f"step-{step:07d}"
        clips.mkdir(parents=True)
        clips.with_suffix(".png").touch()
        for seed in range(8):
            content = torch.randint(256, (clip_bytes,), dtype=torch.uint8, generator=draw)
            (clips / f"seed-{seed:04d}-{seed}-up.mp4").write_bytes(bytes(content.tolist()))
    return folder


def size_of_report(folder: Path, steps: int, clip_bytes: int, repeats: int) -> dict[str, Any]:
    """Return the size of the report of a made-up run in MB, and the processor seconds of writing it."""
    run = made_up_run(folder, steps, clip_bytes)
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        path = write_report(run)
        seconds.append(time.process_time() - start)
    megabytes = round(path.stat().st_size / 1e6, 3)
    return {"steps": steps, "clip_bytes": clip_bytes, "mb": megabytes, "seconds": round(median(seconds), 4)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON line and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="shapes-tiny")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--report-steps", type=int, default=10_000)
    parser.add_argument("--clip-bytes", type=int, default=100_000, help="of each clip of the made-up run")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        watching = cost_of_watching(options.recipe, options.words, Path(folder, "run"))
        size = size_of_report(Path(folder, "made-up"), options.report_steps, options.clip_bytes, 3)
    device = torch.device("cpu")
    line = {
        "what": f"watching {options.recipe} {' '.join(options.words)}".strip(),
        "machine": measure.machine(device),
        "threads": torch.get_num_threads(),
        "commit": measure.commit(),
        **watching,
        "report": size,
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
