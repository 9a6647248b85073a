# SPDX-License-Identifier: Apache-2.0
"""How far few steps of each solver are from the limit of many: python benchmarks/solver_distance.py [MODEL].

The limit is ``unipc`` with ``--limit`` steps. A distance is the relative RMS of the latents of ``--count``
clips: root mean square difference over the standard deviation of the limit. The model reads class labels.
"""

import argparse
import json
from collections.abc import Sequence

import measure
import torch
from torch import Tensor

from latte.diffusion.config import build_process
from latte.diffusion.samplers import sample
from latte.inference.generate import condition
from latte.inference.pipeline import VideoPipeline
from latte.runtime import SampleNoise

SOLVERS = {
    "euler": ("euler", None),
    "dpmpp": ("dpmpp", 2),
    "dpmpp --order 3": ("dpmpp", 3),
    "unipc": ("unipc", 2),
    "unipc --order 3": ("unipc", 3),
}


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin-shapes")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--limit", type=int, default=500, help="steps of the limit")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--guidance", type=float, default=1.0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    pipe = VideoPipeline.from_pretrained(options.model, device="cpu", dtype="fp32")
    process = build_process(pipe.diffusion)
    model = pipe.model.eval()
    shape = (model.config.num_frames, model.config.latent_channels, *model.config.grid_size)
    labels = [seed % len(pipe.classes) for seed in range(options.count)]
    denoise = condition(model, labels, None, options.count, options.guidance, torch.float32)(slice(None))

    def run(name: str, steps: int, order: int | None) -> Tensor:
        with torch.no_grad():
            return sample(
                name, denoise, process, SampleNoise(range(options.count)), shape, steps, order=order
            )

    limit = run("unipc", options.limit, 2)
    distances = {
        label: [
            float((run(name, steps, order) - limit).square().mean().sqrt() / limit.std())
            for steps in options.steps
        ]
        for label, (name, order) in SOLVERS.items()
    }
    line = {
        "what": "solver_distance",
        **vars(options),
        "distances": distances,
        "weights_sha256": pipe.weights,
        "commit": measure.commit(),
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
