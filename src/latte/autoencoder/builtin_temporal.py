# SPDX-License-Identifier: Apache-2.0
"""The built-in autoencoder that compresses time: 8x smaller each way, 4x in time, causal, trained by this
project on procedural clips.

Four frames of 4 x 4 pixels are one position of a two-dimensional convolution; time passes between positions
by shifted channels alone: in each residual block a quarter of the channels comes from the latent frame before
(Lin et al., "TSM", arXiv 1811.08383). So a latent frame depends on no later span, decoding is causal as
well, and a clip can be processed in parts that carry the shifted channels from one to the next. The first
frame stands in for the four of its span. Without norms or attention any size divisible by 8 works.
The packaged weights were made by ``python -m tools.train_temporal_autoencoder`` in two trainings, see their
card; the first was of the network without its refiner.
Axes: b batch, f frames, f' latent frames, n = b f', s = 4 frames of a span, p = 4 pixels of a patch, c
channels, H W pixels, h w latent size.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from latte.autoencoder.base import Compression, VideoCodec, load_network
from latte.tensors import without_memory

WEIGHTS = Path(__file__).with_name("builtin_temporal.safetensors")
SPAN = 4  # frames of a latent frame
PATCH = 4  # rows and columns of a patch, before the convolution of stride 2
Memory = dict[nn.Module, Tensor]
"""What each residual block keeps of the latent frame that it saw last: (b 1 h w c/4)."""


class Residual(nn.Module):
    """x + conv(relu(conv(relu(shift(x))))), (n c h w) -> (n c h w); the identity at the start of training."""

    def __init__(self, channels: int):
        super().__init__()
        self.shifted = channels // 4
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, batch: int, memory: Memory) -> Tensor:
        y = self.first(self.shift(x, batch, memory).relu())
        return x + self.second(y.relu())

    def shift(self, x: Tensor, batch: int, memory: Memory) -> Tensor:
        """Replace the first quarter of the channels by the latent frame before's, 0 before the first."""
        clips = x.permute(0, 2, 3, 1).unflatten(0, (batch, -1))  # (b f' h w c)
        ours = clips[..., : self.shifted]
        before = memory.get(self, torch.zeros_like(ours[:, :1]))
        memory[self] = ours[:, -1:]
        shifted = torch.cat((torch.cat((before, ours[:, :-1]), 1), clips[..., self.shifted :]), -1)
        return shifted.flatten(0, 1).permute(0, 3, 1, 2)  # (n c h w)


class Stack(nn.ModuleList):
    """Layers in order; residual blocks get the clips' number and the memory as well."""

    def forward(self, x: Tensor, batch: int, memory: Memory) -> Tensor:
        for layer in self:
            x = layer(x, batch, memory) if isinstance(layer, Residual) else layer(x)
        return x


class Refiner(nn.Module):
    """Add detail to decoded spans, frame by frame at half their rows and columns, where edges are drawn.

    It sees the frame and 12 features of the decoder; it adds 0 at the start of training.
    """

    def __init__(self, channels: int, span: int, width: int = 24):
        super().__init__()
        self.span = span
        self.features = width - 12
        self.spread = nn.Conv2d(channels, span * 4 * self.features, 1)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, 12, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, images: Tensor) -> Tensor:
        """Return frames (n*s 3 H W) of features (n c H/4 W/4) and the spans of images (n s*3 H W)."""
        features = self.spread(hidden).unflatten(1, (self.span, -1)).flatten(0, 1)  # (n*s 4*features H/4 W/4)
        frames = images.unflatten(1, (self.span, 3)).flatten(0, 1)  # (n*s 3 H W)
        x = torch.cat((functional.pixel_unshuffle(frames, 2), functional.pixel_shuffle(features, 2)), 1)
        x = self.first(x.contiguous(memory_format=torch.channels_last))
        x = x + self.middle(x.relu())
        return frames + functional.pixel_shuffle(self.second(x.relu()), 2)


class BuiltinTemporalAutoencoder(nn.Module):
    """Frames (b f 3 H W) in [-1, 1] <-> latents (b f' 16 H/8 W/8), f = 1 + 4 (f' - 1).

    Over procedural clips, each channel of the latents has mean 0 and variance 1.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, channels: int = 16, wide: int = 128, narrow: int = 96):
        super().__init__()
        self.encoder = Stack(
            (
                nn.Conv2d(3 * SPAN * PATCH**2, narrow, 1),
                Residual(narrow),
                nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
                Residual(wide),
                nn.ReLU(),
                nn.Conv2d(wide, channels, 1),
            )
        )
        self.decoder = Stack(
            (
                nn.Conv2d(channels, wide, 3, padding=1),
                Residual(wide),
                nn.Conv2d(wide, 4 * narrow, 1),
                nn.PixelShuffle(2),
                Residual(narrow),
                Residual(narrow),
                nn.ReLU(),
            )
        )
        self.to_pixels = nn.Conv2d(narrow, 3 * SPAN * PATCH**2, 3, padding=1)
        self.refiner = Refiner(narrow, SPAN)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.endswith("second"):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    def raw_encode(self, spans: Tensor, memory: Memory) -> Tensor:
        """Return latents (b f' c h w), not normalised, of spans (b f' s 3 H W)."""
        patches = functional.pixel_unshuffle(spans.flatten(2, 3).flatten(0, 1), PATCH)  # (n 192 H/4 W/4)
        patches = patches.contiguous(memory_format=torch.channels_last)
        return self.encoder(patches, len(spans), memory).unflatten(0, spans.shape[:2])

    def raw_decode(self, latent: Tensor, memory: Memory) -> Tensor:
        """Return spans (b f' s 3 H W), about [-1, 1], of latents (b f' c h w) that are not normalised."""
        flat = latent.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (n c h w)
        hidden = self.decoder(flat, len(latent), memory)  # (n narrow H/4 W/4)
        images = functional.pixel_shuffle(self.to_pixels(hidden), PATCH)  # (n s*3 H W)
        frames = self.refiner(hidden, images)  # (n*s 3 H W)
        return frames.unflatten(0, (*latent.shape[:2], SPAN))  # (b f' s 3 H W)

    def encode(self, frames: Tensor) -> Tensor:
        """Return normalised latents (b f' c h w) of frames (b f 3 H W).

        One latent frame at a time, in bounded memory: convolution kernels round differently for another
        number of frames, and so the latents of a clip's start are those of the clip, bit for bit.
        """
        memory: Memory = {}
        latents = [self.raw_encode(span, memory) for span in to_spans(frames).split(1, 1)]
        raw = torch.cat(latents, 1)  # (b f' c h w)
        return (raw - self.latent_mean[:, None, None]) / self.latent_std[:, None, None]

    def decode(self, latent: Tensor) -> Tensor:
        """Return frames (b f 3 H W), about [-1, 1], of normalised latents (b f' c h w), one latent frame at a
        time as in ``encode``.
        """
        memory: Memory = {}
        raw = latent * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        spans = [self.raw_decode(latents, memory) for latents in raw.split(1, 1)]
        return to_frames(torch.cat(spans, 1))


def to_spans(frames: Tensor) -> Tensor:
    """Return spans (b f' s 3 H W) of frames (b f 3 H W); the first span is the first frame throughout."""
    lead = frames[:, :1].expand(-1, SPAN - 1, -1, -1, -1)
    return torch.cat((lead, frames), 1).unflatten(1, (-1, SPAN))  # (b f' s 3 H W)


def to_frames(spans: Tensor) -> Tensor:
    """Return frames (b f 3 H W) of spans (b f' s 3 H W): of the first span its last frame alone."""
    return spans.flatten(1, 2)[:, SPAN - 1 :]  # (b f 3 H W)


class BuiltinTemporalCodec(VideoCodec):
    """The built-in temporal autoencoder as a codec: deterministic, causal, 16 channels, 8x smaller, 4x
    shorter. Long clips have as many numbers as with ``builtin``, 17 frames 18 % more.

    One span of frames is in the network at a time, whatever ``chunk``.
    """

    name = "builtin_temporal"
    compression = Compression(channels=16, spatial_factor=8, temporal_factor=SPAN)

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """Return the codec.

        ``path`` is a file that ``tools.train_temporal_autoencoder`` wrote, None for the packaged weights.
        """
        network = load_network(BuiltinTemporalAutoencoder(), path or WEIGHTS, "codec.path")
        return cls(network, chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        with without_memory():
            return BuiltinTemporalAutoencoder()

    def encode_clip(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        return self.network.encode(frames)

    def decode_clip(self, latent: Tensor) -> Tensor:
        return self.network.decode(latent)
