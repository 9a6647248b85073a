# SPDX-License-Identifier: Apache-2.0
"""What the page may open, each under a name: models, runs, data sets, reports; and what data sets and reports
show. The operator's command line gives the paths, a visitor only chooses names.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latte.checks import InputError, RunError, check, printable
from latte.config.run import RUN_FILE
from latte.data.config import PROCEDURAL
from latte.page import html
from latte.ui.desk import without_folders

GENERATED = "procedural: "  # before the names of sets without files
MAX_DEPTH = 4  # folders below a root that are searched
MAX_FOUND = 500
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PER_PAGE = 12
PROCEDURAL_CLIPS = 240  # shown of an unlimited set
MAX_FRAMES = 48  # of a clip on the page
MAX_SIDE = 160
MAX_SKIPPED = 200
MAX_REPORT_BYTES = 40 << 20


@dataclass(frozen=True)
class UiConfig:
    """Settings of the page; InputError on construction for values that do not fit."""

    models: tuple[str, ...] = ("builtin",)
    runs: tuple[Path, ...] = ()  # folders with run folders and reports
    data: tuple[Path, ...] = ()  # folders of videos
    out: Path = Path("ui-clips")
    host: str = "127.0.0.1"
    port: int = 7860
    auth: str = ""  # user:password
    keep_hours: float = 24.0  # clips that are older are deleted
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        check(bool(self.models), "give at least one MODEL, e.g. builtin")
        check(0 <= self.port < 65536, f"--port must be in [0, 65535], got {self.port}")
        check(self.keep_hours > 0, f"--keep-hours must be positive, got {self.keep_hours}")
        check(not self.out.exists() or self.out.is_dir(), f"--out {self.out} is not a folder; give one")
        for option, folders in (("--runs", self.runs), ("--data", self.data)):
            for folder in folders:
                check(folder.is_dir(), f"{option} is {printable(folder)}, which is not a folder; give one")
        user, colon, password = self.auth.partition(":")
        check(
            not self.auth or bool(user and colon and password),
            "LATTE_UI_AUTH must be USER:PASSWORD, both not empty",
        )
        check(
            self.host in LOOPBACK or bool(self.auth),
            f"--host {self.host} can be reached from other machines, so the page needs a password; set "
            "LATTE_UI_AUTH=USER:PASSWORD in the environment, or leave --host out",
        )


class Shelf:
    """The names that the page offers, and what each stands for. InputError for any other name."""

    def __init__(self, config: UiConfig):
        self.config = config

    def runs(self) -> dict[str, Path]:
        """Return the run folders below ``config.runs``, newest first."""
        found = named(self.config.runs, RUN_FILE)
        folders = {Path(name).parent.as_posix(): path.parent for name, path in found.items()}
        return {path.resolve().name if name == "." else name: path for name, path in folders.items()}

    def models(self) -> dict[str, str]:
        """Return the models by name: those of the command line, then the runs with a checkpoint."""
        found = {Path(name).name if Path(name).is_absolute() else name: name for name in self.config.models}
        for name, path in self.runs().items():
            if any((path / "checkpoints").glob("step-*")):
                found.setdefault(name, str(path))
        return found

    def data(self) -> dict[str, Path | None]:
        """Return the data sets by name; None for procedural ones."""
        procedural = {f"{GENERATED}{name}": None for name in PROCEDURAL}
        return {path.resolve().name: path for path in self.config.data} | procedural

    def reports(self) -> dict[str, Path]:
        """Return the reports (HTML files) below ``config.runs``, newest first."""
        return named(self.config.runs, "*.html")


def named(roots: tuple[Path, ...], pattern: str) -> dict[str, Path]:
    """Return the files of a pattern below ``roots`` by their relative names, newest first."""
    files = {
        path.relative_to(root).as_posix(): path for root in roots for path in walk(root, pattern, MAX_DEPTH)
    }
    return dict(sorted(files.items(), key=lambda item: -modified(item[1]))[:MAX_FOUND])


def modified(path: Path) -> float:
    """Return when ``path`` was changed; 0 when it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def walk(folder: Path, pattern: str, depth: int) -> Iterator[Path]:
    """Yield the files of a pattern in ``folder`` and ``depth`` levels below; links are not followed."""
    try:
        yield from (path for path in folder.glob(pattern) if path.is_file() and not path.is_symlink())
        below = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return
    if depth:
        for path in below:
            if not path.name.startswith(".") and path.name != "checkpoints":
                yield from walk(path, pattern, depth - 1)


@dataclass(frozen=True)
class Shown:
    """A clip on the page: where it is, what is written below it, and its frames or why there are none."""

    name: str
    facts: str
    caption: str = ""
    picture: str = ""
    fault: str = ""


@dataclass
class DataSet:
    """An opened data set. ``root`` is None for a procedural one."""

    name: str
    root: Path | None
    summary: str = ""
    count: int = 0
    skipped: Sequence[dict[str, str]] = ()
    ignored: str = ""
    source: Any = None  # the scan of a folder, or the procedural scenes
    captions: dict[str, str] = field(default_factory=dict)

    @property
    def pages(self) -> int:
        """Return how many pages of clips there are."""
        return max(1, -(-self.count // PER_PAGE))

    def page(self, number: int) -> list[Shown]:
        """Return the clips of a page, counted from 1; InputError for one that does not exist."""
        check(1 <= number <= self.pages, f"page must be in [1, {self.pages}], got {number}")
        first = PER_PAGE * (number - 1)
        show = {True: self._file, False: self._scene}[self.root is not None]
        return [show(index) for index in range(first, min(first + PER_PAGE, self.count))]

    def _file(self, index: int) -> Shown:
        """Return clip ``index`` of a folder."""
        from latte.data.clips import shrink
        from latte.data.media import Unreadable, read_frames

        clip = self.source.clips[index]
        info = clip.info
        facts = f"{info.frames} frames of {info.width} x {info.height}, {info.fps:.4g} fps"
        notes = "".join(f"; {note.partition(':')[0]}" for note in info.notes)
        caption = self.captions.get(clip.key, "")
        step = max(1, -(-info.frames // MAX_FRAMES))
        try:
            frames = read_frames(info, range(0, info.frames, step))
        except (Unreadable, RunError, OSError) as error:
            return Shown(
                clip.key, facts + notes, caption, fault=f"can no longer be read ({type(error).__name__})"
            )
        return Shown(clip.key, facts + notes, caption, html.animation(shrink(frames, MAX_SIDE)))

    def _scene(self, index: int) -> Shown:
        """Return clip ``index`` of a procedural set."""
        frames = self.source.render_clip(index)
        facts = f"class {self.source.classes[self.source.label(index)]}"
        return Shown(f"clip {index}", facts, self.source.caption(index), html.animation(frames))


def open_data(name: str, root: Path | None) -> DataSet:
    """Scan a folder of videos, or open a procedural set; InputError for a folder that cannot be read."""
    if root is None:
        from latte.data.base import DataConfig

        config = DataConfig(kind="procedural", scenes=name.removeprefix(GENERATED))
        scenes = config.scene_set
        size = f"{config.frames} frames of {config.resolution} x {config.resolution}"
        summary = f"procedural, unlimited; {size}; the first {PROCEDURAL_CLIPS} clips are shown"
        return DataSet(name, None, summary, PROCEDURAL_CLIPS, source=scenes)
    from latte.data.caption_files import AUTO, TABLES, read_captions, sidecar
    from latte.data.skipped import reasons, scan

    found = scan(root, labels=False)
    captions: dict[str, str] = {}
    fault = ""
    sidecars = (root / sidecar(clip) for clip in found.clips)
    if any(path.is_file() for path in (*(root / table for table in TABLES), *sidecars)):
        try:
            captions = read_captions(found, AUTO)
        except InputError as error:
            fault = without_folders(str(error))
    sizes = sorted({(clip.info.width, clip.info.height) for clip in found.clips})
    shown = ", ".join(f"{width} x {height}" for width, height in sizes[:6])
    more = f" and {len(sizes) - 6} more" * (len(sizes) > 6)
    parts = [f"{len(found.clips)} clips", f"{len(captions)} with a caption", f"sizes {shown}{more}"]
    parts += [f"captions: {fault}"] * bool(fault)
    parts.append(f"{len(found.skipped)} skipped" + f" ({reasons(found.skipped)})" * bool(found.skipped))
    ignored = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in found.ignored.items())
    return DataSet(name, root, "; ".join(parts), len(found.clips), found.skipped, ignored, found, captions)


def clips_table(shown: Sequence[Shown]) -> html.Html:
    """Return the clips of a page as cards."""
    cards = []
    for clip in shown:
        picture = html.tag("p", {}, clip.fault)
        if clip.picture:
            picture = html.tag(
                "img", {"src": clip.picture, "alt": clip.caption or clip.name, "class": "pixels"}
            )
        caption = html.tag("div", {"class": "caption"}, printable(clip.caption))
        name = html.tag("div", {"class": "soft"}, printable(clip.name))
        cards.append(
            html.tag(
                "div",
                {"class": "card"},
                picture,
                caption,
                name,
                html.tag("div", {"class": "soft"}, clip.facts),
            )
        )
    return html.tag("div", {"class": "cards"}, *cards)


def skipped_table(data: DataSet) -> html.Html:
    """Return the files that are not used, with the reasons; paths are relative to the data set."""
    parts = []
    if data.skipped and data.root:
        root = os.path.abspath(data.root)
        rows = [
            (printable(os.path.relpath(bad["path"], root)), without_folders(bad["reason"]))
            for bad in data.skipped[:MAX_SKIPPED]
        ]
        parts.append(html.table(["skipped file", "reason"], rows))
    if data.ignored:
        parts.append(html.prose(f"Not read, by suffix: {data.ignored}."))
    return html.tag("div", {}, *(parts or [html.prose("No file is skipped.")]))


def report_frame(path: Path) -> html.Html:
    """Return a report in a frame of its own, which may run its scripts but reach nothing else."""
    size = path.stat().st_size
    check(
        size <= MAX_REPORT_BYTES,
        f"report {path.name} has {size:,} bytes, more than the {MAX_REPORT_BYTES:,} that the page shows; "
        "open the file itself",
    )
    text = path.read_text("utf-8", "replace")
    look = {"srcdoc": text, "sandbox": "allow-scripts", "class": "report", "title": path.name}
    return html.tag("iframe", look)
