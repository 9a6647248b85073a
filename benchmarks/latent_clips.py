# SPDX-License-Identifier: Apache-2.0
"""Clips a second and core from latent shards: python benchmarks/latent_clips.py [--clips 2000].

Reading by the data set, and by a slice of the file and an index of its frames, in turns in one process;
processor time. The latents are pixels of procedural clips: 16 frames of 3 x 32 x 32 in float16.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import measure
import torch
from safetensors import safe_open

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.data.datasets import DataConfig
from latte.data.encode import encode_dataset
from latte.data.latents import LatentDataset

NUM_VIDEOS = 64
SIDE = 32


class SlicedDataset(LatentDataset):
    """Reads the span of a clip, then indexes its frames."""

    def _read_tensor(self, shard: str, name: str, frames: list[int]) -> torch.Tensor:
        low = min(frames)
        if shard not in self._files:
            self._files[shard] = safe_open(self.root / shard, framework="pt")
        span = self._files[shard].get_slice(name)[low : max(frames) + 1]
        return span[[frame - low for frame in frames]].float()


def rate(dataset: LatentDataset, clips: int) -> float:
    """Return clips per second of processor time."""
    draw = torch.Generator().manual_seed(0)
    start = time.process_time()
    for index in range(clips):
        dataset.clip(index % len(dataset), draw)
    return clips / (time.process_time() - start)


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description="Clips a second and core from latent shards.")
    parser.add_argument("--clips", type=int, default=2000, help="clips of one round")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        videos = DataConfig(kind="procedural", resolution=SIDE, frames=32, num_clips=NUM_VIDEOS)
        encode_dataset(
            videos, build_codec(CodecConfig("pixels")), Path(folder, "latents"), cache_dir=Path(folder)
        )
        config = DataConfig(
            kind="latents", root=str(Path(folder, "latents")), resolution=SIDE, frames=16, rule="strict"
        )
        ours, sliced = LatentDataset(config), SlicedDataset(config)
        for dataset in (ours, sliced):
            rate(dataset, 100)
        rows = [(rate(sliced, options.clips), rate(ours, options.clips)) for _ in range(options.rounds)]
    line = {
        "what": "latent clips a second and core",
        "clips_per_second": round(median(found for _, found in rows)),
        "by_slice_and_index": round(median(slow for slow, _ in rows)),
        "ratio": round(median(found / slow for slow, found in rows), 3),
        "goal": 20_000,
        "machine": measure.machine(torch.device("cpu")),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "settings": vars(options),
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
