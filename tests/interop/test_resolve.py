# SPDX-License-Identifier: Apache-2.0
"""One answer to what a path or id of a model is, and one error that lists what was looked for."""

import json

import pytest
import torch
from reference.official import released_state

from latte.checks import InputError
from latte.interop.export import save_ours
from latte.interop.load import KINDS, resolve
from latte.interop.readers import BUILTIN
from latte.model.latte import Latte, ModelConfig

SMALL = {"depth": 2, "width": 16, "heads": 2, "num_frames": 4, "latent_size": 4}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with one source of every kind, and three unknown ones."""
    root = tmp_path_factory.mktemp("places")
    (root / "run/checkpoints/step-12").mkdir(parents=True)
    (root / "run/config.yaml").write_text("version: 1\n")
    (root / "checkpoints").mkdir()
    model = Latte(ModelConfig(**SMALL))
    save_ours(model, root / "ours", {"codec": {"name": "kl", "path": None}, "diffusion": {}})
    model.save_pretrained(root / "bare")
    torch.save(released_state(), root / "checkpoints/ffs.pt")
    (root / "pipe").mkdir()
    (root / "pipe/model_index.json").write_text("{}")
    (root / "empty").mkdir()
    (root / "videos").mkdir()
    (root / "videos/a.mp4").touch()
    return root


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("run", "run", "run"),
        ("run/checkpoints/step-12", "checkpoint", "run/checkpoints/step-12"),
        ("ours", "weights", "ours"),
        ("ours/model.safetensors", "weights", "ours"),
        ("bare", "external", "bare"),
        ("checkpoints/ffs.pt", "external", "checkpoints/ffs.pt"),
        ("checkpoints", "external", "checkpoints"),
        ("pipe", "pipeline", "pipe"),
    ],
)
def test_a_local_source_has_one_kind(name, kind, path, places):
    found = resolve(places / name)
    assert (found.kind, found.path, found.origin) == (kind, places / path, "local")
    assert found.run == (places / "run" if name.startswith("run") else None)
    assert found.step == (12 if kind == "checkpoint" else None)


@pytest.mark.parametrize("name", BUILTIN)
def test_a_model_of_the_package_is_a_weights_folder(monkeypatch, tmp_path, name):
    found = resolve(name)
    assert (found.kind, found.origin, (found.path / "config.json").is_file()) == ("weights", "builtin", True)
    monkeypatch.setitem(BUILTIN, name, tmp_path)
    with pytest.raises(InputError, match=f"{name}.*install latte again"):
        resolve(name)


def test_layouts_follow_from_the_tensors(places):
    assert resolve(places / "checkpoints/ffs.pt").layout() == "released Latte"
    assert resolve(places / "bare").layout() == "Latte"
    with pytest.raises(InputError, match=r"a run folder .*not an external checkpoint"):
        resolve(places / "run").layout()


@pytest.mark.parametrize("name", ["empty", "videos", "videos/a.mp4", "nowhere", "a b", "", "x" * 300])
def test_an_unknown_source_lists_everything_that_was_looked_for(name, places):
    with pytest.raises(InputError) as error:
        resolve(places / name if name else name, "train.init")
    message = str(error.value)
    assert message.startswith("train.init is ")
    assert "\n" not in message
    if len(name) < 300:
        assert all(text in message for text in KINDS.values())


def test_a_misspelt_path_proposes_the_nearest(places):
    with pytest.raises(InputError, match="did you mean 'ours'"):
        resolve(places / "ourss")


def test_a_hub_id_is_fetched_only_on_request_and_a_local_folder_wins(places, monkeypatch):
    asked = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **rest: asked.append(name) or str(places / "ours")
    )
    found = resolve("owner/name", download=False)
    assert (found.kind, found.origin, asked) == ("hub", "hub", [])
    found = resolve("owner/name")
    assert (found.kind, found.origin, found.path, asked) == (
        "weights",
        "hub",
        places / "ours",
        ["owner/name"],
    )
    monkeypatch.chdir(places)
    assert resolve("run/checkpoints/step-12").kind == "checkpoint"
    assert resolve("checkpoints/ffs.pt").origin == "local"
    assert asked == ["owner/name"]


def test_a_damaged_config_is_left_to_the_reader_of_the_folder(places, tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").touch()
    assert resolve(tmp_path).kind == "weights"
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "LatteTransformer3DModel"}))
    assert resolve(tmp_path).kind == "external"
