# SPDX-License-Identifier: Apache-2.0
"""Plan, extract, score: three stages with files between them, so that a figure can be taken apart, gone on with, and had again.

OUT/clips.jsonl and dropped.jsonl are the plan, real.safetensors and fake.safetensors the features, manifest.json the figures with all
they depend on, report.html the same for people.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from latte.checks import InputError, RunError, choose, require
from latte.evaluation.detectors import Detector, build_detector
from latte.evaluation.features import extract
from latte.evaluation.manifest import GROUPS, make_manifest, manifest_hash, plain, write_report
from latte.evaluation.plan import SIDES, Plan, make_plan
from latte.evaluation.protocols import Protocol, find_protocol, nonstandard
from latte.evaluation.report import write_page
from latte.evaluation.scores import score
from latte.evaluation.sources import Side
from latte.files import commit_file, reported
from latte.runtime import resolve_device

STAGES = ("plan", "extract", "score")
CLOSE = 1e-4  # a replay on another machine may differ by this share
log = logging.getLogger(__name__)
Build = Callable[..., Detector]


@dataclass(frozen=True)
class EvaluateConfig:
    """``clips`` other than the protocol's makes it non-standard. ``detector`` is a file of weights, ``detector_sha256`` vouches for one
    that no table knows. ``group`` rows go through the network at a time. ``split`` and ``data_version`` go into the manifest as told."""

    protocol: str = "clean"
    seed: int = 0
    clips: int | None = None
    allow_fewer: bool = False
    allow_mixed: bool = False
    detector: str | None = None
    detector_sha256: str | None = None
    group: int = 1
    device: str = "auto"
    processes: int = 1
    split: str | None = None
    data_version: str | None = None
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        require(self.processes >= 1, "--processes", self.processes, "somebody must do it", "give 1 or more")
        require(
            self.group >= 1,
            "--group",
            self.group,
            "rows go through the network at least one at a time",
            "give 1 or more",
        )
        require(
            self.clips is None or self.clips >= 2,
            "--clips",
            self.clips,
            "a covariance needs two",
            "give 2 or more",
        )

    @property
    def asked(self) -> Protocol:
        """The protocol with the wanted number of clips."""
        protocol = find_protocol(self.protocol)
        return protocol if self.clips is None else nonstandard(protocol, clips=self.clips)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: object) -> "EvaluateConfig":
        """From plain data as ``asdict`` gives it; InputError when ``where`` it comes from holds other keys."""
        if set(values) != {field.name for field in fields(cls)}:
            raise InputError(
                f"{where} was written by another version of latte: its settings are {', '.join(values)}; evaluate again"
            )
        return cls(**values)


def write_plan(plan: Plan, out: Path) -> None:
    """clips.jsonl and dropped.jsonl."""
    with reported("the plan", out):
        out.mkdir(parents=True, exist_ok=True)
        commit_file(out / "clips.jsonl", plan.text)
        commit_file(
            out / "dropped.jsonl", "".join(json.dumps(bad, sort_keys=True) + "\n" for bad in plan.dropped)
        )


def evaluate(
    sides: Mapping[str, Side],
    config: EvaluateConfig,
    out: Path,
    *,
    until: str = "score",
    build: Build = build_detector,
    generation: Mapping[str, Any] | None = None,
    replay: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate sides["fake"] against sides["real"] -> what ``--json`` prints; everything else is in the folder ``out``.

    ``until`` ends after a stage. ``build`` makes the detector (here and in other processes), ``generation`` are manifest fields that a
    sampler knows, ``replay`` is kept so that the manifest can be evaluated again. InputError for whatever cannot be measured honestly.
    """
    choose("--until", until, dict.fromkeys(STAGES))
    started = time.monotonic()
    broken = tuple({"side": side, **bad} for side in SIDES for bad in sides[side].broken)
    found = {side: sides[side].sources for side in SIDES}
    plan = make_plan(config.asked, found, config.seed, broken, config.allow_fewer, config.allow_mixed)
    write_plan(plan, out)
    for bad in plan.dropped:
        log.info("left out: %s %s (%s)", bad["side"], bad["id"], bad["reason"])
    protocol = plan.protocol
    result = {
        "protocol": protocol.name,
        "plan": str(out / "clips.jsonl"),
        "plan_sha256": plan.sha256,
        "dropped": len(plan.dropped),
    }
    if until == "plan":
        return result
    path = Path(config.detector) if config.detector else None
    open_detector = partial(
        build,
        protocol.detector,
        resolve_device(config.device),
        path,
        config.detector_sha256,
        protocol.pixels,
        protocol.layer,
        config.group,
    )
    detector = open_detector()
    banks = extract(plan, sides, detector, open_detector, out, config.processes)
    if until == "extract":
        return {**result, "banks": {side: str(out / f"{side}.safetensors") for side in SIDES}}
    scores = score(banks["real"], banks["fake"], protocol)
    notes = {side: {"split": config.split, "version": config.data_version} for side in SIDES} | {
        "generation": dict(generation or {})
    }
    run = {"processes": config.processes, "wall_seconds": round(time.monotonic() - started, 3)}
    manifest = make_manifest(plan, sides, detector, scores, notes, run)
    result |= {
        **plain(scores),
        "manifest": manifest,
        "manifest_hash": manifest_hash(manifest),
        "card": detector.card,
    }
    roots = {side: sides[side].root for side in SIDES}
    again = {**roots, "config": asdict(config), **(replay or {})}
    write_report(out / "manifest.json", {**result, "replay": again})
    page = write_page(out, plan, sides, banks, scores, detector, result)
    return {**result, "manifest": str(out / "manifest.json"), "report": str(page)}


def check_replay(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """'exact' or 'close': how the figures of two manifest files agree, ``now`` being a replay of ``before``.

    InputError naming the first field that is another, RunError when the fields agree and the figures do not (within CLOSE, for other
    machines)."""
    for group in GROUPS:
        for field in GROUPS[group] if group != "run" else ():
            old, new = before["manifest"][group][field], now["manifest"][group][field]
            if new != old:
                raise InputError(
                    f"{group}.{field} is {new!r} now and was {old!r}; the files or the detector are not those of the manifest"
                )
    old, new = before["value"], now["value"]
    if old == new and before["values"] == now["values"]:
        return "exact"
    if abs(old - new) <= CLOSE * max(abs(old), abs(new)):
        return "close"
    raise RunError(
        f"the replay gives {new!r}, but the manifest says {old!r} for the same clips and detector; another library or device?"
    )
