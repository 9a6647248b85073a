# SPDX-License-Identifier: Apache-2.0
"""What codecs over a network of diffusers share: folder or hub id, config.json, weights and normalisation.

The network is diffusers' own class, imported when used. Its files are read here, strictly: every tensor, no
other, each of its shape and finite.
Axes: f frames, f' latent frames, n frames of a chunk, c channels, H W pixels, h w latent size.
"""

import inspect
import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from latte.autoencoder.base import Codec, Compression, VideoCodec, fill_network, located, read_tensors
from latte.autoencoder.config import published_text
from latte.checks import InputError, check
from latte.tensors import without_memory

WEIGHTS = "diffusion_pytorch_model"
WEIGHT_FILES = (
    f"{WEIGHTS}.safetensors",
    f"{WEIGHTS}.safetensors.index.json",
    f"{WEIGHTS}.fp16.safetensors",
    f"{WEIGHTS}.bin",
)
CODEC_OF: dict[str, str] = {}  # class in diffusers -> name of its codec
TILE_OVERLAP = 4  # a tile overlaps its neighbour by side / TILE_OVERLAP


@dataclass(frozen=True)
class Folder:
    """The files of an autoencoder in a local folder or a hub repository."""

    path: str
    place: str
    """Folder inside ``path``, with its slash; '' for the folder itself."""
    config_file: Path

    def config(self, layout: str) -> dict[str, Any]:
        """Return config.json; InputError, naming ``layout``, when it holds no object."""
        try:
            config = json.loads(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise undescribed(self.config_file, layout, error) from error
        check(
            isinstance(config, dict),
            f"codec.path: {self.config_file} does not describe an {layout} (it is no object); fetch it again",
        )
        return config

    def tensors(self) -> tuple[dict[str, Tensor], Path]:
        """Return all tensors by name, as stored, and the file for messages; InputError without weights."""
        for name in WEIGHT_FILES:
            file = self._fetch(name)
            if file is None:
                continue
            if name.endswith(".index.json"):
                return self._shards(file), file
            return read_tensors(file, "codec.path"), file
        raise self._half_downloaded(WEIGHT_FILES[0])

    def _shards(self, index: Path) -> dict[str, Tensor]:
        """Return the tensors of all the files that ``index`` lists."""
        tensors: dict[str, Tensor] = {}
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(
                f"codec.path: {index} lists no weight files ({error}); fetch it again"
            ) from error
        for name in names:
            file = self._fetch(name)
            if file is None:
                raise self._half_downloaded(name)
            tensors |= read_tensors(file, "codec.path")
        return tensors

    def _fetch(self, name: str) -> Path | None:
        return _fetch(self.path, self.place + name, Path(self.path).is_dir(), [])

    def _half_downloaded(self, missing: str) -> InputError:
        return InputError(
            f"codec.path: {self.path} has {self.place}config.json but no {missing}; it is half downloaded, "
            "fetch it again"
        )


class DiffusersCodec(Codec):
    """A network of diffusers as a codec. Abstract.

    Latents are (raw - mean) scale / deviation, the moments channel by channel, as the pipelines of diffusers
    normalise what they denoise.
    """

    layout: ClassVar[str]
    places: ClassVar[tuple[str, ...]] = ("vae/", "")
    """Folders of a pipeline that may hold the network, the likeliest first; '' for the folder itself."""
    published: ClassVar[dict[str, Any]]
    """Arguments of the network's class for the published network, at least those that decide the
    compression.
    """

    def __init__(self, network: Any, chunk: int = 16, device: str | torch.device = "cpu"):
        super().__init__(network, chunk, device)
        self.compression = self.compression_for(network)
        self.scale = network.config.get("scaling_factor") or 1.0
        self.moments = self.moments_of(network)

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "layout" in cls.__dict__:
            CODEC_OF[cls.layout] = cls.name

    @staticmethod
    @abstractmethod
    def network_class() -> Any:
        """Return diffusers' class, imported here."""

    @classmethod
    @abstractmethod
    def compression_of(cls, config: Mapping[str, Any]) -> Compression:
        """Return the compression of the network with all arguments ``config``.

        InputError for one that this codec cannot use.
        """

    @classmethod
    def compression_for(cls, network: Any) -> Compression:
        """Return the compression of ``network``, with weights or without."""
        return cls.compression_of(network.config)

    @classmethod
    def moments_of(cls, network: Any) -> tuple[Tensor, Tensor] | None:
        """Return means and deviations (c) of raw latents; None without."""
        return None

    @classmethod
    def find(cls, path: str | None) -> tuple[Folder, dict[str, Any]]:
        """Return the folder of the network at ``path`` and its config.json.

        InputError when there is none, or it belongs to another class.
        """
        if path is None:
            raise InputError(
                f"codec.path is missing, but codec {cls.name!r} needs {cls.layout} weights; give a folder or "
                f"a hub id{published_text(cls.name)}"
            )
        folder = find_folder(path, cls.places, cls.layout)
        config = folder.config(cls.layout)
        layout = config.get("_class_name", "another layout")
        check(
            layout == cls.layout,
            f"codec.path: the layout in {folder.config_file} is {layout!r}, but codec {cls.name!r} is an "
            f"{cls.layout}; {advice(layout)}",
        )
        return folder, config

    @classmethod
    def build(cls, file: Path, config: dict[str, Any]) -> nn.Module:
        """Return an empty network as ``config``, the content of ``file``, describes it."""
        arguments = {key: value for key, value in config.items() if key[0] != "_"}
        try:
            return cls.network_class().from_config(arguments)
        except InputError:
            raise
        except Exception as error:  # a constructor raises almost anything
            raise undescribed(file, cls.layout, error) from error

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """Return the codec at ``path``.

        A folder or a hub id of the autoencoder, or of a pipeline with it in one of ``places``.
        """
        folder, config = cls.find(path)
        cls.compression_in(folder.config_file, config)
        network = cls.build(folder.config_file, config)
        stored, file = folder.tensors()
        tensors = {cls.current_name(name): tensor for name, tensor in stored.items()}
        return cls(fill_network(network, tensors, file, "codec.path"), chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        """Return the network at ``path``, the published one without a path, on the meta device."""
        with without_memory():
            if path is None:
                return cls.network_class()(**cls.published)
            folder, config = cls.find(path)
            return cls.build(folder.config_file, config)

    @classmethod
    def compression_at(cls, path: str | None) -> Compression:
        """Return the compression of the network at ``path``, of the published one without a path."""
        if path is None:
            return cls.compression
        folder, config = cls.find(path)
        return cls.compression_in(folder.config_file, config)

    @classmethod
    def compression_in(cls, file: Path, config: dict[str, Any]) -> Compression:
        """Return the compression that ``config``, the content of ``file``, states; InputError without."""
        try:
            return cls.compression_of({**cls.published, **config})
        except (TypeError, ValueError, KeyError) as error:
            if isinstance(error, InputError):
                raise InputError(f"codec.path: {file}: {error}") from error
            raise undescribed(file, cls.layout, error) from error

    @classmethod
    def current_name(cls, name: str) -> str:
        """Return a tensor's name in the current diffusers."""
        return name

    def normalise(self, raw: Tensor) -> Tensor:
        """Return latents of raw ones, both (... c h w)."""
        if self.moments is None:
            return raw * self.scale
        mean, deviation = self._moments(raw)
        return (raw - mean) * self.scale / deviation

    def denormalise(self, latent: Tensor) -> Tensor:
        """Return raw latents of latents, both (... c h w)."""
        if self.moments is None:
            return latent / self.scale
        mean, deviation = self._moments(latent)
        return latent * deviation / self.scale + mean

    def _moments(self, like: Tensor) -> list[Tensor]:
        assert self.moments is not None
        return [moment.to(like)[:, None, None] for moment in self.moments]  # (c 1 1)

    def enable_tiles(self, side: int) -> None:
        """Encode and decode in tiles of ``side`` pixels by the network's own tiling, see ``Codec``."""
        unit = TILE_OVERLAP * self.spatial_factor
        check(
            side >= unit and side % unit == 0,
            f"codec.tile is {side}, but tiles of codec {self.name!r} need a side of a multiple of {unit} "
            f"pixels; the nearest is {max(1, round(side / unit)) * unit}",
        )
        check(
            set_tiles(self.network, side, self.spatial_factor),
            f"codec.tile is {side}, but {type(self.network).__name__} has no tiling in diffusers; "
            "set codec.tile=null",
        )


class DiffusersVideoCodec(DiffusersCodec, VideoCodec):
    """A network of diffusers over whole clips, with a posterior. Abstract."""

    stochastic = True

    def encode_clip(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """Return scaled latents (1 f' c h w) of frames (1 f 3 H W), see ``VideoCodec``."""
        posterior = self.network.encode(frames.transpose(1, 2).contiguous()).latent_dist  # of (1 c f' h w)
        sample = posterior.mean.transpose(1, 2)  # (1 f' c h w)
        if noise is not None:
            sample = sample + posterior.std.transpose(1, 2) * noise
        return self.normalise(sample)

    def decode_clip(self, latent: Tensor) -> Tensor:
        """Return frames (1 f 3 H W) of scaled latents (1 f' c h w), see ``VideoCodec``."""
        raw = self.denormalise(latent).transpose(1, 2).contiguous()  # (1 c f' h w)
        return self.decode_raw(raw).transpose(1, 2)  # (1 f 3 H W)

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Return frames (1 3 f H W) of raw latents (1 c f' h w)."""
        return self.network.decode(raw).sample


def set_tiles(network: Any, side: int, factor: int) -> bool:
    """Turn on the tiling of ``network`` with tiles of ``side`` pixels; return False if it has none.

    ``factor`` pixels are one latent pixel. Neighbours overlap by a quarter of a tile and are blended there.
    """
    overlap = side // TILE_OVERLAP
    settings = {}
    for axis in ("height", "width"):
        settings[f"tile_sample_min_{axis}"] = side
        settings[f"tile_sample_stride_{axis}"] = side - overlap
        settings[f"tile_overlap_factor_{axis}"] = 1 / TILE_OVERLAP
    enable = getattr(network, "enable_tiling", None)
    if enable is None:
        return False
    accepted = inspect.signature(enable).parameters
    if "tile_sample_min_height" in accepted:
        enable(**{key: value for key, value in settings.items() if key in accepted})
        return True
    if not hasattr(network, "tile_latent_min_size"):
        return False
    network.tile_sample_min_size = side
    network.tile_latent_min_size = side // factor
    network.tile_overlap_factor = 1 / TILE_OVERLAP
    enable()
    return True


def find_folder(path: str, places: tuple[str, ...], layout: str) -> Folder:
    """Return the folder in ``path``, local or a hub id, that holds a config.json.

    InputError, naming the places that were looked at, when there is none.
    """
    local = Path(path).is_dir()
    if not local and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise InputError(
            f"codec.path: {located(path)} is no folder, and not a hub id (owner/name); give one of the two"
        )
    reasons: list[str] = []
    for place in places:
        config = _fetch(path, f"{place}config.json", local, reasons)
        if config is not None:
            return Folder(path, place, config)
    inside = " or ".join(place.rstrip("/") for place in places if place)
    looked = located(path) if local else f"{path} is no folder here ({Path(path).absolute()}), and the hub id"
    reason = f" ({reasons[-1]})" if reasons else ""
    raise InputError(
        f"codec.path: {looked} has no config.json, neither directly nor in {inside}{reason}; give the folder "
        f"or hub id of an {layout}"
    )


def layout_at(path: str) -> str | None:
    """Return the class that config.json in the folder, pipeline or hub id ``path`` names, or None."""
    for place in DiffusersCodec.places:
        file = _fetch(path, f"{place}config.json", Path(path).is_dir(), [])
        if file is not None:
            try:
                return json.loads(file.read_text(encoding="utf-8")).get("_class_name")
            except (OSError, ValueError, AttributeError):
                return None
    return None


def advice(layout: str) -> str:
    """Return what to do with an autoencoder of class ``layout``, for the end of a message."""
    return f"set codec.name={CODEC_OF.get(layout, 'diffusers')}, or give another folder"


def undescribed(file: Path, layout: str, error: Exception) -> InputError:
    """Return the error for a config.json that does not fit the class ``layout``."""
    lines = str(error).splitlines() or [type(error).__name__]
    return InputError(
        f"codec.path: {file} does not describe an {layout} ({lines[0]}); fetch it again, or give another one"
    )


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
