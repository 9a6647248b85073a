# SPDX-License-Identifier: Apache-2.0
"""The training loop: one optimizer step per global batch, EMA weights, checkpoints, exact resume.

No random state outlives a step: clips, crops, timesteps, noise and dropped conditions are functions of
(seed, step, position in the batch). A checkpoint holds the weights, the EMA weights, the optimizer state
and the running sums of the metrics, and nothing else is needed: on the CPU a resumed run is bit for bit the
run that was never stopped (same machine, versions and number of threads).
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from latte.autoencoder.codec import Codec
from latte.checkpoint.lock import run_lock
from latte.checkpoint.record import describe_run
from latte.checkpoint.remote import fetch_run
from latte.checkpoint.run import list_checkpoints
from latte.checks import InputError, RunError
from latte.data.datasets import Dataset
from latte.data.fingerprint import write_listing
from latte.data.joint import JointDataset
from latte.data.loader import Batch, Loader, default_workers, share_of
from latte.data.order import order_of
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES, Loss
from latte.distributed import process_group
from latte.files import reported
from latte.interop.init import adapt, start_from
from latte.interop.lora import LoraConfig
from latte.model.denoiser import Denoiser
from latte.model.sequence import share_sequence
from latte.runtime import StopRequest, resolve_device, resolve_dtype
from latte.training.callbacks import (
    Callback,
    MetricsAccumulator,
    MetricsFile,
    ProgressBar,
    TrainEvent,
    ValidationFile,
    saved_metrics,
)
from latte.training.condition import CaptionReader
from latte.training.config import TrainConfig, check_schedule, gate_opening, learning_rate
from latte.training.custom import as_dataset, run_record
from latte.training.optim import TrainState
from latte.training.parallel import PARALLELISMS
from latte.training.parts import check_disk, check_parts
from latte.training.report import RunReport
from latte.training.resume import check_same, restore, run_facts
from latte.training.saving import Saver
from latte.training.step import Task, backward, set_up_blocks, step_options, with_dtype
from latte.training.trackers import Tracker
from latte.training.validation import Score, Validation, Watch, check_watching

DATA_FAILED = 1  # in the place of a signal's exit code: a process could not load its clips
Sample = Callable[..., Sequence[Path] | None]

__all__ = ["TrainConfig", "train"]


def train(
    *,
    model: Denoiser,
    dataset: Dataset | torch.utils.data.Dataset,
    config: TrainConfig | None = None,
    run_dir: str | Path = "runs/unnamed",
    codec: Codec | None = None,
    diffusion: DiffusionConfig | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    callbacks: Sequence[Callback] = (),
    captions: CaptionReader | None = None,
    lora: LoraConfig | None = None,
    sample: Sample | None = None,
    held_out: Dataset | torch.utils.data.Dataset | None = None,
    score: Score | None = None,
    objective: Callable[..., Loss] | None = None,
    facts: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    until: int | None = None,
    allow_data_change: bool = False,
    workers: int | None = None,
) -> dict[str, Any]:
    """Train ``model`` in place to ``config.steps``, resuming from the newest good checkpoint in ``run_dir``
    if there is one.

    Args:
        model: a Latte or LatteText. With ``config.init``, a fresh run loads those weights first (report in
            init.txt).
        dataset: one of ``latte.data.datasets``, or any map-style dataset of clips
            (``latte.training.custom.CustomDataset``).
        codec: encodes frames (f 3 H W) in [-1, 1]; None for a dataset of latents.
        callbacks: called in rank 0 at the events of the run (``latte.training.callbacks.Callback``).
        captions: turns the captions of a batch into the input of a text model; a class model gets the
            labels.
        lora: with a rank, the weights are frozen and adapters are trained; checkpoints hold the adapters
            only.
        sample: called as sample(ema_model, step) in rank 0 every ``config.sample_every`` steps and after
            the last one, and for each of ``config.ema_widths`` as sample(ema_model, step, "ema-WIDTH").
        held_out: clips that are not trained on, for ``config.validate_every``.
        score: called as score(ema_model, step) in rank 0 every ``config.score_every`` steps and after the
            last one; returns values by names such as score/fvd, the first of which decides
            ``config.keep_best`` (lower is better, unless the function has ``higher_is_better``).
        objective: a loss in the place of the one that ``diffusion.objective`` names.
        facts: plain data that a resumed run must have in common with its start, beside model, data,
            diffusion and seed.
        record: the content of config.yaml; by default what ``latte sample`` needs to load the run.
        until: stop at this step (for callers that look at a run between its steps).
        allow_data_change: resume although the data have changed, with a notice of what changed.
        workers: processes that load batches in advance (None: 0 on the CPU, else 4; 0: this one does).

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 save at the end of the step and stop. A clip that cannot be read
    saves, too.
    Returns run, step, loss, checkpoint, weights_sha256 (of the EMA weights) and interrupted: 0, or 128 +
    the signal's number; with ``config.keep_best`` also best, the path of that checkpoint.
    Raises InputError for parts that do not fit each other or the run, RunError for NaN/Inf, a full disk, a
    broken clip, or a process that does not answer.
    """
    config = config or TrainConfig()
    diffusion = diffusion or DiffusionConfig()
    run_dir = Path(run_dir)
    device = resolve_device("auto") if device == "auto" else torch.device(device)
    dataset = as_dataset(dataset, model, codec)
    others = held_out and as_dataset(held_out, model, codec)
    check_watching(config, others, score)
    clips = JointDataset(dataset, config.num_images) if config.num_images else dataset
    end = config.steps if until is None else min(until, config.steps)

    with (
        process_group(device, config.timeout) as group,
        run_lock(run_dir) if group.rank == 0 else nullcontext(),
    ):
        # Check the parts before anything is written.
        config = group.run_on_rank0(with_dtype, config, model.config, device, run_dir)
        check_parts(model, codec, dataset, config, group)
        adapters = lora if lora and lora.rank else None
        gated = model.config.gated_time and not adapters
        group.run_on_rank0(fetch_run, config.mirror, run_dir)
        fresh = not list_checkpoints(run_dir)
        notices = check_schedule(config, gated) if fresh else []
        run = {
            **run_facts(model, codec, clips, config, seed),
            "diffusion": asdict(diffusion),
            "classes": list(dataset.classes),
            **text_facts(captions),
            **(facts or {}),
        }
        check_same(run, group)

        # Model: pretrained weights, the same values in every process, adapters.
        if config.start:
            group.run_on_rank0(start_from, model, config.start, run_dir, run, adapters is not None)
        if buckets := getattr(dataset, "buckets", None):
            model.trained_on(bucket.latent for bucket in buckets.shapes)
        model.to(device).train()
        set_up_blocks(model, config, device)
        group.broadcast([*model.parameters(), *model.buffers()])
        if adapters:
            run["lora"] = adapt(model, adapters, seed)
        dtype = resolve_dtype(config.dtype, device)
        parallel = PARALLELISMS[config.parallel](model, group, config, device, dtype)
        state = TrainState(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            ema_decay=config.ema_decay,
            ema_warmup=config.ema_warmup,
            optimizer=config.optimizer,
            skeleton=parallel.skeleton,
            ema_widths=config.ema_widths,
        )
        team = share_sequence(model, group.teams(config.sequence_parallel))
        share = group.rank // config.sequence_parallel, config.shares(group.size)
        group.run_on_rank0(check_disk, run_dir, state, config.keep_last)

        # Resume.
        settings = config.changeable()
        if gated:
            settings["gate_steps"] = config.gate_steps
        files = getattr(clips, "files", {})
        saved, checkpoint = restore(run_dir, state, run, settings, group, allow_data_change, files)
        step = saved_step = first_step = saved.get("step", 0)
        gates: list[Any] = [model, *(ema.model for ema in state.emas.values())] if gated else []
        initial_opening = gates[0].opened if gates else 1.0
        if group.rank == 0:
            record = record or run_record(model, codec, diffusion, config, lora, seed)
            describe_run(run_dir, record, device)
            if files:
                write_listing(run_dir, files)
            for notice in [*notices, *finished(run_dir, step, config.steps)]:
                print(f"notice: {notice}", file=sys.stderr)

        # Loop state.
        task = Task(
            model=model,
            forward=parallel.forward,
            process=build_process(diffusion),
            objective=objective or OBJECTIVES[diffusion.objective],
            codec=None if dataset.latent else codec,
            seed=seed,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            device=device,
            dtype=dtype,
            num_images=config.num_images,
            options=step_options(config),
            accumulate=parallel.accumulate,
            loss_scale=parallel.loss_scale,
        )
        order = order_of(clips, seed, config.global_batch, share[1])
        seen = order.clips_before(step)
        accumulator = MetricsAccumulator(device, saved_metrics(saved))
        event = TrainEvent(
            run_dir, step, config.steps, model, state.ema.model, accumulator, record=record or {}
        )
        validation = None
        if others is not None and config.validate_every:
            validation = Validation(task, state.ema.model, others, captions, config.validate_clips, group)
        watch = Watch(config, validation, score, state.ema.model, group, saved.get("best") or {})
        metrics_file = MetricsFile(run_dir / "metrics.jsonl")
        files_written = [metrics_file]
        if config.validate_every or config.score_every:
            files_written.append(ValidationFile(run_dir / "validation.jsonl"))
        trackers = [Tracker(name) for name in config.trackers]
        watching: list[Callback] = []
        if group.rank == 0:
            watching = [*files_written, ProgressBar(), *trackers, *callbacks]
            if config.report and not any(isinstance(callback, RunReport) for callback in callbacks):
                watching.append(RunReport())

        with (
            StopRequest() as stop,
            Saver(run_dir, group, parallel.writers, config.async_save, config.mirror) as saver,
            Loader(
                clips,
                seed=seed,
                global_batch=config.global_batch,
                start=step,
                stop=end,
                rank=share[0],
                world=share[1],
                workers=default_workers(device, group.size) if workers is None else workers,
            ) as loader,
            notified(watching, event),
        ):
            while True:
                # Load the next batch. All processes stop together when one has a signal or a clip that it
                # cannot read.
                batch: Batch | None = None
                data_error: Exception | None = None
                waited = loader.waited
                stop_code = 0
                if step < end:
                    if not stop.code:
                        batch, data_error = load_next(loader)
                    stop_code = group.max(DATA_FAILED if data_error else stop.code)
                done = step >= end or stop_code != 0

                # Measure the EMA model, before the checkpoint that the result belongs to.
                is_best = False
                if step > first_step and watch.anything_due(step):
                    state.guard.check()
                    with accumulator.pause(), state.ema.gathered():
                        measured, is_best = watch.measure(step)
                        for values in measured:
                            for callback in watching:
                                callback.on_validation(event, values)

                # Save a checkpoint: of finite tensors only, with all earlier lines of metrics on the disk.
                if step > saved_step and (done or is_best or step % config.checkpoint_every == 0):
                    state.guard.check()
                    with accumulator.pause():
                        for file in files_written:
                            file.sync()
                        about = {"facts": run, "settings": settings, "metrics": accumulator.state()}
                        about |= watch.state()
                        saver.save(step, state.parts(), about, config.keep_last, watch.protected)
                        saved_step = step
                if done:
                    saver.close()
                for checkpoint in saver.committed():
                    for callback in watching:
                        callback.on_checkpoint(event, checkpoint)

                # Generate samples with the EMA models.
                due = config.sample_every and (step % config.sample_every == 0 or step == config.steps)
                if sample and due and step > first_step:
                    state.guard.check()
                    with accumulator.pause(), reported("samples", run_dir):
                        paths: list[Path] = []
                        for name, ema in state.emas.items():
                            width = () if ema is state.ema else (name,)
                            with ema.gathered():
                                paths += group.run_on_rank0(sample, ema.model, step, *width) or []
                        for callback in watching:
                            callback.on_samples(event, paths)

                if done or batch is None:
                    break

                # One optimizer step.
                step += 1
                condition = captions(batch.captions) if captions else batch.label
                positions = share_of(batch.global_batch, *share)
                lr = learning_rate(step, config.lr, config.warmup_steps, config.decay_steps, config.steps)
                max_norm = config.clip_norm if step > config.clip_start else None
                with group.computation():
                    losses = backward(task, step, positions, batch.video, condition, batch.global_batch)
                    saver.settle()
                    losses *= not (team and team.rank)  # those of the first of a team count
                    metrics = state.update(step, losses, lr, max_norm, group)
                for network in gates:
                    network.open_gate(gate_opening(step, initial_opening, config.gate_steps))

                # Report.
                accumulator.add(metrics, batch.global_batch, loader.waited - waited)
                seen += batch.global_batch
                event.step = step
                event.metrics = None
                if step == 1 or step % config.log_every == 0:
                    state.guard.check()
                    event.metrics = {"step": step, "lr": lr, "clips": seen, **accumulator.line()}
                for callback in watching:
                    callback.on_step(event)

        if stop_code == DATA_FAILED:
            raise data_failure(data_error, step, checkpoint) from data_error
        best = watch.best and str(run_dir / "checkpoints" / f"step-{watch.best['step']}")
        return {
            "run": str(run_dir),
            "step": step,
            "loss": accumulator.latest_loss(),
            "checkpoint": checkpoint and str(checkpoint),
            "weights_sha256": state.ema_sha256(),
            "interrupted": stop_code,
            **({"best": best} if best else {}),
        }


def finished(run_dir: Path, step: int, steps: int) -> list[str]:
    """Return a notice when there is nothing left to train."""
    if step < steps or step == 0:
        return []
    return [f"{run_dir} is already trained to step {step}; to train longer, raise train.steps (now {steps})"]


def text_facts(captions: CaptionReader | None) -> dict[str, Any]:
    """Return what identifies the text encoder of a run, as plain data; {} for a class model."""
    if captions is None:
        return {}
    return {"text": {"encoder": captions.features.fingerprint, "dropout": captions.dropout}}


def load_next(loader: Loader) -> tuple[Batch | None, Exception | None]:
    """Return the next batch, or the error that loading it raised."""
    try:
        return next(loader), None
    except Exception as error:
        return None, error


def data_failure(error: Exception | None, step: int, checkpoint: Path | None) -> Exception:
    """Return the error about clips that could not be loaded for the step after ``step``, with what was
    saved before.

    Errors that are not about the data (a bug in a custom dataset) are returned as they are.
    """
    saved = f"step {step} was saved in {checkpoint}" if checkpoint else "no step was completed"
    if error is None:
        return RunError(
            f"another process could not load its clips of step {step + 1}; {saved}; see its message"
        )
    if isinstance(error, InputError | RunError | OSError):
        return RunError(
            f"the clips of step {step + 1} could not be loaded: {error}; {saved}; restore the files and run "
            "the same command "
            "again, or, to resume with the data as they are now, add run.allow_data_change=true"
        )
    error.add_note(f"raised while loading the clips of step {step + 1}; {saved}")
    return error


@contextmanager
def notified(callbacks: Sequence[Callback], event: TrainEvent) -> Iterator[None]:
    """Call on_start of ``callbacks``, and on_end of those that were started however the block ends."""
    started: list[Callback] = []
    try:
        for callback in callbacks:
            callback.on_start(event)
            started.append(callback)
        yield
    finally:
        for callback in reversed(started):
            callback.on_end(event)
