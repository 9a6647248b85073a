# SPDX-License-Identifier: Apache-2.0
"""The evaluation as one HTML page: scores, protocol card, both sides next to each other, and the clips that
affect the score most.

Axes: t frames, h height, w width, c channels.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from latte import __version__
from latte.checks import command_line, printable
from latte.data.clips import centre_crop_resize
from latte.data.writers import write_mp4
from latte.evaluation.detectors import Detector
from latte.evaluation.manifest import ADDED, GROUPS
from latte.evaluation.memorisation import HeldOut, Memorisation
from latte.evaluation.metrics import METRICS
from latte.evaluation.plan import SIDES, Plan, PlannedClip
from latte.evaluation.protocols import score_name
from latte.evaluation.scores import Scores, distances_from_real
from latte.evaluation.sources import Side
from latte.files import commit_file, reported
from latte.page import html

SHOWN = 8  # clips of each side
EXTREME = 4  # worst and best clips
PIXELS = 112  # height and width of a clip on the page
CAPTION = 44  # characters
USUAL_FPS = 8.0  # of clips whose rate is unknown
NEAREST = "nearest"  # folder of the clips that are nearest to training clips, and of their neighbours


def write_page(
    out: Path,
    plan: Plan,
    sides: Mapping[str, Side],
    features: Mapping[str, Tensor],
    scores: Scores,
    detector: Detector,
    written: Mapping[str, Any],
    copied: tuple[HeldOut, Memorisation] | None = None,
) -> Path:
    """Write out/report.html, one file with its clips, and return its path.

    ``written`` is the content of manifest.json, ``copied`` what was found of memorised clips.
    """
    name = plan.protocol.name
    path = out / "report.html"
    version = f"protocol {name} version {plan.protocol.version}, manifest {written['manifest_hash']}"
    sheets = [gallery(sides[side], plan.side(side)[:SHOWN], side.capitalize()) for side in SIDES]
    memorised = [nearest_section(out, plan, sides, *copied)] if copied else []
    text = html.page(
        f"{plan.protocol.title(scores.metric)}: {html.number(scores.value)}",
        f"By {version}, latte {__version__}.",
        *headline(scores, name),
        html.section("Real and fake side by side", html.row(*sheets)),
        html.section("Worst and best clips", *extremes(plan, sides["fake"], features, detector)),
        *memorised,
        html.section("Protocol card", *card(plan, detector)),
        html.section("The data", *data(plan, written["manifest"])),
        html.section("Manifest", *manifest_table(out, written["manifest"])),
    )
    with reported("the report", path):
        commit_file(path, text)
    return path


def headline(scores: Scores, name: str) -> list[html.Html]:
    """Return the value with its interval and floor, warnings, and the other metrics."""
    tiles: dict[str, object] = {f"{score_name(scores.metric, name)}, {name}": html.number(scores.value)}
    if scores.interval:
        low, high = html.number(scores.interval.low, 3), html.number(scores.interval.high, 3)
        tiles["90 % interval at this number of clips"] = f"{low} to {high}"
    if scores.floor:
        tiles["floor: the score of a perfect model"] = html.number(scores.floor.value)
    if scores.infinity:
        tiles["extrapolated to infinitely many clips"] = html.number(scores.infinity.value)
    parts = [html.tiles(tiles), *(html.prose(f"Warning: {warning}.") for warning in scores.warnings)]
    if scores.is_noise:
        parts.append(
            html.prose(
                "The value is below twice its floor: at this number of clips it says nothing about the model."
            )
        )
    rows = [
        (score_name(metric, name), METRICS[metric].summary, value) for metric, value in scores.values.items()
    ]
    if scores.floor:
        rows += [
            ("floor, halves", "real half against real half", scores.floor.halves),
            ("floor, law", "D (D + 5) / (2 N)", scores.floor.white),
        ]
    counts = f"{_count(scores.num_real)} real, {_count(scores.num_fake)} fake rows"
    parts.append(html.table([counts, "what", "value"], rows))
    if scores.floor:
        law = "D (D + 5) / (2 N) is its law for features of unit variance."
        parts.append(html.prose(f"Floor: {scores.floor.method}. {law}"))
    return parts


def _count(rows: int | None) -> str:
    return "unknown number of" if rows is None else str(rows)


def manifest_table(out: Path, manifest: Mapping[str, Any]) -> list[html.Html]:
    """Return every field of the manifest, and the command that repeats the evaluation."""
    rows = [
        (group, field, words(manifest[group].get(field)))
        for group, fields in GROUPS.items()
        for field in (*fields, *ADDED.get(group, ()))
    ]
    return [
        html.prose("The fields of the last group are not hashed."),
        html.table(["group", "field", "value"], rows),
        html.command(command_line("evaluate", "--from-manifest", str(out / "manifest.json"))),
    ]


def words(value: object, absent: str = "not stated", depth: int = 0) -> str:
    """Return plain data as text: 'real: codec h264 (8), fps 25 (8); fake: not stated'. None is ``absent``."""
    if isinstance(value, Mapping):
        if depth == 2:
            return ", ".join(f"{key} ({words(part, absent, 3)})" for key, part in value.items())
        mark = "" if depth else ":"
        parts = [f"{key}{mark} {words(part, absent, depth + 1)}" for key, part in value.items()]
        return (", " if depth else "; ").join(parts)
    if isinstance(value, list | tuple):
        return ", ".join(words(part, absent, depth + 1) for part in value) or "none"
    if value is None:
        return absent
    return printable(str(value))


def caption(clip: PlannedClip) -> str:
    """Return the end of the clip's name."""
    return printable(clip.id)[-CAPTION:]


def playing(side: Side, clip: PlannedClip, text: str, path: Path | None = None) -> html.Html:
    """Return a clip as a video of PIXELS x PIXELS in the page, which is also kept as ``path`` if given."""
    frames = centre_crop_resize(side.read(clip.id, clip.indices), PIXELS, PIXELS)  # (t PIXELS PIXELS c)
    rate = next((source.fps for source in side.sources if source.id == clip.id), 0.0)
    fps = min(max(rate / clip.stride, 1.0), 60.0) if rate else USUAL_FPS
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder, "clip.mp4")
        write_mp4(path, frames, fps)
        return html.media(path, text, width=PIXELS)


def gallery(side: Side, clips: Sequence[PlannedClip], title: str, captions: Sequence[str] = ()) -> html.Html:
    """Return a heading and the clips next to each other."""
    texts = captions or [caption(clip) for clip in clips]
    shown = [playing(side, clip, text) for clip, text in zip(clips, texts, strict=True)]
    return html.tag("div", {}, html.tag("h3", {}, title), html.gallery(*shown))


def extremes(plan: Plan, side: Side, features: Mapping[str, Tensor], detector: Detector) -> list[html.Html]:
    """Return the fake clips farthest from the mean of the real ones, and nearest to it."""
    clips = plan.side("fake")
    rows = distances_from_real(features["real"], features["fake"])
    distances = rows.reshape(len(clips), detector.rows(plan.protocol.frames)).mean(1).tolist()
    order = sorted(range(len(clips)), key=lambda i: (-distances[i], i))
    parts = [
        html.prose(
            "Distance of a fake clip from the real mean in standard deviations of the real features; a "
            "real clip is at about 1."
        )
    ]
    for name, picked in (("Worst", order[:EXTREME]), ("Best", order[::-1][:EXTREME])):
        captions = [f"{caption(clips[i])}: {html.number(distances[i], 3)}" for i in picked]
        parts.append(gallery(side, [clips[i] for i in picked], name, captions))
    return parts


def memorisation_parts(found: Mapping[str, Any]) -> list[html.Html]:
    """Return the verdict, the three ratios and how to read them; ``found`` is ``Memorisation.plain()``."""
    names = {
        "relative": "generated clips, compared with real ones (1: as fresh clips)",
        "ratio": "generated clips",
        "reference": "real clips",
    }
    rows = []
    for key, name in names.items():
        low, high = html.number(found[key]["low"], 3), html.number(found[key]["high"], 3)
        rows.append((name, html.number(found[key]["value"], 3), f"{low} to {high}"))
    text = (
        "Distance to the nearest training clip divided by that to the nearest held-out clip, in the "
        "detector's features; geometric mean over clips, bootstrap interval. Searched: "
        f"{found['num_train']} training and {found['num_held_out']} held-out clips."
    )
    columns = ["train / held-out distance of", "ratio", "90 % interval"]
    return [html.prose(found["verdict"]), html.table(columns, rows), html.prose(text)]


def nearest_section(
    out: Path, plan: Plan, sides: Mapping[str, Side], held_out: HeldOut, found: Memorisation
) -> html.Html:
    """Return the ratios and, for the generated clips that are nearest to training clips compared with
    held-out ones, all three clips, which are also kept in out/NEAREST.
    """
    order = sorted(range(len(found.ratios)), key=lambda index: (found.ratios[index], index))[:EXTREME]
    fake, train = plan.side("fake"), plan.side("real")
    rows = []
    for number, index in enumerate(order, start=1):
        trio = (
            ("generated", sides["fake"], fake[index]),
            ("training", sides["real"], train[found.train[index]]),
            ("held-out", held_out.side, held_out.clips[found.held_out[index]]),
        )
        shown = []
        for name, side, clip in trio:
            text = f"{name}: {caption(clip)}"
            if name == "generated":
                text += f", ratio {html.number(found.ratios[index], 3)}"
            shown.append(playing(side, clip, text, out / NEAREST / f"{number}-{name}.mp4"))
        rows.append(html.gallery(*shown))
    return html.section(
        "Nearest training and held-out clips",
        *memorisation_parts(found.plain()),
        html.prose("The generated clips of the smallest ratios, each with its nearest clip of both sets:"),
        *rows,
    )


def card(plan: Plan, detector: Detector) -> list[html.Html]:
    """Return what the protocol fixes, and what its detector measures."""
    protocol = plan.protocol
    choices = {key: value for key, value in protocol.describe().items() if key not in ("name", "note")}
    texts = [protocol.note]
    if not protocol.standard:
        texts.append("Changed from the published protocol: comparable only with the same changes.")
    texts += [
        f"{detector.name}: {detector.card}",
        f"Weights: {detector.source}, SHA-256 {detector.sha256[:16]}.",
    ]
    rows = [(key, words(value, absent="none")) for key, value in choices.items()]
    return [*(html.prose(text) for text in texts), html.table(["choice", "value"], rows)]


def data(plan: Plan, manifest: Mapping[str, Any]) -> list[html.Html]:
    """Return per side what was found and used, codecs, rates and sizes, and every video that was left out or
    is damaged.
    """
    pixels = manifest["pixels"]
    rows = []
    for side in SIDES:
        counts = (*pixels["codec"][side].values(), pixels["frame_size"][side])
        shown = ["; ".join(f"{name} ({count})" for name, count in values.items()) for values in counts]
        name, found, kept = (manifest["data"][key][side] for key in ("name", "found", "kept"))
        rows.append((side, printable(name), found, kept, *shown))
    columns = ["side", "folder", "videos found", "clips used", "codec", "frames per second", "frame size"]
    parts = [html.table(columns, rows)]
    listed = [(bad["side"], printable(bad["id"]), bad["reason"]) for bad in plan.dropped]
    if listed:
        parts.append(html.prose(f"{len(listed)} videos were left out."))
        parts.append(html.table(["side", "video", "reason"], listed))
    damaged = [(side, printable(bad["id"]), bad["note"]) for side in SIDES for bad in pixels["damaged"][side]]
    if damaged:
        parts.append(html.prose(f"{len(damaged)} videos are damaged in part."))
        parts.append(html.table(["side", "video", "damage"], damaged))
    return parts
