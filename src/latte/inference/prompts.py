# SPDX-License-Identifier: Apache-2.0
"""Prompts, read by the text encoder that a model was trained with, each once, and before the denoiser is at
work.

Axes: b clips, l tokens of a prompt, k their channels.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latte.checks import InputError, require
from latte.data.captions import EMPTY, CaptionFeatures, encode_captions
from latte.text.encoders import TextEncoder, TextEncoderConfig, build_text_encoder, same_weights

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompts:
    """What a text model reads: features (b l k) and mask (b l) of each clip's prompt, and of what guidance
    leads away from.

    All are padded to one length, so that a clip does not depend on the prompts beside its own.
    """

    text: Tensor
    mask: Tensor
    null_text: Tensor
    null_mask: Tensor

    def part(self, clips: slice, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the condition and the null condition of some of the clips, on ``device``."""
        condition = {"text": self.text[clips].to(device), "mask": self.mask[clips].to(device)}
        null = {"text": self.null_text[clips].to(device), "mask": self.null_mask[clips].to(device)}
        return condition, null


class PromptReader:
    """``reader(prompts, negative)`` -> Prompts. ``fingerprint`` is that of the encoder that the model learned
    with (None: not asked).

    The encoder's weights are read when a prompt is new, and freed again at once: give all prompts to
    ``learn`` before the denoiser needs the memory. They may be held in other bits than they were in training
    (``config.bits``), which is told.
    """

    def __init__(self, config: TextEncoderConfig, device: str | torch.device, fingerprint: str | None = None):
        self.config, self.device, self.fingerprint = config, device, fingerprint
        self.known: CaptionFeatures | None = None

    @property
    def used(self) -> str | None:
        """The fingerprint of the encoder that has read the prompts; None before."""
        return self.known.fingerprint if self.known else None

    def learn(self, prompts: Iterable[str]) -> CaptionFeatures:
        """The features of these prompts, of the empty one, and of all that were read before; InputError
        for another encoder.
        """
        before = self.known.features if self.known else {}
        new = [prompt for prompt in dict.fromkeys([EMPTY, *prompts]) if prompt not in before]
        if self.known and not new:
            return self.known
        encoder = build_text_encoder(self.config, self.device)
        self.check(encoder)
        found = encode_captions(encoder, new)
        encoder.free()
        self.fingerprint = self.fingerprint or found.fingerprint
        self.known = CaptionFeatures(found.fingerprint, found.length, {**before, **found.features})
        return self.known

    def check(self, encoder: TextEncoder) -> None:
        """InputError unless ``encoder`` has the weights that the model learned with, and those that were
        used before.
        """
        if self.fingerprint is None:
            return
        ours = f"{encoder.name} {encoder.fingerprint}"
        require(
            same_weights(encoder.fingerprint, self.fingerprint),
            "the text encoder",
            ours,
            f"the model learned with {self.fingerprint}",
            "give the one it was trained with, by --text-encoder",
        )
        if encoder.fingerprint != self.fingerprint and self.known is None:
            LOG.warning(
                "the text encoder is %s and the model learned with %s: the same weights, held in other bits",
                ours,
                self.fingerprint,
            )

    def __call__(self, prompts: Sequence[str], negative: str = EMPTY) -> Prompts:
        """A prompt a clip, and one thing for all to be led away from; InputError for what is no text or
        too long.
        """
        for prompt in (*prompts, negative):
            if not isinstance(prompt, str):
                raise InputError(
                    f"a prompt is {prompt!r}, but it must be a text; give a list of texts, one per clip"
                )
        features = self.learn([*prompts, negative])
        return Prompts(*features(prompts), *features([negative] * len(prompts)))
