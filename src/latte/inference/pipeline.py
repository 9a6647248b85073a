# SPDX-License-Identifier: Apache-2.0
"""``VideoPipeline``: a trained model with its codec and text encoder, from a run, a weights folder, the hub
or the package.

Axes: b clips, t f frames, h height, w width, c channels.
"""

import logging
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from latte.autoencoder.codec import Codec, CodecConfig, build_codec, decoder_for
from latte.checks import InputError, check, choose
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.frame_conditioning import DEFAULT_STRENGTH
from latte.inference.generate import SampleConfig, generate
from latte.inference.outputs import OUTPUT_TYPES, Frames, check_output_folder, smallest_clip, write_clips
from latte.inference.prompts import PromptReader
from latte.inference.requests import Image, SampleRequest, as_list, choose_seeds, read_conditioning_frames
from latte.inference.run_folder import open_run
from latte.inference.stored import StoredModel, open_external_model, open_weights_folder
from latte.interop.export import publish, save_ours
from latte.interop.lora import CLIPS, load_lora, merged
from latte.interop.resolve import resolve
from latte.model.denoiser import Denoiser
from latte.runtime import DTYPES, resolve_device, resolve_dtype
from latte.tensors import tensors_sha256
from latte.text.encoders import TextEncoderConfig, same_weights

RENAMED_OPTIONS = {"given": "conditioning_frames", "given_strength": "conditioning_strength"}  # of 0.1.0
LOG = logging.getLogger(__name__)
LONG_JOB = 600.0  # seconds from which on the log estimates the time left
BatchProgress = Callable[[int, int], Callable[[int, int], None]]
Callback = Callable[["VideoPipeline", int, int, dict[str, Any]], Any]


@dataclass(frozen=True)
class VideoPipelineOutput:
    """``frames`` of all videos, in the ``output_type`` asked for, and the seed of each."""

    frames: Frames
    seeds: list[int]


@dataclass(eq=False)
class VideoPipeline:
    """Generate videos: ``VideoPipeline.from_pretrained("builtin")(class_labels=["up"], seed=7).frames``.

    ``name`` is the source, ``weights`` the hash of the weights, ``classes`` the class names in label order,
    ``sample`` the default settings, ``reader`` the prompt reader of a text model, ``about`` the training
    metadata of the model card. ``decoder`` replaces the codec's decoder. ``offload`` is the device that model
    and codec visit while they compute, None: they stay where they are. ``dtype`` is the precision of matrix
    products; weights stay float32.
    """

    name: str
    model: Denoiser
    diffusion: DiffusionConfig
    codec_config: CodecConfig | None
    codec: Codec
    classes: list[str]
    sample: SampleConfig
    weights: str
    reader: PromptReader | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    decoder: Codec | None = None
    offload: torch.device | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "builtin",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        codec: Codec | None = None,
        diffusion: DiffusionConfig | None = None,
        codec_path: str | None = None,
        text_encoder_path: str | None = None,
        text_bits: int | None = None,
        decoder: str | None = None,
        lora: str | Path | None = None,
        offload: bool = False,
        prompts: Sequence[str] = (),
    ) -> Self:
        """Load 'builtin', a run folder or one of its checkpoints, a weights folder, an external checkpoint or
        a hub id.

        A run provides its EMA weights. ``codec_path`` and ``text_encoder_path`` locate weights that have
        moved; ``codec`` and ``diffusion`` supply parts that the source does not record. ``decoder``: path or
        hub id of a KL autoencoder that decodes instead (such as one with a temporal decoder). ``text_bits`` 8
        holds a T5 in int8. ``prompts`` are encoded now, before the denoiser takes its memory; others can be
        encoded later. InputError when a part is missing, altered or does not fit the model.
        """
        work = resolve_device(device)
        if offload:
            check(
                work.type != "cpu",
                f"CPU offload needs a GPU, but device is {str(work)!r}; leave --offload out",
            )
        home = torch.device("cpu") if offload else work
        stored = open_source(source, codec_path, text_encoder_path, codec is not None)
        diffusion = stored.diffusion or diffusion
        check_complete(stored, diffusion, codec)
        assert diffusion is not None
        reader = open_reader(stored, work, text_encoder_path, text_bits, prompts)
        network, weights = stored.load()
        pipe = cls(
            name=stored.name,
            model=network.to(home),
            diffusion=diffusion,
            codec_config=stored.codec,
            codec=open_codec(stored, codec, codec_path, home),
            classes=stored.classes,
            sample=stored.sample,
            weights=weights,
            reader=reader,
            about=stored.about,
            offload=work if offload else None,
            dtype=resolve_dtype(dtype, work),
        )
        if lora is not None:
            pipe.load_lora_weights(lora)
        if decoder is not None:
            pipe.decoder = decoder_for(pipe.codec, decoder)
        return pipe

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        negative_prompt: str | None = None,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | str | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image: Image | None = None,
        last_image: Image | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        batch_size: int | None = None,
        window: int | None = None,
        longer: str = "freenoise",
        overlap: int | None = None,
        conditioning_strength: float = DEFAULT_STRENGTH,
        callback_on_step_end: Callback | None = None,
        output_type: str = "np",
    ) -> VideoPipelineOutput:
        """Generate ``num_videos_per_prompt`` videos per prompt or class label; settings left out are the
        model's own (``sample``).

        Args:
            prompt: text or texts, for a text model. ``negative_prompt`` is what guidance steers all of them
                away from.
            class_labels: names or numbers, for a class model; "none" and -1 are the null (unconditional)
                class.
            num_frames, height, width: size of the videos in frames and pixels; by default what the model was
                trained with.
            num_inference_steps: denoising steps, or a respacing such as "ddim50". ``sampler``: a name of
                ``SAMPLERS``; ``eta``: ddim's.
            guidance_scale: classifier-free guidance; 1 turns it off.
            seed: video i uses seed + i, or pass one seed per video. ``generator``: source of the seeds
                instead. Without either the seeds come from torch's global generator. A video depends on its
                own seed alone, not on its batch.
            image, last_image: first and last frame (PIL image, array (h w c), tensor (c h w) or path),
                cropped and resized to fit.
            window, longer, overlap: for more frames than the model was trained with, see
                ``latte.diffusion.long_video``.
            conditioning_strength: guidance strength of ``image`` and ``last_image`` on the other frames.
            batch_size: videos generated at once; it does not change them.
            callback_on_step_end: called as (pipe, step, timestep, {}) after every denoising step of every
                batch; the return value is ignored.
            output_type: "np": float32 (b t h w c) in [0, 1]; "pt": tensor (b t c h w) in [0, 1]; "pil": lists
                of images; "uint8": array (b t h w c).

        Returns an object with ``frames`` and ``seeds``. InputError for arguments that do not fit the model,
        RunError for NaN/Inf.
        """
        convert = choose("output_type", output_type, OUTPUT_TYPES)
        prompts, labels = as_list("prompt", prompt), as_list("class_labels", class_labels)
        self.check_conditions(prompts, labels)
        items = prompts or labels or [None]
        check(
            num_videos_per_prompt >= 1,
            f"num_videos_per_prompt must be at least 1, got {num_videos_per_prompt}",
        )
        seeds = choose_seeds(seed, generator, len(items) * num_videos_per_prompt)
        changes = {
            "sampler": sampler,
            "steps": num_inference_steps,
            "guidance": guidance_scale,
            "eta": eta,
            "batch": batch_size,
        }
        default = self.frame_size()
        size = None if height is None and width is None else (height or default[0], width or default[1])
        with self.step_callback(callback_on_step_end) as progress:
            clips = self.generate(
                seeds,
                labels and [label for label in labels for _ in range(num_videos_per_prompt)],
                prompts and [text for text in prompts for _ in range(num_videos_per_prompt)],
                negative_prompt or "",
                config=replace(
                    self.sample, **{key: value for key, value in changes.items() if value is not None}
                ),
                frames=num_frames,
                size=size,
                window=window,
                longer=longer,
                overlap=overlap,
                conditioning_frames=read_conditioning_frames(image, last_image, size or default),
                conditioning_strength=conditioning_strength,
                progress=progress,
            )
            return VideoPipelineOutput(convert(np.stack([clip for _, clip in clips])), seeds)

    def generate(
        self,
        seeds: Sequence[int],
        labels: Sequence[int | str] | None = None,
        prompts: Sequence[str] | None = None,
        negative: str = "",
        **options: Any,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (seed, uint8 (t h w c)) for every seed, batch by batch; ``options`` are those of
        ``latte.inference.generate.generate``.

        Labels are names or numbers, one per seed; a text model reads ``prompts``, one per seed. InputError,
        before anything is computed, for conditions that the model does not have.
        """
        for old, new in RENAMED_OPTIONS.items():
            if old in options:
                warnings.warn(f"{old}= is now {new}=", DeprecationWarning, stacklevel=2)
                options[new] = options.pop(old)
        defaults = {
            "config": self.sample,
            "decoder": self.decoder,
            "offload": self.offload,
            "dtype": self.dtype,
        }
        numbers = None if labels is None else [self.label(label) for label in labels]
        self.check_prompts(prompts is not None)
        encoded = self.reader(prompts, negative) if self.reader and prompts is not None else None
        return generate(
            self.model,
            build_process(self.diffusion),
            self.codec,
            seeds,
            numbers,
            prompts=encoded,
            **{**defaults, **options},
        )

    def write_clips(
        self,
        requests: Sequence[SampleRequest],
        folder: str | Path,
        negative: str = "",
        *,
        facts: Mapping[str, Any],
        progress: BatchProgress | None = None,
        **options: Any,
    ) -> tuple[Path, Path]:
        """Make ``folder`` hold an mp4 per request, a gif and a contact sheet; clips that are there already
        are kept.

        ``facts`` is the record of what decides the pixels (see ``clip_facts``), ``options`` are those of
        ``generate``, and ``progress(batch, batches)`` makes a batch's progress function. Returns (contact
        sheet, gif). InputError, before anything is computed, for settings that do not fit; RunError for a
        full disk and for NaN/Inf, with nothing of that batch written.
        """
        config, began = options.get("config", self.sample), time.monotonic()
        batches = -(-len(requests) // config.batch)
        height, width = self.frame_size(options.get("size"))
        frames = options.get("frames") or self.model.config.num_frames
        check_output_folder(folder, len(requests) * smallest_clip(frames, height, width))

        def run(number: int, part: Sequence[SampleRequest]) -> Iterator[tuple[int, np.ndarray]]:
            labels = [request.label for request in part if request.label is not None] or None
            prompts = [request.prompt for request in part if request.prompt is not None] or None
            advance = progress(number, batches) if progress else None
            seeds = [request.seed for request in part]
            yield from self.generate(seeds, labels, prompts, negative, progress=advance, **options)
            left = (batches - 1) * (time.monotonic() - began)
            if number == 0 and left > LONG_JOB:
                LOG.info("%d batches of clips: about %.1f hours left", batches, left / 3600)

        return write_clips(Path(folder), requests, run, facts, config.batch, config.fps)

    @contextmanager
    def step_callback(self, callback: Callback | None) -> Iterator[Callable[[int, int], None] | None]:
        """Provide a progress function that calls ``callback`` with the timestep the model last computed,
        or None without one.
        """
        if callback is None:
            yield None
            return
        latest: list[int] = []
        handle = self.model.register_forward_pre_hook(
            lambda _, inputs: latest.append(int(inputs[1].flatten()[0]))
        )

        def progress(done: int, of: int) -> None:
            callback(self, done - 1, latest[-1], {})
            latest.clear()

        try:
            yield progress
        finally:
            handle.remove()

    @property
    def device(self) -> torch.device:
        """Return the device that computes."""
        return self.offload or next(self.model.parameters()).device

    def to(self, *targets: str | torch.device | torch.dtype, **named: Any) -> Self:
        """Move to a device, change the precision of matrix products, or both: ``to("cuda", torch.bfloat16)``;
        returns self.

        CPU offload ends with a move. InputError for a device that this machine does not have.
        """
        unknown = named.keys() - {"device", "dtype"}
        check(not unknown, f"to() accepts device and dtype, got {', '.join(sorted(unknown))}")
        for target in (*targets, *named.values()):
            if isinstance(target, torch.dtype) or target in DTYPES:
                self.dtype = resolve_dtype(target, self.device)
                continue
            device = resolve_device(target)
            self.offload = None
            for part in filter(None, (self.model, self.codec, self.decoder)):
                part.to(device)
            if self.reader:
                self.reader.device = device
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "auto") -> None:
        """Keep model and codec in host memory and move each to ``device`` only while it computes: slower,
        with less GPU memory.
        """
        work = resolve_device(device)
        check(
            work.type != "cpu",
            f"CPU offload needs a GPU, but device is {str(work)!r}; call to('cpu') instead",
        )
        self.to("cpu")
        self.offload = work
        if self.reader:
            self.reader.device = work

    def load_lora_weights(self, folder: str | Path) -> None:
        """Merge the LoRA adapters in ``folder`` into the model, which then generates clips of the size they
        were trained for.

        InputError for adapters of another base model, and for those trained with another codec or text
        encoder.
        """
        facts = load_lora(self.model, folder, self.classes)
        own = {"codec": self.codec.fingerprint, "text": self.reader.fingerprint if self.reader else None}
        for part, fingerprint in own.items():
            check(
                None in (fingerprint, facts.get(part)) or same_weights(str(facts[part]), str(fingerprint)),
                f"the {part} of {self.name} is {fingerprint}, but the adapters in {folder} were trained with {facts.get(part)}; "
                "use adapters of this model",
            )
        self.model = merged(self.model).to(next(self.model.parameters()).device)
        size = {key: facts[key] for key in CLIPS if facts.get(key)}
        size = {key: tuple(value) if isinstance(value, list) else value for key, value in size.items()}
        self.model.config = replace(self.model.config, **size)
        self.name, self.classes = f"{self.name}+{Path(folder).name}", facts["classes"]
        self.weights = tensors_sha256(self.model.state_dict())

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write a weights folder that ``from_pretrained`` of this class and of the model's class read;
        RunError when the disk refuses.

        ``half`` stores float16, half the bytes; it is read back as float32.
        """
        save_ours(self.model, Path(folder), self.facts(), torch.float16 if half else torch.float32)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload what ``save_pretrained`` writes to the hub as owner/name; returns the commit's address."""
        return publish(self.model, repo_id, self.facts(), private, token)

    def facts(self) -> dict[str, Any]:
        """Return what config.json stores beside the model's keys, as plain data."""
        path = self.codec_config.path if self.codec_config else None
        text = {**asdict(self.reader.config), "fingerprint": self.reader.fingerprint} if self.reader else None
        return {
            "diffusion": asdict(self.diffusion),
            "codec": {"name": self.codec.name, "path": path, "fingerprint": self.codec.fingerprint},
            "classes": self.classes,
            "sample": asdict(self.sample),
            "about": dict(self.about),
            **({"text": text} if text else {}),
        }

    def check_conditions(self, prompts: Sequence[str] | None, labels: Sequence[int | str] | None) -> None:
        """Raise InputError unless there are prompts for a text model, labels for a class model, neither
        for an unconditional one.
        """
        self.check_prompts(prompts is not None)
        for label in labels or ():
            self.label(label)
        if self.model.config.num_classes is not None and labels is None and not self.reader:
            raise InputError(
                f"class_labels is missing, but {self.name} has the classes {self.describe_classes()}; pass names or numbers, "
                "or 'none' for the null (unconditional) class"
            )

    def check_prompts(self, present: bool) -> None:
        """Raise InputError unless prompts are ``present`` exactly for a text model."""
        if present and self.reader is None:
            raise InputError(
                f"a prompt was given, but {self.name} reads no text; leave it out, or use a model that was trained on captions"
            )
        if self.reader and not present:
            raise InputError(
                f"{self.name} reads text, but no prompt was given; give one, e.g. --prompt 'a red square moves left'"
            )

    def label(self, label: int | str) -> int:
        """Return the number of a class by name or number; 'none' and -1 are the null class. InputError
        lists the classes.
        """
        count = self.model.config.num_classes
        if self.reader:
            raise InputError(f"label {label!r} was given, but {self.name} reads text; give a prompt instead")
        if count is None:
            raise InputError(
                f"label {label!r} was given, but {self.name} is unconditional; leave the labels out"
            )
        numbers: dict[int | str, int] = {
            "none": -1,
            **{name: number for number, name in enumerate(self.classes)},
        }
        if isinstance(label, str) and label not in numbers and not re.fullmatch(r"-?\d{1,9}", label):
            return choose("label", label, numbers)
        number = int(numbers.get(label, label))
        check(
            -1 <= number < count,
            f"label {label!r} is out of range: {self.name} has the classes {self.describe_classes()}; give one of them",
        )
        return number

    def class_name(self, label: int) -> str:
        """Return the name of a class number, the number as text where classes have no names, 'none' for
        -1.
        """
        if label < 0:
            return "none"
        return self.classes[label] if self.classes else str(label)

    def describe_classes(self) -> str:
        """Return text such as '0 to 3 (up, down, left, right)'."""
        count = self.model.config.num_classes or 0
        return f"0 to {count - 1}" + (f" ({', '.join(self.classes)})" if self.classes else "")

    def frame_size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return (height, width) of the videos in pixels: ``size``, or what the model was trained with."""
        height, width = self.model.config.grid_size
        return size or (height * self.codec.downscale, width * self.codec.downscale)


def open_source(
    source: str | Path,
    codec_path: str | None = None,
    text_encoder_path: str | None = None,
    own_codec: bool = False,
) -> StoredModel:
    """Describe the model at any source that ``from_pretrained`` accepts; InputError for anything else.

    ``own_codec``: the caller supplies the codec, so its record is not read.
    """
    found = resolve(source)
    if found.run is not None:
        return open_run(found.path, own_codec)
    if found.kind == "weights":
        return open_weights_folder(found.path, found.name, own_codec)
    return open_external_model(found, codec_path, text_encoder_path)


def check_complete(stored: StoredModel, diffusion: DiffusionConfig | None, codec: Codec | None) -> None:
    """Raise InputError that lists what a source with the denoiser alone needs beside it."""
    actions = {
        "give its autoencoder with --codec-path or codec=": codec is None and stored.codec is None,
        "give its T5 with --text-encoder": stored.lacks_text,
        "pass the diffusion process that it was trained with as diffusion=": diffusion is None,
    }
    missing = "; ".join(action for action, needed in actions.items() if needed)
    check(
        not missing,
        f"{stored.name} holds only the denoiser, which generates latents: {missing} "
        "(VideoPipeline.save_pretrained records all of this)",
    )


def open_reader(
    stored: StoredModel, device: torch.device, path: str | None, bits: int | None, prompts: Sequence[str]
) -> PromptReader | None:
    """Return the prompt reader of a text model, after it has encoded ``prompts``; None for other models."""
    if stored.text is None:
        return None
    config: TextEncoderConfig = replace(
        stored.text, path=path or stored.text.path, bits=bits or stored.text.bits
    )
    reader = PromptReader(config, device, stored.text_fingerprint)
    if prompts:
        reader.learn(prompts)
    return reader


def open_codec(stored: StoredModel, codec: Codec | None, path: str | None, device: torch.device) -> Codec:
    """Return ``codec``, or the one that ``stored`` records; InputError unless the model was trained on its
    latents.
    """
    if codec is None:
        assert stored.codec is not None
        codec = build_codec(replace(stored.codec, path=path or stored.codec.path), device)
    check(
        stored.codec_fingerprint in (None, codec.fingerprint),
        f"codec is {codec.name} {codec.fingerprint}, but the model was trained on the latents of {stored.codec_fingerprint}; "
        "give the weights it was trained with by --codec-path",
    )
    return codec


Trained = VideoPipeline


def load_trained(
    source: str | Path = "builtin",
    device: str | torch.device = "auto",
    codec_path: str | None = None,
    text_encoder_path: str | None = None,
    prompts: Sequence[str] = (),
    lora: str | Path | None = None,
    decoder: str | None = None,
    text_bits: int | None = None,
    offload: bool = False,
) -> VideoPipeline:
    """Load a model as 0.1.0 did, with float32 matrix products. Deprecated: use
    ``VideoPipeline.from_pretrained``.
    """
    warnings.warn("load_trained is now VideoPipeline.from_pretrained", DeprecationWarning, stacklevel=2)
    return VideoPipeline.from_pretrained(
        source,
        dtype="fp32",
        device=device,
        codec_path=codec_path,
        text_encoder_path=text_encoder_path,
        text_bits=text_bits,
        decoder=decoder,
        lora=lora,
        offload=offload,
        prompts=prompts,
    )
