# SPDX-License-Identifier: Apache-2.0
"""Keys of version 0.1.0 are read under their new names."""

import pytest

from latte.checkpoint import record
from latte.checkpoint.record import read_fingerprint
from latte.config.layers import read_environment, read_words, read_yaml


@pytest.mark.parametrize(
    ("part", "fingerprint"),
    [
        ({"fingerprint": "new"}, "new"),
        ({"identity": "old"}, "old"),
        ({"fingerprint": None, "identity": "old"}, None),
        ({"name": "kl"}, None),
    ],
)
def test_a_fingerprint_is_read_under_either_name(part, fingerprint):
    assert read_fingerprint(part) == fingerprint


def test_a_renamed_config_key_is_read_from_every_layer(tmp_path, monkeypatch):
    monkeypatch.setitem(record.RENAMED_KEYS, "train.rate", "train.lr")
    hints = {"train.lr": float}
    (tmp_path / "old.yaml").write_text("train:\n  rate: 1e-3\n")
    (tmp_path / "both.yaml").write_text("train:\n  rate: 1e-3\n  lr: 2\n")
    layers = [
        read_yaml(tmp_path / "old.yaml", "old.yaml", hints),
        read_environment({"LATTE_TRAIN_RATE": "1e-3"}, hints),
        read_words(["train.rate=1e-3"], hints),
    ]
    for layer in layers:
        assert layer.problems == []
        assert layer.entries["train.lr"].raw == "1e-3"
    assert "train.lr is given again" in read_yaml(tmp_path / "both.yaml", "both.yaml", hints).problems[0]
