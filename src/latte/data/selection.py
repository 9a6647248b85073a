# SPDX-License-Identifier: Apache-2.0
"""Which of the clips that a scan found a run uses, how their frames are chosen, and in which bucket each is.

Both depend on all clips together: where their frame rates differ, frames are chosen by time, at the frame
rate that lets the most clips be used.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from latte.data.base import DataConfig
from latte.data.buckets import Bucket, Buckets, lost_share, upscaled
from latte.data.clips import ClipRule
from latte.data.skipped import ScanResult

SAME_RATE = 1.02  # rates within 2 % are one rate: 29.97 and 30, or gifs whose times are rounded


class Timed(Protocol):
    """A video of which the length is known: ``MediaInfo``, or the record of its latents."""

    @property
    def frames(self) -> int: ...

    @property
    def fps(self) -> float:
        """Mean rate, 0 when it is unknown."""
        ...

    @property
    def times(self) -> Sequence[float]: ...


@dataclass(frozen=True)
class FrameRules:
    """How the frames of clips are chosen, by the length of a clip.

    ``slowest`` is the lowest rate of a video that is used (0: any). ``notice`` states what was decided, None
    when nothing was.
    """

    of_length: dict[int, ClipRule]
    slowest: float = 0.0
    notice: str | None = None

    def too_slow(self, video: Timed) -> str | None:
        """Return why the rate of a video is too low, None if it is not."""
        if video.frames > 1 and 0 < video.fps * SAME_RATE < self.slowest:
            return f"too-slow: it has {video.fps:g} fps, clips are taken at {self.slowest:g}"
        return None

    def settled(self, config: DataConfig) -> DataConfig:
        """Return ``config`` with an open rule, and its frame rate, as they are used."""
        if config.rule is not None:
            return config
        longest = self.of_length[max(self.of_length)]
        return replace(config, rule=longest.rule, fps=longest.fps)

    def refusals(self, video: Timed) -> dict[int, str | None]:
        """Return length -> why no clip of it fits, None if one does.

        A video is not used for clips of one frame, unless there are no others; an image only for those.
        """
        several = [length for length in self.of_length if length > 1]
        reason = self.too_slow(video)
        if reason and several:
            return dict.fromkeys(several, reason)
        lengths = several if video.frames > 1 and several else list(self.of_length)
        return {length: self.of_length[length].needs(video.frames, video.times) for length in lengths}


def settle(config: DataConfig, videos: Iterable[Timed], buckets: Buckets | None = None) -> FrameRules:
    """Return the rules of ``config``; an open ``data.rule`` is settled by the rates of ``videos``.

    Videos of one rate, or of unknown rates alone, are used frame by frame ("strict"). Otherwise frames are
    chosen by time, at the frame rate that lets the most videos be used: a faster one is subsampled, a slower
    one is not used, because its frames would be repeated. Of equal rates it is the highest.
    """
    lengths = sorted({bucket.frames for bucket in buckets.shapes} if buckets else {config.frames})
    rates = Counter[float]()
    spans = []
    if config.rule is None and config.fps is None and lengths[-1] > 1:
        spans = [(video.frames, video.fps) for video in videos if video.fps > 0 and video.frames > 1]
        rates.update(rate for _, rate in spans)
    if not rates or max(rates) <= SAME_RATE * min(rates):
        return FrameRules({length: config.clip_rule_of(length) for length in lengths})
    shortest = min((length for length in lengths if length > 1), default=1)
    usable = {rate: _usable(spans, rate, shortest, config.interval) for rate in _distinct(rates)}
    fps = max(usable, key=lambda rate: (usable[rate], rate))
    if not usable[fps]:
        fps = min(usable)  # no video fits at any rate: then the reason is the length of each
    timed = replace(config, rule="time", fps=fps)
    low, high = min(rates), max(rates)
    notice = (
        f"the clips have different frame rates, {low:g} to {high:g} fps, so frames are chosen by time: clips "
        f"are taken at {fps / config.interval:g} fps (data.rule=time data.fps={fps:g} data.interval="
        f"{config.interval}); data.rule=strict takes frames as they are, whatever their rate"
    )
    rules = {length: timed.clip_rule_of(length) for length in lengths}
    return FrameRules(rules, fps / config.interval, notice)


def _distinct(rates: Counter[float]) -> list[float]:
    """Return the commonest of each group of rates within SAME_RATE, the highest of equally common."""
    groups: list[list[float]] = []
    for rate in sorted(rates):
        if not groups or rate > SAME_RATE * groups[-1][0]:
            groups.append([])
        groups[-1].append(rate)
    return [max(group, key=lambda rate: (rates[rate], rate)) for group in groups]


def _usable(spans: Sequence[tuple[int, float]], fps: float, frames: int, interval: int) -> int:
    """Return how many videos of (frames, rate) are fast and long enough for clips at ``fps`` / interval."""
    seconds = (frames - 1) * interval / fps
    return sum(
        rate * SAME_RATE >= fps / interval and seconds <= (count - 0.5) / rate for count, rate in spans
    )


@dataclass(frozen=True)
class Selection:
    """The clips of a run. ``config`` has its rule settled; ``bucket_of`` has a number per clip, () without
    buckets.
    """

    config: DataConfig
    found: ScanResult
    rules: FrameRules
    buckets: Buckets | None = None
    bucket_of: tuple[int, ...] = ()
    unused: tuple[Bucket, ...] = ()  # buckets that no clip is in

    @property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the clips of each bucket."""
        parts: list[list[int]] = [[] for _ in self.buckets.shapes] if self.buckets else []
        for index, bucket in enumerate(self.bucket_of):
            parts[bucket].append(index)
        return tuple(map(tuple, parts))

    def bucket(self, index: int) -> Bucket:
        """Return the shape that clip ``index`` is cut to."""
        if self.buckets is None:
            return Bucket(self.config.frames, *self.config.size)
        return self.buckets.shapes[self.bucket_of[index]]


def select(config: DataConfig, found: ScanResult, buckets: Buckets | None = None) -> Selection:
    """Return the clips of ``found`` that fit the rule or a bucket; the others are among the skipped ones.

    Buckets without a clip are left out.
    """
    rules = settle(config, (clip.info for clip in found.clips), buckets)
    config = rules.settled(config)
    clips = []
    skipped = list(found.skipped)
    bucket_of = []
    for clip in found.clips:
        refused = rules.refusals(clip.info)
        if buckets:
            place = buckets.place(clip.info.height, clip.info.width, refused)
        else:
            place = refused[config.frames] or 0
        if isinstance(place, str):
            skipped.append({"path": clip.info.path, "reason": place})
        else:
            clips.append(clip)
            bucket_of.append(place)
    skipped.sort(key=lambda entry: entry["path"])
    found = replace(found, clips=tuple(clips), skipped=tuple(skipped))
    if buckets is None:
        return Selection(config, found, rules)
    counts = Counter(bucket_of)
    numbers = {old: new for new, old in enumerate(sorted(counts))}
    used = buckets.used([counts[i] for i in range(len(buckets.shapes))])
    unused = tuple(bucket for i, bucket in enumerate(buckets.shapes) if i not in counts)
    return Selection(config, found, rules, used, tuple(numbers[i] for i in bucket_of), unused)


def bucket_table(selection: Selection, global_batch: int) -> list[dict[str, Any]]:
    """Return a row per bucket: its shape, clips, share of their pixels that is cropped, batch and tokens.

    ``upscaled`` counts the clips with fewer pixels than the bucket.
    """
    if selection.buckets is None:
        return []
    rows = []
    sizes = selection.buckets.batch_sizes(global_batch)
    for bucket, members, batch in zip(selection.buckets.shapes, selection.members, sizes, strict=True):
        frames = [selection.found.clips[index].info for index in members]
        lost = [lost_share(info.height, info.width, bucket) for info in frames]
        rows.append(
            {
                "bucket": str(bucket),
                "clips": len(members),
                "lost": sum(lost) / max(len(lost), 1),
                "upscaled": sum(upscaled(info.height, info.width, bucket) for info in frames),
                "batch": batch,
                "tokens": bucket.tokens,
            }
        )
    return rows


def table_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of ``bucket_table`` for people; unknown numbers (None) are left blank."""
    heads = ("bucket", "clips", "cropped", "upscaled", "batch", "tokens per clip")
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        lost = "" if row["lost"] is None else f"{row['lost']:.1%}"
        counts = ["" if row[key] is None else f"{row[key]:,}" for key in ("clips", "upscaled")]
        lines.append((row["bucket"], counts[0], lost, counts[1], f"{row['batch']:,}", f"{row['tokens']:,}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


def total_lost(selection: Selection) -> tuple[float, float]:
    """Return the mean share of a clip's pixels that is cropped with one size, data.resolution, and now."""
    clips = selection.found.clips
    one = Bucket(selection.config.frames, *selection.config.size)
    single = [lost_share(clip.info.height, clip.info.width, one) for clip in clips]
    now = [
        lost_share(clip.info.height, clip.info.width, selection.bucket(index))
        for index, clip in enumerate(clips)
    ]
    count = max(len(clips), 1)
    return sum(single) / count, sum(now) / count


def facts(selection: Selection, global_batch: int) -> dict[str, Any]:
    """Return how frames are chosen, the buckets and what is cropped, as plain data."""
    single, now = total_lost(selection)
    return {
        "rule": selection.config.rule,
        "fps": selection.config.fps,
        "cropped": now,
        "cropped_with_one_size": single,
        "buckets": bucket_table(selection, global_batch),
    }


def report(selection: Selection, global_batch: int) -> list[str]:
    """Return lines for people: how frames are chosen if that was settled, and the buckets with totals."""
    lines = [selection.rules.notice] if selection.rules.notice else []
    if selection.buckets is None:
        return lines
    lines += table_lines(bucket_table(selection, global_batch))
    if selection.unused:
        names = ", ".join(map(str, selection.unused))
        lines.append(f"buckets without a clip are left out: {names}")
    single, now = total_lost(selection)
    return [
        *lines,
        f"pixels cropped: {now:.1%} of a clip with buckets, {single:.1%} with data.resolution alone",
    ]
