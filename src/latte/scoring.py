# SPDX-License-Identifier: Apache-2.0
"""Scores of a run while it trains: clips of the EMA weights against the clips that it trains on.

Any protocol of ``latte evaluate``. Plan, detector and seeds are the same at every step, so that the curve
shows the model alone; what cannot be scored is refused before the run. ``scores/step-N/`` of the run folder
holds manifest and page, generated clips are removed after they were scored.
"""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from latte.autoencoder.codec import Codec
from latte.checks import InputError, check
from latte.config.run import RunConfig
from latte.data.captions import CaptionFeatures
from latte.data.clips import to_uint8
from latte.data.datasets import Dataset
from latte.data.hold_out import Subset, keys_of
from latte.data.order import first_items
from latte.data.writers import write_mp4
from latte.evaluation.detectors import build_detector
from latte.evaluation.evaluate import (
    EvaluateConfig,
    detector_opener,
    generate_side,
    plan_sides,
    preview_plan,
    score_features,
    write_plan,
)
from latte.evaluation.features import extract
from latte.evaluation.memorisation import Unseen, choose_held_out
from latte.evaluation.metrics import METRICS
from latte.evaluation.plan import SIDES
from latte.evaluation.sources import FolderSide, Side, open_side
from latte.inference.pipeline import VideoPipeline
from latte.inference.prompts import PromptReader
from latte.inference.requests import SampleRequest, class_requests
from latte.runtime import generator, resolve_dtype

LOG = logging.getLogger(__name__)
FOLDER = "scores"  # in the run folder


@dataclass(frozen=True)
class LiveClips:
    """The EMA model of a run as the fake side; see ``latte.evaluation.sources.ClipSource``."""

    name: str
    pipe: VideoPipeline
    step: int
    interval: int | None
    captions: tuple[str, ...] = ()  # of a text model
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames of video, height and width of a clip."""
        return (self.pipe.num_frames, *self.pipe.frame_size())

    def requests(self, count: int) -> list[SampleRequest]:
        """Return a request per clip: seeds count up, classes or captions alternate."""
        if not self.captions:
            return class_requests(self.pipe, None, count, self.seed)
        prompts = [self.captions[index % len(self.captions)] for index in range(count)]
        return [SampleRequest(self.seed + index, prompt=prompt) for index, prompt in enumerate(prompts)]

    def generate(
        self, folder: Path, count: int, fps: float | None, progress: Callable[[int, int], None]
    ) -> dict[str, Any]:
        """Generate the clips into ``folder``; return fields of the manifest's generation group."""
        config = replace(self.pipe.sample, fps=fps or self.pipe.sample.fps)
        facts = {"step": self.step, **config.recorded()}

        def batch_progress(number: int, batches: int) -> Callable[[int, int], None]:
            return lambda done, total: progress(number * total + done, batches * total)

        self.pipe.write_clips(
            self.requests(count), folder, facts=facts, progress=batch_progress, config=config
        )
        rule = "captions in turn" if self.captions else "classes in turn"
        return {"step": self.step, "weights": "EMA", "class_rule": rule, "sampling_seed": self.seed}


class Scorer:
    """``scorer(ema_model, step)`` returns {score/NAME: value} of ``train.score_protocol``.

    InputError on construction for a protocol that these data or this model do not fit.
    """

    def __init__(
        self,
        config: RunConfig,
        model: Any,
        dataset: Dataset,
        codec: Codec,
        captions: CaptionFeatures | None,
        held_out: Dataset | None = None,
    ):
        self.config = config
        self.folder = Path(config.run.dir or "runs/unnamed") / FOLDER
        self.dataset = dataset
        self.codec = codec
        self.captions = captions
        train = config.train
        self.settings = EvaluateConfig(
            train.score_protocol, clips=train.score_clips, device=str(codec.device), allow_mixed=True
        )
        protocol = self.settings.chosen_protocol
        self.higher_is_better = not METRICS[protocol.metrics[0]].is_distance
        self.real = self._real_side(dataset, protocol.clips, "real")
        self.open_detector = detector_opener(build_detector, self.settings)
        plan = preview_plan(self.real, self._clips(model, 0), self.settings)
        self.unseen: Unseen | None = None
        if held_out is not None:
            side = self._real_side(held_out, min(protocol.clips, len(held_out)), "held-out")
            try:
                self.unseen = choose_held_out(side, self.real, plan.protocol, self.settings.seed)
            except InputError as error:
                LOG.warning("memorisation is not measured: %s", error)
        self.open_detector().check_length(plan.protocol.frames)

    def _real_side(self, dataset: Dataset, count: int, name: str) -> Side:
        """Return the clips of ``dataset``; procedural ones are written first, ``count`` of them."""
        whole = dataset.dataset if isinstance(dataset, Subset) else dataset
        keys = keys_of(whole)
        root = self.config.data.root
        if not keys or root is None:
            written = write_real(dataset, self.folder / name, count)
            return open_side(name, written, self.folder / "probes")
        codec_path, device = self.config.codec.path, str(self.codec.device)
        side = open_side(name, root, self.folder / "probes", codec_path, device)
        if isinstance(dataset, Subset) and isinstance(side, FolderSide):
            used = {keys[index] for index in dataset.indices}
            side = replace(side, sources=tuple(source for source in side.sources if source.id in used))
        return side

    def _clips(self, model: Any, step: int) -> LiveClips:
        """Return the clips that ``model`` will generate."""
        config = self.config
        pipe = VideoPipeline(
            f"step {step}",
            model,
            config.diffusion,
            config.codec,
            self.codec,
            list(self.dataset.classes),
            config.sample,
            f"step {step}",
        )
        pipe.dtype = resolve_dtype(config.train.dtype, self.codec.device)
        captions: tuple[str, ...] = ()
        if self.captions is not None:
            pipe.reader = PromptReader(config.text, self.codec.device, self.captions.fingerprint)
            pipe.reader.known = self.captions
            captions = tuple(self.dataset.captions)
        interval = config.data.interval if config.data.root else None
        return LiveClips(str(self.folder.parent), pipe, step, interval, captions)

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Generate clips of ``model`` and score them; only manifest and page are kept."""
        started = time.monotonic()
        out = self.folder / f"step-{step:07d}"
        shutil.rmtree(out, ignore_errors=True)
        clips = self._clips(model, step)
        detector = self.open_detector()
        fake, generation = generate_side(
            self.real, clips, preview_plan(self.real, clips, self.settings), out, None
        )
        sides = {"real": self.real, "fake": fake}
        plan = plan_sides(sides, self.settings)
        write_plan(plan, out)
        kept = self.folder / "features"  # of the real side, which are the same at every step
        features = extract(plan, sides, detector, self.open_detector, out, 1, kept)
        held_out = self.unseen and self.unseen.read(detector, plan.protocol.frame, kept)
        replay = {"model": clips.name, "sample_seed": clips.seed, "codec_path": self.config.codec.path}
        replay |= {"real": self.real.root, "fake": fake.root, "config": asdict(self.settings)}
        result = score_features(
            plan,
            sides,
            features,
            detector,
            out,
            notes={**{side: {"split": None, "version": None} for side in SIDES}, "generation": generation},
            run={"processes": 1, "wall_seconds": round(time.monotonic() - started, 3)},
            replay=replay,
            held_out=held_out,
        )
        for name in ("samples", "shards", "probes"):
            shutil.rmtree(out / name, ignore_errors=True)
        found = {f"score/{name}": float(value) for name, value in result["values"].items()}
        if held_out:
            found["score/memorisation"] = float(result["memorisation"]["relative"]["value"])
        return found


def write_real(dataset: Dataset, folder: Path, count: int) -> Path:
    """Write ``count`` clips of a dataset without files as mp4; those that are there already are kept."""
    check(
        len(dataset) >= count,
        f"train.score_clips: {count} clips are scored, but the data have {len(dataset)}; set "
        f"train.score_clips={len(dataset)} or less",
    )
    folder.mkdir(parents=True, exist_ok=True)
    for index, item in enumerate(first_items(dataset, count)):
        path = folder / f"{index:06d}.mp4"
        if not path.exists():
            clip = dataset.clip(item, generator("score", folder.name, index))
            write_mp4(path, np.asarray(to_uint8(clip.video)))
    return folder
