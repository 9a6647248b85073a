# SPDX-License-Identifier: Apache-2.0
"""What can be seen of a clip that is still being denoised: the callback of a pipeline's call, and previews.

A preview turns latents into small frames by one linear map, no decoder. The map, a 3 x 3 convolution to a
block of BLOCK x BLOCK pixels for every latent pixel, is the least-squares fit to what the codec's encoder
makes of procedural clips, solved once per codec and process.
Axes: b batch, f latent frames, t frames, c channels, h height, w width, k features, p side of a block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latte.autoencoder.codec import Codec
from latte.checks import check
from latte.data.base import DataConfig
from latte.data.clips import to_float, to_uint8
from latte.data.world.dataset import WorldScenes
from latte.runtime import generator

CLIPS = 24  # procedural clips of the fit
SIDE = 64  # pixels of each side, at least
LATENT_FRAMES = 3  # of each, at least
BLOCK = 4  # pixels of a side, where the codec has at least as many for a latent pixel
RIDGE = 1e-7  # of the fit, relative to the mean square of a feature
_fitted: dict[str, "LinearPreview"] = {}


@dataclass(frozen=True)
class LinearPreview:
    """Pixels = weights^T features of the latent's 3 x 3 neighbourhoods; weights (k 3*p*p)."""

    weights: Tensor
    block: int

    def __call__(self, z: Tensor) -> np.ndarray:
        """Return uint8 (b f h*p w*p 3) of latents (b f c h w)."""
        pixels = features(z.flatten(0, 1).float()) @ self.weights.to(z.device)  # (b*f h*w 3*p*p)
        frames = F.fold(pixels.mT, side(z, self.block), self.block, stride=self.block)  # (b*f 3 h*p w*p)
        return np.asarray(to_uint8(frames.clamp(-1, 1).unflatten(0, z.shape[:2]).cpu()))


def side(z: Tensor, block: int) -> tuple[int, int]:
    """Return the height and width of the preview of latents (... h w)."""
    return z.shape[-2] * block, z.shape[-1] * block


def features(z: Tensor) -> Tensor:
    """Return the neighbourhoods of latents (n c h w) and a 1: (n h*w 9*c+1)."""
    around = F.unfold(F.pad(z, (1, 1, 1, 1), mode="replicate"), 3).mT  # (n h*w 9*c)
    return F.pad(around, (0, 1), value=1.0)


def preview_of(codec: Codec) -> LinearPreview:
    """Return the preview of ``codec``, fitted at the first call and then kept."""
    if codec.fingerprint not in _fitted:
        _fitted[codec.fingerprint] = fit_preview(codec)
    return _fitted[codec.fingerprint]


def fit_preview(codec: Codec) -> LinearPreview:
    """Return the least-squares map from the latents of clips to the mean of the frames that each covers."""
    factor = codec.spatial_factor
    block = min(BLOCK, factor)
    pixels = factor * -(-SIDE // factor)
    frames = codec.compression.nearest_frames(codec.frames(LATENT_FRAMES))[-1]
    scenes = WorldScenes(DataConfig(kind="procedural", scenes="world", resolution=pixels, frames=frames))
    inputs = []
    targets = []
    for index in range(CLIPS):
        video = to_float(scenes.render_clip(index))  # (t 3 H W)
        with torch.no_grad():
            z = codec.encode(video[None], generator(index, "preview"))[0].float().cpu()  # (f c h w)
        spans = [codec.compression.span(frame) for frame in range(len(z))]
        means = torch.stack([video[list(span)].mean(0) for span in spans])  # (f 3 H W)
        small = F.interpolate(means, side(z, block), mode="area")  # (f 3 h*p w*p)
        inputs.append(features(z).flatten(0, 1))  # (f*h*w k)
        targets.append(F.unfold(small, block, stride=block).mT.flatten(0, 1))  # (f*h*w 3*p*p)
    table = torch.cat(inputs).double()
    squares = table.T @ table
    squares += RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=squares.dtype)
    solution = torch.linalg.solve(squares, table.T @ torch.cat(targets).double())  # (k 3*p*p)
    return LinearPreview(solution.float(), block)


Callback = Callable[[Any, int, int, dict[str, Any]], Any]
"""(pipeline, step, timestep, {} or {"preview": uint8 (b f H W 3)}) -> ignored."""


@contextmanager
def step_options(pipe: Any, callback: Callback | None, preview: bool) -> Iterator[dict[str, Any]]:
    """Provide the options of ``generate`` by which ``callback`` is called after each step, {} without one.

    It gets the timestep that the model last computed and, with ``preview``, the z_0 that the last output
    implies, as the linear preview of the codec shows it. InputError for a preview without a callback.
    """
    check(
        callback is not None or not preview,
        "preview=True, but there is no callback_on_step_end to show it; pass one, or leave preview out",
    )
    if callback is None:
        yield {}
        return
    timesteps: list[int] = []
    estimates: list[Tensor] = []
    show = preview_of(pipe.codec) if preview else None
    handle = pipe.model.register_forward_pre_hook(
        lambda _, inputs: timesteps.append(int(inputs[1].flatten()[0]))
    )

    def progress(done: int, of: int) -> None:
        shown = {"preview": show(estimates[-1])} if show else {}
        callback(pipe, done - 1, timesteps[-1], shown)
        timesteps.clear()
        estimates.clear()

    options: dict[str, Any] = {"progress": progress}
    if show:
        options["estimates"] = estimates.append
    try:
        yield options
    finally:
        handle.remove()
