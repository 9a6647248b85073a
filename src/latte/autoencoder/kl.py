# SPDX-License-Identifier: Apache-2.0
"""The KL autoencoders of Stable Diffusion, 8x smaller each way, 4 channels: the paper's codec, and the one
with temporal decoder.

Encoding samples the posterior; scale 0.18215 unless the weights' own config.json has another (Latte, Sec.
4.1). The networks are diffusers' AutoencoderKL (layout of 1.4) and AutoencoderKLTemporalDecoder (of Stable
Video Diffusion), imported when used; their files are read here, strictly.
Axes: b clips, f frames, n frames of a chunk, c channels, h height, w width.
"""

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from latte.autoencoder.base import Compression, FrameCodec
from latte.autoencoder.files import fill_network, located, read_tensors
from latte.checks import InputError, check

WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bin",
)
STABLE_DIFFUSION = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class DiffusersCodec(FrameCodec):
    """A network of diffusers with a posterior. Abstract: KLCodec and TemporalCodec."""

    layout: ClassVar[str]
    places: ClassVar[tuple[str, ...]]
    """Folders of a pipeline that may hold the network, the likeliest first; '' for the folder itself."""
    published: ClassVar[dict[str, Any]]
    """Arguments of the network's class for the published network."""
    compression = Compression(channels=4, spatial_factor=8)
    scale = 0.18215
    stochastic = True

    def __init__(self, network: Any, chunk: int = 16, device: str | torch.device = "cpu"):
        super().__init__(network, chunk, device)
        self.scale = network.config["scaling_factor"]

    @staticmethod
    @abstractmethod
    def network_class() -> Any:
        """Return diffusers' class, imported here."""

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """Return the codec at ``path``.

        A folder or a hub id of the autoencoder, or of a pipeline with it in one of ``places``.
        """
        if path is None:
            raise InputError(
                f"codec.path is missing, but codec {cls.name!r} needs {cls.layout} weights; give a folder or "
                "a hub id"
            )
        config_file, weights_file = _find(path, cls)
        network = _build(config_file, cls)
        stored = read_tensors(weights_file, "codec.path")
        tensors = {_current_name(name): tensor for name, tensor in stored.items()}
        return cls(fill_network(network, tensors, weights_file, "codec.path"), chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        """Return Stable Diffusion's network, unless ``path`` is a folder with another config.json."""
        places = [Path(path) / place / "config.json" for place in cls.places] if path else []
        config_file = next((file for file in places if file.is_file()), None)
        with torch.device("meta"):
            return _build(config_file, cls) if config_file else cls.network_class()(**cls.published)

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        posterior = self.network.encode(frames).latent_dist
        sample = posterior.mean
        if noise is not None:
            sample = sample + posterior.std * noise
        return sample * self.scale


class KLCodec(DiffusersCodec):
    """diffusers' AutoencoderKL as a codec: every frame by itself."""

    name = "kl"
    layout = "AutoencoderKL"
    places = ("vae/", "")
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


class TemporalCodec(DiffusersCodec):
    """diffusers' AutoencoderKLTemporalDecoder as a codec: KLCodec's encoder, and a decoder across frames.

    The release keeps it in ``vae_temporal_decoder`` and decodes 14 frames at a time. Frames of a chunk
    influence each other, so ``chunk`` is part of the result: 14 is what the release does, a chunk of the
    whole clip is seamless. Chunks start again at every clip (the release's cross the clips of a batch), so a
    clip does not depend on its batch.
    """

    name = "kl_temporal"
    layout = "AutoencoderKLTemporalDecoder"
    places = ("vae_temporal_decoder/", "vae/", "")
    published: ClassVar = {"down_block_types": ["DownEncoderBlock2D"] * 4, **STABLE_DIFFUSION}

    @staticmethod
    def network_class() -> Any:
        from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder

        return AutoencoderKLTemporalDecoder

    def decode(self, latent: Tensor) -> Tensor:
        """Return frames (b f 3 H W) in [-1, 1], clamped, of latents (b f c h w), clip by clip."""
        if len(latent) <= 1 or latent.ndim != 5:  # the latter is refused there
            return super().decode(latent)
        return torch.cat([super(TemporalCodec, self).decode(clip[None]) for clip in latent])

    def decode_frames(self, latent: Tensor) -> Tensor:
        return self.network.decode(latent / self.scale, num_frames=len(latent)).sample


def _find(path: str, codec: type[DiffusersCodec]) -> tuple[Path, Path]:
    """Return (config.json, weight file) of ``codec`` in the folder or hub repository ``path``.

    InputError, naming the places that were looked at, when there is none.
    """
    local = Path(path).is_dir()
    if not local and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise InputError(
            f"codec.path: {located(path)} is no folder, and not a hub id (owner/name); give one of the two"
        )
    reasons: list[str] = []
    for folder in codec.places:
        config = _fetch(path, f"{folder}config.json", local, reasons)
        if config is None:
            continue
        for name in WEIGHT_FILES:
            weights = _fetch(path, folder + name, local, reasons)
            if weights is not None:
                return config, weights
        raise InputError(
            f"codec.path: {path} has {folder}config.json but no {WEIGHT_FILES[0]}; it is half downloaded, "
            "fetch it again"
        )
    inside = " or ".join(place.rstrip("/") for place in codec.places if place)
    looked = located(path) if local else f"{path} is no folder here ({Path(path).absolute()}), and the hub id"
    reason = f" ({reasons[-1]})" if reasons else ""
    raise InputError(
        f"codec.path: {looked} has no config.json, neither directly nor in {inside}{reason}; give the folder "
        f"or hub id of an {codec.layout}"
    )


def layout_at(path: str) -> str | None:
    """Return the class that config.json in the folder, pipeline or hub id ``path`` names, or None."""
    for place in ("vae/", ""):
        file = _fetch(path, f"{place}config.json", Path(path).is_dir(), [])
        if file is not None:
            try:
                return json.loads(file.read_text(encoding="utf-8")).get("_class_name")
            except (OSError, ValueError, AttributeError):
                return None
    return None


def _fetch(path: str, name: str, local: bool, reasons: list[str]) -> Path | None:
    """Return one file of the folder or repository; None, with the reason appended, when it is absent."""
    if local:
        file = Path(path) / name
        if file.is_file():
            return file
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(path, name))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reasons.append(str(error).strip().splitlines()[0])
        return None


def _build(file: Path, codec: type[DiffusersCodec]) -> nn.Module:
    """Return an empty network as ``file``, a config.json, describes it.

    InputError unless it has this codec's layout.
    """
    network: Any = None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        layout = config.get("_class_name", "another layout")
        if layout == codec.layout:
            arguments = {key: value for key, value in config.items() if key[0] != "_"}
            network = codec.network_class().from_config(arguments)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"codec.path: {file} does not describe an {codec.layout} ({error}); fetch it again"
        ) from error
    rule = f"codec {codec.name!r} is an {codec.layout} of 4 channels, 8 times smaller, without shift"
    check(
        network is not None,
        f"codec.path: the layout in {file} is {layout!r}, but {rule}; give another folder or codec.name",
    )
    shape = network.config
    downscale = 2 ** (len(shape["block_out_channels"]) - 1)
    found = (shape["latent_channels"], downscale, shape.get("shift_factor") or 0)
    check(
        found == (4, 8, 0),
        f"codec.path: (channels, downscale, shift) in {file} is {found}, but {rule}; give another folder or "
        "codec.name",
    )
    return network


def _current_name(name: str) -> str:
    """Return a tensor's name in diffusers since 0.18, which renamed the projections of attention."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
