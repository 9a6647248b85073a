# SPDX-License-Identifier: Apache-2.0
"""The folder format of encoded latents: safetensors shards and a manifest, each written atomically.

A shard holds the digest of the plan it was made by, so the file itself states whether it is complete and up
to date.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latte.autoencoder.compression import Compression
from latte.checks import InputError, check, printable
from latte.data.media import MediaInfo
from latte.data.windows import AGAIN
from latte.data.writers import is_running
from latte.files import commit_file, reported

FORMAT = "latte-latents"
VERSION = 1
MANIFEST = "manifest.json"
CAPTIONS = "captions-?????.safetensors"  # parts of the caption features, if captions were encoded
SINGLE = "captions.safetensors"  # one file for all of them, as written before there were parts; still read
SOURCE = "source"  # a video has the tensors "source:<key>" and, with mirror images, "mirror:<key>"
MIRROR = "mirror"
SHARDS = "shard-?????.safetensors"
PLAN = "latte"  # key of a shard's metadata
MAX_HEADER = 100_000_000  # bytes, the limit of safetensors itself
KEPT = "; files that are finished are kept"
# Temporary files of a writer that was killed; versions before 0.2 called them .<name>.<pid>.partial
LEFTOVER = re.compile(
    r"\.(?:tmp-)?(?:shard|captions|manifest)[\w.-]*?[.-](?P<pid>\d+)(?:-[0-9a-f]{8}|\.partial)"
)


@dataclass(frozen=True)
class Record:
    """One video as the manifest lists it. ``stamp`` is (bytes, time) of its source, ``starts`` the first
    frame of every window of a codec that compresses time; the rest is as in MediaInfo.
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
    starts: tuple[int, ...] = ()

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Self:
        """Return the record of an entry of the manifest."""
        values = {name: value for name, value in entry.items() if name not in ("shard", "crops")}
        values["steps"] = tuple((step, count) for step, count in entry["steps"])
        values["time_base"] = tuple(entry["time_base"])
        values["stamp"] = tuple(entry["stamp"])
        values["starts"] = tuple(entry.get("starts", ()))
        return cls(**values)

    def entry(self) -> dict[str, Any]:
        """Return plain data that ``of`` reads back; without windows as every version wrote it."""
        values = asdict(self)
        if not self.starts:
            del values["starts"]
        return values

    @property
    def times(self) -> list[float]:
        """Seconds of each frame, [] when unknown."""
        info = MediaInfo(
            self.key, self.frames, self.fps, 0, 0, FORMAT, self.start, self.steps, self.time_base
        )
        return info.times


def tensor_name(kind: str, key: str, crop: int = 0) -> str:
    """Return the name of a video's tensor, of the centred crop or of a further one."""
    return f"{kind}@{crop}:{key}" if crop else f"{kind}:{key}"


def check_path(path: Path, field: str) -> None:
    """InputError for a path that is not UTF-8: safetensors cannot open it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{field} is {printable(path)}, which is not UTF-8, and safetensors cannot open such a path; "
            "rename the folder"
        ) from None


def is_encoded(root: Path) -> bool:
    """Return whether ``root`` is a folder of latents: it has shards, or a manifest of ours."""
    path = root / MANIFEST
    if not path.is_file():
        return False
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return any(root.glob(SHARDS))
    return any(root.glob(SHARDS)) or (isinstance(manifest, dict) and manifest.get("format") == FORMAT)


def read_manifest(root: Path) -> dict[str, Any]:
    """Return the manifest in ``root``; InputError when it is missing, damaged or of another version."""
    path = root / MANIFEST
    check_path(root, "data.root")
    check(
        path.is_file(),
        f"data.root {printable(root)} holds no {MANIFEST}, so it is no folder of latents; give one made by "
        "latte data encode",
    )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{printable(path)} is damaged ({error.__class__.__name__}: {error}); {AGAIN}"
        ) from error
    check(
        found == (FORMAT, VERSION),
        f"{printable(path)} has format {found}, but this version of latte reads {(FORMAT, VERSION)}; {AGAIN}",
    )
    manifest.setdefault("skipped", manifest.pop("quarantined", []))  # the key of 0.1.0
    return manifest


def compression_of(settings: dict[str, Any]) -> Compression:
    """Return the compression of the codec that made the latents of a manifest's settings."""
    codec = settings["codec"]
    return Compression(
        channels=codec["channels"],
        spatial_factor=codec["downscale"],
        temporal_factor=codec.get("temporal_factor", 1),
        causal=codec.get("causal", True),
        latent_step=codec.get("latent_step", 1),
    )


def write_manifest(out: Path, settings: dict[str, Any], complete: bool, **content: Any) -> None:
    """Write the manifest of ``out``; an incomplete one only records the settings."""
    manifest = {"format": FORMAT, "version": VERSION, "complete": complete, "settings": settings, **content}
    commit(out / MANIFEST, json.dumps(manifest), "the manifest")


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write ``tensors`` by name with ``metadata`` (plain data) atomically; RunError when that fails."""
    text = {PLAN: json.dumps(metadata)}
    what = "latents" if path.match(SHARDS) else "features"
    commit(path, lambda temporary: save_file(tensors, temporary, metadata=text), what)


def write_shard(path: Path, tensors: dict[str, Tensor], plan: str, refused: list[dict[str, str]]) -> None:
    """Write a shard with the digest of its plan and the videos it could not hold ({"path", "reason"})."""
    save(path, tensors, {"plan": plan, "refused": refused})


def commit(path: Path, content: str | Callable[[Path], Any], what: str = "features") -> None:
    """Write a file of a folder atomically, see ``latte.files.commit_file``; RunError when that fails."""
    with reported(what, path, kept=KEPT):
        path.parent.mkdir(parents=True, exist_ok=True)
        commit_file(path, content)


def finished(path: Path, plan: str) -> list[dict[str, str]] | None:
    """Return the videos that the shard ``path`` could not hold, or None unless it exists and was made by
    ``plan``.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            written = json.loads((shard.metadata() or {}).get(PLAN, "{}"))
    except (OSError, SafetensorError):
        return None
    if written.get("plan") != plan:
        return None
    return written["refused"]


def check_destination(out: Path, settings: dict[str, Any]) -> None:
    """InputError when ``out`` is no folder, or holds other files or latents of other ``settings``."""
    shown = printable(out)
    check_path(out, "--out")
    check(out.is_dir() or not out.exists(), f"--out {shown} exists and is no folder; give a new folder")
    if not is_encoded(out):
        other = out.is_dir() and any(not file.name.startswith(".") for file in out.iterdir())
        check(not other, f"{shown} holds files, but none is a {MANIFEST} of latents; give a new folder")
        return
    existing = read_manifest(out)["settings"]
    different = [
        f"{name} {existing.get(name)} instead of {value}"
        for name, value in settings.items()
        if existing.get(name) != value
    ]
    check(
        not different,
        f"{shown} holds latents of other settings ({'; '.join(different)}); give another folder, or remove "
        "this one",
    )


def remove_leftovers(out: Path, kept: set[Path]) -> None:
    """Remove the shards in ``out`` that are not ``kept``, and temporary files of dead writers."""
    for path in set(out.glob(SHARDS)) - kept:
        path.unlink(missing_ok=True)
    for path in out.glob(".*"):
        match = LEFTOVER.fullmatch(path.name)
        if match and not is_running(int(match["pid"])):
            path.unlink(missing_ok=True)


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
    """InputError unless each of ``files`` ({"file", "bytes"}) of a manifest exists and has the size that it
    lists.
    """
    for listed in files:
        path = root / listed["file"]
        size = path.stat().st_size if path.is_file() else 0
        check(
            size == listed["bytes"],
            f"{printable(path)} has {size:,} bytes, but its manifest lists {listed['bytes']:,}: the folder "
            f"is damaged; {AGAIN}",
        )
