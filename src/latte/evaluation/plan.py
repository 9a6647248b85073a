# SPDX-License-Identifier: Apache-2.0
"""Which clips exactly, decided before any pixel is read: a pure function of the lists of videos, the protocol and one seed.

A video's turn and its clip's start are hash(seed, video id). No order of listing, worker, process or batch enters, so the same folders
give the same bytes of ``clips.jsonl`` everywhere. What cannot be measured honestly is refused here, in one line.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from latte.checks import InputError
from latte.evaluation.protocols import Protocol, nonstandard

SIDES = ("real", "fake")
Dropped = tuple[dict[str, str], ...]  # {"side", "id", "reason"}


@dataclass(frozen=True)
class Source:
    """A video as it was found: ``id`` is its path below the folder, ``frames`` those that decode, ``sha256`` the hash of its content."""

    id: str
    frames: int
    sha256: str
    fps: float = 0.0
    codec: str = "unknown"


@dataclass(frozen=True)
class PlannedClip:
    """One row of the bank: frames start, start + stride, ... of a video, which must still have this content."""

    side: str
    id: str
    sha256: str
    start: int
    stride: int
    frames: int

    @property
    def indices(self) -> list[int]:
        """The frame numbers."""
        return [self.start + i * self.stride for i in range(self.frames)]

    @property
    def line(self) -> str:
        """Its line of clips.jsonl."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")) + "\n"


@dataclass(frozen=True)
class Plan:
    """The clips of both sides in the order of their rows, and the videos that were left out with reasons."""

    protocol: Protocol
    seed: int
    clips: tuple[PlannedClip, ...]
    dropped: Dropped

    def side(self, side: str) -> tuple[PlannedClip, ...]:
        """The clips of 'real' or 'fake'."""
        return tuple(clip for clip in self.clips if clip.side == side)

    @property
    def text(self) -> str:
        """The content of clips.jsonl."""
        return "".join(clip.line for clip in self.clips)

    @property
    def sha256(self) -> str:
        """Hash of ``text``."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def hashed(seed: int, *key: object) -> int:
    """A number below 2^256 that is a function of the seed and ``key``: hash(seed, video id)."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *key]).encode()).digest(), "big")


def make_plan(
    protocol: Protocol,
    sources: Mapping[str, Sequence[Source]],
    seed: int = 0,
    broken: Dropped = (),
    allow_fewer: bool = False,
    allow_mixed: bool = False,
) -> Plan:
    """The plan for ``sources`` {"real": videos, "fake": videos}; ``broken`` are those that could not be read, with reasons.

    Real videos that are broken or too short are left out and listed. InputError for fakes that are, for equal ids or contents within a
    side or on both, for sides of other frame rates or codecs (unless ``allow_mixed``), and for fewer clips than the protocol asks (unless
    ``allow_fewer``: then both sides take as many as the shorter one has, and the protocol becomes non-standard).
    """
    for side in SIDES:
        refuse_duplicates(side, sources[side])
    refuse_overlap(sources)
    refuse_bad_fakes(protocol, sources["fake"], [bad for bad in broken if bad["side"] == "fake"])
    if not allow_mixed:
        refuse_mixed(sources)
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
    most = min(len(found) for found in fit.values())
    if most < protocol.clips:
        refuse_few(protocol, fit, len(short) + len(broken), allow_fewer and most >= 2)
        protocol = nonstandard(protocol, clips=most)
    clips = tuple(
        choose_clip(protocol, side, source, seed)
        for side in SIDES
        for source in chosen(protocol, fit[side], seed)
    )
    return Plan(
        protocol, seed, clips, tuple(sorted(broken, key=lambda bad: (bad["side"], bad["id"]))) + short
    )


def chosen(protocol: Protocol, fit: Sequence[Source], seed: int) -> list[Source]:
    """The first ``protocol.clips`` videos, by path or by hash(seed, id)."""
    by_path = sorted(fit, key=lambda source: source.id)
    return (
        by_path if protocol.order == "path" else sorted(by_path, key=lambda source: hashed(seed, source.id))
    )[: protocol.clips]


def choose_clip(protocol: Protocol, side: str, source: Source, seed: int) -> PlannedClip:
    """The clip of ``source``: its start is the first frame, or uniform over all that fit."""
    rule = protocol.start_real if side == "real" else protocol.start_fake
    start = hashed(seed, "start", source.id) % protocol.starts(side, source.frames) if rule == "random" else 0
    return PlannedClip(side, source.id, source.sha256, start, protocol.stride(side), protocol.frames)


def refuse_duplicates(side: str, sources: Sequence[Source]) -> None:
    """InputError when two videos of a side have one id or one content."""
    for what in ("id", "sha256"):
        seen: dict[str, str] = {}
        for source in sorted(sources, key=lambda s: s.id):
            value = getattr(source, what)
            if value in seen:
                same = (
                    f"the id {value!r} occurs twice"
                    if what == "id"
                    else f"{seen[value]!r} and {source.id!r} have the same content"
                )
                raise InputError(
                    f"{side} holds duplicates: {same}; a clip counted twice shrinks the score, remove one"
                )
            seen[value] = source.id


def refuse_overlap(sources: Mapping[str, Sequence[Source]]) -> None:
    """InputError when a fake is one of the real videos."""
    real = {source.sha256: source.id for source in sources["real"]}
    shared = [source for source in sorted(sources["fake"], key=lambda s: s.id) if source.sha256 in real]
    if shared:
        first = f"{shared[0].id!r} of fake is {real[shared[0].sha256]!r} of real"
        raise InputError(
            f"real and fake overlap in {len(shared)} videos: {first}; give two sets without a common file"
        )


def refuse_bad_fakes(protocol: Protocol, fake: Sequence[Source], broken: Sequence[dict[str, str]]) -> None:
    """InputError when a fake cannot be read or is too short: leaving it out would flatter or harm the model without a word."""
    if broken:
        first = f"{broken[0]['id']!r} ({broken[0]['reason']})"
        raise InputError(
            f"fake holds {len(broken)} videos that cannot be read, first {first}; generate them again or remove them"
        )
    short = sorted(
        (source for source in fake if not protocol.starts("fake", source.frames)), key=lambda s: s.id
    )
    if short:
        first = f"{short[0].id!r} has {short[0].frames} frames, {protocol.needed('fake')} are needed"
        rule = f"{protocol.frames} frames, stride {protocol.stride_fake}"
        raise InputError(
            f"fake holds {len(short)} videos too short for {protocol.name}: {first} ({rule}); generate longer clips"
        )


def traits(sources: Sequence[Source]) -> dict[str, dict[str, int]]:
    """How many videos have which codec and which frame rate: what is reported per side."""
    codecs, rates = Counter(s.codec for s in sources), Counter(f"{s.fps:.4g}" for s in sources)
    return {"codec": dict(sorted(codecs.items())), "fps": dict(sorted(rates.items()))}


def refuse_mixed(sources: Mapping[str, Sequence[Source]]) -> None:
    """InputError unless both sides have the same codecs and frame rates: compression and speed would be measured along with the model."""
    found = {side: traits(sources[side]) for side in SIDES}
    for what, name in (("codec", "codecs"), ("fps", "frame rates")):
        if all(found[side][what] for side in SIDES) and set(found["real"][what]) != set(found["fake"][what]):
            told = " and ".join(f"{side} {', '.join(found[side][what])}" for side in SIDES)
            raise InputError(
                f"{name} differ: {told}; write both sides alike, or give --allow-mixed to measure the difference too"
            )


def refuse_few(protocol: Protocol, fit: Mapping[str, Sequence[Source]], left_out: int, allowed: bool) -> None:
    """InputError unless fewer clips than the protocol asks were allowed."""
    if not allowed:
        counts = f"real has {len(fit['real'])} and fake {len(fit['fake'])} that fit ({left_out} left out)"
        way = "give more videos, or --allow-fewer for a figure that compares with no other"
        raise InputError(f"{protocol.name} takes {protocol.clips} clips of each side, but {counts}; {way}")
