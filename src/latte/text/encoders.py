# SPDX-License-Identifier: Apache-2.0
"""The table of text encoders: they turn prompts into the token features of LatteText (Latte, Sec. 4.4).

A new encoder is one class with the attributes of ``TextEncoder`` and one entry in ``TEXT_ENCODERS``;
configuration, memory plan, caption files and sampling ask nothing else. Axes: b prompts, l tokens, k
channels.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from latte.checks import check
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
        "give their folder or hub id (--text-encoder for latte sample)",
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
