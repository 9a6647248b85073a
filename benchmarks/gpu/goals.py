# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmarks share: their goals, real and smoke shapes, checks, and the lines that they save.

A smoke run takes the same path with tiny models on a CPU, compiled without a code generator. Times of a goal
are compared with it only on the GPU that it was set for, an H200; fractions and ratios on any.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

import measure
import torch
from torch import Tensor

from latte.model.compiled import compile_blocks
from latte.model.denoiser import Denoiser
from latte.model.latte import ModelConfig
from latte.profile.timing import make_busy

GOALS: dict[str, tuple[str, float, bool, bool]] = {
    # what: (field, goal, is a smaller one better, does it hold for every GPU)
    "G1 forward, batch 1": ("share_of_matmul", 0.75, False, True),
    "G1 forward, batch 8": ("seconds_per_clip", 0.0056, True, False),
    "G1 forward, batch 1, fp8": ("seconds_per_clip", 0.0042, True, False),
    "G2 clip, 50 steps": ("clip_s", 0.65, True, False),
    "G2 clip, 20 steps": ("clip_s", 0.27, True, False),
    "G2 clip, own against released": ("ratio", 25.0, False, True),
    "G3 text clip, 50 steps": ("clip_s", 6.0, True, False),
    "G3 text clip, 50 steps, cache": ("clip_s", 3.3, True, False),
    "G3 text clip, 20 steps": ("clip_s", 2.4, True, False),
    "G3 text clip, 50 steps, fp8": ("clip_s", 4.3, True, False),
    "G4 training step": ("clips_per_second", 44.0, False, False),
    "G4 training against released": ("ratio", 5.0, False, True),
    "G5 clips in one step": ("largest_batch", 40, False, False),
    "G6 score of 2048 clips": ("minutes", 12.0, True, False),
    "G6 features and statistics": ("features_s", 15.0, True, False),
    "G7 decode 16 frames of 256": ("decode_s", 0.030, True, False),
    "G7 decode 16 frames of 512": ("decode_s", 0.120, True, False),
    "G8 first step, cold": ("first_step_s", 60.0, True, False),
    "G8 first step, warm": ("first_step_s", 10.0, True, False),
}
BF16_RMS = 0.05  # of one forward pass, relative to float32
H200 = "H200"


class Run:
    """One script's run: ``device``, ``smoke``, and ``save``, which prints a line and appends it to a file."""

    def __init__(self, about: str, argv: Sequence[str] | None = None):
        parser = argparse.ArgumentParser(description=about)
        parser.add_argument(
            "--smoke", action="store_true", help="tiny models on a CPU: does the script work?"
        )
        parser.add_argument("--rounds", type=int, default=0, help="clean rounds; 7, or 3 in a smoke run")
        parser.add_argument("--out", type=Path, help="file of JSON lines; $OUT/gpu.jsonl by default")
        options = parser.parse_args(argv)
        self.smoke = options.smoke
        if not self.smoke and not torch.cuda.is_available():
            sys.exit("this benchmark needs a CUDA device; --smoke runs its code with tiny models on a CPU")
        self.device = torch.device("cpu" if self.smoke else "cuda")
        self.rounds = options.rounds or (3 if self.smoke else 7)
        self.seconds = 0.0 if self.smoke else 0.3
        self.out = options.out or Path(os.environ.get("OUT", "."), "gpu.jsonl")
        self.has_fp8 = not self.smoke and torch.cuda.get_device_capability() >= (9, 0)
        torch.manual_seed(0)

    def config(self, **changes: Any) -> ModelConfig:
        """XL/2 of 16 latent frames of 32 x 32 with 101 classes, or a tiny one."""
        shape = {"size": "XL", "num_classes": 101}
        if self.smoke:
            shape |= {"size": "S", "depth": 2, "width": 32, "heads": 2, "num_frames": 2, "latent_size": 4}
        return ModelConfig(**(shape | changes))

    def model(self, config: Any) -> Denoiser:
        """A model without zeros on the device, in evaluation mode."""
        model = make_busy(config.build()).to(self.device).eval()
        assert isinstance(model, Denoiser)
        return model.requires_grad_(False)

    def compiled(self, model: Denoiser) -> Denoiser:
        """A copy of ``model`` with compiled blocks."""
        found = copy.deepcopy(model)
        compile_blocks(found, self.device, backend="eager" if self.smoke else "inductor")
        return found

    def times(self, tasks: list[measure.Task]) -> measure.Times:
        """Times of ``tasks`` in turn, beside a bf16 matrix product; exit 1 for too few clean rounds."""
        yard = measure.matmul(self.device, torch.bfloat16)
        found = measure.interleave([*tasks, yard], self.device, self.rounds, self.seconds, 2.0)
        self.require(
            len(found.loads) >= measure.FEWEST_ROUNDS,
            f"only {len(found.loads)} rounds had a steady matrix product; is this GPU ours alone?",
        )
        return found

    def share(self, times: measure.Times, task: measure.Task) -> float:
        """Share of the matrix product's rate; exit 1 for one that cannot be."""
        side = measure.MATMUL[self.device.type]
        share = task.operations / (2.0 * side**3) / times.ratio(task.name, "matmul")
        self.require(
            0 < share <= 1.05 or self.smoke,
            f"{task.name}: {share:.2f} of the matrix product's rate cannot be",
        )
        return round(share, 4)

    def close(self, what: str, found: Tensor, exact: Tensor, most: float) -> float:
        """Relative RMS distance; exit 1 above ``most`` and for NaN/Inf: no time of it is worth printing."""
        found, exact = found.float(), exact.float()
        error = float(((found - exact).square().mean() / exact.square().mean()).sqrt())
        self.require(error <= most, f"{what}: relative RMS distance {error:.3g}, at most {most:g} is right")
        return float(f"{error:.3g}")

    def require(self, good: bool, message: str) -> None:
        """Exit 1 with ``message`` unless ``good``."""
        if not good:
            self.fail(message)

    def fail(self, message: str) -> NoReturn:
        """Exit 1."""
        sys.exit(f"error: {message}")

    def save(self, what: str, **line: Any) -> dict[str, Any]:
        """Print the line, with what was measured where, and append it to the file; return it."""
        facts = {"machine": measure.machine(self.device), "torch": torch.__version__}
        facts |= {"commit": measure.commit(), "smoke": self.smoke}
        found: dict[str, Any] = {"what": what, **line, **facts}
        if what in GOALS:
            found["verdict"] = verdict(what, line, facts["machine"], self.smoke)
        print(json.dumps(found), flush=True)
        with self.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        return found


def verdict(what: str, line: dict[str, Any], machine: str, smoke: bool) -> str:
    """Return reached, missed, or why the goal does not apply."""
    field, goal, smaller, everywhere = GOALS[what]
    if smoke:
        return "smoke"
    if not everywhere and H200 not in machine:
        return f"not comparable: the goal is for an {H200}"
    found = line[field]
    reached = found <= goal if smaller else found >= goal
    return f"{'reached' if reached else 'missed'}: {field} {found:g}, goal {goal:g}"


def wall(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Return the median seconds of ``run`` until the device has finished, after a warm-up."""
    seconds = []
    for _ in range(1 + repeats):
        measure.synchronise(device)
        began = time.perf_counter()
        run()
        measure.synchronise(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])
