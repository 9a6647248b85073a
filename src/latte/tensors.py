# SPDX-License-Identifier: Apache-2.0
"""Named tensors: their hash, and the check for NaN/Inf that every reader and writer of weights makes."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from latte.checks import InputError, RunError


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bits of ``tensors``, independent of order and
    device.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_weights(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raise InputError when weights read from ``source`` are quantized (int8, float8, packed) or hold NaN
    or Inf.
    """
    packed = [name for name, tensor in tensors.items() if is_quantized(tensor)]
    if packed:
        dtype = str(tensors[packed[0]].dtype).removeprefix("torch.")
        raise InputError(
            f"weights {source} are quantized: {len(packed):,} tensors of {dtype}, the first is "
            f"{packed[0]!r}; "
            "use the checkpoint in float16, bfloat16 or float32"
        )
    check_finite(tensors, source)


def is_quantized(tensor: Tensor) -> bool:
    """Does ``tensor`` hold int8, int16, float8 or packed numbers, which mean nothing without their scales?"""
    small = tensor.element_size() == 1 and tensor.dtype != torch.bool
    return small or tensor.dtype in (torch.int16, torch.uint16) or tensor.is_quantized


def find_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor that holds NaN or Inf: its name and how many values; None when all are
    finite.
    """
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = tensor.detach()
        if values.element_size() == 1:
            values = values.float()  # torch has no isfinite for float8
        # NaN and Inf survive a sum, which is many times faster than isfinite; a sum may also overflow
        if torch.isfinite(values.sum()):
            continue
        finite = torch.isfinite(values)
        if not finite.all():
            return f"{name!r} holds {int((~finite).sum()):,} non-finite of {tensor.numel():,} values"
    return None


def check_finite(
    tensors: Mapping[str, Tensor], source: object, error: type[InputError | RunError] = InputError
) -> None:
    """Raise ``error``, naming the tensor, when the weights of ``source`` hold NaN or Inf."""
    found = find_nonfinite(tensors)
    if found:
        raise error(f"weights {source}: tensor {found} (NaN or Inf); use earlier or unaltered weights")


RANDOM = (Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_)


class _Unfilled(TorchFunctionMode):
    """Skips random numbers for tensors without memory: torch computes them through its compiler, whose import
    takes longer than torch's own.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings = kwargs or {}
        if func in RANDOM:
            tensor = args[0] if args else settings["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **settings)


@contextmanager
def without_memory() -> Iterator[None]:
    """Build networks inside without memory, on the meta device, for their names, shapes or weights of a
    file.
    """
    with torch.device("meta"), _Unfilled():
        yield
