# SPDX-License-Identifier: Apache-2.0
"""Train the built-in autoencoder on procedural frames: ``python -m tools.train_autoencoder
OUT.safetensors``.

A third of the batch is other content (two shapes at once, other colours), so that the latent space has no
holes between clips. Gaussian noise on the unit-variance latents makes neighbours decode alike: a diffusion
model's small errors then cost little. A training that was stopped resumes.
Axes: n frames, c channels, h height, w width.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from latte.autoencoder.builtin import BuiltinAutoencoder
from latte.data.procedural import draw_scene, render
from latte.runtime import generator
from tools.training_loop import TrainingConfig, fresh_network, train

TRAIN_SEED, TEST_SEED = 7_000_000, 8_000_000  # scenes that no recipe draws


@dataclass(frozen=True)
class AutoencoderConfig(TrainingConfig):
    """Settings of a training; a batch is of frames, a clip has 8."""

    steps: int = 3000
    batch: int = 64
    lr: float = 2e-3
    clips: int = 2048
    noise: float = 0.3  # largest standard deviation of the noise on the latents
    size: int = 64  # rows and columns of a frame


def procedural_frames(seed: int, num_clips: int, size: int) -> Tensor:
    """``num_clips`` procedural clips of 8 frames -> uint8 (n 3 h w)."""
    clips = [render(draw_scene(seed, index, 8), 8, size, size) for index in range(num_clips)]
    return torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2).contiguous()


def draw_batch(pool: Tensor, config: AutoencoderConfig, step: int) -> Tensor:
    """The frames of one step, a function of (seed, step): (n 3 h w) in [-1, 1], channels last."""
    draw = generator(config.seed, "autoencoder", step)
    picks = torch.randint(len(pool), (2, config.batch), generator=draw)
    frames = pool[picks[0]]
    other = config.batch // 6
    frames[:other] = torch.maximum(frames[:other], pool[picks[1, :other]])
    frames[other : 2 * other] = frames[other : 2 * other, torch.randperm(3, generator=draw)]
    return (frames.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def fit(config: AutoencoderConfig, keep: Path | None = None) -> BuiltinAutoencoder:
    """Train from random weights, resuming from the state in the file ``keep``."""
    pool = procedural_frames(TRAIN_SEED + config.seed, config.clips, config.size)
    model = fresh_network(BuiltinAutoencoder, config.seed)

    def loss_of(step: int) -> Tensor:
        frames = draw_batch(pool, config, step)
        latent = model.encode(frames)
        draw = generator(config.seed, "autoencoder noise", step)
        size = config.noise * torch.rand(len(latent), 1, 1, 1, generator=draw)
        decoded = model.decode(latent + size * torch.randn(latent.shape, generator=draw))
        return functional.l1_loss(decoded, frames) + 2 * functional.mse_loss(decoded, frames)

    train(model, loss_of, config, warmup_steps=100, max_norm=1.0, keep=keep)
    normalise(model, pool)
    return model.eval()


@torch.no_grad()
def normalise(model: BuiltinAutoencoder, pool: Tensor) -> None:
    """Put the latents' exact mean and variance over procedural frames (n 3 h w, uint8) into the model's
    normaliser.
    """
    model.eval()
    raw = torch.cat([model.encoder(part.float() / 127.5 - 1).double() for part in pool[:8192].split(64)])
    model.normaliser.mean.copy_(raw.mean((0, 2, 3)))
    model.normaliser.var.copy_(raw.var((0, 2, 3), correction=0))


def psnr(mse: float) -> float:
    """Decibels of a mean squared error between images in [-1, 1]."""
    return 10 * math.log10(4 / mse)


@torch.no_grad()
def measure(model: BuiltinAutoencoder, size: int = 64, num_clips: int = 256) -> dict[str, float]:
    """PSNR over a frame each of unseen clips, with Gaussian noise of three sizes on the latents, and the
    latents' moments.
    """
    frames = procedural_frames(TEST_SEED, num_clips, size)[3::8].float() / 127.5 - 1
    latent = model.encode(frames)
    draw = generator("autoencoder measure")
    result = {
        "latent_mean": latent.mean().item(),
        "latent_std": latent.std().item(),
        "latent_largest": latent.abs().max().item(),
    }
    for noise in (0.0, 0.1, 0.3):
        decoded = model.decode(latent + noise * torch.randn(latent.shape, generator=draw)).clamp(-1, 1)
        each = (decoded - frames).square().mean((1, 2, 3)).tolist()
        result[f"psnr_noise_{noise:g}"] = sum(psnr(max(mse, 1e-10)) for mse in each) / len(each)
    return result


def make_weights(out: Path, config: AutoencoderConfig) -> dict:
    """Train, measure the float16 weights that are stored, write them to ``out`` with their card in the
    metadata; the card.
    """
    started = time.perf_counter()
    keep = out.with_name(f"{out.name}.state")
    model = fit(config, keep)
    seconds = time.perf_counter() - started
    stored = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    options = f"--steps {config.steps} --threads {torch.get_num_threads()}"
    card = {
        "command": f"python -m tools.train_autoencoder {out.name} {options}",
        "config": asdict(config),
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "figures": {name: round(value, 4) for name, value in measure(model, config.size).items()},
    }
    save_file(stored, out, metadata={"card": json.dumps(card)})
    keep.unlink(missing_ok=True)
    return card


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the built-in autoencoder on procedural frames.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=AutoencoderConfig.steps)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"the folder {options.out.parent} does not exist; make it first")
    torch.set_num_threads(options.threads)
    print(json.dumps(make_weights(options.out, AutoencoderConfig(steps=options.steps))))


if __name__ == "__main__":
    main()
