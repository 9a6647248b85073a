# SPDX-License-Identifier: Apache-2.0
"""Latent shards as a side of an evaluation: their videos, and frames of them as the codec decodes them.

Where the codec compresses time, a video is stored as windows that were encoded by themselves, see
``latte.data.windows``. A frame is read from the first window that shows it, which is decoded as a whole, so
frames are those of the encoded clip exactly; frames of several windows are decoded from each.
Axes: f latent frames, t frames, c channels, h w latent size.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from latte.autoencoder.codec import Codec, CodecConfig, build_codec
from latte.checkpoint.record import read_fingerprint
from latte.checks import check, printable
from latte.data.clips import ClipRule, to_uint8
from latte.data.shards import SOURCE, Record, read_manifest
from latte.evaluation.plan import Source

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
