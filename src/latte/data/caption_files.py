# SPDX-License-Identifier: Apache-2.0
"""Captions of a folder of videos: a text file beside each video, or one csv or jsonl file for all.

A row of a table that matches no video, and a video without a caption, are mistakes in the data, so both are
refused by name. A text file beside no video is not a caption: data sets come with readmes.
"""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from latte.checks import InputError, check, printable
from latte.data.skipped import FoundClip, ScanResult

AUTO = "auto"
TABLES = ("captions.csv", "captions.jsonl")
VIDEO_COLUMNS = ("path", "file", "video", "key")
CAPTION_COLUMNS = ("caption", "text")
Row = tuple[str, str, str]
"""The row's place ('captions.csv:7'), the video's name there, its caption."""


def read_captions(found: ScanResult, setting: str | None) -> dict[str, str]:
    """Return {key of each usable video: its caption, without spaces around it}; {} when ``setting`` is None.

    ``setting`` is 'auto' (captions.csv or captions.jsonl in the root, or <video>.txt beside each video,
    whichever exists) or the path of a csv or jsonl file, whose rows name videos relative to its own folder or
    to the root. InputError, naming the first case, for rows of videos that do not exist or occur twice, for
    empty captions, and for videos without a caption.
    """
    if setting is None:
        return {}
    root = Path(found.root)
    keys = [clip.key for clip in found.clips]
    skipped = (Path(os.path.relpath(bad["path"], root)).as_posix() for bad in found.skipped)
    known = {*keys, *skipped}
    table = find_table(root, found.clips) if setting == AUTO else Path(os.path.abspath(setting))
    captions: dict[str, str] = {}
    for where, name, text in sidecars(root, found.clips) if table is None else read_table(table):
        key = key_of(root, table.parent if table else root, name, known)
        if key is None:
            raise InputError(
                f"{where} describes {name!r}, but there is no such video; correct the name, or remove the row"
            )
        check(
            key not in captions,
            f"{where} describes {name!r}, which has a caption already; remove one of the two",
        )
        check(
            bool(text.strip()), f"{where} has an empty caption for {name!r}; write one, or remove the video"
        )
        captions[key] = text.strip()
    missing = [key for key in keys if key not in captions]
    if missing:
        first = next(clip for clip in found.clips if clip.key == missing[0])
        raise InputError(
            f"{len(missing)} of {len(keys)} videos in {str(root)!r} have no caption, first {missing[0]!r}; "
            f"write one into {printable(table or sidecar(first))}, or set data.captions=null"
        )
    return {key: captions[key] for key in keys}


def find_table(root: Path, clips: Sequence[FoundClip]) -> Path | None:
    """Return the caption file in ``root``; None for a text file beside each video. InputError for none, or
    for several kinds.
    """
    tables = [name for name in TABLES if (root / name).is_file()]
    beside = next((sidecar(clip) for clip in clips if (root / sidecar(clip)).is_file()), None)
    kinds = list(tables)
    if beside:
        kinds.append(beside)
    if not kinds:
        raise InputError(
            f"data.captions is 'auto', but {str(root)!r} holds neither {' nor '.join(TABLES)}, nor a .txt "
            "beside a video; write captions, give the path of a csv or jsonl file, or set data.captions=null"
        )
    if len(kinds) > 1:
        raise InputError(
            f"data.captions is 'auto', but {str(root)!r} holds captions of two kinds, {kinds[0]} and "
            f"{printable(kinds[1])}; give the path of one, or remove the other"
        )
    if not tables:
        return None
    return root / tables[0]


def sidecar(clip: FoundClip) -> str:
    """Return 'walk/b.txt' for the video 'walk/b.mp4', and 'jump/scene.01.txt' for the frame folder
    'jump/scene.01'.
    """
    path = Path(clip.key)
    if clip.info.codec == "images":
        return f"{path}.txt"
    return str(path.with_suffix(".txt"))


def sidecars(root: Path, clips: Sequence[FoundClip]) -> Iterator[Row]:
    """Yield the rows of all text files that exist."""
    for clip in clips:
        path = root / sidecar(clip)
        if path.is_file():
            yield printable(path), clip.key, read_text(path)


def read_table(path: Path) -> Iterator[Row]:
    """Yield the rows of a csv file with a header, or of a jsonl file; InputError, with the line, for any
    other.
    """
    readers = {".csv": csv_rows, ".jsonl": json_rows}
    check(
        path.suffix in readers,
        f"data.captions is {str(path)!r}, which ends in neither .csv nor .jsonl; give 'auto', or such a file",
    )
    check(
        path.is_file(),
        f"data.captions is {str(path)!r}, but there is no such file; give 'auto', or a csv or jsonl file",
    )
    for line, row in readers[path.suffix](path):
        where = f"{printable(path)}:{line}"
        values = []
        for names in (VIDEO_COLUMNS, CAPTION_COLUMNS):
            present = [name for name in names if name in row]
            check(
                len(present) == 1,
                f"{where} has the names {list(row)}, but exactly one must be {' or '.join(names)}; rename it",
            )
            value = row[present[0]]
            check(isinstance(value, str), f"{where}: {present[0]} must be a string, got {value!r}")
            values.append(value)
        yield where, values[0], values[1]


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, {name: text}) of each row under the header, whose names are read without capitals and
    spaces.
    """
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True, skipinitialspace=True)
    shown = printable(path)
    try:
        rows.fieldnames = header = [name.strip().lower() for name in rows.fieldnames or ()]
        for names in (VIDEO_COLUMNS, CAPTION_COLUMNS):
            check(
                any(name in header for name in names),
                f"the header in {shown}:1 is {','.join(header)!r}, but exactly one must be "
                f"{' or '.join(names)}; write path,caption above the rows, with commas between the columns",
            )
        for row in rows:
            complete = None not in row and None not in row.values()
            first = next(iter(row.values()))
            check(
                complete,
                f"{shown}:{rows.line_num} ({first!r}) does not have the {len(header)} columns of the header; "
                "put texts with commas in quotes",
            )
            yield rows.line_num, row
    except csv.Error as error:
        raise InputError(
            f"{shown}:{rows.reader.line_num} is not csv ({error}); put texts with commas or quotes in quotes"
        ) from None


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, object) of each line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(
                f"{printable(path)}:{number} is not a JSON object; write one per line, with path and caption"
            )
        yield number, row


def read_text(path: Path) -> str:
    """Return a text file in UTF-8, with or without a byte order mark; InputError for any other."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"captions in {printable(path)} cannot be read ({type(error).__name__}); save it as UTF-8"
        ) from None


def key_of(root: Path, folder: Path, name: str, known: Collection[str]) -> str | None:
    """Return the key of the video that a row in ``folder`` calls ``name``, or None.

    It is one of ``known`` (in any Unicode form, when only one fits), or a file outside ``root``.
    """
    keys = []
    for base in dict.fromkeys((folder, root)):
        path = os.path.normpath(base / name)
        key = Path(os.path.relpath(path, root)).as_posix()
        if key in known or (key.startswith("../") and os.path.isfile(path)):
            return key
        keys.append(unicodedata.normalize("NFC", key))
    if name.isascii():
        return None
    same = [key for key in known if unicodedata.normalize("NFC", key) in keys]
    if len(same) == 1:
        return same[0]
    return None
