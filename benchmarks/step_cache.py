# SPDX-License-Identifier: Apache-2.0
"""The step cache against the plain solver with as many evaluations: python benchmarks/step_cache.py [MODEL].

The reference is the uncached sample of ``--steps`` steps. For each threshold the line holds the evaluations
per clip and guidance branch, how many times fewer they are, the PSNR of the cached clips to the reference,
and the PSNR of the clips that the plain solver makes in as many steps.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import measure
import numpy as np

from latte.inference.generate import SampleConfig
from latte.inference.pipeline import VideoPipeline


def psnr(clips: np.ndarray, reference: np.ndarray) -> float | None:
    """Return the mean over clips, uint8 (b t h w c), of the PSNR in dB; None for equal clips."""
    errors = (clips.astype(float) - reference).reshape(len(clips), -1)
    squared = (errors**2).mean(1)
    return None if (squared == 0).any() else float((10 * np.log10(255**2 / squared)).mean())


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin-shapes")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sampler", default="dpmpp")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.3])
    options = parser.parse_args(argv)
    pipe = VideoPipeline.from_pretrained(options.model, device="cpu", dtype="fp32")
    labels = [seed % max(len(pipe.classes), 1) for seed in range(options.count)] if pipe.classes else None
    rows: list[int] = []
    pipe.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))

    def run(config: SampleConfig) -> tuple[np.ndarray, int]:
        rows.clear()
        clips = [clip for _, clip in pipe.generate(range(options.count), labels, config=config)]
        return np.stack(clips), sum(rows)

    config = SampleConfig(options.sampler, options.steps, options.guidance, batch=options.count)
    reference, full = run(config)
    cached = []
    for threshold in options.thresholds:
        clips, evaluated = run(replace(config, cache=threshold))
        equal = round(options.steps * evaluated / full)
        plain, _ = run(replace(config, steps=equal))
        values = {"threshold": threshold, "evaluations": options.steps * evaluated / full}
        values |= {"times_fewer": full / evaluated, "psnr": psnr(clips, reference)}
        cached.append(values | {"plain_steps": equal, "plain_psnr": psnr(plain, reference)})
    line = {
        "what": "step_cache",
        **{key: value for key, value in vars(options).items() if key != "thresholds"},
        "cached": cached,
        "weights_sha256": pipe.weights,
        "commit": measure.commit(),
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
