# SPDX-License-Identifier: Apache-2.0
"""The named protocols: every choice that affects a score, frozen, with a version number that changes with it.

Two scores may be compared when their protocols are equal. A protocol with any change, the number of clips
included, gets another name (``nonstandard``). Where a published tool leaves a choice to chance (unseeded
starts, ranks that take the same video twice), the protocol keeps the distribution of that choice and takes
the randomness from the plan's seed. A new protocol is one entry of ``ALL``.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from latte.checks import InputError, check, choose
from latte.evaluation.detectors import DETECTORS, Pixels
from latte.evaluation.metrics import METRICS

STARTS = ("random", "first")
ORDERS = ("hash", "path")
SHORTEST = ("span", "frames x stride")
FRAME_ORDERS = ("crop, resize", "resize, crop")


@dataclass(frozen=True)
class FrameRule:
    """How frames are prepared before the detector; the filter is Pillow's Lanczos."""

    size: int | None = None  # height and width; None: frames stay as they were decoded
    # "crop, resize": crop the largest centred square, then resize it (Latte's tools);
    # "resize, crop": resize the shorter side, then crop the centre (StyleGAN-V's)
    order: str = "crop, resize"
    jpeg: int | None = None  # quality of a JPEG copy (4:2:0), None for no copy

    def __post_init__(self) -> None:
        choose("frame.order", self.order, dict.fromkeys(FRAME_ORDERS))


@dataclass(frozen=True)
class Protocol:
    """Everything that defines a score besides the data. One clip is taken from each video."""

    name: str
    detector: str  # a name of DETECTORS
    layer: str  # one of the detector's layers
    pixels: Pixels
    note: str  # its origin
    version: int = 1
    metrics: tuple[str, ...] = ("fvd", "kvd")  # names of METRICS; the first one is the headline
    frames: int = 16  # per clip
    stride_real: int = 1
    stride_fake: int = 1
    start_real: str = "random"  # first frame of a clip: "random" or "first"
    start_fake: str = "first"
    clips: int = 2048  # per side
    order: str = "hash"  # which videos: a random subset by hash(seed, id), or the first ones by "path"
    # a video must hold the clip's "span", (frames - 1) stride + 1, or StyleGAN-V's "frames x stride"
    shortest: str = "span"
    ddof: int = 1  # covariances divide by N - ddof
    frame: FrameRule = field(default_factory=FrameRule)
    splits: int = 10  # of the Inception Score
    shuffle: int | None = None  # NumPy seed that shuffles its rows; None: plan order

    def __post_init__(self) -> None:
        for side in ("real", "fake"):
            choose(f"start_{side}", getattr(self, f"start_{side}"), dict.fromkeys(STARTS))
        choose("order", self.order, dict.fromkeys(ORDERS))
        choose("shortest", self.shortest, dict.fromkeys(SHORTEST))
        for metric in self.metrics:
            choose("metrics", metric, METRICS)
        least = min(self.frames, self.stride_real, self.stride_fake)
        check(least >= 1, f"frames and strides must be at least 1, got {least}")
        check(self.clips >= 2, f"clips must be at least 2 for a covariance, got {self.clips}")

    def stride(self, side: str) -> int:
        """Return the stride of 'real' or 'fake'."""
        return self.stride_real if side == "real" else self.stride_fake

    def needed(self, side: str) -> int:
        """Return how many frames a video of ``side`` must have."""
        stride = self.stride(side)
        if self.shortest == "frames x stride":
            return self.frames * stride
        return (self.frames - 1) * stride + 1

    def starts(self, side: str, frames: int) -> int:
        """Return at how many frames a clip may start in a video of ``frames`` frames, 0 if the video is too
        short.
        """
        if frames < self.needed(side):
            return 0
        return frames - (self.frames - 1) * self.stride(side)

    @property
    def standard(self) -> bool:
        """Return False if anything was changed."""
        return not self.name.endswith(SUFFIX)

    def title(self, metric: str) -> str:
        """Return the name of a score for people."""
        return f"{score_name(metric, self.name)} ({self.name})"

    def describe(self) -> dict[str, Any]:
        """Return every choice as plain data."""
        return asdict(self)


SUFFIX = "-nonstandard"
ABBREVIATIONS = {"fvd": "FVD", "kvd": "KVD", "fid": "FID", "kid": "KID", "is": "Inception Score"}
PUBLISHED = {  # protocols of published scores
    "styleganv-fvd2048-16f",
    "styleganv-fvd2048-128f",
    "styleganv-isv2048-ucf",
    "latte-paper",
    "latte-paper-taichi",
    "tats",
    "videogpt",
    "cdfvd-i3d",
}


def score_name(metric: str, protocol: str) -> str:
    """Return what a score is called: FVD and the like only where others publish the score of ``protocol``."""
    name = METRICS[metric].summary
    if protocol in PUBLISHED:
        name = ABBREVIATIONS.get(metric, name)
    return name[0].upper() + name[1:]


def nonstandard(protocol: Protocol, **changes: Any) -> Protocol:
    """Return ``protocol`` with ``changes``, renamed to NAME-nonstandard; itself if they change nothing."""
    changed = replace(protocol, **changes)
    if changed == protocol:
        return protocol
    return replace(changed, name=protocol.name.removesuffix(SUFFIX) + SUFFIX)


def find_protocol(name: str) -> Protocol:
    """Return the protocol ``name``; InputError with the nearest name, or if its detector is unknown."""
    protocol = choose("--protocol", name, PROTOCOLS)
    if protocol.detector not in DETECTORS:
        raise InputError(
            f"--protocol {name} needs the detector {protocol.detector!r}, which is not in DETECTORS; use "
            "another"
        )
    return protocol


DIRECT = Pixels()
STYLEGANV = Protocol(
    "styleganv-fvd2048-16f",
    "i3d",
    "logits",
    DIRECT,
    "StyleGAN-V, fvd2048_16f: one stride for both sides, the first 2048 videos by path, covariance over N. "
    "Frames through JPEG 75, which is what its conversion script writes. Real starts are random there too, "
    "but depend on the number of loader workers.",
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
    "Latte's copy of StyleGAN-V's tool: real stride 3, fake stride 1, a random subset of videos, "
    "covariance over N. One process: with several, the original evaluates duplicates. No JPEG copy; "
    "latte-paper-jpeg75 has one.",
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
    "Recommended: equal strides, random starts on both sides, frames as decoded, half-pixel bilinear to "
    "224, covariance over N - 1.",
    start_fake="random",
)
PORT = "with VideoGPT's conversion of the TF-Hub weights and its norm eps of 1e-5 (the TF graph has 1e-3)"
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
        note="latte-paper with real stride 6, as used for its Taichi result.",
    ),
    replace(
        LATTE,
        name="latte-paper-jpeg75",
        frame=FrameRule(256, jpeg=75),
        note="latte-paper with frames through JPEG 75 (4:2:0).",
    ),
    Protocol(
        "tats",
        "i3d400",
        "logits",
        DIRECT,
        f"TATS: 2048 clips, frames stretched to 224 x 224, covariance over N - 1, {PORT}.",
        start_fake="random",
    ),
    Protocol(
        "videogpt",
        "i3d400",
        "logits",
        Pixels(crop="centre"),
        f"VideoGPT: 256 clips, shorter side to 224 and centre crop, N - 1, {PORT}.",
        clips=256,
        start_fake="random",
    ),
    Protocol(
        "cdfvd-i3d",
        "i3d400",
        "logits",
        DIRECT,
        f"cd-fvd's I3D: random starts, stretched to 224 x 224, covariance over N, {PORT}. "
        "Unlike there, fakes are never repeated to reach the count.",
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
        note="FID over the frames of the clean plan, blind to motion. Inception-v3 pool3.",
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
    Protocol(
        "random-i3d",
        "random-i3d",
        "logits",
        DETECTORS["random-i3d"].pixels,
        "Random filters, no download: for tests and quick checks. Not comparable with any other.",
        clips=256,
        start_fake="random",
    ),
    Protocol(
        "builtin",
        "builtin",
        "features",
        DETECTORS["builtin"].pixels,
        "A small video network trained on procedural clips, clean and corrupted, no download. Not "
        "comparable with any other.",
        version=2,
        clips=256,
        start_fake="random",
    ),
)
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in ALL}
