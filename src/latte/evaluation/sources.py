# SPDX-License-Identifier: Apache-2.0
"""The two sides of an evaluation as lists of videos with the hash of their content, and the frames of any of them.

Content is hashed anew each time, whatever a file's size and date say, and what was found out about a folder's files is kept under the
hash of all of them: a file that was replaced in place is never taken for the old one.
Axes: t frames, h height, w width, c channels.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol as Interface

import numpy as np
from safetensors import safe_open

from latte.autoencoder.codec import Codec, CodecConfig, build_codec
from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, require
from latte.data.clips import to_uint8
from latte.data.frame_folder import IMAGE_SUFFIXES, frame_files
from latte.data.media import VIDEO_SUFFIXES, MediaInfo, read_frames
from latte.data.shards import MANIFEST, SHARDS, SOURCE, Record, read_manifest
from latte.data.skipped import check_folder, scan
from latte.evaluation.detector_files import file_sha256
from latte.evaluation.plan import Source

ALBUM, MOSAIC = (
    "album.json",
    "clips.gif",
)  # latte sample writes both beside its clips; the mosaic of all clips is none of them


class Side(Interface):
    """What planning and extraction ask of a side. It travels to other processes."""

    @property
    def root(self) -> str:
        """The folder."""
        ...

    @property
    def sources(self) -> tuple[Source, ...]:
        """Its videos."""
        ...

    @property
    def broken(self) -> tuple[dict[str, str], ...]:
        """{"id", "reason"} of what cannot be read."""
        ...

    def read(self, id: str, indices: Sequence[int]) -> np.ndarray:
        """Frames ``indices`` of video ``id`` -> uint8 (t h w c)."""
        ...


@dataclass(frozen=True)
class FolderSide:
    """The videos and frame folders below ``root``."""

    root: str
    sources: tuple[Source, ...]
    broken: tuple[dict[str, str], ...]
    infos: dict[str, MediaInfo]

    def read(self, id: str, indices: Sequence[int]) -> np.ndarray:
        """Frames of a video; Unreadable (an InputError) when it no longer can be read."""
        return read_frames(self.infos[id], indices)


@dataclass(frozen=True)
class LatentSide:
    """The videos of a folder of latent shards, decoded by the codec they were made with."""

    root: str
    sources: tuple[Source, ...]
    broken: tuple[dict[str, str], ...]
    shards: dict[str, str]
    codec: CodecConfig
    fingerprint: str
    device: str

    def read(self, id: str, indices: Sequence[int]) -> np.ndarray:
        """Frames of a video, decoded; reads from the first to the last of them."""
        low = min(indices)
        with safe_open(Path(self.root) / self.shards[id], framework="pt") as shard:
            span = shard.get_slice(f"{SOURCE}:{id}")[low : max(indices) + 1]
        latent = span[[index - low for index in indices]].float()[None].to(self.device)
        return np.asarray(to_uint8(_codec(self.codec, self.fingerprint, self.device).decode(latent)))[0]


def open_side(
    name: str, path: str | Path, cache: Path, codec_path: str | None = None, device: str = "cpu"
) -> Side:
    """'real' or 'fake' -> its videos. ``cache`` keeps what was found out about files. InputError when there is no such folder, nothing in
    it is a video, or its latents' codec is not to be had."""
    root = Path(check_folder(path, name.upper()))
    latents = (root / MANIFEST).is_file() and any(root.glob(SHARDS))
    side = _open_latents(root, codec_path, device) if latents else _open_folder(root, cache)
    kinds = f"videos ({', '.join(VIDEO_SUFFIXES)}), folders of numbered images, latent shards or a model"
    require(
        bool(side.sources or side.broken),
        name.upper(),
        str(path),
        "it holds no video",
        f"give a folder with {kinds}",
    )
    return side


def file_hashes(root: Path) -> dict[str, str]:
    """Path below ``root`` (with /) -> SHA-256 of every video and image file; links are followed, never in a circle."""
    found, been = {}, set()
    for folder, folders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if here not in been else []
        been.add(here)
        for name in files:
            path = Path(folder, name)
            if (
                name.lower().endswith((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES))
                and not name.startswith(".")
                and path.is_file()
            ):
                found[path.relative_to(root).as_posix()] = file_sha256(path)
    return found


def digest(value: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _open_folder(root: Path, cache: Path) -> FolderSide:
    root = root.absolute()
    hashes = file_hashes(root)
    found = scan(root, labels=False, cache_dir=cache / digest(hashes)[:16])
    sources, mosaic = [], MOSAIC if (root / ALBUM).is_file() else None
    for clip in found.clips:
        if clip.key == mosaic:
            continue
        if clip.key in hashes:
            sha256 = hashes[clip.key]
        else:  # a folder of frames
            names = [Path(path).relative_to(root).as_posix() for _, path in frame_files(root / clip.key)]
            sha256 = digest([hashes[name] for name in names])
        sources.append(Source(clip.key, clip.info.frames, sha256, clip.info.fps, clip.info.codec))
    broken = tuple(
        {"id": Path(bad["path"]).relative_to(root).as_posix(), "reason": bad["reason"]}
        for bad in found.skipped
    )
    return FolderSide(str(root), tuple(sources), broken, {clip.key: clip.info for clip in found.clips})


def _open_latents(root: Path, codec_path: str | None, device: str) -> LatentSide:
    manifest = read_manifest(root)
    if not manifest["complete"]:
        raise InputError(
            f"the latents in {root} are not finished; run the same latte data encode again, it goes on where it stopped"
        )
    made, config = (
        manifest["settings"]["codec"],
        CodecConfig(name=manifest["settings"]["codec"]["name"], path=codec_path),
    )
    _codec(config, read_fingerprint(made), device)
    sources, shards = [], {}
    for entry in manifest["videos"]:
        record = Record.of(entry)
        shards[record.key] = entry["shard"]
        with safe_open(root / entry["shard"], framework="pt") as shard:
            latent = shard.get_tensor(f"{SOURCE}:{record.key}").contiguous()
        content = hashlib.sha256(latent.numpy().tobytes()).hexdigest()
        sources.append(Source(record.key, record.frames, content, record.fps, f"latents of {made['name']}"))
    broken = tuple({"id": bad["path"], "reason": bad["reason"]} for bad in manifest["skipped"])
    return LatentSide(str(root), tuple(sources), broken, shards, config, read_fingerprint(made), device)


@lru_cache(2)
def _codec(config: CodecConfig, fingerprint: str, device: str) -> Codec:
    codec = build_codec(config, device)
    require(
        codec.fingerprint == fingerprint,
        "codec",
        f"{codec.name} {codec.fingerprint}",
        f"the latents were made with {fingerprint}",
        "give its weights by --codec-path",
    )
    return codec


def album_facts(root: str | Path) -> dict[str, object]:
    """What ``latte sample`` wrote about the clips in ``root``, as fields of the manifest's generation group; {} for any other folder."""
    names = {
        "checkpoint_sha256": "weights",
        "codec_sha256": "codec",
        "sampler": "sampler",
        "steps": "steps",
        "guidance": "guidance",
    }
    try:
        facts = json.loads((Path(root) / ALBUM).read_text("utf-8"))["facts"]
        return {field: facts[name] for field, name in names.items() if name in facts}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
