# SPDX-License-Identifier: Apache-2.0
"""Rank, device, dtype and random generators, each resolved once.

Every random number comes from a ``torch.Generator`` made here from integers and names, never from global
state: in training it is keyed by (seed, step, ...), in sampling by the sample's own seed. Generators are on
the CPU, so that a seed means the same numbers on every device.
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
    """Return the index of this process (torchrun's RANK), 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes (torchrun's WORLD_SIZE), 1 when alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the index of this process on its machine (torchrun's LOCAL_RANK)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device of this process for 'auto', 'cpu', 'cuda' or 'mps'; a torch.device with an index is
    kept.

    InputError for a kind that this machine does not have.
    """
    name = device.type if isinstance(device, torch.device) else device
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if have[kind])
    if not choose("device", name, have):
        raise InputError(
            f"device is {name!r}, but this machine has none that torch can use; give --device auto or cpu"
        )
    if isinstance(device, torch.device) and device.index is not None:
        return device
    return torch.device(name, local_rank()) if name == "cuda" else torch.device(name)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for 'auto', 'fp32', 'bf16', 'fp16' or one of their torch dtypes.

    'auto' is bf16 on a CUDA device that has it and fp32 elsewhere: on most CPUs bf16 is slower. InputError
    for any other.
    """
    if isinstance(dtype, torch.dtype):
        names = {value: name for name, value in DTYPES.items()}
        dtype = names.get(dtype, str(dtype))
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return choose("dtype", dtype, DTYPES)


@contextmanager
def borrowed(part: Any, device: torch.device, home: torch.device) -> Iterator[None]:
    """Hold ``part`` (anything with a ``to``) on ``device`` inside, back at ``home`` afterwards, and free "
    "its memory on the device."""
    part.to(device)
    try:
        yield
    finally:
        part.to(home)
        if device.type == "cuda" and device != home:
            torch.cuda.empty_cache()


def generator(*key: int | str) -> torch.Generator:
    """Return a CPU generator that is a pure function of ``key``, such as (seed, 'noise', step), on every "
    "machine."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class SampleNoise:
    """One generator per sample, so that a sample does not depend on its batch.

    ``noise(shape)`` returns the next standard normal (b, *shape), float32 on the CPU, row i from the
    generator of ``seeds[i]``.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [generator(seed, "sample") for seed in seeds]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators])
