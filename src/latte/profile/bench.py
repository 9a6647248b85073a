# SPDX-License-Identifier: Apache-2.0
"""How fast this machine is for a run: a question each about the model, its training step, the codec and the
data, all timed in turn in one process.

Nothing is read but the data: weights are random, of the model and the codec alike, since speed does not
depend on their values. Every answer is compared with two things timed in the same rounds, a large matrix
product and a forward pass of one clip. The table of questions is ``latte.cli.bench.QUESTIONS``.
Axes: b clips, f frames, f' latent frames, c channels, h w latent size, H W pixels.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import Tensor

from latte import __version__
from latte.autoencoder.codec import CODECS, Codec
from latte.checks import InputError, check, check_name
from latte.config.run import RunConfig
from latte.data.datasets import build_dataset
from latte.diffusion.config import build_process
from latte.diffusion.guidance import guidance_window, guided
from latte.diffusion.samplers import SAMPLERS, indices, sample
from latte.files import size_text
from latte.inference.generate import autocast
from latte.model.compiled import compile_blocks
from latte.model.fastest import busy_model, dtype_for
from latte.profile import flops
from latte.profile.kept import Counter
from latte.profile.memory import fresh, states
from latte.profile.plan import adapters, batches, memory
from latte.profile.step_time import TrainingStep
from latte.profile.timing import Task, Times, interleave, make_busy, matmul
from latte.runtime import SampleNoise, device_name, generator, memory_of, resolve_device
from latte.training.step import with_dtype

SAMPLED_STEPS = 2  # of the sampler, from which the time of all is computed
UNIT = "forward"  # the question that the others are compared with


@dataclass(frozen=True)
class Question:
    """Something to time: one run of ``task`` handles ``clips`` clips; ``facts`` are printed beside it."""

    task: Task
    clips: float
    facts: dict[str, Any]


class Parts:
    """What questions about one run share, made when it is first needed."""

    def __init__(self, config: RunConfig, device: torch.device, dtype: torch.dtype, compiled: bool = False):
        self.config = config
        self.device = device
        self.dtype = dtype  # of sampling
        self.compiled = compiled

    @cached_property
    def call(self) -> Callable[..., Tensor]:
        """The denoiser as sampling calls it."""
        model = busy_model(self.config.network, self.device).eval().requires_grad_(False)
        self.condition = {
            name: value.to(self.device)
            for name, value in model.example_condition(1, tokens=self.config.text.tokens).items()
        }
        if self.compiled:
            compile_blocks(model, self.device, "--compile")
        return autocast(model, self.device, self.dtype)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(f' c h w) of a clip's latent."""
        model = self.config.network
        return model.num_frames, model.latent_channels, *model.grid_size

    @cached_property
    def codec(self) -> Codec:
        """The codec with random weights."""
        settings = self.config.codec
        kind = CODECS[settings.name]
        network = kind.skeleton(settings.path).to_empty(device=self.device)
        draw = generator(0, "benchmark")
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.data.copy_(torch.randn(tensor.shape, generator=draw).mul_(0.02))
        codec = kind(network, settings.chunk, self.device)
        if settings.tile is not None:
            codec.enable_tiles(settings.tile)
        return codec


def forward(parts: Parts) -> Question:
    """One clip through the denoiser, without gradients."""
    call = parts.call
    z = torch.randn(1, *parts.latent_shape, generator=generator("bench")).to(parts.device)
    t = torch.full((1,), 500, device=parts.device)

    @torch.inference_mode()
    def run() -> None:
        call(z, t, **parts.condition)

    cost = flops.count(parts.config.network, parts.config.text.tokens)
    return Question(Task("forward", run, float(cost.operations)), 1, {"dtype": name_of(parts.dtype)})


def step(parts: Parts) -> Question:
    """A training step on latents of one micro batch: gradient, clipping, optimizer and EMA weights."""
    config = parts.config
    batch = batches(config, 1, None)
    state = states(config.network, adapters(config), config.train.optimizer, 1 + len(config.train.ema_widths))
    needed = memory(config, state, parts.device, Counter(), config.train, batch.micro_batch, 1)
    room = memory_of(parts.device)
    check(
        room is None or needed.total < room,
        f"a training step of {batch.micro_batch} clips needs {size_text(needed.total)}, but {parts.device} "
        f"has {size_text(room or 0)}; give a smaller train.micro_batch, or train.gradient_checkpointing=true",
    )
    trained = TrainingStep(
        make_busy(fresh(config.network, adapters(config))),
        build_process(config.diffusion),
        config.diffusion.objective,
        config.train,
        batch.micro_batch,
        parts.device,
        config.text.tokens,
    )
    cost = flops.count(config.network, config.text.tokens)
    run = Task("step", lambda: trained.update(trained.gradient()), 3.0 * cost.operations * batch.micro_batch)
    facts = {"dtype": name_of(trained.task.dtype), "accumulation": batch.accumulation}
    return Question(run, batch.micro_batch, facts)


def sampling(parts: Parts) -> Question:
    """The sampler of the run: the time of all its steps for one clip, from two that are run."""
    config = parts.config.sample
    process = build_process(parts.config.diffusion)
    visited = indices(SAMPLERS[config.sampler], process.num_steps, config.steps)
    window = guidance_window(process, config.guidance_interval, visited)
    call = parts.call
    scale = config.guidance if parts.condition else 1.0
    denoise = guided(call, parts.condition, parts.condition, scale)
    steps = min(SAMPLED_STEPS, len(visited))

    @torch.inference_mode()
    def run() -> None:
        noise = SampleNoise([0])
        sample(
            config.sampler,
            denoise,
            process,
            noise,
            parts.latent_shape,
            steps,
            config.eta,
            parts.device,
            order=config.order,
        )

    inside = [t for t in visited if window is None or window[0] <= t <= window[1]]
    facts = {
        "sampler": config.sampler,
        "guidance": scale,
        "steps": len(visited),
        "guided_steps": len(inside) * (scale != 1),
        "steps_run": steps,
    }
    return Question(Task("sample", run), 1, facts)


def encoding(parts: Parts) -> Question:
    """The codec's encoder, one clip."""
    data = parts.config.data
    video = torch.rand(1, data.frames, 3, *data.size, generator=generator("bench")) * 2 - 1  # (1 f 3 H W)
    operations = flops.encoding_operations(parts.config.codec, data.frames, data.size)
    codec = parts.codec
    return Question(Task("encode", lambda: codec.encode(video), float(operations)), 1, {"codec": codec.name})


def decoding(parts: Parts) -> Question:
    """The codec's decoder, one clip."""
    codec = parts.codec
    z = torch.randn(1, *parts.latent_shape, generator=generator("bench"))  # (1 f' c h w)
    return Question(Task("decode", lambda: codec.decode(z)), 1, {"codec": codec.name})


def data(parts: Parts) -> Question:
    """Reading or drawing one clip of the run's data, in this process."""
    dataset = build_dataset(parts.config.data, buckets=parts.config.buckets)
    indices = count()

    def run() -> None:
        index = next(indices)
        dataset.clip(index % len(dataset), generator(0, "clip", index))

    return Question(Task("data", run), 1, {"kind": parts.config.data.kind})


def measure(
    config: RunConfig,
    questions: Mapping[str, Callable[[Parts], Question]],
    only: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    rounds: int = 5,
    seconds: float = 0.3,
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Return the answer to each of ``questions``, or of ``only``, on ``device``, in the table's order.

    An answer is a line of plain data: ``median_s`` seconds of a run of ``clips`` clips, ``clips_per_second``,
    ``over_forward`` (the seconds of a clip over those of a forward pass, round by round), ``share_of_matmul``
    where operations are known. A question that this run or machine cannot answer has ``skipped``, the
    reason; when ``only`` names it, that is an InputError.
    """
    check(rounds >= 1, f"--rounds is {rounds}, but it must be at least 1")
    for name in only:
        check_name("--only", name, questions)
    resolved = resolve_device(device)
    train = with_dtype(config.train, config.network, resolved)
    config = replace(config, train=train)
    parts = Parts(config, resolved, dtype_for(dtype, resolved, config.network, 1, False), compiled)
    asked = {UNIT: forward(parts)}
    lines = {}
    chosen = [name for name in questions if not only or name in only]
    for name in chosen:
        try:
            if name not in asked:
                asked[name] = questions[name](parts)
        except (InputError, OSError) as error:
            if name in only:
                raise
            lines[name] = {"what": name, "skipped": str(error)}
    yard = matmul(resolved, torch.bfloat16 if resolved.type == "cuda" else torch.float32)
    tasks = [*(question.task for question in asked.values()), yard]
    times = interleave(tasks, resolved, rounds, seconds, float("inf"), progress)
    shared = {
        "machine": device_name(resolved),
        "device": resolved.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "latte": __version__,
        "rounds": len(times.loads),
        "other_load": round(median(times.loads), 3),
    }
    for name in chosen:
        if name not in lines:
            lines[name] = answer(name, asked[name], yard, times) | shared
    if "sample" in lines and "skipped" not in lines["sample"]:
        lines["sample"] |= latency(lines["sample"], times)
    return [lines[name] for name in chosen]


def answer(name: str, question: Question, yard: Task, times: Times) -> dict[str, Any]:
    """Return the line of one question."""
    seconds = times.median(name)
    line = {
        "what": name,
        **question.facts,
        "clips": question.clips,
        "median_s": round(seconds, 6),
        "spread": round(times.spread(name), 4),
        "clips_per_second": round(question.clips / seconds, 4),
        "over_forward": round(times.ratio(name, UNIT) / question.clips, 4),
    }
    operations = question.task.operations
    if operations:
        share = operations / yard.operations / times.ratio(name, yard.name)
        line |= {"gflops": round(operations / seconds / 1e9, 1), "share_of_matmul": round(share, 4)}
    return line


def latency(line: dict[str, Any], times: Times) -> dict[str, Any]:
    """Return the seconds of denoising one clip, and with decoding if that was timed."""
    guided_steps = line["guided_steps"]
    one_step = line["median_s"] / line["steps_run"]
    rest = line["steps"] - guided_steps
    plain = one_step if line["guidance"] == 1 else times.median(UNIT)
    denoising = guided_steps * one_step + rest * plain
    found = {"denoising_s": round(denoising, 4), "clips_per_second": round(1 / denoising, 4)}
    if "decode" in times.seconds:
        found["clip_s"] = round(denoising + times.median("decode"), 4)
    return found


def summary(lines: Iterable[dict[str, Any]], config: RunConfig) -> list[str]:
    """Return sentences about what the answers mean for training and sampling."""
    found = {line["what"]: line for line in lines if "skipped" not in line}
    sentences = []
    if "step" in found:
        per_clip = 1 / found["step"]["clips_per_second"]
        hours = per_clip * config.train.global_batch * config.train.steps / 3600
        sentences.append(
            f"training on latents: {config.train.steps:,} steps of {config.train.global_batch} clips take "
            f"{hours:,.2f} hours"
        )
        if "encode" in found and config.data.kind != "latents":
            extra = found["encode"]["median_s"] / per_clip
            sentences.append(
                f"encoding in every step adds {extra:.0%}; latte data encode does it once for all steps"
            )
    if "clip_s" in found.get("sample", {}):
        line = found["sample"]
        sentences.append(
            f"a clip: {line['clip_s']:.2f} s, of which {line['steps']} steps of {line['sampler']} take "
            f"{line['denoising_s']:.2f} s"
        )
    load = max((line["other_load"] for line in found.values()), default=0)
    if load > 0.1:
        sentences.append(
            f"other programs used {load:.0%} of the processor: seconds are too high, ratios still hold"
        )
    return sentences


def name_of(dtype: torch.dtype) -> str:
    """Return the dtype's name without torch."""
    return str(dtype).removeprefix("torch.")
