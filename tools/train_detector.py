# SPDX-License-Identifier: Apache-2.0
"""Train the built-in detector on procedural clips: ``python -m tools.train_detector OUT.safetensors``.

detector_clips.py renders the clips with labels of their content, all of which the network predicts. The
features are the layer before these predictions, whitened after the training (``whiten``). A training that was
stopped resumes.
Axes: b clips, t frames, c channels, h height, w width, k features.
"""

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from latte.evaluation.networks.builtin import CLASSES, MEASURES, BuiltinDetector
from latte.tensors import tensors_sha256
from tools.detector_clips import POOL_FRAMES, UNKNOWN, draw_batch, draw_pool, procedural_clips, to_input
from tools.training_loop import TrainingConfig, fresh_network, train

TRAIN_SEED, TEST_SEED, SCALE_SEED = 7_100_000, 8_100_000, 7_200_000  # scenes that no recipe uses
SCALED, SHRINKAGE = 640, 0.01  # see whiten


@dataclass(frozen=True)
class DetectorConfig(TrainingConfig):
    """Settings of a training; a batch is of clips."""

    steps: int = 8000
    batch: int = 16
    lr: float = 2e-3
    clips: int = 3072


def loss_of(model: BuiltinDetector, clips: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of the classes and squared errors of the measures, over clips
    that have them.
    """
    outputs = model.predict(to_input(clips))
    total = torch.zeros(())
    for i, name in enumerate(CLASSES):
        known = labels[:, i] != UNKNOWN
        if known.any():
            error = functional.cross_entropy(outputs[name][known], labels[known, i].long())
            total = total + (2 if name == "shape" else 1) * error  # shapes are the hardest
    measured = torch.cat([outputs[name] for name in MEASURES], 1)  # (b measures)
    targets = labels[:, len(CLASSES) :]
    known = targets.isfinite()
    errors = torch.where(known, measured - targets.nan_to_num(), 0).square()
    return total + (errors.sum(0) / known.sum(0).clamp(min=1)).sum()


@torch.no_grad()
def condition(model: BuiltinDetector, clips: Tensor) -> None:
    """Scale and shift the filters of one layer after the other, so that its outputs on ``clips`` have mean 0,
    variance 1.
    """
    captured: list[Tensor] = []
    names = ("stem", "down1", "time1", "down2", "time2", "last", "hidden", "second")
    for layer in (model.get_submodule(name) for name in names):
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        with layer.register_forward_hook(lambda *call: captured.append(call[2])):
            model.embed(to_input(clips))
        output = captured.pop()
        var, mean = torch.var_mean(output, [axis for axis in range(output.ndim) if axis != 1])
        scale = (var + 1e-8).rsqrt()
        assert layer.bias is not None
        layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        layer.bias.sub_(mean).mul_(scale)


def fit(
    config: DetectorConfig, start: dict[str, Tensor] | None = None, keep: Path | None = None
) -> BuiltinDetector:
    """Train from random weights or from ``start``, resuming from the state in the file ``keep``.

    The last layer is not trained.
    """
    pool = draw_pool(TRAIN_SEED + config.seed, config.clips)
    model = fresh_network(BuiltinDetector, config.seed)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return draw_batch(pool, config.batch, config.seed, step)

    if start is None:
        condition(model, torch.cat([batch(step)[0] for step in (0, 3, 6)]))
    else:
        model.load_state_dict(start)
    train(model, lambda step: loss_of(model, *batch(step)), config, warmup_steps=50, max_norm=5.0, keep=keep)
    return model.eval()


@torch.no_grad()
def whiten(model: BuiltinDetector, num_clips: int) -> None:
    """Fill the last layer: the principal components of training clips, corrupted ones included, on the scale
    of clean clips.

    That scale is the mean covariance of procedural clips of 16 and of 8 frames, each about their own mean,
    plus SHRINKAGE times that of the training clips: without it, a direction in which clean clips hardly
    differ dominates all others.
    """

    def embed(clips: Tensor) -> Tensor:
        return torch.cat([model.embed(to_input(part)) for part in clips.split(16)]).double()

    pool = draw_pool(SCALE_SEED, num_clips)
    shown = torch.cat(
        [embed(draw_batch(pool, 16, SCALE_SEED, step)[0]) for step in range(num_clips // 16)]
    ).T.cov()
    clean = [
        embed(procedural_clips(SCALE_SEED, num_clips // 2, frames)[0])
        for frames in (POOL_FRAMES, POOL_FRAMES // 2)
    ]
    scale = sum((rows.T.cov() for rows in clean), SHRINKAGE * len(clean) * shown) / len(clean)
    axes = torch.linalg.eigh(shown).eigenvectors[:, -model.whiten.out_features :]
    level, rotated = torch.linalg.eigh(axes.T @ scale @ axes)
    matrix = (axes @ rotated / level.sqrt()).T
    model.whiten.weight.copy_(matrix)
    model.whiten.bias.copy_(-matrix @ clean[0].mean(0))


@torch.no_grad()
def measure(
    model: BuiltinDetector, num_clips: int = 512, frames: int = 8, seed: int = TEST_SEED
) -> dict[str, float]:
    """Return the accuracy of each class and the mean absolute error of speed, size and position on unseen
    clean scenes.
    """
    clips, labels = procedural_clips(seed, num_clips, frames)
    parts = [model.predict(to_input(part)) for part in clips.split(16)]
    outputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    result = {
        name: (outputs[name].argmax(1) == labels[:, i]).float().mean().item()
        for i, name in enumerate(CLASSES)
    }
    for name in ("speed", "size", "x", "y"):
        target = labels[:, len(CLASSES) + MEASURES.index(name)]
        result[f"{name}_error"] = (outputs[name][:, 0] - target).abs().mean().item()
    return result


def make_weights(out: Path, config: DetectorConfig, start: Path | None = None) -> dict:
    """Train, round to float16, whiten, measure, write to ``out`` with a card, which is returned."""
    started = time.perf_counter()
    processor_started = time.process_time()
    with safe_open(start, "pt") if start else nullcontext() as file:
        before = json.loads(file.metadata()["card"]) if file else None
    keep = out.with_name(f"{out.name}.state")
    model = fit(config, load_file(start) if start else None, keep)
    seconds = time.perf_counter() - started
    processor = time.process_time() - processor_started
    model.half().float()
    whiten(model, SCALED)
    stored = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.half().float()
    card = {
        "before": before,
        "config": asdict(config),
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "figures": {
            f"{name}_{frames}_frames": round(value, 4)
            for frames in (8, 16)
            for name, value in measure(model, frames=frames).items()
        },
    }
    digest = tensors_sha256(stored)
    size = sum(tensor.nbytes for tensor in stored.values())
    source = {"source_name": "builtin", "source_sha256": digest, "source_bytes": str(size)}
    save_file(
        stored,
        out,
        metadata={"detector": "builtin", "tensors_sha256": digest, "card": json.dumps(card)} | source,
    )
    keep.unlink(missing_ok=True)
    return card


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train the built-in detector on procedural clips.")
    parser.add_argument("out", type=Path)
    for name, value in asdict(DetectorConfig()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--start", type=Path, help="weights to start from")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"the folder {options.out.parent} does not exist; create it first")
    torch.set_num_threads(options.threads)
    config = DetectorConfig(**{name: getattr(options, name) for name in asdict(DetectorConfig())})
    print(json.dumps(make_weights(options.out, config, options.start)))


if __name__ == "__main__":
    main()
