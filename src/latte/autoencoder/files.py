# SPDX-License-Identifier: Apache-2.0
"""Weight files of the small autoencoders into their networks, strictly, each fault in one line."""

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latte.checks import InputError

Network = TypeVar("Network", bound=nn.Module)


def read_tensors(path: str | Path, field: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pth file by name, as stored; InputError naming ``field`` when it is missing or broken.

    A .pth is read with ``weights_only=True``: it can hold nothing but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{field} needs the file {path}, which does not exist; give the place where the weights are"
        )
    try:
        stored = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a broken archive raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{field}: {path} is truncated or holds something other than weights ({reason}); fetch it again"
        ) from error
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise InputError(f"{field}: {path} holds something other than named tensors; give the weights alone")
    return stored


def load_network(network: Network, path: str | Path, field: str) -> Network:
    """``network`` filled from the file at ``path``."""
    return fill_network(network, read_tensors(path, field), path, field)


def fill_network(network: Network, stored: dict[str, Tensor], path: str | Path, field: str) -> Network:
    """Fill ``network``: every tensor there, none too many, each of its shape; else an InputError with the first fault in ``path``."""
    wanted = network.state_dict()
    fault = [f"lacks {name}" for name in sorted(wanted.keys() - stored.keys())]
    fault += [f"has {name} too many" for name in sorted(stored.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & stored.keys()):
        if wanted[name].shape != stored[name].shape:
            fault.append(
                f"has {name} of shape {tuple(stored[name].shape)} instead of {tuple(wanted[name].shape)}"
            )
    if fault:
        raise InputError(
            f"{field}: {path} {fault[0]} (and {len(fault) - 1} more faults); it has another layout, give this codec's"
        )
    network.load_state_dict(stored)
    return network
