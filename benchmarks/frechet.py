# SPDX-License-Identifier: Apache-2.0
"""Seconds and memory of a Frechet distance: python benchmarks/frechet.py [--rows 50000 --features 2048].

The default is FVD's 2048 x 400. The features are standard normal, so the value must be near its expectation D
(D + 5) / (2 N), which is printed too. On a busy machine use ``processor_s``, the seconds of all threads
together.
"""

import argparse
import json
import platform
import resource
import time
from collections.abc import Sequence
from statistics import median

import measure
import torch

from latte.evaluation.frechet import frechet_distance
from latte.runtime import generator


def peak_bytes() -> int:
    """Return the peak memory of this process (Linux counts KiB, macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--features", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    n, k = options.rows, options.features
    real, fake = (torch.randn(n, k, generator=generator(0, "features", side)) for side in ("real", "fake"))
    walls: list[float] = []
    processors: list[float] = []
    value = 0.0
    for _ in range(options.repeats):
        wall = time.perf_counter()
        processor = time.process_time()
        value = frechet_distance(real, fake)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    line = {
        "what": "frechet",
        "machine": measure.machine(torch.device("cpu")),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "repeats": options.repeats,
        "median_s": round(median(walls), 4),
        "best_s": round(min(walls), 4),
        "spread": round((max(walls) - min(walls)) / median(walls), 4),
        "processor_s": round(median(processors), 4),
        "peak_gib": round(peak_bytes() / 2**30, 3),
        "value": value,
        "expected": k * (k + 5) / (2 * n),
        "settings": {"rows": n, "features": k},
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
