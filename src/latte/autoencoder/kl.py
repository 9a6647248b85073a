# SPDX-License-Identifier: Apache-2.0
"""The KL autoencoder of Stable Diffusion (layout of 1.4), 8x smaller each way, 4 channels: the codec of the paper.

Encoding samples the posterior; scale 0.18215 unless the weights' own config.json says otherwise (Latte, Sec. 4.1).
The network is diffusers' ``AutoencoderKL``, imported when used; its files are read here, strictly.
Axes: n frames, c channels, h height, w width.
"""

import json
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from latte.autoencoder.base import Codec
from latte.autoencoder.files import fill_network, read_tensors
from latte.checks import InputError, require

LAYOUT = "AutoencoderKL"
WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class KLCodec(Codec):
    """diffusers' AutoencoderKL as a codec; ``encode`` samples with a generator and takes the mean without."""

    name, channels, downscale, scale, stochastic = "kl", 4, 8, 0.18215, True

    def __init__(self, network: Any, chunk: int = 16, device: str | torch.device = "cpu"):
        super().__init__(network, chunk, device)
        self.scale = network.config["scaling_factor"]

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """``path``: a folder or a hub id that holds the autoencoder itself, or a whole pipeline with it in ``vae``."""
        if path is None:
            raise InputError(f"codec.path is missing, but codec 'kl' needs {LAYOUT} weights; give a folder or a hub id")
        config_file, weights_file = _find(path)
        network = _build(config_file)
        tensors = {_renamed(name): tensor for name, tensor in read_tensors(weights_file, "codec.path").items()}
        return cls(fill_network(network, tensors, weights_file, "codec.path"), chunk, device)

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        posterior = self.network.encode(frames).latent_dist
        return (posterior.mean if noise is None else posterior.mean + posterior.std * noise) * self.scale

    def decode_frames(self, latent: Tensor) -> Tensor:
        return self.network.decode(latent / self.scale).sample


def _find(path: str) -> tuple[Path, Path]:
    """(config.json, weight file) in the folder or hub repository ``path`` or its ``vae``, or an InputError saying what is not there."""
    local = Path(path).is_dir()
    if not local and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise InputError(f"codec.path is {path!r}, which is no folder here and no hub id (owner/name); give one of the two")
    reasons: list[str] = []
    for folder in ("vae/", ""):
        config = _fetch(path, f"{folder}config.json", local, reasons)
        if config:
            weights = next((file for name in WEIGHT_FILES if (file := _fetch(path, folder + name, local, reasons))), None)
            if weights:
                return config, weights
            raise InputError(f"codec.path: {path} has {folder}config.json but no {WEIGHT_FILES[0]}; it is half downloaded, fetch it again")
    why = f" ({reasons[-1]})" if reasons else ""
    raise InputError(f"codec.path: {path} has no config.json, neither directly nor in vae{why}; give the folder or hub id of an {LAYOUT}")


def _fetch(path: str, name: str, local: bool, reasons: list[str]) -> Path | None:
    """One file of the folder or repository, or None with the reason noted."""
    if local:
        file = Path(path) / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(path, name))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reasons.append(str(error).strip().splitlines()[0])
        return None


def _build(file: Path) -> nn.Module:
    """An empty AutoencoderKL as ``file``, a config.json, describes it; InputError unless it has this codec's layout."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    network: Any = None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        layout = config.get("_class_name", "another layout")
        if layout == LAYOUT:
            network = AutoencoderKL.from_config({key: value for key, value in config.items() if key[0] != "_"})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"codec.path: {file} does not describe an {LAYOUT} ({error}); fetch it again") from error
    rule = f"codec 'kl' is an {LAYOUT} of 4 channels, 8 times smaller, without shift"
    require(network is not None, f"layout in {file}", layout, rule, "give another folder or codec.name")
    found = (network.config["latent_channels"], 2 ** (len(network.config["block_out_channels"]) - 1), network.config["shift_factor"] or 0)
    require(found == (4, 8, 0), f"(channels, times, shift) in {file}", found, rule, "give another folder or codec.name")
    return network


def _renamed(name: str) -> str:
    """Files from before diffusers 0.18 call the attention's projections otherwise."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
