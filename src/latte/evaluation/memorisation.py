# SPDX-License-Identifier: Apache-2.0
"""Are generated clips copies of training clips? Distances to the nearest training clip and to the nearest
held-out clip, in the detector's features.

A model that memorised its clips is nearer to them than to held-out ones. The ratio of the two distances, as a
geometric mean over generated clips, also depends on the sizes of both sets. So it is divided by the ratio
that real clips have: held-out clips are fresh to the training set, and training clips to the held-out set.
A fresh set gives 1 whatever the sizes. (Leaving each training clip out in turn instead gave false alarms
twice as often, because a small set differs from the set without one clip.)
Axes: m generated, n training, p held-out clips, k features.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte.checks import check, printable
from latte.evaluation.detectors import Detector
from latte.evaluation.features import bits_of, extract_rows, keep_rows, read_clips, read_rows
from latte.evaluation.plan import Plan, PlannedClip, choose_clip, choose_videos
from latte.evaluation.protocols import FrameRule, Protocol
from latte.evaluation.scores import LEVEL
from latte.evaluation.sources import Side, digest
from latte.runtime import generator

RESAMPLES = 2000
FEWEST = 2  # clips of each set
SMALLEST = 1e-6  # of the median distance of a held-out clip: what an equal clip counts as


@dataclass(frozen=True)
class HeldOut:
    """Clips that were not trained on, and their features (p k), a row per clip."""

    side: Side
    clips: tuple[PlannedClip, ...]
    rows: Tensor


@dataclass(frozen=True)
class Unseen:
    """The clips that were chosen of a held-out side."""

    side: Side
    clips: tuple[PlannedClip, ...]

    def read(self, detector: Detector, rule: FrameRule, kept: Path | None) -> HeldOut:
        """Return the clips with their features, which are kept in the folder ``kept``, if given."""
        facts = [detector.describe(), detector.device.type, asdict(rule), *bits_of(detector)]
        key = digest([facts, [clip.line for clip in self.clips]])
        path = kept and kept / f"held-out-{key[:16]}.safetensors"
        rows = read_rows(path, key) if path else None
        if rows is None:
            video = read_clips(self.clips, {"real": self.side}, rule)
            rows = extract_rows(self.clips, video, detector)
            if path:
                keep_rows(path, key, rows)
        return HeldOut(self.side, self.clips, clip_rows(rows, len(self.clips)))


@dataclass(frozen=True)
class Ratio:
    """A geometric mean of ratios of distances with its interval at LEVEL."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Memorisation:
    """``ratio`` of the generated clips, ``reference`` of the real ones, and ``relative``, their quotient.

    ``train`` and ``held_out`` are the nearest clips of each generated one, ``ratios`` its own ratio.
    """

    ratio: Ratio
    reference: Ratio
    relative: Ratio
    num_train: int
    num_held_out: int
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    ratios: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """Return what the interval of ``relative`` says."""
        if self.relative.high < 1:
            return (
                "Generated clips are nearer to training clips than fresh clips of the data would be: "
                "the model repeats some of what it was trained on."
            )
        if self.relative.low > 1:
            return (
                "Generated clips are farther from training clips than fresh clips of the data would be, "
                "compared with held-out clips."
            )
        return (
            "Generated clips are about as near to training clips as fresh clips of the data would be: no "
            "sign of memorisation."
        )

    def plain(self) -> dict[str, Any]:
        """Return the numbers as plain data, without those of each clip."""
        found = asdict(self)
        return {key: found[key] for key in tuple(found)[:5]} | {"verdict": self.verdict}


def memorisation(fake: Tensor, train: Tensor, held_out: Tensor) -> Memorisation:
    """Compare generated clips (m k) with training clips (n k) and held-out clips (p k), each set of at least
    FEWEST.
    """
    for name, rows in (("generated", fake), ("training", train), ("held-out", held_out)):
        check(
            len(rows) >= FEWEST,
            f"memorisation needs at least {FEWEST} {name} clips, got {len(rows)}; give more",
        )
    to_train, nearest_train = nearest(fake, train)
    to_held_out, nearest_held_out = nearest(fake, held_out)
    real_to_train, _ = nearest(held_out, train)
    real_to_held_out, _ = nearest(train, held_out)
    smallest = SMALLEST * float(real_to_train.median()) or SMALLEST
    logs = logarithms(to_train, smallest) - logarithms(to_held_out, smallest)  # (m)
    first = logarithms(real_to_train, smallest)  # (p)
    second = logarithms(real_to_held_out, smallest)  # (n)
    reference = float(first.mean() - second.mean())
    means = resampled(logs, "generated")
    reference_means = resampled(first, "held out") - resampled(second, "train")
    return Memorisation(
        ratio_of(float(logs.mean()), means),
        ratio_of(reference, reference_means),
        ratio_of(float(logs.mean()) - reference, means - reference_means),
        len(train),
        len(held_out),
        tuple(nearest_train.tolist()),
        tuple(nearest_held_out.tolist()),
        tuple(logs.exp().tolist()),
    )


def nearest(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return (distance, index) of the nearest of ``others`` (n k) for each of ``rows`` (m k), in float64."""
    found = torch.cdist(rows.double(), others.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1)
    return found.values, found.indices


def logarithms(distances: Tensor, smallest: float) -> Tensor:
    """Return the logarithms (m) of distances that count as at least ``smallest``."""
    return distances.clamp(min=smallest).log()


def resampled(logs: Tensor, name: str) -> Tensor:
    """Return the means of RESAMPLES samples of ``logs`` with replacement, (RESAMPLES)."""
    draw = generator("memorisation", name)
    indices = torch.randint(len(logs), (RESAMPLES, len(logs)), generator=draw)
    return logs[indices].mean(1)


def ratio_of(mean: float, means: Tensor) -> Ratio:
    """Return the geometric mean of log ratios with the percentiles of its resampled ``means``."""
    tail = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=means.dtype)
    low, high = means.quantile(tail).exp().tolist()
    return Ratio(math.exp(mean), low, high)


def clip_rows(features: Tensor, clips: int) -> Tensor:
    """Return features (rows k) as one row per clip, (clips k): of a detector of frames the mean."""
    return features.double().reshape(clips, -1, features.shape[1]).mean(1)


def choose_held_out(side: Side, real: Side, protocol: Protocol, seed: int) -> Unseen:
    """Return a clip of each held-out video that fits ``protocol``, at most as many as it takes.

    InputError for too few, and for a video that is also in ``real``, which holds the training clips.
    """
    fit = [source for source in side.sources if protocol.starts("real", source.frames)]
    check(
        len(fit) >= FEWEST,
        f"{printable(side.root)} has {len(fit)} held-out videos of at least {protocol.needed('real')} "
        f"frames; memorisation needs {FEWEST}",
    )
    trained = {source.sha256: source.id for source in real.sources}
    for source in fit:
        check(
            source.sha256 not in trained,
            f"held-out video {printable(source.id)} is also a training clip, "
            f"{printable(trained.get(source.sha256, ''))}; give clips that were not trained on",
        )
    videos = choose_videos(protocol, fit, seed)
    return Unseen(side, tuple(choose_clip(protocol, "real", source, seed) for source in videos))


def measure(plan: Plan, features: Mapping[str, Tensor], held_out: HeldOut) -> Memorisation:
    """Return the memorisation of the fake side of ``plan``, whose real side are training clips."""
    fake, train = (clip_rows(features[side], len(plan.side(side))) for side in ("fake", "real"))
    return memorisation(fake, train, held_out.rows)
