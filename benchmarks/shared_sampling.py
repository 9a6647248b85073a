# SPDX-License-Identifier: Apache-2.0
"""One clip sampled by several processes (sequence parallelism) over one:
python benchmarks/shared_sampling.py --depth 12 --width 384 --heads 6 --frames 16 --latent 32

Every round times two sides in turn: one process alone while the others wait, and all together. The processes
run on this machine's CPU with one thread each, over the loopback interface. Beside wall time it measures the
processor time of the busiest process, which other programs on the machine disturb less; the time that a
process waits for another one is not in it.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import measure
import torch
from processes import measured

from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.guidance import guided
from latte.diffusion.samplers import sample
from latte.distributed import process_group
from latte.model.sequence import share_sequence
from latte.runtime import SampleNoise

CPU = torch.device("cpu")


def one_process(rank: int, port: int, options: argparse.Namespace, pipe: Any) -> None:
    """Run one of the processes; rank 0 sends the numbers."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(options.processes), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    with process_group(CPU) as group, torch.no_grad():
        config = measure.model_config(options)
        model = measure.busy_model(config, CPU).eval()
        team = group.teams(options.processes)
        label = torch.zeros(1, dtype=torch.int64)
        denoise = guided(model, {"label": label}, {"label": label - 1}, 2.0)
        process = build_process(DiffusionConfig())
        shape = (config.num_frames, config.latent_channels, *config.grid_size)

        def clip() -> torch.Tensor:
            noise = SampleNoise([0])
            return sample("ddim", denoise, process, noise, shape, options.steps, 0.0, CPU, None)

        found: dict[str, list[Any]] = {"speed": [], "processor": [], "difference": [], "alone_s": []}
        for number in range(options.rounds + 1):
            wall = {}
            used = {}
            latents = {}
            for side in ("alone", "together"):
                share_sequence(model, team if side == "together" else None)
                group.max(0)  # all begin together
                began = time.perf_counter(), time.process_time()
                if rank == 0 or side == "together":
                    latents[side] = clip()
                used[side] = group.max(int(1e6 * (time.process_time() - began[1])))
                wall[side] = time.perf_counter() - began[0]
            if number and rank == 0:  # the first round warms up
                found["speed"].append(wall["alone"] / wall["together"])
                found["processor"].append(used["alone"] / used["together"])
                found["alone_s"].append(wall["alone"])
                found["difference"].append(float((latents["alone"] - latents["together"]).abs().max()))
        if rank == 0:
            pipe.send(found)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    measure.add_model_arguments(parser)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="denoising steps, each with guidance")
    options = parser.parse_args(argv)
    options.classes = options.classes or 10  # for guidance
    found = measured(options, one_process)
    line: dict[str, Any] = {
        "what": "shared_sampling",
        "machine": measure.machine(CPU),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "processes": options.processes,
        "threads_each": 1,
        "repeats": options.rounds,
        "alone_s": round(median(found["alone_s"]), 3),
        "speed_over_one": round(median(found["speed"]), 3),
        "processor_over_one": round(median(found["processor"]), 3),  # of the busiest process
        "difference": max(found["difference"]),
        "settings": {key: value for key, value in vars(options).items() if key != "rounds"},
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
