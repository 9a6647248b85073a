# SPDX-License-Identifier: Apache-2.0
"""A long video, decoded once, and its pieces as files: copied where that shows the same frames, else encoded.

A piece that begins at a key frame is copied packet by packet and decoded again to prove it. Audio is dropped.
Axes: t frames, h height, w width, c channels (RGB).
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from math import ceil, floor
from pathlib import Path
from typing import Any

import numpy as np

from latte.data.frame_folder import Unreadable
from latte.data.media import MediaInfo, probe
from latte.data.shots import SIDE, Shot
from latte.data.video_stream import (
    OPENING,
    choose_stream,
    decode_stream,
    display_matrix,
    pixel_aspect,
    to_rgb,
)
from latte.data.writers import complete_file, encode_mp4

COPIED = ("h264", "hevc", "av1", "vp9", "mpeg4")  # codecs that an mp4 holds; others are encoded
MAX_FRAMES = 5_000_000  # of one video: two days at 29 fps, 4 GB of thumbnails
ROUNDING = 1e-6  # seconds


@dataclass
class Footage:
    """A video that was decoded once: what ``probe`` found and a thumbnail of each frame, uint8 (t h w c)."""

    info: MediaInfo
    thumbnails: np.ndarray

    @classmethod
    def read(cls, path: str) -> "Footage":
        """Decode ``path`` once. Unreadable when no frame can be used."""
        shrink = Thumbnails()
        found: list[np.ndarray] = []
        info = probe(path, look=lambda frame: found.append(shrink(frame)), max_frames=MAX_FRAMES)
        return cls(info, np.stack(found))

    @cached_property
    def stamps(self) -> list[int]:
        """Presentation time of each frame in ticks, [] when the file's cannot be trusted."""
        return self.info.stamps

    @cached_property
    def times(self) -> list[float]:
        """Seconds of each frame from the first, and the end of the last. Unreadable when no rate is known."""
        times = self.info.times
        if not times or not self.info.fps:
            raise Unreadable(self.info.path, "no-times", "neither time stamps nor a frame rate are known")
        return [*times, times[-1] + 1 / self.info.fps]

    @cached_property
    def index_of(self) -> dict[int, int]:
        """Frame by its stamp."""
        return {stamp: index for index, stamp in enumerate(self.stamps)}

    def frames(self, start: int, end: int) -> Iterator[np.ndarray]:
        """Yield frames ``start`` to ``end`` - 1, uint8 (h w c), decoded from the key frame before.

        Unreadable when one does not decode any more.
        """
        from av.video.reformatter import VideoReformatter

        reformatter = VideoReformatter()
        key = 0
        if self.stamps:
            key = max((key for key in self.info.keys if key <= start), default=0)
        following = start
        with closing(decode_stream(self.info.path, self.stamps[key] if key else None)) as decoded:
            for count, (stream, frame) in enumerate(decoded):
                index = self.index_of.get(frame.pts, -1) if key else count
                if index < following:
                    continue
                if index > following or frame.is_corrupt:
                    break
                yield to_rgb(self.info.path, stream, frame, reformatter)
                following += 1
                if following == end:
                    return
        raise Unreadable(self.info.path, "damaged", f"frame {following} does not decode (any more)")


class Thumbnails:
    """Shrinks decoded frames to uint8 (SIDE SIDE 3)."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self.reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray:
        small = self.reformatter.reformat(
            frame, width=SIDE, height=SIDE, format="rgb24", interpolation="AREA", threads=1
        )
        return small.to_ndarray()


def pieces_of(shots: Sequence[Shot], footage: Footage, longest: float | None) -> Iterator[Shot]:
    """Yield ``shots``, those longer than ``longest`` seconds in parts whose rule is 'length'.

    Parts are about equal; one ends at a key frame where that changes its length by less than a quarter.
    """
    times = footage.times
    for shot in shots:
        start = shot.start
        rule = shot.rule
        while longest is not None and times[shot.end] - times[start] > longest + ROUNDING:
            most = max(1, floor(longest * footage.info.fps + ROUNDING))  # frames
            even = (times[shot.end] - times[start]) / ceil((shot.end - start) / most)
            inside = range(start + 1, shot.end)
            allowed = [t for t in inside if times[t] - times[start] <= longest + ROUNDING] or [start + 1]
            keys = [key for key in footage.info.keys if allowed[0] <= key <= allowed[-1]]
            near = [key for key in keys if abs(times[key] - times[start] - even) < even / 4]
            end = min(near or allowed, key=lambda t: abs(times[t] - times[start] - even))
            yield Shot(start, end, rule)
            start = end
            rule = "length"
        yield Shot(start, shot.end, rule)


class NotCopied(Exception):
    """Copied packets do not show the frames of the piece."""


def write_piece(footage: Footage, piece: Shot, path: Path) -> str:
    """Write ``piece`` to the mp4 ``path``; return 'copied' or 'encoded'.

    Unreadable when its frames do not decode any more, RunError when the file cannot be written.
    """
    info = footage.info
    if footage.stamps and info.codec in COPIED and piece.start in info.keys:
        with suppress(NotCopied), complete_file(path) as partial:
            copy_packets(footage, piece, partial)
            return "copied"
    ticks = [stamp - footage.stamps[piece.start] for stamp in footage.stamps[piece.start : piece.end]]
    base = Fraction(*info.time_base)
    steps = {after - before for before, after in pairwise(ticks)}
    fps = info.fps
    if len(steps) == 1:
        fps = float(1 / (steps.pop() * base))
        ticks = []
    encode_mp4(path, footage.frames(piece.start, piece.end), fps, ticks, base)
    return "encoded"


def copy_packets(footage: Footage, piece: Shot, path: str) -> None:
    """Copy the packets of ``piece``, which begins at a key frame, to the mp4 ``path``, and decode them.

    NotCopied unless exactly the frames of the piece come out, upright and undamaged.
    """
    import av
    from av.error import FFmpegError

    first = footage.stamps[piece.start]
    after = [*footage.stamps, None][piece.end]
    source = os.path.abspath(footage.info.path)
    try:
        with (
            av.open(source, options=OPENING, metadata_errors="replace") as container,
            av.open(path, "w", format="mp4", options={"movflags": "+faststart"}) as out,
        ):
            stream = choose_stream(source, container)
            copy = out.add_stream_from_template(stream)
            container.seek(first, stream=stream)
            for packet in packets_between(container.demux(stream), first, after):
                packet.pts -= first
                packet.dts -= first
                packet.stream = copy
                out.mux(packet)
        check_copy(path, footage, piece)
    except (FFmpegError, Unreadable, ValueError) as error:
        raise NotCopied from error


def packets_between(packets: Iterable[Any], first: int, after: int | None) -> Iterator[Any]:
    """Yield the packets in the order of decoding from the key frame at ``first`` on, whose time is before
    ``after``.
    """
    started = False
    for packet in packets:
        if packet.pts is None or packet.dts is None:
            continue
        started = started or (packet.is_keyframe and packet.pts == first)
        if after is not None and packet.dts >= after:
            return
        if started and packet.pts >= first and (after is None or packet.pts < after):
            yield packet


def check_copy(path: str, footage: Footage, piece: Shot) -> None:
    """Raise NotCopied unless the file at ``path`` shows the frames of ``piece``, at their times."""
    expected = footage.thumbnails[piece.start : piece.end]
    shrink = Thumbnails()
    matrices = []
    for name in (path, footage.info.path):
        with closing(decode_stream(name)) as decoded:
            stream, frame = next(decoded)
            matrices.append((display_matrix(frame), pixel_aspect(stream)))
    found: list[np.ndarray] = []
    info = probe(path, look=lambda frame: found.append(shrink(frame)), max_frames=MAX_FRAMES)
    seconds = [time - footage.times[piece.start] for time in footage.times[piece.start : piece.end]]
    same = (
        matrices[0] == matrices[1]
        and info.damage is None
        and len(found) == len(expected)
        and np.array_equal(np.stack(found), expected)
        and np.allclose(info.times, seconds, atol=2e-3)
    )
    if not same:
        raise NotCopied
