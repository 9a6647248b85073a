# SPDX-License-Identifier: Apache-2.0
"""The named ways to measure: every choice that moves a score, written down once, frozen, and numbered when it changes.

Two figures may be compared when their protocols are equal. A protocol that is changed in anything, the number of clips included, gets
another name (``nonstandard``). Where a published tool leaves a choice to chance (unseeded starts, ranks that draw the same video twice),
the protocol keeps the law of that choice and takes the chance from the plan's seed.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from latte.checks import InputError, choose, require
from latte.evaluation.detectors import DETECTORS, Pixels

STARTS = ("random", "first")
ORDERS = ("hash", "path")
SHORTEST = ("span", "frames x stride")
FIGURES = ("fvd", "kvd", "jedi", "fid", "kid", "frechet", "kernel", "is", "precision", "recall")


@dataclass(frozen=True)
class FrameRule:
    """What is done to frames before the detector sees them. ``size`` None leaves them as they are in the file.

    ``order`` "crop, resize" cuts the largest centred square and resizes it (Latte's tools), "resize, crop" resizes the shorter side and
    cuts the square out of that (StyleGAN-V's); the filter is Pillow's Lanczos. ``jpeg`` is the quality of a copy through JPEG (4:2:0),
    None for none.
    """

    size: int | None = None
    order: str = "crop, resize"
    jpeg: int | None = None

    def __post_init__(self) -> None:
        choose("frame.order", self.order, dict.fromkeys(("crop, resize", "resize, crop")))


@dataclass(frozen=True)
class Protocol:
    """``frames`` per clip, ``clips`` per side, one clip per video. ``order``: the first by path, or a random subset by hash(seed, id).

    ``shortest``: a video must hold the clip's span, (frames - 1) stride + 1, or (StyleGAN-V's rule) frames x stride. ``metrics``: the
    first one is the headline. ``splits`` and ``shuffle`` belong to the Inception Score. ``note`` says where it comes from.
    """

    name: str
    detector: str
    layer: str
    pixels: Pixels
    note: str
    version: int = 1
    metrics: tuple[str, ...] = ("fvd", "kvd")
    frames: int = 16
    stride_real: int = 1
    stride_fake: int = 1
    start_real: str = "random"
    start_fake: str = "first"
    clips: int = 2048
    order: str = "hash"
    shortest: str = "span"
    ddof: int = 1
    frame: FrameRule = field(default_factory=FrameRule)
    splits: int = 10
    shuffle: int | None = None

    def __post_init__(self) -> None:
        for side in ("real", "fake"):
            choose(f"start_{side}", getattr(self, f"start_{side}"), dict.fromkeys(STARTS))
        choose("order", self.order, dict.fromkeys(ORDERS))
        choose("shortest", self.shortest, dict.fromkeys(SHORTEST))
        for metric in self.metrics:
            choose("metrics", metric, dict.fromkeys(FIGURES))
        least = min(self.frames, self.stride_real, self.stride_fake)
        require(least >= 1, "frames and strides", least, "they count frames", "give 1 or more")
        require(self.clips >= 2, "clips", self.clips, "a covariance needs two", "give 2 or more")

    def stride(self, side: str) -> int:
        """The stride of 'real' or 'fake'."""
        return self.stride_real if side == "real" else self.stride_fake

    def needed(self, side: str) -> int:
        """Number of frames that a video of ``side`` must have."""
        stride = self.stride(side)
        return self.frames * stride if self.shortest == "frames x stride" else (self.frames - 1) * stride + 1

    def starts(self, side: str, frames: int) -> int:
        """In how many places a clip may start in a video of ``frames`` frames, 0 when the protocol does not admit it."""
        return 0 if frames < self.needed(side) else frames - (self.frames - 1) * self.stride(side)

    @property
    def standard(self) -> bool:
        """False once anything was changed."""
        return not self.name.endswith(SUFFIX)

    def describe(self) -> dict[str, Any]:
        """Every choice as plain data."""
        return asdict(self)


SUFFIX = "-nonstandard"


def nonstandard(protocol: Protocol, **changes: Any) -> Protocol:
    """``protocol`` with ``changes``, under a name that says so; itself when they change nothing."""
    changed = replace(protocol, **changes)
    return (
        protocol
        if changed == protocol
        else replace(changed, name=protocol.name.removesuffix(SUFFIX) + SUFFIX)
    )


def find_protocol(name: str) -> Protocol:
    """The protocol ``name``; InputError with the nearest name, or when this installation lacks its detector."""
    protocol = choose("--protocol", name, PROTOCOLS)
    if protocol.detector not in DETECTORS:
        raise InputError(
            f"--protocol {name} needs the detector {protocol.detector!r}, which this version does not have; take another"
        )
    return protocol


def _own(detector: str, note: str, version: int) -> Protocol:
    """The clean protocol at 256 clips with a detector that needs no download."""
    spec = DETECTORS[detector]
    return Protocol(
        detector,
        detector,
        next(iter(spec.layers)),
        spec.pixels,
        f"{note} Compares with nothing else.",
        version,
        clips=256,
        start_fake="random",
    )


DIRECT, CUT = Pixels(), Pixels(crop="centre")
STYLEGANV = Protocol(
    "styleganv-fvd2048-16f",
    "i3d",
    "logits",
    DIRECT,
    "StyleGAN-V, fvd2048_16f: one stride for both sides, the first 2048 videos by path, covariance over N. Frames through JPEG 75, which "
    "is what its conversion script writes. Real starts are random there too, but differ with the number of loader workers.",
    order="path",
    shortest="frames x stride",
    ddof=0,
    frame=FrameRule(256, "resize, crop", jpeg=75),
)
LATTE = Protocol(
    "latte-paper",
    "i3d",
    "logits",
    DIRECT,
    "Latte's copy of StyleGAN-V's tool: real stride 3, fake stride 1, a random subset of videos, covariance over N. One process: with "
    "several the original evaluates duplicates. Frames are not copied through JPEG; latte-paper-jpeg75 does that.",
    stride_real=3,
    shortest="frames x stride",
    ddof=0,
    frame=FrameRule(256, "crop, resize"),
)
CLEAN = Protocol(
    "clean",
    "i3d",
    "logits",
    DIRECT,
    "Recommended: equal strides, random starts on both sides, frames as decoded, half-pixel bilinear to 224, covariance over N - 1.",
    start_fake="random",
)
PORT = "with the weights that VideoGPT converted from TF-Hub and its port's norm eps of 1e-5 (the TF graph has 1e-3)"
INCEPTION = DETECTORS["inception"].pixels
ALL = (
    STYLEGANV,
    replace(
        STYLEGANV,
        name="styleganv-fvd2048-128f",
        frames=128,
        note="StyleGAN-V, fvd2048_128f: as styleganv-fvd2048-16f, longer clips.",
    ),
    LATTE,
    replace(
        LATTE,
        name="latte-paper-taichi",
        stride_real=6,
        note="latte-paper with real stride 6, as its Taichi figure was made.",
    ),
    replace(
        LATTE,
        name="latte-paper-jpeg75",
        frame=FrameRule(256, jpeg=75),
        note="latte-paper, frames copied through JPEG 75 (4:2:0).",
    ),
    Protocol(
        "tats",
        "i3d400",
        "logits",
        DIRECT,
        f"TATS: 2048 clips, frames squeezed to 224 x 224, covariance over N - 1, {PORT}.",
        start_fake="random",
    ),
    Protocol(
        "videogpt",
        "i3d400",
        "logits",
        CUT,
        f"VideoGPT: 256 clips, shorter side to 224 and centre crop, N - 1, {PORT}.",
        clips=256,
        start_fake="random",
    ),
    Protocol(
        "cdfvd-i3d",
        "i3d400",
        "logits",
        DIRECT,
        f"cd-fvd's I3D: random starts, squeezed to 224 x 224, covariance over N, {PORT}. "
        "Fakes are never repeated to fill up the count, as they are there.",
        start_fake="random",
        ddof=0,
    ),
    CLEAN,
    replace(CLEAN, name="clean-128f", frames=128, note="clean, with clips of 128 frames."),
    replace(
        CLEAN,
        name="clean-fid",
        detector="inception",
        layer="pool3",
        pixels=INCEPTION,
        metrics=("fid", "kid", "precision", "recall"),
        note="FID over the frames of the clean plan; sees no motion. Inception-v3 pool3.",
    ),
    replace(
        CLEAN,
        name="clean-is",
        detector="inception",
        layer="logits",
        pixels=INCEPTION,
        metrics=("is",),
        note="Inception Score of the frames of the clean plan, 10 splits in plan order.",
    ),
    Protocol(
        "styleganv-isv2048-ucf",
        "c3d",
        "logits",
        DETECTORS["c3d"].pixels,
        "StyleGAN-V's video Inception Score on UCF-101: C3D, 10 "
        "splits, shuffled with seed 42. Not the 1 split of TGAN2.",
        metrics=("is",),
        order="path",
        shuffle=42,
    ),
    *(
        _own(name, note, version)
        for name, note, version in (
            ("random-i3d", "Random filters, no download: for tests and quick looks.", 1),
            (
                "builtin",
                "A small video network trained on procedural clips, whole and damaged, no download.",
                2,
            ),
        )
        if name in DETECTORS
    ),
)
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in ALL}
