# SPDX-License-Identifier: Apache-2.0
"""The builtin encoder: features of a prompt do not depend on other prompts, and no word is lost silently."""

import hashlib
import re

import pytest
import torch

from latte.checks import InputError
from latte.data.base import PROCEDURAL, DataConfig
from latte.text.encoders import WORD, BuiltinEncoder

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


def test_every_chinese_character_is_a_token_with_its_own_place(encoder):
    prompt = "红色的球 bounces 向左，3次!"
    assert encoder.count(prompt) == 4 + 1 + 2 + 1 + 1 + 1 + 1 + 1, (
        "characters, word, punctuation, digits, end"
    )
    text, mask = encoder.encode(["红球", "红 球", "球红"])
    assert mask.sum(1).tolist() == [3, 3, 3]
    assert torch.equal(text[0], text[1])
    assert (text[0] - text[2])[:2].abs().amax(1).min() > 1
    mixed, _ = encoder.encode(["a红b"])
    assert torch.equal(
        mixed[0, 1] - mixed[0, 0], encoder.encode(["q红"])[0][0, 1] - encoder.encode(["a"])[0][0, 0]
    )
    extended = "\u3400\u9fff\uf900\U00020000"
    assert encoder.count(extended) == 5, "rare ideographs too"


def test_a_chinese_prompt_that_is_too_long_is_refused_with_its_count():
    prompt = "一个红色的球向左弹跳"
    assert BuiltinEncoder(11).encode([prompt])[1].all()
    with pytest.raises(InputError, match=r"has 11 tokens, but text.length is 10; shorten it"):
        BuiltinEncoder(10).encode([prompt])


def test_text_without_ideographs_is_split_as_by_the_first_version():
    first = re.compile(r"[^\W_]+|[^\w\s]|_")
    sets = [DataConfig(kind="procedural", scenes=name).scene_set.captions for name in PROCEDURAL]
    odd = [
        "",
        "Left, a square moves: RED!",
        "snake_case 3x4 naïve Äpfel",
        "красный шар",
        "アカ 가나 x²",
        "🎈a\tb\n",
    ]
    prompts = [*(caption for captions in sets for caption in captions), *odd]
    assert len(prompts) > 700
    for prompt in prompts:
        assert WORD.findall(prompt.lower()) == first.findall(prompt.lower()), prompt


def test_features_of_english_captions_never_change():
    text, _ = BuiltinEncoder(16).encode(["a red square moves left", "waves roll left over a blue sea"])
    digest = hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16]
    assert digest == "390161ff8e708a47"


def test_the_fingerprint_does_not_depend_on_the_length_and_never_changes():
    assert BuiltinEncoder(5).fingerprint == BuiltinEncoder(50).fingerprint == "42fe47537a92ad44", (
        "features of finished runs would mean something else"
    )
