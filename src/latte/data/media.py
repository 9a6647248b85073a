# SPDX-License-Identifier: Apache-2.0
"""A video file or a folder of numbered frames -> uint8 frames.

A header's frame count is never believed: ``probe`` decodes once and keeps what really came out, up to the first damage, with the
frames' time stamps and key frames. ``read_frames`` then seeks to the key frame before the span that is asked for. Files are
hostile until proven otherwise: few demuxers, local files only, one decoding thread, a limit on pixels and frames.
Axes: t frames, h height, w width, c channels (RGB). Display rotation in quarter turns is applied; pixel aspect is not.
"""

import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from latte.checks import InputError
from latte.data.frame_folder import (
    MAX_FRAMES,
    MAX_PIXELS,
    Unreadable,
    check_file,
    frame_files,
    measure_folder,
    read_image,
)
from latte.data.writers import contact_sheet, write_gif, write_mp4

__all__ = [
    "MediaInfo",
    "Unreadable",
    "contact_sheet",
    "decode_frames",
    "probe",
    "read_frames",
    "write_gif",
    "write_mp4",
]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".webm", ".mkv", ".mpg", ".mpeg", ".gif")
DEMUXERS = "mov,mp4,avi,matroska,webm,mpeg,gif"
READER = 1  # raised whenever a probe of the same bytes may come out differently: cached probes of another number are void


@dataclass(frozen=True)
class MediaInfo:
    """What ``probe`` found. ``frames`` counts those that decode one after the other from the first; sizes are after rotation.

    ``fps`` is the mean rate by the time stamps, or the header's where these are unusable, or 0.0 (frame folders). ``note`` says what
    is not as it should be (damage behind the last good frame, gaps in the numbering). Time stamps are kept as ``start`` and runs
    (step, count) of ticks of ``time_base`` seconds; they are empty when missing or not increasing, and then nothing is sought.
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
    note: str | None = None

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
        """Seconds of each frame from the first: by its stamp, else evenly by the header's rate, else [] (no times known)."""
        if self.time_base[0]:
            return [(tick - self.start) * self.time_base[0] / self.time_base[1] for tick in self.stamps]
        return [index / self.fps for index in range(self.frames)] if self.fps else []


def _decoded(path: str, seek: int | None = None) -> Generator[tuple[Any, Any]]:
    """(stream, frame) of the first video stream, in order of presentation, up to the end or the first damage (Unreadable).

    ``seek``: a time stamp; decoding starts at the key frame that the container finds at or before it.
    """
    import av
    from av.error import FFmpegError

    check_file(path)
    limit = {"max_pixels": str(MAX_PIXELS)}
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file", **limit}
    opened = False
    try:
        with av.open(os.path.abspath(path), options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise Unreadable(path, "no-video-stream", "the container holds no video")
            opened, stream = True, container.streams.video[0]
            context = stream.codec_context
            if context is None:
                raise Unreadable(path, "unsupported", "no decoder for its codec")
            if not context.width or not context.height:
                raise Unreadable(
                    path, "too-large", f"its frames are of unknown size or above {MAX_PIXELS} pixels"
                )
            context.options, context.thread_count = limit, 1
            if seek is not None:
                container.seek(seek, stream=stream)
            for frame in container.decode(stream):
                if (
                    frame.is_corrupt and seek is None
                ):  # behind a seek the first frames may lack what they refer to: the caller skips them
                    raise Unreadable(path, "damaged", "the decoder had to invent part of a frame")
                yield stream, frame
    except (
        FFmpegError,
        OSError,
        EOFError,
        UnicodeError,
        AttributeError,
        IndexError,
        MemoryError,
        ValueError,
    ) as error:
        if isinstance(error, Unreadable):
            raise
        kind = error.__class__.__name__
        if opened:
            raise Unreadable(path, "damaged", f"the decoder stopped with {kind}") from error
        raise Unreadable(
            path, "not-a-video", f"no allowed container was recognised ({kind}; allowed: {DEMUXERS})"
        ) from error


def probe(path: str | os.PathLike) -> MediaInfo:
    """Decode a video file, or check a folder of numbered frames, once: what is really there. Unreadable when nothing usable is."""
    path = os.fspath(path)
    if os.path.isdir(path):
        frames, height, width, note = measure_folder(path)
        return MediaInfo(path, frames, 0.0, height, width, "images", note=note)
    return _probe_video(path)


def _probe_video(path: str) -> MediaInfo:
    from av.video.reformatter import VideoReformatter

    stamps: list[int | None] = []
    keys, note, first, last_key, header = [], None, None, None, None
    try:
        with closing(_decoded(path)) as frames:
            for stream, frame in frames:
                if first is None:
                    first, header = (
                        frame,
                        (stream.codec_context.name, stream.time_base, stream.average_rate, _promised(stream)),
                    )
                if (frame.width, frame.height) != (first.width, first.height) or len(stamps) == MAX_FRAMES:
                    note = f"only the first {len(stamps)} frames count: the size changes there or the limit of {MAX_FRAMES} is reached"
                    break
                if frame.key_frame:
                    keys.append(len(stamps))
                    last_key = frame
                stamps.append(frame.pts)
    except Unreadable as error:
        if first is None:
            raise
        note = f"only the first {len(stamps)} frames count: {error.reason}"
    if first is None or header is None:
        raise Unreadable(path, "no-frames", "the stream holds no frame that decodes")
    codec, time_base, rate, promised = header
    if note is None and promised > len(stamps) + max(2, len(stamps) // 10):
        note = f"{len(stamps)} frames decode without an error, but the header promises about {promised}"
    height, width, _ = _rgb(path, first, VideoReformatter()).shape
    info = MediaInfo(
        path, len(stamps), round(float(rate or 0), 4), height, width, codec, keys=tuple(keys), note=note
    )
    ticks = [stamp for stamp in stamps if stamp is not None]
    if not time_base or len(ticks) < len(stamps) or any(b <= a for a, b in pairwise(ticks)):
        return info
    base = Fraction(time_base)
    info = replace(
        info,
        fps=round(float((len(ticks) - 1) / ((ticks[-1] - ticks[0]) * base)), 4)
        if len(ticks) > 1
        else info.fps,
        start=ticks[0],
        steps=tuple((step, len(list(run))) for step, run in groupby(b - a for a, b in pairwise(ticks))),
        time_base=(base.numerator, base.denominator),
    )
    return (
        info
        if not last_key or _seeks_truly(info, _rgb(path, last_key, VideoReformatter()))
        else replace(info, keys=(0,))
    )


def _seeks_truly(info: MediaInfo, expected: np.ndarray) -> bool:
    """Does a seek to the last key frame give the pixels ``expected``? Some streams need what only their first packet says: 4:4:4
    files of old x264 decode to noise after a seek, without an error."""
    key = info.keys[-1]
    found, _ = _span(info.path, [key], info, key)
    return key in found and np.array_equal(found[key], expected)


def read_frames(source: str | os.PathLike | MediaInfo, indices: Sequence[int]) -> np.ndarray:
    """Frames ``indices`` (any order, repeats allowed) -> uint8 (t h w c). With a MediaInfo only the needed span is decoded;
    with a bare path, everything up to the last index. Unreadable when a frame cannot be had."""
    return decode_frames(source, indices)[0]


def decode_frames(source: str | os.PathLike | MediaInfo, indices: Sequence[int]) -> tuple[np.ndarray, int]:
    """``read_frames``, and how many frames were decoded for it."""
    info = source if isinstance(source, MediaInfo) else None
    path = info.path if info else os.fspath(source)  # type: ignore[arg-type]
    wanted = sorted(set(indices))
    if not wanted or wanted[0] < 0 or (info and wanted[-1] >= info.frames):
        raise InputError(
            f"frames {list(indices)} of {path} were asked for, but frames lie in 0...{info.frames - 1 if info else 'end'}"
        )
    if os.path.isdir(path):
        files = [file for _, file in frame_files(path)]
        found, decoded = {i: read_image(files[i]) for i in wanted if i < len(files)}, len(wanted)
    else:
        found, decoded = {}, 0
        sought = [key for key in info.keys if 0 < key <= wanted[0]][-2:] if info and info.time_base[0] else []
        for key in [*reversed(sought), 0]:
            found, cost = _span(path, wanted, info, key)
            decoded += cost
            if len(found) == len(wanted):
                break
    if len(found) < len(wanted):
        raise Unreadable(
            path, "damaged", f"frame {next(i for i in wanted if i not in found)} does not decode (any more)"
        )
    if len({frame.shape for frame in found.values()}) > 1:
        raise Unreadable(path, "damaged", "its frames differ in size")
    return np.stack([found[i] for i in indices]), decoded


def _promised(stream: Any) -> int:
    """Number of frames by the header's count, or else by its duration and rate; 0 where it says neither."""
    container = stream.container
    seconds = (
        stream.duration * stream.time_base
        if stream.duration
        else Fraction(container.duration or 0, 1_000_000)
    )
    return stream.frames or round(seconds * (stream.average_rate or 0))


def _span(
    path: str, wanted: list[int], info: MediaInfo | None, key: int
) -> tuple[dict[int, np.ndarray], int]:
    """Decode from key frame ``key`` (0: the start) to the last of ``wanted``: what was found, and the number of frames decoded.

    After a seek a frame counts only when its stamp is one of the probed stamps, so a container that lands elsewhere finds nothing.
    """
    from av.video.reformatter import VideoReformatter

    stamps = info.stamps if info and key else []
    index_of = {stamp: index for index, stamp in enumerate(stamps)}
    found, decoded, reformatter = {}, 0, VideoReformatter()
    try:
        with closing(_decoded(path, stamps[key] if key else None)) as frames:
            for _, frame in frames:
                index = index_of.get(frame.pts, -1) if key else decoded
                decoded += 1
                if index in wanted:
                    if frame.is_corrupt:
                        break
                    found[index] = _rgb(path, frame, reformatter)
                if index >= wanted[-1]:
                    break
    except Unreadable:
        if not key and not found:
            raise
    return found, decoded


def _rgb(path: str, frame: Any, reformatter: Any) -> np.ndarray:
    """A decoded frame -> uint8 (h w c), upright; its own range and colour matrix are honoured by swscale."""
    try:
        rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    except (ValueError, MemoryError) as error:
        raise Unreadable(
            path, "unsupported", f"pixel format {frame.format.name} cannot be turned into RGB"
        ) from error
    return np.rot90(rgb, round(frame.rotation / 90))
