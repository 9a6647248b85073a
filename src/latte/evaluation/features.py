# SPDX-License-Identifier: Apache-2.0
"""Features of exactly the planned clips, in the plan's order, kept in files that know what they are features of.

A shard's key is the hash of everything its rows depend on: the plan's lines (with the videos' contents), detector, weights, pixels,
frame rule, kind of device. A file with another key, or whose rows are not what was written, is computed anew, so a bank is never stale
and a killed extraction goes on. Processes take consecutive shards, and a row depends on its own clip alone: any number gives one bank.
Axes: n rows, k features, t h w c frames.
"""

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from latte.checks import InputError, RunError
from latte.data.shards import commit
from latte.evaluation.detectors import Detector
from latte.evaluation.plan import SIDES, Plan, PlannedClip
from latte.evaluation.protocols import FrameRule
from latte.evaluation.sources import Side, digest
from latte.files import reported

SHARD = 32  # clips
Open = Callable[[], Detector]
log = logging.getLogger(__name__)


def apply_frame_rule(frames: np.ndarray, rule: FrameRule) -> np.ndarray:
    """uint8 (t h w c) -> uint8 (t size size c): the square, its size and its copy through JPEG as ``rule`` has them."""
    if rule.size is None:
        return frames
    found, (h, w) = [], frames.shape[1:3]
    side, size = min(h, w), rule.size
    box = ((w - side) // 2, (h - side) // 2, (w - side) // 2 + side, (h - side) // 2 + side)
    for frame in frames:
        image = Image.fromarray(frame)
        if rule.order == "crop, resize":
            image = image.crop(box).resize((size, size), Image.Resampling.LANCZOS)
        else:
            width, height = round(w * size / side), round(h * size / side)
            left, top = (width - size) // 2, (height - size) // 2
            image = image.resize((width, height), Image.Resampling.LANCZOS).crop(
                (left, top, left + size, top + size)
            )
        if rule.jpeg is not None:
            copy = io.BytesIO()
            image.save(copy, "JPEG", quality=rule.jpeg, subsampling="4:2:0")
            image = Image.open(copy, formats=("JPEG",))
        found.append(np.asarray(image))
    return np.stack(found)


@dataclass(frozen=True)
class Job:
    """The rows of ``clips``, to be written to ``path`` under ``key``."""

    path: Path
    key: str
    clips: tuple[PlannedClip, ...]


def plan_jobs(plan: Plan, detector: Detector, out: Path) -> list[Job]:
    """SHARD clips to a job, side by side, in the plan's order."""
    facts = [detector.describe(), detector.device.type, asdict(plan.protocol.frame)]
    jobs = []
    for side in SIDES:
        clips = plan.side(side)
        for start in range(0, len(clips), SHARD):
            part = clips[start : start + SHARD]
            key = digest([facts, [clip.line for clip in part]])
            jobs.append(Job(out / "shards" / f"{side}-{start // SHARD:05d}.safetensors", key, part))
    return jobs


def write_rows(path: Path, key: str, features: Tensor) -> None:
    """Features (n k) with their key and their own hash; in whole or not at all."""
    metadata = {
        "latte": json.dumps({"key": key, "rows_sha256": sha256(features.numpy().tobytes()).hexdigest()})
    }
    commit(path, lambda temporary: safetensors.torch.save_file({"features": features}, temporary, metadata))


def read_rows(path: Path, key: str) -> Tensor | None:
    """The features (n k) in ``path`` when it is there, was written under ``key`` and is undamaged; else None, and a word in the log."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            written = json.loads((file.metadata() or {})["latte"])
            features = file.get_tensor("features")
        good = sha256(features.numpy().tobytes()).hexdigest() == written["rows_sha256"]
        if good and written["key"] == key:
            return features
        log.info("%s is %s and is computed anew", path, "of other clips or settings" if good else "damaged")
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        log.info("%s cannot be read (%s) and is computed anew", path, type(error).__name__)
    return None


def extract_rows(clips: Sequence[PlannedClip], side: Side, detector: Detector, rule: FrameRule) -> Tensor:
    """Rows of ``clips`` (n k), float32; frames of one size go through the detector ``detector.group`` at a time."""
    rows = []
    for start in range(0, len(clips), detector.group):
        part = [
            apply_frame_rule(side.read(clip.id, clip.indices), rule)
            for clip in clips[start : start + detector.group]
        ]
        alike = len({frames.shape for frames in part}) == 1
        rows += [detector(np.stack(part))] if alike else [detector(frames[None]) for frames in part]
    return torch.cat(rows)


def work(jobs: Sequence[Job], sides: Mapping[str, Side], detector: Detector, rule: FrameRule) -> None:
    """Do ``jobs`` one after the other."""
    for done, job in enumerate(jobs, start=1):
        write_rows(job.path, job.key, extract_rows(job.clips, sides[job.clips[0].side], detector, rule))
        log.info("extract: %s of %s parts", done, len(jobs))


def work_elsewhere(
    jobs: Sequence[Job], sides: Mapping[str, Side], open_detector: Open, rule: FrameRule, threads: int
) -> str | None:
    """``work`` in a process of its own; what is the user's to mend comes back as text."""
    torch.set_num_threads(threads)
    try:
        work(jobs, sides, open_detector(), rule)
    except InputError as error:
        return str(error)
    return None


def extract(
    plan: Plan,
    sides: Mapping[str, Side],
    detector: Detector,
    open_detector: Open,
    out: Path,
    processes: int = 1,
) -> dict[str, Tensor]:
    """The banks {"real": (n k), "fake": (m k)} of ``plan``, also written to out/real.safetensors and out/fake.safetensors.

    ``open_detector`` builds the same detector again in each of ``processes``; InputError for a clip that can no longer be read.
    """
    jobs = plan_jobs(plan, detector, out)
    whole = {side: digest([job.key for job in jobs if job.clips[0].side == side]) for side in SIDES}
    banks = {side: read_rows(out / f"{side}.safetensors", whole[side]) for side in SIDES}
    wanted = [job for job in jobs if banks[job.clips[0].side] is None]
    missing = [job for job in wanted if read_rows(job.path, job.key) is None]
    if processes == 1 or len(missing) < 2:
        work(missing, sides, detector, plan.protocol.frame)
    else:
        parts = [
            missing[len(missing) * i // processes : len(missing) * (i + 1) // processes]
            for i in range(processes)
        ]
        rest = sides, open_detector, plan.protocol.frame, torch.get_num_threads()
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            told = [
                future.result()
                for future in [pool.submit(work_elsewhere, part, *rest) for part in parts if part]
            ]
        for message in filter(None, told):
            raise InputError(message)
    found = {}
    for side in SIDES:
        bank = banks[side]
        if bank is None:
            bank = _join([job for job in jobs if job.clips[0].side == side])
            write_rows(out / f"{side}.safetensors", whole[side], bank)
        found[side] = bank
    with reported("the bank", out):
        for job in wanted:
            job.path.unlink(missing_ok=True)
    return found


def _join(jobs: Sequence[Job]) -> Tensor:
    parts = [read_rows(job.path, job.key) for job in jobs]
    if any(part is None for part in parts):
        raise RunError(
            f"a part of {jobs[0].path.parent} vanished or was damaged while it was used; run the same command again"
        )
    return torch.cat([part for part in parts if part is not None])
