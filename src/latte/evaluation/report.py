# SPDX-License-Identifier: Apache-2.0
"""The evaluation as one HTML page: figures, protocol card, both sides next to each other, and the clips that moved the score.

Axes: t frames, h height, w width, c channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from latte import __version__
from latte import page as report
from latte.data.clips import centre_crop_resize
from latte.data.media import contact_sheet
from latte.evaluation.detectors import Detector
from latte.evaluation.manifest import GROUPS
from latte.evaluation.plan import SIDES, Plan, PlannedClip
from latte.evaluation.scores import Scores, distances_from_real
from latte.evaluation.sources import Side
from latte.files import commit_file, reported

SHOWN, EXTREME, PIXELS = 8, 4, 96


def write_page(
    out: Path,
    plan: Plan,
    sides: Mapping[str, Side],
    banks: Mapping[str, Tensor],
    scores: Scores,
    detector: Detector,
    written: Mapping[str, Any],
) -> Path:
    """out/report.html with its pictures beside it; ``written`` is the content of manifest.json."""
    name, page = plan.protocol.name, out / "report.html"
    lead = f"{scores.metric} by protocol {name} version {plan.protocol.version}, manifest {written['manifest_hash']}, latte {__version__}."
    text = report.page(
        f"{scores.metric.upper()} {report.number(scores.value)} ({name})",
        lead,
        *figures(scores, name),
        report.section(
            "Real and fake side by side",
            report.row(*(sheet(out, sides[side], plan.side(side)[:SHOWN], side, 4) for side in SIDES)),
        ),
        report.section("Worst and best clips", *extremes(out, plan, sides["fake"], banks, detector)),
        report.section("Protocol card", *card(plan, detector)),
        report.section("The data", *data(plan, written["manifest"])),
        report.section(
            "Manifest",
            report.prose("Every field but those of the last group decides the hash."),
            report.table(
                ["group", "field", "value"],
                [
                    (group, field, words(written["manifest"][group][field]))
                    for group, fields in GROUPS.items()
                    for field in fields
                ],
            ),
            report.command(f"latte evaluate --from-manifest {out / 'manifest.json'}"),
        ),
    )
    with reported("the report", page):
        commit_file(page, text)
    return page


def figures(scores: Scores, name: str) -> list[report.Html]:
    """The headline with its interval and floor, a warning when it is noise, and the other metrics."""
    tiles: dict[str, object] = {f"{scores.metric}, {name}": report.number(scores.value)}
    if scores.interval:
        low, high = report.number(scores.interval.low, 3), report.number(scores.interval.high, 3)
        tiles["90 % interval at this number of clips"] = f"{low} to {high}"
    if scores.floor:
        tiles["floor: what a perfect model would score"] = report.number(scores.floor.value)
    if scores.infinity:
        tiles["extrapolated to endless sets"] = report.number(scores.infinity.value)
    parts = [report.tiles(tiles)]
    if scores.is_noise:
        parts.append(
            report.prose(
                "This figure is below twice its floor: at this number of clips it says nothing about the model."
            )
        )
    rows = [(metric, value) for metric, value in scores.values.items()]
    if scores.floor:
        rows += [
            ("real half against real half", scores.floor.halves),
            ("D (D + 5) / (2 N)", scores.floor.white),
        ]
    parts.append(report.table([f"{scores.num_real} real, {scores.num_fake} fake rows", "value"], rows))
    if scores.floor:
        parts.append(
            report.prose(
                f"Floor: {scores.floor.method}. D (D + 5) / (2 N) is its law for features of unit variance."
            )
        )
    return parts


def words(value: object, absent: str = "not stated", depth: int = 0) -> str:
    """Plain data for people: 'real: codec h264 (8), fps 25 (8); fake: not stated'. None is ``absent``."""
    if isinstance(value, Mapping):
        if depth == 2:
            return ", ".join(f"{key} ({words(part, absent, 3)})" for key, part in value.items())
        parts = [
            f"{key}{'' if depth else ':'} {words(part, absent, depth + 1)}" for key, part in value.items()
        ]
        return (", " if depth else "; ").join(parts)
    if isinstance(value, list | tuple):
        return ", ".join(words(part, absent, depth + 1) for part in value) or "none"
    return absent if value is None else str(value)


def picture(side: Side, clip: PlannedClip, count: int) -> np.ndarray:
    """``count`` frames of the clip, evenly spread, uint8 (t PIXELS PIXELS c)."""
    indices = clip.indices
    chosen = [indices[i * (len(indices) - 1) // max(count - 1, 1)] for i in range(count)]
    return centre_crop_resize(side.read(clip.id, chosen), PIXELS, PIXELS)


def sheet(
    out: Path, side: Side, clips: Sequence[PlannedClip], name: str, columns: int, captions: Sequence[str] = ()
) -> report.Html:
    """A contact sheet of ``clips`` as a figure, written to out/<name>.png."""
    path = out / f"{name}.png"
    with reported("a contact sheet", path):
        contact_sheet(
            [picture(side, clip, columns) for clip in clips], 1, captions or [clip.id[-44:] for clip in clips]
        ).save(path)
    return report.media(
        path, f"{name}: the first {len(clips)} clips of the plan" if not captions else name, beside=out
    )


def extremes(
    out: Path, plan: Plan, side: Side, banks: Mapping[str, Tensor], detector: Detector
) -> list[report.Html]:
    """Sheets of the fake clips farthest from the mean of the real ones, and nearest to it."""
    clips = plan.side("fake")
    far = (
        distances_from_real(banks["real"], banks["fake"])
        .reshape(len(clips), detector.rows(plan.protocol.frames))
        .mean(1)
        .tolist()
    )
    order = sorted(range(len(clips)), key=lambda i: (-far[i], i))
    told = "Distance of a fake clip from the real mean in standard deviations of the real features; 1 is that of a usual real clip."
    parts = [report.prose(told)]
    for name, picked in (("worst", order[:EXTREME]), ("best", order[::-1][:EXTREME])):
        captions = [f"{clips[i].id[-60:]}: {report.number(far[i], 3)}" for i in picked]
        parts.append(sheet(out, side, [clips[i] for i in picked], name, 8, captions))
    return parts


def card(plan: Plan, detector: Detector) -> list[report.Html]:
    """What the protocol fixes, and what its detector sees and does not see."""
    rows = [
        (key, words(value, absent="none"))
        for key, value in plan.protocol.describe().items()
        if key not in ("name", "note")
    ]
    changed = (
        []
        if plan.protocol.standard
        else [report.prose("Changed from the published protocol: compares only with the same changes.")]
    )
    weights = f"{detector.source}, SHA-256 {detector.sha256[:16]}"
    about = [report.prose(text) for text in (f"{detector.name}: {detector.card}", f"Weights: {weights}.")]
    return [report.prose(plan.protocol.note), *changed, *about, report.table(["choice", "value"], rows)]


def data(plan: Plan, manifest: Mapping[str, Any]) -> list[report.Html]:
    """Per side what was found and kept, codecs and frame rates, and every video that was left out."""
    rows = []
    for side in SIDES:
        traits = manifest["pixels"]["codec"][side]
        shown = [
            "; ".join(f"{name} ({count})" for name, count in traits[what].items())
            for what in ("codec", "fps")
        ]
        rows.append((side, *(manifest["data"][key][side] for key in ("name", "found", "kept")), *shown))
    parts = [
        report.table(["side", "folder", "videos found", "clips taken", "codec", "frames per second"], rows)
    ]
    if plan.dropped:
        parts += [
            report.prose(f"{len(plan.dropped)} videos were left out."),
            report.table(
                ["side", "video", "reason"], [(bad["side"], bad["id"], bad["reason"]) for bad in plan.dropped]
            ),
        ]
    return parts
