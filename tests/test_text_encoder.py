# SPDX-License-Identifier: Apache-2.0
"""A prompt's features are its own: they do not depend on the prompts beside it, and no word is lost in silence."""

import pytest
import torch

from latte.checks import InputError
from latte.text_encoder import BuiltinEncoder, TextEncoderConfig, build_text_encoder

PROMPTS = ["a red square moves left", "", "Left, a square moves: RED!"]


@pytest.fixture
def encoder():
    return BuiltinEncoder(12)


def test_shapes_and_mask(encoder):
    text, mask = encoder.encode(PROMPTS)
    assert (text.shape, text.dtype, mask.shape, mask.dtype) == ((3, 12, 64), torch.float32, (3, 12), torch.bool)
    assert mask.sum(1).tolist() == [6, 1, 9], "words and signs, and the end"
    assert (text[~mask] == 0).all()
    assert 0.5 < text[mask].std() < 2


def test_features_do_not_depend_on_the_prompts_beside_nor_on_global_state(encoder):
    together = encoder.encode(PROMPTS)[0]
    torch.manual_seed(17)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = BuiltinEncoder(20).encode([prompt])
        assert torch.equal(alone[0, :12], together[row])


def test_words_differ_places_differ_and_case_does_not(encoder):
    text, _ = encoder.encode(["red blue", "blue red", "RED Blue"])
    assert torch.equal(text[0], text[2])
    assert (text[0] - text[1])[:2].abs().amax(1).min() > 1
    assert (text[0, 0] - text[0, 1]).norm() > 5
    words = torch.stack([encoder.encode([word])[0][0, 0] for word in ("red", "green", "blue", "circle", "left", "qwertz")])
    gram = torch.corrcoef(words - words.mean(0))
    assert (gram - torch.eye(6)).abs().max() < 0.7, "no two words look alike"


def test_the_end_is_always_there_and_tells_nothing_but_its_place(encoder):
    text, mask = encoder.encode(["", "red", "blue"])
    assert mask.any(1).all()
    assert torch.equal(text[1, 1], text[2, 1])


def test_a_prompt_that_is_too_long_is_refused_with_its_count():
    fits = BuiltinEncoder(6).encode(["a red square moves left"])
    assert fits[1].all()
    with pytest.raises(InputError, match=r"it has 6 tokens and text.length is 5; shorten it"):
        BuiltinEncoder(5).encode(["", "a red square moves left"])


def test_the_identity_does_not_depend_on_the_length_and_is_what_it_was():
    assert BuiltinEncoder(5).identity == BuiltinEncoder(50).identity == "42fe47537a92ad44", (
        "features of finished runs would mean something else"
    )


def test_it_is_built_by_name():
    found = build_text_encoder(TextEncoderConfig(name="builtin", length=7))
    assert (found.name, found.length, found.channels) == ("builtin", 7, TextEncoderConfig(name="builtin").channels)
    assert build_text_encoder(TextEncoderConfig(name="builtin")).length == 16


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"name": "builtn"}, "did you mean 'builtin'"),
        ({"name": "builtin", "length": 0}, "text.length is 0"),
        ({"name": "builtin", "dropout": 1.0}, "text.dropout is 1.0"),
        ({"length": 8}, "text.length is 8, but there is no text encoder"),
        ({"path": "here"}, "text.path is 'here'"),
        ({"gated_time": True}, "text.gated_time is True"),
        ({"table_size": 8}, "text.table_size is 8"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys, told):
    with pytest.raises(InputError, match=told):
        TextEncoderConfig(**keys)


def test_no_encoder_has_no_channels():
    with pytest.raises(InputError, match=r"text.name is None"):
        _ = TextEncoderConfig().channels
    with pytest.raises(InputError, match=r"text.name is None"):
        build_text_encoder(TextEncoderConfig())
