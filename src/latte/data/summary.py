# SPDX-License-Identifier: Apache-2.0
"""A folder of clips at a glance: sizes, frame rates, lengths, classes, captions, duplicates, what is skipped
and why; as plain data, as lines, and as a page with previews.

Axes: t frames, h height, w width, c channels.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from latte.checks import InputError, check, printable
from latte.data.base import DataConfig
from latte.data.buckets import Buckets
from latte.data.caption_files import TABLES, read_captions, sidecar
from latte.data.clips import shrink
from latte.data.fingerprint import UNREADABLE, fingerprints
from latte.data.latents import count_latents, latent_captions, scan_latents
from latte.data.media import Unreadable, read_frames
from latte.data.selection import facts, report, select, settle
from latte.data.skipped import FoundClip, ScanResult, check_folder, reasons, remarks, scan
from latte.page import html

Scanned = tuple[ScanResult, dict[str, Any], list[str], dict[str, str] | None]
SHOWN = 4  # values of a line, skipped files and pairs of duplicates; all are in the plain data
PREVIEWS = 24
PREVIEW_FRAMES = 12
PREVIEW_SIDE = 144  # pixels of the longer side


@dataclass(frozen=True)
class Summary:
    """What a folder holds. Counts are by value as text, the most frequent first."""

    clips: int
    sizes: dict[str, int]  # width x height
    rates: dict[str, int]  # in fps; "unknown" for frame folders
    frames: dict[str, float]  # {"min", "median", "max"} of a clip
    seconds: dict[str, float] | None  # the same; None where no rate is known
    classes: dict[str, int]
    captions: dict[str, Any]  # {"clips", "different"}, or {"problem"} for captions that do not fit
    duplicates: list[list[str]]  # keys of clips of equal content
    skipped: dict[str, int]  # code of the reason -> files


def summarise(found: ScanResult, captions: Mapping[str, str] | None = None) -> Summary:
    """Return the summary of a scan.

    ``captions`` are those of the clips by key; by default they are looked for in the folder. Duplicates are
    found by ``latte.data.fingerprint``; clips of latents have none.
    """
    infos = [clip.info for clip in found.clips]
    seconds = [info.frames / info.fps for info in infos if info.fps]
    names = Counter(found.classes[clip.label] for clip in found.clips if clip.label is not None)
    rates = [f"{info.fps:.4g}" if info.fps else "unknown" for info in infos]
    return Summary(
        clips=len(infos),
        sizes=counted(f"{info.width}x{info.height}" for info in infos),
        rates=counted(rates),
        frames=spread([info.frames for info in infos]),
        seconds=spread(seconds) if seconds else None,
        classes={name: names[name] for name in found.classes},
        captions=caption_counts(found) if captions is None else count_captions(captions),
        duplicates=duplicates(found.clips),
        skipped=counted(bad["reason"].partition(":")[0] for bad in found.skipped),
    )


def counted(values: Iterable[str]) -> dict[str, int]:
    """Return value -> how often it occurs, the most frequent first."""
    return dict(Counter(values).most_common())


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the smallest, the median and the largest value."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def count_captions(captions: Mapping[str, str]) -> dict[str, Any]:
    """Return how many clips have a caption and how many different ones there are."""
    return {"clips": len(captions), "different": len(set(captions.values()))}


def caption_counts(found: ScanResult) -> dict[str, Any]:
    """Return ``count_captions`` of the captions in the folder; {"problem"} where they do not fit."""
    try:
        return count_captions(find_captions(found))
    except InputError as error:
        return {"problem": str(error)}


def find_captions(found: ScanResult) -> dict[str, str]:
    """Return the captions in the folder by key, {} where there are none; InputError where they do not fit."""
    root = Path(found.root)
    tables = any((root / name).is_file() for name in TABLES)
    if not tables and not any((root / sidecar(clip)).is_file() for clip in found.clips):
        return {}
    return read_captions(found, "auto")


def duplicates(clips: Sequence[FoundClip]) -> list[list[str]]:
    """Return the keys of clips of equal content, group by group; content is read where sizes agree."""
    by_size = defaultdict(list)
    for clip in clips:
        if clip.info.codec != "latents":
            by_size[clip.info.frames, clip.info.width, clip.info.height, size_of(clip.info.path)].append(clip)
    alike = [clip for group in by_size.values() if len(group) > 1 for clip in group]
    by_content = defaultdict(list)
    for key, content in fingerprints({clip.key: clip.info.path for clip in alike}).items():
        if content != UNREADABLE:
            by_content[content].append(key)
    return sorted(sorted(keys) for keys in by_content.values() if len(keys) > 1)


def size_of(path: str) -> int:
    """Return the bytes of a file; 0 for a folder and a file that is gone."""
    return os.path.getsize(path) if os.path.isfile(path) else 0


def lines_of(found: ScanResult, summary: Summary) -> list[str]:
    """Return the summary for people, a line per fact; names are escaped."""
    classes = f" in {len(summary.classes)} classes" if summary.classes else ""
    counts = f"{summary.clips} clips{classes}, {len(found.skipped)} skipped"
    lines = [counts, *(f"{name:<10}  {value}" for name, value in rows_of(summary).items())]
    for group in summary.duplicates[:SHOWN]:
        lines.append(f"  the same: {', '.join(printable(key) for key in group[:SHOWN])}")
    for bad in found.skipped[:SHOWN]:
        lines.append(f"  skipped: {relative(bad['path'], found.root)} ({bad['reason']})")
    if summary.captions.get("clips") and found.clips[0].info.codec != "latents":
        lines.append("a text model learns the captions with data.captions=auto")
    return [*lines, *remarks(found)]


def rows_of(summary: Summary) -> dict[str, str]:
    """Return name -> what the summary has to say about it."""
    rows = {"sizes": values_text(summary.sizes), "fps": values_text(summary.rates)}
    rows["frames"] = range_text(summary.frames, "")
    if summary.seconds:
        rows["length"] = range_text(summary.seconds, " s")
    if summary.classes:
        rows["classes"] = values_text(summary.classes, limit=3 * SHOWN)
    rows["captions"] = captions_text(summary)
    extra = sum(len(group) - 1 for group in summary.duplicates)
    rows["duplicates"] = "none"
    if extra:
        rows["duplicates"] = "1 copy of another clip" if extra == 1 else f"{extra} copies of other clips"
    if summary.skipped:
        rows["skipped"] = ", ".join(f"{count} {code}" for code, count in summary.skipped.items())
    return rows


def values_text(counts: Mapping[str, int], limit: int = SHOWN) -> str:
    """Return '64x64 (8), 32x32 (2), 3 others (5)'."""
    items = list(counts.items())
    shown = [f"{printable(value)} ({count})" for value, count in items[:limit]]
    if rest := items[limit:]:
        shown.append(f"{len(rest)} others ({sum(count for _, count in rest)})")
    return ", ".join(shown)


def range_text(values: Mapping[str, float], unit: str) -> str:
    """Return '75' or '9 to 64, median 20' with a unit."""
    low, middle, high = (f"{values[name]:.4g}" for name in ("min", "median", "max"))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}, median {middle}"


def captions_text(summary: Summary) -> str:
    """Return how many clips have captions, or why those that are there do not fit."""
    counts = summary.captions
    if "problem" in counts:
        return f"do not fit: {counts['problem']}"
    if not counts["clips"]:
        return "none"
    return f"{counts['clips']} clips, {counts['different']} different"


def relative(path: str, root: str) -> str:
    """Return ``path`` below ``root``, escaped."""
    return printable(os.path.relpath(path, root)) if os.path.isabs(path) else printable(path)


def page_of(found: ScanResult, summary: Summary, title: str) -> html.Html:
    """Return the summary as a page that holds its previews: clips of every class in turn, that play."""
    skipped = [(relative(bad["path"], found.root), bad["reason"]) for bad in found.skipped]
    notes = [(relative(note["path"], found.root), note["note"]) for note in found.notes]
    parts = [html.tiles({"clips": summary.clips, "classes": len(summary.classes), "skipped": len(skipped)})]
    parts.append(html.section("What is there", html.table(("what", "values"), [*rows_of(summary).items()])))
    captions = {} if "problem" in summary.captions else find_captions(found)
    previews = (preview_of(clip, found.classes, captions.get(clip.key, "")) for clip in chosen(found.clips))
    shown = [preview for preview in previews if preview]
    if shown:
        more = f"{len(shown)} of {summary.clips} clips" + (
            ", of every class in turn." * bool(found.classes) or "."
        )
        parts.append(html.section("Previews", html.prose(more), html.gallery(*shown)))
    if len(summary.classes) > 1:
        parts.append(html.section("Classes", html.table(("class", "clips"), [*summary.classes.items()])))
    if summary.duplicates:
        groups = [(" = ".join(printable(key) for key in group),) for group in summary.duplicates]
        parts.append(html.section("Equal content", html.table(("clips",), groups)))
    if skipped:
        why = html.prose(reasons(found.skipped))
        parts.append(html.section("Skipped", why, html.table(("file", "reason"), skipped)))
    if notes:
        parts.append(html.section("Unusual", html.table(("file", "note"), notes)))
    if ignored := found.ignored:
        kinds = sorted((suffix or "without a suffix", count) for suffix, count in ignored.items())
        parts.append(html.section("Not read", html.table(("suffix", "files"), kinds)))
    return html.page(title, "What latte data scan found, with clips that play.", *parts)


def chosen(clips: Sequence[FoundClip]) -> list[FoundClip]:
    """Return at most PREVIEWS clips: of each class in turn, evenly spaced within it."""
    by_class = defaultdict(list)
    for clip in clips:
        by_class[clip.label].append(clip)
    groups = list(by_class.values())[:PREVIEWS]
    turns = -(-PREVIEWS // max(len(groups), 1))
    spaced = [
        [group[k * len(group) // min(turns, len(group))] for k in range(min(turns, len(group)))]
        for group in groups
    ]
    rows = [group[turn] for turn in range(turns) for group in spaced if turn < len(group)]
    return rows[:PREVIEWS]


def preview_of(clip: FoundClip, classes: Sequence[str], caption: str = "") -> html.Html | None:
    """Return a small picture of a clip that plays, over its name, numbers and caption; None for latents and
    for a file that can no longer be read.
    """
    info = clip.info
    if info.codec == "latents":
        return None
    count = min(PREVIEW_FRAMES, info.frames)
    step = max((info.frames - 1) // max(count - 1, 1), 1)
    try:
        frames = read_frames(info, [k * step for k in range(count)])  # (t h w c)
    except Unreadable:
        return None
    rate = info.fps / step if info.fps else 8.0
    name = printable(clip.key if clip.label is None else Path(clip.key).name)
    label = "" if clip.label is None else f"{printable(classes[clip.label])}: "
    facts = f"{label}{name}, {info.frames} frames of {info.width}x{info.height}"
    if caption:
        facts += f": {printable(caption)}"
    picture = html.tag(
        "img", {"src": html.animation(shrink(frames, PREVIEW_SIDE), rate), "alt": name, "loading": "lazy"}
    )
    return html.framed(picture, facts)


def scan_result(found: ScanResult, summary: Summary) -> dict[str, Any]:
    """Return the result of ``latte data scan`` as plain data. ``classes`` have a usable clip,
    ``empty_classes`` have none.
    """
    names = list(found.classes)
    used = {clip.label for clip in found.clips}
    files = [
        {
            "path": clip.info.path,
            "frames": clip.info.frames,
            "height": clip.info.height,
            "width": clip.info.width,
            "fps": clip.info.fps,
            "class": None if clip.label is None else names[clip.label],
            "notes": list(clip.info.notes),
        }
        for clip in found.clips
    ]
    skipped = list(found.skipped)
    return {
        "clips": len(files),
        "classes": [name for label, name in enumerate(names) if label in used],
        "empty_classes": [name for label, name in enumerate(names) if label not in used],
        "skipped": skipped,
        "quarantined": skipped,  # the key of 0.1.0, for one version
        "files": files,
        "ignored": found.ignored,
        "summary": asdict(summary),
        "captions": summary.captions,
        "duplicates": summary.duplicates,
    }


def latents_line(latents: dict[str, Any]) -> str:
    """Return what ``count_latents`` counted, for people."""
    windows = ""
    if latents["windows"]:
        windows = f" in {latents['windows']} windows of {latents['window']['frames']} frames"
    counts = f"{latents['frames']} frames of video{windows}, {latents['latent_frames']} latent frames"
    return f"latents of codec {latents['codec']}: {counts}"


def scan_latent_folder(data: DataConfig, ruled: bool) -> Scanned:
    """Return ``scan_videos`` for a folder of latents, which has its captions with it."""
    root = check_folder(folder_of(data))
    found = scan_latents(root, data.clip_rule if ruled else None)
    counts = count_latents(root)
    return found, {"latents": counts}, [latents_line(counts)], latent_captions(root)


def scan_videos(
    data: DataConfig,
    buckets: Buckets | None,
    global_batch: int,
    ruled: bool,
    progress: Callable[[int, int], None] | None = None,
) -> Scanned:
    """Return the clips of a folder, how a run chooses frames and buckets as plain data, that for people, and
    captions that are known beforehand (none).

    With ``ruled``, clips that do not fit are among the skipped, and the buckets are counted.
    """
    images = buckets is not None and buckets.has_images
    found = scan(check_folder(folder_of(data)), labels=data.labels, progress=progress, images=images)
    if not ruled:
        rules = settle(data, [clip.info for clip in found.clips])
        settled = rules.settled(data)
        return found, {"rule": settled.rule, "fps": settled.fps}, [rules.notice] if rules.notice else [], None
    selection = select(data, found, buckets)
    return selection.found, facts(selection, global_batch), report(selection, global_batch), None


def folder_of(data: DataConfig) -> str:
    """Return the folder of the clips; InputError for a run without one."""
    check(
        data.root is not None,
        f"SOURCE has no folder of clips: data.root is not set and data.kind is {data.kind}; give a folder, "
        "or data.root=FOLDER behind it",
    )
    return str(data.root)
