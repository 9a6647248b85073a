# SPDX-License-Identifier: Apache-2.0
"""What to generate: one ``SampleRequest`` per clip, and the values users pass for it (seeds, labels, prompts,
images), checked.

Axes: h height, w width, c channels.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor

from latte.checks import InputError, check, choose, printable
from latte.data.clips import centre_crop_resize
from latte.data.frame_folder import IMAGE_SUFFIXES, read_image
from latte.data.media import probe, read_frames
from latte.inference.prompts import PromptReader
from latte.interop.load import why_unknown
from latte.interop.readers import BUILTIN
from latte.model.denoiser import Denoiser
from latte.text.encoders import HAN, shorten

Image = str | Path | PillowImage.Image | np.ndarray | Tensor
MAX_CLIPS = 100_000  # of one call: twice the largest set that a published score needs
MAX_PROMPT_BYTES = 16 << 20
STOPS = ".!\u3002\uff01"  # ends of sentences
SENTENCE = re.compile(rf"\s|[{HAN}]")
LIKE_A_PATH = re.compile(r"[/\\]|\.[A-Za-z]\w{0,10}$")
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
        parts = ["seed", f"{self.seed:04d}"]
        if self.label is not None and self.label >= 0:
            parts.append(str(self.label))
        parts.append(
            re.sub(r"[^A-Za-z0-9_-]+", "-", self.word or self.prompt or "").strip("-")[:40].strip("-")
        )
        if self.prompt is not None:
            parts.append(hashlib.sha256(self.prompt.encode(errors="surrogatepass")).hexdigest()[:6])
        return "-".join(part for part in parts if part) + ".mp4"


class Conditioned:
    """What a pipeline's model can be conditioned on. Abstract: ``VideoPipeline`` provides the attributes."""

    name: str
    model: Denoiser
    classes: list[str]
    reader: PromptReader | None

    def check_conditions(self, prompts: Sequence[str] | None, labels: Sequence[int | str] | None) -> None:
        """Raise InputError unless there are prompts for a text model, labels for a class model, else
        neither.
        """
        self.check_prompts(prompts is not None)
        for label in labels or ():
            self.label(label)
        if self.model.config.num_classes is not None and labels is None and not self.reader:
            raise InputError(
                f"class_labels is missing, but {self.name} has the classes {self.describe_classes()}; "
                "pass names or numbers, or 'none' for the null (unconditional) class"
            )

    def check_prompts(self, present: bool) -> None:
        """Raise InputError unless prompts are ``present`` exactly for a text model."""
        if present and self.reader is None:
            raise InputError(
                f"a prompt was given, but {self.name} reads no text; leave it out, "
                "or use a model that was trained on captions"
            )
        if self.reader and not present:
            raise InputError(
                f"{self.name} reads text, but no prompt was given; "
                f"give one, e.g. --prompt {self.reader.example!r}"
            )

    def label(self, label: int | str) -> int:
        """Return the number of a class given by name or number; 'none' and -1 are the null class."""
        count = self.model.config.num_classes
        if self.reader:
            raise InputError(f"label {label!r} was given, but {self.name} reads text; give a prompt instead")
        if count is None:
            raise InputError(
                f"label {label!r} was given, but {self.name} is unconditional; leave the labels out"
            )
        numbers: dict[int | str, int] = {name: number for number, name in enumerate(self.classes)}
        numbers.setdefault("none", -1)
        if isinstance(label, str) and label not in numbers and not re.fullmatch(r"-?[0-9]{1,9}", label):
            return choose("label", label, numbers)
        number = int(numbers.get(label, label))
        check(
            -1 <= number < count,
            f"label {label!r} is out of range: {self.name} has the classes {self.describe_classes()}; "
            "give one of them",
        )
        return number

    def class_name(self, label: int) -> str:
        """Return the name of a class number (the number where classes have no names), 'none' for -1."""
        if label < 0:
            return "none"
        if not self.classes:
            return str(label)
        return self.classes[label]

    def describe_classes(self) -> str:
        """Return text such as '0 to 3 (up, down, left, right)'."""
        count = self.model.config.num_classes or 0
        names = ", ".join(map(printable, self.classes))
        return f"0 to {count - 1}" + f" ({names})" * bool(names)


def class_requests(
    pipe: Conditioned, labels: str | None, count: int | None, seed: int
) -> list[SampleRequest]:
    """Return ``count`` requests (None: 4, or one per label) with seeds from ``seed`` up; labels repeat in
    turn.

    ``labels``: class names or numbers separated by commas, None: every class of the pipeline that has clips.
    """
    words = [word.strip() for word in (labels or "").split(",") if word.strip()]
    if labels is not None and not words:
        raise InputError(f"--labels {labels!r} names no class; give names or numbers separated by commas")
    numbers = [pipe.label(word) for word in words]
    num_classes = pipe.model.config.num_classes
    if not numbers and num_classes is not None:
        numbers = list(range(num_classes))
    if count is None:
        count = max(4, len(words))
    check_counts(count, seed)
    seeds = range(seed, seed + count)
    if not numbers:
        return [SampleRequest(number) for number in seeds]
    labels_in_turn = zip(seeds, cycle(numbers), strict=False)
    return [SampleRequest(number, label, pipe.class_name(label)) for number, label in labels_in_turn]


def prompt_requests(prompts: Sequence[str], count: int | None, seed: int) -> list[SampleRequest]:
    """Return ``count`` (None: 1) requests per prompt, in order, with seeds from ``seed`` up."""
    if count is None:
        count = 1
    check_counts(count, seed, len(prompts))
    return [
        SampleRequest(seed + index, prompt=prompts[index // count]) for index in range(count * len(prompts))
    ]


def sheet_requests(labels: list[int] | None, names: list[str] | None, count: int) -> list[SampleRequest]:
    """Return a request per clip of a sheet, as ``latte sample`` would make it: they name the files."""
    if labels is not None:
        words = names or [str(label) for label in labels]
        return [SampleRequest(i, labels[i], words[i]) for i in range(count)]
    return [SampleRequest(i, prompt=names[i] if names else None) for i in range(count)]


def check_counts(count: int, seed: int, prompts: int = 1) -> None:
    """Raise InputError for a number of clips or a seed out of range."""
    check(count >= 1, f"--count must be at least 1, got {count}")
    check(
        count * prompts <= MAX_CLIPS,
        f"--count {count} makes {count * prompts:,} clips, but one command generates at most {MAX_CLIPS:,}; "
        "split it, with another --seed each",
    )
    check(0 <= seed < 2**63, f"--seed must be in [0, 2^63), got {seed}")


def split_prompt(argument: str) -> tuple[str, str | None]:
    """Return (model, prompt) of a first argument: a sentence is a prompt for the built-in model, everything
    else is a model.

    A sentence has spaces or Chinese characters and is neither a path nor like one; its full stop is left out,
    because captions have none. InputError for a blank one, and for a path with spaces that does not exist.
    """
    if argument in BUILTIN:
        return argument, None
    if not argument.strip():
        return "builtin", check_prompt(argument, "the prompt")
    if not SENTENCE.search(argument):
        return argument, None
    try:
        exists = Path(argument).exists()
        like_a_path = bool(LIKE_A_PATH.search(argument))
    except (OSError, ValueError):  # longer than a name can be, or with bytes that none can have
        exists = like_a_path = False
    if exists:
        return argument, None
    if like_a_path:
        raise InputError(
            f"MODEL is {shorten(argument)!r}, {why_unknown(Path(argument), False)}; it was read as a path, "
            "because it has a slash or a file ending; give such a sentence with --prompt"
        )
    return "builtin", check_prompt(argument.strip().rstrip(STOPS).strip(), "the prompt")


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
            f"{option} {printable(text[:80])!r} is not valid UTF-8; "
            "give the text in UTF-8, or a file with --prompts"
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
            f"--prompts {name!r} cannot be read ({type(error).__name__}); "
            "give a text file in UTF-8, one prompt per line"
        ) from None
    found = [line for line in lines if line]
    check(bool(found), f"--prompts {name!r} holds no prompt; give a text file with one prompt per line")
    return found


def as_list(name: str, value: Any) -> list[Any] | None:
    """Return one value or several as a list, None as it is; InputError for an empty list."""
    if value is None:
        return None
    if isinstance(value, str | Integral) or not isinstance(value, Iterable):
        return [value]
    values = list(value)
    check(bool(values), f"{name} is empty; pass at least one, or leave it out")
    return values


def repeat(values: list[T] | None, times: int) -> list[T] | None:
    """Repeat each value ``times``, in order; None stays None."""
    return values and [value for value in values for _ in range(times)]


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
    if isinstance(seed, Sequence | np.ndarray):
        check(
            len(seed) == count,
            f"there are {len(seed)} seeds for {count} videos; pass one seed, or one per video",
        )
        return [int(value) for value in seed]
    if seed is not None:
        check(0 <= seed < 2**63 - count, f"seed must be in [0, 2^63), got {seed}")
        return list(range(int(seed), int(seed) + count))
    if isinstance(generator, Sequence):
        check(
            len(generator) == count,
            f"there are {len(generator)} generators for {count} videos; pass one, or one per video",
        )
        return [draw_seed(source) for source in generator]
    return [draw_seed(generator) for _ in range(count)]


def draw_seed(generator: torch.Generator | None) -> int:
    """Return a seed drawn from ``generator``, None: from torch's global one."""
    device = generator.device if generator else torch.device("cpu")
    return int(torch.randint(2**31, (), generator=generator, device=device))


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
        return np.array(image.convert("RGB"))  # a copy, because torch wants writable arrays
    if isinstance(image, Tensor):
        check(image.ndim in (3, 4), f"image has the shape {tuple(image.shape)}; pass a tensor (3 h w)")
        image = image.detach().cpu().movedim(-3, -1).numpy()  # (h w c)
    if not isinstance(image, np.ndarray):
        raise InputError(f"image is a {type(image).__name__}; pass a PIL image, an array, a tensor or a path")
    array = image
    if array.ndim == 4 and len(array) == 1:
        array = array[0]  # (h w c)
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
