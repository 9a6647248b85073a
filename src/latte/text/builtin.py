# SPDX-License-Identifier: Apache-2.0
"""A text encoder without weights: a random vector per word and a code of its position. Axes: b prompts, l
tokens, k channels.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from latte.runtime import generator
from latte.text.padding import check_num_tokens, pad_features

# Chinese is written without spaces, so each of its characters (the ideographs of Unicode) is a word.
HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{HAN}]|[^\W_{HAN}]+|[^\w\s]|_")
# The pattern of 0.1.0 stays in the fingerprint: text without ideographs is split as it was then.
FIRST_WORD = r"[^\W_]+|[^\w\s]|_"
END = "</s>"
WAVELENGTH = 10000.0


class BuiltinEncoder:
    """Gives every word a fixed random vector and adds a code of its position: no weights, no download, no
    meaning.

    A model can learn a small vocabulary from it and combine the words in new ways. A word that did not occur
    in training is noise to the model.
    """

    name: ClassVar[str] = "builtin"
    default_length: ClassVar[int] = 16
    has_weights: ClassVar[bool] = False
    bits_allowed: ClassVar[tuple[int, ...]] = ()
    channels = 64

    def __init__(self, length: int = default_length):
        self.length = length

    @classmethod
    def load(cls, path: str | None, length: int, device: torch.device, bits: int | None) -> "BuiltinEncoder":
        """Return the encoder for prompts of up to ``length`` tokens; nothing is read."""
        return cls(length)

    @classmethod
    def channels_of(cls, path: str | None) -> int:
        """Return the number of channels k."""
        return cls.channels

    @classmethod
    def weights_bytes(cls, path: str | None, device: torch.device, bits: int | None) -> int:
        """Return 0: there are no weights."""
        return 0

    @classmethod
    def meta_forward(cls, path: str | None, num_tokens: int, device: torch.device) -> Callable[[], object]:
        """Return a function that does nothing: the work is not worth counting."""
        return lambda: None

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the recipe behind the vectors; there is nothing else that they depend on."""
        recipe = f"builtin 1 {self.channels} {FIRST_WORD} {END} {WAVELENGTH}"
        return hashlib.sha256(recipe.encode()).hexdigest()[:16]

    @property
    def feature_bytes(self) -> int:
        """Bytes of one number of the features."""
        return 4

    def count(self, prompt: str) -> int:
        """Return the number of words, Chinese characters and punctuation marks, plus 1 for the end token."""
        return len(WORD.findall(prompt.lower())) + 1

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return features (b l k) of roughly unit variance and their mask (b l), as
        ``TextEncoder.encode``.
        """
        features = []
        for prompt in prompts:
            words = [*WORD.findall(prompt.lower()), END]
            check_num_tokens(prompt, len(words), self.length)
            vectors = [
                word_vector(word, self.channels) + position_code(position, self.channels)
                for position, word in enumerate(words)
            ]
            features.append(torch.stack(vectors))
        return pad_features(features, self.length)

    def free(self) -> None:
        """Do nothing: no memory is held."""


@lru_cache(maxsize=4096)
def word_vector(word: str, channels: int) -> Tensor:
    """Return (k,) standard normal numbers that depend on the word alone."""
    return torch.randn(channels, generator=generator("word", word))


@lru_cache(maxsize=512)
def position_code(position: int, channels: int) -> Tensor:
    """Return (k,) [sin, cos] of the position, so that the order of words matters."""
    exponents = torch.arange(channels // 2, dtype=torch.float64) / (channels // 2)
    angle = position * WAVELENGTH**-exponents
    return torch.cat([angle.sin(), angle.cos()]).float()
