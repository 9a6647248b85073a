# SPDX-License-Identifier: Apache-2.0
"""The builtin encoder: features of a prompt do not depend on other prompts, and no word is lost silently."""

import pytest
import torch

from latte.checks import InputError
from latte.text.builtin import BuiltinEncoder

PROMPTS = ["a red square moves left", "", "Left, a square moves: RED!"]


@pytest.fixture
def encoder():
    return BuiltinEncoder(12)


def test_shapes_and_mask(encoder):
    text, mask = encoder.encode(PROMPTS)
    assert (text.shape, text.dtype, mask.shape, mask.dtype) == (
        (3, 12, 64),
        torch.float32,
        (3, 12),
        torch.bool,
    )
    assert mask.sum(1).tolist() == [6, 1, 9], "words, punctuation and the end token"
    assert (text[~mask] == 0).all()
    assert 0.5 < text[mask].std() < 2


def test_features_do_not_depend_on_other_prompts_nor_on_global_state(encoder):
    together = encoder.encode(PROMPTS)[0]
    torch.manual_seed(17)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = BuiltinEncoder(20).encode([prompt])
        assert torch.equal(alone[0, :12], together[row])


def test_words_and_positions_matter_and_case_does_not(encoder):
    text, _ = encoder.encode(["red blue", "blue red", "RED Blue"])
    assert torch.equal(text[0], text[2])
    assert (text[0] - text[1])[:2].abs().amax(1).min() > 1
    assert (text[0, 0] - text[0, 1]).norm() > 5
    words = torch.stack(
        [encoder.encode([word])[0][0, 0] for word in ("red", "green", "blue", "circle", "left", "qwertz")]
    )
    gram = torch.corrcoef(words - words.mean(0))
    assert (gram - torch.eye(6)).abs().max() < 0.7, "no two words look alike"


def test_the_end_token_is_always_there_and_depends_on_its_position_alone(encoder):
    text, mask = encoder.encode(["", "red", "blue"])
    assert mask.any(1).all()
    assert torch.equal(text[1, 1], text[2, 1])


def test_a_prompt_that_is_too_long_is_refused_with_its_count():
    fits = BuiltinEncoder(6).encode(["a red square moves left"])
    assert fits[1].all()
    with pytest.raises(InputError, match=r"has 6 tokens, but text.length is 5; shorten it"):
        BuiltinEncoder(5).encode(["", "a red square moves left"])


def test_the_fingerprint_does_not_depend_on_the_length_and_never_changes():
    assert BuiltinEncoder(5).fingerprint == BuiltinEncoder(50).fingerprint == "42fe47537a92ad44", (
        "features of finished runs would mean something else"
    )
