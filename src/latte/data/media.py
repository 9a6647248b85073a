# SPDX-License-Identifier: Apache-2.0
"""A video file or a folder of numbered frames -> uint8 frames.

The frame count of a header is never trusted: ``probe`` decodes once and keeps what really came out, up to the
first damage, with the frames' time stamps and key frames. ``read_frames`` then seeks to the key frame before
the requested span. Axes: t frames, h height, w width, c channels (RGB).
"""

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from latte.checks import InputError, printable
from latte.data.frame_folder import (
    IMAGE_SUFFIXES,
    MAX_FRAMES,
    Unreadable,
    frame_files,
    measure_folder,
    measure_image,
    read_image,
)
from latte.data.video_stream import (
    VIDEO_SUFFIXES,
    decode_stream,
    display_matrix,
    is_cover,
    pixel_aspect,
    promised_frames,
    to_rgb,
)
from latte.data.writers import contact_sheet, write_gif, write_mp4

__all__ = [
    "VIDEO_SUFFIXES",
    "MediaInfo",
    "Unreadable",
    "contact_sheet",
    "decode_frames",
    "probe",
    "read_frames",
    "write_gif",
    "write_mp4",
]

READER = 2  # raised when a probe of the same bytes may come out differently: older cached probes are void
PARTIAL = (
    "damaged",
    "size-change",
    "limit",
)  # codes of notes that mean: the file holds more than its first frames
HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ITU-T H.273
BASE_PIXELS, PIXELS_PER_BYTE = 10**9, 50_000  # a probe decodes at most base + per_byte * size of the file


@dataclass(frozen=True)
class MediaInfo:
    """What ``probe`` found. ``frames`` counts those that decode one after another from the first; sizes are
    as displayed.

    ``fps`` is the mean rate by the time stamps, else the header's, or 0.0 (frame folders). ``notes`` state
    what is unusual, each as 'code: sentence'. Time stamps are kept as ``start`` and runs (step, count) of
    ticks of ``time_base`` seconds; they are empty when missing or not increasing, and then nothing is sought.
    """

    path: str
    frames: int
    fps: float
    height: int
    width: int
    codec: str
    start: int = 0
    steps: tuple[tuple[int, int], ...] = ()
    time_base: tuple[int, int] = (0, 1)
    keys: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()

    @property
    def damage(self) -> str | None:
        """The note that says why only the first part of the file is used; None for a file that is read to its
        end.
        """
        return next((note for note in self.notes if note.partition(":")[0] in PARTIAL), None)

    @property
    def stamps(self) -> list[int]:
        """Presentation time of each frame in ticks of the container, or [] when they cannot be trusted."""
        if not self.time_base[0]:
            return []
        ticks = [self.start]
        for step, count in self.steps:
            ticks.extend(range(ticks[-1] + step, ticks[-1] + step * count + 1, step))
        return ticks

    @property
    def times(self) -> list[float]:
        """Seconds of each frame from the first: by its stamp, else evenly by the header's rate, else []
        (unknown).
        """
        if self.time_base[0]:
            return [(tick - self.start) * self.time_base[0] / self.time_base[1] for tick in self.stamps]
        if not self.fps:
            return []
        return [index / self.fps for index in range(self.frames)]


def probe(
    path: str | os.PathLike, look: Callable[[Any], None] | None = None, max_frames: int | None = None
) -> MediaInfo:
    """Decode a video file, a folder of numbered frames or an image once and return what is really there.

    ``look`` is called with each decoded frame of a video file, of which ``max_frames`` (MAX_FRAMES) are read.
    Unreadable when no frame can be used.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        frames, height, width, notes = measure_folder(path)
        return MediaInfo(path, frames, 0.0, height, width, "images", notes=notes)
    if is_image(path):
        height, width, notes = measure_image(path)
        return MediaInfo(path, 1, 0.0, height, width, "image", notes=notes)
    return _probe_video(path, look, max_frames or MAX_FRAMES)


def is_image(path: str) -> bool:
    """Return whether ``path`` is an image file, by its suffix."""
    return path.lower().endswith(IMAGE_SUFFIXES)


@dataclass
class _Survey:
    """What decoding a video once found."""

    stamps: list[int | None] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pixels: np.ndarray | None = None  # the first frame
    key_pixels: np.ndarray | None = None  # the last key frame
    codec: str = ""
    time_base: Fraction | None = None
    rate: float = 0.0
    promised: int = 0


def _probe_video(path: str, look: Callable[[Any], None] | None, max_frames: int) -> MediaInfo:
    found = _survey(path, look, max_frames)
    if found.pixels is None:
        raise Unreadable(path, "no-frames", "the stream holds no frame that decodes")
    num_frames = len(found.stamps)
    if not found.notes and found.promised > num_frames + max(2, num_frames // 10):
        sentence = (
            f"{num_frames} frames decode without an error, but the header promises about {found.promised}"
        )
        found.notes.append(f"damaged: {sentence}")
    height, width, _ = found.pixels.shape
    info = MediaInfo(
        path, num_frames, round(found.rate, 4), height, width, found.codec, keys=tuple(found.keys)
    )
    ticks = [stamp for stamp in found.stamps if stamp is not None]
    if not found.time_base or len(ticks) < num_frames or any(b <= a for a, b in pairwise(ticks)):
        rate = "no rate is known either"
        if info.fps:
            rate = f"they are taken as even, at the header's {info.fps:g} fps"
        found.notes.append(f"no-timing: time stamps are missing or do not increase; {rate}")
        return replace(info, notes=tuple(found.notes))
    base = Fraction(found.time_base)
    if num_frames > 1:
        info = replace(info, fps=round(float((num_frames - 1) / ((ticks[-1] - ticks[0]) * base)), 4))
    steps = tuple((step, len(list(run))) for step, run in groupby(b - a for a, b in pairwise(ticks)))
    time_base = (base.numerator, base.denominator)
    info = replace(info, start=ticks[0], steps=steps, time_base=time_base, notes=tuple(found.notes))
    if found.key_pixels is not None and not _seeks_correctly(info, found.key_pixels):
        return replace(info, keys=(0,))
    return info


def _survey(path: str, look: Callable[[Any], None] | None, max_frames: int) -> _Survey:
    """Decode ``path`` up to its end, its first damage, a change of size or ``max_frames``."""
    from av.video.reformatter import VideoReformatter

    found = _Survey()
    reformatter = VideoReformatter()
    size = (0, 0)
    last_key = None
    num_interlaced = num_pixels = 0
    stop = ""
    first_notes: list[str] = []
    try:
        budget = BASE_PIXELS + PIXELS_PER_BYTE * (os.path.getsize(path) if os.path.isfile(path) else 0)
        with closing(decode_stream(path)) as frames:
            for stream, frame in frames:
                if found.pixels is None:
                    size = (frame.width, frame.height)
                    found.pixels = to_rgb(path, stream, frame, reformatter)
                    found.codec = stream.codec_context.name
                    found.time_base = stream.time_base
                    found.rate = float(stream.average_rate or 0)
                    found.promised = promised_frames(stream)
                    first_notes = _notes_of(stream, frame)
                if (frame.width, frame.height) != size:
                    new_size = f"{frame.width}x{frame.height}"
                    stop = f"size-change: frames are {new_size} from there, not {size[0]}x{size[1]}"
                    break
                if len(found.stamps) == max_frames:
                    stop = f"limit: more than {max_frames} frames are not read"
                    break
                num_pixels += size[0] * size[1]
                if num_pixels > budget:
                    sentence = f"its {os.path.getsize(path)} bytes decode to more than {budget} pixels"
                    raise Unreadable(path, "too-large", sentence)
                num_interlaced += frame.interlaced_frame
                if frame.key_frame:
                    found.keys.append(len(found.stamps))
                    last_key = (stream, frame)
                found.stamps.append(frame.pts)
                if look:
                    look(frame)
            if last_key:
                found.key_pixels = to_rgb(path, *last_key, reformatter)
    except Unreadable as error:
        if found.pixels is None or error.reason.startswith("too-large"):
            raise
        stop = error.reason
        if not stop.startswith("damaged"):
            stop = f"damaged: {stop}"
    if stop:
        code, _, sentence = stop.partition(": ")
        found.notes.append(f"{code}: only the first {len(found.stamps)} frames are used: {sentence}")
    found.notes += first_notes
    if num_interlaced:
        sentence = f"{num_interlaced} frames are interlaced; deinterlace the file first (ffmpeg -vf bwdif)"
        found.notes.append(f"interlaced: {sentence}")
    return found


def _notes_of(stream: Any, frame: Any) -> list[str]:
    """Return the notes on what the first frame and its stream hold that is not shown as a player would show
    it.
    """
    notes = []
    a, b, c, d = display_matrix(frame)
    if min(abs(a) + abs(d), abs(b) + abs(c)) > 0.01 * max(abs(a) + abs(d), abs(b) + abs(c)):
        notes.append(
            "rotation: it is rotated by other than quarter turns; the nearest quarter turn is applied"
        )
    if pixel_aspect(stream) == 1 and abs(float(stream.sample_aspect_ratio or 1) - 1) > 0.01:
        notes.append(f"aspect: the pixel aspect ratio {stream.sample_aspect_ratio} is ignored")
    if frame.color_trc in HDR:
        notes.append(f"hdr: the transfer function is {HDR[frame.color_trc]}, read without tone mapping")
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.reformat(format="rgba", threads=1).to_ndarray()
        if rgba[..., 3].min() < 255:
            notes.append("alpha: transparency is dropped")
    num_streams = sum(not is_cover(other) for other in stream.container.streams.video)
    if num_streams > 1:
        notes.append(f"streams: only the first of {num_streams} video streams is read")
    return notes


def _seeks_correctly(info: MediaInfo, expected: np.ndarray) -> bool:
    """Return whether a seek to the last key frame gives the pixels ``expected``.

    Some streams need what only their first packet states: 4:4:4 files of old x264 decode to noise after a
    seek, silently.
    """
    key = info.keys[-1]
    found, _ = _span(info.path, [key], info, key)
    return key in found and np.array_equal(found[key], expected)


def read_frames(source: str | os.PathLike | MediaInfo, indices: Sequence[int]) -> np.ndarray:
    """Return frames ``indices`` (any order, repeats allowed) as uint8 (t h w c). Unreadable when one cannot
    be decoded.

    With a MediaInfo only the needed span is decoded; with a path, everything up to the last index.
    """
    return decode_frames(source, indices)[0]


def decode_frames(source: str | os.PathLike | MediaInfo, indices: Sequence[int]) -> tuple[np.ndarray, int]:
    """Return ``read_frames``, and how many frames were decoded for it."""
    info = source if isinstance(source, MediaInfo) else None
    path = info.path if info else os.fspath(source)  # type: ignore[arg-type]
    needed = sorted(set(indices))
    if not needed or needed[0] < 0 or (info and needed[-1] >= info.frames):
        end: object = "end"
        if info:
            end = info.frames - 1
        raise InputError(f"frames {list(indices)} of {printable(path)} must be in 0...{end}")
    if os.path.isdir(path):
        files = [file for _, file in frame_files(path)]
        found = {i: read_image(files[i]) for i in needed if i < len(files)}
        num_decoded = len(needed)
    elif is_image(path):
        found = {0: read_image(path)}
        num_decoded = 1
    else:
        found, num_decoded = _seek_and_decode(path, needed, info)
    missing = [i for i in needed if i not in found]
    if missing:
        raise Unreadable(path, "damaged", f"frame {missing[0]} does not decode (any more)")
    if len({frame.shape for frame in found.values()}) > 1:
        raise Unreadable(path, "damaged", "its frames differ in size")
    return np.stack([found[i] for i in indices]), num_decoded


def _seek_and_decode(
    path: str, needed: list[int], info: MediaInfo | None
) -> tuple[dict[int, np.ndarray], int]:
    """Decode from the key frame before ``needed``, from the one before that, then from the start, until all
    are found.
    """
    keys = [0]
    if info and info.time_base[0]:
        keys = [*reversed([key for key in info.keys if 0 < key <= needed[0]][-2:]), 0]
    found: dict[int, np.ndarray] = {}
    num_decoded = 0
    for key in keys:
        found, count = _span(path, needed, info, key)
        num_decoded += count
        if len(found) == len(needed):
            break
    return found, num_decoded


def _span(
    path: str, needed: list[int], info: MediaInfo | None, key: int
) -> tuple[dict[int, np.ndarray], int]:
    """Decode from key frame ``key`` (0: the start) to the last of ``needed``: (frames by index, number of
    frames decoded).

    After a seek a frame counts only when its stamp is a probed one, so a container that lands elsewhere finds
    nothing.
    """
    from av.video.reformatter import VideoReformatter

    stamps = info.stamps if info and key else []
    index_of = {stamp: index for index, stamp in enumerate(stamps)}
    found: dict[int, np.ndarray] = {}
    num_decoded = 0
    reformatter = VideoReformatter()
    try:
        with closing(decode_stream(path, stamps[key] if key else None)) as frames:
            for stream, frame in frames:
                index = index_of.get(frame.pts, -1) if key else num_decoded
                num_decoded += 1
                if index in needed:
                    if frame.is_corrupt:
                        break
                    found[index] = to_rgb(path, stream, frame, reformatter)
                if index >= needed[-1]:
                    break
    except Unreadable:
        if not key and not found:
            raise
    return found, num_decoded
