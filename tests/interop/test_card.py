# SPDX-License-Identifier: Apache-2.0
"""The model card says what is known, names what is not, and is a card that the hub can read."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

from latte.interop.export import card_text, cell, publish, save_ours, score_of
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig
from latte.tensors import tensors_sha256

SMALL = {"depth": 2, "width": 16, "heads": 2, "num_frames": 4, "latent_size": 4}
SCORE = {
    "protocol": "paper-fvd-16",
    "metric": "fvd",
    "value": 123.456,
    "interval": [120.0, 127.0],
    "manifest_hash": "0123456789ab",
}
FACTS = {
    "diffusion": {"schedule": "linear", "num_steps": 1000},
    "codec": {"name": "builtin", "path": None, "fingerprint": "e42f04ac7221ceed"},
    "classes": ["up", "down"],
    "about": {
        "data": {"kind": "procedural", "frames": 4},
        "licence": "cc-by-4.0",
        "step": 7000,
        "scores": [SCORE],
    },
}


def model(kind: str):
    if kind == "text":
        return LatteText(TextConfig(**SMALL, caption_channels=6))
    return Latte(ModelConfig(**SMALL, num_classes=2 if kind == "class" else None))


@pytest.mark.parametrize(
    ("kind", "message"), [("text", "text to video"), ("class", "2 classes"), ("plain", "unconditional")]
)
def test_a_card_without_facts_names_what_is_not_recorded(kind, message, tmp_path):
    built = model(kind)
    save_ours(built, tmp_path, {})
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, "latte" in card.data.tags, card.data.license) == ("latte", True, None)
    assert f"# {type(built).__name__}, {message}" in card.text
    assert f"{sum(p.numel() for p in built.parameters()):,} parameters" in card.text
    assert "Not recorded: data, licence, step, scores." in card.text
    assert f'{type(built).__name__}.from_pretrained("' in card.text


def test_a_weights_folder_has_all_the_facts_on_its_card_and_in_its_config(tmp_path):
    built = model("class")
    save_ours(built, tmp_path / "w", FACTS)
    card, config = (
        ModelCard.load(tmp_path / "w" / "README.md"),
        json.loads((tmp_path / "w" / "config.json").read_text()),
    )
    assert card.data.license == "cc-by-4.0"
    for line in (
        "| data | kind procedural, frames 4 |",
        "| step | 7000 |",
        "| classes | up, down |",
        "| autoencoder | name builtin, fingerprint e42f04ac7221ceed |",
        f"| weights, sha256 | {config['weights_sha256']} |",
        "| fvd | 123.456 (90 % interval 120 to 127), protocol paper-fvd-16, manifest 0123456789ab |",
    ):
        assert line in card.text
    assert "Not recorded" not in card.text
    assert "from latte import VideoPipeline" in card.text
    assert config["about"] == FACTS["about"]
    assert torch.equal(Latte.from_pretrained(tmp_path / "w").final_linear.weight, built.final_linear.weight)


def test_paths_of_this_machine_stay_here(tmp_path):
    """A hub id is for everybody; a folder is not."""
    facts = {**FACTS, "codec": {"name": "kl", "path": str(tmp_path), "fingerprint": None}}
    facts["text"] = {"name": "t5", "path": "DeepFloyd/t5-v1_1-xxl"}
    save_ours(model("text"), tmp_path / "w", facts)
    card = (tmp_path / "w" / "README.md").read_text()
    config = (tmp_path / "w" / "config.json").read_text()
    assert str(tmp_path) not in card + config
    assert json.loads(config)["text"]["path"] == "DeepFloyd/t5-v1_1-xxl"
    assert json.loads(config)["codec"] == {"name": "kl", "path": None, "fingerprint": None}
    assert "| text encoder | name t5, path DeepFloyd/t5-v1_1-xxl |" in card


@pytest.mark.parametrize(
    ("kind", "tag"), [("text", "text-to-video"), ("class", "class-conditional"), ("plain", "unconditional")]
)
def test_a_card_has_tags_intended_use_limits_and_the_clip(kind, tag, tmp_path):
    save_ours(model(kind), tmp_path / "w", {**FACTS, "clip": b"RIFF"})
    card = ModelCard.load(tmp_path / "w" / "README.md")
    assert {tag, "latte", "arxiv:2401.03048"} <= set(card.data.tags)
    assert card.data.pipeline_tag == ("text-to-video" if kind == "text" else None)
    for words in ("## Intended use", "## Limits", "4 latent frames of 4 x 4", "protocol that is named"):
        assert words in card.text
    assert "![a generated clip](clip.webp)" in card.text
    assert (tmp_path / "w" / "clip.webp").read_bytes() == b"RIFF"
    assert "clip" not in json.loads((tmp_path / "w" / "config.json").read_text())
    save_ours(model(kind), tmp_path / "without", {})
    text = (tmp_path / "without" / "README.md").read_text()
    assert "clip.webp" not in text
    assert "No score is recorded" in text


def test_half_known_facts_and_scores_without_an_interval():
    text = card_text(model("class"), {"about": {"step": 5, "scores": [{**SCORE, "interval": None}]}})
    assert "Not recorded: data, licence." in text
    assert "| fvd | 123.456, protocol paper-fvd-16" in text


def test_a_cell_stays_one_cell_of_plain_text():
    assert cell({"a": [1, 2], "b": None, "c": "x|y\nz"}) == "a 1, 2, c x\\|y z"
    hostile = "<script>alert(1)</script> [link](http://x) ![i](y) `code` *b* _i_ a_b \x1b[2J\u202e"
    found = cell(hostile)
    assert not re.search(r"[<>]|(?<!\\)[\[\]`*]", found)
    assert found.isprintable()
    assert r"a_b" in found
    assert r"\_i\_" in found


def test_class_names_cannot_put_html_or_markdown_on_a_card(tmp_path):
    names = ["<img src=x onerror=alert(1)>", "[click](javascript:alert(1))"]
    facts = {**FACTS, "classes": names, "about": {"data": "<b>\n# Title", "licence": "mit\nlicense: other"}}
    save_ours(model("class"), tmp_path / "w", facts)
    text = (tmp_path / "w" / "README.md").read_text()
    assert "<img" not in text
    assert "[click]" not in text
    assert "\n# Title" not in text
    assert ModelCard.load(tmp_path / "w" / "README.md").data.license == "mit\nlicense: other"
    assert json.loads((tmp_path / "w" / "config.json").read_text())["classes"] == names


def test_score_of_takes_what_a_card_needs():
    assert score_of({**SCORE, "manifest": {}, "values": {}}) == SCORE


def test_publish_pushes_weights_config_with_facts_and_card(monkeypatch):
    pushed, built = {}, model("class")

    class Api:
        def __init__(self, token=None):
            pushed["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            pushed["private"] = private
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message):
            pushed.update(
                {file.name: file.read_bytes() for file in folder_path.iterdir()}, repository=repo_id
            )
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert publish(built, "owner/name", FACTS, private=True) == "https://hub/commit"
    assert (pushed["repository"], pushed["private"]) == ("owner/name", True)
    config = json.loads(pushed["config.json"])
    assert config["weights_sha256"] == tensors_sha256(built.state_dict())
    assert (config["num_classes"], config["about"]["step"], config["codec"]["name"]) == (2, 7000, "builtin")
    assert b"protocol paper-fvd-16" in pushed["README.md"]
    assert len(pushed["model.safetensors"]) > sum(tensor.nbytes for tensor in built.state_dict().values())
