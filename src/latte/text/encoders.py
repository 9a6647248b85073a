# SPDX-License-Identifier: Apache-2.0
"""Prompts -> features of their tokens, by name of the encoder: what LatteText looks at (Latte, Sec. 4.4).

A prompt's features depend on nothing beside it. They are padded on the right to the encoder's length, and the mask says where the padding
is, which the model never attends to; there is always a token to look at, the end, so that the empty prompt is a prompt like any other.
Axes: b prompts, l tokens, k channels.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from latte.checks import InputError, choose, require
from latte.runtime import generator
from latte.text import t5


class TextEncoder(ABC):
    """``encode(prompts) -> (features (b l k), mask (b l))`` with ``channels`` k and ``length`` l."""

    name: str
    channels: int
    length: int
    default_length: int
    weights: bool  # does it read any from a disk?

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits that change with everything that features depend on, and '-8bit' behind them where the weights are held so."""

    @abstractmethod
    def count(self, prompt: str) -> int:
        """The prompt's tokens, the end is one, however many there is room for; no weights are read."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(b l k) float32 and (b l) bool, True where there is a token, on the CPU; InputError for a prompt longer than ``length``."""

    def free(self) -> None:
        """Give back the memory of the weights; the next ``encode`` reads them again."""
        return

    def check(self, prompt: str, tokens: int) -> None:
        """InputError for a prompt of more ``tokens`` (the end is one) than there is room for: it is never cut in silence."""
        shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
        require(
            tokens <= self.length,
            "the prompt",
            shown,
            f"it has {tokens} tokens and text.length is {self.length}",
            "shorten it, or give a model that was trained with more",
        )


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints differ in nothing, or in the bits that the weights are held in."""
    return one.partition("-")[0] == other.partition("-")[0]


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
    def fingerprint(self) -> str:
        """Of the recipe of the numbers: there is nothing else."""
        return hashlib.sha256(
            f"builtin 1 {self.channels} {WORD.pattern} {END} {WAVELENGTH}".encode()
        ).hexdigest()[:16]

    def count(self, prompt: str) -> int:
        """Words and signs, and the end."""
        return len(WORD.findall(prompt.lower())) + 1

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


STRUCTURE = (
    "d_model",
    "d_kv",
    "num_layers",
    "num_heads",
    "feed_forward_proj",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
)


class T5Encoder(TextEncoder):
    """The encoder half of a T5 (v1.1 XXL for the released Latte): prompts are lower-cased and stripped, as its training captions were.

    The weights are read with the first prompt. Prompts go through one by one, without padding, so that features do not depend on company;
    in bfloat16 on a GPU, in float32 elsewhere. ``bits`` 8 holds most of the weights as eight-bit numbers, see ``latte.text.t5.hold``.
    """

    name, channels, default_length, weights = "t5", t5.XXL["d_model"], 120, True

    def __init__(
        self,
        path: str,
        length: int = default_length,
        device: str | torch.device = "cpu",
        bits: int | None = None,
    ):
        self.path, self.length, self.device, self.bits = path, length, torch.device(device), bits
        self.channels = t5.width_of(path)
        self.parts: tuple[Any, Any] | None = None
        self.tokenizer: Any = None
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """Of weights (as float32), structure and vocabulary as stored: the same from any file name and in any split, on any device."""
        if not self._fingerprint:
            self.read()
        return self._fingerprint

    def describe(self, network: Any, tokenizer: Any) -> str:
        """The fingerprint of these parts, which are as they were stored."""
        structure = [
            self.name,
            None,
            *(getattr(network.config, key) for key in STRUCTURE),
            sorted(tokenizer.get_vocab().items()),
        ]
        digest = hashlib.sha256(json.dumps(structure).encode())
        for name, tensor in sorted(network.named_parameters()):
            digest.update(f" {name} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()[:16] + (f"-{self.bits}bit" if self.bits else "")

    def read(self) -> tuple[Any, Any]:
        """(network, tokenizer), from the disk when they are not here; InputError when they cannot be read, or are of another width."""
        if self.parts is None:
            if self.bits:
                t5.eight_bit_layers()
            network, tokenizer = t5.load_t5(self.path)
            width = network.config.d_model
            require(
                width == self.channels,
                "text.path",
                self.path,
                f"this encoder has {width} channels, not {self.channels}",
                "fetch it, and give its folder",
            )
            self._fingerprint = self.describe(network, tokenizer)
            self.parts = t5.hold(network, self.device, self.bits), tokenizer
        return self.parts

    def count(self, prompt: str) -> int:
        """As ``encode`` splits it; reads the tokenizer alone, or InputError."""
        if self.tokenizer is None:
            self.tokenizer = t5.load_tokenizer(self.path)
        return len(self.tokenizer(prompt.lower().strip()).input_ids)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The tokens of the lower-cased and stripped prompt, then the end."""
        network, tokenizer = self.read()
        text = torch.zeros(len(prompts), self.length, self.channels)
        mask = torch.zeros(len(prompts), self.length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            tokens = torch.tensor([tokenizer(prompt.lower().strip()).input_ids], device=self.device)
            count = tokens.shape[1]
            self.check(prompt, count)
            text[row, :count] = network(tokens).last_hidden_state[0].float().cpu()
            mask[row, :count] = True
        return text, mask

    def free(self) -> None:
        """Give back the memory."""
        self.parts = self.tokenizer = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class TextEncoderConfig:
    """Which encoder reads the captions; without a ``name`` the model is not told any. InputError on construction for a value out of range.

    ``path`` is the folder or hub id of its weights, if it has any, and ``bits`` 8 holds them as eight-bit numbers. ``length`` is the most
    tokens of a prompt (None: the encoder's own). In training a share ``dropout`` of the clips get the empty caption.
    ``gated_time`` and ``table_size`` are those of ``latte.model.text.TextConfig``, for a model that starts from an image model: one that
    starts from PixArt needs the gate, which training has opened at step ``train.gate_steps``.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str | None = None
    path: str | None = None
    length: int | None = None
    bits: int | None = None
    dropout: float = 0.1
    gated_time: bool = False
    table_size: int | None = None

    def __post_init__(self) -> None:
        unread = {
            None: ("path", "length", "bits", "gated_time", "table_size"),
            "builtin": ("path", "bits"),
        }.get(self.name, ())
        why = (
            "there is no text encoder"
            if self.name is None
            else f"the text encoder {self.name!r} does not read it"
        )
        for key in unread:
            require(
                not getattr(self, key),
                f"text.{key}",
                getattr(self, key),
                why,
                "leave it out, or give another text.name",
            )
        if self.name is not None:
            choose("text.name", self.name, TEXT_ENCODERS)
        require(
            self.bits in (None, 8),
            "text.bits",
            self.bits,
            "weights are kept as they are or as eight-bit numbers",
            "give 8, or null",
        )
        require(
            self.length is None or self.length >= 1,
            "text.length",
            self.length,
            "it counts tokens",
            "give 1 or more",
        )
        require(0 <= self.dropout < 1, "text.dropout", self.dropout, "it is a share", "give 0 to below 1")

    @property
    def channels(self) -> int:
        """Channels of the features, known without the weights."""
        if self.name is None:
            raise InputError(
                "text.name is None, but this asks for a model that reads captions; give text.name=builtin or another"
            )
        return (
            t5.width_of(self.path) if TEXT_ENCODERS[self.name].weights else TEXT_ENCODERS[self.name].channels
        )

    @property
    def tokens(self) -> int:
        """The most tokens of a prompt."""
        return TEXT_ENCODERS[self.name or "builtin"].default_length if self.length is None else self.length


def build_text_encoder(config: TextEncoderConfig, device: str | torch.device = "cpu") -> TextEncoder:
    """The encoder of ``config``, whose weights are read when the first prompt is; InputError when it is not said where they are."""
    kind = choose("text.name", config.name, TEXT_ENCODERS)
    if kind is BuiltinEncoder:
        return BuiltinEncoder(config.tokens)
    require(
        config.path is not None,
        "text.path",
        config.path,
        f"the text encoder {config.name!r} reads its weights from somewhere",
        "give the folder or hub id of a T5 (--text-encoder for latte sample)",
    )
    return T5Encoder(config.path or "", config.tokens, device, config.bits)


def weights_bytes(config: TextEncoderConfig, device: torch.device) -> int:
    """Bytes of the weights of ``config``'s encoder as it holds them on ``device``, known without them; 0 for one that has none.

    A T5 is that of its config.json, XXL where ``path`` has none to look into. InputError for a broken one, and without transformers.
    """
    if config.name is None or not TEXT_ENCODERS[config.name].weights:
        return 0
    return t5.held_bytes(t5.skeleton(config.path), device, config.bits)


TEXT_ENCODERS: dict[str | None, type[TextEncoder]] = {
    encoder.name: encoder for encoder in (BuiltinEncoder, T5Encoder)
}
