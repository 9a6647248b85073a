# SPDX-License-Identifier: Apache-2.0
"""The training loop: AdamW on the objective, an average of the weights, checkpoints, and an exact way back into a stopped run.

Nothing random outlives a step: clips, crops, timesteps, noise and dropped labels are functions of (seed, step, position), so a
checkpoint holds no random state. Weights, average, optimiser and the running sums of the curve are all there is; on the CPU a resumed
run is bit for bit the run that was never stopped (same machine, versions and number of threads).
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from latte.autoencoder.codec import Codec
from latte.checkpoint.lock import run_lock
from latte.checkpoint.record import describe_run
from latte.checkpoint.run import save_checkpoint
from latte.checks import InputError, choose, require
from latte.data.datasets import Dataset
from latte.data.joint import JointDataset
from latte.data.loader import Loader
from latte.diffusion.loss import Loss
from latte.diffusion.process import NoisePath
from latte.files import reported
from latte.interop.dit import MAPPINGS
from latte.interop.lora import LoraConfig
from latte.model.denoiser import Denoiser
from latte.runtime import DTYPES, resolve_dtype
from latte.tensors import tensors_sha256
from latte.training.callbacks import MetricsAccumulator, MetricsFile, Progress
from latte.training.condition import CaptionReader
from latte.training.distributed import Group, process_group
from latte.training.init import Start, adapt, start_from
from latte.training.optim import TrainState, learning_rate
from latte.training.resume import restore, run_facts
from latte.training.signals import StopRequest
from latte.training.step import Task, backward

TRAINING_DTYPES = {
    name: DTYPES.get(name) for name in ("auto", "fp32", "bf16")
}  # fp16 gradients underflow without loss scaling

# What may change in a run, with a notice.
SETTINGS = (
    "lr",
    "weight_decay",
    "warmup_steps",
    "decay_steps",
    "ema_decay",
    "ema_warmup",
    "clip_norm",
    "clip_start",
)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. ``global_batch`` is the setting; ``micro_batch``, devices and processes only divide it.

    Of a run that goes on, ``global_batch`` may not change, the optimiser's settings (lr to clip_start) and ``gate_steps`` may, with a
    notice, and everything else is free. InputError on construction for a value out of range.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    steps: int = 150_000  # where the paper's curves end
    global_batch: int = 8  # clips per step, over all processes
    micro_batch: int | None = None  # clips at once in one process; null: all of its share
    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0  # the last steps, in which the rate falls to 0; the paper's is constant
    ema_decay: float = 0.9999
    ema_warmup: bool = False  # a short average first, so that early samples are not those of fresh weights
    clip_norm: float | None = 0.1  # null: the norm is measured only
    clip_start: int = 0  # steps before clipping begins
    gate_steps: int = (
        1000  # of a model with text.gated_time: the step from which on its temporal table is whole
    )
    num_images: int = 0  # stills behind every clip (joint training, Sec. 3.3.4)
    dtype: str = "auto"
    compile: bool = False
    gradient_checkpointing: bool = (
        False  # keep only what goes into each block, compute the rest again for backward
    )
    init: str | None = None  # weights (file, folder, hub id, run or builtin) that a fresh run starts from
    init_mapping: str = "all"  # of a DiT: where its blocks go
    init_gaps: tuple[str, ...] = ()  # patterns of our names that may be missing there, or of another shape
    checkpoint_every: int = 10_000
    keep_last: int = 3
    sample_every: int = 0  # 0: no samples while training
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "gate_steps", "checkpoint_every", "keep_last", "log_every"):
            require(
                getattr(self, name) >= 1,
                f"train.{name}",
                getattr(self, name),
                "it counts something",
                "give 1 or more",
            )
        for name in (
            "weight_decay",
            "warmup_steps",
            "decay_steps",
            "clip_start",
            "num_images",
            "sample_every",
        ):
            require(
                getattr(self, name) >= 0,
                f"train.{name}",
                getattr(self, name),
                "it cannot be negative",
                "give 0 or more",
            )
        require(
            self.micro_batch is None or self.micro_batch >= 1,
            "train.micro_batch",
            self.micro_batch,
            "it counts clips",
            "give 1 or more, or null for all at once",
        )
        require(
            0 < self.lr < float("inf"),
            "train.lr",
            self.lr,
            "it is a step size",
            "give a number above 0, such as 1e-4",
        )
        require(
            0 <= self.ema_decay < 1,
            "train.ema_decay",
            self.ema_decay,
            "it is a share",
            "give 0 to below 1, such as 0.9999",
        )
        require(
            self.clip_norm is None or self.clip_norm > 0,
            "train.clip_norm",
            self.clip_norm,
            "it is a norm",
            "give a number above 0, or null to clip nothing",
        )
        choose("train.dtype", self.dtype, TRAINING_DTYPES)
        choose("train.init_mapping", self.init_mapping, MAPPINGS)
        require(
            self.init != "",
            "train.init",
            self.init,
            "it names weights",
            "give a file, a folder or a hub id, or null for random ones",
        )
        object.__setattr__(self, "init_gaps", tuple(self.init_gaps))  # JSON and YAML have lists

    @property
    def start(self) -> Start | None:
        """What a fresh run starts from, if not from random weights."""
        return None if self.init is None else Start(self.init, self.init_mapping, self.init_gaps)


def train(
    model: Denoiser,
    process: NoisePath,
    objective: Callable[..., Loss],
    codec: Codec | None,
    dataset: Dataset,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    facts: Mapping[str, object] | None = None,
    record: Mapping[str, object] | None = None,
    sample: Callable[[nn.Module, int], None] | None = None,
    captions: CaptionReader | None = None,
    until: int | None = None,
    lora: LoraConfig | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """Train ``model`` in place to ``config.steps``, going on from the newest good checkpoint in ``run_dir`` if there is one.

    With ``config.init`` a run without checkpoints starts from those weights, with the report in ``run_dir``/init.txt. With a ``lora`` that
    has a rank they are frozen and adapters trained in their stead: checkpoints hold the adapters alone, and going on needs the weights.
    ``captions`` turns a batch's captions into what a text model reads; a class model is told the labels. The gate of a text model that
    has one is opened step by step (``gate_share``), in the average, too; under adapters it is frozen like all the rest.
    ``codec`` may be None for a dataset of latents. ``facts`` (plain data) adds to what a resumed run must have in common with the
    run it goes on with; ``record`` is written to config.yaml. ``sample(ema_model, step)`` is called every ``sample_every`` steps and
    after the last, in the first process. ``workers`` processes load batches in advance (0: this process loads them). SIGINT and SIGTERM save at the end of the step and leave; so does step ``until``, for callers
    that look at a run on its way.

    Returns run, step, loss, checkpoint, weights_sha256 (of the average) and interrupted: 0, or the exit code 130 or 143.
    Raises InputError for parts that do not fit each other or the run, RunError for a full disk or a loss that is not finite.
    """
    device, run_dir, code = torch.device(device), Path(run_dir), 0
    end = config.steps if until is None else min(until, config.steps)
    clips = JointDataset(dataset, config.num_images) if config.num_images else dataset
    dtype = resolve_dtype(config.dtype, device)
    with process_group(device) as group, run_lock(run_dir) if group.rank == 0 else nullcontext():
        check_parts(model, codec, dataset, config, group)
        if config.start:
            group.run_on_rank0(
                start_from, model, config.start, run_dir, facts or {}, bool(lora and lora.rank)
            )
        model.to(device).train()
        model.gradient_checkpointing = config.gradient_checkpointing
        group.broadcast([*model.parameters(), *model.buffers()])
        adapters = {"lora": adapt(model, lora, seed)} if lora and lora.rank else {}
        learner = TrainState(model, config.lr, config.weight_decay, config.ema_decay, config.ema_warmup)
        common = {**run_facts(model, codec, clips, config.global_batch, seed), **(facts or {}), **adapters}
        gated = [] if adapters else [each for each in (model, learner.ema.model) if each.config.gated_time]
        settings = {name: getattr(config, name) for name in (*SETTINGS, *(("gate_steps",) if gated else ()))}
        state, saved = restore(run_dir, learner, common, settings, group)
        step, opened = state.get("step", 0), gated[0].opened if gated else 1.0
        if group.rank == 0:
            describe_run(
                run_dir,
                record or {"model": asdict(model.config), "train": asdict(config), "run": {"seed": seed}},
                device,
            )
        task = Task(
            model,
            torch.compile(model) if config.compile else model,
            process,
            objective,
            None if dataset.latent else codec,
            seed,
            config.global_batch,
            config.micro_batch,
            device,
            dtype,
            config.num_images,
        )
        share = config.global_batch // group.size
        positions = range(group.rank * share, (group.rank + 1) * share)
        tally = MetricsAccumulator(device, state.get("tally", {}))
        with (
            StopRequest() as stop,
            Loader(clips, seed, config.global_batch, step, end, group.rank, group.size, workers) as loader,
            MetricsFile(run_dir / "metrics.jsonl", step, group.rank == 0) as metrics,
            Progress(step, config.steps, group.rank == 0) as progress,
        ):
            while step < end and not code:
                waited, batch, step = loader.waited, next(loader), step + 1
                numbers = backward(
                    task, step, positions, batch.video, captions(batch.captions) if captions else batch.label
                )
                rate = learning_rate(step, config.lr, config.warmup_steps, config.decay_steps, config.steps)
                numbers = learner.update(
                    step, numbers, rate, config.clip_norm if step > config.clip_start else None, group
                )
                for each in gated:
                    each.open_gate(gate_share(step, opened, config.gate_steps))
                tally.add(numbers, config.global_batch, loader.waited - waited)
                code = group.max(stop.code)
                if step == 1 or step % config.log_every == 0:
                    learner.guard.check()
                    metrics.write(
                        {"step": step, "lr": rate, "clips": step * config.global_batch, **tally.line()}
                    )
                progress.update(step, tally)
                if step % config.checkpoint_every == 0 or step == end or code:
                    learner.guard.check()
                    with tally.pause():
                        metrics.sync()
                        state = {"facts": common, "settings": settings, "tally": tally.state()}
                        saved = group.run_on_rank0(
                            save_checkpoint, run_dir, step, learner.tensors(), state, config.keep_last
                        )
                if (
                    sample
                    and group.rank == 0
                    and config.sample_every
                    and (step % config.sample_every == 0 or step == config.steps)
                ):
                    learner.guard.check()
                    with tally.pause(), reported("samples", run_dir):
                        sample(learner.ema.model, step)
        return {
            "run": str(run_dir),
            "step": step,
            "loss": tally.latest_loss(),
            "checkpoint": str(saved) if saved else None,
            "weights_sha256": tensors_sha256(learner.tensors()["ema"]),
            "interrupted": code if step < end else 0,
        }


def gate_share(step: int, opened: float, gate_steps: int) -> float:
    """How far the gate is open after step 1, 2, ...: evenly up to 1 at step ``gate_steps``, and never less than it was, ``opened``.

    So weights whose gate is open keep it, whatever the run that starts from them or goes on says.
    """
    return min(1.0, max(opened, step / gate_steps))


def check_parts(
    model: Denoiser, codec: Codec | None, dataset: Dataset, config: TrainConfig, group: Group
) -> None:
    """Refuse parts that cannot be trained together, before anything is written."""
    require(
        len(dataset) > 0,
        "data",
        "empty",
        "there is no clip to train on",
        "give data.root a folder with readable videos",
    )
    if codec is None and not dataset.latent:
        raise InputError(
            "codec is missing, but the data are frames; give codec.name, or a folder of encoded latents"
        )
    require(
        config.global_batch % group.size == 0,
        "train.global_batch",
        config.global_batch,
        f"{group.size} processes share it evenly",
        f"give a multiple of {group.size}",
    )
    num_classes, found = model.config.num_classes, len(dataset.classes)
    if num_classes is not None:
        require(
            0 < found <= num_classes,
            "model.num_classes",
            num_classes,
            f"the data have {found} classes",
            f"give {found or 'null'}, or other data",
        )
