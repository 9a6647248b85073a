# SPDX-License-Identifier: Apache-2.0
"""Any other autoencoder of diffusers as a codec: its class from config.json, its compression by probing.

The network runs once on the meta device, without weights or memory, over frames and clips of a known size;
the shapes of what it returns give channels and factors. A class that does not take such clips, does not
return them, or states no normalisation is refused with the reason.
Axes: f frames, f' latent frames, c channels, H W pixels, h w latent size.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from latte.autoencoder.base import Compression
from latte.autoencoder.diffusers_codec import CODEC_OF, DiffusersVideoCodec, Folder, find_folder, undescribed
from latte.checks import InputError, check
from latte.tensors import without_memory

KIND = "autoencoder of diffusers"
SIZE = (128, 192)  # not square, so that a network that resizes its input is found out
LENGTHS = (25, 49, 24, 48)  # with a first frame of its own and without; every common factor divides 24 or 48


@dataclass(frozen=True)
class Found:
    """What probing finds out about a network."""

    compression: Compression
    single: bool
    """Whether it takes single frames (n 3 H W), not clips."""
    stochastic: bool
    """Whether its latents have a posterior with a deviation."""


PROBED: dict[tuple[type, str], Found] = {}


class AnyDiffusersCodec(DiffusersVideoCodec):
    """A network of diffusers that has no codec of its own, as its class does it by default.

    Latents are (raw - mean) scale / deviation of ``latents_mean``, ``latents_std`` and ``scaling_factor``, or
    (raw - ``shift_factor``) ``scaling_factor``, whichever the configuration has.
    """

    name = "diffusers"
    tileable = True

    def __init__(self, network: Any, chunk: int = 16, device: str | torch.device = "cpu"):
        found = probed(network)
        self.single = found.single
        self.stochastic = found.stochastic
        super().__init__(network, chunk, device)

    @staticmethod
    def network_class() -> Any:
        raise NotImplementedError("config.json names the class")

    @classmethod
    def compression_of(cls, config: Mapping[str, Any]) -> Compression:
        raise NotImplementedError("the network is probed")

    @classmethod
    def compression_for(cls, network: Any) -> Compression:
        """Return the compression that probing finds."""
        return probed(network).compression

    @classmethod
    def moments_of(cls, network: Any) -> tuple[Tensor, Tensor] | None:
        """Return the moments (c) of buffers or configuration; InputError when nothing normalises latents."""
        config = network.config
        buffers = dict(network.named_buffers())
        mean = buffers.get("latents_mean", config.get("latents_mean"))
        deviation = buffers.get("latents_std", config.get("latents_std"))
        shift = config.get("shift_factor")
        channels = probed(network).compression.channels
        if mean is not None and deviation is not None:
            moments = (torch.as_tensor(mean).flatten(), torch.as_tensor(deviation).flatten())
            counts = [len(moment) for moment in moments]
            check(
                counts == [channels] * 2,
                f"latents_mean and latents_std have {counts[0]} and {counts[1]} numbers, but latents have "
                f"{channels} channels",
            )
            return moments
        check(
            config.get("scaling_factor") is not None,
            "its config.json has neither scaling_factor nor latents_mean and latents_std, so nothing says "
            "how its latents are normalised; add scaling_factor, 1 / standard deviation of its latents",
        )
        return (torch.full((channels,), float(shift)), torch.ones(channels)) if shift else None

    @classmethod
    def find(cls, path: str | None) -> tuple[Folder, dict[str, Any]]:
        """Return the folder at ``path`` and its config.json.

        InputError when there is none, or its class has a codec of its own.
        """
        if path is None:
            raise InputError(
                f"codec.path is missing, but codec {cls.name!r} needs the folder or hub id of an {KIND}"
            )
        folder = find_folder(path, cls.places, KIND)
        config = folder.config(KIND)
        layout = str(config.get("_class_name"))
        own = CODEC_OF.get(layout, "kl")
        check(
            own == "kl",  # which takes one configuration of AutoencoderKL alone
            f"codec.path: {folder.config_file} is an {layout}, which has a codec of its own; "
            f"set codec.name={own}",
        )
        return folder, config

    @classmethod
    def build(cls, file: Path, config: dict[str, Any]) -> nn.Module:
        """Return an empty network of the class that ``config``, the content of ``file``, names."""
        import diffusers

        layout = str(config.get("_class_name"))
        kind: Any = getattr(diffusers, layout, None)
        check(
            isinstance(kind, type) and issubclass(kind, nn.Module),
            f"codec.path: {file} names the class {layout!r}, which diffusers {diffusers.__version__} does "
            f"not have; give the folder of an {KIND}, or update diffusers",
        )
        arguments = {key: value for key, value in config.items() if key[0] != "_"}
        try:
            return kind.from_config(arguments)
        except Exception as error:  # a constructor raises almost anything
            raise undescribed(file, layout, error) from error

    @classmethod
    def load(cls, path: str | None, chunk: int, device: str | torch.device) -> Self:
        """Return the codec at ``path``, the folder or hub id of an autoencoder or of a pipeline with one."""
        cls.compression_at(path)  # refuses before weights are read
        return super().load(path, chunk, device)

    @classmethod
    def skeleton(cls, path: str | None) -> nn.Module:
        """Return the network at ``path`` on the meta device."""
        folder, config = cls.find(path)
        with without_memory():
            return nn.Module.to(cls.build(folder.config_file, config), "meta")

    @classmethod
    def compression_at(cls, path: str | None) -> Compression:
        """Return the compression of the network at ``path``; InputError for one that is no codec."""
        folder, config = cls.find(path)
        return cls.compression_in(folder.config_file, config)

    @classmethod
    def compression_in(cls, file: Path, config: dict[str, Any]) -> Compression:
        """Return the compression of the network that ``config``, the content of ``file``, describes."""
        with without_memory():
            network = cls.build(file, config)
        try:
            compression = probed(network).compression
            cls.moments_of(network)
        except InputError as error:
            raise InputError(
                f"codec.path: {file}: codec {cls.name!r} cannot use {config['_class_name']}: {error}"
            ) from error
        return compression

    def encode_clip(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        """Return scaled latents (1 f' c h w) of frames (1 f 3 H W), see ``VideoCodec``."""
        if self.single:
            outputs = [latent_of(self.network.encode(part)) for part in frames[0].split(self.chunk)]
            mean = torch.cat([mean for mean, _ in outputs])[None]  # (1 f c h w)
            deviations = [deviation for _, deviation in outputs if deviation is not None]
            deviation = torch.cat(deviations)[None] if deviations else None  # (1 f c h w)
        else:
            mean, deviation = latent_of(self.network.encode(frames.transpose(1, 2).contiguous()))
            mean = mean.transpose(1, 2)  # (1 f' c h w)
            deviation = None if deviation is None else deviation.transpose(1, 2)  # (1 f' c h w)
        if noise is not None and deviation is not None:
            mean = mean + deviation * noise
        return self.normalise(mean)

    def decode_clip(self, latent: Tensor) -> Tensor:
        """Return frames (1 f 3 H W) of scaled latents (1 f' c h w), see ``VideoCodec``."""
        if not self.single:
            return super().decode_clip(latent)
        parts = self.denormalise(latent)[0].split(self.chunk)
        return torch.cat([self.decode_raw(part) for part in parts])[None]  # (1 f 3 H W)


def latent_of(output: Any) -> tuple[Tensor, Tensor | None]:
    """Return mean and deviation of the latents in what ``encode`` returns; the latter None without.

    InputError when there are no latents.
    """
    posterior = getattr(output, "latent_dist", None)
    if posterior is not None:
        deviation = getattr(posterior, "std", None)
        return posterior.mode(), deviation if isinstance(deviation, Tensor) else None
    for key in ("latent", "latents"):
        found = getattr(output, key, None)
        if isinstance(found, Tensor):
            return found, None
    raise InputError(
        f"its encode returns {type(output).__name__}, which has neither latent_dist nor latent nor latents"
    )


def probed(network: Any) -> Found:
    """Return what probing finds out about the class and configuration of ``network``, which is not run."""
    key = (type(network), json.dumps(dict(network.config), default=str, sort_keys=True))
    if key not in PROBED:
        arguments = {name: value for name, value in network.config.items() if name[0] != "_"}
        with without_memory():
            empty = type(network).from_config(arguments)
        PROBED[key] = probe(nn.Module.to(empty.eval(), "meta"))  # some make buffers elsewhere
    return PROBED[key]


@torch.no_grad()
def probe(network: Any) -> Found:
    """Return what the shapes of latents and frames show of ``network``, which is on the meta device.

    InputError with what it lacks.
    """
    for method in ("encode", "decode"):
        check(callable(getattr(network, method, None)), f"it has no {method}")
    check(
        any(isinstance(part, nn.Conv2d | nn.Conv3d) for part in network.modules()),
        "it has no convolution over images; it encodes sound or something else",
    )
    faults = []
    try:
        return probe_frames(network)
    except InputError as error:
        faults.append(f"frames: {error}")
    for length in LENGTHS:
        try:
            return probe_clips(network, length)
        except InputError as error:
            faults.append(f"clips of {length} frames: {error}")
    raise InputError("; ".join(faults[:2]))


def probe_frames(network: Any) -> Found:
    """Return what ``network`` does with single frames; InputError when it takes none."""
    latent, stochastic = passed(network, (1, 3, *SIZE))
    return Found(Compression(latent[1], space_factor(latent)), single=True, stochastic=stochastic)


def probe_clips(network: Any, length: int) -> Found:
    """Return what ``network`` does with clips of ``length`` frames, odd for a causal one.

    InputError when it does not take them, or shorter clips do not fit.
    """
    first = length % 2  # frames with a latent frame of their own
    latent, stochastic = passed(network, (1, 3, length, *SIZE))
    steps = latent[2] - first
    factor = (length - first) // max(1, steps)
    check(
        factor * steps == length - first,
        f"{length} frames become {latent[2]} latent frames, no whole number of frames per latent frame",
    )
    fault = None
    for step in (1, 2)[: 1 + first]:
        found = Compression(latent[1], space_factor(latent), factor, causal=bool(first), latent_step=step)
        lengths = (found.lead, found.lead + found.step)
        try:
            shapes = [passed(network, (1, 3, frames, *SIZE))[0] for frames in lengths]
        except InputError as error:
            fault = error
            continue
        if [shape[2] for shape in shapes] == [found.latent_frames(frames) for frames in lengths]:
            return Found(found, single=False, stochastic=stochastic)
    raise fault or InputError(
        f"{length} frames become {latent[2]} latent frames, shorter clips another number"
    )


def passed(network: Any, shape: tuple[int, ...]) -> tuple[torch.Size, bool]:
    """Return the shape of the latents of a clip of ``shape``, and whether they have a deviation.

    InputError when ``network`` does not encode it, or decodes it to another shape.
    """
    try:
        with without_memory():
            latent, deviation = latent_of(network.encode(torch.empty(shape)))
            decoded = network.decode(torch.empty_like(latent))
    except InputError:
        raise
    except Exception as error:  # whatever a network raises over an input it does not take
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"it does not encode and decode {shape} ({reason})") from error
    found = tuple(getattr(decoded, "sample", decoded).shape)
    check(found == shape, f"what it encodes of shape {shape} it decodes to shape {found}")
    return latent.shape, deviation is not None


def space_factor(latent: torch.Size) -> int:
    """Return pixels per latent pixel of the latents of SIZE; InputError unless one whole number."""
    height, width = latent[-2:]
    factor = SIZE[0] // height
    check(
        (factor * height, factor * width) == SIZE,
        f"{SIZE[0]} x {SIZE[1]} pixels become {height} x {width}, no whole number of pixels per latent pixel",
    )
    return factor
