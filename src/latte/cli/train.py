# SPDX-License-Identifier: Apache-2.0
"""``latte train``: train, or go on with, a run."""

from pathlib import Path
from typing import Annotated

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
    """Train a run. The same command on the same folder goes on where it stopped; Ctrl-C saves first."""
    from latte.build import build
    from latte.config.run import load_run
    from latte.runtime import rank

    configure_logging()
    options = {"run.dir": out, "train.dtype": dtype, "run.seed": seed}
    words = [*(overrides or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]
    result = build(load_run(run, words)[0], device).train()
    code = result.pop("interrupted")
    if rank() == 0:
        lines = [f"{key}: {result[key]}" for key in ("run", "step", "loss", "checkpoint")]
        print_result(
            result,
            as_json,
            [
                *lines,
                f"stopped; resume with: {command_line('train', result['run'])}"
                if code
                else f"see: {command_line('sample', result['run'])}",
            ],
        )
    if code:
        raise typer.Exit(code)
