# SPDX-License-Identifier: Apache-2.0
"""Small videos made on the spot, every frame of which can be identified by its pixels."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVEL = 6  # grey levels between one frame and the next
COLORS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200))


def numbered(t: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (t h w c): frame i is a grey of 20 + 6 i with a darker corner and a little colour; ``number_of``
    reads i back.
    """
    frames = np.empty((t, height, width, 3), np.uint8)
    frames[:] = (20 + LEVEL * (np.arange(t) % 38))[:, None, None, None]
    frames[:, : height // 3, : width // 3] //= 2
    return frames


def number_of(frame: np.ndarray) -> int:
    """Which frame of ``numbered`` this is (modulo 38), from its lower right part."""
    h, w, _ = frame.shape
    return round((float(frame[h // 2 :, w // 2 :].mean()) - 20) / LEVEL)


def shots(*lengths: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (t h w c): a colour per shot, with a bar that moves by one pixel a frame."""
    frames = []
    for number, length in enumerate(lengths):
        for t in range(length):
            frame = np.full((height, width, 3), COLORS[number % len(COLORS)], np.uint8)
            frame[:, t % (width - 4) : t % (width - 4) + 4] = 128
            frame[: height // 2, : width // 2] //= 2 + number % 3
            frames.append(frame)
    return np.stack(frames)


def encode(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 25,
    ticks: list[int] | None = None,
    full_range: bool = False,
    aspect: str | None = None,
    transfer: int | None = None,
    **options: str,
) -> Path:
    """Write uint8 (t h w c) with PyAV itself; ``ticks``: a presentation time in ms per frame; ``aspect`` of a
    pixel; ``options`` go to the encoder.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.options = options
        if codec != "libx264":
            stream.bit_rate = 4_000_000
        if ticks:
            stream.codec_context.time_base = Fraction(1, 1000)
        if full_range:
            stream.codec_context.color_range = 2
        if aspect:
            stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if transfer:
            stream.codec_context.color_trc = transfer
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if full_range:
                frame = frame.reformat(format=pix_fmt, dst_color_range=2)
            if ticks:
                frame.pts, frame.time_base = ticks[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
