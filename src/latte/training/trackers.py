# SPDX-License-Identifier: Apache-2.0
"""Experiment trackers as callbacks: TensorBoard, Weights & Biases and trackio, by ``train.trackers``.

A tracker gets every line of metrics, the held-out loss, scores and samples. One that is not installed or
cannot be opened is refused before the first step; one that fails later says so once, and training continues
without it. To add one: a class with the methods of ``Writer`` and an entry in ``config.TRACKERS``.
"""

import os
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from latte.checks import InputError, choose
from latte.files import commit_file
from latte.training.callbacks import Callback, TrainEvent
from latte.training.config import TRACKERS as TRACKERS

PROJECT = "latte"  # of Weights & Biases and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT says otherwise
ID_FILE = "tracker_id.txt"  # in the run folder
VIDEO_SUFFIX = ".mp4"


class Writer(Protocol):
    """What a tracker does with numbers and files."""

    package: ClassVar[str]  # what must be installed
    start_advice: ClassVar[str]  # what to do when it cannot be opened

    def __init__(self, event: TrainEvent): ...

    @classmethod
    def load(cls) -> None:
        """Import the package; ImportError without it."""
        ...

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, by names such as train/loss."""
        ...

    def media(self, step: int, name: str, path: Path) -> None:
        """Write a picture (.png) or a video (.mp4)."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder."""

    package: ClassVar[str] = "tensorboard"
    start_advice: ClassVar[str] = "make the run folder writable"

    def __init__(self, event: TrainEvent):
        from torch.utils.tensorboard import SummaryWriter

        folder = event.run_dir / "tensorboard"
        self.writer = SummaryWriter(str(folder), purge_step=event.step + 1)  # hides what is written again

    @classmethod
    def load(cls) -> None:
        """See Writer."""
        import torch.utils.tensorboard  # noqa: F401

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """See Writer."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def media(self, step: int, name: str, path: Path) -> None:
        """See Writer; a video is shown as an animated picture, which is all that TensorBoard plays."""
        import numpy as np
        from PIL import Image

        if path.suffix != VIDEO_SUFFIX:
            with Image.open(path) as picture:
                self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            return
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports]

        encoded, (height, width) = as_gif(path)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
        assert self.writer.file_writer is not None
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        self.writer.flush()

    def close(self) -> None:
        """See Writer."""
        self.writer.close()


class RunOfProject:
    """What Weights & Biases and trackio have in common: the package's module, and what logs into the run.
    Abstract.
    """

    module: Any
    run: Any

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """See Writer."""
        self.run.log(dict(values), step=step)

    def media(self, step: int, name: str, path: Path) -> None:
        """See Writer."""
        kind = self.module.Video if path.suffix == VIDEO_SUFFIX else self.module.Image
        self.run.log({name: kind(str(path))}, step=step)

    def close(self) -> None:
        """See Writer."""
        self.run.finish()


class WeightsAndBiases(RunOfProject):
    """A run of the project in WANDB_PROJECT, or "latte"; WANDB_MODE=offline works without network."""

    package: ClassVar[str] = "wandb"
    start_advice: ClassVar[str] = "run wandb login, or set WANDB_MODE=offline"

    def __init__(self, event: TrainEvent):
        import wandb  # pyright: ignore[reportMissingImports]

        self.module = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=event.run_dir.resolve().name,
            id=run_id(event),
            resume="allow",
            dir=str(event.run_dir),
            config=dict(event.record),
        )

    @classmethod
    def load(cls) -> None:
        """See Writer."""
        import wandb  # pyright: ignore[reportMissingImports] # noqa: F401


class Trackio(RunOfProject):
    """A run of the project in TRACKIO_PROJECT, or "latte"; stored on this machine."""

    package: ClassVar[str] = "trackio"
    start_advice: ClassVar[str] = "make its folder (TRACKIO_DIR) writable"

    def __init__(self, event: TrainEvent):
        import trackio  # pyright: ignore[reportMissingImports]

        self.module = trackio
        self.run = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{event.run_dir.resolve().name}-{run_id(event)}",
            resume="allow",
            config=dict(event.record),
        )

    @classmethod
    def load(cls) -> None:
        """See Writer."""
        import trackio  # pyright: ignore[reportMissingImports] # noqa: F401


class Tracker(Callback):
    """Passes what happens in a run to the tracker ``name`` of TRACKERS.

    ``on_start`` raises InputError when it cannot be opened. A later error is printed once, and the tracker
    gets nothing more.
    """

    def __init__(self, name: str):
        self.name = name
        self.writer: Writer | None = None

    def on_start(self, event: TrainEvent) -> None:
        """Open the tracker."""
        kind = TRACKERS[self.name]
        try:
            self.writer = kind(event)
        except Exception as error:
            raise InputError(
                f"train.trackers: {self.name} could not be started ({one_line(error)}); {kind.start_advice}, "
                f"or leave it out"
            ) from error

    def on_step(self, event: TrainEvent) -> None:
        """Write the line of metrics, if this step has one."""
        if event.metrics is None:
            return
        values = {f"train/{name}": value for name, value in event.metrics.items() if name != "step"}
        self.write(event, "numbers", {**values, "train/memory_gib": peak_memory(event) / 2**30})

    def on_validation(self, event: TrainEvent, metrics: Mapping[str, float]) -> None:
        """Write the held-out loss or the scores."""
        self.write(event, "numbers", {name: value for name, value in metrics.items() if name != "step"})

    def on_samples(self, event: TrainEvent, paths: Sequence[Path]) -> None:
        """Write sheets and clips, each under a name that stays the same from step to step."""
        for path in paths:
            self.write(event, "media", f"samples/{media_name(path, event.step)}", path)

    def on_end(self, event: TrainEvent) -> None:
        """Close the tracker."""
        writer = self.writer
        if writer:
            self.guarded(event, writer.close)
        self.writer = None

    def write(self, event: TrainEvent, method: str, *arguments: Any) -> None:
        """Call a method of the writer with the step and ``arguments``."""
        if self.writer:
            self.guarded(event, getattr(self.writer, method), event.step, *arguments)

    def guarded(self, event: TrainEvent, function: Any, *arguments: Any) -> None:
        """Call ``function``; print its error and give the tracker up."""
        try:
            function(*arguments)
        except Exception as error:
            self.writer = None
            print(
                f"warning: {self.name} failed at step {event.step} ({one_line(error)}); training continues "
                "without it, and metrics.jsonl has all numbers",
                file=sys.stderr,
            )


def check_trackers(names: Sequence[str]) -> None:
    """InputError for a tracker whose package is not installed."""
    for name in names:
        kind = choose("train.trackers", name, TRACKERS)
        try:
            kind.load()
        except ImportError as error:
            raise InputError(
                f"train.trackers has {name}, but the package {kind.package} cannot be imported ({error}); "
                f"run pip install {kind.package}, or leave {name} out"
            ) from None


def run_id(event: TrainEvent) -> str:
    """Return a random name that stays with the run folder, so that a resumed run continues its curves."""
    path = event.run_dir / ID_FILE
    if event.step == 0 or not path.is_file():
        commit_file(path, uuid.uuid4().hex[:12])
    return path.read_text("utf-8").strip()


def media_name(path: Path, step: int) -> str:
    """Return the name of a file of samples without its step: samples/step-0000100/7.mp4 gives 7, and
    samples/step-0000100-ema-0.05/7.mp4 gives ema-0.05/7.
    """
    start = f"step-{step:07d}"
    is_sheet = path.stem.startswith(start)
    weights = ""
    for holder in (path.stem, path.parent.name):
        if holder.startswith(start):
            weights = holder.removeprefix(f"{start}-").removeprefix(start)
    name = "sheet" if is_sheet else path.stem
    return f"{weights}/{name}" if weights else name


def one_line(error: BaseException) -> str:
    """Return the kind and the first line of an error."""
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first])[:200]


def peak_memory(event: TrainEvent) -> int:
    """Return the largest number of bytes that the run has held so far: of the GPU, or of the process."""
    device = next(event.model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def as_gif(path: Path) -> tuple[bytes, tuple[int, int]]:
    """Return the frames of a video as an animated GIF, and their (height, width)."""
    from latte.data.media import probe, read_frames
    from latte.data.writers import write_gif

    info = probe(path)
    frames = read_frames(info, range(info.frames))  # (f H W 3)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "clip.gif")
        write_gif(target, frames, info.fps or 8)
        return target.read_bytes(), (frames.shape[1], frames.shape[2])
