# SPDX-License-Identifier: Apache-2.0
"""Clips for the page: checked requests, loaded models, and the folder of outputs with the command of each.

Axes: b clips, t frames, h height, w width, c channels.
"""

import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latte.checks import InputError, check, check_name, choose, command_line
from latte.diffusion.config import SAMPLERS
from latte.files import commit_file, reported
from latte.inference.quality import QUALITIES
from latte.ui.desk import Job
from latte.ui.shelf import Shelf

if TYPE_CHECKING:
    import numpy as np

    from latte.inference.pipeline import VideoPipeline

MAX_LOADED = 2  # models in memory
MAX_PROMPT = 1000
MAX_STEPS = 1000
MAX_COUNT = 4
MAX_IMAGE_BYTES = 8 << 20
MAX_IMAGE_PIXELS = 24_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
OUTPUT = re.compile(r"[0-9a-f]{24}\.(mp4|json|png)")


@dataclass(frozen=True)
class ClipSettings:
    """What decides a clip, as the page asks for it; InputError on construction for values out of range."""

    model: str
    condition: str = ""  # the prompt of a text model, the class of a class model
    negative: str = ""
    quality: str | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    first: str | None = None  # file of the first frame in the folder of outputs

    def __post_init__(self) -> None:
        for field, text in (("the prompt", self.condition), ("the negative prompt", self.negative)):
            check(len(text) <= MAX_PROMPT, f"{field} has {len(text)} characters; give at most {MAX_PROMPT}")
        for field, name, table in (("quality", self.quality, QUALITIES), ("sampler", self.sampler, SAMPLERS)):
            if name is not None:
                check_name(field, name, table)
        steps = self.steps
        check(steps is None or 1 <= steps <= MAX_STEPS, f"steps must be in [1, {MAX_STEPS}], got {steps}")
        scale = self.guidance
        check(scale is None or 0 <= scale <= 50, f"guidance must be in [0, 50], got {scale}")

    def command(self, shelf: Shelf, text: bool, seed: int, label: int | None) -> str:
        """Return the line that generates this clip of ``seed`` outside the page."""
        out = shelf.config.out
        own = {"--negative": self.negative or None, "--quality": self.quality, "--sampler": self.sampler}
        own |= {"--steps": self.steps, "--guidance": self.guidance}
        own |= {"--first": self.first and out / self.first}
        own |= {
            option: value
            for option, value in (("--device", shelf.config.device), ("--dtype", shelf.config.dtype))
            if value != "auto"
        }
        if text:
            own = {"--prompt": self.condition, **own}
        elif label is not None:
            own = {"--labels": self.condition, **own}
            if not plain(self.condition):
                own["--labels"] = label
        words = [word for option, value in own.items() if value is not None for word in (option, value)]
        source = choose("model", self.model, shelf.models())
        return command_line("sample", source, "--count", 1, "--seed", seed, *words)


def plain(name: str) -> bool:
    """Return whether --labels reads ``name`` as it is."""
    return "," not in name and name == name.strip()


@dataclass(frozen=True)
class Output:
    """A clip in the folder of outputs: its random id, what decided it, and the command that repeats it."""

    id: str
    settings: ClipSettings
    seed: int
    command: str
    seconds: float
    made: float

    @property
    def file(self) -> str:
        """Return the name of the mp4 file."""
        return f"{self.id}.mp4"


class Studio:
    """Models and outputs. Only the thread of the desk generates."""

    def __init__(self, shelf: Shelf):
        self.shelf = shelf
        self.loaded: OrderedDict[tuple[str, str], VideoPipeline] = OrderedDict()

    def pipeline(self, name: str) -> "VideoPipeline":
        """Return the model called ``name``, of a run with its newest weights; the last ones stay loaded."""
        from latte.checkpoint.run import list_checkpoints
        from latte.inference.pipeline import VideoPipeline

        source = choose("model", name, self.shelf.models())
        checkpoints = ["", *map(str, list_checkpoints(Path(source)))]
        key = (source, checkpoints[-1])
        if key not in self.loaded:
            for old in [old for old in self.loaded if old[0] == source]:
                del self.loaded[old]
            while len(self.loaded) >= MAX_LOADED:
                self.loaded.popitem(last=False)
            config = self.shelf.config
            self.loaded[key] = VideoPipeline.from_pretrained(source, device=config.device, dtype=config.dtype)
        self.loaded.move_to_end(key)
        return self.loaded[key]

    def describe(self, job: Job, name: str) -> dict[str, Any]:
        """Return what the page shows of a model: whether it reads text, its classes and its settings."""
        from latte.inference.preview import preview_of

        pipe = self.pipeline(name)
        preview_of(pipe.codec)
        count = 0 if pipe.reader else pipe.model.config.num_classes or 0
        classes = [pipe.class_name(number) for number in range(count)]
        height, width = pipe.frame_size()
        about = f"{pipe.num_frames} frames of {width} x {height}, {pipe.sample.fps:g} fps"
        own = pipe.sample
        about += f"; by default {own.steps} steps of {own.sampler}, guidance {own.guidance:g}"
        return {"text": pipe.reader is not None, "classes": classes, "about": about}

    def make(self, job: Job, settings: ClipSettings, seed: int, done: int = 0, of: int = 1) -> Output:
        """Generate a clip, with a preview after each step, and write it; the command gives the same clip."""
        pipe = self.pipeline(settings.model)
        began = time.monotonic()
        label = None
        conditions: dict[str, Any] = {"class_labels": None}
        if pipe.reader:
            check(bool(settings.condition.strip()), "the prompt is empty; describe what the clip shall show")
            conditions = {"prompt": settings.condition, "negative_prompt": settings.negative or None}
        elif pipe.model.config.num_classes is not None:
            label = pipe.label(settings.condition)
            conditions = {"class_labels": label}
        chosen = {"quality": settings.quality, "sampler": settings.sampler, "batch_size": 1}
        chosen = {key: value for key, value in chosen.items() if value is not None}
        steps = pipe.settings(settings.quality, steps=settings.steps, sampler=settings.sampler).steps
        steps = steps if isinstance(steps, int) else 0

        def after_step(_: Any, step: int, __: int, shown: dict[str, Any]) -> None:
            job.report(done * steps + step + 1, of * steps, shown["preview"][0])

        job.report(done * steps, of * steps)
        video = pipe(
            **conditions,
            seed=seed,
            image=settings.first and self.shelf.config.out / settings.first,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            callback_on_step_end=after_step,
            preview=True,
            output_type="uint8",
            **chosen,
        ).frames[0]
        command = settings.command(self.shelf, pipe.reader is not None, seed, label)
        output = Output(new_id(), settings, seed, command, round(time.monotonic() - began, 2), time.time())
        return self.write(output, video, pipe.sample.fps)

    def write(self, output: Output, video: "np.ndarray", fps: float) -> Output:
        """Write a clip and its record into the folder of outputs, from which what is too old is removed."""
        from latte.data.media import write_mp4

        folder = self.shelf.config.out
        self.sweep()
        with reported("the clip", folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_mp4(folder / output.file, video, fps)
        commit_file(folder / f"{output.id}.json", json.dumps(asdict(output)) + "\n")
        return output

    def sweep(self) -> None:
        """Delete our files in the folder of outputs that are older than the age limit."""
        oldest = time.time() - 3600 * self.shelf.config.keep_hours
        for path in self.files():
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)

    def files(self) -> Iterator[Path]:
        """Yield our own files in the folder of outputs."""
        folder = self.shelf.config.out
        if folder.is_dir():
            yield from (path for path in folder.iterdir() if OUTPUT.fullmatch(path.name) and path.is_file())

    def outputs(self) -> list[Output]:
        """Return the clips that are there, newest first."""
        self.sweep()
        found = []
        for path in self.files():
            if path.suffix != ".json" or not path.with_suffix(".mp4").is_file():
                continue
            try:
                values = json.loads(path.read_text("utf-8"))
                settings = ClipSettings(**values.pop("settings"))
                found.append(Output(settings=settings, **values))
            except (OSError, ValueError, TypeError, AttributeError):
                continue  # of another version, or just deleted
        return sorted(found, key=lambda output: -output.made)

    def keep_image(self, path: str | None) -> str | None:
        """Decode an uploaded image and store it as a PNG file in the folder of outputs; return its name."""
        if path is None:
            return None
        image = decode_image(Path(path))
        folder = self.shelf.config.out
        with reported("the first frame", folder):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{new_id()}.png"
            commit_file(folder / name, lambda temporary: image.save(temporary, format="PNG"))
        return name


def decode_image(path: Path) -> Any:
    """Return an uploaded image in RGB; InputError unless it is one, of a common format and a sane size."""
    from PIL import Image, ImageOps

    size = path.stat().st_size
    check(size <= MAX_IMAGE_BYTES, f"the image has {size:,} bytes; give one of at most {MAX_IMAGE_BYTES:,}")
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
            check(
                0 < pixels <= MAX_IMAGE_PIXELS,
                f"the image is {image.width} x {image.height}; give one of at most {MAX_IMAGE_PIXELS:,} "
                "pixels",
            )
            return ImageOps.exif_transpose(image).convert("RGB")
    except InputError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise InputError(
            f"the upload is not a picture that can be read ({type(error).__name__}); give a PNG, JPEG or "
            "WebP file"
        ) from None


def new_id() -> str:
    """Return a random name of 24 hexadecimal digits."""
    return secrets.token_hex(12)


def difference(first: Path, second: Path) -> float | None:
    """Return the mean absolute difference of two clips in levels of 255; None for other shapes."""
    from latte.data.media import probe, read_frames

    one, other = (read_frames(info, range(info.frames)) for info in (probe(first), probe(second)))
    if one.shape != other.shape:
        return None
    return float(abs(one.astype("float32") - other.astype("float32")).mean())


def seeds(start: int, count: int) -> range:
    """Return ``count`` seeds from ``start`` up; InputError for values out of range."""
    check(0 <= start < 2**31, f"the seed must be in [0, 2^31), got {start}")
    check(1 <= count <= MAX_COUNT, f"the number of clips must be in [1, {MAX_COUNT}], got {count}")
    return range(start, start + count)


def whole(field: str, value: Any) -> int:
    """Return a number of the page as an int; InputError for a fraction and for no number."""
    check(
        isinstance(value, int | float) and float(value).is_integer() and abs(value) < 2**53,
        f"{field} must be a whole number, got {str(value)[:20]}",
    )
    return int(value)
