# SPDX-License-Identifier: Apache-2.0
"""A second score against the same real set: python benchmarks/second_score.py --clips 32.

Two folders of procedural videos are scored by a random I3D: with an empty cache, then other generated clips
against the same real ones, then the first two folders again. ``score`` and ``same_clips`` are the time of the
first over those of the second and third, ``real_side`` is that ratio for opening the real folder and getting
its features, ``real_share`` the share of the real side in the first score. ``bf16`` and ``workers`` are the
time of the features in float32 by one process over that with --dtype bf16 and with --workers, in the same
rounds.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch

from latte.data.media import write_mp4
from latte.data.procedural import draw_scene, render
from latte.evaluation import protocols
from latte.evaluation.detectors import Pixels, build_detector, relative_rms
from latte.evaluation.evaluate import EvaluateConfig, evaluate
from latte.evaluation.features import plan_jobs, read_clips, read_rows, run_jobs
from latte.evaluation.plan import make_plan
from latte.evaluation.sources import digest, open_side

GOALS = {"real_side": 50, "same_clips": 50}
FRAMES = 16


def write_videos(folder: Path, seed: int, clips: int, size: int) -> Path:
    """Write procedural videos."""
    folder.mkdir(parents=True)
    for index in range(clips):
        write_mp4(folder / f"{index:05d}.mp4", render(draw_scene(seed, index, FRAMES), FRAMES, size, size), 8)
    return folder


def seconds(run: Callable[[], Any]) -> float:
    """Return the seconds of ``run()``."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def one_round(place: Path, folders: dict[str, Path], protocol: Any, workers: int) -> dict[str, float]:
    """Return the seconds of two scores, and of the parts of both sides."""
    kept = place / "kept"
    config = EvaluateConfig(protocol.name, device="cpu")

    def score(name: str, generated: str) -> None:
        real = open_side("real", folders["real"], kept)
        fake = open_side("fake", folders[generated], kept)
        evaluate(real, fake, config, place / name, kept=kept / "features")

    scores = {"first": "fake", "second": "other", "third": "fake"}
    found = {name: seconds(partial(score, name, generated)) for name, generated in scores.items()}
    sides = {side: open_side(side, folders[side], place / side) for side in ("real", "fake")}
    plan = make_plan(protocol, {side: sides[side].sources for side in sides})
    detector = build_detector(protocol.detector, pixels=protocol.pixels)
    jobs = {side: [] for side in sides}
    for job in plan_jobs(plan, detector, place):
        jobs[job.clips[0].side].append(job)
    found["open"] = seconds(lambda: open_side("real", folders["real"], place / "again"))
    found["features"] = seconds(lambda: run_jobs(jobs["real"], sides, detector, protocol.frame))
    found["open_kept"] = seconds(lambda: open_side("real", folders["real"], kept))
    (file,) = (kept / "features").glob("*.safetensors")
    key = digest([job.key for job in jobs["real"]])
    found["features_kept"] = seconds(lambda: read_rows(file, key))
    found["fake"] = seconds(lambda: run_jobs(jobs["fake"], sides, detector, protocol.frame))
    found["workers"] = seconds(lambda: run_jobs(jobs["fake"], sides, detector, protocol.frame, workers))
    detector.dtype = torch.bfloat16
    found["bf16"] = seconds(lambda: run_jobs(jobs["fake"], sides, detector, protocol.frame))
    frames = next(iter(read_clips(plan.side("fake"), sides, protocol.frame)))
    found["error"] = relative_rms(detector, frames[None])
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--clips", type=int, default=32, help="of each side")
    parser.add_argument("--size", type=int, default=128, help="pixels of the videos")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(argv)
    protocol = protocols.Protocol(
        "bench", "random-i3d", "logits", Pixels(), "For this benchmark.", frames=FRAMES, clips=options.clips
    )
    protocols.PROTOCOLS["bench"] = protocol
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder) / "videos"
        folders = {
            side: write_videos(videos / side, seed, options.clips, options.size)
            for seed, side in enumerate(("real", "fake", "other"))
        }
        for index in range(options.rounds):
            rows.append(one_round(Path(folder) / str(index), folders, protocol, options.workers))

    def ratio(*names: str) -> float:
        """Median of the sum of the first half of ``names`` over that of the second."""
        half = len(names) // 2
        values = [sum(row[n] for n in names[:half]) / sum(row[n] for n in names[half:]) for row in rows]
        return round(median(values), 3)

    line = {
        "what": "second score against the same real set",
        "machine": measure.machine(measure.resolve_device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "repeats": len(rows),
        "clips": options.clips,
        "score": ratio("first", "second"),
        "same_clips": ratio("first", "third"),
        "real_side": ratio("open", "features", "open_kept", "features_kept"),
        "real_share": round(median((row["open"] + row["features"]) / row["first"] for row in rows), 3),
        "bf16": ratio("fake", "bf16"),
        "bf16_relative_rms_one_clip": float(f"{median(row['error'] for row in rows):.3g}"),
        "workers": ratio("fake", "workers"),
        "num_workers": options.workers,
        "goals": GOALS,
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
