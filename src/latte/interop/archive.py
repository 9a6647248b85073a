# SPDX-License-Identifier: Apache-2.0
"""Tensors of external weight files by name, without running any code in them.

Reads TorchScript archives and PyTorch checkpoints (zip, or the format before torch 1.6; pickles.py reads
their pickles), NumPy archives and safetensors. Nothing is unpacked to disk, and every size that a file
states is compared with its own.
"""

import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from latte.checks import InputError
from latte.interop.pickles import Machine, Refused, StorageRef, TensorRef

MAX_PICKLE = 16 * 2**20  # bytes of a zipped pickle: names and shapes only, never tensor data
MAX_ITEMS = 100_000  # containers, values and tensors visited in one file
MAX_DEPTH = 64
MAX_NAME = 1000  # characters
MAX_OVERLAP = 2  # bytes of all tensors per byte of their storages: tied weights need less than 2
SMALL = 2**20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the format before torch 1.6
BROKEN = (  # what the readers below raise on damaged files; anything else is a bug of ours
    Refused,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    safetensors.SafetensorError,
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a weight file by dotted name, in its order; InputError for anything but plain
    tensors.
    """
    with open(path, "rb") as file:
        start = file.read(16)
        file.seek(0)
        try:
            if start[:4] == b"PK\x03\x04":
                tensors = read_zip(file)
            elif start[8:9] == b"{" and path.suffix == ".safetensors":
                tensors = safetensors.torch.load_file(path)
            else:
                tensors = read_legacy(file)
        except BROKEN as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(
                f"{path} was refused, nothing in it was run: {reason}; use an unaltered weight file"
            ) from error
    if not tensors:
        raise InputError(f"{path} holds no tensors; use the weight file itself")
    return tensors


def read_zip(file: BinaryIO) -> dict[str, Tensor]:
    """Read a TorchScript archive, a zipped checkpoint or a NumPy archive."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if len(set(names)) != len(names):
            raise Refused("an archive with two entries of one name")
        roots = [
            name.removesuffix("data.pkl")
            for name in names
            if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if not roots and all(name.endswith(".npy") for name in names):
            return read_npz(file)
        if len(roots) != 1:
            raise Refused("a zip file without its one data.pkl")
        root = roots[0]
        if f"{root}byteorder" in names and entry_bytes(archive, f"{root}byteorder", 16) != b"little":
            raise Refused("numbers in big-endian order")
        with archive.open(stored(archive, f"{root}data.pkl", MAX_PICKLE)) as source:
            tree = Machine().run(source)

        def load(storage: StorageRef) -> bytes:
            return entry_bytes(archive, f"{root}data/{storage.key}", storage.numel * storage.dtype.itemsize)

        return collect(tree, load)


def stored(archive: zipfile.ZipFile, name: str, limit: int) -> zipfile.ZipInfo:
    """Return the entry ``name``, refused if compressed (a few bytes may become gigabytes) or longer than
    ``limit``.
    """
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise Refused(f"{name} is compressed")
    if entry.file_size > limit:
        raise Refused(f"{name} has {entry.file_size} bytes where at most {limit} are expected")
    return entry


def entry_bytes(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Return the bytes of a stored entry, checked against its CRC by zipfile."""
    return archive.read(stored(archive, name, limit))


def read_npz(file: BinaryIO) -> dict[str, Tensor]:
    """Read a NumPy archive of number arrays; NumPy refuses object arrays, which are pickles."""
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        if any(entry.file_size > 200 * max(entry.compress_size, 1) for entry in archive.zip.infolist()):
            raise Refused("an archive that is compressed beyond what weights allow")
        return {name: torch.from_numpy(archive[name]).contiguous() for name in archive.files}


def read_legacy(file: BinaryIO) -> dict[str, Tensor]:
    """Read a checkpoint of torch before 1.6: five pickles, then each storage as its length and its
    numbers.
    """
    if Machine().run(file) != LEGACY_MAGIC:
        raise Refused("neither an archive nor a checkpoint")
    Machine().run(file)
    if Machine().run(file).get("little_endian") is not True:
        raise Refused("numbers in big-endian order")
    tree = Machine().run(file)
    keys = Machine().run(file)
    places: dict[str, int] = {}
    start = file.tell()
    expected = {ref.storage.key: ref.storage for _, ref in walk(tree)}
    for key in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        if key not in expected or numel != expected[key].numel:
            raise Refused(f"storage {key} does not have the length that the tensors state")
        places[key] = file.tell()
        start = file.seek(places[key] + numel * expected[key].dtype.itemsize)
    if start != file.seek(0, 2):
        raise Refused("numbers that end too early or too late")

    def load(storage: StorageRef) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.numel * storage.dtype.itemsize)

    return collect(tree, load)


def walk(tree: Any) -> Iterator[tuple[str, TensorRef]]:
    """Yield the tensors in nested dicts, lists and tuples with their dotted names; plain values are
    skipped.
    """
    stack = [("", tree, 0)]
    visited = 0
    while stack:
        name, node, depth = stack.pop()
        visited += 1
        if visited + len(stack) > MAX_ITEMS or depth > MAX_DEPTH or len(name) > MAX_NAME:
            raise Refused("containers nested without end")
        if isinstance(node, TensorRef):
            yield name, node
        children: list[tuple[Any, Any]] = []
        if isinstance(node, dict):
            children = list(node.items())
        elif isinstance(node, (list, tuple)):
            children = list(enumerate(node))
        prefix = f"{name}." if name else ""
        stack += [(f"{prefix}{key}", child, depth + 1) for key, child in reversed(children)]


def collect(tree: Any, load: Callable[[StorageRef], bytes]) -> dict[str, Tensor]:
    """Copy every tensor of ``tree`` out of its storage, after comparing its shape with it."""
    refs = list(walk(tree))
    refuse_overlap(refs)
    storages: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, ref in refs:
        storage = ref.storage
        if storage.key not in storages:
            data = bytearray(load(storage))
            if len(data) != storage.numel * storage.dtype.itemsize:
                raise Refused(f"storage {storage.key} does not have the length that the tensors state")
            empty = torch.empty(0, dtype=storage.dtype)
            storages[storage.key] = torch.frombuffer(data, dtype=storage.dtype) if data else empty
        stored = storages[storage.key]
        numel = math.prod(ref.size)
        last = ref.offset + sum((n - 1) * step for n, step in zip(ref.size, ref.stride, strict=True))
        if storage.dtype != stored.dtype or numel > storage.numel or (numel and last >= storage.numel):
            raise Refused(f"tensor {name} reaches beyond its storage")
        view = torch.empty(ref.size, dtype=storage.dtype)
        if numel:
            view = stored.as_strided(ref.size, ref.stride, ref.offset)
        tensors[name] = view.clone(memory_format=torch.contiguous_format)
    return tensors


def refuse_overlap(refs: Sequence[tuple[str, TensorRef]]) -> None:
    """Refuse many tensors that are views of the same storages: their copies would be far larger than the
    file.
    """
    storages = {ref.storage.key: ref.storage for _, ref in refs}
    num_stored = sum(storage.numel * storage.dtype.itemsize for storage in storages.values())
    num_bytes = 0
    for name, ref in refs:
        num_bytes += min(math.prod(ref.size), ref.storage.numel) * ref.storage.dtype.itemsize
        if num_bytes > MAX_OVERLAP * num_stored + SMALL:
            raise Refused(
                f"tensor {name} and others are views of the same storage: together they are far larger "
                "than the file"
            )
