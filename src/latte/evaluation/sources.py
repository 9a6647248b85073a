# SPDX-License-Identifier: Apache-2.0
"""The two sides of an evaluation as lists of videos with the hash of their content, and the frames of any of
them; latent shards as a side.

Content is hashed anew each time, whatever a file's size and date are, and what was probed of a folder's files
is cached under the hash of all of them: a file that was replaced in place is never mistaken for the old one.
Latent shards are decoded by their codec. Where it compresses time, a video is stored as windows that were
encoded by themselves, see ``latte.data.windows``. A frame is read from the first window that shows it, which
is decoded as a whole, so frames are those of the encoded clip exactly; frames of several windows are decoded
from each.
Axes: f latent frames, t frames, h height, w width, c channels.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, runtime_checkable
from typing import Protocol as Interface

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from latte.autoencoder.codec import Codec, CodecConfig, build_codec
from latte.checkpoint.record import read_fingerprint
from latte.checks import check, printable
from latte.data.clips import ClipRule, to_uint8
from latte.data.frame_folder import IMAGE_SUFFIXES, frame_files
from latte.data.media import VIDEO_SUFFIXES, MediaInfo, read_frames
from latte.data.shards import MANIFEST, SHARDS, SOURCE, Record, read_manifest
from latte.data.skipped import check_folder, scan
from latte.data.video_stream import is_video_name
from latte.distributed import ALONE, Group
from latte.evaluation.detector_files import file_sha256
from latte.evaluation.plan import Source

RECORDS = ("clips.json", "album.json")  # latte sample writes the first beside its clips, 0.1.0 the second
MOSAIC = "clips.gif"  # and this, which shows all clips and is not one of them
GENERATED_CODEC = "h264"  # of the files that latte writes
RECORDED = {  # field of the manifest's generation group: key of the record
    "checkpoint_sha256": "weights",
    "codec_sha256": "codec",
    "sampler": "sampler",
    "steps": "steps",
    "guidance": "guidance",
}
USUAL = {"eta": 0.0, "dtype": "torch.float32"}  # other keys of the record that go unnamed at these values
NOT_PIXELS = ("fps",)


class Side(Interface):
    """What planning and extraction need of a side. It is pickled for other processes."""

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
        """{"id", "reason"} of the videos that cannot be read."""
        ...

    def read(self, id: str, indices: Sequence[int]) -> np.ndarray:
        """Return frames ``indices`` of video ``id``, uint8 (t h w c)."""
        ...


@runtime_checkable
class ClipSource(Interface):
    """A model whose clips are the fake side: anything that can write video files of generated clips."""

    @property
    def name(self) -> str:
        """What a replay opens again: an absolute path, a hub id or a model of the package."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the first clip."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width of a clip, known without generating any."""
        ...

    @property
    def interval(self) -> int | None:
        """How many video frames lie between two frames of its training clips; None: unknown."""
        ...

    def generate(
        self,
        folder: Path,
        count: int,
        fps: float | None,
        progress: Callable[[int, int], None],
        ranks: Group = ALONE,
    ) -> dict[str, Any]:
        """Write ``count`` clips to ``folder``, those that are missing only; return fields of the generation
        group. ``ranks`` share the clips; they are passed only if there are several.
        """
        ...


@dataclass(frozen=True)
class FolderSide:
    """The videos and frame folders below ``root``."""

    root: str
    sources: tuple[Source, ...]
    broken: tuple[dict[str, str], ...]
    infos: dict[str, MediaInfo]

    def read(self, id: str, indices: Sequence[int]) -> np.ndarray:
        """Return frames of a video; Unreadable (an InputError) if it can no longer be read."""
        return read_frames(self.infos[id], indices)


def open_side(
    name: str, path: str | Path, cache: Path, codec_path: str | None = None, device: str = "cpu"
) -> Side:
    """Return the videos of 'real' or 'fake'; ``cache`` keeps what was probed.

    InputError if there is no such folder, it holds no video, or the codec of its latents is not available.
    """
    root = Path(check_folder(path, name.upper()))
    latents = (root / MANIFEST).is_file() and any(root.glob(SHARDS))
    side = open_latents(root, codec_path, device) if latents else open_folder(root, cache)
    kinds = f"videos ({', '.join(VIDEO_SUFFIXES)}), folders of numbered images, latent shards or a model"
    check(
        bool(side.sources or side.broken),
        f"{name.upper()} is {str(path)!r}, but it holds no video; give a folder with {kinds}",
    )
    return side


def file_hashes(root: Path) -> dict[str, str]:
    """Return {path below ``root``, with /: SHA-256} of every video and image file; links are followed, cycles
    are not.
    """
    found = {}
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        folders[:] = [] if here in visited else sorted(name for name in folders if not name.startswith("."))
        visited.add(here)
        for name in files:
            path = Path(folder, name)
            read = name.lower().endswith(IMAGE_SUFFIXES) or is_video_name(str(path))
            if read and not name.startswith(".") and path.is_file():
                found[path.relative_to(root).as_posix()] = file_sha256(path)
    return found


def digest(value: object) -> str:
    """Return the SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def open_folder(root: Path, cache: Path) -> FolderSide:
    """Return the videos and frame folders below ``root``; ``cache`` keeps what was probed."""
    root = root.absolute()
    hashes = file_hashes(root)
    found = scan(root, labels=False, cache_dir=cache / digest(hashes)[:16])
    mosaic = MOSAIC if any((root / name).is_file() for name in RECORDS) else None
    sources = []
    for clip in found.clips:
        if clip.key == mosaic:
            continue
        if clip.key in hashes:
            sha256 = hashes[clip.key]
        else:  # a folder of frames
            names = [Path(path).relative_to(root).as_posix() for _, path in frame_files(root / clip.key)]
            sha256 = digest([hashes[name] for name in names])
        info = clip.info
        size = (info.height, info.width)
        sources.append(Source(clip.key, info.frames, sha256, info.fps, info.codec, *size, info.damage))
    broken = tuple(
        {"id": Path(bad["path"]).relative_to(root).as_posix(), "reason": bad["reason"]}
        for bad in found.skipped
    )
    return FolderSide(str(root), tuple(sources), broken, {clip.key: clip.info for clip in found.clips})


def read_generation(root: str | Path) -> dict[str, Any]:
    """Return what ``latte sample`` recorded of the clips in ``root`` as fields of the generation group; {}
    for other folders.
    """
    try:
        record = next((path for name in RECORDS if (path := Path(root) / name).is_file()), Path(root))
        facts = json.loads(record.read_text("utf-8"))["facts"]
        found = {field: facts[key] for field, key in RECORDED.items() if key in facts}
        named = {*RECORDED.values(), *NOT_PIXELS}
        other = {key: value for key, value in facts.items() if key not in named and value != USUAL.get(key)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if other:
        found["other"] = other
    return found


Places = Mapping[int, tuple[int, int]]
"""Frame of a video -> (window that shows it, its number there)."""


@dataclass(frozen=True)
class LatentSide:
    """The videos of latent shards, decoded by the codec they were made with.

    ``places`` of each video where there are windows, of ``window`` latent frames; else every frame has a
    latent frame.
    """

    root: str
    sources: tuple[Source, ...]
    broken: tuple[dict[str, str], ...]
    shards: dict[str, str]
    codec: CodecConfig
    fingerprint: str | None
    device: str
    places: Mapping[str, Places]
    window: int = 0

    def read(self, id: str, indices: Sequence[int]) -> np.ndarray:
        """Return decoded frames of a video, uint8 (t h w c); InputError if latents or frames have NaN or
        Inf.
        """
        with safe_open(Path(self.root) / self.shards[id], framework="pt") as shard:
            stored = shard.get_slice(f"{SOURCE}:{id}")
            if not self.window:
                low = min(indices)
                span = stored[low : max(indices) + 1]
                return self._decode(id, span[[index - low for index in indices]])
            places = [self.places[id][index] for index in indices]
            windows = {
                number: stored[number * self.window : (number + 1) * self.window]
                for number in sorted({number for number, _ in places})
            }
        clips = {number: self._decode(id, latent) for number, latent in windows.items()}
        return np.stack([clips[number][frame] for number, frame in places])

    def _decode(self, id: str, latent: Tensor) -> np.ndarray:
        """Return the frames, uint8 (t h w c), of a clip's latent (f c h w)."""
        latent = latent.float()[None].to(self.device)  # (1 f c h w)
        frames = _codec(self.codec, self.fingerprint, self.device).decode(latent)
        for what, tensor in (("latents", latent), ("decoded frames", frames)):
            finite = bool(torch.isfinite(tensor).all())
            check(
                finite,
                f"the {what} of {printable(id)} in {self.root} have NaN or Inf; encode that video again",
            )
        return np.asarray(to_uint8(frames))[0]


def open_latents(root: Path, codec_path: str | None, device: str) -> LatentSide:
    """Return the videos of the latent shards in ``root``.

    InputError for an incomplete folder, for windows that leave frames out, and without the codec that made
    them.
    """
    manifest = read_manifest(root)
    check(
        manifest["complete"],
        f"the latents in {root} are incomplete; run the same latte data encode again to resume",
    )
    made = manifest["settings"]["codec"]
    windows = manifest["settings"].get("windows")
    config = CodecConfig(name=made["name"], path=codec_path)
    fingerprint = read_fingerprint(made)
    codec = _codec(config, fingerprint, device)
    damage = {bad["path"]: bad["reason"] for bad in manifest.get("damaged", [])}
    sources = []
    shards = {}
    places = {}
    for entry in manifest["videos"]:
        record = Record.of(entry)
        shards[record.key] = entry["shard"]
        frames = record.frames
        if windows:
            places[record.key] = find_frames(root, record, windows)
            frames = len(places[record.key])
        with safe_open(root / entry["shard"], framework="pt") as shard:
            latent = shard.get_tensor(f"{SOURCE}:{record.key}").contiguous()
        content = hashlib.sha256(latent.numpy().tobytes()).hexdigest()
        size = (latent.shape[-2] * codec.spatial_factor, latent.shape[-1] * codec.spatial_factor)
        name = f"latents of {made['name']}"
        sources.append(Source(record.key, frames, content, record.fps, name, *size, damage.get(record.key)))
    broken = tuple({"id": bad["path"], "reason": bad["reason"]} for bad in manifest["skipped"])
    window = codec.latent_frames(windows["frames"]) if windows else 0
    return LatentSide(str(root), tuple(sources), broken, shards, config, fingerprint, device, places, window)


def find_frames(root: Path, record: Record, windows: Mapping[str, Any]) -> Places:
    """Return where the frames of a video are; InputError unless the windows hold all up to the last one."""
    rule = ClipRule(**{key: value for key, value in windows.items() if key != "stride"})
    found: dict[int, tuple[int, int]] = {}
    for number, start in enumerate(record.starts):
        for place, frame in enumerate(rule.frames_at(start, record.times)):
            found.setdefault(frame, (number, place))
    missing = next((frame for frame in range(max(found, default=0) + 1) if frame not in found), None)
    check(
        missing is None,
        f"the latents in {root} are windows that leave out frames, first frame {missing} of "
        f"{printable(record.key)}, so they hold no clips of consecutive frames; encode with data.interval=1 "
        "and without --stride, or give the folder of videos",
    )
    return found


@lru_cache(2)
def _codec(config: CodecConfig, fingerprint: str | None, device: str) -> Codec:
    codec = build_codec(config, device)
    check(
        codec.fingerprint == fingerprint,
        f"the codec is {codec.name} {codec.fingerprint}, but the latents were made with {fingerprint}; "
        "give its weights by --codec-path",
    )
    return codec
