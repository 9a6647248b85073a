# SPDX-License-Identifier: Apache-2.0
"""Hostile and broken weight files: nothing in them is run, no size that they state is believed, each is
refused in one line.

Each hostile file is first shown to be armed: an unguarded reader lets it write its marker.
"""

import argparse
import collections
import io
import json
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.official import released_state
from safetensors.torch import save_file

from latte.checks import InputError
from latte.interop.load import load_external
from latte.interop.readers import read_tensors
from latte.model.latte import Latte, ModelConfig

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
        for name, data in [
            *entries,
            *((entries[0][0].partition("/")[0] + "/" + name, data) for name, data in extra),
        ]:
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


RUNNING = [
    system,
    evaluated,
    nested,
    inside_a_namespace,
    as_a_default_factory,
    setstate,
    legacy,
    legacy_tar,
    bare_pickle,
    instance_opcode,
    extra_pickle,
]


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
            load_external(file)
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
            archive.writestr(
                name, data.replace(b"K\x04\x85", b"K\x40\x85") if name.endswith("data.pkl") else data
            )


def laughs(path):
    """Lists of lists of lists: three hundred references, 10^30 numbers."""
    found = [1]
    for _ in range(30):
        found = [found] * 10
    torch.save({"a": found}, path)
    assert path.stat().st_size < 10_000


def thousands_of_views(path):
    """4000 tensors of 4 MB that share one storage: 16 GB of copies out of a file of 5 MB."""
    shared = torch.zeros(1_000_000)
    torch.save({str(number): shared.view(1000, 1000) for number in range(4000)}, path)
    assert path.stat().st_size < 6 * 2**20


def pickled(path, data):
    """A zipped checkpoint with this data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)


def text_opcode(number):
    return b"X\x05\x00\x00\x00" + f"{number:05d}".encode()


def copies_of_an_ordered_dict(path):
    """A list of 2000 pairs that 25,000 calls of OrderedDict copy: 50 million items out of 200 kB."""
    pairs = b"".join(b"(" + text_opcode(number) + b"K\x01t" for number in range(2000))
    start = b"\x80\x02](ccollections\nOrderedDict\nq\x01](" + pairs + b"eq\x00"
    pickled(path, start + b"h\x01h\x00\x85R" * 25_000 + b"e.")


def copies_of_attributes(path):
    """The same with attributes that are set on 20,000 dicts."""
    items = b"".join(text_opcode(number) + b"K\x01" for number in range(2000))
    pickled(path, b"\x80\x02](}(" + items + b"uq\x00" + b"}h\x00b" * 20_000 + b"e.")


def facts_without_end(path):
    """A dict of 20,000 values that are the same dict of 20,000 values: 400 million plain values."""
    items = b"".join(text_opcode(number) + b"N" for number in range(20_000))
    outer = b"".join(text_opcode(number) + b"h\x00" for number in range(20_000))
    pickled(path, b"\x80\x02}(X\x05\x00\x00\x00first}(" + items + b"uq\x00" + outer + b"u.")


def cut_short(path):
    torch.save(GOOD, path)
    path.write_bytes(path.read_bytes()[:-200])


def empty(path):
    path.write_bytes(b"")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def two_of_a_name(path):
    torch.save(GOOD, path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rezip(path, [("data.pkl", pickle.dumps({}))])


def no_tensors(path):
    torch.save({"step": 3}, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (array_of_objects, "a call of _codecs.encode|numpy"),
        (torchscript, "which no checkpoint has"),
        (unknown_object, "a call of posixpath.join"),
        (zip_bomb, "is compressed"),
        (beyond_the_storage, "reaches beyond its storage"),
        (laughs, "nested without end"),
        (thousands_of_views, "views of the same storage"),
        (copies_of_an_ordered_dict, "copies the same container again and again"),
        (copies_of_attributes, "copies the same container again and again"),
        (facts_without_end, "nested without end"),
        (cut_short, "refused"),
        (empty, "refused"),
        (pointer, "git lfs pull"),
        (two_of_a_name, "two entries of one name"),
        (no_tensors, "no tensors"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_bad_pickles_are_refused_in_one_line_and_little_memory(make, message, tmp_path):
    make(tmp_path / "x.pt")
    started = time.process_time()
    with pytest.raises(InputError, match=message) as error:
        read_tensors(tmp_path / "x.pt")
    assert time.process_time() - started < 10
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
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
    ids=[
        "header-2^40",
        "overlap",
        "wrong-size",
        "shape-overflow",
        "hole",
        "beyond-the-end",
        "unknown-dtype",
        "no-object",
    ],
)
def test_bad_safetensors_are_refused(text, size, tmp_path):
    header(tmp_path / "x.safetensors", text, size=size)
    with pytest.raises(InputError, match="refused") as error:
        read_tensors(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("count", "message"), [(20_000, r"20,000 tensors, but no model here"), (200_000, "a header of")]
)
def test_a_file_of_more_tensors_than_any_model_is_refused_at_once(count, message, tmp_path):
    entries = {
        f"blocks.{number}.attn.qkv.weight": entry(4 * number, 4 * number + 4) for number in range(count)
    }
    header(tmp_path / "x.safetensors", entries, b"\0" * 4 * count)
    started = time.process_time()
    with pytest.raises(InputError, match=message) as error:
        load_external(tmp_path / "x.safetensors")
    assert time.process_time() - started < 5
    assert "\n" not in str(error.value)


def test_an_index_of_more_tensors_than_any_model_is_refused_at_once(tmp_path):
    places = {f"blocks.{number}": "model-00001-of-00001.safetensors" for number in range(20_000)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (tmp_path / "model-00001-of-00001.safetensors").touch()
    with pytest.raises(InputError, match="lists 20,000 tensors"):
        load_external(tmp_path)


@pytest.mark.parametrize(
    ("depth", "message"), [(10_000_000, "depth"), (200, "has depth 200, but the weights are only")]
)
def test_a_depth_beyond_the_files_tensors_is_refused_at_once(depth, message, tmp_path):
    model = Latte(ModelConfig(depth=2, width=16, heads=2, num_frames=4, latent_size=4))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "depth": depth}))
    started = time.process_time()
    with pytest.raises(InputError, match=message):
        load_external(tmp_path)
    assert time.process_time() - started < 5


QUANTIZED = [torch.int8, torch.uint8, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", QUANTIZED, ids=str)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_quantized_weights_under_the_right_names_are_one_refusal(dtype, suffix, tmp_path):
    state = {"final_layer.linear.bias": torch.ones(3), "blocks.0.attn.qkv.weight": torch.ones(4, 4).to(dtype)}
    if suffix == "safetensors":
        save_file(state, tmp_path / "x.safetensors")
        message = (
            f"are quantized: 1 tensors of {str(dtype)[6:]}, the first is 'blocks.0.attn.qkv.weight'; use the"
        )
    else:
        torch.save(state, tmp_path / "x.pt")
        message = "are quantized|a storage of|a call of torch._utils._rebuild"  # float8
    with pytest.raises(InputError, match=message) as error:
        load_external(tmp_path / f"x.{suffix}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("wrapper", ["safetensors", "pt", "ema", "shard"])
def test_nonfinite_weights_are_refused_by_tensor(value, wrapper, tmp_path):
    state = released_state()
    state["blocks.1.mlp.fc1.weight"][1] = value
    if wrapper == "safetensors":
        save_file(state, tmp_path / "x.safetensors")
    elif wrapper == "shard":
        file = "model-00001-of-00001.safetensors"
        save_file(state, tmp_path / file)
        index = {"weight_map": dict.fromkeys(state, file)}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        torch.save(
            {"ema": state, "model": released_state()} if wrapper == "ema" else state, tmp_path / "x.pt"
        )
    count = state["blocks.1.mlp.fc1.weight"].shape[1]
    with pytest.raises(
        InputError, match=rf"blocks\.1\.mlp\.fc1\.weight' holds {count} non-finite of"
    ) as error:
        load_external(tmp_path if wrapper == "shard" else next(tmp_path.iterdir()), heads=4)
    assert "\n" not in str(error.value)


def test_the_changed_size_is_in_the_file(tmp_path):
    beyond_the_storage(tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "y.pt") as archive:
        assert b"K\x40\x85" in archive.read("y/data.pkl")
