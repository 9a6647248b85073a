# SPDX-License-Identifier: Apache-2.0
"""Prompts -> features of their tokens, by name of the encoder: what LatteText looks at (Latte, Sec. 4.4).

A prompt's features depend on nothing beside it. They are padded on the right to the encoder's length, and the mask says where the padding
is, which the model never attends to; there is always a token to look at, the end, so that the empty prompt is a prompt like any other.
Axes: b prompts, l tokens, k channels.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from latte.checks import InputError, choose, require
from latte.runtime import generator


class TextEncoder(ABC):
    """``encode(prompts) -> (features (b l k), mask (b l))`` with ``channels`` k and ``length`` l."""

    name: str
    channels: int
    length: int
    default_length: int
    weights: bool  # does it read any from a disk?

    @property
    @abstractmethod
    def identity(self) -> str:
        """16 hex digits that change with everything that features depend on."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(b l k) float32 and (b l) bool, True where there is a token, on the CPU; InputError for a prompt longer than ``length``."""

    def free(self) -> None:
        """Give back the memory of the weights; the next ``encode`` reads them again."""
        return

    def check(self, prompt: str, tokens: int) -> None:
        """InputError for a prompt of more ``tokens`` (the end is one) than there is room for: it is never cut in silence."""
        shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
        require(tokens <= self.length, "the prompt", shown, f"it has {tokens} tokens and text.length is {self.length}",
                "shorten it, or give a model that was trained with more")  # fmt: skip


WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
END = "</s>"
WAVELENGTH = 10000.0


class BuiltinEncoder(TextEncoder):
    """Every word is a random direction of its own, plus a code of its place: no weights, no download, no knowledge of meaning.

    A model can learn from it what a small vocabulary says and compose it anew; a word that it was not trained on tells it nothing.
    """

    name, channels, default_length, weights = "builtin", 64, 16, False

    def __init__(self, length: int = default_length):
        self.length = length

    @property
    def identity(self) -> str:
        """Of the recipe of the numbers: there is nothing else."""
        return hashlib.sha256(f"builtin 1 {self.channels} {WORD.pattern} {END} {WAVELENGTH}".encode()).hexdigest()[:16]

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Words and signs, lower case, then the end; a word is about unit variance."""
        text = torch.zeros(len(prompts), self.length, self.channels)
        mask = torch.zeros(len(prompts), self.length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            words = [*WORD.findall(prompt.lower()), END]
            self.check(prompt, len(words))
            for place, word in enumerate(words):
                text[row, place] = word_vector(word, self.channels) + place_code(place, self.channels)
            mask[row, : len(words)] = True
        return text, mask


@lru_cache(maxsize=4096)
def word_vector(word: str, channels: int) -> Tensor:
    """(k,) standard normal, a function of the word alone."""
    return torch.randn(channels, generator=generator("word", word))


@lru_cache(maxsize=512)
def place_code(place: int, channels: int) -> Tensor:
    """(k,) [sin, cos] of the place, so that the order of words can be seen."""
    angle = place * WAVELENGTH ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels // 2))
    return torch.cat([angle.sin(), angle.cos()]).float()


@dataclass(frozen=True)
class TextEncoderConfig:
    """Which encoder reads the captions; without a ``name`` the model is not told any. InputError on construction for a value out of range.

    ``path`` is the folder or hub id of its weights, for those that have any. ``length`` is the most tokens of a prompt (None: the
    encoder's own). In training a share ``dropout`` of the clips get the empty caption.
    ``gated_time`` and ``table_size`` are those of ``latte.model.text.TextConfig``: for a model that starts from an image model.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str | None = None
    path: str | None = None
    length: int | None = None
    dropout: float = 0.1
    gated_time: bool = False
    table_size: int | None = None

    def __post_init__(self) -> None:
        if self.name is None:
            for key in ("path", "length", "table_size"):
                require(getattr(self, key) is None, f"text.{key}", getattr(self, key), "there is no text encoder", "give text.name, too")
            require(not self.gated_time, "text.gated_time", True, "there is no text encoder", "give text.name, too")
        else:
            choose("text.name", self.name, TEXT_ENCODERS)
        require(self.length is None or self.length >= 1, "text.length", self.length, "it counts tokens", "give 1 or more")
        require(0 <= self.dropout < 1, "text.dropout", self.dropout, "it is a share", "give 0 to below 1")

    @property
    def channels(self) -> int:
        """Channels of the features, known without the weights."""
        if self.name is None:
            raise InputError("text.name is None, but this asks for a model that reads captions; give text.name=builtin or another")
        return TEXT_ENCODERS[self.name].channels

    @property
    def tokens(self) -> int:
        """The most tokens of a prompt."""
        return TEXT_ENCODERS[self.name or "builtin"].default_length if self.length is None else self.length


def build_text_encoder(config: TextEncoderConfig, device: str | torch.device = "cpu") -> TextEncoder:
    """The encoder of ``config``; InputError when its weights are missing or broken."""
    return BUILDERS[choose("text.name", config.name, {name: name for name in BUILDERS})](config, torch.device(device))


def _builtin(config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    return BuiltinEncoder(config.tokens)


TEXT_ENCODERS: dict[str, type[TextEncoder]] = {encoder.name: encoder for encoder in (BuiltinEncoder,)}
BUILDERS: dict[str, Callable[[TextEncoderConfig, torch.device], TextEncoder]] = {"builtin": _builtin}
