# SPDX-License-Identifier: Apache-2.0
"""A training run small enough to be stopped, killed and repeated many times: what the tests of training/
share.

Child processes come from a fork server that has imported torch already, so a run that is to be killed costs
no import.
"""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch
from support import wake

from latte.checkpoint.run import latest_checkpoint, load_checkpoint
from latte.data.datasets import Clip
from latte.model.latte import Latte, ModelConfig
from latte.runtime import generator
from latte.tensors import tensors_sha256
from latte.training.config import TrainConfig
from latte.training.train import train

TINY = ModelConfig(
    depth=2,
    width=16,
    heads=2,
    num_frames=3,
    latent_size=4,
    latent_channels=4,
    num_classes=3,
    class_dropout=0.3,
)
SHORT = TrainConfig(
    steps=12,
    global_batch=4,
    lr=1e-3,
    ema_decay=0.9,
    ema_warmup=True,
    clip_norm=0.5,
    clip_start=3,
    warmup_steps=4,
    checkpoint_every=3,
    keep_last=2,
    log_every=2,
    dtype="fp32",
)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "latte.training.train", "latte.training.sharded"]
)  # torch imports its tracer with the first optimiser


class Latents:
    """Random latents (3 4 4 4) in three classes, moved a little by the item's own generator (as a crop or a
    flip would).
    """

    latent = True
    classes = ("up", "down", "left")
    skipped = ()

    def __len__(self) -> int:
        return 10

    def clip(self, index: int, stream: torch.Generator) -> Clip:
        """Item ``index``."""
        z = torch.randn(3, 4, 4, 4, generator=generator("latents", index))
        return Clip(z + 0.1 * torch.randn(z.shape, generator=stream), index % 3, None, f"item-{index}")

    def image(self, index: int, stream: torch.Generator) -> Clip:
        """The first frame of item ``index``."""
        clip = self.clip(index, stream)
        return replace(clip, video=clip.video[:1])

    def describe(self) -> dict:
        """What identifies the set."""
        return {"kind": "random", "clips": len(self)}


def tiny_model(config: ModelConfig = TINY) -> Latte:
    """The same awake model every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wake(Latte(config))


def run(run_dir: Path, config: TrainConfig = SHORT, **changes) -> dict:
    """Train the tiny model in ``run_dir``; ``changes`` are keyword arguments of train and replace its parts
    by name.
    """
    parts = {
        "model": changes.pop("model", None) or tiny_model(),
        "dataset": Latents(),
        "config": config,
        "run_dir": run_dir,
    }
    return train(**{**parts, **changes})


def curve(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if "second" not in key and key != "data_wait_share"}
        for line in lines
    ]


def assert_same(run_dir: Path, clean: Path) -> None:
    """Model, average, optimiser and curve of both runs' last checkpoints are equal in every bit."""
    one, other = (load_checkpoint(latest_checkpoint(folder)) for folder in (run_dir, clean))
    assert one.step == other.step
    assert one.tensors.keys() == {"model", "ema", "optimizer"}
    compared = 0
    for group, tensors in other.tensors.items():
        assert tensors.keys() == one.tensors[group].keys()
        for name, tensor in tensors.items():
            assert tensors_sha256({"": one.tensors[group][name]}) == tensors_sha256({"": tensor}), (
                group,
                name,
            )
            compared += tensor.numel()
    assert compared > 10_000
    assert curve(run_dir) == curve(clean)
