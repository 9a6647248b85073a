# SPDX-License-Identifier: Apache-2.0
"""``latte train``: train or resume a run."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from latte.checks import command_line
from latte.cli.options import (
    OVERRIDABLE,
    Debug,
    Device,
    Json,
    Overrides,
    Run,
    TrainDtype,
    configure_logging,
    print_result,
)

LOG = logging.getLogger(__name__)
__all__ = ["OVERRIDABLE", "train"]

Out = Annotated[Path | None, typer.Option(help="The run's folder (run.dir); runs/RUN by default.")]
TrainSeed = Annotated[int | None, typer.Option("--seed", help="run.seed.")]


def train(
    run: Run,
    overrides: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    dtype: TrainDtype = None,
    seed: TrainSeed = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a run. The same command on the same folder resumes it.

    Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal save a checkpoint first.
    """
    from latte.config.run import load_run
    from latte.data.buckets import check_world
    from latte.runtime import rank, world_size

    configure_logging()
    options = {"run.dir": out, "train.dtype": dtype, "run.seed": seed}
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    config, _ = load_run(run, [*(overrides or []), *given])
    check_world(config.train.global_batch, config.train.shares(world_size()), config.buckets)
    from latte.build import build  # torch, after the settings were found good

    job = build(config, device)
    config = job.config
    score = None
    if config.train.score_every and job.codec is not None:
        from latte.scoring import Scorer

        score = Scorer(config, job.model, job.dataset, job.codec, job.captions, job.held_out)
    callbacks = []
    if rank() == 0:
        from latte.profile.header import ExpectedTime, header

        for line in header(config, job.model, job.dataset, job.held_out, job.device):
            LOG.info("%s", line)
        callbacks.append(ExpectedTime())
    result = job.train(callbacks=callbacks, score=score)
    code = result.pop("interrupted")
    if rank() == 0:
        loss = result["loss"]
        shown = {**result, "loss": loss if loss is None else f"{loss:.4g}"}
        lines = [
            f"{key}: {shown[key]}" for key in ("run", "step", "loss", "checkpoint", "best") if key in shown
        ]
        lines.append(next_command(result, list(job.dataset.captions) if job.captions else [], code))
        print_result(result, as_json, lines)
    if code:
        raise typer.Exit(code)


def next_command(result: dict[str, Any], captions: list[str], code: int) -> str:
    """Return the line that says how to resume a stopped run, or how to sample from a complete one.

    ``captions`` are those of the data of a text model, which needs a prompt.
    """
    run = result["run"]
    if code:
        return f"stopped; to resume: {command_line('train', run)}"
    prompt = ["--prompt", captions[0]] if captions else []
    return f"to generate clips: {command_line('sample', run, *prompt)}"
