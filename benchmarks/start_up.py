# SPDX-License-Identifier: Apache-2.0
"""Wall and processor time of short commands, as multiples of ``import torch`` in the same rounds.

python benchmarks/start_up.py. Every command is a process of its own, all of them in turn, once per round; the
first round fills the caches of files and does not count. A ratio of one round compares seconds of the same
load, so it holds on a busy machine too.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import measure

YARD = "import torch"
COMMANDS = {
    "--help": ["--help"],
    "config show": ["config", "show", "shapes"],
    "plan --help": ["plan", "--help"],
    "a wrong key": ["train", "shapes", "model.sise=S"],
    "plan ffs": ["plan", "ffs"],  # its counts are kept after the first round
    "plan ffs, first": ["plan", "ffs"],
    "sample builtin-shapes --count 8": ["sample", "builtin-shapes", "--count", "8", "--out"],
}


def seconds(arguments: Sequence[str], cache: str) -> tuple[float, float]:
    """Return wall and processor seconds of ``python arguments...`` with the user's cache in ``cache``."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False, env=environment)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: Sequence[str] | None = None) -> dict:
    """Time the commands, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="rounds that count")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=[*COMMANDS], metavar="NAME")
    options = parser.parse_args(argv)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in (YARD, *options.commands)}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(options.rounds + 1):
            for name, row in rows.items():
                words = ["-c", YARD]
                if name != YARD:
                    more = [str(Path(folder) / "clips")] if COMMANDS[name][-1] == "--out" else []
                    words = ["-m", "latte", *COMMANDS[name], *more]
                found = seconds(words, os.devnull if name.endswith(", first") else folder)
                if index:
                    row.append(found)
    line = {
        "what": "start-up, multiples of the time to import torch",
        "machine": measure.machine(measure.resolve_device("cpu")),
        "commit": measure.commit(),
        "repeats": options.rounds,
        "import_torch_seconds": round(median(wall for wall, _ in rows[YARD]), 3),
        "wall": ratios(rows, 0),
        "processor": ratios(rows, 1),
    }
    print(json.dumps(line))
    return line


def ratios(rows: dict[str, list[tuple[float, float]]], part: int) -> dict[str, float]:
    """Return name -> median over rounds of its time divided by that of importing torch."""
    yard = [row[part] for row in rows[YARD]]
    return {
        name: round(median(one[part] / other for one, other in zip(row, yard, strict=True)), 3)
        for name, row in rows.items()
        if name != YARD
    }


if __name__ == "__main__":
    main()
