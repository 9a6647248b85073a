# SPDX-License-Identifier: Apache-2.0
"""G8: from the start of the process to the end of the first training step of XL/2 with compiled blocks:
python benchmarks/gpu/start.py [--smoke].

The process is a fresh one, once with an empty compiler cache and once with the cache that it has filled.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from goals import Run

FIRST_STEP = """
import sys
sys.path.insert(0, sys.argv[1])
from goals import Run
from train import step_of
run = Run("first step", ["--smoke"] if sys.argv[2] == "smoke" else [])
step = step_of(run, 2, compiled=True)
terms = step.gradient()
step.update(terms)
print(float(terms[0]))
"""


def first_step(run: Run, cache: str) -> tuple[float, float]:
    """Return (seconds, loss) of a process that makes one step."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEP, str(Path(__file__).parent), "smoke" if run.smoke else "real"],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    run.require(done.returncode == 0, f"the first step failed: {done.stderr.strip()[-400:]}")
    return seconds, float(done.stdout.split()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both."""
    run = Run(__doc__.splitlines()[0], argv)
    with tempfile.TemporaryDirectory() as cache:
        cold, loss = first_step(run, cache)
        warm, again = first_step(run, cache)
    run.require(abs(loss - again) < 1e-3 * abs(loss), f"the same first step has loss {loss} and {again}")
    run.save("G8 first step, cold", first_step_s=round(cold, 2), loss=loss)
    run.save("G8 first step, warm", first_step_s=round(warm, 2), loss=again)


if __name__ == "__main__":
    main()
