# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: their options, and the JSON line of a time, see ``latte.profile.timing``.

With fewer than three clean rounds nothing is printed and the exit code is 1.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from latte.model.latte import Latte, ModelConfig
from latte.profile.timing import (
    FEWEST_ROUNDS,
    MATMUL,
    Task,
    Times,
    interleave,
    make_busy,
    matmul,
    once,
    other_load,
    processor_seconds,
    synchronise,
)
from latte.runtime import device_name as machine
from latte.runtime import resolve_device, resolve_dtype

__all__ = [
    "MATMUL",
    "Task",
    "Times",
    "interleave",
    "machine",
    "matmul",
    "once",
    "other_load",
    "processor_seconds",
    "synchronise",
]

ROOT = Path(__file__).parents[1]
COMPILES = ("off", "blocks", "whole", "graphs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark takes: where, how often, how strict."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16, fp16 or auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--rounds", type=int, default=7, help="clean rounds wanted")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.3,
        help="least length of one sample; short tasks are repeated within it",
    )
    parser.add_argument(
        "--max-other-load",
        type=float,
        default=0.1,
        help="share of the CPU that others may use during a clean round",
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor time instead of wall time: for a CPU that others use, too",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that choose the model and its input."""
    parser.add_argument("--size", default="S", help="S, B, L or XL")
    for name in ("depth", "width", "heads", "classes"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--variant", default="1")
    parser.add_argument("--patch-size", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--latent", type=int, default=32, help="side of the latent")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--compile",
        default="off",
        choices=COMPILES,
        help="torch.compile each block, the model, or the model as CUDA graphs",
    )


def timed(options: argparse.Namespace, tasks: list[Task], device: torch.device) -> Times:
    """Times of the tasks in turn, as the options say."""
    clock = time.process_time if options.processor_time and device.type == "cpu" else time.perf_counter
    return interleave(tasks, device, options.rounds, options.seconds, options.max_other_load, clock=clock)


def model_config(options: argparse.Namespace) -> ModelConfig:
    """The options as a ModelConfig."""
    return ModelConfig(
        size=options.size,
        depth=options.depth,
        width=options.width,
        heads=options.heads,
        variant=options.variant,
        patch_size=options.patch_size,
        num_frames=options.frames,
        latent_size=options.latent,
        latent_channels=options.channels,
        num_classes=options.classes,
    )


def prepare(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Set threads, read device and dtype."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    return device, resolve_dtype(options.dtype, device)


def busy_model(config: ModelConfig, device: torch.device, compiled: str = "off") -> Latte:
    """Return a model without zeros, compiled as asked."""
    model = make_busy(Latte(config))
    model = model.to(device)
    if compiled == "blocks":
        for block in model.blocks:
            block.compile()
    elif compiled != "off":
        model.compile(mode="reduce-overhead" if compiled == "graphs" else "default")
    return model


def commit() -> str:
    """Return the short commit hash, with '-dirty' when files differ from it; 'none' outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False
        ).stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    return (head + ("-dirty" if git("status", "--porcelain") else "")) if head and head != "HEAD" else "none"


def report(
    what: str,
    task: Task,
    yard: Task,
    times: Times,
    device: torch.device,
    settings: dict[str, object],
    **more: object,
) -> dict:
    """Print the JSON line of ``task`` and the matrix product ``yard``; exit 1 for too few clean rounds."""
    samples = times.seconds[task.name]
    if len(samples) < FEWEST_ROUNDS:
        sys.exit(
            f"{what}: only {len(samples)} clean rounds and {times.rejected} disturbed ones, "
            f"at least {FEWEST_ROUNDS} are needed; "
            "stop what else runs on this machine, or raise --max-other-load and report that"
        )
    middle = median(samples)
    line: dict[str, object] = {
        "what": what,
        "machine": machine(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    line |= {
        "torch": torch.__version__,
        "commit": commit(),
        "repeats": len(samples),
        "rejected": times.rejected,
    }
    line |= {
        "median_s": round(middle, 6),
        "spread": round(times.spread(task.name), 4),
        "operations": task.operations,
    }
    line |= {"gflops": round(task.operations / middle / 1e9, 1)}
    line |= {"matmul_gflops": round(yard.operations / median(times.seconds[yard.name]) / 1e9, 1)}
    line |= {
        "share_of_matmul": round(task.operations / yard.operations / times.ratio(task.name, yard.name), 4)
    }
    if device.type == "cuda":
        line["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    line |= {**more, "settings": settings}
    print(json.dumps(line), flush=True)
    return line


def settings_of(config: ModelConfig, options: argparse.Namespace) -> dict[str, object]:
    """What was measured: the model's keys and the options that change it."""
    return {
        **asdict(config),
        "batch": options.batch,
        "dtype": options.dtype,
        "compile": options.compile,
        "max_other_load": options.max_other_load,
        "processor_time": options.processor_time,
    }
