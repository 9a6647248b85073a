# SPDX-License-Identifier: Apache-2.0
"""A trained model as the fake side of an evaluation: the format of its clips, and the clips themselves.

It implements ``latte.evaluation.sources.ClipSource``, so that evaluation imports no model code.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from latte.checkpoint.run import latest_checkpoint
from latte.checks import InputError, check
from latte.distributed import ALONE, Group
from latte.inference.pipeline import VideoPipeline
from latte.inference.requests import SampleRequest, class_requests
from latte.interop.load import kind_of_path, resolve
from latte.interop.readers import BUILTIN

MODELS = ("run", "checkpoint", "weights", "pipeline")  # kinds of a path, not of a folder of videos


def is_model(source: str) -> bool:
    """Return whether ``source`` is a model that can generate clips: one of the package, or a folder with
    weights and settings.
    """
    path = Path(source)
    return kind_of_path(path) in MODELS or (source in BUILTIN and not path.exists())


class ModelClips:
    """Clips of a model with its EMA weights: seeds count up from ``seed``, classes alternate."""

    def __init__(self, model: str, device: str = "auto", codec_path: str | None = None, seed: int = 0):
        check(seed >= 0, f"--sample-seed must be at least 0, got {seed}")
        self.model = model
        self.device = device
        self.codec_path = codec_path
        self.seed = seed

    @property
    def name(self) -> str:
        """Return the model's absolute path, so that a replay may start in another folder, or the
        name of one in the package."""
        return str(Path(self.model).absolute()) if Path(self.model).exists() else self.model

    @cached_property
    def pipe(self) -> VideoPipeline:
        """Return the model, loaded at the first use; InputError for a text model, which needs prompts."""
        pipe = VideoPipeline.from_pretrained(
            self.model, dtype="fp32", device=self.device, codec_path=self.codec_path
        )
        if pipe.reader:
            raise InputError(
                f"{pipe.name} generates from text, and latte evaluate has no prompts; generate clips by "
                "latte sample --prompts FILE --out FOLDER and give that folder as FAKE"
            )
        return pipe

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return frames of video, height and width of a clip."""
        return (self.pipe.num_frames, *self.pipe.frame_size())

    def check_length(self, needed: int) -> None:
        """Raise InputError, with the next valid number, when clips of a codec that compresses time have fewer
        than ``needed`` frames.
        """
        compression = self.pipe.codec.compression
        frames = self.pipe.num_frames
        longer = compression.nearest_frames(needed)[-1]
        check(
            frames >= needed or compression.temporal_factor == 1,
            f"{self.pipe.name} generates clips of {frames} frames, but {needed} are needed; generate longer "
            f"ones by latte sample --frames {longer} --out FOLDER and give that folder as FAKE",
        )

    @property
    def interval(self) -> int | None:
        """Return how many video frames lie between two frames of its training clips, None if it is not
        recorded.
        """
        return dict(self.pipe.about.get("data") or {}).get("interval")

    @property
    def step(self) -> int | None:
        """Return the training step of a run or checkpoint, None for weights that do not record it."""
        found = resolve(self.model)
        if found.kind == "run":
            checkpoint = latest_checkpoint(found.path, only={"ema"})
            if checkpoint:
                found = resolve(checkpoint)
        return found.step

    def generate(
        self,
        folder: Path,
        count: int,
        fps: float | None,
        progress: Callable[[int, int], None],
        ranks: Group = ALONE,
    ) -> dict[str, Any]:
        """Generate the clips that are missing in ``folder``, shared by ``ranks``; return fields of the
        manifest's generation group.
        """
        pipe = self.pipe
        config = replace(pipe.sample, fps=fps or pipe.sample.fps)
        facts = {key: value for key, value in config.recorded().items() if key != "batch"}
        facts |= {"weights": pipe.weights, "codec": pipe.codec.fingerprint}
        if pipe.codec.temporal_factor > 1:  # a protocol may use fewer frames than such a clip has
            facts["frames"] = pipe.num_frames

        def batch_progress(number: int, batches: int) -> Callable[[int, int], None]:
            return lambda done, total: progress(number * total + done, batches * total)

        options: dict[str, Any] = {"progress": batch_progress, "config": config, "ranks": ranks}
        pipe.write_clips(self.requests(count), folder, facts=facts, **options)
        num_classes = pipe.model.config.num_classes
        return {
            "step": self.step,
            "weights": "EMA",
            "class_rule": "none" if num_classes is None else "classes in turn",
            "sampling_seed": self.seed,
        }

    def requests(self, count: int) -> list[SampleRequest]:
        """Return one request per clip."""
        return class_requests(self.pipe, None, count, self.seed)
