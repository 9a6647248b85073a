# SPDX-License-Identifier: Apache-2.0
"""uint8 frames -> an mp4, a gif, a contact sheet. The same frames always give the same bytes.

Files appear under their name only when they are complete. Axes: b clips, t frames, h height, w width, c
channels (RGB).
"""

import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from latte.checks import RunError, check, printable

BT709 = 1  # number of BT.709 in all three tables of ITU-T H.273: primaries, transfer, matrix
X264 = {
    "crf": "14",
    "preset": "medium",
    "threads": "1",
    # The macroblock tree reads memory that x264 has not written when frames are small: equal frames,
    # different bytes.
    "x264-params": "mbtree=0",
}
PARTIAL = re.compile(r"^\..+\.(?:(?P<host>[\w.-]+)-)?(?P<pid>\d+)\.partial\.(?:mp4|gif)$")
ABANDONED = 24 * 3600.0  # seconds after which the partial file of another host is taken for a dead one


def check_frames(frames: np.ndarray, fps: float) -> None:
    """InputError unless ``frames`` is uint8 (t h w 3) with at least one frame, and ``fps`` in (0, 1000]."""
    check(
        frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and frames.size > 0,
        f"frames must be uint8 (t h w 3) with at least one frame, got {frames.dtype} {frames.shape}; "
        "convert with latte.data.clips.to_uint8",
    )
    check(0 < fps <= 1000, f"fps must be in (0, 1000] frames per second, got {fps}")


@contextmanager
def complete_file(path: str | os.PathLike) -> Iterator[str]:
    """Yield a temporary name beside ``path``, which replaces it when the block ends without an error.

    Partial files that killed processes left in the folder are removed. RunError when the file cannot be
    written.
    """
    from av.error import FFmpegError

    path = Path(path)
    partial = path.with_name(f".{path.stem}.{socket.gethostname()}-{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_dead_partials(path.parent)
        yield str(partial)
        os.replace(partial, path)
    except (OSError, FFmpegError) as error:
        raise RunError(
            f"{printable(path)} cannot be written: {printable(str(error))}; "
            "check the folder, its permissions and the free disk space"
        ) from error
    finally:
        with suppress(OSError):  # gone already when all went well
            partial.unlink()


def remove_dead_partials(folder: Path) -> None:
    """Remove partial clips in ``folder`` whose process no longer runs on this host, and those older than a
    day.
    """
    for file in folder.glob(".*.partial.*"):
        match = PARTIAL.match(file.name)
        if not match:
            continue
        with suppress(OSError):
            dead = match["host"] == socket.gethostname() and not is_running(int(match["pid"]))
            if dead or time.time() - file.stat().st_mtime > ABANDONED:
                file.unlink()


def is_running(pid: int) -> bool:
    """Return whether process ``pid`` runs on this host; True where the system cannot be asked without harm
    (Windows).
    """
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def write_mp4(path: str | os.PathLike, frames: np.ndarray, fps: float = 8) -> None:
    """Write uint8 (t h w c) as H.264 in yuv420p (BT.709, tagged as such), near lossless to the eye (crf 14).

    An odd last row or column is repeated once, because yuv420p has even sizes only. InputError for other
    arrays, RunError when the file cannot be written.
    """
    check_frames(frames, fps)
    encode_mp4(path, frames, fps)


def encode_mp4(
    path: str | os.PathLike,
    frames: Iterable[np.ndarray],
    fps: float,
    ticks: Sequence[int] = (),
    time_base: Fraction | None = None,
) -> None:
    """Write frames uint8 (h w c) of one size one after another, as ``write_mp4`` does.

    Frame i is shown after ``ticks[i]`` times ``time_base`` seconds; without ``ticks`` at the even rate
    ``fps``. RunError when the file cannot be written.
    """
    import av

    with (
        complete_file(path) as partial,
        av.open(partial, "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt = "yuv420p"
        stream.options = X264
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = 1  # limited, 16 to 235
        if ticks:
            context.time_base = time_base
        for index, array in enumerate(frames):
            height, width = array.shape[:2]
            array = np.pad(array, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # (h w c)
            if index == 0:
                stream.height, stream.width = array.shape[:2]
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            yuv = rgb.reformat(
                format="yuv420p",
                dst_colorspace="ITU709",
                dst_color_range="MPEG",
                dst_color_trc=BT709,
                dst_color_primaries=BT709,
                threads=1,
            )
            if ticks:
                yuv.pts = ticks[index]
                yuv.time_base = time_base
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def write_gif(path: str | os.PathLike, frames: np.ndarray, fps: float = 8) -> None:
    """Write uint8 (t h w c) as an endless gif with one palette for the whole clip, so that colours do not
    flicker.

    The delay is rounded to 10 ms, the unit of the format, and is at least 20 ms. Equal neighbours become one
    longer frame. InputError for other arrays, RunError when the file cannot be written.
    """
    check_frames(frames, fps)
    t, height, width, _ = frames.shape
    palette = Image.fromarray(frames.reshape(t * height, width, 3)).quantize(256, dither=Image.Dither.NONE)
    images = [Image.fromarray(array).quantize(palette=palette, dither=Image.Dither.NONE) for array in frames]
    delay = max(20, 10 * round(100 / fps))
    with complete_file(path) as partial:
        images[0].save(
            partial, format="GIF", save_all=True, append_images=images[1:], duration=delay, loop=0, disposal=1
        )


def contact_sheet(
    clips: np.ndarray | Sequence[np.ndarray],
    scale: int | None = None,
    captions: Sequence[str] | None = None,
    gap: int = 2,
) -> Image.Image:
    """Return an RGB image of uint8 (b t h w c), or of a list of (t h w c) of any sizes: a row per clip.

    ``scale`` repeats pixels (default: until the short side of the smallest has at least 96); ``captions`` are
    written above the rows.
    """
    check(len(clips) > 0, "a contact sheet needs at least one clip, got none")
    if captions is not None:
        check(
            len(captions) == len(clips),
            f"captions must be one per clip, got {len(captions)} captions for {len(clips)} clips",
        )
    for clip in clips:
        check_frames(clip, 1)
    scale = scale or max(1, -(-96 // min(min(clip.shape[1:3]) for clip in clips)))
    header = 18 if captions is not None else 0
    heights = [clip.shape[1] * scale + gap + header for clip in clips]
    widths = [clip.shape[2] * scale + gap for clip in clips]
    across = max(len(clip) * width for clip, width in zip(clips, widths, strict=True))
    sheet = Image.new("RGB", (across + gap, sum(heights) + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13) if header else None
    top = gap
    for row, clip in enumerate(clips):
        if captions is not None:
            draw.text((gap + 1, top + 1), captions[row], fill=(0, 0, 0), font=font)
        for column, frame in enumerate(clip):
            image = Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))
            sheet.paste(image, (gap + column * widths[row], top + header))
        top += heights[row]
    return sheet
