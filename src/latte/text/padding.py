# SPDX-License-Identifier: Apache-2.0
"""Token features of different lengths -> one padded tensor and its mask. Axes: b prompts, l tokens, k
channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from latte.checks import check


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
