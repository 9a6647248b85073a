# SPDX-License-Identifier: Apache-2.0
"""Clips straight from latents that were encoded once: a folder of safetensors shards and their manifest.

Every frame of every video is there, so any length, interval and rule can still be chosen at training; a clip is read by random
access, without touching the rest of its shard. ``data.encoding`` writes such folders.
Axes: n frames of a video, f frames of a clip, c channels, h height, w width.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, RunError, require
from latte.data.clips import choose_frames
from latte.data.datasets import Clip, DataConfig
from latte.data.encode import encode_dataset
from latte.data.shards import AGAIN, MIRROR, SOURCE, Record, check_sizes, read_manifest
from latte.data.skipped import check_folder

__all__ = ["LatentDataset", "encode_dataset"]


class LatentDataset:
    """The clips of the shards in ``config.root``: ``Clip.video`` is a latent (f c h w), float32.

    A clip's start and mirror image are drawn from the generator exactly as FolderDataset draws them. Videos too short for the rule are
    in ``skipped``. InputError when the folder is unfinished or incomplete, or made with another codec (``codec_fingerprint``; None:
    not asked), size, or without the mirror images that ``config.flip`` wants.
    """

    latent = True

    def __init__(self, config: DataConfig, codec_fingerprint: str | None = None):
        self.root, self.config = Path(check_folder(config.root or "")), config
        self.manifest = read_manifest(self.root)
        self.settings = self.manifest["settings"]
        self._check(codec_fingerprint)
        self.classes: list[str] = self.manifest["classes"] if config.labels else []
        self.videos, self.shard_of, self.skipped = self._fitting()
        self.captions = sorted({record.caption for record in self.videos if record.caption is not None})
        self._files: dict[str, Any] = {}

    def _check(self, codec_fingerprint: str | None) -> None:
        """InputError unless the shards are all there and are what is asked for."""
        root, settings, size = str(self.root), self.settings, list(self.config.size)
        if not self.manifest["complete"]:
            raise InputError(
                f"the latents in {root} are not finished; run the same latte data encode again, it goes on where it stopped"
            )
        codec = settings["codec"]
        if codec_fingerprint not in (None, read_fingerprint(codec)):
            raise InputError(
                f"the latents in {root} were made with codec {codec['name']} {read_fingerprint(codec)}, but this run's codec is "
                f"{codec_fingerprint}; give the codec they were made with, or {AGAIN}"
            )
        require(
            size == settings["resolution"],
            "data.resolution",
            size,
            f"the latents in {root} are of frames {settings['resolution']}",
            AGAIN,
        )
        require(
            settings["flip"] or not self.config.flip,
            "data.flip",
            True,
            f"the latents in {root} hold no mirror images",
            f"leave it out, or {AGAIN} with data.flip=true",
        )
        check_sizes(self.root, self.manifest["shards"])

    def _fitting(self) -> tuple[list[Record], list[str], list[dict[str, str]]]:
        """Records of the videos that the rule fits, the shard of each, and the others with their reasons."""
        videos, shard_of, skipped = [], [], []
        for entry in self.manifest["videos"]:
            record = Record.of(entry)
            reason = self.config.clip_rule.needs(record.frames, record.times)
            if reason:
                skipped.append({"path": record.key, "reason": reason})
            else:
                videos.append(record)
                shard_of.append(entry["shard"])
        if not videos:
            first = f", first: {skipped[0]['path']} ({skipped[0]['reason']})" if skipped else ""
            raise InputError(
                f"the latents in {self.root} hold no clip that fits: {len(skipped)} videos are there{first}; "
                "take fewer frames or a smaller interval"
            )
        return videos, shard_of, skipped

    def __len__(self) -> int:
        return len(self.videos)

    def __getstate__(self) -> dict[str, Any]:
        """Open files cannot be pickled; a worker process opens its own."""
        return {**self.__dict__, "_files": {}}

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Clip ``index`` with its start, then its mirroring, drawn from ``generator``."""
        record, config = self.videos[index], self.config
        chosen = choose_frames(
            record.frames, config.clip_rule, generator, record.times if config.rule == "time" else ()
        )
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        name = f"{MIRROR if mirrored and config.flip else SOURCE}:{record.key}"
        latent = self._read(self.shard_of[index], name, chosen)
        return Clip(latent, record.label if config.labels else None, record.caption, record.key)

    def still(self, index: int, generator: torch.Generator) -> Clip:
        """One frame's latent (1 c h w) of video ``index``, then its mirroring, drawn from ``generator``."""
        record, config = self.videos[index], self.config
        frame = int(torch.randint(record.frames, (), generator=generator))
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        name = f"{MIRROR if mirrored and config.flip else SOURCE}:{record.key}"
        return Clip(
            self._read(self.shard_of[index], name, [frame]),
            record.label if config.labels else None,
            record.caption,
            record.key,
        )

    def _read(self, shard: str, name: str, chosen: list[int]) -> torch.Tensor:
        """Frames ``chosen`` of tensor ``name``, float32; reads from the first to the last of them."""
        low, high = min(chosen), max(chosen) + 1
        try:
            if shard not in self._files:
                self._files[shard] = safe_open(self.root / shard, framework="pt")
            span = self._files[shard].get_slice(name)[low:high]
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"{self.root / shard} can no longer be read ({error}); run latte data encode again"
            ) from error
        return span[[frame - low for frame in chosen]].float()

    def describe(self) -> dict[str, Any]:
        """What the clips are: codec, videos and how clips are cut from them, without where they lie or when they were encoded."""
        config, codec = self.config, read_fingerprint(self.settings["codec"])
        content = [self.settings, [{**asdict(record), "stamp": record.stamp[:1]} for record in self.videos]]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        chosen = {
            "frames": config.frames,
            "interval": config.interval,
            "rule": config.rule,
            "fps": config.fps,
            "flip": config.flip,
        }
        return {
            "kind": "latents",
            "clips": len(self),
            "classes": self.classes,
            "content": digest,
            "codec": codec,
            "resolution": list(config.size),
            **chosen,
        }
