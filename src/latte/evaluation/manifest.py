# SPDX-License-Identifier: Apache-2.0
"""What a score is a score of: 64 fields in 8 groups, and the hash of those that are not about the run that
computed it.

Fields with two sides are {"real": ..., "fake": ...}. Scores are comparable when ``COMPARED`` agrees; nothing
else is ever compared. The fields of ``ADDED`` came after 0.1.0. They enter the hash only where they differ
from what 0.1.0 assumed, so that a manifest of 0.1.0 still has its hash and an evaluation repeated today gives
the same one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latte.checkpoint.record import environment
from latte.checks import InputError, check
from latte.evaluation.detectors import Detector
from latte.evaluation.plan import SIDES, Plan, Source, frame_sizes, traits
from latte.evaluation.protocols import Protocol
from latte.evaluation.scores import LEVEL, METHOD, Scores
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
ADDED = {"pixels": ("frame_size", "damaged"), "generation": ("interval", "other")}
COMPARED = (
    "preset",
    "detector",
    ("clips", "frames"),
    ("clips", "stride_real"),
    ("clips", "stride_fake"),
    ("statistic", "num_real"),
    ("statistic", "num_fake"),
    ("statistic", "ddof"),
    ("pixels", "frame_size"),
)
ROOT = "nuclear norm of the product of the centred banks"  # hashed: this wording is that of 0.1.0
Manifest = dict[str, dict[str, Any]]


def make_manifest(
    plan: Plan,
    sides: Mapping[str, Side],
    detector: Detector,
    scores: Scores,
    notes: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
) -> Manifest:
    """Return all fields. ``notes`` {"real", "fake", "generation"} is what only the user or the sampler knows;
    the rest is null.
    """
    protocol = plan.protocol
    facts = detector.describe()
    generation = notes.get("generation", {})
    return {
        "preset": {"name": protocol.name, "version": protocol.version},
        "detector": {"metric": list(protocol.metrics), **{key: facts[key] for key in GROUPS["detector"][1:]}},
        "pixels": _pixels(plan, sides, facts["pixels"]),
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
        "data": _data(plan, sides, notes),
        "statistic": _statistic(protocol, scores),
        "generation": {key: generation.get(key) for key in (*GROUPS["generation"], *ADDED["generation"])},
        "run": _run(detector) | dict(run),
    }


def _statistic(protocol: Protocol, scores: Scores) -> dict[str, Any]:
    root = ROOT
    if scores.metric == "is":
        order = "plan order" if protocol.shuffle is None else f"shuffled by seed {protocol.shuffle}"
        root = f"{protocol.splits} splits, {order}"
    return {
        "num_real": scores.num_real,
        "num_fake": scores.num_fake,
        "ddof": protocol.ddof,
        "root": root,
        "accumulation": "float64",
        "interval": LEVEL,
        "interval_method": METHOD,
    }


def _pixels(plan: Plan, sides: Mapping[str, Side], pixels: Mapping[str, Any]) -> dict[str, Any]:
    frame = plan.protocol.frame
    resized = "as decoded, "
    if frame.size is not None:
        resized = f"{frame.order}, lanczos with antialias to {frame.size}, then "
    copied = ""
    if frame.jpeg is not None:
        copied = f"jpeg {frame.jpeg} (4:2:0), then "
    return {
        "frame_source": {side: sorted({_kind(s.codec) for s in sides[side].sources}) for side in SIDES},
        "codec": {side: traits(sides[side].sources) for side in SIDES},
        "colour": "RGB by swscale, the file's own matrix and range",
        "bit_depth": 8,
        "crop": f"{resized}{copied}{pixels['crop']}",
        "resizer": pixels["resize"],
        "antialias": pixels["antialias"],
        "output_size": pixels["size"],
        "values": pixels["values"],
        "frame_size": {side: frame_sizes(sides[side].sources, frame) for side in SIDES},
        "damaged": {side: _damaged(sides[side].sources) for side in SIDES},
    }


def _kind(codec: str) -> str:
    if codec == "images":
        return "images"
    return "latents" if codec.startswith("latents") else "video"


def _damaged(sources: tuple[Source, ...]) -> list[dict[str, str]]:
    return [{"id": s.id, "note": s.note} for s in sorted(sources, key=lambda s: s.id) if s.note]


def _data(
    plan: Plan, sides: Mapping[str, Side], notes: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    dropped = {
        side: [{"id": bad["id"], "reason": bad["reason"]} for bad in plan.dropped if bad["side"] == side]
        for side in SIDES
    }
    lists = {side: sorted([s.id, s.sha256] for s in sides[side].sources) for side in SIDES}
    return {
        "name": {side: Path(sides[side].root).name for side in SIDES},
        **{key: {side: notes.get(side, {}).get(key) for side in SIDES} for key in ("split", "version")},
        "list_sha256": {side: digest(lists[side]) for side in SIDES},
        "found": {side: len(sides[side].sources) + len(sides[side].broken) for side in SIDES},
        "kept": {side: len(plan.side(side)) for side in SIDES},
        "dropped": dropped,
    }


def _run(detector: Detector) -> dict[str, Any]:
    here = environment(detector.device)
    return {
        "compute_dtype": "float32",
        "tf32": False,
        "device": here["device"],
        "batch": detector.group,
        "workers": 0,
        "commit": here["commit"],
        "libraries": here["packages"],
    }


def _unhashed(manifest: Manifest) -> set[tuple[str, str]]:
    """Return the added fields that are as 0.1.0 assumed, or absent, as in its manifests. ``damaged`` follows
    from the content.
    """
    found = {("pixels", "damaged")}
    sizes = manifest["pixels"].get("frame_size")
    if sizes is None or set(sizes["real"]) == set(sizes["fake"]):
        found.add(("pixels", "frame_size"))
    interval = manifest["generation"].get("interval")
    clips = manifest["clips"]
    if interval is None or interval * clips["stride_fake"] == clips["stride_real"]:
        found.add(("generation", "interval"))
    if manifest["generation"].get("other") is None:
        found.add(("generation", "other"))
    return found


def manifest_hash(manifest: Manifest) -> str:
    """Return 12 hex digits of the hash of every group but ``run``."""
    unhashed = _unhashed(manifest)
    groups = {
        group: {field: value for field, value in manifest[group].items() if (group, field) not in unhashed}
        for group in GROUPS
        if group != "run"
    }
    return digest(groups)[:12]


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write the manifest with its hash, scores and what a replay needs, as JSON, atomically."""
    with reported("the manifest", path):
        commit_file(path, json.dumps({"format": FORMAT, **report}, indent=1, allow_nan=False) + "\n")


def read_report(path: str | Path) -> dict[str, Any]:
    """Return what ``write_report`` wrote, or 0.1.0; InputError if it is another file or was changed."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        fields = {group: set(found["manifest"][group]) for group in GROUPS}
        complete = found["format"] == FORMAT and all(
            set(GROUPS[group]) <= fields[group] <= {*GROUPS[group], *ADDED.get(group, {})} for group in GROUPS
        )
        recorded = found["manifest_hash"]
        value = float(found["value"])
        replay = dict(found["replay"])
        unchanged = complete and manifest_hash(found["manifest"]) == recorded
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a manifest of latte evaluate ({type(error).__name__}: {error}); give "
            "OUT/manifest.json"
        ) from None
    check(
        unchanged,
        f"{path} was changed after it was written: its fields do not give the hash {recorded}; evaluate "
        "again",
    )
    for group, added in ADDED.items():
        found["manifest"][group] = dict.fromkeys(added) | found["manifest"][group]
    return {**found, "value": value, "replay": replay}


def compare(report: Mapping[str, Any], other: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return {"other", "difference", "overlap"} of two reports; InputError naming the first field that
    differs.
    """
    for entry in COMPARED:
        group, fields = (entry, GROUPS[entry]) if isinstance(entry, str) else (entry[0], (entry[1],))
        for field in fields:
            here = report["manifest"][group][field]
            there = other["manifest"][group].get(field)
            if field == "frame_size":  # counts may differ; absent in manifests of 0.1.0
                here, there = (
                    {side: sorted(v[side]) for side in SIDES} if v else None for v in (here, there)
                )
                if None in (here, there):
                    continue
            if here != there:
                raise InputError(
                    f"{group}.{field} is {here!r} here but {there!r} in {name}; scores of different "
                    "protocols do not compare, evaluate both by the same one"
                )
    intervals = [entry["interval"] for entry in (report, other)]
    overlap = None
    if None not in intervals:
        (low, high), (other_low, other_high) = intervals
        overlap = low <= other_high and other_low <= high
    return {"other": other["value"], "difference": report["value"] - other["value"], "overlap": overlap}


def plain(scores: Scores) -> dict[str, Any]:
    """Return the scores as plain data: the documented ``--json`` keys and all other results."""
    parts = {"interval": scores.interval, "infinity": scores.infinity, "floor": scores.floor}
    found = {name: asdict(part) if part else {} for name, part in parts.items()}
    interval, infinity, floor = found.values()
    return {
        "metric": scores.metric,
        "value": scores.value,
        "interval": [interval["low"], interval["high"]] if interval else None,
        "floor": floor.get("value"),
        "values": scores.values,
        "infinity": infinity.get("value"),
        "standard_error": interval.get("std"),
        "floors": floor or None,
        "noise": scores.is_noise,
        "warnings": list(scores.warnings),
        "clips": {"real": scores.num_real, "fake": scores.num_fake},
    }
