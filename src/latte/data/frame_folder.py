# SPDX-License-Identifier: Apache-2.0
"""Image files and folders of numbered images as clips, and the error that every reader of media raises.

Frames are ordered by number (2 before 10); gaps in the numbering are allowed and noted. Images are shown
upright (EXIF). Axes: h height, w width, c channels (RGB).
"""

import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from latte.checks import InputError, printable

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
MAX_PIXELS = 4096 * 4096
MAX_FRAMES = 200_000
ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height


class Unreadable(InputError):
    """This file cannot be used. ``reason`` is 'code: sentence', ready for skipped.jsonl; the message names
    the file too.

    Codes: missing, not-a-file, empty, not-a-video, no-video-stream, too-large, no-frames, damaged,
    unsupported, too-short, no-times.
    """

    def __init__(self, path: str | os.PathLike, code: str, sentence: str):
        self.path = str(path)
        self.reason = f"{code}: {sentence}"
        super().__init__(f"{printable(self.path)} cannot be used ({self.reason}); repair or remove it")

    def __reduce__(self) -> tuple:
        """Pickle by the arguments, so that a worker process can send the error."""
        return Unreadable, (self.path, *self.reason.split(": ", 1)), self.__dict__


def check_file(path: str) -> None:
    """Raise Unreadable for what is missing, a device, a pipe or empty, before any library opens it."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise Unreadable(path, "missing", f"it cannot be opened ({type(error).__name__})") from error
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(path, "not-a-file", "it is a folder, a device, a pipe or a socket")
    if status.st_size == 0:
        raise Unreadable(path, "empty", "it holds 0 bytes")


def frame_files(folder: str | os.PathLike) -> list[tuple[int, str]]:
    """Return (number, path) of the images named <anything><number>.<png|jpg|jpeg|webp|bmp>, by number.

    Unreadable when two images have one number: the folder holds several clips, or one clip twice.
    """
    found: dict[int, str] = {}
    for name in image_names(folder):
        number = re.search(r"[0-9]+$", os.path.splitext(name)[0])
        if not number:
            continue
        if int(number[0]) in found:
            pair = printable(f"{os.path.basename(found[int(number[0])])} and {name}")
            sentence = f"{pair} have the same number; give every clip a folder of its own"
            raise Unreadable(folder, "unsupported", sentence)
        found[int(number[0])] = os.path.join(folder, name)
    return sorted(found.items())


def image_names(folder: str | os.PathLike) -> list[str]:
    """Return the names of the image files in ``folder``, hidden ones left out. Unreadable when it cannot be
    listed.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise Unreadable(
            folder, "missing", f"the folder cannot be listed ({type(error).__name__})"
        ) from error
    return [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]


def is_sequence(folder: str | os.PathLike) -> bool:
    """Return whether the images of a folder look like the frames of one clip, not images of their own.

    Every name ends in a number of its own, at least half of the numbers from the first to the last are there,
    and the first and the last image have one size.
    """
    try:
        files = frame_files(folder)
        if len(files) < 2 or len(files) < len(image_names(folder)):
            return False
        if 2 * len(files) < files[-1][0] - files[0][0] + 1:
            return False
        sizes = []
        for _, file in (files[0], files[-1]):
            with opened(file) as image:
                sizes.append(upright_size(image))
    except IMAGE_ERRORS:
        return False
    return sizes[0] == sizes[1]


def measure_image(file: str) -> tuple[int, int, tuple[str, ...]]:
    """Decode one image: (height, width, notes). Unreadable when it cannot be used."""
    sizes, notes = _decodable_sizes([file])
    if not sizes:
        raise Unreadable(file, "damaged", f"the image cannot be used: {notes[0].rpartition(': ')[2]}")
    if has_transparency(file):
        notes.append("alpha: transparency is dropped")
    width, height = sizes[0]
    return height, width, tuple(notes)


def measure_folder(folder: str) -> tuple[int, int, int, tuple[str, ...]]:
    """Decode the images of a folder once: (num_frames, height, width, notes), each note 'code: sentence'.

    Only the images before the first that does not decode, or has another size, count. Unreadable when there
    is none.
    """
    files = frame_files(folder)
    if not files:
        raise Unreadable(folder, "no-frames", "the folder holds no image whose name ends in a number")
    sizes, notes = _decodable_sizes([file for _, file in files[:MAX_FRAMES]])
    if not sizes:
        raise Unreadable(folder, "no-frames", f"the first image cannot be used: {notes[0]}")
    if len(files) > MAX_FRAMES and not notes:
        notes.append(f"limit: only the first {MAX_FRAMES} frames are used, {len(files)} are there")
    first = files[0][0]
    last = files[len(sizes) - 1][0]
    missing = last - first + 1 - len(sizes)
    if missing:
        notes.append(
            f"gaps: {missing} numbers are missing between {first} and {last}; frames are used in order"
        )
    num_unused = len(image_names(folder)) - len(files)
    if num_unused:
        notes.append(f"unused: {num_unused} images have no number in their name and are not used")
    if has_transparency(files[0][1]):
        notes.append("alpha: transparency is dropped")
    width, height = sizes[0]
    return len(sizes), height, width, tuple(notes)


def _decodable_sizes(files: list[str]) -> tuple[list[tuple[int, int]], list[str]]:
    """Return the upright (width, height) of the leading images that decode and have one size, and why the
    rest is not used.
    """
    sizes: list[tuple[int, int]] = []
    for file in files:
        name = printable(os.path.basename(file))
        rest = f"only the first {len(sizes)} frames are used: {name}"
        try:
            with opened(file) as image:
                size = upright_size(image)
                # a jpeg is checked at an eighth of its size
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
        except IMAGE_ERRORS as error:
            reason = error.reason if isinstance(error, Unreadable) else type(error).__name__
            return sizes, [f"damaged: {rest} does not decode ({reason})"]
        if sizes and size != sizes[0]:
            return sizes, [f"size-change: {rest} is {size[0]}x{size[1]}, not {sizes[0][0]}x{sizes[0][1]}"]
        sizes.append(size)
    return sizes, []


@contextmanager
def opened(file: str) -> Iterator[Image.Image]:
    """Yield the image ``file``, not decoded yet. Unreadable for one of more than MAX_PIXELS; IMAGE_ERRORS for
    a broken one.
    """
    check_file(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about a broken EXIF block
        image = Image.open(file, formats=FORMATS)
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise Unreadable(
                file, "too-large", f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels"
            )
        yield image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) of ``image`` as a viewer shows it, by its EXIF orientation."""
    if orientation(image) >= 5:  # a quarter turn
        return image.height, image.width
    return image.width, image.height


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (as stored) when there is none or the EXIF block is broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION, 1)
    except IMAGE_ERRORS:
        return 1
    if value not in range(1, 9):
        return 1
    return value


def has_transparency(file: str) -> bool:
    """Return whether any pixel of an image is not opaque."""
    with opened(file) as image:
        if not image.has_transparency_data:
            return False
        return np.asarray(image.convert("RGBA"))[..., 3].min() < 255


def read_image(file: str) -> np.ndarray:
    """Return one image file as uint8 (h w c), upright, without transparency; 16 bits per channel become 8.

    Unreadable when it does not decode.
    """
    try:
        with opened(file) as image:
            if image.mode.startswith("I"):  # 16-bit grey: the high byte, as Pillow does for 16-bit RGB
                high = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                pixels = Image.fromarray(high).convert("RGB")
            else:
                pixels = image.convert("RGB")
            method = ROTATIONS.get(orientation(image))
            if method is not None:
                pixels = pixels.transpose(method)
            return np.array(pixels)  # a copy: pillow's own memory is read-only, and torch warns about that
    except IMAGE_ERRORS as error:
        if isinstance(error, Unreadable):
            raise
        reason = f"the image does not decode ({type(error).__name__})"
        raise Unreadable(file, "damaged", reason) from error


ROTATIONS = {  # EXIF orientation -> how to turn the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
