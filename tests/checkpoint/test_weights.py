# SPDX-License-Identifier: Apache-2.0
"""The door for weights: nothing in a file is run, nothing is believed, nothing is loaded by halves.

Each hostile file is first shown to be armed: an unguarded reader lets it write its marker, or chokes on it.
"""

import argparse
import collections
import io
import json
import os
import pickle
import pickletools
import struct
import sys
import tarfile
import tracemalloc
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.official import released_state
from safetensors.torch import save_file
from support import wake

from latte.checkpoint.layout import Coverage
from latte.checkpoint.reading import find_weights
from latte.checkpoint.weights import load_foreign, read_tensors
from latte.checks import InputError
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig

GOOD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}


class Call:
    """Pickles as a call of ``function`` on unpickling."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


class Stateful:
    def __setstate__(self, state):
        Path(state["marker"]).touch()

    def __getstate__(self):
        return {"marker": Stateful.marker}


def shout(marker):
    return Call(os.system, f"touch '{marker}'")


def tar_of_pickles(payload, path):
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(payload, protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def rezip(path, extra=(), compression=zipfile.ZIP_STORED):
    """Write the archive again with more entries or compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in [*entries, *((entries[0][0].partition("/")[0] + "/" + name, data) for name, data in extra)]:
            archive.writestr(name, data)


def system(path, marker):
    torch.save({**GOOD, "x": shout(marker)}, path)


def evaluation(marker):
    return Call(eval, f"(__import__('pathlib').Path({str(marker)!r}).touch(), dict)[1]")


def evaluated(path, marker):
    torch.save({**GOOD, "x": evaluation(marker)}, path)


def nested(path, marker):
    torch.save({"ema": {**GOOD, "deep": [({"x": [shout(marker)]},)]}}, path)


def inside_a_namespace(path, marker):
    torch.save({"ema": GOOD, "args": argparse.Namespace(model="Latte-XL/2", hook=shout(marker))}, path)


def as_a_default_factory(path, marker):
    torch.save({"ema": GOOD, "d": Call(collections.defaultdict, evaluation(marker))}, path)


def setstate(path, marker):
    Stateful.marker = str(marker)
    torch.save({**GOOD, "x": Stateful()}, path)


def legacy(path, marker):
    torch.save({**GOOD, "x": shout(marker)}, path, _use_new_zipfile_serialization=False)


def legacy_tar(path, marker):
    tar_of_pickles({**GOOD, "x": shout(marker)}, path)


def bare_pickle(path, marker):
    path.write_bytes(pickle.dumps(shout(marker), protocol=0))


def instance_opcode(path, marker):
    path.write_bytes(b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.")


def extra_pickle(path, marker):
    torch.save(GOOD, path)
    rezip(path, [("more.pkl", pickle.dumps(shout(marker)))])


RUNNING = [system, evaluated, nested, inside_a_namespace, as_a_default_factory, setstate, legacy, legacy_tar, bare_pickle, instance_opcode,
           extra_pickle]  # fmt: skip


def unguarded(path):
    """What a careless reader does with such a file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in [name for name in archive.namelist() if name.endswith("more.pkl")]:
                pickle.loads(archive.read(name))
        torch.load(path, weights_only=False)
    elif tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            pickle.load(archive.extractfile("pickle"))
    else:
        try:
            torch.load(path, weights_only=False)
        except (RuntimeError, pickle.UnpicklingError, TypeError):
            pickle.loads(path.read_bytes())


@pytest.mark.parametrize("arm", RUNNING, ids=lambda arm: arm.__name__)
def test_no_file_runs_anything(arm, tmp_path):
    path, marker = tmp_path / "x.pt", tmp_path / "executed"
    arm(path, marker)
    unguarded(path)
    assert marker.exists(), "the file is not armed: the test would be empty"
    marker.unlink()
    for suffix in (".pt", ".pth", ".bin", ".ckpt"):
        file = path.rename(tmp_path / f"x{suffix}")
        path = file
        with pytest.raises(InputError, match="refused, nothing in them was run") as error:
            read_tensors(file)
        assert "\n" not in str(error.value)
        with pytest.raises(InputError):
            load_foreign(file)
    assert not marker.exists()


def array_of_objects(path):
    torch.save({**GOOD, "x": np.array([GOOD], dtype=object)}, path)


def torchscript(path):
    torch.save(GOOD, path)
    rezip(path, [("code/__torch__.py", b"def forward(self): return 1"), ("constants.pkl", pickle.dumps(()))])


def unknown_object(path):
    torch.save({**GOOD, "x": Call(os.path.join, "a", "b")}, path)


def zip_bomb(path):
    torch.save({"a": torch.zeros(20_000_000, dtype=torch.uint8)}, path)
    rezip(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 40_000


def beyond_the_storage(path):
    torch.save({"a": torch.zeros(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data.replace(b"K\x04\x85", b"K\x40\x85") if name.endswith("data.pkl") else data)


def laughs(path):
    """Lists of lists of lists: ten opcodes, a billion items."""
    data = b"\x80\x02}X\x01\x00\x00\x00a]q\x00"
    for level in range(30):
        data += b"]" + b"q" + bytes([level + 1]) + b"(" + b"".join(b"h" + bytes([level]) for _ in range(10)) + b"e"
    torch.save(GOOD, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, data + b"s." if name.endswith("data.pkl") else content)


def cut_short(path):
    torch.save(GOOD, path)
    path.write_bytes(path.read_bytes()[:-200])


def empty(path):
    path.write_bytes(b"")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def no_tensors(path):
    torch.save({"step": 3}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (array_of_objects, "a call of _codecs.encode|numpy"),
        (torchscript, "which no checkpoint has"),
        (unknown_object, "a call of posixpath.join"),
        (zip_bomb, "is compressed"),
        (beyond_the_storage, "reaches beyond|unlike|CRC|refused"),
        (laughs, "nested without end|refused"),
        (cut_short, "refused"),
        (empty, "refused"),
        (pointer, "git lfs pull"),
        (no_tensors, "no tensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_bad_pickles_are_refused_in_one_line_and_little_memory(make, message, tmp_path):
    make(tmp_path / "x.pt")
    tracemalloc.start()
    with pytest.raises(InputError, match=message) as error:
        read_tensors(tmp_path / "x.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value)
    assert peak < 200 * 2**20


def header(path, text, data=b"\0" * 8, size=None):
    text = json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


def entry(start, end, dtype="F32", shape=(1,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ({"a": entry(0, 4)}, 2**40),
        ({"a": entry(0, 8, shape=(2,)), "b": entry(4, 8)}, None),
        ({"a": entry(0, 8, shape=(1,))}, None),
        ({"a": entry(0, 8, shape=(2**40, 2**40))}, None),
        ({"a": entry(0, 4), "b": entry(6, 8, "F16")}, None),
        ({"a": entry(0, 400, shape=(100,))}, None),
        ({"a": {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 8]}}, None),
        ([1, 2], None),
    ],
    ids=["header-2^40", "overlap", "wrong-size", "shape-overflow", "hole", "beyond-the-end", "unknown-dtype", "no-object"],
)
def test_bad_safetensors_are_refused(text, size, tmp_path):
    header(tmp_path / "x.safetensors", text, size=size)
    with pytest.raises(InputError, match="refused") as error:
        read_tensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_the_same_tensors_come_out_of_every_format(tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors", metadata={"licence": "mine"})
    torch.save(GOOD, tmp_path / "x.bin")
    torch.save(GOOD, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    torch.save(collections.OrderedDict((k, torch.nn.Parameter(v, v.is_floating_point())) for k, v in GOOD.items()), tmp_path / "x.pt")
    torch.save({"a": torch.arange(12.0).reshape(2, 6)[:, ::2] / 2, "b": GOOD["b"]}, tmp_path / "x.pth")  # a view with strides
    for suffix in ("safetensors", "bin", "ckpt", "pt", "pth"):
        tensors, facts = read_tensors(tmp_path / f"x.{suffix}")
        assert tensors.keys() == GOOD.keys()
        assert all(torch.equal(tensors[name], GOOD[name]) and tensors[name].dtype == GOOD[name].dtype for name in GOOD)
        assert facts == ({"licence": "mine"} if suffix == "safetensors" else {})


def fake_omegaconf(monkeypatch):
    """Classes that pickle as OmegaConf's do; OmegaConf itself is not installed here."""
    modules = {name: types.ModuleType(name) for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.base", "omegaconf.nodes")}
    classes = {}
    for module, name in (("dictconfig", "DictConfig"), ("base", "ContainerMetadata"), ("nodes", "AnyNode")):
        classes[name] = type(name, (), {"__module__": f"omegaconf.{module}"})
        setattr(modules[f"omegaconf.{module}"], name, classes[name])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def make(kind, **attributes):
        found = classes[kind]()
        vars(found).update(attributes)
        return found

    config = make("DictConfig", _parent=None, _flags_cache=None)
    metadata = make("ContainerMetadata", ref_type=dict, object_type=dict, optional=True, resolver_cache=collections.defaultdict(dict))
    leaf = make("AnyNode", _metadata=make("ContainerMetadata", key="lr"), _parent=config, _val=1e-4)
    vars(config).update(_metadata=metadata, _content={"lr": leaf, "model": make("AnyNode", _metadata=None, _parent=config, _val="XL")})
    return config


def test_training_files_with_settings_objects_are_read_past_them(tmp_path, monkeypatch):
    state = released_state()
    namespace = argparse.Namespace(model="Latte-XL/2", global_seed=3407, where=Path("/data"), betas=(0.9, 0.999))
    for name, args in (("namespace", namespace), ("omegaconf", fake_omegaconf(monkeypatch))):
        torch.save({"model": {}, "ema": state, "opt": {"state": {0: {"step": 3}}}, "args": args}, tmp_path / f"{name}.pt")
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / f"{name}.pt", weights_only=True)  # so torch's own guarded reader is no help
        loaded = load_foreign(tmp_path / f"{name}.pt", heads=4)
        assert torch.equal(loaded.state_dict["final_linear.weight"], state["final_layer.linear.weight"])
    assert load_foreign(tmp_path / "namespace.pt", heads=4).facts == {"args.model": "Latte-XL/2", "args.global_seed": "3407"}


def test_the_pickles_here_are_what_they_seem(tmp_path):
    """The billion laughs are a valid pickle, and the storage's size was really changed."""
    laughs(tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        assert len(list(pickletools.genops(archive.read(name)))) > 300
    beyond_the_storage(tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "y.pt") as archive:
        assert b"K\x40\x85" in archive.read(name.replace("x/", "y/"))


# folders, shards and the hub


def shards(folder, count=3):
    """A model in ``count`` shards with its index, as huggingface libraries write it."""
    folder.mkdir(exist_ok=True)
    model = wake(LatteText(TextConfig(depth=1, width=32, heads=2, latent_size=8, num_frames=4, caption_channels=12)))
    from latte.checkpoint.diffusers import diffusers_config, diffusers_state

    state = diffusers_state(model)
    places = {name: f"diffusion_pytorch_model-{index % count + 1:05d}-of-{count:05d}.safetensors" for index, name in enumerate(state)}
    for file in set(places.values()):
        save_file({name: state[name].contiguous() for name in state if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(diffusers_config(model.config)))
    return model, index


def test_shards_make_one_model(tmp_path):
    model, _ = shards(tmp_path)
    loaded = load_foreign(tmp_path)
    assert loaded.config == model.config
    assert all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "model_index.json").write_text("{}")
    assert load_foreign(tmp_path).config == model.config


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
        (lambda f: (f / SECOND).write_bytes((f / FIRST).read_bytes()), "does not hold what"),
        (lambda f: save_file({"x": torch.ones(1)}, f / SECOND), "of another model"),
        (
            lambda f: edit(f, lambda i: i["weight_map"].update({"x": "diffusion_pytorch_model-00004-of-00004.safetensors"})),
            "several splits",
        ),
        (lambda f: edit(f, lambda i: [i["weight_map"].pop(n) for n, p in list(i["weight_map"].items()) if p == SECOND]), "several splits"),
        (lambda f: edit(f, lambda i: i["metadata"].update(total_size=7)), "mixed from two models"),
        (lambda f: edit(f, lambda i: i["weight_map"].update({"x": "../../secret.safetensors"})), "outside its folder"),
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
        load_foreign(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["model.safetensors", "optimizer.pt"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.safetensors"),
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
        ("../../etc/passwd.pt", "neither a file, a folder nor a hub id"),
        ("a/../b", "neither a file"),
        ("no such file.pt", "neither a file"),
    ],
)
def test_what_is_nowhere_is_said_so(name, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message) as error:
        load_foreign(name)
    assert "\n" not in str(error.value)


def test_the_hub_is_asked_for_one_model_and_what_it_gives_is_read(tmp_path, monkeypatch):
    import huggingface_hub

    model, _ = shards(tmp_path)
    asked = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **rest: asked.append((name, rest)) or str(tmp_path))
    assert load_foreign("owner/name").config == model.config
    assert asked[0][0] == "owner/name"
    assert "transformer/*" in asked[0][1]["allow_patterns"]
    torch.save({"ema": released_state()}, tmp_path / "ffs.pt")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, **rest: str(tmp_path / file))
    assert load_foreign("owner/name/ffs.pt", heads=4).layout == "released Latte"


# our own folders, unknown layouts, the report


@pytest.mark.parametrize("model", [
    lambda: Latte(ModelConfig(depth=2, width=32, heads=4, latent_size=(8, 12), num_frames=4, variant=4, num_classes=3)),
    lambda: LatteText(TextConfig(depth=1, width=32, heads=2, latent_size=(8, 12), caption_channels=12, gated_time=True)),
])  # fmt: skip
def test_our_own_folders_come_in_too(model, tmp_path):
    model = wake(model())
    model.save_pretrained(tmp_path)
    loaded = load_foreign(tmp_path)
    assert (loaded.layout, loaded.config) == (type(model).__name__, model.config)
    assert not loaded.report.missing
    again = loaded.model()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    card = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**card, "width": "wide"}))
    with pytest.raises(InputError, match=r"config\.json: width"):
        load_foreign(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json beside the file"):
        load_foreign(tmp_path)


def test_unknown_networks_are_named_by_their_tensors(tmp_path):
    torch.save({"conv_in.weight": torch.ones(1), "conv_out.weight": torch.ones(1)}, tmp_path / "unet.pt")
    with pytest.raises(InputError, match=r"no model that is known here.*conv_in.weight, conv_out.weight"):
        load_foreign(tmp_path / "unet.pt")
    torch.save({"ema": {"module.x": torch.ones(1), "x": torch.ones(1)}}, tmp_path / "twice.pt")
    with pytest.raises(InputError, match="both called x"):
        load_foreign(tmp_path / "twice.pt")
    with pytest.raises(InputError, match="ends in none of"):
        read_tensors(Path(__file__))


def test_every_load_leaves_its_report(tmp_path, caplog):
    torch.save({"ema": released_state()}, tmp_path / "ffs.pt")
    with caplog.at_level("INFO", logger="latte"):
        loaded = load_foreign(tmp_path / "ffs.pt", heads=4)
    assert "ffs.pt (released Latte): 50 tensors used, 0 missing, 0 unexpected, 0 mismatched, 2 dropped" in caplog.text
    assert str(loaded.report) in caplog.text


def test_the_report_counts_and_refuses():
    report = Coverage(
        "x.pt", "DiT", ["a"], ["blocks.1.q", "blocks.2.q"], ["extra"], {"m": "has the shape (1,) where (2,) belongs"}, {"t": "why"}
    )
    assert str(report).splitlines()[1:] == ["  missing: blocks.1.q", "  missing: blocks.2.q", "  unexpected: extra",
                                            "  mismatched: m has the shape (1,) where (2,) belongs", "  dropped: t why"]  # fmt: skip
    for missing, unexpected in ((["blocks.*"], ["extra"]), (["blocks.*", "m"], []), (["m", "blocks.1.*"], ["*"])):
        with pytest.raises(InputError, match="does not fit"):
            report.refuse(missing, unexpected)
    report.refuse(["blocks.*", "m"], ["ext*"])
