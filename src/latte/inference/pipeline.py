# SPDX-License-Identifier: Apache-2.0
"""``VideoPipeline``: a trained model with its codec and text encoder, from a run, a weights folder, the hub
or the package.

Axes: b clips, t f frames, h height, w width, c channels.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar, Unpack

import numpy as np
import torch

from latte.autoencoder.codec import Codec, CodecConfig, decoder_for
from latte.checks import check, choose
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.guidance import Distilled
from latte.distributed import ALONE, Group, Team
from latte.inference.clip_shape import latent_shapes, recorded_extras
from latte.inference.generate import SampleConfig, generate
from latte.inference.outputs import (
    OUTPUT_TYPES,
    CallOptions,
    VideoPipelineOutput,
    check_output_folder,
    smallest_clip,
    write_clips,
)
from latte.inference.preview import Callback, step_options
from latte.inference.prompts import PromptReader
from latte.inference.quality import choose_settings
from latte.inference.requests import (
    Conditioned,
    Image,
    SampleRequest,
    as_list,
    choose_seeds,
    read_conditioning_frames,
    repeat,
)
from latte.inference.run_folder import open_source
from latte.inference.stored import Shapes, check_complete, offload_home, open_codec, open_reader
from latte.interop.export import publish, save_ours
from latte.interop.lora import CLIPS, load_lora, merged
from latte.model.compiled import compile_blocks
from latte.model.denoiser import Denoiser
from latte.model.fastest import dtype_for
from latte.runtime import DTYPES, resolve_device
from latte.tensors import tensors_sha256
from latte.text.encoders import same_weights

RENAMED_OPTIONS = {"given": "conditioning_frames", "given_strength": "conditioning_strength"}  # of 0.1.0
BatchProgress = Callable[[int, int], Callable[[int, int], None]]
T = TypeVar("T")


@dataclass(eq=False)
class VideoPipeline(Conditioned):
    """Generate videos: ``VideoPipeline.from_pretrained("builtin-shapes")(class_labels=["up"]).frames``.

    ``name`` is the source, ``weights`` the hash of the weights, ``classes`` the class names in label order,
    ``sample`` the default settings, ``reader`` the prompt reader of a text model, ``about`` the training
    metadata of the model card, ``buckets`` the shapes (frames, height, width) of a training on several.
    ``decoder`` replaces the codec's decoder. ``offload`` is the device that model and codec visit while they
    compute, None: they stay where they are. ``dtype`` is the precision of matrix products; weights stay
    float32.
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
    buckets: Shapes = ()
    distilled: Distilled | None = None

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
        compile: bool = False,
        prompts: Sequence[str] = (),
        ema: float | None = None,
    ) -> Self:
        """Load a model of the package, a run folder or one of its checkpoints, a weights folder, an external
        checkpoint or a hub id. InputError when a part is missing, altered or does not fit the model.

        A run provides its EMA weights. ``codec_path`` and ``text_encoder_path`` locate weights that have
        moved; ``codec`` and ``diffusion`` supply parts that the source does not record. ``decoder``: path or
        hub id of a KL autoencoder that decodes instead. ``text_bits`` 8 holds a T5 in int8. ``lora``:
        adapters to merge. ``offload``: as ``enable_model_cpu_offload``. ``compile``: torch.compile of the
        blocks. ``prompts`` are encoded now; others later. ``ema``: a width of a run's EMA weights.
        """
        work = resolve_device(device)
        home = offload_home(work) if offload else work
        stored = open_source(source, codec_path, text_encoder_path, codec is not None, ema)
        diffusion = stored.diffusion or diffusion
        check_complete(stored, diffusion, codec)
        assert diffusion is not None
        reader = open_reader(stored, work, text_encoder_path, text_bits, prompts)
        network, weights = stored.load()
        codec = open_codec(stored, codec, codec_path, home)
        parts = (diffusion, stored.codec, codec, stored.classes, stored.sample, weights)
        pipe = cls(stored.name, network.to(home), *parts)
        pipe.reader = reader
        pipe.about = stored.about
        pipe.buckets = stored.buckets
        pipe.distilled = stored.distilled
        network.trained_on(latent_shapes(codec, stored.buckets))
        pipe.dtype = dtype_for(dtype, work, network.config, stored.sample.batch, training=False)
        pipe.offload = work if offload else None
        if lora is not None:
            pipe.load_lora_weights(lora)
        if decoder is not None:
            pipe.decoder = decoder_for(pipe.codec, decoder)
        if compile:
            compile_blocks(pipe.model, work, "--compile (compile=)")
        return pipe

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | str | Sequence[int | str] | None = None,
        negative_prompt: str | None = None,
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
        callback_on_step_end: Callback | None = None,
        output_type: str = "np",
        **options: Unpack[CallOptions],
    ) -> VideoPipelineOutput:
        """Generate ``num_videos_per_prompt`` videos per prompt or class label.

        What is left out is the model's own: size, frames of video and ``self.sample``. Conditions: ``prompt``
        for a text model, ``negative_prompt`` is what guidance steers away from; ``class_labels``, names or
        numbers, for a class model, "none" and -1 are the null class. ``image`` and ``last_image`` are the
        first and the last frame (PIL image, array (h w c), tensor (c h w) or path), cropped and resized.

        Video i has the seed ``seed`` + i, or the i-th of a list, or one drawn from ``generator`` (None:
        torch's global one), and depends on nothing else of its batch. ``num_inference_steps`` is a count or a
        respacing such as "ddim50". ``callback_on_step_end(pipe, step, timestep, {})`` is called after each
        step of each batch. ``output_type``: a key of OUTPUT_TYPES. ``options``: see CallOptions.

        Returns ``.frames`` and ``.seeds``. InputError for arguments that do not fit, RunError for NaN/Inf.
        """
        convert = choose("output_type", output_type, OUTPUT_TYPES)
        count = num_videos_per_prompt
        check(count >= 1, f"num_videos_per_prompt must be at least 1, got {count}")
        prompts = as_list("prompt", prompt)
        labels = as_list("class_labels", class_labels)
        self.check_conditions(prompts, labels)
        seeds = choose_seeds(seed, generator, len(prompts or labels or [None]) * count)
        own = ("sampler", "eta", "order", "guidance_interval", "cache")
        changes = {"batch": options.pop("batch_size", None)} | {key: options.pop(key, None) for key in own}
        changes |= {"steps": num_inference_steps, "guidance": guidance_scale}
        config = self.settings(options.pop("quality", None), **changes)
        default = self.frame_size()
        size = height or default[0], width or default[1]
        with step_options(self, callback_on_step_end, options.pop("preview", False)) as watching:
            clips = self.generate(
                seeds,
                repeat(labels, count),
                repeat(prompts, count),
                negative_prompt or "",
                config=config,
                frames=num_frames,
                size=size,
                conditioning_frames=read_conditioning_frames(image, last_image, size),
                **watching,
                **options,
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
        options = {**defaults, **options}
        if self.distilled:
            self.distilled.check_settings(self.prediction, options["config"])
        if labels is not None:
            labels = [self.label(label) for label in labels]
        self.check_prompts(prompts is not None)
        if self.reader and prompts is not None:
            options["prompts"] = self.reader(prompts, negative)
        return generate(self.model, build_process(self.diffusion), self.codec, seeds, labels, **options)

    def write_clips(
        self,
        requests: Sequence[SampleRequest],
        folder: str | Path,
        negative: str = "",
        *,
        facts: Mapping[str, Any],
        progress: BatchProgress | None = None,
        ranks: Group = ALONE,
        team: Team | None = None,
        **options: Any,
    ) -> tuple[Path, Path]:
        """Make ``folder`` hold an mp4 per request, a gif and a contact sheet; clips that are there already
        are kept.

        ``facts`` is the record of what decides the pixels (see ``clip_facts``), ``options`` are those of
        ``generate``, ``progress(batch, batches)`` makes a batch's progress function; all ``ranks`` must call,
        those of a ``team`` share each clip. Returns (contact sheet, gif). InputError, before anything is
        computed, for settings that do not fit; RunError for a full disk and for NaN/Inf, with nothing of that
        batch written.
        """
        config = options.get("config", self.sample)
        batches = -(-len(requests) // config.batch)
        frames = options.get("frames") or self.num_frames
        smallest = smallest_clip(frames, *self.frame_size(options.get("size")))
        check_output_folder(folder, len(requests) * smallest)

        def run(number: int, part: Sequence[SampleRequest]) -> Iterator[tuple[int, np.ndarray]]:
            labels = [request.label for request in part if request.label is not None] or None
            prompts = [request.prompt for request in part if request.prompt is not None] or None
            if progress:
                options["progress"] = progress(number, batches)
            yield from self.generate([request.seed for request in part], labels, prompts, negative, **options)

        return write_clips(Path(folder), requests, run, facts, config.batch, config.fps, ranks, team)

    def settings(self, quality: str | None = None, **changes: Any) -> SampleConfig:
        """Return ``self.sample`` with ``quality``, a key of QUALITIES, and ``changes``, None for no change.

        InputError for settings that exclude each other.
        """
        return choose_settings(self.sample, self.prediction, quality, changes)

    @property
    def prediction(self) -> str:
        """Return what the model's output means, a key of PREDICTIONS."""
        return build_process(self.diffusion).prediction

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
            if isinstance(target, torch.dtype) or str(target) in DTYPES:
                self.dtype = choose(
                    "dtype", target, {**DTYPES, **{dtype: dtype for dtype in DTYPES.values()}}
                )
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
                f"the {part} of {self.name} is {fingerprint}, but the adapters in {folder} were trained with "
                f"{facts.get(part)}; use adapters of this model",
            )
        self.model = merged(self.model).to(next(self.model.parameters()).device)
        self.model.config = replace(self.model.config, **{key: facts[key] for key in CLIPS if facts.get(key)})
        self.model.trained_on([(self.model.config.num_frames, *self.model.config.grid_size)])
        self.name = f"{self.name}+{Path(folder).name}"
        self.classes = facts["classes"]
        self.weights = tensors_sha256(self.model.state_dict())

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write a weights folder that ``from_pretrained`` of this class and of the model's class read;
        RunError when the disk refuses.

        ``half`` stores float16, half the bytes; it is read back as float32.
        """
        dtypes = {True: torch.float16, False: torch.float32}
        save_ours(self.model, Path(folder), self.facts(), dtypes[half])

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Upload what ``save_pretrained`` writes to the hub as owner/name; returns the commit's address."""
        return publish(self.model, repo_id, self.facts(), private, token)

    def facts(self) -> dict[str, Any]:
        """Return what config.json stores beside the model's keys, as plain data."""
        path = self.codec_config and self.codec_config.path
        codec = {"name": self.codec.name, "path": path, "fingerprint": self.codec.fingerprint}
        facts = {"diffusion": asdict(self.diffusion), "codec": codec, "classes": self.classes}
        facts |= {"sample": self.sample.recorded(), "about": dict(self.about)}
        if self.reader:
            facts["text"] = {**asdict(self.reader.config), "fingerprint": self.reader.fingerprint}
        return facts | recorded_extras(self)

    @property
    def num_frames(self) -> int:
        """Return the frames of a video of the length that the model was trained with."""
        return self.codec.frames(self.model.config.num_frames)

    def frame_size(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return (height, width) of the videos in pixels: ``size``, or what the model was trained with."""
        height, width = self.model.config.grid_size
        return size or (height * self.codec.spatial_factor, width * self.codec.spatial_factor)


Trained = VideoPipeline


def load_trained(
    source: str | Path = "builtin",
    device: str | torch.device = "auto",
    codec_path: str | None = None,
    text_encoder_path: str | None = None,
    prompts: Sequence[str] = (),
    **options: Any,
) -> VideoPipeline:
    """Load a model as 0.1.0 did, with float32 matrix products. Deprecated: use ``from_pretrained``."""
    warnings.warn("load_trained is now VideoPipeline.from_pretrained", DeprecationWarning, stacklevel=2)
    options |= {"codec_path": codec_path, "text_encoder_path": text_encoder_path, "prompts": prompts}
    return VideoPipeline.from_pretrained(source, dtype="fp32", device=device, **options)
