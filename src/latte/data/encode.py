# SPDX-License-Identifier: Apache-2.0
"""Encode a dataset once: every frame of every video, and of its mirror image, into safetensors shards.

A codec that compresses time encodes windows of ``data.frames`` frames instead, see ``latte.data.windows``.
Which videos make a shard is decided before anything is read, and each shard holds the digest of that plan. A
shard that exists and matches its plan is finished, so an interrupted encoding continues where it stopped and
a changed source is noticed. Several processes take shards in turn, and rank 0 writes what there is one of.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from latte.checks import InputError, RunError, check, choose, printable
from latte.data.base import DataConfig
from latte.data.captions import PART, check_lengths, list_parts, store_captions, warn_of_sides
from latte.data.encode_sources import SOURCES, Progress, Source, Video
from latte.data.encoder import Encoder, EncodingCodec
from latte.data.selection import FrameRules, settle
from latte.data.shards import Record, check_destination, finished, remove_leftovers, write_manifest
from latte.data.windows import has_exact_prefixes
from latte.distributed import ALONE, Group
from latte.text.encoders import TextEncoder

SHARD_BYTES = 256 << 20


AnyCodec = EncodingCodec | Callable[[], Any]


@dataclass(frozen=True)
class Shard:
    """A shard to make of ``videos``. ``refused`` lists those it could not hold, None as long as it is not
    finished.
    """

    path: Path
    plan: str
    videos: Sequence[Video]
    refused: list[dict[str, str]] | None


def encode_dataset(
    config: DataConfig,
    codec: AnyCodec,
    out: str | os.PathLike,
    dtype: str = "float16",
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    cache_dir: str | os.PathLike | None = None,
    progress: Progress = None,
    text: TextEncoder | None = None,
    caption_part: int = PART,
    caption_progress: Progress = None,
    scan_progress: Progress = None,
    stride: int | None = None,
    crops: int = 1,
    ranks: Group = ALONE,
) -> dict[str, Any]:
    """Encode all frames of the dataset of ``config`` (mirrored too with ``config.flip``) into ``out``.

    Training chooses frames, interval and rule, unless the codec compresses time: then they are those of
    ``config``, for windows that start every ``stride`` source frames (``latte.data.windows``). A stochastic
    codec stores one sample of the posterior per latent frame, drawn from ``seed``. Training draws one of
    ``crops`` of a video. With a ``text`` encoder, the features of every distinct caption are stored first,
    ``caption_part`` to a file, and the encoder is freed. A ``codec`` that is a function builds one, before
    the captions for the settings and again after them: codec and text encoder are never in memory together.
    Everything that can be checked is checked before the first video is read.

    Returns out, videos, windows, frames, latent_frames, classes, captions, new_captions, shards, new_shards,
    bytes and skipped. Run it again after an interruption. All ``ranks`` must call it. InputError when ``out``
    holds other latents, nothing can be encoded, captions are too long or missing; RunError when the disk is
    full or unwritable.
    """
    out = Path(out)
    source, rules = ranks.after_rank0(open_source, config, cache_dir, scan_progress)
    captions = captions_of(config, source, text)
    config = rules.settled(config)
    encoder = Encoder(config, built(codec), dtype, seed, stride, crops)
    source = encoder.cut(source, rules)
    kept = {video.record.caption for video in source.videos}
    captions = [caption for caption in captions if caption in kept]
    settings = {**encoder.settings(), "source": source.fingerprint, "labels": config.labels}
    ranks.run_on_rank0(check_destination, out, settings)
    parts = plan_shards(source.videos, encoder.num_bytes, shard_bytes)
    shards = [planned(out, number, videos, settings) for number, videos in enumerate(parts)]
    refused = ranks.run_on_rank0(lambda: [shard.refused for shard in shards])  # before any of them writes
    shards = [replace(shard, refused=bad) for shard, bad in zip(shards, refused, strict=True)]
    ranks.run_on_rank0(check_disk, out, shards, encoder.num_bytes)
    begin = cache(lambda: write_manifest(out, settings, complete=False))
    new_captions = 0
    if text:
        del encoder
        caption_work = (out, text, captions, caption_part, begin, caption_progress)
        new_captions = ranks.run_on_rank0(store_captions, *caption_work)
        text.free()
        encoder = Encoder(config, built(codec), dtype, seed, stride, crops)
    if any(shard.refused is None for shard in shards):
        ranks.run_on_rank0(begin)
    write_shards(shards, encoder, progress, ranks)
    facts = {"out": str(out), "captions": len(captions), "new_captions": new_captions}
    return {**facts, **ranks.run_on_rank0(finish, out, source, shards, encoder, settings)}


def finish(
    out: Path, source: Source, shards: Sequence[Shard], encoder: Encoder, settings: dict[str, Any]
) -> dict[str, Any]:
    """Write the manifest of finished ``shards`` and remove others; return ``counts``."""
    manifest = contents(source, shards, encoder)
    check_videos(manifest, out)
    if parts_listed := list_parts(out):
        manifest["captions"] = parts_listed
    if encoder.windows:
        manifest["exact_prefix"] = has_exact_prefixes(encoder.codec, encoder.config.frames)
    write_manifest(out, settings, True, **manifest)
    remove_leftovers(out, {shard.path for shard in shards})
    return {**counts(manifest, encoder, shards), "classes": source.classes}


def open_source(
    config: DataConfig, cache_dir: str | os.PathLike | None, progress: Progress
) -> tuple[Source, FrameRules]:
    """Return the videos to encode and how frames of clips are chosen; InputError for buckets and a mix."""
    check(
        config.mix is None,
        "data.mix is given, but a folder of latents holds one set; encode each set by itself, then train "
        "with data.kind=latents and their folders in data.mix",
    )
    check(
        config.buckets is None,
        "data.buckets is given, but one set of latents has one size; leave it out, or train on the videos "
        "themselves",
    )
    source = choose("data.kind", config.kind, SOURCES)(config, cache_dir, progress)
    return source, settle(config, [video.record for video in source.videos])


def counts(manifest: dict[str, Any], encoder: Encoder, shards: Sequence[Shard]) -> dict[str, Any]:
    """Return how many videos, windows, frames, latent frames, shards and bytes there are, and the skipped."""
    records = [Record.of(entry) for entry in manifest["videos"]]
    return {
        "videos": len(records),
        "windows": sum(len(record.starts) for record in records),
        "frames": sum(record.frames for record in records),
        "latent_frames": sum(encoder.num_latents(record) for record in records),
        "shards": len(shards),
        "new_shards": sum(shard.refused is None for shard in shards),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "skipped": manifest["skipped"],
    }


def built(codec: AnyCodec) -> EncodingCodec:
    """Return the codec itself, or what the function builds."""
    if hasattr(codec, "encode"):
        return cast("EncodingCodec", codec)
    return cast("Callable[[], Any]", codec)()


def captions_of(config: DataConfig, source: Source, text: TextEncoder | None) -> list[str]:
    """Return the distinct captions of ``source``; InputError for one that is too long for ``text``, or none
    at all.

    With flips, captions that mention left or right are logged.
    """
    records = [video.record for video in source.videos if video.record.caption is not None]
    key_of = {str(record.caption): record.key for record in records}
    if text:
        check(
            bool(key_of),
            f"text.name is {text.name}, but the videos have no captions; give data.captions=auto, or "
            "text.name=null",
        )
        check_lengths(text, key_of, key_of)
    if config.flip:
        warn_of_sides(key_of)
    return sorted(key_of)


def plan_shards(
    videos: Sequence[Video], num_bytes: Callable[[Record], int], shard_bytes: int
) -> list[list[Video]]:
    """Group consecutive ``videos``, as many to a shard as fit into ``shard_bytes``, at least one."""
    check(shard_bytes > 0, f"shard_bytes must be positive, got {shard_bytes}")
    parts: list[list[Video]] = []
    room = 0
    for video in videos:
        need = num_bytes(video.record)
        if not parts or need > room:
            parts.append([])
            room = shard_bytes
        parts[-1].append(video)
        room -= need
    return parts


def planned(out: Path, number: int, videos: Sequence[Video], settings: dict[str, Any]) -> Shard:
    """Return shard ``number`` of ``out``, finished or to be made."""
    path = out / f"shard-{number:05d}.safetensors"
    content = json.dumps([settings, [video.record.entry() for video in videos]])
    plan = hashlib.sha256(content.encode()).hexdigest()
    return Shard(path, plan, videos, finished(path, plan))


def check_disk(out: Path, shards: Sequence[Shard], num_bytes: Callable[[Record], int]) -> None:
    """RunError unless the shards that are not finished fit on the disk."""
    missing = [video for shard in shards if shard.refused is None for video in shard.videos]
    needed = sum(num_bytes(video.record) for video in missing)
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"the latents take {needed:,} bytes more, but the disk of {printable(folder)} has {free:,} free; "
            "make room, or "
            "give another folder (--out)"
        )


def write_shards(shards: Sequence[Shard], encoder: Encoder, progress: Progress, ranks: Group = ALONE) -> None:
    """Encode the shards that are not finished. ``progress`` counts the videos up to the one at hand."""
    bounds = [0, *accumulate(len(shard.videos) for shard in shards)]
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, bounds[-1])

    todo = [number for number, shard in enumerate(shards) if shard.refused is None]
    for index in ranks.share(len(todo)):
        shard = shards[todo[index]]
        done = bounds[todo[index]]
        encoder.write(shard.path, shard.videos, shard.plan, tick)
    if shards and progress:
        progress(bounds[-1], bounds[-1])


def contents(source: Source, shards: Sequence[Shard], encoder: Encoder) -> dict[str, Any]:
    """Return the content of the manifest of ``shards``; RunError for one that is gone or was altered."""
    skipped = list(source.skipped)
    videos: list[dict[str, Any]] = []
    for shard in shards:
        refused = finished(shard.path, shard.plan)
        if refused is None:
            raise RunError(f"{printable(shard.path)} vanished while encoding; run the same command again")
        skipped += refused
        unreadable = {entry["path"] for entry in refused}
        records = [video.record for video in shard.videos if video.record.key not in unreadable]
        videos += [{**encoder.entry(record), "shard": shard.path.name} for record in records]
    files = [{"file": shard.path.name, "bytes": shard.path.stat().st_size} for shard in shards]
    manifest: dict[str, Any] = {"classes": source.classes, "shards": files, "videos": videos}
    manifest["skipped"] = skipped
    if source.damaged:
        manifest["damaged"] = source.damaged
    return manifest


def check_videos(manifest: dict[str, Any], out: Path) -> None:
    """InputError with the first reason when no video could be read."""
    if manifest["videos"]:
        return
    first = manifest["skipped"][0]
    raise InputError(
        f"nothing was encoded into {printable(out)}: no video can be read, first {printable(first['path'])} "
        f"({first['reason']})"
    )
