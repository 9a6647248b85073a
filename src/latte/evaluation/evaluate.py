# SPDX-License-Identifier: Apache-2.0
"""Plan, extract, score: three stages with files between them, so that a score can be inspected, resumed and
reproduced.

OUT/clips.jsonl and dropped.jsonl are the plan, real.safetensors and fake.safetensors the features,
manifest.json the scores with all they depend on, report.html the same for people. The fake side may be a
model: everything that can be checked without its clips is checked before they are generated into OUT/samples.
"""

import json
import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latte.checks import InputError, RunError, check, choose, printable
from latte.distributed import ALONE, Group
from latte.evaluation.detectors import DTYPES, Detector, build_detector, opened_in, relative_rms
from latte.evaluation.features import extract, log_progress, read_clips
from latte.evaluation.manifest import ADDED, GROUPS, make_manifest, manifest_hash, plain, write_report
from latte.evaluation.memorisation import HeldOut, choose_held_out, measure
from latte.evaluation.plan import SIDES, Plan, Source, make_plan
from latte.evaluation.protocols import Protocol, find_protocol, nonstandard
from latte.evaluation.report import write_page
from latte.evaluation.scores import score
from latte.evaluation.sources import (
    GENERATED_CODEC,
    ClipSource,
    FolderSide,
    Side,
    open_folder,
    read_generation,
)
from latte.files import commit_file, reported
from latte.runtime import resolve_device, world_size

STAGES = {
    "plan": "choose the clips",
    "extract": "also compute their features",
    "score": "also compute the scores",
}
ADDED_SETTINGS = {"dtype": "fp32", "workers": 0}  # later than the others; recorded unless at their default
NUM_CHECKED = 8  # clips on which the error of reduced precision is measured
TOLERANCE = 1e-4  # relative difference tolerated in a replay on another machine
SAMPLES, PROBES = "samples", "probes"  # folders of generated clips and of cached probes in OUT
FILE_BYTES_PER_PIXEL = 0.25  # of a generated mp4 file: a generous estimate, for the check of free disk space
log = logging.getLogger(__name__)
BuildDetector = Callable[..., Detector]


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of an evaluation."""

    protocol: str = "clean"
    seed: int = 0  # of the plan
    clips: int | None = None  # per side; other than the protocol's makes it non-standard
    allow_fewer: bool = False
    allow_mixed: bool = False
    detector: str | None = None  # weight file
    detector_sha256: str | None = None  # vouches for a weight file that was not published
    group: int = 1  # rows that go through the network at once
    device: str = "auto"
    processes: int = 1  # that extract features
    split: str | None = None  # of the data, for the manifest
    data_version: str | None = None
    dtype: str = "fp32"  # of the detector's products, a key of detectors.DTYPES
    workers: int = 0  # processes that decode ahead, for each that extracts features
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check(self.processes >= 1, f"--processes must be at least 1, got {self.processes}")
        check(self.workers >= 0, f"--workers must be at least 0, got {self.workers}")
        choose("--dtype", self.dtype, DTYPES)
        check(self.group >= 1, f"--group must be at least 1, got {self.group}")
        check(
            self.clips is None or self.clips >= 2,
            f"--clips must be at least 2 for a covariance, got {self.clips}",
        )

    @property
    def chosen_protocol(self) -> Protocol:
        """Return the protocol with the requested number of clips."""
        protocol = find_protocol(self.protocol)
        if self.clips is None:
            return protocol
        return nonstandard(protocol, clips=self.clips)

    def recorded(self) -> dict[str, Any]:
        """Return the config as plain data, without what a replay of an older version would not know."""
        return {key: value for key, value in asdict(self).items() if ADDED_SETTINGS.get(key, ...) != value}

    @classmethod
    def of(cls, values: Mapping[str, Any], where: object) -> "EvaluateConfig":
        """Return the config of what ``recorded`` gave; InputError if the file ``where`` has other keys."""
        known = {field.name for field in fields(cls)}
        if not known - {*ADDED_SETTINGS} <= set(values) <= known:
            raise InputError(
                f"{where} was written by another version of latte: its settings are {', '.join(values)}; "
                "evaluate again"
            )
        return cls(**values)


def replay_config(report: Mapping[str, Any], where: object, detector: str | None) -> EvaluateConfig:
    """Return the config of a manifest file's report."""
    config = EvaluateConfig.of(report["replay"]["config"], where)
    if detector:
        config = replace(config, detector=detector)
    return config


def evaluate(
    real: Side,
    fake: Side | ClipSource,
    config: EvaluateConfig,
    out: Path,
    *,
    until: str = "score",
    build: BuildDetector = build_detector,
    num_generated: int | None = None,
    codec_path: str | None = None,
    kept: Path | None = None,
    held_out: Side | None = None,
    ranks: Group = ALONE,
) -> dict[str, Any]:
    """Evaluate ``fake``, clips or a model, against ``real`` and return what ``--json`` prints; all files are
    in ``out``.

    ``until`` ends after a stage. ``build`` makes the detector (here and in other processes). A model
    generates ``num_generated`` clips (None: as many as the plan takes). ``codec_path`` is recorded for a
    replay. ``kept`` is a folder for the features of folders, see ``features.extract``. With clips that
    were ``held_out`` from training, ``real`` being those trained on, memorisation is measured too. All
    processes of ``ranks`` must call it: they share clips and features, and rank 0 scores. InputError for
    anything that would make the score meaningless, before any clip is generated if that can be known.
    """
    choose("--until", until, STAGES)
    check_processes(ranks, config)
    started = time.monotonic()
    replay = {"model": None, "sample_seed": 0, "codec_path": codec_path}
    unseen = held_out and choose_held_out(held_out, real, config.chosen_protocol, config.seed)
    open_detector = detector_opener(build, config)
    detector = None
    if isinstance(fake, ClipSource):
        replay |= {"model": fake.name, "sample_seed": fake.seed}
        preview = preview_plan(real, fake, config)
        if until != "plan":
            detector = open_detector()
            detector.check_length(preview.protocol.frames)
        fake, generation = generate_side(real, fake, preview, out, num_generated, ranks)
    else:
        generation = read_generation(fake.root)
    sides = {"real": real, "fake": fake}
    plan = ranks.run_on_rank0(plan_sides, sides, config)
    ranks.run_on_rank0(write_plan, plan, out)
    if until == "plan":
        return planned(plan, out)
    detector = detector or open_detector()
    work = (config.processes, kept, config.workers, replay["model"] is None, ranks)
    features = extract(plan, sides, detector, open_detector, out, *work)
    if until == "extract":
        paths = {side: str(out / f"{side}.safetensors") for side in SIDES}
        return {**planned(plan, out), "features": paths, "banks": paths}  # banks: the key of 0.1.0
    note = {"split": config.split, "version": config.data_version}
    notes = {**dict.fromkeys(SIDES, note), "generation": generation}
    run = {"processes": config.processes * ranks.size, "wall_seconds": round(time.monotonic() - started, 3)}
    replay |= {"real": real.root, "fake": fake.root, "config": config.recorded()}
    about: dict[str, Any] = {"notes": notes, "run": run, "replay": replay}
    if unseen:
        replay["held_out"] = unseen.side.root
        about["held_out"] = ranks.run_on_rank0(unseen.read, detector, plan.protocol.frame, kept)
    return ranks.run_on_rank0(partial(score_features, **about), plan, sides, features, detector, out)


def planned(plan: Plan, out: Path) -> dict[str, Any]:
    """Return what ``--json`` prints of a plan."""
    return {
        "protocol": plan.protocol.name,
        "plan": str(out / "clips.jsonl"),
        "plan_sha256": plan.sha256,
        "dropped": len(plan.dropped),
    }


def score_features(
    plan: Plan,
    sides: Mapping[str, Side],
    features: Mapping[str, Tensor],
    detector: Detector,
    out: Path,
    *,
    notes: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
    replay: Mapping[str, Any],
    held_out: HeldOut | None = None,
) -> dict[str, Any]:
    """Score ``features`` of ``plan``; write manifest.json and report.html and return what ``--json`` prints
    of them.
    """
    copied = (held_out, measure(plan, features, held_out)) if held_out else None
    scores = score(features["real"], features["fake"], plan.protocol)
    precision = precision_of(plan, sides, detector)
    scores = replace(scores, warnings=(*scores.warnings, *precision_warnings(precision)))
    for warning in scores.warnings:
        log.warning("warning: %s", warning)
    manifest = make_manifest(plan, sides, detector, scores, notes, run)
    result = {
        **planned(plan, out),
        "title": plan.protocol.title(scores.metric),
        **plain(scores),
        **precision,
        **({"memorisation": copied[1].plain()} if copied else {}),
        "manifest": manifest,
        "manifest_hash": manifest_hash(manifest),
        "card": detector.card,
    }
    write_report(out / "manifest.json", {**result, "replay": dict(replay)})
    page = write_page(out, plan, sides, features, scores, detector, result, copied)
    return {**result, "manifest": str(out / "manifest.json"), "report": str(page)}


def check_processes(ranks: Group, config: EvaluateConfig) -> None:
    """InputError for processes that would write the same files, and for two ways to share the work."""
    size = world_size()
    check(
        ranks.size == size,
        f"evaluate() was called in {size} processes that do not share the work; pass ranks=, a command_group",
    )
    check(
        size == 1 or config.processes == 1,
        f"--processes is {config.processes}, but {size} processes of torchrun share the work; leave it out",
    )


def detector_opener(build: BuildDetector, config: EvaluateConfig) -> Callable[[], Detector]:
    """Return a function that builds the detector of ``config``, in this process or another."""
    protocol = config.chosen_protocol
    opener = partial(
        build,
        protocol.detector,
        resolve_device(config.device),
        Path(config.detector) if config.detector else None,
        config.detector_sha256,
        protocol.pixels,
        protocol.layer,
        config.group,
    )
    if config.dtype == "fp32":
        return opener
    return partial(opened_in, config.dtype, opener)


def precision_of(plan: Plan, sides: Mapping[str, Side], detector: Detector) -> dict[str, Any]:
    """Return {"precision": dtype of the detector and the error of some clips' features}; {} for float32."""
    if detector.dtype == torch.float32:
        return {}
    clips = plan.side("fake")[:NUM_CHECKED]
    video = list(read_clips(clips, sides, plan.protocol.frame))
    video = [frames for frames in video if frames.shape == video[0].shape]
    error = float(f"{relative_rms(detector, np.stack(video)):.3g}")
    dtype = str(detector.dtype).removeprefix("torch.")
    return {"precision": {"dtype": dtype, "relative_rms": error, "clips": len(video)}}


def precision_warnings(precision: Mapping[str, Any]) -> list[str]:
    """Return the line that a score with reduced precision comes with."""
    if not precision:
        return []
    found = precision["precision"]
    return [
        f"features are computed in {found['dtype']}: relative RMS error {found['relative_rms']:.2g} on "
        f"{found['clips']} clips; compare only with scores in {found['dtype']}"
    ]


def plan_sides(sides: Mapping[str, Side], config: EvaluateConfig) -> Plan:
    """Return the plan of ``sides``; log what was left out and which videos are damaged."""
    broken = tuple({"side": side, **bad} for side in SIDES for bad in sides[side].broken)
    sources = {side: sides[side].sources for side in SIDES}
    protocol = config.chosen_protocol
    plan = make_plan(protocol, sources, config.seed, broken, config.allow_fewer, config.allow_mixed)
    for bad in plan.dropped:
        log.info("left out: %s %s (%s)", bad["side"], printable(bad["id"]), bad["reason"])
    for side in SIDES:
        damaged = [source for source in sources[side] if source.note]
        if damaged:
            example = f"{printable(damaged[0].id)} ({damaged[0].note})"
            log.warning("warning: %s of %s are damaged, first %s", len(damaged), side, example)
    return plan


def write_plan(plan: Plan, out: Path) -> None:
    """Write clips.jsonl and dropped.jsonl."""
    dropped = "".join(json.dumps(bad, sort_keys=True) + "\n" for bad in plan.dropped)
    with reported("the plan", out):
        out.mkdir(parents=True, exist_ok=True)
        commit_file(out / "clips.jsonl", plan.text)
        commit_file(out / "dropped.jsonl", dropped)


def common_rate(side: Side) -> float | None:
    """Return the most frequent frame rate of a side, which generated files get too; None if it is unknown."""
    rates = Counter(source.fps for source in side.sources if source.fps)
    return rates.most_common(1)[0][0] if rates else None


def preview_plan(real: Side, model: ClipSource, config: EvaluateConfig) -> Plan:
    """Return the plan for ``real`` and the clips that ``model`` will generate; InputError for all that is
    refused later anyway.
    """
    frames, height, width = model.shape
    protocol = config.chosen_protocol
    example = Source(
        id="generated",
        frames=frames,
        sha256="generated",
        fps=common_rate(real) or 0.0,
        codec=GENERATED_CODEC,
        height=height,
        width=width,
        interval=model.interval,
    )
    fake = [replace(example, id=f"generated {i}", sha256=f"generated {i}") for i in range(protocol.clips)]
    broken = tuple({"side": "real", **bad} for bad in real.broken)
    sources = {"real": real.sources, "fake": fake}
    return make_plan(protocol, sources, config.seed, broken, config.allow_fewer, config.allow_mixed)


def generate_side(
    real: Side, model: ClipSource, preview: Plan, out: Path, num_generated: int | None, ranks: Group = ALONE
) -> tuple[FolderSide, dict[str, Any]]:
    """Generate the clips of ``preview`` into out/samples, those that are missing only, and open them with
    their generation fields.
    """
    count = num_generated or preview.protocol.clips
    folder = out / SAMPLES
    num_bytes = round(count * math.prod(model.shape) * FILE_BYTES_PER_PIXEL)
    ranks.run_on_rank0(check_disk, folder, num_bytes, f"{count} generated clips")
    log.info("generate: %s clips of %s in %s", count, printable(model.name), printable(folder))
    progress = log_progress("generate", "steps", count)
    several = (ranks,) * (ranks.size > 1)
    facts = model.generate(folder, count, common_rate(real), progress, *several)
    side = ranks.run_on_rank0(open_folder, folder, out / PROBES)
    sources = tuple(replace(source, interval=model.interval) for source in side.sources)
    recorded = read_generation(folder)
    return replace(side, sources=sources), {**recorded, **facts, "interval": model.interval}


def check_disk(folder: Path, needed: int, what: str) -> None:
    """RunError if ``folder``'s disk has fewer than ``needed`` bytes free."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(
            f"{what} need about {needed / 2**20:,.0f} MiB in {printable(folder)}, but its disk has "
            f"{free / 2**20:,.0f} MiB free; free some space or give --out on another disk"
        )


def check_replay(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return 'exact' or 'close': how the values of two reports agree, ``now`` being a replay of ``before``.

    InputError naming the first field that differs, RunError if the fields agree and the values do not (within
    TOLERANCE, for another machine). A field that a manifest of 0.1.0 lacks is not compared.
    """
    for group in GROUPS:
        if group == "run":
            continue
        for field in (*GROUPS[group], *ADDED.get(group, ())):
            old = before["manifest"][group].get(field)
            new = now["manifest"][group].get(field)
            if new != old and not (field in ADDED.get(group, ()) and old is None):
                raise InputError(
                    f"{group}.{field} is {new!r} now and was {old!r}; the files or the detector are not "
                    "those of the manifest"
                )
    old = before["value"]
    new = now["value"]
    if old == new and before["values"] == now["values"]:
        return "exact"
    if abs(old - new) <= TOLERANCE * max(abs(old), abs(new)):
        return "close"
    raise RunError(
        f"the replay gives {new!r}, but the manifest has {old!r} for the same clips and detector; the "
        "libraries or the device differ (see the run group of both manifests)"
    )
