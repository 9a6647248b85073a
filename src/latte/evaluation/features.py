# SPDX-License-Identifier: Apache-2.0
"""Features of exactly the planned clips, in the plan's order, in files that record what they are features of.

A shard's key is the hash of everything its rows depend on: the plan's lines (with the videos' contents),
detector, weights, pixels, frame rule, kind of device. A file with another key, or whose rows are not what was
written, is computed anew, so features are never stale and a killed extraction resumes. Processes take
consecutive shards, and a row depends on its own clip alone: any number of processes gives the same features.
Both sides can be kept in a folder of the user, under a key that also holds the code and the libraries, for
every later score of the same clips; generated ones apart, so that they do not displace real ones.
Axes: n rows, k features, t h w c frames.
"""

import io
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from latte.checks import InputError, RunError, duration, printable
from latte.distributed import ALONE, Group
from latte.evaluation.detectors import Detector
from latte.evaluation.plan import SIDES, Plan, PlannedClip
from latte.evaluation.protocols import FrameRule
from latte.evaluation.sources import Side, digest
from latte.files import commit_file, keep_newest, reported, source_sha256

SHARD = 32  # clips
KEPT = 64  # files of features of a side
AHEAD = 2  # clips that each worker decodes ahead of their use
REPORT_SECONDS = 10.0  # least time between two progress lines
OpenDetector = Callable[[], Detector]
log = logging.getLogger(__name__)


def log_progress(stage: str, unit: str, clips: int) -> Callable[[int, int], None]:
    """Return ``progress(done, total)``, which logs what is done, how many of ``clips`` a second and the time
    left, every REPORT_SECONDS and at the end.
    """
    started = time.monotonic()
    last = started

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < REPORT_SECONDS:
            return
        last = now
        spent = max(now - started, 1e-9)
        speed = f"{clips * done / total / spent:.3g} clips/s"
        left = duration(spent / max(done, 1) * (total - done))
        log.info("%s: %s of %s %s, %s, about %s left", stage, done, total, unit, speed, left)

    return progress


def apply_frame_rule(frames: np.ndarray, rule: FrameRule) -> np.ndarray:
    """Return frames uint8 (t h w c), cropped, resized to (t size size c) and copied through JPEG as ``rule``
    says.
    """
    if rule.size is None:
        return frames
    h, w = frames.shape[1:3]
    size = rule.size
    side = min(h, w)
    left, top = (w - side) // 2, (h - side) // 2
    width, height = round(w * size / side), round(h * size / side)
    resized_left, resized_top = (width - size) // 2, (height - size) // 2
    found = []
    for frame in frames:
        image = Image.fromarray(frame)
        if rule.order == "crop, resize":
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        else:
            image = image.resize((width, height), Image.Resampling.LANCZOS)
            image = image.crop((resized_left, resized_top, resized_left + size, resized_top + size))
        if rule.jpeg is not None:
            copy = io.BytesIO()
            image.save(copy, "JPEG", quality=rule.jpeg, subsampling="4:2:0")
            image = Image.open(copy, formats=("JPEG",))
        found.append(np.asarray(image))
    return np.stack(found)  # (t size size c)


@dataclass(frozen=True)
class Job:
    """The rows of ``clips``, to be written to ``path`` under ``key``."""

    path: Path
    key: str
    clips: tuple[PlannedClip, ...]


def plan_jobs(plan: Plan, detector: Detector, out: Path) -> list[Job]:
    """Return jobs of SHARD clips, side by side, in the plan's order."""
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
    """Write features (n k) with their key and their own hash, atomically."""
    written = {"key": key, "rows_sha256": sha256(features.numpy().tobytes()).hexdigest()}
    metadata = {"latte": json.dumps(written)}
    with reported("the features", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        commit_file(path, lambda name: safetensors.torch.save_file({"features": features}, name, metadata))


def read_rows(path: Path, key: str) -> Tensor | None:
    """Return the features (n k) in ``path`` if it was written under ``key`` and is intact; else None, and log
    why.
    """
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            written = json.loads((file.metadata() or {})["latte"])
            features = file.get_tensor("features")
        intact = sha256(features.numpy().tobytes()).hexdigest() == written["rows_sha256"]
        if intact and written["key"] == key:
            return features
        reason = "of other clips or settings" if intact else "damaged"
        log.info("%s is %s and is computed again", path, reason)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        log.info("%s cannot be read (%s) and is computed again", path, type(error).__name__)
    return None


def extract_rows(clips: Sequence[PlannedClip], video: Iterator[np.ndarray], detector: Detector) -> Tensor:
    """Return the rows of ``clips``, float32 (n k), whose frames ``video`` yields; frames of one size go
    through the detector ``group`` at a time.

    InputError naming the clip whose features have NaN or Inf.
    """
    rows = []
    for start in range(0, len(clips), detector.group):
        group = clips[start : start + detector.group]
        frames = list(islice(video, len(group)))
        one_size = len({part.shape for part in frames}) == 1
        batches = [np.stack(frames)] if one_size else [part[None] for part in frames]
        features = torch.cat([detector(batch) for batch in batches])
        refuse_nonfinite(features, group)
        rows.append(features)
    return torch.cat(rows)


def read_clips(
    clips: Sequence[PlannedClip], sides: Mapping[str, Side], rule: FrameRule, workers: int = 0
) -> Generator[np.ndarray]:
    """Yield the frames of ``clips`` in order, uint8 (t h w c), after ``rule``, decoded by ``workers``
    processes ahead of their use; 0: by this one. The frames are the same.
    """
    if not workers:
        for clip in clips:
            yield apply_frame_rule(sides[clip.side].read(clip.id, clip.indices), rule)
        return
    settings = (dict(sides), rule, torch.get_num_threads())
    with ProcessPoolExecutor(workers, get_context("spawn"), Reader.set_up, settings) as pool:
        waiting: deque[Future[np.ndarray | str]] = deque()
        try:
            for index in range(len(clips) + AHEAD * workers):
                if index < len(clips):
                    waiting.append(pool.submit(Reader.read, clips[index]))
                if index >= AHEAD * workers and waiting:
                    frames = waiting.popleft().result()
                    if isinstance(frames, str):
                        raise InputError(frames)
                    yield frames
        finally:
            for future in waiting:
                future.cancel()


class Reader:
    """What a worker process reads clips from."""

    sides: ClassVar[Mapping[str, Side]]
    rule: ClassVar[FrameRule]

    @classmethod
    def set_up(cls, sides: Mapping[str, Side], rule: FrameRule, threads: int) -> None:
        """Keep the sides in this process; ``threads`` are those of the parent: the same bits."""
        cls.sides = sides
        cls.rule = rule
        torch.set_num_threads(threads)

    @classmethod
    def read(cls, clip: PlannedClip) -> np.ndarray | str:
        """Return the frames of a clip, or the message of an InputError."""
        try:
            return apply_frame_rule(cls.sides[clip.side].read(clip.id, clip.indices), cls.rule)
        except InputError as error:
            return str(error)


def refuse_nonfinite(features: Tensor, clips: Sequence[PlannedClip]) -> None:
    """InputError naming the first of ``clips`` whose rows of ``features`` (n k) have NaN or Inf."""
    finite = torch.isfinite(features).all(1).reshape(len(clips), -1).all(1)  # (clips,)
    if finite.all():
        return
    clip = clips[int((~finite).nonzero()[0])]
    raise InputError(
        f"the features of {clip.side} clip {printable(clip.id)} have NaN or Inf; check the detector's "
        "weights and dtype"
    )


def run_jobs(
    jobs: Sequence[Job], sides: Mapping[str, Side], detector: Detector, rule: FrameRule, workers: int = 0
) -> None:
    """Extract and write ``jobs`` one after the other; ``workers`` processes decode ahead."""
    progress = log_progress("extract", "parts", sum(len(job.clips) for job in jobs))
    with closing(read_clips([clip for job in jobs for clip in job.clips], sides, rule, workers)) as video:
        for done, job in enumerate(jobs, start=1):
            write_rows(job.path, job.key, extract_rows(job.clips, video, detector))
            progress(done, len(jobs))


def run_jobs_in_process(
    jobs: Sequence[Job],
    sides: Mapping[str, Side],
    open_detector: OpenDetector,
    rule: FrameRule,
    threads: int,
    workers: int = 0,
) -> str | None:
    """Do ``run_jobs`` in another process; return the message of an InputError, None on success."""
    torch.set_num_threads(threads)
    try:
        run_jobs(jobs, sides, open_detector(), rule, workers)
    except InputError as error:
        return str(error)
    return None


def run_jobs_in_parallel(
    jobs: Sequence[Job],
    sides: Mapping[str, Side],
    open_detector: OpenDetector,
    rule: FrameRule,
    processes: int,
    workers: int = 0,
) -> None:
    """Divide ``jobs`` among ``processes``; InputError with the first message of any of them."""
    bounds = [len(jobs) * i // processes for i in range(processes + 1)]
    parts = [jobs[start:stop] for start, stop in pairwise(bounds) if stop > start]
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        futures = [
            pool.submit(run_jobs_in_process, part, sides, open_detector, rule, threads, workers)
            for part in parts
        ]
        messages = [future.result() for future in futures]
    for message in filter(None, messages):
        raise InputError(message)


def extract(
    plan: Plan,
    sides: Mapping[str, Side],
    detector: Detector,
    open_detector: OpenDetector,
    out: Path,
    processes: int = 1,
    kept: Path | None = None,
    workers: int = 0,
    keep_fake: bool = False,
    ranks: Group = ALONE,
) -> dict[str, Tensor]:
    """Return the features {"real": (n k), "fake": (m k)} of ``plan``, {} in ranks other than 0; they are kept
    in out/real.safetensors, out/fake.safetensors, and those of the real side (with ``keep_fake`` of both) in
    the folder ``kept``, which is read before they are computed; None computes them.

    ``open_detector`` builds the same detector again in each of ``processes``, each with ``workers`` that
    decode; InputError for a clip that can no longer be read. ``ranks`` take the shards in turn.
    """
    jobs = plan_jobs(plan, detector, out)
    keys = {side: digest([job.key for job in jobs if job.clips[0].side == side]) for side in SIDES}
    lasting: dict[str, Path] = {}
    if kept:
        folders = {"real": kept, "fake": kept / "fake"} if keep_fake else {"real": kept}
        for side, folder in folders.items():
            lasting[side] = folder / f"{digest([keys[side], bits_of(detector)])}.safetensors"
    features: dict[str, Tensor | None] = {}

    def look() -> list[int]:
        features.update(stored_features(out, keys, lasting))
        needed = [number for number, job in enumerate(jobs) if features[job.clips[0].side] is None]
        return [number for number in needed if read_rows(jobs[number].path, jobs[number].key) is None]

    missing = [jobs[number] for number in ranks.run_on_rank0(look)]
    if processes == 1 or len(missing) < 2:
        own = missing[ranks.rank :: ranks.size]
        run_jobs(own, sides, detector, plan.protocol.frame, workers)
        ranks.gather(None)
    else:
        run_jobs_in_parallel(missing, sides, open_detector, plan.protocol.frame, processes, workers)
    if ranks.rank:
        return {}
    needed = [job for job in jobs if features[job.clips[0].side] is None]
    found = {}
    for side in SIDES:
        rows = features[side]
        if rows is None:
            rows = _join([job for job in jobs if job.clips[0].side == side])
            write_rows(out / f"{side}.safetensors", keys[side], rows)
        found[side] = rows
    for side, path in lasting.items():
        if not path.exists():
            keep_rows(path, keys[side], found[side])
    with reported("the features", out):
        for job in needed:
            job.path.unlink(missing_ok=True)
    return found


def stored_features(
    out: Path, keys: Mapping[str, str], lasting: Mapping[str, Path]
) -> dict[str, Tensor | None]:
    """Return the features of each side that ``out`` has, or one of the files ``lasting``; None for others."""
    features = {side: read_rows(out / f"{side}.safetensors", keys[side]) for side in SIDES}
    for side, path in lasting.items():
        rows = read_rows(path, keys[side]) if features[side] is None else None
        if rows is not None:
            log.info("the features of the %s side are those of an earlier score (%s)", side, path)
            write_rows(out / f"{side}.safetensors", keys[side], rows)
            features[side] = rows
    return features


def bits_of(detector: Detector) -> list[Any]:
    """Return all that may change the last bits of features, beside the clips and the weights."""
    processor = torch.backends.cpu.get_cpu_capability()
    if detector.device.type == "cuda":
        processor = torch.cuda.get_device_name(detector.device)
    libraries = {name: version(name) for name in ("torch", "numpy", "pillow", "av")}
    return [source_sha256(), libraries, processor, torch.get_num_threads(), detector.group]


def keep_rows(path: Path, key: str, features: Tensor) -> None:
    """Write features (n k) for later scores, and delete the oldest of more than KEPT files; a folder that
    cannot be written is reported in the log.
    """
    try:
        write_rows(path, key, features)
    except RunError as error:
        log.info("the features are not kept for later scores: %s", error)
        return
    keep_newest(path.parent, "*.safetensors", KEPT)


def _join(jobs: Sequence[Job]) -> Tensor:
    parts = [read_rows(job.path, job.key) for job in jobs]
    if any(part is None for part in parts):
        raise RunError(
            f"a file of {jobs[0].path.parent} was deleted or damaged while it was used; run the same "
            "command again"
        )
    return torch.cat([part for part in parts if part is not None])
