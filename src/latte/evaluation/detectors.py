# SPDX-License-Identifier: Apache-2.0
"""Frames to features: each detector with its exact resize and value range, and a card that says what it
measures.

Half of the disagreement between published FVDs comes from the choices in this file, so they are plain values
(``Pixels``) that a protocol states. A new detector is one entry of ``DETECTORS``.
Axes: b clips, t frames, h w c height width channels, n single frames, k features.
"""

import copy
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

from latte.checks import InputError, check, choose
from latte.evaluation.detector_files import Weights, find_weights, load_converted
from latte.evaluation.networks import builtin, c3d, i3d, inception
from latte.evaluation.networks.layers import Network, channels_last
from latte.tensors import tensors_sha256


def resize_tf1(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (n c h w) to (n c *size) as TensorFlow 1 did: bilinear, output pixel i at i * in / out, no
    half-pixel shift.
    """
    for axis in (3, 2):
        length = x.shape[axis]
        new = size[axis - 2]
        position = torch.arange(new, dtype=torch.float32, device=x.device) * (length / new)
        low = position.floor().long().clamp(max=length - 1)
        weight = (position - low).view(-1, *[1] * (3 - axis))  # (new) for axis 3, (new 1) for axis 2
        first = x.index_select(axis, low)
        x = first + (x.index_select(axis, (low + 1).clamp(max=length - 1)) - first) * weight
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
    """How frames are resized and scaled for a network. None of the published protocols uses antialiasing
    here.
    """

    size: int = 224  # height and width of the network's input
    resize: str = "half-pixel"  # a name of RESIZES
    crop: str = "none"  # none: stretch to a square; centre: resize the shorter side, then crop the centre
    values: str = "[-1, 1]"  # a name of RANGES

    def __post_init__(self) -> None:
        choose("pixels.resize", self.resize, RESIZES)
        choose("pixels.crop", self.crop, dict.fromkeys(CROPS))
        choose("pixels.values", self.values, RANGES)

    def describe(self) -> dict[str, Any]:
        """Return the fields of the manifest's pixel group."""
        return asdict(self) | {"antialias": False}

    def prepare(self, frames: Tensor) -> Tensor:
        """Return uint8 frames (b t h w c) as float32 (b c t size size) in the network's value range."""
        b, t, h, w, _ = frames.shape
        x = frames.flatten(0, 1).permute(0, 3, 1, 2).float()  # (n c h w)
        target = (self.size, self.size)
        if self.crop == "centre":  # the longer side is rounded up, as in VideoGPT
            scale = self.size / min(h, w)
            target = (math.ceil(h * scale), math.ceil(w * scale))
            target = (self.size, target[1]) if h < w else (target[0], self.size)
        if (h, w) != target:
            x = RESIZES[self.resize](x, target)
        top = (target[0] - self.size) // 2
        left = (target[1] - self.size) // 2
        shift, scale = RANGES[self.values]
        x = (x[..., top : top + self.size, left : left + self.size] - shift) / scale
        return x.unflatten(0, (b, t)).transpose(1, 2)  # (b c t size size)


@dataclass(frozen=True)
class DetectorSpec:
    """An entry of ``DETECTORS``."""

    open: Callable[[Path | None, str | None], Weights]  # (file, its SHA-256) -> network with weights
    layers: Mapping[str, int]  # readable layers: width; the first one is the default
    pixels: Pixels
    card: str  # what it measures and what it cannot see
    unit: str = "clip"  # one row per "clip", or per "frame"
    min_frames: int = 1
    max_frames: int | None = None


def published(detector: str, network: Network) -> Callable[[Path | None, str | None], Weights]:
    """Return an opener of published weights: a given, a cached or a downloaded file (detector_files.py)."""
    return lambda path, sha256: load_converted(find_weights(detector, network, path, sha256), network)


def refuse_file(detector: str, path: Path | None, sha256: str | None) -> None:
    """InputError if a weight file or hash was given for a detector with fixed weights."""
    given = path or sha256
    check(
        given is None,
        f"detector {detector!r} reads no weight file, got {given}; remove --detector and its hash",
    )


def random_i3d(path: Path | None = None, sha256: str | None = None, seed: int = 0) -> Weights:
    """Return an I3D with random filters."""
    refuse_file("random-i3d", path, sha256)
    network = i3d.random_filters(seed)
    digest = tensors_sha256(network.state_dict())
    return Weights(channels_last(network).eval(), digest, f"random-i3d seed {seed}", 0, digest)


def builtin_weights(path: Path | None = None, sha256: str | None = None) -> Weights:
    """Return the built-in detector with the weights of the package."""
    refuse_file("builtin", path, sha256)
    return load_converted(builtin.WEIGHTS, builtin.NETWORK)


I3D_CARD = (
    "Kinetics-400 action logits of 16 or more frames at 224 x 224. Sensitive to the kind of action and "
    "scene, texture and gross motion. Known to favour single-frame quality over motion; blind to detail "
    "above 224 pixels and to any change that leaves the action equally likely."
)
LOGITS = {"logits": 400}
DETECTORS: dict[str, DetectorSpec] = {
    "i3d": DetectorSpec(
        published("i3d", i3d.NETWORK),
        LOGITS,
        Pixels(),
        f"{I3D_CARD} StyleGAN-V's TorchScript file. Its internal resize is not public; half-pixel bilinear "
        "is assumed.",
        min_frames=i3d.MIN_FRAMES,
    ),
    "i3d400": DetectorSpec(
        published("i3d400", i3d.PORTED),
        LOGITS,
        Pixels(),
        f"{I3D_CARD} VideoGPT's conversion of the same TF-Hub weights, with the norm eps 1e-5 of its code, "
        "TATS's and cd-fvd's instead of 1e-3.",
        min_frames=i3d.MIN_FRAMES,
    ),
    "inception": DetectorSpec(
        published("inception", inception.NETWORK),
        {"pool3": 2048, "logits": 1008},
        Pixels(299, "tf1", values="(x - 128) / 128"),
        "ImageNet features of single frames at 299 x 299. Sensitive to texture and objects; blind to "
        "motion: shuffled or frozen frames change nothing. Small frames are upscaled, which looks like "
        "blur to it.",
        unit="frame",
    ),
    "c3d": DetectorSpec(
        published("c3d", c3d.NETWORK),
        {"logits": 101},
        Pixels(112, "align-corners"),
        "UCF-101 class logits of exactly 16 frames at 112 x 112, for the Inception Score of UCF-101 "
        "models. Measures whether a clip is one of 101 actions and how evenly they occur; meaningless for "
        "other data, and blind to variety within a class.",
        min_frames=c3d.NUM_FRAMES,
        max_frames=c3d.NUM_FRAMES,
    ),
    "random-i3d": DetectorSpec(
        random_i3d,
        LOGITS,
        Pixels(),
        "I3D with random zero-mean filters: needs no download, for tests and quick checks. Sensitive to "
        "the kind of scene, gross colour and strong noise. At 24 clips per side, blurred, shuffled, "
        "frozen, hue-shifted and generated sky clips scored like real ones, at 48 both stages of MDGAN "
        "too. Not comparable with any other.",
        min_frames=i3d.MIN_FRAMES,
    ),
    "builtin": DetectorSpec(
        builtin_weights,
        {"features": builtin.NUM_FEATURES},
        Pixels(builtin.SIZE),
        "Trained on procedural clips, clean and corrupted. On 256 such clips it detects blur of 1 pixel, "
        "noise of 8 grey levels, hue shifts of 10 degrees, a quarter of the frames frozen or shuffled, 0.7 "
        "of the speed, 5 % less light and JPEG 90; it does not detect that half of a set is repeated. Real "
        "sky clips are outside of its domain: at 24 per side, shuffled, frozen and generated ones score "
        "like real ones. Not comparable with any other.",
        min_frames=builtin.MIN_FRAMES,
    ),
}


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 in float32 (no TF32, no bf16 products), with kernels chosen deterministically."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of the network


class Detector:
    """Maps uint8 frames (b t h w c) to features (rows, k): one row per clip, or one per frame in clip order.

    Rows go through the network ``group`` at a time, the last group padded, so a row's bits depend on
    ``group`` but not on its batch or the number of processes. ``group`` 1 costs nothing on a CPU; use 8 or
    more on a GPU. ``dtype`` is that of the network; published scores have float32.
    """

    dtype: torch.dtype = torch.float32
    reduced: nn.Module | None = None  # the network in ``dtype``, made when it is needed

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
        self.name = name
        self.spec = spec
        self.pixels = pixels
        self.layer = layer
        self.group = group
        self.device = torch.device(device)
        self.card = spec.card
        self.unit = spec.unit
        self.dim = spec.layers[layer]
        self.sha256 = weights.sha256
        self.source = weights.source
        self.bytes = weights.size
        self.tensors_sha256 = weights.tensors_sha256
        self.network = weights.network.to(self.device)

    def rows(self, frames: int) -> int:
        """Return how many feature rows a clip of ``frames`` frames gives."""
        if self.unit == "frame":
            return frames
        return 1

    def describe(self) -> dict[str, Any]:
        """Return the manifest's detector and pixel groups."""
        return {
            "detector": self.name,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "loader": "own network",
            "layer": self.layer,
            "dimension": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "pixels": self.pixels.describe(),
            "group": self.group,
        }

    def check(self, frames: Tensor) -> None:
        """InputError unless ``frames`` is uint8 (b t h w 3) with a number of frames that the network can
        read.
        """
        shape = tuple(frames.shape)
        ok = frames.dtype == torch.uint8 and frames.ndim == 5 and shape[-1] == 3 and 0 not in shape
        check(
            ok,
            f"a detector reads uint8 (b t h w 3), got {frames.dtype} {shape}; convert with "
            "data.clips.to_uint8",
        )
        self.check_length(shape[1])

    def check_length(self, frames: int) -> None:
        """InputError unless the network can read clips of ``frames`` frames."""
        low = self.spec.min_frames
        high = self.spec.max_frames
        needed = f"exactly {low}" if low == high else f"at least {low}"
        fits = frames >= low and (high is None or frames <= high)
        check(
            fits,
            f"detector {self.name!r} reads {needed} frames per clip, got {frames}; use longer clips or "
            "another protocol",
        )

    @torch.inference_mode()
    def __call__(self, frames: Tensor | np.ndarray) -> Tensor:
        """Return features float32 (rows, k), on the CPU, of uint8 (b t h w 3); InputError for other input."""
        frames = torch.as_tensor(frames)
        self.check(frames)
        if self.unit == "frame":
            frames = frames.flatten(0, 1).unsqueeze(1)  # (n 1 h w c)
        features = []
        network = self.network
        if self.dtype != torch.float32:
            network = self.reduced = self.reduced or copy.deepcopy(network).to(self.dtype)
        with full_precision():
            for part in frames.split(self.group):
                padding = part[-1:].expand(self.group - len(part), *part.shape[1:])
                x = self.pixels.prepare(torch.cat([part, padding]).to(self.device))
                if self.unit == "frame":
                    x = x.squeeze(2)  # (b c h w)
                x = x.to(self.dtype)
                y = network(x) if len(self.spec.layers) == 1 else network(x, self.layer)
                features.append(y[: len(part)].float().cpu())
        return torch.cat(features)


def relative_rms(detector: Detector, frames: np.ndarray) -> float:
    """Return the RMS error of the features of frames (b t h w c) in ``detector.dtype``, against those in
    float32, over the RMS of these about their mean.
    """
    found = detector(frames)
    chosen = detector.dtype
    detector.dtype = torch.float32
    try:
        exact = detector(frames)
    finally:
        detector.dtype = chosen
    spread = exact - exact.mean(0) if len(exact) > 1 else exact
    return float((found - exact).square().mean().sqrt() / spread.square().mean().sqrt().clamp_min(1e-12))


def opened_in(dtype: str, open_detector: Callable[[], Detector]) -> Detector:
    """Return the detector with its network in ``dtype``, a key of DTYPES."""
    detector = open_detector()
    detector.dtype = DTYPES[dtype]
    return detector


def build_detector(
    name: str,
    device: torch.device | str = "cpu",
    path: Path | None = None,
    sha256: str | None = None,
    pixels: Pixels | None = None,
    layer: str | None = None,
    group: int = 1,
) -> Detector:
    """Return the detector ``name`` on ``device`` with its weights (from ``path``, the cache or a download).

    ``sha256`` vouches for a file that is not in the table of published files; ``pixels`` and ``layer``
    override the detector's own. InputError for unknown names, files and hashes, and for missing weights while
    offline.
    """
    spec = choose("detector", name, DETECTORS)
    layer = layer or next(iter(spec.layers))
    choose("layer", layer, spec.layers)
    if group < 1:
        raise InputError(
            f"group must be at least 1, got {group}: it is how many rows go through the network at once"
        )
    return Detector(name, spec, spec.open(path, sha256), pixels or spec.pixels, layer, group, device)
