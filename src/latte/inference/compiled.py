# SPDX-License-Identifier: Apache-2.0
"""torch.compile for sampling: the blocks of a model, one by one, so that few graphs serve all of them."""

import logging
import time

import torch

from latte.checks import InputError, check
from latte.model.denoiser import Denoiser

LOG = logging.getLogger(__name__)
COMPILED = ("cpu", "cuda")  # devices


def compile_blocks(model: Denoiser, device: torch.device, backend: str = "inductor") -> None:
    """Compile every block of ``model`` in place; the graphs themselves are built by its first calls.

    InputError, naming what is missing, where torch cannot compile for ``device``. Outputs differ from those
    without compilation by rounding.
    """
    check_compiler(device, backend)
    for block in model.blocks:
        block.compile(backend=backend)


def is_compiled(model: Denoiser) -> bool:
    """Return whether ``compile_blocks`` has compiled the blocks of ``model``."""
    return any(getattr(block, "_compiled_call_impl", None) is not None for block in model.blocks)


def check_compiler(device: torch.device, backend: str = "inductor") -> None:
    """Raise InputError, naming what is missing, unless torch compiles a function for ``device``."""
    check(
        device.type in COMPILED,
        f"--compile (compile=) is for the devices {' and '.join(COMPILED)}, but device is {device.type}; "
        "leave it out",
    )
    began = time.monotonic()
    try:
        with torch.no_grad():
            torch.compile(lambda x: x.cos() + 1, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler behind torch raises
        reason = missing_part(error)
        raise InputError(f"--compile (compile=): {reason}; install it, or leave --compile out") from error
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
