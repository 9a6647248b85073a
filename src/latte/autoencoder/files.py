# SPDX-License-Identifier: Apache-2.0
"""Weight files of autoencoders into their networks, strictly: every tensor, of its shape, finite."""

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latte.checks import InputError
from latte.tensors import find_nonfinite

Network = TypeVar("Network", bound=nn.Module)


def located(path: str | Path) -> str:
    """Return ``path`` for an error message; a relative one with the absolute path that was looked at."""
    path = Path(path)
    if path.is_absolute():
        return str(path)
    return f"{path} ({path.absolute()})"


def read_tensors(path: str | Path, field: str) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or .pth file by name, as stored.

    A .pth is read with ``weights_only=True``: it can hold nothing but tensors. InputError, naming ``field``,
    for a missing or broken file.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{field}: the weight file {located(path)} does not exist; give its absolute path, or start "
            "latte where the relative one is valid"
        )
    try:
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken archive raises almost anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{field}: {path} is truncated or holds something other than weights ({reason}); fetch it again"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise InputError(f"{field}: {path} holds something other than named tensors; give the weights alone")
    return stored


def load_network(network: Network, path: str | Path, field: str) -> Network:
    """Return ``network`` filled from the file at ``path``."""
    return fill_network(network, read_tensors(path, field), path, field)


def fill_network(network: Network, stored: dict[str, Tensor], path: str | Path, field: str) -> Network:
    """Return ``network`` filled with ``stored``: every tensor, no other, each of its shape and finite.

    InputError with the first fault in ``path`` otherwise.
    """
    expected = network.state_dict()
    faults = [f"lacks {name}" for name in sorted(expected.keys() - stored.keys())]
    faults += [f"has the unknown tensor {name}" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        shape = tuple(stored[name].shape)
        if expected[name].shape != shape:
            faults.append(f"has {name} of shape {shape} instead of {tuple(expected[name].shape)}")
        elif expected[name].is_floating_point() and not is_plain_float(stored[name]):
            faults.append(f"has {name} quantized as {stored[name].dtype}")
    if faults:
        raise InputError(
            f"{field}: {path} {faults[0]} ({len(faults)} faults in all); it belongs to another autoencoder, "
            "use this codec's weights"
        )
    nonfinite = find_nonfinite(stored)
    if nonfinite:
        raise InputError(
            f"{field}: {path}: tensor {nonfinite} (NaN or Inf); fetch it again, or use earlier weights"
        )
    network.load_state_dict(stored)
    return network


def is_plain_float(tensor: Tensor) -> bool:
    """Return whether a tensor is a float of 16 bits or more: int8 and float8 would need scales."""
    return tensor.is_floating_point() and tensor.element_size() >= 2
