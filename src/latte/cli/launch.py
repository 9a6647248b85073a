# SPDX-License-Identifier: Apache-2.0
"""``latte launch``: write the script that trains a run in several processes, for torchrun or SLURM."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from latte.checks import check, choose
from latte.cli.options import OVERRIDABLE, Debug, Json, Overrides, Run, print_result

__all__ = ["OVERRIDABLE", "launch"]


@dataclass(frozen=True)
class Launch:
    """What a script starts, and where."""

    words: list[str]  # behind latte train
    nodes: int
    gpus: int  # processes per node
    restarts: int
    time: str
    save_before: int  # seconds
    sbatch: list[str]


def torchrun_script(launch: Launch) -> str:
    """Return a script that starts torchrun; several nodes run it each, and MASTER_ADDR names the first."""
    where = "--standalone"  # this machine
    if launch.nodes > 1:
        address = '"${MASTER_ADDR:?must name the first node}:${MASTER_PORT:-29500}"'
        where = f"--nnodes {launch.nodes} --rdzv-backend c10d --rdzv-id latte --rdzv-endpoint {address}"
    return f"""#!/bin/bash
set -eu
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
exec {shlex.quote(sys.executable)} -m torch.distributed.run {where} \\
    --nproc-per-node {launch.gpus} --max-restarts {launch.restarts} \\
    -m latte train {shlex.join(launch.words)}
"""


def slurm_script(launch: Launch) -> str:
    """Return a batch script for sbatch, which goes back to the queue when its time ends before training does.

    SIGUSR1 saves a checkpoint and ends ``latte train`` with exit code 138. A task then leaves with 0, so that
    srun does not kill those that are not done yet.
    """
    options = "".join(f"#SBATCH {option}\n" for option in launch.sbatch)
    return f"""#!/bin/bash
#SBATCH --job-name=latte
#SBATCH --nodes={launch.nodes}
#SBATCH --ntasks-per-node={launch.gpus}
#SBATCH --gpus-per-node={launch.gpus}
#SBATCH --time={launch.time}
#SBATCH --signal=USR1@{launch.save_before}
#SBATCH --requeue
#SBATCH --open-mode=append
{options}set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
LATTE_REQUEUE="$PWD/.requeue-$SLURM_JOB_ID"
OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
export MASTER_ADDR MASTER_PORT LATTE_REQUEUE OMP_NUM_THREADS
code=0
srun --kill-on-bad-exit=1 bash -c '
trap : USR1
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE={launch.gpus}
code=0
"$@" || code=$?
if [ $code -eq 138 ]; then
    touch "$LATTE_REQUEUE"
    code=0
fi
exit $code' latte {shlex.join([sys.executable, "-m", "latte", "train", *launch.words])} || code=$?
if [ -e "$LATTE_REQUEUE" ]; then
    rm -f "$LATTE_REQUEUE"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


class Launcher(NamedTuple):
    """An entry of ``LAUNCHERS``."""

    script: Callable[[Launch], str]
    starter: str  # the program that starts a script


LAUNCHERS = {"torchrun": Launcher(torchrun_script, "bash"), "slurm": Launcher(slurm_script, "sbatch")}


def launch(
    kind: Annotated[str, typer.Argument(metavar="torchrun|slurm", help="What starts the processes.")],
    run: Run,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(help="Processes per machine, one for each GPU.")] = 1,
    restarts: Annotated[
        int, typer.Option(help="torchrun: restarts after a process failed; each resumes the run.")
    ] = 3,
    time: Annotated[str, typer.Option(metavar="HH:MM:SS", help="slurm: time limit of a job.")] = "24:00:00",
    save_before: Annotated[
        int, typer.Option(metavar="SECONDS", help="slurm: save and requeue so long before the limit.")
    ] = 300,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="OPTION", help="slurm: another #SBATCH line, e.g. --sbatch=--partition=gpu."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; stdout by default.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the script that trains a run in several processes; the settings are checked first."""
    from latte.config.run import load_run
    from latte.data.buckets import check_world
    from latte.files import commit_file, reported

    launcher = choose("the launcher", kind, LAUNCHERS)
    for name, value in (("--nodes", nodes), ("--gpus", gpus), ("--save-before", save_before)):
        check(value >= 1, f"{name} is {value}, but it must be at least 1")
    check(restarts >= 0, f"--restarts is {restarts}, but it must be at least 0")
    config, _ = load_run(run, overrides or [])
    check_world(config.train.global_batch, config.train.shares(nodes * gpus), config.buckets)
    words = [run, *(overrides or [])]
    script = launcher.script(Launch(words, nodes, gpus, restarts, time, save_before, sbatch or []))
    if out is not None:
        with reported("the script", out):
            commit_file(out, script)
            out.chmod(0o755)
        print_result({"script": str(out)}, as_json, [f"to start: {shlex.join([launcher.starter, str(out)])}"])
        return
    print_result({"script": script}, as_json, [script.rstrip("\n")])
