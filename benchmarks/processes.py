# SPDX-License-Identifier: Apache-2.0
"""Clips per second of training in several processes over one, same global batch:
python benchmarks/processes.py --depth 8 --width 144 --heads 4 --frames 8 --latent 8 --batch 16

Every round times four sides in turn, each for the same steps: one process alone while the others wait, all
processes with gradients summed in buckets during the backward pass (DDP), all processes with every gradient
summed after it, and all processes with weights split among them (FSDP).
The processes run on this machine's CPU with one thread each, over the loopback interface.
"""

import argparse
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import measure
import torch

from latte.data.loader import share_of
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.distributed import Group, process_group
from latte.training.config import TrainConfig
from latte.training.optim import TrainState
from latte.training.parallel import PARALLELISMS
from latte.training.step import Task, backward

CPU = torch.device("cpu")
SIDES = ("alone", "buckets", "after_backward", "fsdp")
Step = Callable[[], None]


def training_step(
    options: argparse.Namespace, group: Group, after_backward: bool = False, scheme: str = "ddp"
) -> Step:
    """Return a training step of the processes in ``group`` on fixed random latents, with a parallelism."""
    config = measure.model_config(options)
    model = measure.busy_model(config, CPU).train()
    process = build_process(DiffusionConfig())
    objective = OBJECTIVES["paper"]
    task = Task(model, model, process, objective, None, 0, options.batch, None, CPU, torch.float32)
    skeleton = None
    if not after_backward:
        parallel = PARALLELISMS[scheme](model, group, TrainConfig(parallel=scheme), CPU, torch.float32)
        task = replace(task, forward=parallel.forward, loss_scale=parallel.loss_scale)
        skeleton = parallel.skeleton
    state = TrainState(model, 1e-4, 0.0, 0.9999, skeleton=skeleton)
    positions = share_of(options.batch, group.rank, group.size)
    video = torch.randn(len(positions), config.num_frames, config.latent_channels, *config.grid_size)
    label = None if config.num_classes is None else torch.zeros(len(positions), dtype=torch.int64)

    def step() -> None:
        losses = backward(task, 1, positions, video, label)
        if after_backward:
            group.all_reduce([parameter.grad for parameter in state.parameters if parameter.grad is not None])
        state.update(1, losses, 1e-4, 0.1, group)

    return step


def clock() -> tuple[float, float]:
    """Return wall time and the processor time of this process, its communication threads included."""
    return time.perf_counter(), time.process_time()


def one_process(rank: int, port: int, options: argparse.Namespace, pipe: Any) -> None:
    """Run one of the processes; rank 0 sends wall seconds of each side by round, and processor seconds of all
    processes together.
    """
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(options.processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    with process_group(CPU) as group:
        steps = {
            "alone": training_step(options, Group()),
            "buckets": training_step(options, group),
            "after_backward": training_step(options, group, after_backward=True),
            "fsdp": training_step(options, group, scheme="fsdp"),
        }
        wall: dict[str, list[float]] = {side: [] for side in SIDES}
        processor: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(options.rounds + 1):
            for side in SIDES:
                group.max(0)  # all begin together
                began = clock()
                for _ in range(options.steps):
                    if rank == 0 or side != "alone":
                        steps[side]()
                used = torch.tensor(clock()[1] - began[1], dtype=torch.float64)
                group.max(0)
                group.all_reduce([used])
                if number:  # the first round warms up
                    wall[side].append((clock()[0] - began[0]) / options.steps)
                    processor[side].append(float(used) / options.steps)
        if rank == 0:
            pipe.send((wall, processor))


def measured(options: argparse.Namespace, target: Callable[..., None] = one_process) -> Any:
    """Start ``target`` in each of the processes and return what rank 0 sends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["latte.training.train"])  # torch is imported once
    here, there = context.Pipe()
    arguments = [(rank, port, options, there) for rank in range(options.processes)]
    children = [context.Process(target=target, args=given, daemon=True) for given in arguments]
    for child in children:
        child.start()
    while not here.poll(1):
        if any(child.exitcode for child in children):
            sys.exit("processes: one of them failed, see its traceback")
    found = here.recv()
    for child in children:
        child.join(60)
    return found


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    measure.add_model_arguments(parser)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="training steps of each side in a round")
    options = parser.parse_args(argv)
    wall, processor = measured(options)
    line: dict[str, Any] = {
        "what": "processes",
        "machine": measure.machine(CPU),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "processes": options.processes,
        "threads_each": 1,
        "repeats": options.rounds,
        "median_s": {side: round(median(wall[side]), 5) for side in SIDES},
    }
    for side in SIDES[1:]:
        speed = median(a / b for a, b in zip(wall["alone"], wall[side], strict=True))
        cost = median(a / b for a, b in zip(processor["alone"], processor[side], strict=True))
        line[side] = {
            "speed_over_one": round(speed, 3),  # clips per second over those of one process
            "efficiency": round(speed / options.processes, 4),
            "processor_efficiency": round(cost, 4),  # processor time of one process over that of all
        }
    settings = vars(options).items()
    line["settings"] = {key: value for key, value in settings if key not in ("processes", "rounds")}
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
