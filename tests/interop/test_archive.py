# SPDX-License-Identifier: Apache-2.0
"""Weight files are read without being run: honest ones give their tensors back, hostile ones are refused
and leave no mark.
"""

import argparse
import io
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import noise
from torch import nn

from latte.checks import InputError
from latte.evaluation.detector_files import FILES
from latte.interop.archive import read_tensors
from latte.interop.pickles import ACTIONS, REDUCIBLE, Machine, Refused


class Small(nn.Module):
    """A module with nesting, a norm, a buffer, a half-precision parameter and a transposed one."""

    def __init__(self):
        super().__init__()
        self.branch_1 = nn.Sequential(nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2))
        self.register_buffer("mean", torch.rand(3))
        self.narrow = nn.Parameter(torch.rand(2, 3).half())
        self.turned = nn.Parameter(torch.rand(4, 5).t())

    def forward(self, x):
        return self.branch_1(x).sum() + self.mean.sum() + self.narrow.float().sum() + self.turned.sum()


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(autouse=True)
def nothing_is_run(monkeypatch):
    """Every function that could run code of a file raises while these tests read files."""

    def refuse(*_, **__):
        raise AssertionError("a weight file was about to be run")

    for owner, name in (
        (torch.jit, "load"),
        (torch, "load"),
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(owner, name, refuse)


def save(kind, module, path):
    """Write ``module`` the way ``kind`` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; only the fixtures use it
        if kind == "scripted":
            torch.jit.script(module).save(path)
        elif kind == "traced":
            torch.jit.trace(module, torch.rand(1, 1, 2, 2, 2)).save(path)
        elif kind == "safetensors":
            safetensors.torch.save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
        elif kind == "npz":
            np.savez(path, **{k: v.numpy() for k, v in module.state_dict().items()})
        else:
            torch.save(module.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")


SUFFIX = {"safetensors": "safetensors", "npz": "npz"}


@pytest.mark.parametrize("kind", ["scripted", "traced", "zip", "legacy", "safetensors", "npz"])
def test_tensors_come_back_bit_for_bit(kind, module, tmp_path):
    path = tmp_path / f"weights.{SUFFIX.get(kind, 'pt')}"
    save(kind, module, path)
    found, expected = read_tensors(path), module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_nested_checkpoints_have_dotted_names(tmp_path):
    value = noise(3, 2)
    torch.save(
        {"state_dict": OrderedDict(a=value, b=[value[0], {"c": value.t()}]), "epoch": 3, "note": None},
        tmp_path / "x.pt",
    )
    found = read_tensors(tmp_path / "x.pt")
    assert list(found) == ["state_dict.a", "state_dict.b.0", "state_dict.b.1.c"]
    assert torch.equal(found["state_dict.b.1.c"], value.t())


# Hostile files. Each payload is shown to be dangerous first: Python's own reader runs it.


class Payload:
    """Pickles to a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def zipped(entries, path, compression=zipfile.ZIP_STORED):
    """A zip with these entries under ``archive/``."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)


def text(value):
    """The opcode that pushes a short string."""
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


def integer(value):
    """The opcode that pushes an eight-byte integer."""
    return b"\x8a\x08" + struct.pack("<q", value)


def row(numbers):
    """The opcodes that push a tuple of integers."""
    return b"(" + b"".join(integer(n) for n in numbers) + b"t"


def payloads(marker):
    """Name -> pickle that makes ``marker`` exist when it is run."""
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "a call of os.system": pickle.dumps(Payload(os.system, f"touch '{marker}'"), 2),
        "a call of eval inside a list in a dict": pickle.dumps({"layer": [1, Payload(eval, touch)]}, 2),
        "a call of exec beside good tensors' names": pickle.dumps(
            OrderedDict(weight=Payload(exec, touch)), 2
        ),
        "a name from the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93"
        + pickle.dumps(f"touch '{marker}'", 0)[:-1].replace(b"p0\n", b"")
        + b"\x85R.",
        "an old-style instance": b"(S'touch \"" + str(marker).encode() + b"\"'\nios\nsystem\n.",
        "an object and its attributes": pickle.dumps(Payload(Path.touch, marker), 4),
    }


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("kind", list(payloads("")))
def test_hostile_pickles_are_refused_and_leave_no_mark(kind, container, tmp_path, monkeypatch):
    marker, path = tmp_path / "ran", tmp_path / "weights.pt"
    payload = payloads(marker)[kind]
    if container == "zip":
        zipped({"data.pkl": payload, "version": b"3\n"}, path)
    else:
        path.write_bytes(payload)
    with pytest.raises(InputError, match="refused, nothing in it was run"):
        read_tensors(path)
    assert not marker.exists()
    monkeypatch.undo()
    pickle.loads(payload)  # the positive control: this file is no blank
    assert marker.exists()


@pytest.mark.parametrize(
    ("value", "expected_value"),
    [
        (argparse.Namespace(lr=1), "an object of argparse.Namespace"),
        (Payload(os.getcwd), f"a call of {os.getcwd.__module__}.getcwd"),
        (np.float64(1), "a call of numpy"),
    ],
)
def test_what_a_file_asks_for_is_named(value, expected_value, tmp_path):
    torch.save({"weight": noise(2), "arguments": value}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=expected_value):
        read_tensors(tmp_path / "x.pt")


def tensor_pickle(numel, offset, size, stride, calls=1):
    """A checkpoint's pickle with one tensor of these measures (storage '0', float32)."""
    out = io.BytesIO()
    out.write(b"\x80\x02}(X\x06\x00\x00\x00weight")
    out.write(b"ctorch._utils\n_rebuild_tensor_v2\n(")
    out.write(b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu")
    out.write(
        integer(numel) + b"tQ" + integer(offset) + row(size) + row(stride) + b"\x89}t" + b"R" * calls + b"u."
    )
    return out.getvalue()


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride", "reason"),
    [
        (4, 0, (8,), (1,), "beyond its storage"),
        (4, 2, (3,), (1,), "beyond its storage"),
        (4, 0, (2, 2), (3, 1), "beyond its storage"),
        (4, 0, (2**40,), (0,), "beyond its storage"),
        (4, -1, (2,), (1,), "not a plain view"),
        (4, 0, (2,), (-1,), "not a plain view"),
        (4, 0, (2, 2), (1,), "not a plain view"),
        (2**40, 0, (2,), (1,), "not have the length that the tensors state"),
        (3, 0, (2,), (1,), "expected"),
    ],
)
def test_tensors_that_reach_outside_are_refused(numel, offset, size, stride, reason, tmp_path):
    numbers = np.arange(4, dtype=np.float32).tobytes()
    zipped({"data.pkl": tensor_pickle(4, 0, (2, 2), (2, 1)), "data/0": numbers}, tmp_path / "good.pt")
    assert read_tensors(tmp_path / "good.pt")["weight"].tolist() == [[0, 1], [2, 3]]
    zipped({"data.pkl": tensor_pickle(numel, offset, size, stride), "data/0": numbers}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match=reason):
        read_tensors(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("entries", "compression", "reason"),
    [
        (
            {"data.pkl": tensor_pickle(4, 0, (4,), (1,)), "data/0": bytes(16)},
            zipfile.ZIP_DEFLATED,
            "compressed",
        ),
        ({"data.pkl": b"\x80\x02]q\x00(h\x00h\x00e."}, zipfile.ZIP_STORED, "without end"),
        ({"data.pkl": b"\x80\x02" + b"]" * 50 + b"."}, zipfile.ZIP_STORED, "no tensors"),
        ({"data.pkl": tensor_pickle(4, 0, (4,), (1,))}, zipfile.ZIP_STORED, "data/0"),
        (
            {"data.pkl": tensor_pickle(4, 0, (4,), (1,)), "data/0": bytes(16), "byteorder": b"big"},
            zipfile.ZIP_STORED,
            "big-endian",
        ),
        ({"other": b""}, zipfile.ZIP_STORED, "data.pkl"),
        ({"data.pkl": b"\x80\x02)R."}, zipfile.ZIP_STORED, "refused"),
        ({"data.pkl": b"\x80\x02h\x07."}, zipfile.ZIP_STORED, "refused"),
        ({"data.pkl": b"\x80\x02}(]K\x01u."}, zipfile.ZIP_STORED, "plain dict"),
        ({"data.pkl": b"\x80\x02](K\x01K\x02e(K\x03e."}, zipfile.ZIP_STORED, "no tensors"),
        ({"data.pkl": b"\x80\x02K\x01K\x02a."}, zipfile.ZIP_STORED, "plain list"),
        ({"data.pkl": b"\x80\x02]}b."}, zipfile.ZIP_STORED, "not a module"),
        ({"data.pkl": b"\x80\x02" + b"N" * 200_001 + b"."}, zipfile.ZIP_STORED, "more than 200000 opcodes"),
        ({"data.pkl": b""}, zipfile.ZIP_STORED, "refused"),
        (
            {"data.pkl": tensor_pickle(4, 0, (4,), (1,), calls=2), "data/0": bytes(16)},
            zipfile.ZIP_STORED,
            "refused",
        ),
    ],
)
def test_misshapen_archives_are_refused(entries, compression, reason, tmp_path):
    zipped(entries, tmp_path / "bad.pt", compression)
    with pytest.raises(InputError, match=reason):
        read_tensors(tmp_path / "bad.pt")


def test_two_entries_of_one_name_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
            for _ in range(2):
                archive.writestr("archive/data.pkl", tensor_pickle(4, 0, (4,), (1,)))
    with pytest.raises(InputError, match="two entries"):
        read_tensors(tmp_path / "twice.pt")


def test_object_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "objects.npz", weight=np.array([{}, 1], dtype=object))
    with pytest.raises(InputError, match="refused"):
        read_tensors(tmp_path / "objects.npz")


def message_of(path):
    """What reading ``path`` is refused with, or None."""
    try:
        read_tensors(path)
    except InputError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["scripted", "legacy", "safetensors", "npz"])
def test_damaged_files_never_escape_as_another_error(kind, module, tmp_path):
    path = tmp_path / f"weights.{SUFFIX.get(kind, 'pt')}"
    save(kind, module, path)
    data, draw, messages = path.read_bytes(), np.random.RandomState(0), []
    for i in range(60):
        broken = bytearray(data)
        for place in draw.randint(0, len(data), 3):
            broken[place] ^= 1 << draw.randint(8)
        path.write_bytes(broken[: draw.randint(len(data))] if i % 2 else broken)
        messages += [message_of(path)]
    refused = [message for message in messages if message]
    assert len(refused) >= 30  # every cut file at least
    assert not any("\n" in message for message in refused)


def test_the_machine_knows_no_opcode_that_calls():
    known = {opcode.name for opcode in pickletools.opcodes}
    assert set(ACTIONS) < known
    assert not {"INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"} & set(ACTIONS)
    assert len(REDUCIBLE) == 5
    with pytest.raises(Refused, match="opcode EXT1"):
        Machine().run(io.BytesIO(b"\x80\x02\x82\x01."))


def test_the_table_has_the_published_hashes():
    assert len(FILES) == len({file.name for file in FILES})
    hashes = [file.sha256 for file in FILES if file.sha256]
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in hashes)
    assert len(set(hashes)) == len(hashes) == 5
