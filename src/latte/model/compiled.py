# SPDX-License-Identifier: Apache-2.0
"""torch.compile for training and sampling: the blocks of a model, one by one: few graphs serve all."""

import logging
import time

import torch

from latte.checks import InputError, check
from latte.model.denoiser import Denoiser

LOG = logging.getLogger(__name__)
COMPILED = ("cpu", "cuda")  # devices
MAX_GRAPHS = 64  # of all kinds of blocks together; beyond it torch runs a block uncompiled


def compile_blocks(
    model: Denoiser, device: torch.device, setting: str = "compile", backend: str = "inductor"
) -> None:
    """Compile every block of ``model``, and nothing around them, in place; names of weights stay what they
    are.

    Blocks of one kind share their graphs, which are built by the first calls: one for the first batch size,
    one for all others. Outputs differ from those without compilation by rounding. InputError that names
    ``setting`` and what is missing where torch cannot compile for ``device``.
    """
    check_compiler(device, setting, backend)
    for block in model.blocks:
        block.compile(backend=backend, recompile_limit=MAX_GRAPHS)


def is_compiled(model: Denoiser) -> bool:
    """Return whether ``compile_blocks`` has compiled the blocks of ``model``."""
    return any(getattr(block, "_compiled_call_impl", None) is not None for block in model.blocks)


def check_compiler(device: torch.device, setting: str = "compile", backend: str = "inductor") -> None:
    """Raise InputError, naming what is missing, unless torch compiles a function for ``device``."""
    check(
        device.type in COMPILED,
        f"{setting} is for the devices {' and '.join(COMPILED)}, but device is {device.type}; leave it out",
    )
    began = time.monotonic()
    try:
        with torch.no_grad():
            torch.compile(lambda x: x.cos() + 1, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler behind torch raises
        reason = missing_part(error)
        raise InputError(f"{setting}: {reason}; install it, or leave {setting} out") from error
    LOG.info("torch.compile works for %s (%.0f s)", device.type, time.monotonic() - began)


def missing_part(error: Exception) -> str:
    """Return what torch.compile lacks here, from the error that it raised."""
    text = f"{type(error).__name__}: {error}"
    if "InvalidCxxCompiler" in text or "C++ compiler" in text:
        return "torch finds no C++ compiler (g++ or clang++, or the one that CXX names)"
    if "riton" in text:
        return f"torch finds no working Triton, which compiles for GPUs ({short(error)})"
    if "Python.h" in text:
        return "the C headers of Python (Python.h) are missing"
    return f"torch.compile fails here ({short(error)})"


def short(error: Exception) -> str:
    """Return the first line of the error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:160]
