# SPDX-License-Identifier: Apache-2.0
"""Frames to features: each detector with its exact resize and value range, and a card that says what it sees and what it does not.

Half of the disagreement between published FVDs is in this file's choices, so they are plain values (``Pixels``) that a protocol states.
Axes: b clips, t frames, h w c height width channels, n single frames, k features.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latte.checks import InputError, choose, require
from latte.evaluation.detector_files import Weights, find_weights, load_converted, tensors_sha256
from latte.evaluation.networks import builtin, c3d, i3d, inception
from latte.evaluation.networks.layers import Network, channels_last
from latte.runtime import generator


def resize_tf1(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(n c h w) -> (n c *size), bilinear as TensorFlow 1 had it: pixel i of the output lies at i * in / out, no half-pixel shift."""
    for axis in (3, 2):
        length, new = x.shape[axis], size[axis - 2]
        place = torch.arange(new, dtype=torch.float32, device=x.device) * (length / new)
        low = place.floor().long().clamp(max=length - 1)
        part = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        first = x.index_select(axis, low)
        x = first + (x.index_select(axis, (low + 1).clamp(max=length - 1)) - first) * part
    return x


RESIZES: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "half-pixel": lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=False),
    "align-corners": lambda x, size: F.interpolate(x, size, mode="bilinear", align_corners=True),
    "tf1": resize_tf1,
}
RANGES = {  # (x - shift) / scale for x in 0..255
    "[-1, 1]": (127.5, 127.5),
    "(x - 128) / 128": (128.0, 128.0),
    "[0, 1]": (0.0, 255.0),
}
CROPS = ("none", "centre")


@dataclass(frozen=True)
class Pixels:
    """How frames reach a network. ``crop`` 'none' squeezes them to size x size; 'centre' resizes the shorter side and cuts the middle out.

    None of the published protocols filters before it shrinks, so there is no antialiasing here.
    """

    size: int = 224
    resize: str = "half-pixel"
    crop: str = "none"
    values: str = "[-1, 1]"

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        choose("pixels.resize", self.resize, RESIZES)
        choose("pixels.crop", self.crop, dict.fromkeys(CROPS))
        choose("pixels.values", self.values, RANGES)

    def describe(self) -> dict[str, Any]:
        """The fields of the manifest's pixel group."""
        return asdict(self) | {"antialias": False}

    def prepare(self, frames: Tensor) -> Tensor:
        """uint8 (b t h w c) -> float32 (b c t size size) in the network's range."""
        b, t, h, w, _ = frames.shape
        x = frames.flatten(0, 1).permute(0, 3, 1, 2).float()
        target = (self.size, self.size)
        if self.crop == "centre":  # the longer side is rounded up, as VideoGPT has it
            scale = self.size / min(h, w)
            target = (self.size, math.ceil(w * scale)) if h < w else (math.ceil(h * scale), self.size)
        if (h, w) != target:
            x = RESIZES[self.resize](x, target)
        top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        shift, scale = RANGES[self.values]
        x = (x[..., top : top + self.size, left : left + self.size] - shift) / scale
        return x.unflatten(0, (b, t)).transpose(1, 2)


@dataclass(frozen=True)
class DetectorSpec:
    """A line of ``DETECTORS``. ``open(path, sha256)`` gives the weights; ``layers`` names what can be read and its width, default first."""

    open: Callable[[Path | None, str | None], Weights]
    layers: Mapping[str, int]
    pixels: Pixels
    card: str
    unit: str = "clip"  # or "frame": one row per frame
    min_frames: int = 1
    max_frames: int | None = None


def published(detector: str, network: Network) -> Callable[[Path | None, str | None], Weights]:
    """Weights from a published file: given, cached or downloaded (detector_files.py)."""
    return lambda path, sha256: load_converted(find_weights(detector, network, path, sha256), network)


def random_i3d(path: Path | None = None, sha256: str | None = None, seed: int = 0) -> Weights:
    """I3D with random filters: the same bits on every machine (integers are drawn and centred before the one division).

    Every filter has mean zero: without that all clips give nearly the same direction (measured on 48 real clips: the covariance has an
    effective rank of 1.2 instead of 5.8, and shuffled frames move the features 60 times less).
    """
    require(
        path is None and sha256 is None,
        "the detector's path",
        path or sha256,
        "random-i3d reads no file",
        "leave it out",
    )
    network = i3d.I3D()
    draw = generator(seed, "random-i3d")
    for name, parameter in network.named_parameters():
        if name.endswith(".weight"):
            fan_in = parameter[0].numel()
            integers = torch.randint(-(2**15), 2**15, parameter.shape, generator=draw, dtype=torch.int64)
            centred = (integers * fan_in - integers.sum(dim=(1, 2, 3, 4), keepdim=True)).double()
            variance = (
                1 / fan_in if name == "logits.weight" else 2 / (1 - 1 / math.pi) / fan_in
            )  # ReLU keeps (1 - 1/pi)/2 of it
            parameter.data = (centred * (math.sqrt(3 * variance) / (2**15 * fan_in))).float()
    digest = tensors_sha256(network.state_dict())
    return Weights(channels_last(network).eval(), digest, f"random-i3d seed {seed}", 0, digest)


def builtin_weights(path: Path | None = None, sha256: str | None = None) -> Weights:
    """The built-in detector with the weights in the package; other weights under its name would be another detector."""
    require(
        path is None and sha256 is None,
        "the detector's path",
        path or sha256,
        "builtin reads the package's own file",
        "leave it out",
    )
    return load_converted(builtin.WEIGHTS, builtin.NETWORK)


I3D_CARD = (
    "Kinetics-400 action logits of 16 or more frames at 224 x 224. Sees the kind of action and scene, texture and gross motion. "
    "Known to favour single-frame quality over motion; blind to detail above 224 pixels and to anything that leaves the action as likely."
)
LOGITS = {"logits": 400}
DETECTORS: dict[str, DetectorSpec] = {
    "i3d": DetectorSpec(
        published("i3d", i3d.NETWORK),
        LOGITS,
        Pixels(),
        f"{I3D_CARD} StyleGAN-V's TorchScript file. Its own resize could not be read; half-pixel bilinear is assumed.",
        min_frames=i3d.MIN_FRAMES,
    ),
    "i3d400": DetectorSpec(
        published("i3d400", i3d.PORTED),
        LOGITS,
        Pixels(),
        f"{I3D_CARD} VideoGPT's conversion of the same TF-Hub weights, with the norm eps of its code, TATS's and cd-fvd's: 1e-5, not 1e-3.",
        min_frames=i3d.MIN_FRAMES,
    ),
    "inception": DetectorSpec(
        published("inception", inception.NETWORK),
        {"pool3": 2048, "logits": 1008},
        Pixels(299, "tf1", values="(x - 128) / 128"),
        "ImageNet features of single frames at 299 x 299. Sees texture and objects; sees no motion at all: shuffled or frozen frames "
        "change nothing. Small images are stretched, which it takes for blur.",
        unit="frame",
    ),
    "c3d": DetectorSpec(
        published("c3d", c3d.NETWORK),
        {"logits": 101},
        Pixels(112, "align-corners"),
        "UCF-101 class logits of exactly 16 frames at 112 x 112, for the Inception Score of UCF-101 models. Sees whether a clip is one of "
        "101 actions and how evenly they occur; means nothing for other data, and cannot see variety within a class.",
        min_frames=c3d.NUM_FRAMES,
        max_frames=c3d.NUM_FRAMES,
    ),
    "random-i3d": DetectorSpec(
        random_i3d,
        LOGITS,
        Pixels(),
        "I3D with random zero-mean filters: needs no download, for tests and quick looks. Sees another kind of scene, gross colour and "
        "strong noise. At 24 clips a side blurred, shuffled, frozen, turned and generated sky clips scored like real ones, at 48 both "
        "stages of MDGAN too. Compares with nothing else.",
        min_frames=i3d.MIN_FRAMES,
    ),
    "builtin": DetectorSpec(
        builtin_weights,
        {"features": builtin.NUM_FEATURES},
        Pixels(builtin.SIZE),
        "Trained to read procedural clips and their damage. On 256 such clips it sees blur of 1 pixel, noise of 8 grey levels, hues turned "
        "by 10 degrees, a quarter of the frames frozen or shuffled, 0.7 of the speed, 5 % less light, JPEG 90; a set is not told from a "
        "whole one when half of it is repeated. Real sky clips are foreign to it: at 24 a side shuffled, frozen and generated ones score "
        "like real ones. Compares with nothing else.",
        min_frames=builtin.MIN_FRAMES,
    ),
}


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 means float32 (no TF32, no bf16 products), and kernels are chosen without timing them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class Detector:
    """Calls a network on uint8 frames (b t h w c) and returns features (rows, k): one row per clip, or per frame in clip order.

    Rows go through the network ``group`` at a time, the last group filled up, so that a row's bits depend on ``group`` but neither on the
    batch it came in nor on how many processes share the work. ``group`` 1 costs nothing on a CPU; take 8 or more on a GPU.
    """

    def __init__(
        self,
        name: str,
        spec: DetectorSpec,
        weights: Weights,
        pixels: Pixels,
        layer: str,
        group: int,
        device: torch.device | str,
    ):
        self.name, self.spec, self.pixels, self.layer, self.group = name, spec, pixels, layer, group
        self.device, self.card, self.unit, self.dim = (
            torch.device(device),
            spec.card,
            spec.unit,
            spec.layers[layer],
        )
        self.sha256, self.source, self.bytes, self.tensors_sha256 = (
            weights.sha256,
            weights.source,
            weights.size,
            weights.tensors_sha256,
        )
        self.network: nn.Module = weights.network.to(self.device)

    def rows(self, frames: int) -> int:
        """Feature rows that a clip of ``frames`` frames gives."""
        return frames if self.unit == "frame" else 1

    def describe(self) -> dict[str, Any]:
        """The manifest's detector and pixel groups."""
        own = {
            "detector": self.name,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "loader": "own network",
            "layer": self.layer,
        }
        return own | {
            "dimension": self.dim,
            "dtype": "float32",
            "pixels": self.pixels.describe(),
            "group": self.group,
        }

    def check(self, frames: Tensor) -> None:
        """InputError unless ``frames`` is uint8 (b t h w 3) with a number of frames that the network can read."""
        shape, (low, high) = tuple(frames.shape), (self.spec.min_frames, self.spec.max_frames)
        ok = frames.dtype == torch.uint8 and frames.ndim == 5 and shape[-1] == 3 and 0 not in shape
        require(
            ok,
            "frames",
            f"{frames.dtype} {shape}",
            "a detector reads uint8 (b t h w 3)",
            "convert with data.clips.to_uint8",
        )
        exact = f"exactly {low}" if low == high else f"at least {low}"
        fits = shape[1] >= low and (high is None or shape[1] <= high)
        require(
            fits,
            "frames per clip",
            shape[1],
            f"{self.name} reads {exact}",
            "choose another clip length or detector",
        )

    @torch.inference_mode()
    def __call__(self, frames: Tensor | np.ndarray) -> Tensor:
        """uint8 (b t h w 3) -> float32 (rows, k) on the CPU; InputError for other input."""
        frames = torch.as_tensor(frames)
        self.check(frames)
        if self.unit == "frame":
            frames = frames.flatten(0, 1).unsqueeze(1)
        features = []
        with full_precision():
            for part in frames.split(self.group):
                filled = torch.cat([part, part[-1:].expand(self.group - len(part), *part.shape[1:])])
                x = self.pixels.prepare(filled.to(self.device))
                x = x.squeeze(2) if self.unit == "frame" else x
                y = self.network(x) if len(self.spec.layers) == 1 else self.network(x, self.layer)
                features.append(y[: len(part)].float().cpu())
        return torch.cat(features)


def build_detector(
    name: str,
    device: torch.device | str = "cpu",
    path: Path | None = None,
    sha256: str | None = None,
    pixels: Pixels | None = None,
    layer: str | None = None,
    group: int = 1,
) -> Detector:
    """The detector ``name`` with its weights (given by ``path``, cached or downloaded) on ``device``.

    ``sha256`` vouches for a file that no table knows; ``pixels`` and ``layer`` replace the detector's own. InputError for unknown names,
    files and hashes, and for weights that are missing while offline.
    """
    spec = choose("detector", name, DETECTORS)
    layer = layer or next(iter(spec.layers))
    choose("layer", layer, spec.layers)
    if group < 1:
        raise InputError(
            f"group is {group}, but rows go through the network at least 1 at a time; give 1 or more"
        )
    return Detector(name, spec, spec.open(path, sha256), pixels or spec.pixels, layer, group, device)
