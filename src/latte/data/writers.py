# SPDX-License-Identifier: Apache-2.0
"""uint8 frames -> an mp4, a gif, a contact sheet. The same frames always give the same bytes.

Files appear under their name only when they are complete. ``latte.data.media`` offers these functions beside its readers.
Axes: b clips, t frames, h height, w width, c channels (RGB).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latte.checks import RunError, require


def _check_frames(frames: np.ndarray, fps: float) -> None:
    rule = "frames must be uint8 (t h w 3) with at least one frame"
    require(
        frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and frames.size > 0,
        "frames",
        (str(frames.dtype), frames.shape),
        rule,
        "convert with latte.data.clips.to_uint8",
    )
    require(0 < fps <= 1000, "fps", fps, "a frame rate lies in (0, 1000]", "give the rate in frames a second")


@contextmanager
def _complete(path: str | os.PathLike) -> Iterator[str]:
    """A temporary name beside ``path`` that takes its place when the block ends well; RunError when it cannot be written."""
    from av.error import FFmpegError

    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield str(partial)
        os.replace(partial, path)
    except (OSError, FFmpegError) as error:
        raise RunError(
            f"{path} cannot be written: {error}; check the folder, its rights and the space left on the disk"
        ) from error
    finally:
        with suppress(OSError):  # it is gone already when all went well
            partial.unlink()


def write_mp4(path: str | os.PathLike, frames: np.ndarray, fps: float = 8) -> None:
    """uint8 (t h w c) -> H.264, yuv420p, near lossless to the eye (crf 14). An odd last row or column is repeated once,
    because yuv420p knows only even sizes. InputError for other arrays, RunError when the file cannot be written."""
    import av

    _check_frames(frames, fps)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with (
        _complete(path) as partial,
        av.open(partial, "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": "14", "preset": "medium", "threads": "1"}
        for array in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24"))
            )
        container.mux(stream.encode())


def write_gif(path: str | os.PathLike, frames: np.ndarray, fps: float = 8) -> None:
    """uint8 (t h w c) -> an endless gif with one palette for the whole clip (colours do not flicker).

    A gif counts time in 10 ms: the delay is rounded to that, 20 ms at least. Equal neighbours are stored as one longer frame."""
    _check_frames(frames, fps)
    t, height, width, _ = frames.shape
    palette = Image.fromarray(frames.reshape(t * height, width, 3)).quantize(256, dither=Image.Dither.NONE)
    images = [Image.fromarray(array).quantize(palette=palette, dither=Image.Dither.NONE) for array in frames]
    delay = max(20, 10 * round(100 / fps))
    with _complete(path) as partial:
        images[0].save(
            partial, format="GIF", save_all=True, append_images=images[1:], duration=delay, loop=0, disposal=1
        )


def contact_sheet(
    clips: np.ndarray | Sequence[np.ndarray],
    scale: int | None = None,
    captions: Sequence[str] | None = None,
    gap: int = 2,
) -> Image.Image:
    """uint8 (b t h w c), or a list of (t h w c) of one frame size, -> an RGB image: a row a clip, a column a frame.

    ``scale`` repeats pixels (default: as many times as brings the short side to 96 or more); ``captions`` stand above the rows."""
    sizes = {clip.shape[1:] for clip in clips}
    require(
        len(sizes) == 1,
        "clips",
        sorted(sizes),
        "a sheet shows at least one clip, all of one frame size",
        "resize them first",
    )
    if captions is not None:
        require(
            len(captions) == len(clips),
            "captions",
            len(captions),
            f"there are {len(clips)} rows",
            "give one caption a row",
        )
    height, width, _ = sizes.pop()
    scale = scale or max(1, -(-96 // min(height, width)))
    head = 18 if captions is not None else 0
    columns = max(len(clip) for clip in clips)
    row, column = height * scale + gap + head, width * scale + gap
    sheet = Image.new("RGB", (columns * column + gap, len(clips) * row + gap), (255, 255, 255))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13) if head else None
    for r, clip in enumerate(clips):
        _check_frames(clip, 1)
        if captions is not None:
            draw.text((gap + 1, gap + r * row + 1), captions[r], fill=(0, 0, 0), font=font)
        for c, frame in enumerate(clip):
            image = Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))
            sheet.paste(image, (gap + c * column, gap + r * row + head))
    return sheet
