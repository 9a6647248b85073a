# SPDX-License-Identifier: Apache-2.0
"""The table: an encoder is one class and one entry, and configuration, memory plan and caption features
follow it.
"""

import pytest
import torch

from latte.checks import InputError
from latte.data.captions import encode_captions
from latte.profile.sampling_memory import reading
from latte.text import encoders
from latte.text.encoders import (
    TEXT_ENCODERS,
    BuiltinEncoder,
    TextEncoderConfig,
    build_text_encoder,
    weights_bytes,
)

CPU = torch.device("cpu")


def test_encoders_are_built_by_name_with_their_default_length():
    found = build_text_encoder(TextEncoderConfig(name="builtin", length=7))
    channels = TextEncoderConfig(name="builtin").channels
    assert (found.name, found.length, found.channels) == ("builtin", 7, channels)
    assert build_text_encoder(TextEncoderConfig(name="builtin")).length == 16


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "builtn"}, "did you mean 'builtin'"),
        ({"name": "builtin", "length": 0}, "text.length must be at least 1, got 0"),
        ({"name": "builtin", "dropout": 1.0}, r"text.dropout must be in \[0, 1\), got 1.0"),
        ({"length": 8}, "text.length is 8, but there is no text encoder"),
        ({"path": "here"}, "text.path is 'here'"),
        ({"gated_time": True}, "text.gated_time is True"),
        ({"table_size": 8}, "text.table_size is 8"),
        ({"pooled_caption": True}, "text.pooled_caption is True"),
        (
            {"name": "builtin", "path": "here"},
            "text.path is 'here', but the text encoder 'builtin' does not read it",
        ),
        ({"name": "builtin", "bits": 8}, "text.bits is 8, but the text encoder 'builtin'"),
        ({"name": "t5", "bits": 4}, "text.bits must be 8 for the text encoder 't5', or null, got 4"),
    ],
)
def test_keys_that_make_no_sense_are_refused(keys, message):
    with pytest.raises(InputError, match=message):
        TextEncoderConfig(**keys)


def test_without_an_encoder_there_are_no_channels_and_no_bytes():
    with pytest.raises(InputError, match=r"text.name is not set"):
        _ = TextEncoderConfig().channels
    with pytest.raises(InputError, match=r"text.name is not set"):
        build_text_encoder(TextEncoderConfig())
    assert weights_bytes(TextEncoderConfig(), CPU) == 0


class Table(BuiltinEncoder):
    """A second encoder with weights: a linear layer over the builtin features, held in float32 or in 4
    bits.
    """

    name, default_length, has_weights, bits_allowed = "table", 9, True, (4,)

    def __init__(self, path, length, bits):
        super().__init__(length)
        self.path, self.bits, self.channels = path, bits, self.channels_of(path)

    @classmethod
    def load(cls, path, length, device, bits):
        return cls(path, length, bits)

    @classmethod
    def channels_of(cls, path):
        return 64 if path is None else int(path.removeprefix("width"))

    @classmethod
    def weights_bytes(cls, path, device, bits):
        return 64 * cls.channels_of(path) * (4 if bits is None else 1)

    @classmethod
    def meta_forward(cls, path, num_tokens, device):
        layer = torch.nn.Linear(64, cls.channels_of(path), device="meta")
        tokens = torch.zeros(num_tokens, 64, device="meta")
        return lambda: layer(tokens)


def test_a_second_encoder_with_weights_is_one_entry(monkeypatch):
    monkeypatch.setitem(TEXT_ENCODERS, "table", Table)
    config = TextEncoderConfig(name="table", path="width32", bits=4)
    assert (config.channels, config.tokens) == (32, 9)
    with pytest.raises(InputError, match=r"text.bits must be 4 .* got 8"):
        TextEncoderConfig(name="table", path="width32", bits=8)
    with pytest.raises(InputError, match=r"text.path is not set, but the text encoder 'table' needs weights"):
        build_text_encoder(TextEncoderConfig(name="table"))
    assert weights_bytes(config, CPU) == 64 * 32
    stage = reading(config, CPU)
    assert stage.weights == 64 * 32
    assert stage.working >= 9 * 32 * 4
    encoder = build_text_encoder(config)
    assert isinstance(encoder, Table)
    assert encode_captions(encoder, ["up"]).length == 9
    with pytest.raises(InputError, match=r"did you mean 'table'"):
        TextEncoderConfig(name="tabel")


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_every_entry_states_what_the_protocol_asks(name):
    entry = TEXT_ENCODERS[name]
    assert entry.name == name
    assert entry.default_length >= 1
    assert entry.channels_of(None) >= 1
    assert bool(entry.bits_allowed) <= entry.has_weights
    missing = [key for key in dir(encoders.TextEncoder) if key[0] != "_" and not hasattr(entry, key)]
    assert missing == []
