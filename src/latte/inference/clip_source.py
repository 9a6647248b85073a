# SPDX-License-Identifier: Apache-2.0
"""A trained model as the fake side of an evaluation: the format of its clips, and the clips themselves.

It implements ``latte.evaluation.sources.ClipSource``, so that evaluation imports no model code.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from latte.checkpoint.run import latest_checkpoint
from latte.checks import InputError, check
from latte.inference.outputs import SampleRequest, write_album
from latte.inference.pipeline import Trained, load_trained
from latte.interop.resolve import kind_of_path, resolve

MODELS = ("run", "checkpoint", "weights", "pipeline")  # kinds of a path, not of a folder of videos


def is_model(source: str) -> bool:
    """Return whether ``source`` is a model that can generate clips: 'builtin', or a folder with weights and
    settings.
    """
    path = Path(source)
    return kind_of_path(path) in MODELS or (source == "builtin" and not path.exists())


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
        """Return the model's absolute path, so that a replay may start in another folder, or 'builtin'."""
        return str(Path(self.model).absolute()) if Path(self.model).exists() else self.model

    @cached_property
    def trained(self) -> Trained:
        """Return the model, loaded at the first use; InputError for a text model, which needs prompts."""
        trained = load_trained(self.model, self.device, self.codec_path)
        if trained.reader:
            raise InputError(
                f"{trained.name} generates from text, and latte evaluate has no prompts; generate clips by "
                "latte sample --prompts FILE --out FOLDER and give that folder as FAKE"
            )
        return trained

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return frames, height and width of a clip."""
        return (self.trained.model.config.num_frames, *self.trained.frame_size())

    @property
    def interval(self) -> int | None:
        """Return how many video frames lie between two frames of its training clips, None if it is not
        recorded.
        """
        return dict(self.trained.about.get("data") or {}).get("interval")

    @property
    def step(self) -> int | None:
        """Return the training step of a run or checkpoint, None for weights that do not record it."""
        found = resolve(self.model)
        if found.kind == "run":
            checkpoint = latest_checkpoint(found.path, only={"ema"})
            found = resolve(checkpoint) if checkpoint else found
        return found.step

    def generate(
        self, folder: Path, count: int, fps: float | None, progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Generate the clips that are missing in ``folder``; return fields of the manifest's generation
        group.
        """
        trained = self.trained
        config = replace(trained.sample, fps=fps or trained.sample.fps)
        facts = {key: value for key, value in asdict(config).items() if key != "batch"}
        facts |= {"weights": trained.weights, "codec": trained.codec.fingerprint}
        num_batches = -(-count // config.batch)

        def generate_batch(number: int, part: Sequence[SampleRequest]) -> Iterator[tuple[int, np.ndarray]]:
            labels = [request.label for request in part if request.label is not None]
            seeds = [request.seed for request in part]

            def report(done: int, total: int) -> None:
                progress(number * total + done, num_batches * total)

            return trained.generate(seeds, labels or None, config=config, progress=report)

        write_album(folder, self.requests(count), generate_batch, facts, config.batch, config.fps)
        num_classes = trained.model.config.num_classes
        return {
            "step": self.step,
            "weights": "EMA",
            "class_rule": "none" if num_classes is None else "classes in turn",
            "sampling_seed": self.seed,
        }

    def requests(self, count: int) -> list[SampleRequest]:
        """Return one request per clip."""
        num_classes = self.trained.model.config.num_classes
        requests = []
        for index in range(count):
            label = None if num_classes is None else index % num_classes
            name = None if label is None else self.trained.word(label)
            requests.append(SampleRequest(self.seed + index, label, name))
        return requests
