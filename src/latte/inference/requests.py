# SPDX-License-Identifier: Apache-2.0
"""What to generate: one ``SampleRequest`` per clip, and the values users pass for it (seeds, labels, prompts,
images), checked.

Axes: h height, w width, c channels.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor

from latte.checks import InputError, check, printable
from latte.data.clips import centre_crop_resize
from latte.data.frame_folder import IMAGE_SUFFIXES, read_image
from latte.data.media import probe, read_frames

Image = str | Path | PillowImage.Image | np.ndarray | Tensor
MAX_CLIPS = 100_000  # of one call: twice the largest set that a published score needs
MAX_PROMPT_BYTES = 16 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class SampleRequest:
    """One clip to generate: its seed, and its class (number, name) or its prompt."""

    seed: int
    label: int | None = None
    word: str | None = None
    prompt: str | None = None

    @property
    def file(self) -> str:
        """Return a file name such as 'seed-0007-2-left.mp4', plain ASCII whatever the class or the prompt is
        called.

        The hash of a prompt follows its first letters, because two prompts can begin alike.
        """
        word = re.sub(r"[^A-Za-z0-9_-]+", "-", self.word or self.prompt or "").strip("-")[:40].strip("-")
        number = "" if self.label is None or self.label < 0 else str(self.label)
        digest = "" if self.prompt is None else hashlib.sha256(self.prompt.encode()).hexdigest()[:6]
        parts = ["seed", f"{self.seed:04d}", number, word, digest]
        return "-".join(part for part in parts if part) + ".mp4"


def class_requests(pipe: Any, labels: str | None, count: int | None, seed: int) -> list[SampleRequest]:
    """Return ``count`` requests (None: 4, or one per label) with seeds from ``seed`` up; labels repeat in
    turn.

    ``labels``: class names or numbers separated by commas, None: every class of the pipeline that has clips.
    """
    words = [word.strip() for word in labels.split(",") if word.strip()] if labels is not None else []
    if labels is not None and not words:
        raise InputError(f"--labels {labels!r} names no class; give names or numbers separated by commas")
    numbers = [pipe.label(word) for word in words]
    num_classes = pipe.model.config.num_classes
    if not numbers and num_classes is not None:
        numbers = list(range(num_classes))
    count = max(4, len(words)) if count is None else count
    check_counts(count, seed)
    picked = [numbers[index % len(numbers)] if numbers else None for index in range(count)]
    return [
        SampleRequest(seed + index, label, None if label is None else pipe.class_name(label))
        for index, label in enumerate(picked)
    ]


def prompt_requests(prompts: Sequence[str], count: int | None, seed: int) -> list[SampleRequest]:
    """Return ``count`` (None: 1) requests per prompt, in order, with seeds from ``seed`` up."""
    count = 1 if count is None else count
    check_counts(count, seed, len(prompts))
    return [
        SampleRequest(seed + index, prompt=prompts[index // count]) for index in range(count * len(prompts))
    ]


def check_counts(count: int, seed: int, prompts: int = 1) -> None:
    """Raise InputError for a number of clips or a seed out of range."""
    check(count >= 1, f"--count must be at least 1, got {count}")
    check(
        count * prompts <= MAX_CLIPS,
        f"--count {count} makes {count * prompts:,} clips, but one command generates at most {MAX_CLIPS:,}; "
        "split it, with another --seed each",
    )
    check(0 <= seed < 2**63, f"--seed must be in [0, 2^63), got {seed}")


def check_prompt(text: str, option: str = "--prompt") -> str:
    """Return ``text``; InputError when it is blank (usually a slip of the shell) or not valid Unicode."""
    check(bool(text.strip()), f"{option} is blank; give a text, e.g. --prompt 'a red square moves left'")
    return check_text(text, option)


def check_text(text: str, option: str) -> str:
    """Return ``text``; InputError when it holds bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{option} {printable(text[:80])!r} is not valid UTF-8; give the text in UTF-8, or a file with --prompts"
        ) from None
    return text


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a UTF-8 text file, one per line, blank lines left out; InputError when there
    are none.
    """
    name = printable(str(path))
    try:
        check(
            path.is_file(),
            f"--prompts {name!r} cannot be read (it is not a file); give a text file, one prompt per line",
        )
        check(path.stat().st_size <= MAX_PROMPT_BYTES, f"--prompts {name!r} is larger than 16 MB; split it")
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--prompts {name!r} cannot be read ({type(error).__name__}); give a text file in UTF-8, one prompt per line"
        ) from None
    found = [line for line in lines if line]
    check(bool(found), f"--prompts {name!r} holds no prompt; give a text file with one prompt per line")
    return found


def as_list(name: str, value: T | Iterable[T] | None) -> list[T] | None:
    """Return one value or several as a list, None as it is; InputError for an empty list."""
    if value is None:
        return None
    values = [value] if isinstance(value, str | Integral) else list(value)  # type: ignore[arg-type]
    check(bool(values), f"{name} is empty; pass at least one, or leave it out")
    return values  # type: ignore[return-value]


def choose_seeds(
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    count: int,
) -> list[int]:
    """Return one seed per video: seed + i, the seeds given, or numbers drawn from ``generator`` (None:
    torch's global one).
    """
    check(seed is None or generator is None, "seed and generator were both given; pass one of them")
    check(
        count <= MAX_CLIPS,
        f"this makes {count:,} videos, but one call generates at most {MAX_CLIPS:,}; split it",
    )
    if isinstance(seed, Integral):
        check(0 <= seed < 2**63 - count, f"seed must be in [0, 2^63), got {seed}")
        return [int(seed) + index for index in range(count)]
    if seed is not None:
        check(
            len(seed) == count,
            f"there are {len(seed)} seeds for {count} videos; pass one seed, or one per video",
        )
        return [int(value) for value in seed]
    sources = [generator] * count if isinstance(generator, torch.Generator | None) else list(generator)
    check(
        len(sources) == count,
        f"there are {len(sources)} generators for {count} videos; pass one, or one per video",
    )
    return [
        int(torch.randint(2**31, (), generator=source, device=source.device if source else None))
        for source in sources
    ]


def read_conditioning_frames(
    first: Image | None, last: Image | None, size: tuple[int, int]
) -> dict[int, np.ndarray]:
    """Return {0: first frame, -1: last frame}, as far as given, as uint8 (h w c), cropped and resized to
    ``size``.
    """
    found = {}
    for frame, image in ((0, first), (-1, last)):
        if image is not None:
            found[frame] = centre_crop_resize(read_frame(image, frame)[None], *size)[0]  # (h w c)
    return found


def read_frame(image: Image, frame: int) -> np.ndarray:
    """Return an image, or of a video its first (``frame`` 0) or last (-1) frame, as uint8 (h w c).

    Arrays are (h w c) and tensors (c h w): uint8, or floating point in [0, 1]. InputError for anything else.
    """
    if isinstance(image, str | Path):
        path = Path(image)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return read_image(str(path))
        info = probe(path)
        return read_frames(info, [frame % info.frames])[0]
    if isinstance(image, PillowImage.Image):
        return np.asarray(image.convert("RGB"))
    if isinstance(image, Tensor):
        image = image.detach().cpu().movedim(-3, -1).numpy() if image.ndim >= 3 else image.numpy()  # (h w c)
    if not isinstance(image, np.ndarray):
        raise InputError(f"image is a {type(image).__name__}; pass a PIL image, an array, a tensor or a path")
    array = image[0] if image.ndim == 4 and len(image) == 1 else image
    check(
        array.ndim == 3 and array.shape[2] == 3 and array.size > 0,
        f"image has the shape {image.shape}; pass an array (h w 3), or a tensor (3 h w)",
    )
    if array.dtype == np.uint8:
        return array
    in_range = np.issubdtype(array.dtype, np.floating) and bool(((array >= 0) & (array <= 1)).all())
    check(
        in_range, f"image is {array.dtype} in [{array.min()}, {array.max()}]; pass uint8, or floats in [0, 1]"
    )
    return np.rint(array * 255).astype(np.uint8)
