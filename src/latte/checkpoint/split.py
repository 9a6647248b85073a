# SPDX-License-Identifier: Apache-2.0
"""Groups of tensors in one file, or in one file per process that saved a part of them.

``ema.safetensors`` holds a whole group. ``ema-00002-of-00004.safetensors`` holds the rows (along the first
axis) that the second of four processes had: in the order of the files they are the tensor. A file without
rows of a tensor does not list it. There is no pickle and no index: names, headers and the checkpoint's
manifest say everything.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from latte.checks import InputError
from latte.files import commit_file
from latte.tensors import find_nonfinite

FILE = re.compile(r"(?P<group>.+?)(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?\.safetensors")
DTYPES = {  # names in a safetensors header, in the order in which the library lays tensors out
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def file_name(group: str, number: int = 1, count: int = 1) -> str:
    """Return the name of the file of process ``number`` (1, 2, ...) of ``count`` that save ``group``."""
    if count == 1:
        return f"{group}.safetensors"
    return f"{group}-{number:05d}-of-{count:05d}.safetensors"


def groups_in(names: Collection[str]) -> dict[str, list[str]]:
    """Return group -> its files in order, for the names of a checkpoint's files.

    ValueError naming the file that is missing between those of several processes.
    """
    found: dict[str, dict[str, int]] = {}
    for name in names:
        match = FILE.fullmatch(name)
        if match:
            found.setdefault(match["group"], {})[name] = int(match["count"] or 1)
    for group, files in found.items():
        count = max(files.values())
        expected = [file_name(group, number, count) for number in range(1, count + 1)]
        missing = sorted(set(expected) ^ set(files))
        if missing:
            raise ValueError(f"{missing[0]} does not belong to the {count} parts of {group}, or is missing")
        found[group] = dict.fromkeys(expected, count)
    return {group: list(files) for group, files in found.items()}


@dataclass(frozen=True)
class Rows:
    """A tensor of a checkpoint that is read when it is needed: all of it, or some of its rows."""

    source: str  # checkpoint and group, for errors
    name: str
    shape: torch.Size
    dtype: torch.dtype
    parts: tuple[tuple[Any, int], ...]  # open file, rows in it

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows ``start`` to ``stop`` on the CPU, a tensor without axes as it is; InputError for
        NaN/Inf.
        """
        if not self.shape:
            found = self.parts[0][0].get_tensor(self.name)
        else:
            stop = self.shape[0] if stop is None else stop
            pieces = list(self._pieces(start, stop))
            found = torch.empty((0, *self.shape[1:]), dtype=self.dtype)
            if pieces:
                found = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        bad = find_nonfinite({self.name: found})
        if bad:
            raise InputError(
                f"checkpoint {self.source} tensor {bad} (NaN or Inf), so it cannot be used; use an earlier "
                "checkpoint"
            )
        return found

    def _pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the rows from ``start`` to ``stop``, file by file."""
        first = 0
        for file, rows in self.parts:
            low = max(start - first, 0)
            high = min(stop - first, rows)
            if low < high:
                yield file.get_slice(self.name)[low:high]
            first += rows


def open_group(folder: Path, files: Collection[str]) -> dict[str, Rows]:
    """Return name -> rows of the tensors in ``files`` of ``folder``, of which nothing is read yet.

    ValueError when the parts of a tensor do not fit each other.
    """
    found: dict[str, Rows] = {}
    for name in files:
        source = f"{folder}: {FILE.fullmatch(name)['group']}"  # pyright: ignore[reportOptionalSubscript]
        opened: Any = safe_open(folder / name, framework="pt")
        for key in opened.keys():  # noqa: SIM118
            view = opened.get_slice(key)
            shape = torch.Size(view.get_shape())
            dtype = DTYPES[view.get_dtype()]
            part = (opened, shape[0] if shape else 1)
            before = found.get(key)
            if before is None:
                found[key] = Rows(source, key, shape, dtype, (part,))
                continue
            if not shape or (before.shape[1:], before.dtype) != (shape[1:], dtype):
                raise ValueError(f"{key} of {name} does not continue that of the files before it")
            total = torch.Size((before.shape[0] + shape[0], *shape[1:]))
            found[key] = Rows(source, key, total, dtype, (*before.parts, part))
    return found


def write_whole(rows: Mapping[str, Rows], out: Path) -> None:
    """Commit the file ``out`` with whole tensors, read and written one after the other.

    Its bytes are those that safetensors' save_file writes for the same tensors.
    """
    order = list(DTYPES.values())
    names = sorted(rows, key=lambda name: (order.index(rows[name].dtype), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        begin = end
        end += rows[name].shape.numel() * rows[name].dtype.itemsize
        shape = list(rows[name].shape)
        header[name] = {"dtype": CODES[rows[name].dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = rows[name].read()
                file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)

    commit_file(out, write)
