# SPDX-License-Identifier: Apache-2.0
"""Hostile and broken weight files: nothing in them is run, no size that they state is believed, each is refused in one line.

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
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from latte.checks import InputError
from latte.interop.load import load_external
from latte.interop.readers import read_tensors

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
        (beyond_the_storage, "reaches beyond its numbers"),
        (laughs, "nested without end"),
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


def test_the_changed_size_is_in_the_file(tmp_path):
    beyond_the_storage(tmp_path / "y.pt")
    with zipfile.ZipFile(tmp_path / "y.pt") as archive:
        assert b"K\x40\x85" in archive.read("y/data.pkl")
