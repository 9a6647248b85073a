# SPDX-License-Identifier: Apache-2.0
"""Captions as the model reads them: the features of each distinct caption, encoded once, and kept beside latents if need be.

Stored features lie in parts of some captions each, so that no more than one part is ever held in memory, and a stop loses one part alone.
A tensor's name is a digest of its caption; the captions themselves are in the manifest, with their videos. A number is never changed by
its storage: features are kept in bfloat16 where that loses nothing, as with all that a T5 computes on a GPU, and in float32 otherwise.
Axes: l tokens, k channels, b clips, g captions of a clip (its own and its stills').
"""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, RunError, require
from latte.data.shards import AGAIN, CAPTIONS, PLAN, SINGLE, check_sizes, save
from latte.text.encoders import TextEncoder
from latte.text.padding import pad_features

LOG = logging.getLogger(__name__)
AT_ONCE = 32  # captions that an encoder gets at a time
PART = 1000  # captions of a stored part: 160 MB from a T5-XXL, at 20 tokens each
EMPTY = ""
PREFIX = "caption:"  # in a SINGLE file a tensor is called so, with the caption behind
SIDES = re.compile(r"\b((left|right)(wards?|most|hand(ed)?)?|(anti|counter)?clockwise)\b", re.IGNORECASE)


class CaptionFeatures:
    """Features (l k) of captions without their padding, and of the empty one; ``fingerprint`` is that of the encoder that made them."""

    def __init__(self, fingerprint: str, length: int, features: Mapping[str, Tensor]):
        self.fingerprint, self.length, self.features = fingerprint, length, features

    def __call__(self, captions: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """A caption a clip -> (b l k) float32 and (b l); a list of g captions a clip -> (b g l k) and (b g l). True is a token."""
        if captions and isinstance(captions[0], list):
            parts = [self(of_clip) for of_clip in captions]
            return torch.stack([text for text, _ in parts]), torch.stack([mask for _, mask in parts])
        return pad_features([self._of(caption) for caption in captions], self.length)

    def _of(self, caption: str | None) -> Tensor:
        if caption is None or caption not in self.features:
            raise InputError(
                f"caption {caption!r} has no features; every clip of a text model needs a caption that the data set lists"
            )
        return self.features[caption]


def check_lengths(encoder: TextEncoder, captions: Iterable[str], whose: Mapping[str, str]) -> int:
    """Tokens of all distinct ``captions`` together, and of the empty one; nothing but a tokenizer is read.

    InputError when there are longer ones than the encoder takes: it names the longest, and its video (``whose``: caption -> video).
    """
    counts = {caption: encoder.count(caption) for caption in (EMPTY, *captions)}
    longest = max(counts, key=counts.__getitem__)
    most, over = counts[longest], sum(count > encoder.length for count in counts.values())
    shown = longest if len(longest) <= 60 else f"{longest[:57]}..."
    of = f"the caption of {whose[longest]}" if longest in whose else "a caption"
    rule = f"it has {most} tokens and text.length is {encoder.length} ({over} of {len(counts) - 1} captions are longer)"
    require(most <= encoder.length, of, shown, rule, f"give text.length={most}, or shorten them")
    return sum(counts.values())


def warn_of_sides(captions: Iterable[str]) -> None:
    """Log one line when some of ``captions``, whose clips are mirrored at random, say where left and right are."""
    every = set(captions)
    found = sorted(caption for caption in every if SIDES.search(caption))
    if found:
        LOG.warning(
            "%d of %d captions say left or right (%r), but data.flip mirrors half of the clips; set data.flip=false",
            len(found),
            len(every),
            found[0][:60],
        )


def encode_captions(
    encoder: TextEncoder, captions: Iterable[str], progress: Callable[[int, int], None] | None = None
) -> CaptionFeatures:
    """The features of ``captions`` and of the empty one, each encoded once; InputError for one that is too long for the encoder."""
    distinct = list(dict.fromkeys([EMPTY, *captions]))
    features: dict[str, Tensor] = {}
    for caption, tokens in encoded(encoder, distinct):
        features[caption] = tokens
        if progress and (len(features) % AT_ONCE == 0 or len(features) == len(distinct)):
            progress(len(features), len(distinct))
    return CaptionFeatures(encoder.fingerprint, encoder.length, features)


def encoded(encoder: TextEncoder, captions: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Each caption with its features (l k), without padding and ``compact``; some of them go through the encoder at a time."""
    for start in range(0, len(captions), AT_ONCE):
        some = captions[start : start + AT_ONCE]
        for caption, tokens, valid in zip(some, *encoder.encode(some), strict=True):
            yield caption, compact(tokens[valid])


def compact(tokens: Tensor) -> Tensor:
    """float32 -> the same numbers, in bfloat16 if all of them have a place there."""
    small = tokens.to(torch.bfloat16)
    return small if torch.equal(small.float(), tokens) else tokens


class Part:
    """A file of features, open: ``names`` digest of a caption -> tensor; ``fingerprint`` and ``encoder`` say who made them."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, framework="pt")
            made = json.loads((self.file.metadata() or {})[PLAN])
            self.path, self.fingerprint, self.encoder = (
                path,
                str(read_fingerprint(made)),
                str(made["encoder"]),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} cannot be read ({error.__class__.__name__}: {error}); {AGAIN}"
            ) from None
        keys = list(self.file.keys())
        self.names = (
            {digest(key.removeprefix(PREFIX)): key for key in keys}
            if path.name == SINGLE
            else dict(zip(keys, keys, strict=True))
        )


class StoredFeatures(Mapping[str, Tensor]):
    """The features of ``captions`` in ``parts``, read when they are asked for; ``encoder`` and ``fingerprint`` are those of all parts.

    The files are mapped, not read: the system keeps what is used in its free memory, and shares it between processes.
    """

    def __init__(self, parts: Sequence[Part], captions: Iterable[str]):
        self.encoder, self.fingerprint = parts[0].encoder, parts[0].fingerprint
        where = {name: part for part in parts for name in part.names}
        self.where = {caption: part for caption in captions if (part := where.get(digest(caption)))}

    def __getitem__(self, caption: str) -> Tensor:
        part = self.where[caption]
        return part.file.get_tensor(part.names[digest(caption)])

    def tokens(self, caption: str) -> int:
        """How many it has, without reading them."""
        part = self.where[caption]
        return part.file.get_slice(part.names[digest(caption)]).get_shape()[0]

    def __contains__(self, caption: object) -> bool:
        return caption in self.where

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)


def digest(caption: str) -> str:
    """32 hex digits of its SHA-256."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def store_captions(
    out: Path,
    encoder: TextEncoder,
    captions: Iterable[str],
    size: int = PART,
    begin: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the features of those ``captions`` (and the empty one) that are not in the folder ``out`` yet, ``size`` to a part; how many.

    Call it again after a stop: finished parts stay. ``begin()`` is called before the folder changes. InputError when there are features by
    another encoder; RunError when the disk refuses, or the encoder gives no numbers.
    """
    require(size >= 1, "caption_part", size, "a part holds something", "give e.g. 1000")
    wanted = {digest(caption): caption for caption in sorted({EMPTY, *captions})}
    parts, broken = open_parts(out)
    for part in parts:
        require(
            part.fingerprint == encoder.fingerprint,
            "the text encoder",
            f"{encoder.name} {encoder.fingerprint}",
            f"{part.path} was made by {part.encoder} {part.fingerprint}",
            f"give another folder, or remove its {CAPTIONS}",
        )
    useless = [part.path for part in parts if not part.names.keys() & wanted.keys()]
    kept = [part for part in parts if part.path not in useless]
    there = {name for part in kept for name in part.names}
    missing = [caption for name, caption in wanted.items() if name not in there]
    if missing or broken or useless:
        begin()
    for path in (*broken, *useless):
        path.unlink()
    taken, done, features = {part.path.name for part in kept}, 0, encoded(encoder, missing)
    free = (
        name
        for number in range(len(missing) + len(taken))
        if (name := CAPTIONS.replace("?????", f"{number:05d}")) not in taken
    )
    while done < len(missing):
        tensors: dict[str, Tensor] = {}
        for caption, tokens in islice(features, size):
            if not tokens.isfinite().all():
                raise RunError(
                    f"features of caption {caption[:60]!r} are not numbers; read the captions with another text encoder"
                )
            tensors[digest(caption)] = tokens.contiguous()
            done += 1
            if progress:
                progress(len(wanted) - len(missing) + done, len(wanted))
        save(out / next(free), tensors, {"identity": encoder.fingerprint, "encoder": encoder.name})
    return len(missing)


def open_parts(root: Path) -> tuple[list[Part], list[Path]]:
    """The parts in ``root`` by name, and the files that should be some and cannot be read."""
    parts, broken = [], []
    for path in sorted([*root.glob(SINGLE), *root.glob(CAPTIONS)]):
        try:
            parts.append(Part(path))
        except InputError:
            broken.append(path)
    return parts, broken


def list_parts(root: Path) -> dict[str, Any]:
    """What the manifest says of the parts in ``root``: encoder, fingerprint, parts [{file, bytes}]; {} when there are none."""
    parts, _ = open_parts(root)
    files = [{"file": part.path.name, "bytes": part.path.stat().st_size} for part in parts]
    return {"encoder": parts[0].encoder, "identity": parts[0].fingerprint, "parts": files} if parts else {}


def stored_captions(
    root: Path, told: dict[str, Any], captions: Iterable[str], length: int
) -> CaptionFeatures | None:
    """The features in a folder of latents, padded to ``length``; None when its manifest, which has ``told`` of them, lists none.

    InputError when one of ``captions`` is missing there or is longer, and when a file is not what the manifest says.
    """
    files = told.get("parts") or ([told] if "file" in told else [])  # a SINGLE file stands for itself
    if not files:
        return None
    check_sizes(root, files)
    wanted = {EMPTY, *captions}
    features = StoredFeatures([Part(root / listed["file"]) for listed in files], wanted)
    for caption in sorted(wanted):
        if caption not in features:
            raise InputError(f"the captions in {root} lack the features of {caption!r}; {AGAIN}")
        tokens = features.tokens(caption)
        require(
            tokens <= length,
            "text.length",
            length,
            f"caption {caption[:60]!r} has {tokens} tokens",
            f"give {tokens} or more",
        )
    return CaptionFeatures(features.fingerprint, length, features)
