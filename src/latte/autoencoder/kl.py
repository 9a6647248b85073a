# SPDX-License-Identifier: Apache-2.0
"""The KL autoencoder of Stable Diffusion (layout of 1.4), 8x smaller each way, 4 channels: the codec of the paper.

Encoding samples the posterior; scale 0.18215 unless the weights' own config.json says otherwise (Latte, Sec. 4.1).
The network is diffusers' ``AutoencoderKL``, imported when used; its files are read here, strictly. ``temporal.py`` has the same
encoder behind another decoder.
Axes: n frames, c channels, h height, w width.
"""

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from latte.autoencoder.base import Codec
from latte.autoencoder.files import fill_network, read_tensors
from latte.checks import InputError, require

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class Posterior(Codec):
    """A network of diffusers whose encoder gives a normal distribution: ``encode`` samples it with a generator, takes the mean without.

    ``layout`` is the network's class in diffusers, ``places`` the folders of a pipeline that may hold one, the likeliest first,
    ``published`` what the class must be told to be the published network.
    """

    layout: str
    places: tuple[str, ...]
    published: dict[str, Any]
    channels, downscale, scale, stochastic = 4, 8, 0.18215, True

    def __init__(self, network: Any, chunk: int = 16, device: str | torch.device = "cpu"):
        super().__init__(network, chunk, device)
        self.scale = network.config["scaling_factor"]

    @staticmethod
    @abstractmethod
    def network_class() -> Any:
        """diffusers' class, imported when asked for."""

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """``path``: a folder or a hub id that holds the autoencoder itself, or a whole pipeline with it in one of ``places``."""
        if path is None:
            raise InputError(
                f"codec.path is missing, but codec {cls.name!r} needs {cls.layout} weights; give a folder or a hub id"
            )
        config_file, weights_file = _find(path, cls)
        network = _build(config_file, cls)
        tensors = {
            _renamed(name): tensor for name, tensor in read_tensors(weights_file, "codec.path").items()
        }
        return cls(fill_network(network, tensors, weights_file, "codec.path"), chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        """Stable Diffusion's, unless ``path`` is a folder with another config.json."""
        places = [Path(path) / place / "config.json" for place in cls.places] if path else []
        card = next((file for file in places if file.is_file()), None)
        with torch.device("meta"):
            return _build(card, cls) if card else cls.network_class()(**cls.published)

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        posterior = self.network.encode(frames).latent_dist
        return (posterior.mean if noise is None else posterior.mean + posterior.std * noise) * self.scale


class KLCodec(Posterior):
    """diffusers' AutoencoderKL as a codec: every frame by itself."""

    name, layout, places = "kl", "AutoencoderKL", ("vae/", "")
    published: ClassVar = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        **STABLE_DIFFUSION,
    }

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return AutoencoderKL

    def decode_frames(self, latent: Tensor) -> Tensor:
        return self.network.decode(latent / self.scale).sample


def _find(path: str, codec: type[Posterior]) -> tuple[Path, Path]:
    """(config.json, weight file) of ``codec`` in the folder or hub repository ``path``, or an InputError saying what is not there."""
    local = Path(path).is_dir()
    if not local and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise InputError(
            f"codec.path is {path!r}, which is no folder here and no hub id (owner/name); give one of the two"
        )
    reasons: list[str] = []
    for folder in codec.places:
        config = _fetch(path, f"{folder}config.json", local, reasons)
        if config:
            weights = next(
                (file for name in WEIGHT_FILES if (file := _fetch(path, folder + name, local, reasons))), None
            )
            if weights:
                return config, weights
            raise InputError(
                f"codec.path: {path} has {folder}config.json but no {WEIGHT_FILES[0]}; it is half downloaded, fetch it again"
            )
    why = f" ({reasons[-1]})" if reasons else ""
    inside = " or ".join(place.rstrip("/") for place in codec.places if place)
    raise InputError(
        f"codec.path: {path} has no config.json, neither directly nor in {inside}{why}; give the folder or hub id of an "
        f"{codec.layout}"
    )


def layout_at(path: str) -> str | None:
    """The class that config.json in the folder, pipeline or hub id ``path`` names; None where there is none."""
    files = (_fetch(path, f"{place}config.json", Path(path).is_dir(), []) for place in ("vae/", ""))
    file = next((file for file in files if file), None)
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("_class_name") if file else None
    except (OSError, ValueError, AttributeError):
        return None


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


def _build(file: Path, codec: type[Posterior]) -> nn.Module:
    """An empty network as ``file``, a config.json, describes it; InputError unless it has this codec's layout."""
    network: Any = None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        layout = config.get("_class_name", "another layout")
        if layout == codec.layout:
            network = codec.network_class().from_config(
                {key: value for key, value in config.items() if key[0] != "_"}
            )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"codec.path: {file} does not describe an {codec.layout} ({error}); fetch it again"
        ) from error
    rule = f"codec {codec.name!r} is an {codec.layout} of 4 channels, 8 times smaller, without shift"
    require(network is not None, f"layout in {file}", layout, rule, "give another folder or codec.name")
    shape = network.config
    found = (
        shape["latent_channels"],
        2 ** (len(shape["block_out_channels"]) - 1),
        shape.get("shift_factor") or 0,
    )
    require(
        found == (4, 8, 0),
        f"(channels, times, shift) in {file}",
        found,
        rule,
        "give another folder or codec.name",
    )
    return network


def _renamed(name: str) -> str:
    """Files from before diffusers 0.18 call the attention's projections otherwise."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
