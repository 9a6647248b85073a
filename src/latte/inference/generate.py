# SPDX-License-Identifier: Apache-2.0
"""Generate clips: seeds with labels or prompts -> noise -> latents -> frames.

Every clip has its own random stream, so the clip of a seed is the same, to rounding, in a batch of any size.
Axes: b batch, f latent frames, t frames, c channels, h height, w width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from latte.autoencoder.codec import Codec
from latte.checks import InputError, RunError, check, choose
from latte.data.clips import to_uint8
from latte.diffusion.caching import StepCaches
from latte.diffusion.config import check_cache
from latte.diffusion.frame_conditioning import DEFAULT_STRENGTH, condition_on_frames, restore_frames
from latte.diffusion.guidance import Condition, Model, guidance_window, guided
from latte.diffusion.long_video import (
    FRAME_GUIDED,
    LONG_VIDEO_METHODS,
    SampleFunction,
    partial_progress,
    window_starts,
)
from latte.diffusion.process import DenoiseFunction, Flow, Process
from latte.diffusion.samplers import SAMPLERS, Noise, indices, sample
from latte.inference.clip_shape import Shape, check_memory, clip_shape
from latte.inference.conditioning_frames import check_conditioning_frames, encode_frames
from latte.inference.config import SampleConfig as SampleConfig
from latte.inference.config import changed as changed
from latte.inference.prompts import Prompts
from latte.model.compiled import is_compiled
from latte.model.conditioning import NULL_LABEL
from latte.model.denoiser import Denoiser
from latte.model.low_bit import KINDS, low_bit
from latte.runtime import SampleNoise, borrowed, check_low_bit

Progress = Callable[[int, int], None]


def generate(
    model: Denoiser,
    process: Process | Flow,
    codec: Codec,
    seeds: Sequence[int],
    labels: Sequence[int] | None = None,
    config: SampleConfig | None = None,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    prompts: Prompts | None = None,
    window: int | None = None,
    longer: str = "freenoise",
    overlap: int | None = None,
    conditioning_frames: Mapping[int, np.ndarray] | None = None,
    conditioning_strength: float = DEFAULT_STRENGTH,
    decoder: Codec | None = None,
    offload: torch.device | None = None,
    estimates: Callable[[Tensor], None] | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Return an iterator over (seed, uint8 (t h w c)), one clip per seed in order, computed batch by batch.

    Each seed has a class number in ``labels`` (-1 or None: the null class), or a text model a prompt.
    ``frames`` of video and ``size``, (height, width) in pixels, default to what the model was trained with.
    ``dtype`` is the precision of matrix products. ``progress(done, total)`` counts denoising steps over all
    batches. The model sees ``window`` latent frames at a time, sharing ``overlap`` (None: half), joined by
    ``longer`` of LONG_VIDEO_METHODS. ``conditioning_frames``: {frame of the video, -1 the last: uint8 (h w c)
    of the clip's size}, with their guidance strength on the others. ``decoder`` decodes instead of ``codec``;
    parts visit the device ``offload`` while they compute. ``estimates``: see ``watched``. InputError at the
    call for settings that do not fit; RunError, while iterating, for NaN/Inf.
    """
    config, images = config or SampleConfig(), conditioning_frames or {}
    join = choose("longer", longer, LONG_VIDEO_METHODS)
    shape = clip_shape(model, codec, frames, size, window)
    length = shape[0] if window is None else window
    visited, inside = check_settings(process, codec, config, len(seeds), shape, length, overlap)
    check_conditioning_frames(images, codec, shape)
    device = offload or next(model.parameters()).device
    framed = conditioning_strength > 0 and (bool(images) or (longer in FRAME_GUIDED and shape[0] > length))
    check_cache_use(config, len(visited), framed)
    caches = StepCaches(config.cache, visited)
    denoiser = condition(model, labels, prompts, len(seeds), config.guidance, dtype, device, inside, caches)
    denoiser = watched(denoiser, process, estimates, window)
    walk = walker(config, process, device, conditioning_strength)

    def run() -> Iterator[tuple[int, np.ndarray]]:
        known, mask = encode_frames(images, codec, shape, offload)
        model.eval()
        parts = [slice(first, first + config.batch) for first in range(0, len(seeds), config.batch)]
        for index, part in enumerate(parts):
            advance = progress and partial_progress(progress, index, len(parts))
            drawn = SampleNoise(seeds[part]), known.to(device), mask
            with borrowed(model, device, next(model.parameters()).device):
                z = join(walk, denoiser(part), *drawn, length, overlap, advance)
            yield from zip(seeds[part], decode(decoder or codec, z, seeds[part], offload), strict=True)
        caches.log()

    return run()


def watched(
    denoiser: Callable[[slice], DenoiseFunction],
    process: Process | Flow,
    estimates: Callable[[Tensor], None] | None,
    window: int | None,
) -> Callable[[slice], DenoiseFunction]:
    """Return ``denoiser`` whose functions pass the z_0 (b f c h w) that each output implies to ``estimates``,
    itself without. InputError with a ``window``, where z_0 is no whole clip.
    """
    if estimates is None:
        return denoiser
    check(
        window is None,
        f"a preview shows whole clips, but with window {window} the model sees a part of one at a time; "
        "leave one of the two out",
    )

    def denoiser_of(part: slice) -> DenoiseFunction:
        denoise = denoiser(part)

        def call(z: Tensor, t: Tensor) -> Tensor:
            output = denoise(z, t)
            prediction, _ = process.split(output.detach(), z.detach())
            estimates(process.estimate(prediction, z.detach(), t)[0])
            return output

        return call

    return denoiser_of


def decode(decoder: Codec, z: Tensor, seeds: Sequence[int], offload: torch.device | None) -> np.ndarray:
    """Decode latents (b f c h w) to uint8 (b t h w c), on ``offload`` if given; RunError for NaN/Inf."""
    check_finite(z, seeds, "latent")
    with torch.no_grad(), borrowed(decoder, offload or decoder.device, decoder.device):
        video = decoder.decode(z)
    check_finite(video, seeds, "decoded video")
    return np.asarray(to_uint8(video))


def check_settings(
    process: Process | Flow,
    codec: Codec,
    config: SampleConfig,
    num_clips: int,
    shape: Shape,
    window: int,
    overlap: int | None,
) -> tuple[list[int], tuple[int, int] | None]:
    """Return the timesteps that the sampler visits, and the window of those that are guided; InputError, in
    one line, for settings that this process and clips of latent ``shape`` cannot have.
    """
    check_memory(min(config.batch, num_clips), shape, codec)
    window_starts(shape[0], window, overlap)
    visited = indices(SAMPLERS[config.sampler], process.num_steps, config.steps)
    return visited, guidance_window(process, config.guidance_interval, visited)


def check_cache_use(config: SampleConfig, num_steps: int, guided_by_frames: bool) -> None:
    """Raise InputError for a step cache with too few steps, or beside frame guidance: it needs gradients."""
    check_cache(config.cache, num_steps)
    check(
        config.cache is None or not guided_by_frames,
        f"cache is {config.cache}, but conditioning frames guide the others by the gradient of the model, "
        "which a repeated output does not have; leave the cache out, or set the guidance strength to 0",
    )


def check_finite(values: Tensor, seeds: Sequence[int], what: str) -> None:
    """Raise RunError that names the seeds whose ``values`` (b ...) hold NaN/Inf: codecs would decode them
    to black clips.
    """
    good = values.detach().isfinite().flatten(1).all(1)  # (b,)
    if not bool(good.all()):
        names = ", ".join(str(seed) for seed, fine in zip(seeds, good.tolist(), strict=True) if not fine)
        raise RunError(
            f"the {what} of seed {names} holds NaN/Inf; nothing of this batch was written; "
            "lower the guidance, use another sampler or --dtype fp32, or check the weights"
        )


def walker(
    config: SampleConfig, process: Process | Flow, device: torch.device, strength: float
) -> SampleFunction:
    """Return a function that samples with ``config`` and keeps conditioning frames, whose guidance
    strength is ``strength``.
    """

    def walk(
        denoise: DenoiseFunction,
        noise: Noise,
        known: Tensor,
        mask: Tensor,
        scale: float,
        progress: Progress | None,
    ) -> Tensor:
        conditioned = condition_on_frames(denoise, process, known, mask, scale * strength)
        shape = known.shape[1:]
        z = sample(
            config.sampler,
            conditioned,
            process,
            noise,
            shape,
            config.steps,
            config.eta,
            device,
            progress,
            config.order,
        )
        return restore_frames(z, known, mask)

    return walk


def condition(
    model: Denoiser,
    labels: Sequence[int] | None,
    prompts: Prompts | None,
    count: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device | None = None,
    window: tuple[int, int] | None = None,
    wrap: Callable[[Model, int], Model] = lambda call, num_clips: call,
) -> Callable[[slice], DenoiseFunction]:
    """Return a function from a slice of ``count`` clips to the guided denoiser with their labels or prompts.

    ``device`` is where the model computes, None: where it is now. ``window`` is that of ``guided``; ``wrap``
    (model, number of clips) -> the model to call, such as a StepCache. InputError for conditions that the
    model does not have.
    """
    device = device or next(model.parameters()).device
    plain = autocast(model, device, dtype)

    def guide(part: slice, given: Condition, null: Condition) -> DenoiseFunction:
        return guided(wrap(plain, len(range(count)[part])), given, null, scale, window)

    if not model.config.reads_text:
        check(
            prompts is None,
            "prompts were given, but this model reads no text; leave them out, or use a text model",
        )
        numbers = check_labels(model, labels, count)
        if numbers is None:
            return lambda part: guide(part, {}, {})
        null = torch.full_like(numbers, NULL_LABEL)
        return lambda part: guide(part, {"label": numbers[part].to(device)}, {"label": null[part].to(device)})
    if prompts is None or labels is not None:
        raise InputError("this model reads text: pass one prompt per clip, and no labels")
    check(
        len(prompts.text) == count,
        f"there are {len(prompts.text)} prompts, but there are {count} seeds; pass as many",
    )
    return lambda part: guide(part, *prompts.part(part, device))


def check_labels(model: Denoiser, labels: Sequence[int] | None, count: int) -> Tensor | None:
    """Return the labels as int64 (count,), None for an unconditional model; InputError for labels out of
    range.
    """
    classes = model.config.num_classes
    if classes is None:
        check(labels is None, f"labels are {labels}, but this model is unconditional; leave them out")
        return None
    if labels is None:
        labels = [-1] * count
    check(
        len(labels) == count,
        f"there are {len(labels)} labels, but there are {count} seeds; pass one label per seed",
    )
    for label in labels:
        check(
            -1 <= label < classes,
            f"label {label} is out of range: this model has the classes 0 to {classes - 1}, and -1 for none",
        )
    return torch.tensor(labels, dtype=torch.int64)


def autocast(model: Denoiser, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return ``model`` with its matrix products in ``dtype``; the model itself for float32.

    int8 leaves all else in float32, FP8 in bfloat16.
    """
    if dtype == torch.float32:
        return model
    if dtype in KINDS:
        check_low_bit(dtype, device)
        check(
            not is_compiled(model),
            f"--compile (compile=) does not reach the layers of dtype {KINDS[dtype].name}; leave one of them "
            "out",
        )
        model = low_bit(model, dtype, device)
        if dtype == torch.int8:
            return model
        dtype = torch.bfloat16

    def call(z: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return model(z, t, **conditions)

    return call
