# SPDX-License-Identifier: Apache-2.0
"""Latte: latent diffusion transformer for video generation (arXiv 2401.03048)."""

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

# What type checkers see. At run time each name is imported at first use, so ``import latte`` loads no torch.
if TYPE_CHECKING:
    from latte.autoencoder.codec import CodecConfig as CodecConfig
    from latte.autoencoder.codec import build_codec as build_codec
    from latte.checks import InputError as InputError
    from latte.checks import RunError as RunError
    from latte.config.run import RunConfig as RunConfig
    from latte.config.run import load_run as load_run
    from latte.diffusion.config import DiffusionConfig as DiffusionConfig
    from latte.diffusion.config import build_process as build_process
    from latte.inference.generate import SampleConfig as SampleConfig
    from latte.inference.outputs import export_to_video as export_to_video
    from latte.inference.pipeline import Trained as Trained
    from latte.inference.pipeline import VideoPipeline as VideoPipeline
    from latte.inference.pipeline import load_trained as load_trained
    from latte.model.latte import Latte as Latte
    from latte.model.latte import ModelConfig as ModelConfig
    from latte.training.callbacks import Callback as Callback
    from latte.training.config import TrainConfig as TrainConfig
    from latte.training.train import train as train

__version__ = "0.1.0"

_MODULES = {  # public name: the module that defines it
    "InputError": "latte.checks",
    "RunError": "latte.checks",
    "Latte": "latte.model.latte",
    "ModelConfig": "latte.model.latte",
    "DiffusionConfig": "latte.diffusion.config",
    "build_process": "latte.diffusion.config",
    "CodecConfig": "latte.autoencoder.codec",
    "build_codec": "latte.autoencoder.codec",
    "RunConfig": "latte.config.run",
    "load_run": "latte.config.run",
    "VideoPipeline": "latte.inference.pipeline",
    "export_to_video": "latte.inference.outputs",
    "SampleConfig": "latte.inference.generate",
    "train": "latte.training.train",
    "TrainConfig": "latte.training.config",
    "Callback": "latte.training.callbacks",
    "Trained": "latte.inference.pipeline",
    "load_trained": "latte.inference.pipeline",
}
__all__ = ["__version__", *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'latte' has no attribute {name!r}")
    if name == "Trained":
        warnings.warn("latte.Trained is now latte.VideoPipeline", DeprecationWarning, stacklevel=2)
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
