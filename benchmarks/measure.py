# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every round times each task once and a large matrix product beside them, so that a
share of the machine's rate compares two numbers of the same seconds.

A round counts only when the machine was ours: on a CPU, when other processes used less than
``max_other_load`` of it; on a GPU, when the matrix product ran within 15 % of its best. With fewer than three
such rounds nothing is printed and the exit code is 1.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch

from latte.model.latte import Latte, ModelConfig
from latte.runtime import generator, resolve_device, resolve_dtype

ROOT = Path(__file__).parents[1]
FEWEST_ROUNDS = 3
COMPILES = ("off", "blocks", "whole", "graphs")
MATMUL = {"cpu": 2048, "cuda": 8192, "mps": 4096}


@dataclass(frozen=True)
class Task:
    """Something to time: ``run()`` does ``operations`` (2 per multiply-add), 0 if not of interest."""

    name: str
    run: Callable[[], object]
    operations: float = 0.0


@dataclass
class Times:
    """Seconds of one run of each task, one entry per clean round, and how many rounds were thrown away."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    rejected: int = 0

    def ratio(self, above: str, below: str) -> float:
        """Median over rounds of seconds(above) / seconds(below)."""
        return median(a / b for a, b in zip(self.seconds[above], self.seconds[below], strict=True))


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
    """Return a model without zeros: on zero layers processors draw less power and clock higher."""
    model = Latte(config)
    draw = generator(0, "benchmark")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.02)
    model = model.to(device)
    if compiled == "blocks":
        for block in model.blocks:
            block.compile()
    elif compiled != "off":
        model.compile(mode="reduce-overhead" if compiled == "graphs" else "default")
    return model


def matmul(device: torch.device, dtype: torch.dtype, side: int = 0) -> Task:
    """A square matrix product: the rate that everything else is a share of."""
    side = side or MATMUL[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return Task("matmul", lambda: a @ b, 2.0 * side**3)


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def once(task: Task, device: torch.device, repeats: int) -> float:
    """Seconds of one run, over ``repeats`` runs."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        task.run()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def processor_seconds() -> tuple[float, float]:
    """Return seconds that all cores were busy, and that this process used; zeros without /proc."""
    own = sum(os.times()[:4])
    try:
        fields = [
            int(n) for n in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        ]
    except OSError:
        return 0.0, 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK"), own


def other_load(before: tuple[float, float], after: tuple[float, float], wall: float) -> float:
    """Share of the machine that other processes used between two readings."""
    others = (after[0] - before[0]) - (after[1] - before[1])
    return max(0.0, others / (wall * (os.cpu_count() or 1)))


def interleave(
    tasks: list[Task], device: torch.device, rounds: int, seconds: float, max_other_load: float
) -> Times:
    """Times of ``rounds`` clean rounds of all tasks in turn, from at most four times as many."""
    repeats = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for task in tasks:
        once(task, device, 1)
        repeats[task.name] = max(1, round(seconds / max(once(task, device, 1), 1e-6)))
    times, best = Times({task.name: [] for task in tasks}), float("inf")
    for _ in range(4 * rounds):
        before, start = processor_seconds(), time.perf_counter()
        row = {task.name: once(task, device, repeats[task.name]) for task in tasks}
        other = other_load(before, processor_seconds(), time.perf_counter() - start)
        best = min(best, row.get("matmul", float("inf")))
        clean = other <= max_other_load if device.type == "cpu" else row.get("matmul", best) <= 1.15 * best
        times.rejected += not clean
        for name, value in row.items() if clean else ():
            times.seconds[name].append(value)
        if min(len(samples) for samples in times.seconds.values()) >= rounds:
            break
    return times


def machine(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


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
    middle, (low, _, high) = median(samples), quantiles(samples, n=4)
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
        "spread": round((high - low) / middle, 4),
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
    }
