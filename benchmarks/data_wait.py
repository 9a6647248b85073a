# SPDX-License-Identifier: Apache-2.0
"""Share of a training step spent waiting for data, from a folder of videos, from latent shards, and in
buckets.

python benchmarks/data_wait.py. The numbers come from metrics.jsonl of the trainings; the first steps, which
fill caches, do not count. Without --root the videos are procedural, of three aspect ratios, written as mp4
first. Add data.workers=N to compare numbers of workers.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

import measure
import torch

from latte.autoencoder.codec import build_codec
from latte.build import build
from latte.config.run import load_run
from latte.data.encode import encode_dataset
from latte.data.media import write_mp4
from latte.data.procedural import draw_scene, render

WARM_UP = 5


def write_videos(root: Path, count: int, frames: int, side: int) -> None:
    """``count`` procedural clips of ``frames`` frames as mp4 files: square, 16:9 and 9:16 in turn."""
    long = round(side * 8 / 9) * 2
    for index in range(count):
        height, width = ((side, side), (side, long), (long, side))[index % 3]
        write_mp4(root / f"{index:04d}.mp4", render(draw_scene(0, index, frames), frames, height, width))


def shares(
    words: list[str], options: argparse.Namespace, run: Path
) -> tuple[list[float], list[float], float]:
    """Train; return the data wait share and the seconds of each step, and what share of it others used."""
    config, _ = load_run(None, [*words, f"run.dir={run}"])
    before, start = measure.processor_seconds(), time.perf_counter()
    build(config, options.device).train()
    other = measure.other_load(before, measure.processor_seconds(), time.perf_counter() - start)
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()][WARM_UP - 1 :]
    clips = [line["clips"] for line in lines]
    counts = [after - before for before, after in pairwise(clips)]  # a bucket has its own batch
    lines = lines[1:]
    return (
        [line["data_wait_share"] for line in lines],
        [count / line["clips_per_second"] for count, line in zip(counts, lines, strict=True)],
        other,
    )


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure each source, print a JSON line for it, return them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measure.add_arguments(parser)
    parser.add_argument("--root", type=Path, help="folder of videos")
    parser.add_argument("--videos", type=int, default=32, help="how many to write without --root")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--buckets", default="auto", help="data.buckets of the third training")
    parser.add_argument("--codec", default="builtin")
    parser.add_argument("--codec-path")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings of the training, e.g. model.size=S"
    )
    options = parser.parse_args(argv)
    device, _ = measure.prepare(options)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        root = options.root or Path(folder, "videos")
        if not options.root:
            write_videos(root, options.videos, 4 * options.frames, options.resolution)
        shared = [
            f"data.resolution={options.resolution}",
            f"data.frames={options.frames}",
            f"codec.name={options.codec}",
        ]
        shared += [f"codec.path={options.codec_path}"] if options.codec_path else []
        shared += [
            f"train.steps={options.steps}",
            f"train.global_batch={options.batch}",
            f"train.dtype={options.dtype}",
        ]
        shared += ["train.log_every=1", "data.labels=false", *options.overrides]
        config, _ = load_run(None, [*shared, f"data.root={root}"])
        encode_dataset(config.data, build_codec(config.codec, device), Path(folder, "latents"))
        for name, words in (
            ("videos", [f"data.root={root}"]),
            ("latents", ["data.kind=latents", f"data.root={folder}/latents"]),
            ("buckets", [f"data.root={root}", f"data.buckets={options.buckets}"]),
        ):
            waits, seconds, other = shares([*shared, *words], options, Path(folder, f"run-{name}"))
            if len(waits) < measure.FEWEST_ROUNDS or other > options.max_other_load:
                sys.exit(
                    f"data_wait {name}: {len(waits)} steps, others used {other:.0%} of the machine; "
                    f"at least {measure.FEWEST_ROUNDS} steps and at most {options.max_other_load:.0%} are "
                    "needed"
                )
            low, _, high = quantiles(seconds, n=4)
            line = {"what": f"data_wait {name}", "machine": measure.machine(device), "device": device.type}
            line |= {
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "commit": measure.commit(),
                "repeats": len(waits),
            }
            line |= {"wait_share": round(median(waits), 5), "worst_wait_share": round(max(waits), 5)}
            line |= {
                "median_s": round(median(seconds), 5),
                "spread": round((high - low) / median(seconds), 4),
                "settings": shared,
            }
            print(json.dumps(line), flush=True)
            lines.append(line)
    return lines


if __name__ == "__main__":
    main()
