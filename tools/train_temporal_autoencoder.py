# SPDX-License-Identifier: Apache-2.0
"""Train the built-in temporal autoencoder on procedural clips: ``python -m tools.train_temporal_autoencoder
OUT.safetensors``.

Of a batch of eight clips five show the procedural world, two a moving shape and one a drifting texture; one
has a second shape in it, two other colours, and in every fourth step four clips side by side make one larger
clip. Clips are 17 frames long: because both directions are causal, each contains an image and the shorter
clips. Moving pixels and the first frame weigh more. Gaussian noise on the latents, which a penalty keeps at
variance 1, makes neighbours decode alike. A training that was stopped resumes.
Axes: b clips, f frames, f' latent frames, c channels, h height, w width.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from latte.autoencoder.base import fill_network, read_tensors
from latte.autoencoder.builtin_temporal import BuiltinTemporalAutoencoder, to_frames, to_spans
from latte.data.world.kinds import KINDS
from latte.data.world.scenes import FPS
from latte.runtime import generator
from tools.muon import with_adamw
from tools.temporal_clips import SLACK, TEST_SEED, TRAIN_SEED, cached_pool, shape_clip, world_clip
from tools.train_autoencoder import psnr
from tools.training_loop import TrainingConfig, fresh_network, train

SHARES = {"world": 5, "shapes": 2, "textures": 1}  # clips of each kind among eight
BATCH = sum(SHARES.values())
MOSAIC_EVERY = 4  # steps
MOVING = 0.06  # difference to the frame before, of 2, from which on a pixel moves
Pools = dict[str, np.ndarray]
"""Kind -> clips, uint8 (b t h w c)."""


@dataclass(frozen=True)
class TemporalConfig(TrainingConfig):
    """Settings of a training; ``clips`` is the number of the world's clips."""

    steps: int = 6000
    batch: int = BATCH
    lr: float = 2e-3
    muon_lr: float = 0.02
    clips: int = 2700
    decay_steps: int = 1500  # last ones, in which the learning rate falls to 0
    frames: int = 17
    size: int = 64  # rows and columns of a frame
    noise: float = 0.2  # largest standard deviation of the noise on the latents
    half: bool = True  # convolutions in bfloat16
    start: str | None = None  # file of weights to continue from, on other batches; null: random ones
    decoder_only: bool = False  # keep the encoder of ``start``, and with it every latent, as it is


def draw_pools(config: TemporalConfig, cache: Path | None = None) -> Pools:
    """Render the clips that a training draws from, or read them from ``cache``."""
    counts = {
        "world": config.clips,
        "shapes": 1024 * config.clips // 2700,
        "textures": 512 * config.clips // 2700,
    }
    return {
        kind: cached_pool(
            cache,
            kind,
            TRAIN_SEED + config.seed,
            max(count, 1),
            config.frames + (SLACK if kind == "world" else 0),
            config.size,
        )
        for kind, count in counts.items()
    }


def to_tensor(clips: np.ndarray) -> Tensor:
    """uint8 (b f h w c) -> (b f c h w) in [-1, 1]."""
    return torch.from_numpy(np.array(clips)).permute(0, 1, 4, 2, 3).float() / 127.5 - 1


def stage_of(config: TemporalConfig) -> str:
    """Return the name of the random numbers of a first training, a second one, or one of the decoder."""
    if config.decoder_only:
        return "temporal autoencoder, decoder"
    return "temporal autoencoder" if config.start is None else "temporal autoencoder, second training"


def draw_batch(pools: Pools, config: TemporalConfig, step: int) -> Tensor:
    """Return the clips of one step, a function of (seed, stage, step): (b f c h w) in [-1, 1]."""
    draw = generator(config.seed, stage_of(config), step)

    def pick(high: int) -> int:
        return int(torch.randint(high, (), generator=draw))

    clips = []
    for kind, count in SHARES.items():
        for _ in range(count):
            clip = pools[kind][pick(len(pools[kind]))]
            start = pick(len(clip) - config.frames + 1)
            clips.append(clip[start : start + config.frames])
    clips[0] = np.maximum(clips[0], pools["shapes"][pick(len(pools["shapes"]))])
    batch = to_tensor(np.stack(clips))
    for index in (1, SHARES["world"]):
        batch[index] = batch[index][:, torch.randperm(3, generator=draw)]
    if step % MOSAIC_EVERY == MOSAIC_EVERY - 1:
        order = torch.randperm(BATCH, generator=draw)
        batch = batch[order].unflatten(0, (-1, 2, 2)).permute(0, 3, 4, 1, 5, 2, 6)  # (2 f c 2 h 2 w)
        batch = batch.flatten(5, 6).flatten(3, 4)  # (2 f c 2h 2w)
    return batch


def reconstruction_loss(decoded: Tensor, frames: Tensor) -> Tensor:
    """Return the loss between clips (b f c h w): absolute and squared error, where moving pixels weigh four
    times and the first frame three times as much, and the error of the frames' differences.
    """
    error = decoded - frames
    moving = (frames[:, 1:] - frames[:, :-1]).abs().amax(2, keepdim=True) > MOVING  # (b f-1 1 h w)
    weight = torch.cat((3 * torch.ones_like(frames[:, :1, :1]), 1 + 3 * moving.float()), 1)
    weighted = (weight * (error.abs() + 4 * error.square())).mean() / weight.mean()
    return weighted + 0.3 * (error[:, 1:] - error[:, :-1]).abs().mean()


def fit(
    config: TemporalConfig, keep: Path | None = None, cache: Path | None = None
) -> BuiltinTemporalAutoencoder:
    """Train from random weights, resuming from the state in the file ``keep``; rendered clips are stored in
    ``cache``.
    """
    pools = draw_pools(config, cache)
    model = fresh_network(BuiltinTemporalAutoencoder, config.seed)
    if config.start is not None:
        begin_from(model, config.start)
    if config.decoder_only:
        model.encoder.requires_grad_(False)

    def loss_of(step: int) -> Tensor:
        frames = draw_batch(pools, config, step)
        draw = generator(config.seed, f"noise of {stage_of(config)}", step)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.half):
            latent = model.raw_encode(to_spans(frames), {}).float()
            size = config.noise * torch.rand(len(latent), 1, 1, 1, 1, generator=draw)
            noisy = latent + size * torch.randn(latent.shape, generator=draw)
            decoded = to_frames(model.raw_decode(noisy, {})).float()
        loss = reconstruction_loss(decoded, frames)
        if config.decoder_only:
            return loss
        moment = latent.square().mean((0, 1, 3, 4))  # of each channel
        return loss + 0.1 * (moment - 1).square().mean()

    edges = {model.decoder[0], model.to_pixels, *model.refiner.modules()}
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
    if not config.decoder_only:
        normalise(model, pools, config)
    return model.eval()


def begin_from(model: BuiltinTemporalAutoencoder, path: str) -> None:
    """Load the weights at ``path``; a network without refiner keeps the model's, which adds 0."""
    stored = read_tensors(path, "--start")
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("refiner.")}
    fill_network(model, {**own, **stored}, path, "--start")


def some_clips(pools: Pools, config: TemporalConfig, num_clips: int) -> Iterator[Tensor]:
    """Yield clips (1 f c h w) of the world and of moving shapes, three to one."""
    for index in range(num_clips):
        pool = pools["shapes" if index % 4 == 3 else "world"]
        yield to_tensor(pool[index % len(pool)][None, : config.frames])


@torch.no_grad()
def normalise(model: BuiltinTemporalAutoencoder, pools: Pools, config: TemporalConfig) -> None:
    """Put the latents' exact mean and standard deviation over procedural clips into the model."""
    clips = some_clips(pools, config, 512)
    raw = torch.cat([model.raw_encode(to_spans(clip), {}).double() for clip in clips])
    model.latent_mean.copy_(raw.mean((0, 1, 3, 4)))
    model.latent_std.copy_(raw.std((0, 1, 3, 4), correction=0))


def held_out_clips(config: TemporalConfig, num_clips: int) -> dict[str, list[Tensor]]:
    """Return clips (f c h w) of scenes that no training draws, by the world's kinds and ``shapes``; the
    world at its own frame rate.
    """
    clips: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for index in range(num_clips * len(KINDS)):
        frames = world_clip(TEST_SEED, index, config.frames, config.size, FPS)
        clips[list(KINDS)[index % len(KINDS)]].append(to_tensor(frames[None])[0])
    shapes = [shape_clip(TEST_SEED, index, config.frames, config.size) for index in range(num_clips)]
    clips["shapes"] = [to_tensor(frames[None])[0] for frames in shapes]
    return clips


@torch.no_grad()
def measure(
    model: BuiltinTemporalAutoencoder, config: TemporalConfig, num_clips: int = 16
) -> dict[str, float]:
    """PSNR, mean over ``num_clips`` held-out clips of each kind: of the whole clip, of its first frame alone,
    and with Gaussian noise on the latents; and the latents' moments.
    """
    draw = generator("temporal autoencoder measure")
    result: dict[str, float] = {}
    latents = []
    scores: dict[str, list[float]] = {name: [] for name in ("clip", "image", "noise_0.1", "noise_0.3")}
    for kind, clips in held_out_clips(config, num_clips).items():
        found = []
        for clip in clips:
            latent = model.encode(clip[None])
            latents.append(latent)
            found.append(fidelity(model.decode(latent)[0], clip))
            if kind == "shapes":
                continue
            scores["image"].append(fidelity(model.decode(latent[:, :1])[0], clip[:1]))
            for noise in (0.1, 0.3):
                noisy = latent + noise * torch.randn(latent.shape, generator=draw)
                scores[f"noise_{noise}"].append(fidelity(model.decode(noisy)[0], clip))
        result[f"psnr_{kind}"] = sum(found) / len(found)
        scores["clip"] += found if kind != "shapes" else []
    result |= {f"psnr_world_{name}": sum(found) / len(found) for name, found in scores.items()}
    stacked = torch.cat(latents)
    result["latent_mean"] = stacked.mean().item()
    result["latent_std"] = stacked.std().item()
    result["latent_largest"] = stacked.abs().max().item()
    return result


def fidelity(decoded: Tensor, frames: Tensor) -> float:
    """Return the PSNR in dB of a decoded clip (f c h w), clamped."""
    return psnr(max((decoded.clamp(-1, 1) - frames).square().mean().item(), 1e-10))


def command_of(out: Path, config: TemporalConfig) -> str:
    """Return the command line of a training, for its card."""
    command = f"python -m tools.train_temporal_autoencoder {out.name} --steps {config.steps}"
    for name in ("decay_steps", "lr", "muon_lr", "start"):
        value = getattr(config, name)
        if value != getattr(TemporalConfig, name):
            command += f" --{name.replace('_', '-')} {Path(value).name if name == 'start' else value}"
    return command + " --decoder-only" * config.decoder_only


def make_weights(out: Path, config: TemporalConfig, cache: Path | None = None, num_clips: int = 16) -> dict:
    """Train, measure the float16 weights that are stored on ``num_clips`` held-out clips of each kind, write
    them to ``out`` with their card in the metadata; return the card.
    """
    started = time.process_time()
    model = fit(config, out.with_name(f"{out.name}.state"), cache)
    seconds = time.process_time() - started
    stored = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    card = {
        "command": command_of(out, config),
        "config": {**asdict(config), "start": config.start and Path(config.start).name},
        "cpu_seconds": round(seconds, 1),  # since the last resumption
        "parameters": sum(p.numel() for p in model.parameters()),
        "measured": {name: round(value, 4) for name, value in measure(model, config, num_clips).items()},
    }
    save_file(stored, out, metadata={"card": json.dumps(card)})
    return card


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Train the built-in temporal autoencoder on procedural clips."
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=TemporalConfig.steps)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder for the rendered clips")
    parser.add_argument("--start", help="weights to continue from; random ones without it")
    parser.add_argument("--lr", type=float, default=TemporalConfig.lr, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=TemporalConfig.muon_lr, help="of Muon")
    parser.add_argument("--decay-steps", type=int, default=TemporalConfig.decay_steps)
    parser.add_argument("--decoder-only", action="store_true", help="keep the encoder of --start as it is")
    options = parser.parse_args()
    if options.decoder_only and options.start is None:
        parser.error("--decoder-only needs --start, whose encoder it keeps")
    for folder in (options.out.parent, options.cache):
        if folder is not None and not folder.is_dir():
            parser.error(f"the folder {folder} does not exist; make it first")
    torch.set_num_threads(options.threads)
    names = ("steps", "start", "lr", "muon_lr", "decay_steps", "decoder_only")
    settings = {name: getattr(options, name) for name in names}
    print(json.dumps(make_weights(options.out, TemporalConfig(**settings), options.cache)))


if __name__ == "__main__":
    main()
