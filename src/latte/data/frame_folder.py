# SPDX-License-Identifier: Apache-2.0
"""A folder of numbered images as a clip, and the one refusal that every reader of media raises.

Images count in the order of their numbers (2 before 10); gaps in the numbering are allowed and reported. PNG, JPEG and WebP.
Axes: h height, w width, c channels (RGB).
"""

import os
import re
import stat

import numpy as np
from PIL import Image

from latte.checks import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
MAX_PIXELS = 4096 * 4096
MAX_FRAMES = 200_000


class Unreadable(InputError):
    """This file cannot be used. ``reason`` is 'code: sentence', ready for skipped.jsonl; the message names the file too.

    Codes: missing, not-a-file, empty, not-a-video, no-video-stream, too-large, no-frames, damaged, unsupported, too-short, no-times.
    """

    def __init__(self, path: str | os.PathLike, code: str, sentence: str):
        self.path, self.reason = str(path), f"{code}: {sentence}"
        self.code, self.sentence = code, sentence
        super().__init__(f"{self.path} cannot be used ({self.reason}); repair it or take it out of the data")

    def __reduce__(self) -> tuple:
        """Pickle by the arguments, so that a worker process can send it."""
        return Unreadable, (self.path, self.code, self.sentence), self.__dict__


def check_file(path: str) -> None:
    """Refuse (Unreadable) what is absent, a device, a pipe or empty, before any library opens it."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise Unreadable(
            path, "missing", f"the file cannot be opened ({error.__class__.__name__})"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(path, "not-a-file", "it is a folder, a device, a pipe or a socket")
    if status.st_size == 0:
        raise Unreadable(path, "empty", "it holds 0 bytes")


def frame_files(folder: str | os.PathLike) -> list[tuple[int, str]]:
    """(number, path) of the images named <anything><number>.<png|jpg|jpeg|webp>, by number.

    Unreadable when two images have one number, which means that the folder holds several clips or one clip twice."""
    found: dict[int, str] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise Unreadable(
            folder, "missing", f"the folder cannot be listed ({error.__class__.__name__})"
        ) from error
    for name in names:
        stem, suffix = os.path.splitext(name)
        number = re.search(r"[0-9]+$", stem)
        if not number or suffix.lower() not in IMAGE_SUFFIXES or name.startswith("."):
            continue
        if int(number[0]) in found:
            other = os.path.basename(found[int(number[0])])
            raise Unreadable(
                folder,
                "unsupported",
                f"{other} and {name} have the same number; give every clip a folder of its own",
            )
        found[int(number[0])] = os.path.join(folder, name)
    return sorted(found.items())


def measure_folder(folder: str) -> tuple[int, int, int, str | None]:
    """(frames, height, width, note): how many images decode, one after the other and of one size. Unreadable when none does."""
    files, sizes, note = frame_files(folder)[:MAX_FRAMES], [], None
    if not files:
        raise Unreadable(folder, "no-frames", "the folder holds no image whose name ends in a number")
    for _, file in files:
        try:
            with _opened(file) as image:
                size = image.size
                image.draft(
                    None, (max(1, size[0] // 8), max(1, size[1] // 8))
                )  # a jpeg is checked at an eighth of its size
                image.load()
        except IMAGE_ERRORS as error:
            note = f"{os.path.basename(file)} does not decode ({error.__class__.__name__})"
            break
        if sizes and size != sizes[0]:
            note = f"{os.path.basename(file)} is {size[0]}x{size[1]}, not {sizes[0][0]}x{sizes[0][1]}"
            break
        sizes.append(size)
    if not sizes:
        raise Unreadable(folder, "no-frames", f"not even the first image is good: {note}")
    note = f"only the first {len(sizes)} frames count: {note}" if note else None
    first, last = files[0][0], files[len(sizes) - 1][0]
    missing = last - first + 1 - len(sizes)
    gaps = (
        f"{missing} numbers are missing between {first} and {last}; frames count in order"
        if missing
        else None
    )
    return len(sizes), sizes[0][1], sizes[0][0], "; ".join(filter(None, (note, gaps))) or None


def _opened(file: str) -> Image.Image:
    check_file(file)
    image = Image.open(file, formats=("PNG", "JPEG", "WEBP"))
    if image.width * image.height > MAX_PIXELS or image.mode.startswith(("I", "F")):
        image.close()
        raise ValueError(
            f"{image.width}x{image.height} pixels of mode {image.mode}: above {MAX_PIXELS} pixels or not 8 bits"
        )
    return image


def read_image(file: str) -> np.ndarray:
    """One image file -> uint8 (h w c), transparency dropped."""
    try:
        with _opened(file) as image:
            return np.array(
                image.convert("RGB")
            )  # a copy: what pillow hands out cannot be written to, which torch warns of
    except IMAGE_ERRORS as error:
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(
            file, "damaged", f"the image does not decode ({error.__class__.__name__})"
        ) from error
