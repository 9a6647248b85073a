# SPDX-License-Identifier: Apache-2.0
"""Weight files, folders, shards and the hub: what is read, and what is incomplete or mixed and therefore
refused.
"""

import collections
import json

import pytest
import torch
from reference.official import released_state
from safetensors.torch import save_file
from support import wake

from latte.checks import InputError
from latte.interop.diffusers import diffusers_config, diffusers_state
from latte.interop.load import load_external
from latte.interop.readers import find_weights, read_tensors
from latte.model.text import LatteText, TextConfig

GOOD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}


def test_the_same_tensors_come_out_of_every_format(tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors", metadata={"licence": "mine"})
    torch.save(GOOD, tmp_path / "x.bin")
    torch.save(GOOD, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    torch.save(
        collections.OrderedDict((k, torch.nn.Parameter(v, v.is_floating_point())) for k, v in GOOD.items()),
        tmp_path / "x.pt",
    )
    torch.save(
        {"a": torch.arange(12.0).reshape(2, 6)[:, ::2] / 2, "b": GOOD["b"]}, tmp_path / "x.pth"
    )  # a view with strides
    for suffix in ("safetensors", "bin", "ckpt", "pt", "pth"):
        tensors, facts = read_tensors(tmp_path / f"x.{suffix}")
        assert tensors.keys() == GOOD.keys()
        assert all(
            torch.equal(tensors[name], GOOD[name]) and tensors[name].dtype == GOOD[name].dtype
            for name in GOOD
        )
        assert facts == ({"licence": "mine"} if suffix == "safetensors" else {})


def shards(folder, count=3):
    """A model in ``count`` shards with its index, as huggingface libraries write it."""
    folder.mkdir(exist_ok=True)
    model = wake(
        LatteText(TextConfig(depth=1, width=32, heads=2, latent_size=8, num_frames=4, caption_channels=12))
    )
    state = diffusers_state(model)
    places = {
        name: f"diffusion_pytorch_model-{index % count + 1:05d}-of-{count:05d}.safetensors"
        for index, name in enumerate(state)
    }
    for file in set(places.values()):
        save_file({name: state[name].contiguous() for name in state if places[name] == file}, folder / file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())},
        "weight_map": places,
    }
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(diffusers_config(model.config)))
    return model, index


def test_shards_make_one_model(tmp_path):
    model, _ = shards(tmp_path)
    loaded = load_external(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "model_index.json").write_text("{}")
    assert load_external(tmp_path).config == model.config


def edit(folder, change):
    file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


FIRST, SECOND = (f"diffusion_pytorch_model-0000{k}-of-00003.safetensors" for k in (1, 2))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SECOND).unlink(), f"lacks 1 of its 3 shards .{SECOND}"),
        (lambda f: (f / SECOND).rename(f / (SECOND + ".incomplete")), "lacks 1 of its 3 shards"),
        (lambda f: (f / SECOND).write_bytes((f / FIRST).read_bytes()), "does not hold the tensors that"),
        (lambda f: save_file({"x": torch.ones(1)}, f / SECOND), "belongs to another model"),
        (
            lambda f: edit(
                f,
                lambda i: i["weight_map"].update({"x": "diffusion_pytorch_model-00004-of-00004.safetensors"}),
            ),
            "several splits",
        ),
        (
            lambda f: edit(
                f, lambda i: [i["weight_map"].pop(n) for n, p in list(i["weight_map"].items()) if p == SECOND]
            ),
            "several splits",
        ),
        (
            lambda f: edit(f, lambda i: i["weight_map"].update({"x": "../../secret.safetensors"})),
            "outside its folder",
        ),
        (lambda f: edit(f, lambda i: i["weight_map"].update({"x": "/etc/passwd"})), "outside its folder"),
        (lambda f: edit(f, lambda i: i.pop("weight_map")), "no weight_map"),
        (lambda f: next(f.glob("*.index.json")).write_text("{"), "JSON"),
        (lambda f: next(f.glob("*.index.json")).write_text("[" * 100_000), "JSON"),
        (lambda f: next(f.glob("*.index.json")).unlink(), "no index of the shards"),
        (lambda f: (f / FIRST).write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(damage, message, tmp_path):
    shards(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        load_external(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("metadata", [{"total_size": 7}, {"total_size": "much"}, {}, None, 3])
def test_a_wrong_total_size_is_a_warning_with_both_numbers(metadata, tmp_path, caplog):
    model, _ = shards(tmp_path)
    edit(tmp_path, lambda index: index.update(metadata=metadata))
    assert load_external(tmp_path).config == model.config
    warned = "metadata.total_size is" in caplog.text
    assert warned == (isinstance(metadata, dict) and "total_size" in metadata)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors", "optimizer.pt"], "model.safetensors"),
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            "diffusion_pytorch_model.safetensors",
        ),
        (["diffusion_pytorch_model.fp16.safetensors", "a.bin"], "diffusion_pytorch_model.fp16.safetensors"),
        (["diffusion_pytorch_model.bin"], "diffusion_pytorch_model.bin"),
        (["ffs.pt"], "ffs.pt"),
        (["transformer/model.safetensors", "vae/model.safetensors"], "transformer/model.safetensors"),
        (["ffs.pt", "sky.pt"], "several weight files .ffs.pt, sky.pt."),
        (["README.md"], "none of .safetensors"),
        (["model.safetensors.incomplete"], "interrupted download"),
        ([".metadata", "__0_0.distcp"], "distributed checkpoint"),
    ],
)
def test_which_file_of_a_folder_counts(files, expected, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    if "." in expected and " " not in expected:
        assert find_weights(tmp_path) == tmp_path / expected
    else:
        with pytest.raises(InputError, match=expected):
            find_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at-all", "HF_HUB_OFFLINE is set and it is not in the cache"),
        ("nowhere/at-all/ffs.pt", "HF_HUB_OFFLINE is set"),
        ("../../etc/passwd.pt", "does not exist; use a run folder"),
        ("a/../b", "does not exist"),
        ("./missing", "does not exist"),
        ("", "does not exist"),
        ("no such file.pt", "does not exist"),
        ("long" * 2000, "cannot be a path"),
        ("zero\0byte", "does not exist|cannot be a path"),
    ],
)
def test_a_missing_source_lists_what_was_looked_for(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message) as error:
        load_external(name)
    assert "\n" not in str(error.value)


def test_a_connection_that_breaks_off_is_one_line(monkeypatch):
    import huggingface_hub

    class ReadTimeout(Exception):
        """As the hub's HTTP client raises it: not an error of the system."""

    def break_off(*words, **rest):
        raise ReadTimeout("the read operation timed out\nand more")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, break_off)
    for source in ("owner/name", "owner/name/ffs.pt"):
        with pytest.raises(InputError, match=r"the hub does not serve them \(the read operation timed out\)"):
            load_external(source)


def test_a_folder_in_the_hubs_cache_is_read_offline(tmp_path, monkeypatch):
    model, _ = shards(tmp_path / "here")
    base, commit = tmp_path / "hub/models--owner--name", "a" * 40
    for part in ("refs", "blobs", f"snapshots/{commit}/transformer"):
        (base / part).mkdir(parents=True)
    (base / "refs/main").write_text(commit)
    for file in (tmp_path / "here").iterdir():
        file.rename(base / "blobs" / file.name)
        (base / "snapshots" / commit / "transformer" / file.name).symlink_to(base / "blobs" / file.name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load_external("owner/name")
    assert loaded.config == model.config
    assert all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in model.state_dict().items())
    (base / "snapshots" / commit / "transformer" / SECOND).unlink()
    (base / "blobs" / SECOND).rename(base / "blobs" / f"{SECOND}.incomplete")
    with pytest.raises(InputError, match="lacks 1 of its 3 shards"):
        load_external("owner/name")


def test_the_hub_is_asked_for_one_model_and_what_it_gives_is_read(tmp_path, monkeypatch):
    import huggingface_hub

    model, _ = shards(tmp_path)
    asked = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **rest: asked.append((name, rest)) or str(tmp_path)
    )
    assert load_external("owner/name").config == model.config
    assert asked[0][0] == "owner/name"
    assert "transformer/*" in asked[0][1]["allow_patterns"]
    torch.save({"ema": released_state()}, tmp_path / "ffs.pt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, **rest: str(tmp_path / file))
    assert load_external("owner/name/ffs.pt", heads=4).layout == "released Latte"
