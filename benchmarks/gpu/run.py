# SPDX-License-Identifier: Apache-2.0
"""All GPU goals within a limit of time, resumable: python benchmarks/gpu/run.py [--limit 540] [--smoke].

Each script is a process of its own, longest value for its time first. One that has succeeded is named in
OUT/gpu-done.txt and is not run again; --done FILE adds those of an earlier machine. Answers are appended to
OUT/gpu.jsonl. A script that does not fit into what is left of the limit waits for the next call. The exit
code is 1 when a script failed, 3 when some still wait.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
SCRIPTS = {"forward": 150, "train": 260, "clip": 240, "score": 200, "start": 150}  # seconds, generously


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is left, then list the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny models on a CPU: do the scripts work?")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds of this call")
    parser.add_argument("--done", type=Path, help="gpu-done.txt of an earlier call, elsewhere")
    parser.add_argument("--only", nargs="+", default=list(SCRIPTS))
    options = parser.parse_args(argv)
    out = Path(os.environ.get("OUT", "."))
    record = out / "gpu-done.txt"
    done = {
        name for path in (record, options.done) if path and path.exists() for name in path.read_text().split()
    }
    began = time.monotonic()
    failed, waiting = [], []
    for name in options.only:
        if name in done:
            continue
        left = options.limit - (time.monotonic() - began)
        if left < SCRIPTS[name] and not options.smoke:
            waiting.append(name)
            continue
        words = [sys.executable, str(FOLDER / f"{name}.py"), "--out", str(out / "gpu.jsonl")]
        try:
            code = subprocess.run(
                [*words, *["--smoke"] * options.smoke], timeout=left, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
        print(f"{name}: {'done' if code == 0 else code} ({time.monotonic() - began:.0f} s)", file=sys.stderr)
        if code:
            failed.append(name)
            continue
        done.add(name)
        record.write_text("\n".join(sorted(done)) + "\n", encoding="utf-8")
    for line in (out / "gpu.jsonl").read_text(encoding="utf-8").splitlines() if done else ():
        answer = json.loads(line)
        if "verdict" in answer:
            print(f"{answer['what']}: {answer['verdict']}", file=sys.stderr)
    for name in waiting:
        print(f"{name} waits: it takes up to {SCRIPTS[name]} s", file=sys.stderr)
    if failed or waiting:
        sys.exit(1 if failed else 3)


if __name__ == "__main__":
    main()
