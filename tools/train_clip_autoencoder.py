# SPDX-License-Identifier: Apache-2.0
"""Train the built-in autoencoder of short clips on moving shapes: ``python -m tools.train_clip_autoencoder
OUT.safetensors``.

Two things make its latents easy to learn for a diffusion model. Gaussian noise on the latents, whose variance
is 1, makes neighbours decode alike. And latents averaged over 2 x 2 positions must decode to the clip at half
its size (after EQ-VAE, arXiv 2502.09509), so that they vary as smoothly over the frame as the clip does.
A third of a batch has a second shape in it or other colours. A training that was stopped resumes.
Axes: n clips, f frames, c channels, h height, w width.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from latte.autoencoder.builtin_clip import SPAN, BuiltinClipAutoencoder
from latte.data.clips import to_uint8
from latte.data.procedural import read_motion
from latte.runtime import generator
from tools.muon import with_adamw
from tools.train_autoencoder import TEST_SEED, TRAIN_SEED, procedural_frames
from tools.train_temporal_autoencoder import fidelity, reconstruction_loss
from tools.training_loop import TrainingConfig, fresh_network, train

NOISES = (0.0, 0.1, 0.3, 0.5)  # standard deviations at which the decoder is measured


@dataclass(frozen=True)
class ClipConfig(TrainingConfig):
    """Settings of a training; a batch is of clips."""

    steps: int = 6000
    batch: int = 12
    lr: float = 2e-3
    muon_lr: float = 0.02
    clips: int = 6000
    decay_steps: int = 3000  # last ones, in which the learning rate falls to 0
    noise: float = 0.5  # largest standard deviation of the noise on the latents
    smooth: float = 0.3  # weight of the clips at half their size
    size: int = 64  # rows and columns of a frame


def procedural_clips(seed: int, num_clips: int, size: int) -> Tensor:
    """Return ``num_clips`` clips of moving shapes: uint8 (n f 3 h w)."""
    return procedural_frames(seed, num_clips, size).unflatten(0, (num_clips, SPAN))


def draw_batch(pool: Tensor, config: ClipConfig, step: int) -> Tensor:
    """Return the clips of one step, a function of (seed, step): (n f 3 h w) in [-1, 1]."""
    draw = generator(config.seed, "clip autoencoder", step)
    picks = torch.randint(len(pool), (2, config.batch), generator=draw)
    clips = pool[picks[0]]
    other = config.batch // 6
    clips[:other] = torch.maximum(clips[:other], pool[picks[1, :other]])
    clips[other : 2 * other] = clips[other : 2 * other, :, torch.randperm(3, generator=draw)]
    return clips.float() / 127.5 - 1


def halved(clips: Tensor) -> Tensor:
    """Return clips (n f 3 h w) at half their rows and columns."""
    half = functional.interpolate(clips.flatten(0, 1), scale_factor=0.5, mode="bilinear", antialias=True)
    return half.unflatten(0, clips.shape[:2])


def fit(config: ClipConfig, keep: Path | None = None) -> BuiltinClipAutoencoder:
    """Train from random weights, resuming from the state in the file ``keep``."""
    pool = procedural_clips(TRAIN_SEED + config.seed, config.clips, config.size)
    model = fresh_network(BuiltinClipAutoencoder, config.seed)

    def loss_of(step: int) -> Tensor:
        clips = draw_batch(pool, config, step)
        draw = generator(config.seed, "clip autoencoder noise", step)
        with torch.autocast("cpu", torch.bfloat16):
            latent = model.encode_spans(clips)
            size = config.noise * torch.rand(len(latent), 1, 1, 1, generator=draw)
            decoded = model.decode_spans(latent + size * torch.randn(latent.shape, generator=draw)).float()
            small = model.decode_spans(functional.avg_pool2d(latent, 2)).float()
        error = small - halved(clips)
        smooth = error.abs().mean() + 4 * error.square().mean()
        return reconstruction_loss(decoded, clips) + config.smooth * smooth

    edges = {model.decoder[0], *model.refiner.modules()}
    train(
        model,
        loss_of,
        config,
        warmup_steps=50,
        max_norm=1.0,
        keep=keep,
        keep_every=100,
        decay_steps=config.decay_steps,
        optimizers=with_adamw(model, edges, config.lr, config.muon_lr),
    )
    normalise(model, pool)
    return model.eval()


@torch.no_grad()
def normalise(model: BuiltinClipAutoencoder, pool: Tensor) -> None:
    """Put the latents' exact mean and variance over clips (n f 3 h w, uint8) into the model's normaliser."""
    model.eval()
    parts = [model.raw_encode(part.float() / 127.5 - 1).double() for part in pool[:1024].split(32)]
    raw = torch.cat(parts)
    model.normaliser.mean.copy_(raw.mean((0, 2, 3)))
    model.normaliser.var.copy_(raw.var((0, 2, 3), correction=0))


@torch.no_grad()
def measure(model: BuiltinClipAutoencoder, size: int = 64, num_clips: int = 256) -> dict[str, float]:
    """PSNR of unseen clips and the share that is consistent, with Gaussian noise on the latents, and the
    latents' moments.
    """
    clips = procedural_clips(TEST_SEED, num_clips, size).float() / 127.5 - 1
    latent = torch.cat([model.encode(part) for part in clips.split(32)])
    draw = generator("clip autoencoder measure")
    found = {
        "latent_mean": latent.mean().item(),
        "latent_std": latent.std().item(),
        "latent_largest": latent.abs().max().item(),
    }
    for noise in NOISES:
        noisy = latent + noise * torch.randn(latent.shape, generator=draw)
        decoded = torch.cat([model.decode(part) for part in noisy.split(32)]).clamp(-1, 1)
        quality = [fidelity(one, clip) for one, clip in zip(decoded, clips, strict=True)]
        found[f"psnr_noise_{noise:g}"] = sum(quality) / num_clips
        consistent = [read_motion(to_uint8(one)).consistent for one in decoded]
        found[f"consistent_noise_{noise:g}"] = sum(consistent) / num_clips
    return found


def make_weights(out: Path, config: ClipConfig, num_clips: int = 256) -> dict:
    """Train, measure the float16 weights that are stored, write them to ``out`` with their card in the
    metadata; return the card.
    """
    started = time.process_time()
    model = fit(config, out.with_name(f"{out.name}.state"))
    seconds = time.process_time() - started
    stored = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    card = {
        "command": f"python -m tools.train_clip_autoencoder {out.name} --steps {config.steps} "
        f"--decay-steps {config.decay_steps}",
        "config": asdict(config),
        "cpu_seconds": round(seconds, 1),  # since the last resumption
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "measured": {name: round(value, 4) for name, value in measure(model, config.size, num_clips).items()},
    }
    save_file(stored, out, metadata={"card": json.dumps(card)})
    return card


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the built-in autoencoder of short clips.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=ClipConfig.steps)
    parser.add_argument("--decay-steps", type=int, default=ClipConfig.decay_steps)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"the folder {options.out.parent} does not exist; make it first")
    torch.set_num_threads(options.threads)
    config = ClipConfig(steps=options.steps, decay_steps=options.decay_steps)
    print(json.dumps(make_weights(options.out, config)))


if __name__ == "__main__":
    main()
