# SPDX-License-Identifier: Apache-2.0
"""A prompt's features are its own: they do not depend on the prompts beside it, and no word is lost in silence."""

import json
import sys

import pytest
import torch
from support import shared

from latte.checks import InputError
from latte.text_encoder import BuiltinEncoder, T5Encoder, TextEncoderConfig, build_text_encoder, load_t5, width_of
from tiny_pipeline import seeded, tiny_t5

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
        ({"name": "builtin", "path": "here"}, "text.path is 'here', but the text encoder 'builtin' does not read it"),
        ({"name": "builtin", "bits": 8}, "text.bits is 8, but the text encoder 'builtin'"),
        ({"name": "t5", "bits": 4}, "text.bits is 4"),
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


@pytest.fixture
def t5(tmp_path):
    """The folder of a tiny random T5."""
    for part in tiny_t5():
        part.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


SHAPES = ["a red circle moves left", "up", "a red blue circle , a square ."]


def test_t5_gives_what_the_network_gives_for_a_padded_batch_with_a_mask(t5):
    """Another way to the same numbers: all prompts at once, padded, the padding masked."""
    text, mask = T5Encoder(str(t5), 10).encode(["  A red CIRCLE moves left ", *SHAPES[1:]])
    network, tokenizer = load_t5(t5)
    together = tokenizer(SHAPES, padding="max_length", max_length=10, return_tensors="pt")
    with torch.no_grad():
        expected = network(together.input_ids, together.attention_mask).last_hidden_state
    assert torch.equal(mask, together.attention_mask.bool())
    assert mask.sum(1).tolist() == [6, 2, 9]
    assert expected[mask].std() > 0.1
    torch.testing.assert_close(text[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert (text[~mask] == 0).all()


def test_t5_features_do_not_depend_on_company_and_the_empty_prompt_has_its_end(t5):
    encoder = T5Encoder(str(t5), 10)
    together, mask = encoder.encode([*SHAPES, ""])
    assert mask.sum(1).tolist() == [6, 2, 9, 1]
    for row, prompt in enumerate([*SHAPES, ""]):
        assert torch.equal(encoder.encode([prompt])[0][0], together[row])


def test_a_prompt_too_long_for_t5_is_refused_with_its_count(t5):
    with pytest.raises(InputError, match=r"has 9 tokens and text.length is 8"):
        T5Encoder(str(t5), 8).encode(SHAPES)


def test_t5_is_read_when_it_is_needed_and_freed(t5, monkeypatch):
    reads = []
    monkeypatch.setattr("latte.text_encoder.load_t5", lambda *where: reads.append(where) or load_t5(*where))
    encoder = build_text_encoder(TextEncoderConfig(name="t5", path=str(t5), length=10))
    assert (encoder.channels, encoder.length, reads) == (12, 10, [])
    before = encoder.encode(SHAPES)[0]
    identity = encoder.identity
    encoder.free()
    assert encoder.parts is None
    assert encoder.identity == identity
    assert len(reads) == 1, "the identity is remembered"
    assert torch.equal(encoder.encode(SHAPES)[0], before)
    assert len(reads) == 2
    assert build_text_encoder(TextEncoderConfig(name="t5", path=str(t5))).length == 120


def test_the_identity_is_that_of_weights_structure_and_words(t5, tmp_path):
    encoder, tokenizer = tiny_t5()
    identity = T5Encoder(str(t5)).identity
    (tmp_path / "pipeline").mkdir()
    encoder.save_pretrained(tmp_path / "pipeline/text_encoder", max_shard_size="2KB")
    tokenizer.save_pretrained(tmp_path / "pipeline/tokenizer")
    assert T5Encoder(str(tmp_path / "pipeline")).identity == identity, "split, and in two folders"
    with torch.no_grad():
        encoder.encoder.final_layer_norm.weight[0] += 1e-3
    encoder.save_pretrained(tmp_path / "pipeline/text_encoder", max_shard_size="2KB")
    others = [T5Encoder(str(tmp_path / "pipeline")).identity]
    card = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps({**card, "relative_attention_max_distance": 64}))
    others.append(T5Encoder(str(t5)).identity)
    assert len({identity, *others}) == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not the card of a T5"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not the card of a T5"),
    ],
)
def test_a_damaged_t5_is_told_in_one_line(t5, change, told):
    change(t5)
    with pytest.raises(InputError, match=told) as error:
        T5Encoder(str(t5)).encode(["up"])
    assert "\n" not in str(error.value)


def test_a_t5_that_is_nowhere_is_told(tmp_path):
    assert (width_of(None), width_of(str(tmp_path))) == (4096, 4096), "XXL's, when there is nothing to look into"
    with pytest.raises(InputError, match=r"text.path is None, but the text encoder 't5' reads its weights"):
        build_text_encoder(TextEncoderConfig(name="t5"))
    with pytest.raises(InputError, match="cannot be read"):
        T5Encoder(str(tmp_path)).encode(["up"])


@pytest.mark.parametrize(("missing", "bits", "told"), [("transformers", None, "needs transformers"), ("bitsandbytes", 8, "bitsandbytes")])
def test_a_missing_library_is_told(t5, monkeypatch, missing, bits, told):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("latte.text_encoder.find_spec", lambda name: None if name == missing else object())
    with pytest.raises(InputError, match=told):
        T5Encoder(str(t5), bits=bits).encode(["up"])


def test_the_real_tokenizer_splits_words_as_t5_does(tmp_path):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(shared("weights", "t5_tokenizer"))
    config = T5Config(vocab_size=32128, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, is_encoder_decoder=False)
    seeded(lambda: T5EncoderModel(config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer("Studies have shown that owning a dog is good for you").input_ids == [
        6536, 43, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 1]  # fmt: skip
    encoder = T5Encoder(str(tmp_path))
    text, mask = encoder.encode(["Studies have shown that owning a dog is good for you", "", "ab " * 40])
    assert (text.shape, mask[:2].sum(1).tolist()) == (
        (3, 120, 8),
        [len(tokenizer("studies have shown that owning a dog is good for you").input_ids), 1],
    )
    with pytest.raises(InputError, match=r"has \d+ tokens and text.length is 120"):
        encoder.encode(["word " * 200])
