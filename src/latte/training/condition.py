# SPDX-License-Identifier: Apache-2.0
"""The condition of each clip in training, a class or the features of a caption, and its replacement by the
null condition.

Classifier-free guidance needs a model that also predicts without condition (Ho and Salimans 2022): for some
clips, drawn from each clip's own random stream, the condition becomes the null class or the empty caption.
The images behind a clip follow the clip.
Axes: b clips, i images, g captions of a clip (1+i), l tokens of a caption, k its channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from latte.data.captions import EMPTY, CaptionFeatures
from latte.model.conditioning import drop_labels


class Condition(Protocol):
    """The condition in a call of the model."""

    def part(self, clips: slice) -> Self:
        """Return the condition of some of the clips."""
        ...

    def drop(self, streams: Sequence[torch.Generator]) -> Self:
        """Return the condition with some clips' replaced by the null condition: one draw from each clip's
        stream.
        """
        ...

    def inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of the model's call."""
        ...


@dataclass(frozen=True)
class Labels:
    """Classes (b,) or (b 1+i) int64, None for an unconditional model; a dropped label is -1."""

    label: Tensor | None
    dropout: float

    def part(self, clips: slice) -> Self:
        """See Condition."""
        if self.label is None:
            return self
        return replace(self, label=self.label[clips])

    def drop(self, streams: Sequence[torch.Generator]) -> Self:
        """See Condition."""
        if self.label is None:
            return self
        rows = zip(self.label.split(1), streams, strict=True)
        kept = [drop_labels(row, self.dropout, stream) for row, stream in rows]
        return replace(self, label=torch.cat(kept))  # (b) or (b 1+i)

    def inputs(self) -> dict[str, Tensor]:
        """Return {"label"}, nothing for an unconditional model."""
        if self.label is None:
            return {}
        return {"label": self.label}


@dataclass(frozen=True)
class Captions:
    """Features (b l k) or (b g l k) and mask (b l) or (b g l), and those of the empty caption, (l k) and
    (l).
    """

    text: Tensor
    mask: Tensor
    empty_text: Tensor
    empty_mask: Tensor
    dropout: float

    def part(self, clips: slice) -> Self:
        """See Condition."""
        return replace(self, text=self.text[clips], mask=self.mask[clips])

    def drop(self, streams: Sequence[torch.Generator]) -> Self:
        """See Condition."""
        draws = [bool(torch.rand((), generator=stream) < self.dropout) for stream in streams]
        ones = [1] * (self.mask.ndim - 1)
        dropped = torch.tensor(draws).view(-1, *ones)  # (b 1) or (b 1 1)
        text = torch.where(dropped[..., None], self.empty_text, self.text)  # (b l k) or (b g l k)
        mask = torch.where(dropped, self.empty_mask, self.mask)  # (b l) or (b g l)
        return replace(self, text=text, mask=mask)

    def inputs(self) -> dict[str, Tensor]:
        """Return {"text", "mask"}."""
        return {"text": self.text, "mask": self.mask}


@dataclass(frozen=True)
class CaptionReader:
    """Turns the captions of a batch into ``Captions``; with images, a clip's captions are a list.
    ``dropout`` is in [0, 1].
    """

    features: CaptionFeatures
    dropout: float

    def __call__(self, captions: Sequence[Any]) -> Captions:
        text, mask = self.features(captions)
        empty_text, empty_mask = self.features([EMPTY])
        return Captions(text, mask, empty_text[0], empty_mask[0], self.dropout)
