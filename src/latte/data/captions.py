# SPDX-License-Identifier: Apache-2.0
"""Captions as the model reads them: the features of each distinct caption, encoded once.

Axes: l tokens, k channels, b clips, g captions of a clip (its own and its stills').
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from latte.checks import InputError

PART = 32  # captions that an encoder gets at a time
EMPTY = ""


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
