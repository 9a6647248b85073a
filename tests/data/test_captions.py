# SPDX-License-Identifier: Apache-2.0
"""Features of captions: each encoded once, padded to one length, and asked for by the caption itself."""

import pytest
import torch

from latte.checks import InputError
from latte.data.captions import PART, encode_captions
from latte.text_encoder import BuiltinEncoder


class Counting(BuiltinEncoder):
    """Remembers what it was asked."""

    def __init__(self, length=4):
        super().__init__(length)
        self.asked = []

    def encode(self, prompts):
        self.asked.append(list(prompts))
        return super().encode(prompts)


def test_every_distinct_caption_is_encoded_once_and_the_empty_one_too():
    encoder, said = Counting(), []
    captions = [f"word{index % 40}" for index in range(100)]
    features = encode_captions(encoder, captions, lambda done, of: said.append((done, of)))
    assert [caption for part in encoder.asked for caption in part] == ["", *captions[:40]]
    assert max(map(len, encoder.asked)) == PART
    assert said == [(32, 41), (41, 41)]
    assert (features.identity, features.length) == (encoder.identity, 4)


def test_what_comes_back_is_what_the_encoder_gives():
    captions = ["red", "", "a b c", "red"]
    text, mask = encode_captions(BuiltinEncoder(4), captions)(captions)
    expected = BuiltinEncoder(4).encode(captions)
    assert torch.equal(text, expected[0])
    assert torch.equal(mask, expected[1])


def test_a_clip_with_stills_has_a_row_of_captions():
    features = encode_captions(BuiltinEncoder(4), ["red", "blue", "a b"])
    text, mask = features([["red", "blue", "a b"], ["blue", "blue", "red"]])
    assert (text.shape, mask.shape) == ((2, 3, 4, 64), (2, 3, 4))
    assert torch.equal(text[1], features(["blue", "blue", "red"])[0])
    assert torch.equal(mask[0], features(["red", "blue", "a b"])[1])


@pytest.mark.parametrize("caption", ["green", None])
def test_a_caption_without_features_is_refused(caption):
    with pytest.raises(InputError, match=r"has no features"):
        encode_captions(BuiltinEncoder(4), ["red"])([caption])
