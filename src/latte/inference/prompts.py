# SPDX-License-Identifier: Apache-2.0
"""Encode prompts with the text encoder that a model was trained with, each once, before the denoiser runs.

Axes: b clips, l tokens of a prompt, k their channels.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from latte.checks import check
from latte.data.captions import EMPTY, CaptionFeatures, encode_captions
from latte.data.config import DataConfig
from latte.text.encoders import (
    WORD,
    TextEncoder,
    TextEncoderConfig,
    build_text_encoder,
    same_weights,
    shorten,
)

LOG = logging.getLogger(__name__)
LISTED = 5  # unknown words in one warning


@dataclass(frozen=True)
class Prompts:
    """The condition of a text model: features (b l k) and mask (b l) of each clip's prompt, and of the
    negative prompt. All are padded to one length, so a clip does not depend on the prompts of its batch.
    """

    text: Tensor
    mask: Tensor
    null_text: Tensor
    null_mask: Tensor

    def select(self, clips: slice) -> "Prompts":
        """Return the prompts of some of the clips."""
        return Prompts(self.text[clips], self.mask[clips], self.null_text[clips], self.null_mask[clips])

    def part(self, clips: slice, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the condition and the null condition of some of the clips, on ``device``."""
        condition = {"text": self.text[clips].to(device), "mask": self.mask[clips].to(device)}
        null = {"text": self.null_text[clips].to(device), "mask": self.null_mask[clips].to(device)}
        return condition, null


@dataclass(frozen=True)
class Vocabulary:
    """The words of the captions that a model was trained on, and one of these captions."""

    words: frozenset[str]
    example: str

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Vocabulary | None":
        """Return the words behind the ``data`` of a model card; None for clips that are not procedural."""
        if data.get("kind") != "procedural":
            return None
        keys = {key: data[key] for key in ("scenes", "language") if key in data}
        captions = DataConfig(kind="procedural", **keys).scene_set.captions
        return cls(frozenset(word for text in captions for word in split(text)), captions[0])

    def warning(self, prompt: str) -> str | None:
        """Return one line about the words of ``prompt`` that occur in no caption, None when all occur."""
        used = list(dict.fromkeys(split(prompt)))
        unknown = [word for word in used if word not in self.words]
        if not unknown:
            return None
        shown = f"the prompt {shorten(prompt)!r}"
        if len(unknown) == len(used):
            return (
                f"warning: {shown} has no word of the captions that the model was trained on, such as "
                f"{self.example!r}; the clip cannot follow it, and is generated all the same"
            )
        listed = [f"{shorten(word)!r}{self.nearest(word)}" for word in unknown[:LISTED]]
        more = f" and {len(unknown) - LISTED} more" * (len(unknown) > LISTED)
        return (
            f"warning: {shown} has words that are in no caption of the training: {', '.join(listed)}{more}; "
            "the clip is generated all the same"
        )

    def nearest(self, word: str) -> str:
        """Return ' (nearest: x, y)' with the known words that are spelt alike, '' without any."""
        close = get_close_matches(word[:40], sorted(self.words), n=2)
        return f" (nearest: {', '.join(close)})" * bool(close)


def split(text: str) -> list[str]:
    """Return the words and punctuation marks of ``text`` as the built-in text encoder sees them."""
    return WORD.findall(text.lower())


class PromptReader:
    """``reader(prompts, negative)`` returns Prompts. ``fingerprint`` is the model's text encoder's, None:
    any.

    The encoder's weights are loaded when a prompt is new, and freed at once: pass all prompts to ``learn``
    before the denoiser needs the memory. They may have another precision than in training (``config.bits``),
    which is logged. So are words that are not in ``vocabulary``, None: any word may have been trained on.
    """

    def __init__(
        self,
        config: TextEncoderConfig,
        device: str | torch.device,
        fingerprint: str | None = None,
        vocabulary: Vocabulary | None = None,
    ):
        self.config = config
        self.device = device
        self.fingerprint = fingerprint
        self.vocabulary = vocabulary
        self.known: CaptionFeatures | None = None

    @property
    def example(self) -> str:
        """Return a prompt of the kind that the model was trained on, as far as that is known."""
        if self.vocabulary:
            return self.vocabulary.example
        return "a red square moves left"

    @property
    def used(self) -> str | None:
        """Return the fingerprint of the encoder that has encoded the prompts; None before."""
        return self.known and self.known.fingerprint

    def learn(self, prompts: Iterable[str]) -> CaptionFeatures:
        """Return the features of these prompts, of the empty one, and of all earlier ones.

        InputError for another encoder than the model's.
        """
        before: Mapping[str, Tensor] = {}
        if self.known:
            before = self.known.features
        new = [prompt for prompt in dict.fromkeys([EMPTY, *prompts]) if prompt not in before]
        if self.known and not new:
            return self.known
        encoder = build_text_encoder(self.config, self.device)
        self.check(encoder)
        found = encode_captions(encoder, new)
        for prompt in filter(None, new):
            if self.vocabulary and (warning := self.vocabulary.warning(prompt)):
                LOG.warning("%s", warning)
        encoder.free()
        self.fingerprint = self.fingerprint or found.fingerprint
        self.known = CaptionFeatures(found.fingerprint, found.length, {**before, **found.features})
        return self.known

    def check(self, encoder: TextEncoder) -> None:
        """Raise InputError unless ``encoder`` has the weights that the model was trained with."""
        if self.fingerprint is None:
            return
        found = f"{encoder.name} {encoder.fingerprint}"
        check(
            same_weights(encoder.fingerprint, self.fingerprint),
            f"the text encoder is {found}, but the model was trained with {self.fingerprint}; "
            "give its own with --text-encoder",
        )
        if encoder.fingerprint != self.fingerprint and self.known is None:
            LOG.warning(
                "the text encoder is %s, the model's was %s: the same weights in another precision",
                found,
                self.fingerprint,
            )

    def __call__(self, prompts: Sequence[str], negative: str = EMPTY) -> Prompts:
        """Return the condition of one prompt per clip; InputError for prompts that are no text or too
        long.
        """
        for prompt in (*prompts, negative):
            check(
                isinstance(prompt, str),
                f"a prompt is {prompt!r}, but it must be a text; pass a list of texts, one per clip",
            )
        features = self.learn([*prompts, negative])
        return Prompts(*features(prompts), *features([negative] * len(prompts)))
