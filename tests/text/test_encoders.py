# SPDX-License-Identifier: Apache-2.0
"""A prompt's features are its own: they do not depend on the prompts beside it, and no word is lost in silence."""

import gc
import json
import logging
import sys
import weakref
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import shared

from latte.checks import InputError
from latte.text.encoders import (
    BuiltinEncoder,
    T5Encoder,
    TextEncoderConfig,
    build_text_encoder,
    same_weights,
    weights_bytes,
)
from latte.text.t5 import load_t5, width_of
from tiny_pipeline import seeded, tiny_t5

PROMPTS = ["a red square moves left", "", "Left, a square moves: RED!"]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install 'latte-video[bits8]')"
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
    words = torch.stack(
        [encoder.encode([word])[0][0, 0] for word in ("red", "green", "blue", "circle", "left", "qwertz")]
    )
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
    assert BuiltinEncoder(5).fingerprint == BuiltinEncoder(50).fingerprint == "42fe47537a92ad44", (
        "features of finished runs would mean something else"
    )


def test_it_is_built_by_name():
    found = build_text_encoder(TextEncoderConfig(name="builtin", length=7))
    assert (found.name, found.length, found.channels) == (
        "builtin",
        7,
        TextEncoderConfig(name="builtin").channels,
    )
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
        (
            {"name": "builtin", "path": "here"},
            "text.path is 'here', but the text encoder 'builtin' does not read it",
        ),
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


def test_tokens_are_counted_as_they_are_encoded_and_no_weights_are_read(t5):
    (t5 / "model.safetensors").rename(t5 / "away")
    prompts = [*SHAPES, "", "  A red CIRCLE ", "up " * 30]
    encoder, builtin = T5Encoder(str(t5), 50), BuiltinEncoder(50)
    counts = [encoder.count(prompt) for prompt in prompts]
    (t5 / "away").rename(t5 / "model.safetensors")
    assert counts == encoder.encode(prompts)[1].sum(1).tolist()
    assert [builtin.count(prompt) for prompt in [*prompts, *PROMPTS]] == builtin.encode([*prompts, *PROMPTS])[
        1
    ].sum(1).tolist()
    assert (BuiltinEncoder(1).count("two words"), T5Encoder(str(t5), 1).count("up down")) == (3, 3), (
        "however many there is room for"
    )


def test_t5_is_read_when_it_is_needed_and_freed(t5, monkeypatch):
    reads = []
    monkeypatch.setattr("latte.text.t5.load_t5", lambda *where: reads.append(where) or load_t5(*where))
    encoder = build_text_encoder(TextEncoderConfig(name="t5", path=str(t5), length=10))
    assert (encoder.channels, encoder.length, reads) == (12, 10, [])
    before = encoder.encode(SHAPES)[0]
    fingerprint = encoder.fingerprint
    encoder.free()
    assert encoder.parts is None
    assert encoder.fingerprint == fingerprint
    assert len(reads) == 1, "the fingerprint is remembered"
    assert torch.equal(encoder.encode(SHAPES)[0], before)
    assert len(reads) == 2
    assert build_text_encoder(TextEncoderConfig(name="t5", path=str(t5))).length == 120


def test_the_identity_is_that_of_weights_structure_and_words(t5, tmp_path):
    encoder, tokenizer = tiny_t5()
    fingerprint = T5Encoder(str(t5)).fingerprint
    (tmp_path / "pipeline").mkdir()
    encoder.save_pretrained(tmp_path / "pipeline/text_encoder", max_shard_size="2KB")
    tokenizer.save_pretrained(tmp_path / "pipeline/tokenizer")
    assert T5Encoder(str(tmp_path / "pipeline")).fingerprint == fingerprint, "split, and in two folders"
    with torch.no_grad():
        encoder.encoder.final_layer_norm.weight[0] += 1e-3
    encoder.save_pretrained(tmp_path / "pipeline/text_encoder", max_shard_size="2KB")
    others = [T5Encoder(str(tmp_path / "pipeline")).fingerprint]
    card = json.loads((t5 / "config.json").read_text())
    (t5 / "config.json").write_text(json.dumps({**card, "relative_attention_max_distance": 64}))
    others.append(T5Encoder(str(t5)).fingerprint)
    assert len({fingerprint, *others}) == 3


def test_the_identity_of_a_t5_is_what_it_was(t5):
    network, _ = tiny_t5()
    for parameter in network.parameters():
        parameter.data.fill_(0.5)
    network.save_pretrained(t5)
    assert T5Encoder(str(t5)).fingerprint == "cf23085f081215c9", "finished runs would ask for another encoder"


def test_weights_that_changed_since_they_were_freed_have_another_fingerprint(t5):
    encoder = T5Encoder(str(t5), 10)
    before = encoder.fingerprint
    encoder.free()
    network, _ = tiny_t5()
    network.encoder.final_layer_norm.weight.data += 1
    network.save_pretrained(t5)
    encoder.encode(["up"])
    assert encoder.fingerprint != before


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
    assert (width_of(None), width_of(str(tmp_path))) == (4096, 4096), (
        "XXL's, when there is nothing to look into"
    )
    with pytest.raises(InputError, match=r"text.path is None, but the text encoder 't5' reads its weights"):
        build_text_encoder(TextEncoderConfig(name="t5"))
    with pytest.raises(InputError, match="cannot be read"):
        T5Encoder(str(tmp_path)).encode(["up"])


@pytest.mark.parametrize(
    ("missing", "bits", "told"), [("transformers", None, "needs transformers"), ("bitsandbytes", 8, "bits8")]
)
def test_a_missing_library_is_told_before_weights_are_read(t5, monkeypatch, missing, bits, told):
    (t5 / "model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=told) as error:
        T5Encoder(str(t5), bits=bits).encode(["up"])
    assert "\n" not in str(error.value)


def test_a_t5_that_lacks_a_weight_is_refused(t5):
    """transformers would fill it with random numbers, others every time."""
    tensors = load_file(t5 / "model.safetensors")
    del tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(tensors, t5 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError,
        match=r"cannot be read \(its weights lack encoder.block.1.layer.1.DenseReluDense.wo.weight\)",
    ):
        T5Encoder(str(t5)).encode(["up"])


def held(encoder: T5Encoder) -> int:
    """Bytes of all numbers of the weights that are here; scales of eight-bit ones are neither parameters nor buffers."""
    network, _ = encoder.read()
    scales = [
        layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        for layer in network.modules()
        if hasattr(layer, "state")
    ]
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers(), *scales])


@needs_bitsandbytes
def test_eight_bits_are_close_to_what_they_stand_for(t5, caplog):
    """Measured: 0.9 % of the features' norm. Weights are rounded to 1/127 of a row's largest; so is what goes in."""
    plain, mask = T5Encoder(str(t5), 10).encode([*SHAPES, ""])
    encoder = T5Encoder(str(t5), 10, bits=8)
    with caplog.at_level(logging.DEBUG):
        text, same = encoder.encode([*SHAPES, ""])
    assert torch.equal(same, mask)
    assert 1e-3 < (text - plain).norm() / plain.norm() < 0.03
    assert (text[~mask] == 0).all()
    kinds = {name.split(".")[-2]: weight.dtype for name, weight in encoder.read()[0].named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.int8} == {"q", "k", "v", "o", "wi"}
    assert {name for name, kind in kinds.items() if kind == torch.float32} >= {"shared", "wo", "layer_norm"}
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")], (
        "not a line with every product"
    )


@needs_bitsandbytes
def test_eight_bits_give_what_transformers_own_way_to_them_gives(t5):
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig, T5EncoderModel

    network, _ = tiny_t5()
    for block in network.encoder.block:
        block.layer[0].layer_norm.weight.data *= 4  # inputs on both sides of the threshold
    network.save_pretrained(t5)
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    theirs, (_, tokenizer) = T5EncoderModel.from_pretrained(t5, **options), load_t5(t5)
    text, mask = T5Encoder(str(t5), 10, bits=8).encode(SHAPES)
    for row, prompt in enumerate(SHAPES):
        with torch.no_grad():
            expected = theirs(torch.tensor([tokenizer(prompt).input_ids])).last_hidden_state[0]
        assert torch.equal(text[row][mask[row]], expected)


@needs_bitsandbytes
def test_features_in_eight_bits_do_not_depend_on_company_and_are_freed(t5):
    encoder = T5Encoder(str(t5), 10, bits=8)
    together, _ = encoder.encode([*SHAPES, ""])
    for row, prompt in enumerate([*SHAPES, ""]):
        assert torch.equal(encoder.encode([prompt])[0][0], together[row])
    weights = [weakref.ref(weight) for weight in encoder.read()[0].parameters()]
    gc.disable()
    encoder.free()
    left = sum(weight() is not None for weight in weights)
    gc.enable()
    assert (len(weights), left) == (19, 0)
    assert torch.equal(encoder.encode([*SHAPES, ""])[0], together), "read again"


@needs_bitsandbytes
def test_eight_bits_are_told_beside_the_identity_of_the_weights(t5):
    plain, eight = T5Encoder(str(t5)).fingerprint, T5Encoder(str(t5), bits=8).fingerprint
    assert eight == T5Encoder(str(t5), bits=8).fingerprint == f"{plain}-8bit"
    assert same_weights(plain, eight)
    network, _ = tiny_t5()
    network.encoder.block[0].layer[0].SelfAttention.q.weight.data *= 2  # changes the scales alone
    network.save_pretrained(t5)
    assert not same_weights(T5Encoder(str(t5), bits=8).fingerprint, eight)


@needs_bitsandbytes
def test_weights_that_are_stored_in_eight_bits_are_refused(t5, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig, T5EncoderModel

    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    T5EncoderModel.from_pretrained(t5, **options).save_pretrained(t5)
    with pytest.raises(InputError, match=r"cannot be read \(its weights are stored in fewer bits"):
        T5Encoder(str(t5)).encode(["up"])


@pytest.mark.parametrize("gated", ["relu", "gated-gelu"])
@pytest.mark.parametrize("bits", [None, pytest.param(8, marks=needs_bitsandbytes)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_the_bytes_of_the_weights_are_known_without_them(tmp_path, monkeypatch, kind, bits, gated):
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": 16, "d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 3, "num_heads": 2}
    network = seeded(
        lambda: T5EncoderModel(T5Config(**sizes, feed_forward_proj=gated, is_encoder_decoder=False))
    )
    network.save_pretrained(tmp_path / "text_encoder")
    tiny_t5()[1].save_pretrained(tmp_path / "tokenizer")
    config = TextEncoderConfig(name="t5", path=str(tmp_path), bits=bits, length=10)
    monkeypatch.setattr("latte.text.t5.precision", lambda device: kind)  # as if the CPU were a GPU
    encoder = build_text_encoder(config)
    assert held(encoder) == weights_bytes(config, CPU)
    encoder.encode(["up"])
    assert held(encoder) == weights_bytes(config, CPU), "after a prompt"
    monkeypatch.undo()
    assert weights_bytes(config, CUDA if kind == torch.bfloat16 else CPU) == held(encoder)


def test_the_bytes_of_the_weights_are_those_of_xxl_where_there_is_no_card(t5, monkeypatch):
    assert [weights_bytes(TextEncoderConfig(name=name), CUDA) for name in (None, "builtin")] == [0, 0]
    for path in (None, "owner/name"):
        assert weights_bytes(TextEncoderConfig(name="t5", path=path), CPU) == 4 * 4_762_310_656
        assert weights_bytes(TextEncoderConfig(name="t5", path=path), CUDA) == 2 * 4_762_310_656
    wo, rows = 24 * 4096 * 10240, 24 * (4 * 4096 + 2 * 10240)
    small = 24 * (4 * 4096 * 4096 + 2 * 4096 * 10240)
    assert (
        weights_bytes(TextEncoderConfig(name="t5", bits=8), CUDA)
        == 2 * (4_762_310_656 - small) + small + 4 * rows
    )
    assert 4_762_310_656 - small - wo < 0.15e9, "words, norms"
    (t5 / "config.json").write_text('{"d_model": 12, "num_layers": "many"}')
    with pytest.raises(InputError, match="is not the card of a T5") as error:
        weights_bytes(TextEncoderConfig(name="t5", path=str(t5)), CPU)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="needs transformers"):
        weights_bytes(TextEncoderConfig(name="t5"), CPU)


def test_the_real_tokenizer_splits_words_as_t5_does(tmp_path):
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(shared("weights", "t5_tokenizer"))
    config = T5Config(
        vocab_size=32128, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, is_encoder_decoder=False
    )
    seeded(lambda: T5EncoderModel(config)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer("Studies have shown that owning a dog is good for you").input_ids == [
        6536,
        43,
        2008,
        24,
        293,
        53,
        3,
        9,
        1782,
        19,
        207,
        21,
        25,
        1,
    ]
    encoder = T5Encoder(str(tmp_path))
    text, mask = encoder.encode(["Studies have shown that owning a dog is good for you", "", "ab " * 40])
    assert (text.shape, mask[:2].sum(1).tolist()) == (
        (3, 120, 8),
        [len(tokenizer("studies have shown that owning a dog is good for you").input_ids), 1],
    )
    with pytest.raises(InputError, match=r"has \d+ tokens and text.length is 120"):
        encoder.encode(["word " * 200])
