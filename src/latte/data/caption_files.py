# SPDX-License-Identifier: Apache-2.0
"""Captions of a folder of videos: a text file beside each video, or one csv or jsonl file for all.

A row of a table that nobody reads and a video that nobody describes are mistakes of the data, so both are refused, by name. A text file
beside no video is no caption: data sets come with readmes.
"""

import csv
import io
import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from latte.checks import InputError, require
from latte.data.skipped import ScanResult

AUTO = "auto"
TABLES = ("captions.csv", "captions.jsonl")
VIDEO_COLUMNS, CAPTION_COLUMNS = ("path", "file", "video", "key"), ("caption", "text")
Row = tuple[str, str, str]
"""Where it stands ('captions.csv:7'), the video's name there, its caption."""


def read_captions(found: ScanResult, setting: str | None) -> dict[str, str]:
    """Key of each usable video -> its caption, without spaces around it; {} when ``setting`` is None.

    ``setting`` is 'auto' (captions.csv or captions.jsonl in the root, or <video>.txt beside each video: what is there) or the path of a
    csv or jsonl file, whose rows name videos from its own folder or from the root on. InputError, in one line that names the first of
    them, for rows of videos that do not exist or stand twice, for empty captions, and for videos without a caption.
    """
    if setting is None:
        return {}
    root, keys = Path(found.root), [clip.key for clip in found.clips]
    known = {*keys, *(Path(os.path.relpath(bad["path"], root)).as_posix() for bad in found.skipped)}
    table = find_table(root, keys) if setting == AUTO else Path(os.path.abspath(setting))
    captions: dict[str, str] = {}
    for where, name, text in sidecars(root, keys) if table is None else read_table(table):
        key = key_of(root, table.parent if table else root, name, known)
        if key is None:
            raise InputError(
                f"{where} describes {name!r}, but there is no such video; mend the name, or leave the row out"
            )
        require(
            key not in captions, where, name, "this video has a caption already", "leave one of the two out"
        )
        require(bool(text.strip()), where, name, "its caption is empty", "write one, or leave the video out")
        captions[key] = text.strip()
    missing = [key for key in keys if key not in captions]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(keys)} videos in {str(root)!r} have no caption, first {missing[0]!r}; "
            f"write one into {table or Path(missing[0]).with_suffix('.txt')}, or set data.captions=null"
        )
    return {key: captions[key] for key in keys}


def find_table(root: Path, keys: Sequence[str]) -> Path | None:
    """The one caption file in ``root``; None for a text file beside each video. InputError when there is nothing, or more than one kind."""
    found = [name for name in TABLES if (root / name).is_file()]
    beside = next((sidecar(key) for key in keys if (root / sidecar(key)).is_file()), None)
    kinds = [*found, *([beside] if beside else [])]
    if not kinds:
        raise InputError(
            f"data.captions is 'auto', but {str(root)!r} holds neither {' nor '.join(TABLES)}, nor a .txt beside a video; "
            "write captions, give the path of a csv or jsonl file, or set data.captions=null"
        )
    if len(kinds) > 1:
        raise InputError(
            f"data.captions is 'auto', but {str(root)!r} holds captions of two kinds, {kinds[0]} and {kinds[1]}; "
            "give the path of one, or remove the other"
        )
    return root / found[0] if found else None


def sidecar(key: str) -> str:
    """'walk/b.mp4' -> 'walk/b.txt'; beside a folder of pictures 'jump/clip1' it is 'jump/clip1.txt'."""
    return str(Path(key).with_suffix(".txt")) if Path(key).suffix else f"{key}.txt"


def sidecars(root: Path, keys: Sequence[str]) -> Iterator[Row]:
    """The rows of all text files that are there."""
    for key in keys:
        path = root / sidecar(key)
        if path.is_file():
            yield str(path), key, read_text(path)


def read_table(path: Path) -> Iterator[Row]:
    """The rows of a csv file with a header, or of a jsonl file; InputError for any other, with the line."""
    kinds = {".csv": csv_rows, ".jsonl": json_rows}
    require(
        path.suffix in kinds,
        "data.captions",
        str(path),
        "it is read by its ending",
        "give 'auto', or a .csv or .jsonl file",
    )
    require(
        path.is_file(),
        "data.captions",
        str(path),
        "there is no such file",
        "give 'auto', or the path of a csv or jsonl file",
    )
    for line, row in kinds[path.suffix](path):
        values = []
        for names in (VIDEO_COLUMNS, CAPTION_COLUMNS):
            here = [name for name in names if name in row]
            require(
                len(here) == 1,
                f"{path}:{line}",
                list(row),
                f"one of its names is to be {' or '.join(names)}",
                "name it so",
            )
            require(
                isinstance(row[here[0]], str),
                f"{path}:{line}",
                row[here[0]],
                f"{here[0]} is a text",
                "write one",
            )
            values.append(row[here[0]])
        yield f"{path}:{line}", values[0], values[1]


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, name -> text) of each row under the header, whose names count without capitals and spaces."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        rows.fieldnames = header = [name.strip().lower() for name in rows.fieldnames or ()]
        for names in (VIDEO_COLUMNS, CAPTION_COLUMNS):
            rule = f"one of its names is to be {' or '.join(names)}"
            require(
                any(name in header for name in names),
                f"the header in {path}:1",
                ",".join(header),
                rule,
                "write path,caption above the rows, with commas between the columns",
            )
        for row in rows:
            even = None not in row and None not in row.values()
            rule = f"the header has {len(rows.fieldnames or ())} columns, and this row has not"
            require(
                even,
                f"{path}:{rows.line_num}",
                next(iter(row.values())),
                rule,
                "put texts with commas in quotes",
            )
            yield rows.line_num, row
    except csv.Error as error:
        raise InputError(
            f"{path}:{rows.reader.line_num} is not csv ({error}); put texts with commas or quotes in quotes"
        ) from None


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number} is no JSON object; write one a line, with path and caption")
        yield number, row


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a mark at its beginning; InputError for any other."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"captions in {path} cannot be read ({error.__class__.__name__}); give a text file in UTF-8"
        ) from None


def key_of(root: Path, folder: Path, name: str, known: Collection[str]) -> str | None:
    """The key of the video that a row in ``folder`` calls ``name``: one of ``known``, or a file outside ``root``; None for neither."""
    for base in dict.fromkeys((folder, root)):
        path = os.path.normpath(base / name)
        key = Path(os.path.relpath(path, root)).as_posix()
        if key in known or (key.startswith("../") and os.path.isfile(path)):
            return key
    return None
