# SPDX-License-Identifier: Apache-2.0
"""Rank, device, dtype and random streams, each resolved once.

Every random draw of the program comes from a ``torch.Generator`` made here from integers and names, never from global state:
a training draw is keyed by (seed, step, ...), a generated sample by its own seed. Generators live on the CPU, so that a seed
means the same numbers on every device.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from latte.checks import InputError, choose

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rank() -> int:
    """Index of this process among all of them (torchrun's RANK), 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes (torchrun's WORLD_SIZE), 1 when alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Index of this process on its machine (torchrun's LOCAL_RANK)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def resolve_device(name: str = "auto") -> torch.device:
    """'auto' | 'cpu' | 'cuda' | 'mps' -> the device of this process; InputError when the machine has none of that kind."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if have[kind])
    if not choose("device", name, have):
        raise InputError(
            f"device is {name!r}, but this machine has none that torch can use; give --device auto or cpu"
        )
    return torch.device(name, local_rank()) if name == "cuda" else torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' | 'fp32' | 'bf16' | 'fp16' -> the dtype of matrix products.

    'auto' is bf16 on a CUDA device that has it and fp32 elsewhere (bf16 is the slower one on most CPUs).
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return choose("dtype", name, DTYPES)


@contextmanager
def borrowed(part: Any, device: torch.device, home: torch.device) -> Iterator[None]:
    """``part`` (what has a ``to``) on ``device`` inside, back at ``home`` afterwards, and its memory on the device given back."""
    part.to(device)
    try:
        yield
    finally:
        part.to(home)
        if device.type == "cuda" and device != home:
            torch.cuda.empty_cache()


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that is a pure function of ``key``: generator(seed, 'noise', step) is the same everywhere, always."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class SampleNoise:
    """One random stream per generated sample, so that a sample does not depend on the batch it is drawn in.

    ``noise(shape)`` draws the next standard normal (b, *shape), float32 on the CPU, row i from the stream of ``seeds[i]``.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [generator(seed, "sample") for seed in seeds]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators])
