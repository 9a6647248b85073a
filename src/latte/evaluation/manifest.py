# SPDX-License-Identifier: Apache-2.0
"""What a figure is a figure of: 60 fields in 8 groups, and the hash of the 51 that are not about the run that computed it.

Fields with two sides are {"real": ..., "fake": ...}. Figures are comparable when ``COMPARED`` agrees; nothing else is ever compared.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latte.checkpoint.record import environment
from latte.checks import InputError
from latte.evaluation.detectors import Detector
from latte.evaluation.plan import SIDES, Plan, traits
from latte.evaluation.scores import LEVEL, METHOD, ROOT, Scores
from latte.evaluation.sources import Side, digest
from latte.files import commit_file, reported

FORMAT = 1
GROUPS = {
    "preset": ("name", "version"),
    "detector": ("metric", "detector", "sha256", "bytes", "loader", "layer", "dimension", "dtype"),
    "pixels": (
        "frame_source",
        "codec",
        "colour",
        "bit_depth",
        "crop",
        "resizer",
        "antialias",
        "output_size",
        "values",
    ),
    "clips": (
        "frames",
        "stride_real",
        "stride_fake",
        "start",
        "seed",
        "clips_per_video",
        "order",
        "plan_sha256",
        "duplicates",
    ),
    "data": ("name", "split", "version", "list_sha256", "found", "kept", "dropped"),
    "statistic": ("num_real", "num_fake", "ddof", "root", "accumulation", "interval", "interval_method"),
    "generation": (
        "checkpoint_sha256",
        "step",
        "weights",
        "codec_sha256",
        "sampler",
        "steps",
        "guidance",
        "class_rule",
        "sampling_seed",
    ),
    "run": (
        "compute_dtype",
        "tf32",
        "device",
        "batch",
        "processes",
        "workers",
        "commit",
        "libraries",
        "wall_seconds",
    ),
}
COMPARED = (
    "preset",
    "detector",
    ("clips", "frames"),
    ("clips", "stride_real"),
    ("clips", "stride_fake"),
    ("statistic", "num_real"),
    ("statistic", "num_fake"),
    ("statistic", "ddof"),
)
Manifest = dict[str, dict[str, Any]]


def make_manifest(
    plan: Plan,
    sides: Mapping[str, Side],
    detector: Detector,
    scores: Scores,
    notes: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
) -> Manifest:
    """All fields. ``notes`` {"real", "fake", "generation"} is what only the user or the sampler knows; the rest is null."""
    protocol, facts = plan.protocol, detector.describe()
    pixels, frame = facts["pixels"], protocol.frame
    dropped = {
        side: [{"id": bad["id"], "reason": bad["reason"]} for bad in plan.dropped if bad["side"] == side]
        for side in SIDES
    }
    first = (
        "as decoded"
        if frame.size is None
        else f"{frame.order}, lanczos with antialias to {frame.size}, then "
    )
    copied = "" if frame.jpeg is None else f"jpeg {frame.jpeg} (4:2:0), then "
    splits = f"{protocol.splits} splits, " + (
        "plan order" if protocol.shuffle is None else f"shuffled by seed {protocol.shuffle}"
    )
    here = environment(detector.device)
    return {
        "preset": {"name": protocol.name, "version": protocol.version},
        "detector": {"metric": list(protocol.metrics), **{key: facts[key] for key in GROUPS["detector"][1:]}},
        "pixels": {
            "frame_source": {
                side: sorted({_kind(source.codec) for source in sides[side].sources}) for side in SIDES
            },
            "codec": {side: traits(sides[side].sources) for side in SIDES},
            "colour": "RGB by swscale, the file's own matrix and range",
            "bit_depth": 8,
            "crop": f"{first}{', ' if frame.size is None else ''}{copied}{pixels['crop']}",
            "resizer": pixels["resize"],
            "antialias": pixels["antialias"],
            "output_size": pixels["size"],
            "values": pixels["values"],
        },
        "clips": {
            **{key: getattr(protocol, key) for key in ("frames", "stride_real", "stride_fake", "order")},
            "start": {
                "real": protocol.start_real,
                "fake": protocol.start_fake,
                "shortest": protocol.shortest,
            },
            "seed": plan.seed,
            "clips_per_video": 1,
            "plan_sha256": plan.sha256,
            "duplicates": 0,
        },
        "data": {
            "name": {side: Path(sides[side].root).name for side in SIDES},
            **{key: {side: notes.get(side, {}).get(key) for side in SIDES} for key in ("split", "version")},
            "list_sha256": {
                side: digest(sorted([s.id, s.sha256] for s in sides[side].sources)) for side in SIDES
            },
            "found": {side: len(sides[side].sources) + len(sides[side].broken) for side in SIDES},
            "kept": {side: len(plan.side(side)) for side in SIDES},
            "dropped": dropped,
        },
        "statistic": {
            "num_real": scores.num_real,
            "num_fake": scores.num_fake,
            "ddof": protocol.ddof,
            "root": splits if scores.metric == "is" else ROOT,
            "accumulation": "float64",
            "interval": LEVEL,
            "interval_method": METHOD,
        },
        "generation": {key: notes.get("generation", {}).get(key) for key in GROUPS["generation"]},
        "run": {
            "compute_dtype": facts["dtype"],
            "tf32": False,
            "device": here["device"],
            "batch": detector.group,
            "workers": 0,
            "commit": here["commit"],
            "libraries": here["packages"],
            **run,
        },
    }


def _kind(codec: str) -> str:
    return "images" if codec == "images" else "latents" if codec.startswith("latents") else "video"


def manifest_hash(manifest: Manifest) -> str:
    """12 hex digits of the hash of every group but ``run``."""
    return digest({group: manifest[group] for group in GROUPS if group != "run"})[:12]


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The manifest with its hash, figures and what a replay needs, as JSON, in whole or not at all."""
    with reported("the manifest", path):
        commit_file(path, json.dumps({"format": FORMAT, **report}, indent=1) + "\n")


def read_report(path: str | Path) -> dict[str, Any]:
    """What ``write_report`` wrote; InputError when it is no such file, or its manifest is not the one that was hashed."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        fields = {group: tuple(sorted(found["manifest"][group])) for group in GROUPS}
        complete = found["format"] == FORMAT and fields == {
            group: tuple(sorted(names)) for group, names in GROUPS.items()
        }
        hashed, value, replay = found["manifest_hash"], float(found["value"]), dict(found["replay"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a manifest of latte evaluate ({type(error).__name__}: {error}); give OUT/manifest.json"
        ) from None
    if not complete or manifest_hash(found["manifest"]) != hashed:
        raise InputError(
            f"{path} was changed after it was written: its fields do not give the hash {hashed}; evaluate again"
        )
    return {**found, "value": value, "replay": replay}


def compare(mine: Mapping[str, Any], other: Mapping[str, Any], name: str) -> dict[str, Any]:
    """{"other", "difference", "overlap"} of two reports; InputError that names the first field in which they do not agree."""
    for what in COMPARED:
        group, fields = (what, GROUPS[what]) if isinstance(what, str) else (what[0], (what[1],))
        for field in fields:
            here, there = mine["manifest"][group][field], other["manifest"][group][field]
            if here != there:
                raise InputError(
                    f"{group}.{field} is {here!r} here but {there!r} in {name}; figures of different protocols do not "
                    "compare, evaluate both by the same one"
                )
    ranges = [report["interval"] for report in (mine, other)]
    overlap = None if None in ranges else ranges[0][0] <= ranges[1][1] and ranges[1][0] <= ranges[0][1]
    return {"other": other["value"], "difference": mine["value"] - other["value"], "overlap": overlap}


def plain(scores: Scores) -> dict[str, Any]:
    """The figures as plain data: DESIGN's keys and, beside them, all that was computed."""
    interval = scores.interval
    return {
        "metric": scores.metric,
        "value": scores.value,
        "interval": None if interval is None else [interval.low, interval.high],
        "floor": None if scores.floor is None else scores.floor.value,
        "values": scores.values,
        "infinity": None if scores.infinity is None else scores.infinity.value,
        "standard_error": None if interval is None else interval.std,
        "floors": None if scores.floor is None else asdict(scores.floor),
        "noise": scores.is_noise,
        "clips": {"real": scores.num_real, "fake": scores.num_fake},
    }
