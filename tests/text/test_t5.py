# SPDX-License-Identifier: Apache-2.0
"""T5: features equal transformers', no prompt depends on another, broken folders are refused in one line."""

import gc
import json
import logging
import sys
import weakref
from importlib.util import find_spec
from shutil import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import shared

from latte.checks import InputError
from latte.text.encoders import (
    BuiltinEncoder,
    TextEncoderConfig,
    build_text_encoder,
    same_weights,
    weights_bytes,
)
from latte.text.t5 import T5Encoder, has_protobuf, load_t5, load_tokenizer, width_of
from tiny_pipeline import seeded, tiny_t5

PROMPTS = ["a red square moves left", "", "Left, a square moves: RED!"]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install 'latte-video[bits8]')"
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def t5(tmp_path):
    """The folder of a tiny random T5."""
    for part in tiny_t5():
        part.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


SHAPES = ["a red circle moves left", "up", "a red blue circle , a square ."]


def test_features_equal_those_of_a_padded_batch_with_a_mask(t5):
    """The reference encodes all prompts at once, padded and masked."""
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


def test_features_do_not_depend_on_other_prompts_and_the_empty_prompt_has_its_end_token(t5):
    encoder = T5Encoder(str(t5), 10)
    together, mask = encoder.encode([*SHAPES, ""])
    assert mask.sum(1).tolist() == [6, 2, 9, 1]
    for row, prompt in enumerate([*SHAPES, ""]):
        assert torch.equal(encoder.encode([prompt])[0][0], together[row])


def test_a_prompt_that_is_too_long_is_refused_with_its_count(t5):
    with pytest.raises(InputError, match=r"has 9 tokens, but text.length is 8"):
        T5Encoder(str(t5), 8).encode(SHAPES)


def test_count_equals_the_encoded_tokens_and_reads_no_weights(t5):
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
        "the count has no limit"
    )


def test_weights_are_read_with_the_first_prompt_and_freed(t5, monkeypatch):
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


def test_the_fingerprint_covers_weights_structure_and_vocabulary(t5, tmp_path):
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


def test_the_fingerprint_never_changes(t5):
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
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not the configuration of a T5"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is not the configuration of a T5"),
    ],
)
def test_a_damaged_t5_is_refused_in_one_line(t5, change, message):
    change(t5)
    with pytest.raises(InputError, match=message) as error:
        T5Encoder(str(t5)).encode(["up"])
    assert "\n" not in str(error.value)


def test_a_missing_t5_is_refused(tmp_path):
    assert (width_of(None), width_of(str(tmp_path))) == (4096, 4096), "XXL when there is no config.json"
    with pytest.raises(InputError, match=r"text.path is not set, but the text encoder 't5' needs weights"):
        build_text_encoder(TextEncoderConfig(name="t5"))
    with pytest.raises(InputError, match="cannot be read"):
        T5Encoder(str(tmp_path)).encode(["up"])


@pytest.mark.parametrize(
    ("missing", "bits", "message"),
    [("transformers", None, "needs transformers"), ("bitsandbytes", 8, "bits8")],
)
def test_a_missing_library_is_reported_before_weights_are_read(t5, monkeypatch, missing, bits, message):
    (t5 / "model.safetensors").unlink()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=message) as error:
        T5Encoder(str(t5), bits=bits).encode(["up"])
    assert "\n" not in str(error.value)


def test_a_t5_that_lacks_a_weight_is_refused(t5):
    """transformers would fill it with random numbers, different every time."""
    tensors = load_file(t5 / "model.safetensors")
    del tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(tensors, t5 / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError,
        match=r"cannot be read \(its weights lack encoder.block.1.layer.1.DenseReluDense.wo.weight\)",
    ):
        T5Encoder(str(t5)).encode(["up"])


def held(encoder: T5Encoder) -> int:
    """Bytes of all weights in memory; the scales of int8 weights are neither parameters nor buffers."""
    network, _ = encoder.read()
    scales = [
        layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        for layer in network.modules()
        if hasattr(layer, "state")
    ]
    return sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers(), *scales])


@needs_bitsandbytes
def test_int8_features_are_close_to_those_in_float32(t5, caplog):
    """Measured: 0.9 % of the features' norm. Weights and inputs are rounded to 1/127 of a row's largest."""
    exact, mask = T5Encoder(str(t5), 10).encode([*SHAPES, ""])
    encoder = T5Encoder(str(t5), 10, bits=8)
    with caplog.at_level(logging.DEBUG):
        text, same = encoder.encode([*SHAPES, ""])
    assert torch.equal(same, mask)
    assert 1e-3 < (text - exact).norm() / exact.norm() < 0.03
    assert (text[~mask] == 0).all()
    kinds = {name.split(".")[-2]: weight.dtype for name, weight in encoder.read()[0].named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.int8} == {"q", "k", "v", "o", "wi"}
    assert {name for name, kind in kinds.items() if kind == torch.float32} >= {"shared", "wo", "layer_norm"}
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")], (
        "no log line per product"
    )


@needs_bitsandbytes
def test_int8_features_equal_those_of_transformers_own_int8(t5):
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig, T5EncoderModel

    network, _ = tiny_t5()
    for block in network.encoder.block:
        block.layer[0].layer_norm.weight.data *= 4  # inputs on both sides of the threshold
    network.save_pretrained(t5)
    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    reference, (_, tokenizer) = T5EncoderModel.from_pretrained(t5, **options), load_t5(t5)
    text, mask = T5Encoder(str(t5), 10, bits=8).encode(SHAPES)
    for row, prompt in enumerate(SHAPES):
        with torch.no_grad():
            expected = reference(torch.tensor([tokenizer(prompt).input_ids])).last_hidden_state[0]
        assert torch.equal(text[row][mask[row]], expected)


@needs_bitsandbytes
def test_int8_features_do_not_depend_on_other_prompts_and_weights_are_freed(t5):
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
def test_the_fingerprint_of_int8_weights_names_the_bits(t5):
    plain, eight = T5Encoder(str(t5)).fingerprint, T5Encoder(str(t5), bits=8).fingerprint
    assert eight == T5Encoder(str(t5), bits=8).fingerprint == f"{plain}-8bit"
    assert same_weights(plain, eight)
    network, _ = tiny_t5()
    network.encoder.block[0].layer[0].SelfAttention.q.weight.data *= 2  # changes the scales alone
    network.save_pretrained(t5)
    assert not same_weights(T5Encoder(str(t5), bits=8).fingerprint, eight)


@needs_bitsandbytes
def test_weights_stored_in_int8_are_refused(t5, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import BitsAndBytesConfig, T5EncoderModel

    options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    T5EncoderModel.from_pretrained(t5, **options).save_pretrained(t5)
    with pytest.raises(InputError, match=r"cannot be read \(its weights are stored in fewer bits"):
        T5Encoder(str(t5)).encode(["up"])


@pytest.mark.parametrize("gated", ["relu", "gated-gelu"])
@pytest.mark.parametrize("bits", [None, pytest.param(8, marks=needs_bitsandbytes)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_weights_bytes_are_known_without_reading_weights(tmp_path, monkeypatch, kind, bits, gated):
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


def test_weights_bytes_are_those_of_xxl_without_a_config(t5, monkeypatch):
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
    assert 4_762_310_656 - small - wo < 0.15e9, "embeddings, norms"
    (t5 / "config.json").write_text('{"d_model": 12, "num_layers": "many"}')
    with pytest.raises(InputError, match="is not the configuration of a T5") as error:
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
    with pytest.raises(InputError, match=r"has \d+ tokens, but text.length is 120"):
        encoder.encode(["word " * 200])


def spiece_folder(folder):
    """A T5 folder as older releases have it: spiece.model and no tokenizer.json."""
    source = shared("weights", "t5_tokenizer")
    folder.mkdir()
    for name in ("spiece.model", "tokenizer_config.json"):
        copy(source / name, folder / name)
    (folder / "config.json").write_text('{"d_model": 8}')
    return folder


def test_a_spiece_model_without_protobuf_is_refused_with_the_package_to_install(tmp_path, monkeypatch):
    if has_protobuf():  # what transformers raises without it

        def refuse(*args, **options):
            raise ValueError(
                "`tiktoken` is required to read a `tiktoken` file. Install it with `pip install tiktoken`."
            )

        monkeypatch.setattr("transformers.T5Tokenizer.from_pretrained", refuse)
        monkeypatch.setattr("latte.text.t5.has_protobuf", lambda: False)
    with pytest.raises(InputError, match=r"needs protobuf; pip install 'latte-video\[t2v\]'") as error:
        load_tokenizer(spiece_folder(tmp_path / "t5"))
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not has_protobuf(), reason="needs protobuf (pip install 'latte-video[t2v]')")
def test_a_spiece_model_alone_gives_the_same_tokens(tmp_path):
    from transformers import T5Tokenizer

    found = load_tokenizer(spiece_folder(tmp_path / "t5"))
    expected = T5Tokenizer.from_pretrained(shared("weights", "t5_tokenizer"))  # reads its tokenizer.json
    for text in ("studies have shown that owning a dog is good for you", "", "caf\u00e9, 3x  dusk!"):
        assert found(text).input_ids == expected(text).input_ids
