# SPDX-License-Identifier: Apache-2.0
"""Captions as the model reads them: the features of each distinct caption, encoded once, and kept beside latents if need be.

Axes: l tokens, k channels, b clips, g captions of a clip (its own and its stills').
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latte.checks import InputError, require
from latte.data.shards import AGAIN, CAPTIONS, PLAN, commit

PART = 32  # captions that an encoder gets at a time
EMPTY = ""
NAME = "caption:"  # a caption's tensor is called so, with the caption behind


class CaptionEncoder(Protocol):
    """What captions ask of a text encoder (latte.text_encoder.TextEncoder has it)."""

    name: str
    channels: int
    length: int

    @property
    def identity(self) -> str: ...

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]: ...


class CaptionFeatures:
    """Features (l k) of captions without their padding, and of the empty one; ``identity`` is that of the encoder that made them."""

    def __init__(self, identity: str, length: int, features: Mapping[str, Tensor]):
        self.identity, self.length, self.features = identity, length, features

    def __call__(self, captions: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """A caption a clip -> (b l k) and (b l); a list of g captions a clip -> (b g l k) and (b g l). True is a token, False padding."""
        if captions and isinstance(captions[0], list):
            parts = [self(of_clip) for of_clip in captions]
            return torch.stack([text for text, _ in parts]), torch.stack([mask for _, mask in parts])
        found = [self._of(caption) for caption in captions]
        text = found[0].new_zeros(len(found), self.length, found[0].shape[1], dtype=torch.float32)
        mask = torch.zeros(len(found), self.length, dtype=torch.bool)
        for row, tokens in enumerate(found):
            text[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return text, mask

    def _of(self, caption: str | None) -> Tensor:
        if caption is None or caption not in self.features:
            raise InputError(f"caption {caption!r} has no features; every clip of a text model needs a caption that the data set lists")
        return self.features[caption]


def encode_captions(
    encoder: CaptionEncoder, captions: Iterable[str], progress: Callable[[int, int], None] | None = None
) -> CaptionFeatures:
    """The features of ``captions`` and of the empty one, each encoded once; InputError for one that is too long for the encoder."""
    distinct = list(dict.fromkeys([EMPTY, *captions]))
    features: dict[str, Tensor] = {}
    for start in range(0, len(distinct), PART):
        part = distinct[start : start + PART]
        text, mask = encoder.encode(part)
        features |= {caption: tokens[valid] for caption, tokens, valid in zip(part, text, mask, strict=True)}
        if progress:
            progress(len(features), len(distinct))
    return CaptionFeatures(encoder.identity, encoder.length, features)


class StoredFeatures(Mapping[str, Tensor]):
    """The features of a captions.safetensors, read when they are asked for; ``identity`` and ``encoder`` say who made them."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, framework="pt")
            made = json.loads((self.file.metadata() or {})[PLAN])
            self.identity, self.encoder = str(made["identity"]), str(made["encoder"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error.__class__.__name__}: {error}); {AGAIN}") from None
        self.names = {name.removeprefix(NAME) for name in self.file.keys()}  # noqa: SIM118

    def __getitem__(self, caption: str) -> Tensor:
        return self.file.get_tensor(NAME + caption)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.names))

    def __len__(self) -> int:
        return len(self.names)


def store_captions(path: Path, encoder: CaptionEncoder, captions: Iterable[str]) -> dict[str, Any]:
    """Write the features of ``captions``, unless they are there already -> what the manifest says of them.

    InputError for a caption that is too long, of which the longest are tried first and not after hours; RunError when the disk refuses.
    """
    wanted = {EMPTY, *captions}
    there = StoredFeatures(path) if path.is_file() else None
    if not there or there.identity != encoder.identity or not wanted <= there.names:
        ordered = sorted(sorted(wanted), key=len, reverse=True)
        tensors = {NAME + caption: tokens.contiguous() for caption, tokens in encode_captions(encoder, ordered).features.items()}
        made = {PLAN: json.dumps({"identity": encoder.identity, "encoder": encoder.name})}
        commit(path, lambda temporary: save_file(tensors, temporary, metadata=made))
    return {"file": path.name, "bytes": path.stat().st_size, "encoder": encoder.name, "identity": encoder.identity}


def stored_captions(root: Path, captions: Iterable[str], length: int) -> CaptionFeatures | None:
    """The features in a folder of latents, padded to ``length``; None when it has none.

    InputError when one of ``captions`` is missing there, or is longer.
    """
    if not (root / CAPTIONS).is_file():
        return None
    features = StoredFeatures(root / CAPTIONS)
    for caption in {EMPTY, *captions}:
        if caption not in features.names:
            raise InputError(f"{root / CAPTIONS} lacks the features of caption {caption!r}; {AGAIN}")
        tokens = features.file.get_slice(NAME + caption).get_shape()[0]
        require(tokens <= length, "text.length", length, f"caption {caption[:60]!r} has {tokens} tokens", f"give {tokens} or more")
    return CaptionFeatures(features.identity, length, features)
