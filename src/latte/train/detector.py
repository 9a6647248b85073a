# SPDX-License-Identifier: Apache-2.0
"""Train the built-in detector on procedural clips: ``python -m latte.train.detector OUT.safetensors``.

Direction, shape and colour are classified, speed and size regressed; all are known exactly from the scene. A clip is seen at two speeds,
backwards, and in a mirror, each with the labels that it then has. Damaged clips are never shown: what they do to the features is free.
Axes: b clips, t frames, c channels, h height, w width.
"""

import argparse
import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from latte.data.procedural import COLOURS, SHAPES, Scene, draw_scene, render
from latte.evaluation.builtin import SIZE, BuiltinDetector
from latte.evaluation.detector_files import tensors_sha256
from latte.runtime import generator

TRAIN_SEED, TEST_SEED = 7_100_000, 8_100_000  # scenes that no recipe draws
POOL_FRAMES = 16
WHITENED = 640  # clips of the pool from which the features' scale is taken
CLASSES = ("direction", "shape", "colour")


@dataclass(frozen=True)
class DetectorConfig:
    """``clips`` of 16 frames are rendered once; a step sees ``batch`` of them, ``frames`` frames each."""

    steps: int = 800
    batch: int = 16
    lr: float = 2e-3
    frames: int = 8
    clips: int = 1024
    seed: int = 0


def labels_of(scene: Scene) -> list[float]:
    """Direction, shape, colour as class numbers; speed (frame sides per frame) and size as they are."""
    return [scene.label, SHAPES.index(scene.shape), list(COLOURS).index(scene.colour), scene.speed, scene.size]


def procedural_clips(seed: int, num_clips: int, frames: int) -> tuple[Tensor, Tensor]:
    """``num_clips`` procedural clips -> uint8 (b t h w c) and their labels (b 5)."""
    scenes = [draw_scene(seed, index, frames) for index in range(num_clips)]
    clips = np.stack([render(scene, frames, SIZE, SIZE) for scene in scenes])
    return torch.from_numpy(clips), torch.tensor([labels_of(scene) for scene in scenes])


def to_input(clips: Tensor) -> Tensor:
    """uint8 (b t h w c) -> float (b c t h w) in [-1, 1], as the detector's ``Pixels`` make it."""
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def draw_batch(pool: tuple[Tensor, Tensor], config: DetectorConfig, step: int) -> tuple[Tensor, Tensor]:
    """The clips and labels of one step, a function of (seed, step): uint8 (b t h w c), (b 5)."""
    draw = generator(config.seed, "detector", step)
    picks = torch.randint(len(pool[0]), (config.batch,), generator=draw)
    clips, labels = pool[0][picks], pool[1][picks]
    stride = 1 + step % 2
    start = int(torch.randint(POOL_FRAMES - (config.frames - 1) * stride, (), generator=draw))
    clips = clips[:, start : start + (config.frames - 1) * stride + 1 : stride].clone()
    labels[:, 3] *= stride
    backwards, mirrored = torch.rand(2, config.batch, generator=draw) < 0.5
    clips[backwards] = clips[backwards].flip(1)
    labels[backwards, 0] = (labels[backwards, 0].long() ^ 1).float()  # up, down | left, right
    clips[mirrored] = clips[mirrored].flip(3)
    sideways = mirrored & (labels[:, 0] >= 2)
    labels[sideways, 0] = 5 - labels[sideways, 0]
    return clips, labels


def targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Speed and size of labels (b 5) -> each (b,), about -1 to 1."""
    return (labels[:, 3] - 0.0425) / 0.024, (labels[:, 4] - 0.155) / 0.025


def loss_of(model: BuiltinDetector, clips: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropies of the classes and squared errors of the measures, summed."""
    answers = model.answers(to_input(clips))
    speed, size = targets(labels)
    classes = sum(functional.cross_entropy(answers[name], labels[:, i].long()) for i, name in enumerate(CLASSES))
    return classes + functional.mse_loss(answers["speed"][:, 0], speed) + functional.mse_loss(answers["size"][:, 0], size)


def fit(config: DetectorConfig, start: dict[str, Tensor] | None = None, log_every: int = 50) -> BuiltinDetector:
    """Train from nothing, or from the weights ``start``; the learning rate rises for 50 steps and falls to 0 along a cosine."""
    pool = procedural_clips(TRAIN_SEED + config.seed, config.clips, POOL_FRAMES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = BuiltinDetector().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if start is not None:
        model.load_state_dict(start)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-3)
    started = time.process_time()
    for step in range(config.steps):
        rate = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        for group in optimiser.param_groups:
            group["lr"] = config.lr * rate
        loss = loss_of(model, *draw_batch(pool, config, step))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % log_every == 0 or step == config.steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.process_time() - started:.0f} processor seconds", flush=True)
    whiten(model.eval(), pool[0][:WHITENED])
    return model


@torch.no_grad()
def whiten(model: BuiltinDetector, clips: Tensor) -> None:
    """Fill the last layer: the 128 greatest principal components of the standardised moments over ``clips`` (b t h w c), to variance 1."""
    bank = torch.cat([model.summary(to_input(part)) for part in clips.split(16)]).double()
    scale, mean = bank.std(0).clamp(min=1e-3), bank.mean(0)
    rows = (bank - mean) / scale
    variance, axes = torch.linalg.eigh(rows.T @ rows / len(rows))
    count = model.whiten.out_features
    matrix = (axes[:, -count:] / (variance[-count:].clamp(min=0) + 1e-3).sqrt() / scale[:, None]).T
    model.whiten.weight.copy_(matrix)
    model.whiten.bias.copy_(-matrix @ mean)


@torch.no_grad()
def measure(model: BuiltinDetector, num_clips: int = 512, frames: int = 8, seed: int = TEST_SEED) -> dict[str, float]:
    """Share of right answers on unseen scenes, and the mean absolute error of speed and size (their range is 2)."""
    clips, labels = procedural_clips(seed, num_clips, frames)
    parts = [model.answers(to_input(part)) for part in clips.split(16)]
    answers = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    result = {name: (answers[name].argmax(1) == labels[:, i]).float().mean().item() for i, name in enumerate(CLASSES)}
    errors = zip(("speed", "size"), targets(labels), strict=True)
    return result | {f"{name}_error": (answers[name][:, 0] - target).abs().mean().item() for name, target in errors}


def make_weights(out: Path, config: DetectorConfig, start: Path | None = None) -> dict:
    """Train (on from ``start``), measure the float16 weights that are stored, write them to ``out`` with their card; the card."""
    started, processor = time.perf_counter(), time.process_time()
    with safe_open(start, "pt") if start else nullcontext() as file:
        before = json.loads(file.metadata()["card"]) if file else None
    model = fit(config, load_file(start) if start else None)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    stored = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    card = {
        "before": before,
        "config": asdict(config),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "figures": {
            f"{name}_{frames}_frames": round(value, 4) for frames in (8, 16) for name, value in measure(model, frames=frames).items()
        },
    }
    digest = tensors_sha256(stored)
    size = sum(tensor.nbytes for tensor in stored.values())
    source = {"source_name": "builtin", "source_sha256": digest, "source_bytes": str(size)}
    save_file(stored, out, metadata={"detector": "builtin", "tensors_sha256": digest, "card": json.dumps(card)} | source)
    return card


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the built-in detector on procedural clips.")
    parser.add_argument("out", type=Path)
    for name, value in asdict(DetectorConfig()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--start", type=Path, help="weights to train on from")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"the folder {options.out.parent} does not exist; make it first")
    torch.set_num_threads(options.threads)
    config = DetectorConfig(**{name: getattr(options, name) for name in asdict(DetectorConfig())})
    print(json.dumps(make_weights(options.out, config, options.start)))


if __name__ == "__main__":
    main()
