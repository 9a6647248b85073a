# SPDX-License-Identifier: Apache-2.0
"""The folder format of encoded latents: safetensors shards and a manifest, each file there in whole or not at
all.

A shard carries the digest of the plan it was made by, so whether it is finished, and still the right one, is
seen from itself.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latte.checks import InputError, RunError, require
from latte.data.media import MediaInfo

FORMAT, VERSION = "latte-latents", 1
MANIFEST = "manifest.json"
CAPTIONS = "captions-?????.safetensors"  # parts of the captions' features, if they were encoded, too
SINGLE = (
    "captions.safetensors"  # all of them in one file, as they were stored before there were parts; still read
)
SOURCE, MIRROR = "source", "mirror"  # names of a video's two tensors are "source:<key>" and "mirror:<key>"
SHARDS = "shard-?????.safetensors"
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors itself
PLAN = "latte"  # key of a shard's metadata
AGAIN = "encode again with: latte data encode"


@dataclass(frozen=True)
class Record:
    """One video as the manifest lists it. ``stamp`` is size and time of its source file; the rest is as in
    media.MediaInfo.
    """

    key: str
    label: int | None
    caption: str | None
    frames: int
    fps: float = 0.0
    start: int = 0
    steps: tuple[tuple[int, int], ...] = ()
    time_base: tuple[int, int] = (0, 1)
    stamp: tuple[int, ...] = ()

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Self:
        """The record of a manifest's entry."""
        values = {name: value for name, value in entry.items() if name != "shard"}
        values["steps"] = tuple((step, count) for step, count in entry["steps"])
        values["time_base"], values["stamp"] = tuple(entry["time_base"]), tuple(entry["stamp"])
        return cls(**values)

    @property
    def times(self) -> list[float]:
        """Seconds of each frame, [] when unknown."""
        return MediaInfo(
            self.key, self.frames, self.fps, 0, 0, FORMAT, self.start, self.steps, self.time_base
        ).times


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest in ``root``, of this format and version; InputError otherwise."""
    path = root / MANIFEST
    if not path.is_file():
        raise InputError(
            f"data.root {str(root)!r} holds no {MANIFEST}, so it is no folder of latents; give one made by "
            "latte data encode"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error.__class__.__name__}: {error}); {AGAIN}") from error
    require(
        found == (FORMAT, VERSION),
        f"format of {path}",
        found,
        f"this version reads {(FORMAT, VERSION)}",
        AGAIN,
    )
    manifest.setdefault("skipped", manifest.pop("quarantined", []))  # the key of 0.1.0
    return manifest


def write_manifest(out: Path, settings: dict[str, Any], complete: bool, **content: Any) -> None:
    """The manifest of the folder ``out``; an incomplete one only tells whose folder this is."""
    text = json.dumps(
        {"format": FORMAT, "version": VERSION, "complete": complete, "settings": settings, **content}
    )
    commit(out / MANIFEST, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_shard(path: Path, tensors: dict[str, Tensor], plan: str, refused: list[dict[str, str]]) -> None:
    """``tensors`` by name, with the digest of the plan and what it could not hold ({"path", "reason"})."""
    save(path, tensors, {"plan": plan, "refused": refused})


def save(path: Path, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    """``tensors`` by name, with what the file tells of itself."""
    commit(path, lambda temporary: save_file(tensors, temporary, metadata={PLAN: json.dumps(told)}))


def finished(path: Path, plan: str) -> list[dict[str, str]] | None:
    """What the shard ``path`` had to leave out, when it is there and was made by ``plan``; None when it is
    (or has) to be made.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            written = json.loads((shard.metadata() or {}).get(PLAN, "{}"))
    except (OSError, SafetensorError):
        return None
    return written["refused"] if written.get("plan") == plan else None


def tensor_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Return name -> (first byte, end) of each tensor in a safetensors file; {} for a damaged one."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER)))
        spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        return {name: (8 + length + start, 8 + length + stop) for name, (start, stop) in spans.items()}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def check_sizes(root: Path, files: Iterable[dict[str, Any]]) -> None:
    """InputError unless the ``files`` ({"file", "bytes"}) of a manifest are there, as long as it says."""
    for listed in files:
        path = root / listed["file"]
        have = path.stat().st_size if path.is_file() else 0
        rule = f"the manifest says {listed['bytes']}"
        require(have == listed["bytes"], f"size of {path}", have, rule, f"the folder is damaged, {AGAIN}")


def commit(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file and make it ``path`` once it is on the disk; RunError when that
    fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} cannot be written ({error}); what is finished stays, make room and run the same command "
            "again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
