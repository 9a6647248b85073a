# SPDX-License-Identifier: Apache-2.0
"""The first video stream of a file, decoded frame by frame and turned into what a player shows.

Files are hostile until proven otherwise: few demuxers, local files only, one decoding thread, a limit on
pixels. Axes: h height, w width, c channels (RGB).
"""

import os
import struct
from collections.abc import Generator
from fractions import Fraction
from typing import Any

import numpy as np

from latte.data.frame_folder import IMAGE_SUFFIXES, MAX_PIXELS, Unreadable, check_file

VIDEO_SUFFIXES = (
    *(
        ".mp4",
        ".m4v",
        ".mov",
        ".qt",
        ".3gp",
        ".3g2",
        ".avi",
        ".webm",
        ".mkv",
        ".mpg",
        ".mpeg",
        ".mpe",
        ".vob",
    ),
    *(".ts", ".mts", ".m2ts", ".wmv", ".asf", ".flv", ".ogv", ".gif"),
)
DEMUXERS = "mov,mp4,avi,matroska,webm,mpeg,mpegts,asf,flv,ogg,gif"
LIMIT = {"max_pixels": str(MAX_PIXELS)}
OPENING = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file", **LIMIT}  # options of every container
MAX_ASPECT = (
    5.0  # pixels that are more stretched than this, either way, are taken for a mistake of the header
)
SIGNATURES = {  # (offset, bytes) of containers, for files without a suffix
    (4, b"ftyp"),
    (0, b"\x1a\x45\xdf\xa3"),
    (8, b"AVI "),
    (0, b"\x00\x00\x01\xba"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
    (0, b"FLV\x01"),
    (0, b"OggS"),
    (0, b"GIF8"),
}


def is_video_name(path: str) -> bool:
    """Return whether ``path`` looks like a video: by its suffix, or without one by the first bytes of the
    file.
    """
    name = os.path.basename(path).lower()
    if name.endswith(VIDEO_SUFFIXES):
        return True
    if os.path.splitext(name)[1]:
        return False
    try:
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            head = file.read(16)
    except (OSError, ValueError):
        return False
    return any(head.startswith(signature, offset) for offset, signature in SIGNATURES)


def decode_stream(path: str, seek: int | None = None) -> Generator[tuple[Any, Any]]:
    """Yield (stream, frame) of the first video stream, in order of presentation, up to the end.

    ``seek`` is a time stamp: decoding starts at the key frame that the container finds at or before it, and
    the first frames may lack what they refer to, so the caller skips corrupt ones. Raises Unreadable at the
    first damage.
    """
    import av
    from av.error import FFmpegError

    check_file(path)
    stream_found = False
    errors = (
        FFmpegError,
        OSError,
        EOFError,
        UnicodeError,
        AttributeError,
        IndexError,
        MemoryError,
        ValueError,
    )
    try:
        with av.open(os.path.abspath(path), options=OPENING, metadata_errors="replace") as container:
            stream = choose_stream(path, container)
            stream_found = True
            check_stream(path, stream)
            stream.codec_context.options = LIMIT
            stream.codec_context.thread_count = 1
            if seek is not None:
                container.seek(seek, stream=stream)
            for frame in container.decode(stream):
                if frame.is_corrupt and seek is None:
                    raise Unreadable(path, "damaged", "the decoder had to invent part of a frame")
                yield stream, frame
    except errors as error:
        if isinstance(error, Unreadable):
            raise
        kind = type(error).__name__
        if stream_found:
            raise Unreadable(path, "damaged", f"the decoder stopped with {kind}") from error
        images = ", ".join(IMAGE_SUFFIXES)
        sentence = f"no supported container was recognised ({kind}; videos: {DEMUXERS}; images: {images})"
        raise Unreadable(path, "not-a-video", sentence) from error


def choose_stream(path: str, container: Any) -> Any:
    """Return the first video stream that is not a cover picture. Unreadable when there is no video stream."""
    streams = container.streams.video
    if not streams:
        raise Unreadable(path, "no-video-stream", "the container holds no video")
    return next((stream for stream in streams if not is_cover(stream)), streams[0])


def is_cover(stream: Any) -> bool:
    """Return whether a video stream is an attached picture, such as the cover of a song."""
    return "attached_pic" in str(stream.disposition)


def check_stream(path: str, stream: Any) -> None:
    """Raise Unreadable for a stream without a decoder, or of unknown or too large a frame size."""
    context = stream.codec_context
    if context is None:
        raise Unreadable(path, "unsupported", "no decoder for its codec")
    if not context.width or not context.height:
        sentence = f"its frames are of unknown size or above {MAX_PIXELS} pixels"
        raise Unreadable(path, "too-large", sentence)


def promised_frames(stream: Any) -> int:
    """Return the number of frames by the header's count, or by its duration and rate; 0 where it states
    neither.
    """
    if stream.frames:
        return stream.frames
    if stream.duration:
        seconds = stream.duration * stream.time_base
    else:
        seconds = Fraction(stream.container.duration or 0, 1_000_000)
    return round(seconds * (stream.average_rate or 0))


def pixel_aspect(stream: Any) -> float:
    """Return width / height of a pixel; 1.0 where it is within 1 %, unknown, or more stretched than
    MAX_ASPECT.
    """
    aspect = float(stream.sample_aspect_ratio or 1)
    plausible = 1 / MAX_ASPECT <= aspect <= MAX_ASPECT
    if plausible and abs(aspect - 1) > 0.01:
        return aspect
    return 1.0


def display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Return (a, b, c, d): the pixel at (x, y) is shown at (a x + c y, b x + d y), up to a shift; y points
    down.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side_data))
    return (a, b, c, d)


def to_rgb(path: str, stream: Any, frame: Any, reformatter: Any) -> np.ndarray:
    """Return a decoded frame as uint8 (h w c) with square pixels, upright. swscale honours its range and
    colour matrix.
    """
    width = max(1, round(frame.width * pixel_aspect(stream)))
    try:
        rgb_frame = reformatter.reformat(frame, format="rgb24", threads=1)
        if width != frame.width and width * frame.height <= MAX_PIXELS:
            rgb_frame = rgb_frame.reformat(width=width, interpolation="BICUBIC", threads=1)
        rgb = rgb_frame.to_ndarray()
    except (ValueError, MemoryError) as error:
        sentence = f"pixel format {frame.format.name} cannot be converted to RGB"
        raise Unreadable(path, "unsupported", sentence) from error
    return orient(rgb, display_matrix(frame))


def orient(pixels: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """Apply a display matrix to (h w c): the nearest of the 8 quarter turns and mirror images."""
    a, b, c, d = matrix
    if abs(a) + abs(d) >= abs(b) + abs(c):
        horizontal = a
        vertical = d
    else:
        pixels = pixels.swapaxes(0, 1)  # (w h c)
        horizontal = c
        vertical = b
    if vertical < 0:
        pixels = pixels[::-1]
    if horizontal < 0:
        pixels = pixels[:, ::-1]
    return pixels
