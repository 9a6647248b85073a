# SPDX-License-Identifier: Apache-2.0
"""Which clips exactly, decided before any frame is read: a pure function of the lists of videos, the protocol
and one seed.

A video's rank and its clip's start are hash(seed, video id). They do not depend on listing order, workers,
processes or batches, so the same folders give the same bytes of ``clips.jsonl`` everywhere. What would make
the score meaningless is refused here, in one line.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from latte.checks import InputError
from latte.evaluation.protocols import PROTOCOLS, FrameRule, Protocol, nonstandard

SIDES = ("real", "fake")
Dropped = tuple[dict[str, str], ...]  # {"side", "id", "reason"}


@dataclass(frozen=True)
class Source:
    """A video as it was found."""

    id: str  # its path below the folder
    frames: int  # how many decode
    sha256: str  # of its content
    fps: float = 0.0  # 0: unknown
    codec: str = "unknown"
    height: int = 0  # 0: unknown
    width: int = 0
    note: str | None = None  # why only its first frames are used, as the probe found it
    interval: int | None = (
        None  # video frames per frame of a model's training data, None: not generated or unknown
    )


@dataclass(frozen=True)
class PlannedClip:
    """One clip: frames start, start + stride, ... of a video, which must still have this content."""

    side: str
    id: str
    sha256: str
    start: int
    stride: int
    frames: int

    @property
    def indices(self) -> list[int]:
        """Return the frame numbers."""
        return [self.start + i * self.stride for i in range(self.frames)]

    @property
    def line(self) -> str:
        """Return its line of clips.jsonl."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class Plan:
    """The clips of both sides in the order of their rows, and the videos that were left out with reasons."""

    protocol: Protocol
    seed: int
    clips: tuple[PlannedClip, ...]
    dropped: Dropped

    def side(self, side: str) -> tuple[PlannedClip, ...]:
        """Return the clips of 'real' or 'fake'."""
        return tuple(clip for clip in self.clips if clip.side == side)

    @property
    def text(self) -> str:
        """Return the content of clips.jsonl."""
        return "".join(clip.line for clip in self.clips)

    @property
    def sha256(self) -> str:
        """Return the hash of ``text``."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def hashed(seed: int, *key: object) -> int:
    """Return hash(seed, key), a number below 2^256."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *key]).encode()).digest(), "big")


def make_plan(
    protocol: Protocol,
    sources: Mapping[str, Sequence[Source]],
    seed: int = 0,
    broken: Dropped = (),
    allow_fewer: bool = False,
    allow_mixed: bool = False,
) -> Plan:
    """Return the plan for ``sources`` {"real": videos, "fake": videos}; ``broken`` lists unreadable ones with
    reasons.

    Real videos that are broken or too short are left out and listed. InputError for fakes that are, for equal
    ids or contents within a side or across both, for a confounder that differs between the sides
    (CONFOUNDERS; unless ``allow_mixed``), and for fewer clips than the protocol takes (unless
    ``allow_fewer``: then both sides take as many as the shorter one has, and the protocol is non-standard).
    """
    for side in SIDES:
        refuse_duplicates(side, sources[side])
    refuse_overlap(sources)
    refuse_bad_fakes(protocol, sources["fake"], [bad for bad in broken if bad["side"] == "fake"])
    if not allow_mixed:
        refuse_mixed(protocol, sources)
    fit = {side: [s for s in sources[side] if protocol.starts(side, s.frames)] for side in SIDES}
    short = tuple(
        {
            "side": "real",
            "id": s.id,
            "reason": f"too-short: {s.frames} frames decode, {protocol.needed('real')} are needed",
        }
        for s in sorted(sources["real"], key=lambda s: s.id)
        if not protocol.starts("real", s.frames)
    )
    available = min(len(found) for found in fit.values())
    if available < protocol.clips:
        refuse_few(protocol, fit, len(short) + len(broken), allow_fewer)
        protocol = nonstandard(protocol, clips=available)
    clips = tuple(
        choose_clip(protocol, side, source, seed)
        for side in SIDES
        for source in choose_videos(protocol, fit[side], seed)
    )
    dropped = tuple(sorted(broken, key=lambda bad: (bad["side"], bad["id"]))) + short
    return Plan(protocol, seed, clips, dropped)


def choose_videos(protocol: Protocol, fit: Sequence[Source], seed: int) -> list[Source]:
    """Return the first ``protocol.clips`` videos, by path or by hash(seed, id)."""
    ordered = sorted(fit, key=lambda source: source.id)
    if protocol.order == "hash":
        ordered.sort(key=lambda source: hashed(seed, source.id))
    return ordered[: protocol.clips]


def choose_clip(protocol: Protocol, side: str, source: Source, seed: int) -> PlannedClip:
    """Return the clip of ``source``: it starts at the first frame, or uniformly at any that fits."""
    rule = protocol.start_real if side == "real" else protocol.start_fake
    start = 0
    if rule == "random":
        start = hashed(seed, "start", source.id) % protocol.starts(side, source.frames)
    return PlannedClip(side, source.id, source.sha256, start, protocol.stride(side), protocol.frames)


def refuse_duplicates(side: str, sources: Sequence[Source]) -> None:
    """InputError if two videos of a side have the same id or content."""
    ids: set[str] = set()
    contents: dict[str, str] = {}
    advice = "duplicates lower the score, remove one"
    for source in sorted(sources, key=lambda s: s.id):
        if source.id in ids:
            raise InputError(f"{side} holds duplicates: the id {source.id!r} occurs twice; {advice}")
        if source.sha256 in contents:
            first = contents[source.sha256]
            raise InputError(
                f"{side} holds duplicates: {first!r} and {source.id!r} have the same content; {advice}"
            )
        ids.add(source.id)
        contents[source.sha256] = source.id


def refuse_overlap(sources: Mapping[str, Sequence[Source]]) -> None:
    """InputError if a fake is one of the real videos."""
    real = {source.sha256: source.id for source in sources["real"]}
    shared = [source for source in sorted(sources["fake"], key=lambda s: s.id) if source.sha256 in real]
    if shared:
        first = f"{shared[0].id!r} of fake is {real[shared[0].sha256]!r} of real"
        raise InputError(
            f"real and fake overlap in {len(shared)} videos: {first}; give two sets without a common file"
        )


def refuse_bad_fakes(protocol: Protocol, fake: Sequence[Source], broken: Sequence[dict[str, str]]) -> None:
    """InputError if a fake cannot be read or is too short: leaving it out would silently bias the score."""
    if broken:
        first = f"{broken[0]['id']!r} ({broken[0]['reason']})"
        raise InputError(
            f"fake holds {len(broken)} videos that cannot be read, first {first}; generate them again or "
            "remove them"
        )
    short = [source for source in fake if not protocol.starts("fake", source.frames)]
    if not short:
        return
    first = min(short, key=lambda s: s.id)
    rule = f"{protocol.frames} frames, stride {protocol.stride_fake}"
    others = [name for name, other in PROTOCOLS.items() if other.needed("fake") <= first.frames]
    advice = f"; protocols for {first.frames} frames: {', '.join(others)}" if others else ""
    raise InputError(
        f"fake holds {len(short)} videos too short for {protocol.name}: {first.id!r} has {first.frames} "
        f"frames, {protocol.needed('fake')} are needed ({rule}); generate longer clips{advice}"
    )


def traits(sources: Sequence[Source]) -> dict[str, dict[str, int]]:
    """Return how many videos have which codec and which frame rate."""
    codecs = Counter(s.codec for s in sources)
    rates = Counter(f"{s.fps:.4g}" for s in sources)
    return {"codec": dict(sorted(codecs.items())), "fps": dict(sorted(rates.items()))}


def frame_size(source: Source, rule: FrameRule) -> str | None:
    """Return the size of the frames that a detector gets, 'WIDTHxHEIGHT'; None if it is unknown.

    A ``rule`` with a size brings larger frames of any shape to that size; smaller ones would be upscaled, and
    keep theirs here.
    """
    if not (source.height and source.width):
        return None
    if rule.size is not None and min(source.height, source.width) >= rule.size:
        return f"{rule.size}x{rule.size}"
    return f"{source.width}x{source.height}"


def frame_sizes(sources: Sequence[Source], rule: FrameRule) -> dict[str, int]:
    """Return how many videos have which frame size; those of unknown size are not counted."""
    counts = Counter(size for s in sources if (size := frame_size(s, rule)))
    return dict(sorted(counts.items()))


CONFOUNDERS: dict[str, Callable[[Source, Protocol], object]] = {  # what must agree; None is unknown
    "codecs": lambda source, protocol: source.codec,
    "frame rates": lambda source, protocol: f"{source.fps:.4g}",
    "frame sizes": lambda source, protocol: frame_size(source, protocol.frame),
}


def refuse_mixed(protocol: Protocol, sources: Mapping[str, Sequence[Source]]) -> None:
    """InputError unless both sides have the same codecs, frame rates, sizes and intervals, which would affect
    the score too.
    """
    for name, value in CONFOUNDERS.items():
        found = {side: {value(source, protocol) for source in sources[side]} - {None} for side in SIDES}
        if all(found.values()) and found["real"] != found["fake"]:
            values = " and ".join(f"{side} {', '.join(sorted(map(str, found[side])))}" for side in SIDES)
            raise InputError(
                f"{name} differ: {values}; write both sides alike, or give --allow-mixed to measure the "
                "difference too"
            )
    refuse_other_interval(protocol, sources["fake"])


def refuse_other_interval(protocol: Protocol, fake: Sequence[Source]) -> None:
    """InputError if the fakes come from a model that was trained on every k-th frame and the real clips have
    another stride.
    """
    for interval in sorted({source.interval for source in fake if source.interval}):
        if interval * protocol.stride_fake == protocol.stride_real:
            continue
        fits = [p.name for p in PROTOCOLS.values() if interval * p.stride_fake == p.stride_real]
        advice = "prepare real clips of that speed"
        if fits:
            advice = f"use a protocol with that stride ({', '.join(fits)})"
        raise InputError(
            f"the model was trained on every {ordinal(interval)} frame, but {protocol.name} takes real clips "
            f"with stride {protocol.stride_real}, so their speed differs; {advice}, or give --allow-mixed"
        )


def ordinal(number: int) -> str:
    """Return '2nd', '3rd', '4th', '11th', '21st'."""
    if number % 100 in (11, 12, 13):
        return f"{number}th"
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{endings.get(number % 10, 'th')}"


def refuse_few(
    protocol: Protocol, fit: Mapping[str, Sequence[Source]], left_out: int, allow_fewer: bool
) -> None:
    """InputError unless fewer clips than the protocol takes are allowed and each side has at least two."""
    available = min(len(found) for found in fit.values())
    if allow_fewer and available >= 2:
        return
    counts = f"real has {len(fit['real'])} and fake {len(fit['fake'])} that fit ({left_out} left out)"
    advice = "add videos: a score needs at least 2 of each side"
    if available >= 2:
        advice = (
            f"add videos, or score {available} of each side by --allow-fewer (comparable with no other score)"
        )
    raise InputError(f"{protocol.name} takes {protocol.clips} clips of each side, but {counts}; {advice}")
