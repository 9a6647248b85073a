# SPDX-License-Identifier: Apache-2.0
"""Latte: latent diffusion transformer for video generation (arXiv 2401.03048)."""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {  # public name -> module that defines it; imported at first use, so that ``import latte`` does not import torch
    "InputError": "latte.checks",
    "RunError": "latte.checks",
    "Latte": "latte.model.latte",
    "ModelConfig": "latte.model.latte",
    "DiffusionConfig": "latte.diffusion.config",
    "build_process": "latte.diffusion.config",
    "build_codec": "latte.autoencoder.codec",
    "RunConfig": "latte.config.run",
    "load_run": "latte.config.run",
    "Trained": "latte.inference.pipeline",
    "load_trained": "latte.inference.pipeline",
    "SampleConfig": "latte.inference.generate",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'latte' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
