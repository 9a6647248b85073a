# SPDX-License-Identifier: Apache-2.0
"""How long training waits for a checkpoint, written at once or from a copy while it goes on:
python benchmarks/saving.py --depth 12 --width 768 --heads 12 --rounds 4

Every round saves the same model, EMA weights and AdamW state both ways. Between two saves the asynchronous
side computes, as training does, until the last one is written. The first round, in which the memory of the
copy is taken, is not counted. Training waits in the save itself and, after the seconds that the next gradients take,
before the update of the weights. Wall and processor seconds of the thread that trains.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch

from latte.distributed import Group
from latte.training.optim import TrainState
from latte.training.saving import Saver

CPU = torch.device("cpu")
SIDES = ("synchronous", "asynchronous")


def trained_state(options: argparse.Namespace) -> TrainState:
    """Return a model with EMA weights and optimizer state, after one step with random gradients."""
    model = measure.busy_model(measure.model_config(options), CPU).train()
    state = TrainState(model, 1e-4, 0.0, 0.9999)
    for parameter in state.parameters:
        parameter.grad = torch.randn_like(parameter)
    state.update(1, torch.zeros(3), 1e-4, None, Group())
    return state


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and processor seconds of this thread in ``work()``."""
    wall = time.perf_counter()
    processor = time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - processor


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON line and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    measure.add_model_arguments(parser)
    parser.add_argument("--rounds", type=int, default=4, help="counted rounds")
    parser.add_argument("--gradients", type=float, default=0.5, help="seconds between a save and an update")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    state = trained_state(options)
    folder = Path(tempfile.mkdtemp())
    savers = {name: Saver(folder / name, Group(), asynchronous=name == "asynchronous") for name in SIDES}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    matrix = torch.randn(256, 256)
    try:
        for number in range(options.rounds + 1):
            for name, saver in savers.items():
                saved = timed(lambda saver=saver, number=number: saver.save(number + 1, state.parts(), {}, 1))
                end = time.thread_time() + options.gradients
                while time.thread_time() < end:
                    matrix @ matrix
                settled = timed(saver.settle)
                found = (saved[0] + settled[0], saved[1] + settled[1])
                while saver.thread is not None and saver.thread.is_alive():
                    matrix @ matrix
                saver.finish()
                if number:
                    seconds[name].append(found)
    finally:
        shutil.rmtree(folder)
    both = {name: [median(times) for times in zip(*found, strict=True)] for name, found in seconds.items()}
    wall, processor = (fast / slow for fast, slow in zip(both[SIDES[1]], both[SIDES[0]], strict=True))
    line: dict[str, Any] = {
        "what": "saving",
        "machine": measure.machine(CPU),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "repeats": options.rounds,
        "megabytes": round(
            sum(part.nbytes for group in state.parts().values() for part in group.values()) / 1e6
        ),
        "median_s": {name: round(found[0], 4) for name, found in both.items()},
        "processor_s": {name: round(found[1], 4) for name, found in both.items()},
        "asynchronous_over_synchronous": {"wall": round(wall, 4), "processor": round(processor, 4)},
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
