# SPDX-License-Identifier: Apache-2.0
"""What a model is told about each clip in training: a class, or the features of a caption; and what it is told when that is dropped.

Guidance needs a model that can also do without: a share of the clips, drawn from each clip's own stream, get the null class or the empty
caption. A clip's stills are dropped with it, all or none.
Axes: b clips, i stills, g captions of a clip (1+i), l tokens of a caption, k its channels.
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
        """That of some of the clips."""
        ...

    def drop(self, streams: Sequence[torch.Generator]) -> Self:
        """With the conditions of a share of the clips taken away, one draw from each clip's stream."""
        ...

    def inputs(self) -> dict[str, Tensor]:
        """Return the keywords of the model's call."""
        ...


@dataclass(frozen=True)
class Labels:
    """Classes (b,) or (b 1+i) int64, None for an unconditional model; dropped ones become -1."""

    label: Tensor | None
    dropout: float

    def part(self, clips: slice) -> Self:
        """That of some of the clips."""
        return self if self.label is None else replace(self, label=self.label[clips])

    def drop(self, streams: Sequence[torch.Generator]) -> Self:
        """See Condition."""
        if self.label is None:
            return self
        dropped = [
            drop_labels(one, self.dropout, stream)
            for one, stream in zip(self.label.split(1), streams, strict=True)
        ]
        return replace(self, label=torch.cat(dropped))

    def inputs(self) -> dict[str, Tensor]:
        """Return {"label"}, nothing for an unconditional model."""
        return {} if self.label is None else {"label": self.label}


@dataclass(frozen=True)
class Captions:
    """Features (b l k) or (b g l k) and mask (b l) or (b g l), and those of the empty caption, (l k) and (l)."""

    text: Tensor
    mask: Tensor
    empty_text: Tensor
    empty_mask: Tensor
    dropout: float

    def part(self, clips: slice) -> Self:
        """That of some of the clips."""
        return replace(self, text=self.text[clips], mask=self.mask[clips])

    def drop(self, streams: Sequence[torch.Generator]) -> Self:
        """See Condition."""
        dropped = torch.tensor([bool(torch.rand((), generator=stream) < self.dropout) for stream in streams])
        rows = [-1, *[1] * (self.mask.ndim - 1)]
        return replace(
            self,
            text=torch.where(dropped.view(*rows, 1), self.empty_text, self.text),
            mask=torch.where(dropped.view(rows), self.empty_mask, self.mask),
        )

    def inputs(self) -> dict[str, Tensor]:
        """Return {"text", "mask"}."""
        return {"text": self.text, "mask": self.mask}


@dataclass(frozen=True)
class CaptionReader:
    """Captions of a batch, or a list of them with the stills' -> Captions. A share ``dropout`` of the clips is to lose them."""

    features: CaptionFeatures
    dropout: float

    def __call__(self, captions: Sequence[Any]) -> Captions:
        text, mask = self.features(captions)
        empty_text, empty_mask = self.features([EMPTY])
        return Captions(text, mask, empty_text[0], empty_mask[0], self.dropout)
