# SPDX-License-Identifier: Apache-2.0
"""Captions as the model reads them: the features of each distinct caption, encoded once, and stored beside
latents if wanted.

Stored features are split into parts of some captions each, so that no more than one part is in memory, and a
stop loses one part at most. A tensor's name is a digest of its caption; the manifest lists the captions with
their videos. Storing never changes a number: features are kept in bfloat16 where that loses nothing, as with
all that a T5 computes on a GPU, and in float32 otherwise. Axes: l tokens, k channels, b clips, g captions of
a clip (its own and its images').
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, RunError, check, printable
from latte.data.shards import AGAIN, CAPTIONS, PLAN, SINGLE, check_sizes, save
from latte.text.encoders import TextEncoder, pad_features, shorten

LOG = logging.getLogger(__name__)
AT_ONCE = 32  # captions per call of the encoder
PART = 1000  # captions per stored part: 160 MB from a T5-XXL, at 20 tokens each
EMPTY = ""
PREFIX = "caption:"  # of a tensor's name in a SINGLE file, before the caption
SIDES = re.compile(r"\b((left|right)(wards?|most|hand(ed)?)?|(anti|counter)?clockwise)\b", re.IGNORECASE)


class CaptionFeatures:
    """Features (l k) of captions without padding, and of the empty caption; ``fingerprint`` is that of their
    encoder.
    """

    def __init__(self, fingerprint: str, length: int, features: Mapping[str, Tensor]):
        self.fingerprint = fingerprint
        self.length = length
        self.features = features

    def __call__(self, captions: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return features (b l k) float32 and mask (b l), True for a token, for one caption per clip.

        For a list of g captions per clip they are (b g l k) and (b g l). InputError for a caption without
        features.
        """
        if captions and isinstance(captions[0], list):
            parts = [self(of_clip) for of_clip in captions]
            return torch.stack([text for text, _ in parts]), torch.stack([mask for _, mask in parts])
        return pad_features([self._of(caption) for caption in captions], self.length)

    def _of(self, caption: str | None) -> Tensor:
        if caption is None or caption not in self.features:
            raise InputError(
                f"caption {caption!r} has no features; every clip of a text model needs a caption that the "
                "data set lists"
            )
        return self.features[caption]


def check_lengths(encoder: TextEncoder, captions: Iterable[str], owners: Mapping[str, str]) -> int:
    """Return the number of tokens of all distinct ``captions`` and of the empty one; only a tokenizer is
    read.

    InputError when some are longer than the encoder allows: it names the longest, and its video (``owners``:
    caption -> video).
    """
    counts = {caption: encoder.count(caption) for caption in (EMPTY, *captions)}
    longest = max(counts, key=counts.__getitem__)
    num_long = sum(num_tokens > encoder.length for num_tokens in counts.values())
    owner = f"the caption of {printable(owners[longest])}" if longest in owners else "a caption"
    check(
        counts[longest] <= encoder.length,
        f"{owner}, {shorten(longest)!r}, has {counts[longest]} tokens, but text.length is {encoder.length} "
        f"({num_long} of {len(counts) - 1} captions are longer); "
        f"give text.length={counts[longest]}, or shorten them",
    )
    return sum(counts.values())


def warn_of_sides(captions: Iterable[str]) -> None:
    """Log one line when some of ``captions``, whose clips are mirrored at random, mention left or right."""
    distinct = set(captions)
    found = sorted(caption for caption in distinct if SIDES.search(caption))
    if found:
        LOG.warning(
            "%d of %d captions mention left or right (%r), but data.flip mirrors half of the clips; "
            "set data.flip=false",
            len(found),
            len(distinct),
            found[0][:60],
        )


def encode_captions(
    encoder: TextEncoder, captions: Iterable[str], progress: Callable[[int, int], None] | None = None
) -> CaptionFeatures:
    """Return the features of ``captions`` and of the empty one, each encoded once; InputError for one that is
    too long.
    """
    distinct = list(dict.fromkeys([EMPTY, *captions]))
    features: dict[str, Tensor] = {}
    for caption, tokens in encoded(encoder, distinct):
        features[caption] = tokens
        if progress and (len(features) % AT_ONCE == 0 or len(features) == len(distinct)):
            progress(len(features), len(distinct))
    return CaptionFeatures(encoder.fingerprint, encoder.length, features)


def encoded(encoder: TextEncoder, captions: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield each caption with its ``compact`` features (l k), without padding; AT_ONCE go through the encoder
    together.
    """
    for start in range(0, len(captions), AT_ONCE):
        batch = captions[start : start + AT_ONCE]
        for caption, tokens, valid in zip(batch, *encoder.encode(batch), strict=True):
            yield caption, compact(tokens[valid])


def compact(tokens: Tensor) -> Tensor:
    """Return float32 ``tokens`` in bfloat16 if that changes no number, else unchanged."""
    small = tokens.to(torch.bfloat16)
    if torch.equal(small.float(), tokens):
        return small
    return tokens


class Part:
    """An open file of features.

    ``names`` maps the digest of a caption to its tensor; ``fingerprint`` and ``encoder`` are those of the
    encoder. InputError when the file cannot be read.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.file = safe_open(path, framework="pt")
            record = json.loads((self.file.metadata() or {})[PLAN])
            self.fingerprint = str(read_fingerprint(record))
            self.encoder = str(record["encoder"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{printable(path)} cannot be read ({reason}); {AGAIN}") from None
        keys = list(self.file.keys())
        self.names = dict(zip(keys, keys, strict=True))
        if path.name == SINGLE:
            self.names = {digest(key.removeprefix(PREFIX)): key for key in keys}


class StoredFeatures(Mapping[str, Tensor]):
    """The features of ``captions`` in ``parts``, read on access; ``encoder`` and ``fingerprint`` are those of
    all parts.

    The files are memory-mapped: the system caches what is used, and shares it between processes.
    """

    def __init__(self, parts: Sequence[Part], captions: Iterable[str]):
        self.encoder = parts[0].encoder
        self.fingerprint = parts[0].fingerprint
        part_of = {name: part for part in parts for name in part.names}
        self.part_of = {caption: part for caption in captions if (part := part_of.get(digest(caption)))}

    def __getitem__(self, caption: str) -> Tensor:
        part = self.part_of[caption]
        return part.file.get_tensor(part.names[digest(caption)])

    def num_tokens(self, caption: str) -> int:
        """Return the number of tokens of ``caption`` without reading its features."""
        part = self.part_of[caption]
        return part.file.get_slice(part.names[digest(caption)]).get_shape()[0]

    def __contains__(self, caption: object) -> bool:
        return caption in self.part_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.part_of)

    def __len__(self) -> int:
        return len(self.part_of)


def digest(caption: str) -> str:
    """Return 32 hex digits of the SHA-256 of ``caption``."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def store_captions(
    out: Path,
    encoder: TextEncoder,
    captions: Iterable[str],
    size: int = PART,
    begin: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the features of those ``captions`` (and the empty one) that the folder ``out`` lacks; return how
    many.

    Each part holds ``size`` captions. After a stop, call it again: finished parts stay. ``begin()`` is called
    before the folder changes. InputError when it holds features of another encoder; RunError when the disk
    refuses, or for NaN/Inf.
    """
    check(size >= 1, f"caption_part must be at least 1, got {size}")
    needed = {digest(caption): caption for caption in sorted({EMPTY, *captions})}
    parts, broken = open_parts(out)
    for part in parts:
        check(
            part.fingerprint == encoder.fingerprint,
            f"the text encoder is {encoder.name} {encoder.fingerprint}, but {printable(part.path)} was made "
            f"by {part.encoder} {part.fingerprint}; give another folder, or remove its {CAPTIONS}",
        )
    unused = [part.path for part in parts if not part.names.keys() & needed.keys()]
    kept = [part for part in parts if part.path not in unused]
    stored = {name for part in kept for name in part.names}
    missing = [caption for name, caption in needed.items() if name not in stored]
    if missing or broken or unused:
        begin()
    for path in (*broken, *unused):
        path.unlink()
    taken = {part.path.name for part in kept}
    names = (CAPTIONS.replace("?????", f"{number:05d}") for number in count())
    free = (name for name in names if name not in taken)
    features = encoded(encoder, missing)
    num_done = len(needed) - len(missing)
    while num_done < len(needed):
        tensors: dict[str, Tensor] = {}
        for caption, tokens in islice(features, size):
            tensors[digest(caption)] = finite(caption, tokens)
            num_done += 1
            if progress:
                progress(num_done, len(needed))
        save(out / next(free), tensors, {"identity": encoder.fingerprint, "encoder": encoder.name})
    return len(missing)


def finite(caption: str, tokens: Tensor) -> Tensor:
    """Return ``tokens``, contiguous; RunError when they hold NaN or Inf."""
    if not tokens.isfinite().all():
        raise RunError(f"the features of caption {shorten(caption)!r} hold NaN or Inf; use another encoder")
    return tokens.contiguous()


def open_parts(root: Path) -> tuple[list[Part], list[Path]]:
    """Return the parts in ``root`` by name, and the files of that name which cannot be read."""
    parts = []
    broken = []
    for path in sorted([*root.glob(SINGLE), *root.glob(CAPTIONS)]):
        try:
            parts.append(Part(path))
        except InputError:
            broken.append(path)
    return parts, broken


def list_parts(root: Path) -> dict[str, Any]:
    """Return the manifest's entry for the parts in ``root``: encoder, identity, parts [{file, bytes}]; {}
    without any.
    """
    parts, _ = open_parts(root)
    if not parts:
        return {}
    files = [{"file": part.path.name, "bytes": part.path.stat().st_size} for part in parts]
    return {"encoder": parts[0].encoder, "identity": parts[0].fingerprint, "parts": files}


def stored_captions(
    root: Path, entry: dict[str, Any], captions: Iterable[str], length: int
) -> CaptionFeatures | None:
    """Return the features in a folder of latents, padded to ``length``; None when the manifest's ``entry``
    lists none.

    InputError when one of ``captions`` is missing or longer than ``length``, and when a file differs from the
    manifest.
    """
    files = entry.get("parts") or (
        [entry] if "file" in entry else []
    )  # the entry of a SINGLE file is its own part
    if not files:
        return None
    check_sizes(root, files)
    needed = {EMPTY, *captions}
    features = StoredFeatures([Part(root / listed["file"]) for listed in files], needed)
    for caption in sorted(needed):
        if caption not in features:
            raise InputError(f"the captions in {printable(root)} lack the features of {caption!r}; {AGAIN}")
        num_tokens = features.num_tokens(caption)
        check(
            num_tokens <= length,
            f"text.length is {length}, but caption {shorten(caption)!r} has {num_tokens} tokens; "
            f"give text.length={num_tokens} or more",
        )
    return CaptionFeatures(features.fingerprint, length, features)
