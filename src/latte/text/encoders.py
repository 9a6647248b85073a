# SPDX-License-Identifier: Apache-2.0
"""Text encoders turn prompts into the token features of LatteText (Latte, Sec. 4.4): what all of them share,
and the built-in one, which needs no weights.

A new encoder is one class with the attributes of ``TextEncoder`` and one entry in ``TEXT_ENCODERS``;
configuration, memory plan, caption files and sampling ask nothing else. Axes: b prompts, l tokens, k
channels.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from latte.checks import check
from latte.runtime import generator
from latte.text.config import TEXT_ENCODERS as TEXT_ENCODERS
from latte.text.config import TextEncoderConfig as TextEncoderConfig


class TextEncoder(Protocol):
    """Encodes prompts independently of each other, padded on the right to ``length`` tokens.

    Every prompt ends with an end token, so even the empty prompt has one token to attend to. Class methods
    answer without reading weights; ``path`` is the folder or hub id of the weights (None: not known yet).
    """

    name: ClassVar[str]  # value of text.name
    default_length: ClassVar[int]  # tokens of a prompt when text.length is not set
    has_weights: ClassVar[bool]  # whether it reads weights, from text.path
    bits_allowed: ClassVar[tuple[int, ...]]  # values of text.bits that it can hold its weights in
    channels: int  # k
    length: int  # l, the maximum number of tokens of a prompt

    @classmethod
    def load(cls, path: str | None, length: int, device: torch.device, bits: int | None) -> Self:
        """Return the encoder. Weights are read with the first prompt."""
        ...

    @classmethod
    def channels_of(cls, path: str | None) -> int:
        """Return the number of channels k of the features."""
        ...

    @classmethod
    def weights_bytes(cls, path: str | None, device: torch.device, bits: int | None) -> int:
        """Return the bytes of the weights as held on ``device``; 0 for an encoder without weights."""
        ...

    @classmethod
    def meta_forward(cls, path: str | None, num_tokens: int, device: torch.device) -> Callable[[], object]:
        """Return a function that encodes a prompt of ``num_tokens`` on the meta device, to measure memory."""
        ...

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with everything the features depend on; '-8bit' follows for int8
        weights.
        """
        ...

    @property
    def feature_bytes(self) -> int:
        """Bytes of one number of the features, as they are kept in memory."""
        ...

    def count(self, prompt: str) -> int:
        """Return the number of tokens of ``prompt``, the end token included, without a limit; reads no
        weights.
        """
        ...

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return features (b l k) float32 and their mask (b l) bool, True for a token, on the CPU.

        InputError for a prompt of more than ``length`` tokens.
        """
        ...

    def free(self) -> None:
        """Release the memory of the weights; the next ``encode`` reads them again."""
        ...


def same_weights(fingerprint: str, other: str) -> bool:
    """Return whether two fingerprints are of the same weights, possibly held in different bits."""
    return fingerprint.partition("-")[0] == other.partition("-")[0]


def build_text_encoder(config: TextEncoderConfig, device: str | torch.device = "cpu") -> TextEncoder:
    """Return the encoder of ``config``; its weights are read with the first prompt. InputError when text.path
    is missing.
    """
    encoder = config.encoder
    check(
        config.path is not None or not encoder.has_weights,
        f"text.path is not set, but the text encoder {config.name!r} needs weights; "
        "give their folder or hub id, e.g. google/t5-v1_1-xxl (--text-encoder for latte sample)",
    )
    return encoder.load(config.path, config.tokens, torch.device(device), config.bits)


def weights_bytes(config: TextEncoderConfig, device: torch.device) -> int:
    """Return the bytes of the encoder's weights on ``device``, known without reading them; 0 without an
    encoder or weights.

    Where ``path`` holds no config.json, the size is that of T5 v1.1 XXL. InputError for a broken config.json,
    and without transformers.
    """
    if config.name is None:
        return 0
    return config.encoder.weights_bytes(config.path, device, config.bits)


def pad_features(features: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Pad features (l_i k) on the right to ``length`` tokens.

    Returns (text (b l k) float32 on the CPU, mask (b l) bool); the mask is True where there is a token.
    """
    text = torch.zeros(len(features), length, features[0].shape[1])
    mask = torch.zeros(len(features), length, dtype=torch.bool)
    for row, tokens in enumerate(features):
        text[row, : len(tokens)] = tokens.to("cpu", torch.float32)
        mask[row, : len(tokens)] = True
    return text, mask


def shorten(text: str) -> str:
    """Return ``text`` for a message, 60 characters at most."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_num_tokens(prompt: str, num_tokens: int, length: int) -> None:
    """InputError when ``prompt`` has more tokens (the end token included) than ``length``: nothing is
    truncated silently.
    """
    check(
        num_tokens <= length,
        f"the prompt {shorten(prompt)!r} has {num_tokens} tokens, but text.length is {length}; "
        "shorten it, or use a model that was trained with longer prompts",
    )


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
