# SPDX-License-Identifier: Apache-2.0
"""Forward passes in every precision against a reference model: python benchmarks/precision.py --size S.

The reference (``benchmarks/plain.py``), ours in fp32, bf16, int8 and, where the GPU has it, FP8, and a
matrix product, in turns in one process with the same weights. For each: the reference's time divided by
its own, and the relative RMS distance of its output from that of the reference. ``fastest`` is what
``dtype=fastest`` finds for this model, the seconds that it measured, and its time over that of the best dtype
it chooses from.
"""

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median

import measure
import torch
from plain import PlainLatte

from latte.inference.generate import autocast
from latte.model.fastest import CANDIDATES, TIE, choice, cut, products
from latte.model.fastest import measure as measure_dtypes
from latte.profile.flops import count
from latte.runtime import resolve_dtype

NAMES = ("fp32", "bf16", "int8")
GOALS = {
    "ratio": {"fp32": 1.2, "int8": 3.0},
    "relative_rms": {"fp32": 1e-5, "int8": 3e-3, "fp8": 1e-2},
    "fastest_over_best": TIE,
}


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=__doc__)
    measure.add_arguments(parser)
    measure.add_model_arguments(parser)
    parser.set_defaults(classes=101)
    options = parser.parse_args(argv)
    device, _ = measure.prepare(options)
    config = measure.model_config(options)
    model = measure.busy_model(config, device, options.compile).eval().requires_grad_(False)
    plain = PlainLatte(model)
    z = torch.randn(
        options.batch, config.num_frames, config.latent_channels, *config.grid_size, device=device
    )
    t = torch.full((options.batch,), 500, device=device)
    label = torch.zeros_like(t)
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    names = (*NAMES, "fp8") if has_fp8 else NAMES
    operations = float(count(config).operations * options.batch)
    start = time.perf_counter()
    chosen = choice(measure_dtypes(products(*cut(config, options.batch), device=device, training=False)))
    probe = time.perf_counter() - start
    with torch.inference_mode():
        exact = plain(z, t, label)
        tasks = [measure.Task("plain", lambda: plain(z, t, label), operations)]
        errors = {}
        for name in names:
            call = autocast(model, device, resolve_dtype(name, device))
            found = call(z, t, label=label).float()
            errors[name] = float((found - exact).square().mean().sqrt() / exact.square().mean().sqrt())
            tasks.append(measure.Task(name, lambda call=call: call(z, t, label=label), operations))
        yard = measure.matmul(device, torch.float32)
        times = measure.timed(options, [*tasks, yard], device)
    answers = {
        name: {"ratio": round(times.ratio("plain", name), 3), "relative_rms": float(f"{errors[name]:.3g}")}
        for name in names
    }
    best = min(CANDIDATES, key=lambda name: median(times.seconds[name]))
    found = {"name": chosen, "seconds": round(probe, 2), "over_best": round(times.ratio(chosen, best), 3)}
    line = {
        "what": "forward in every precision",
        "machine": measure.machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "repeats": len(times.seconds["plain"]),
        "rejected": times.rejected,
        "plain_median_s": round(median(times.seconds["plain"]), 4),
        "share_of_matmul_fp32": round(operations / yard.operations / times.ratio("fp32", "matmul"), 4),
        **answers,
        "fastest": found,
        "goals": GOALS,
        "settings": measure.settings_of(config, options),
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
