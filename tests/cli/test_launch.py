# SPDX-License-Identifier: Apache-2.0
"""``latte launch``: the scripts start what they should, and a job goes back to the queue only when it may."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SRUN = """#!/bin/bash
echo "srun $1" >> log
shift
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" || code=$?
done
exit ${code:-0}
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> log
[ "$1" != show ] || printf 'first\\nsecond\\n'
"""
PROGRAM = """#!/bin/bash
echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT: ${@: -1}" >> log
exit $EXIT_CODE
"""


def start(folder: Path, script: str, code: int, **changes: str) -> tuple[int, list[str]]:
    """Run ``script`` with stand-ins for SLURM and for Python, which ends with ``code``; return exit code and
    log.
    """
    programs = {"srun": SRUN, "scontrol": SCONTROL, "program": PROGRAM}
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script = script.replace(shlex.quote(sys.executable), str(folder / "program"))
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "EXIT_CODE": str(code), "SLURM_JOB_ID": "20042"}
    environment |= {"SLURM_JOB_NODELIST": "node[1-2]", **changes}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=False)
    return done.returncode, (folder / "log").read_text().splitlines()


@pytest.mark.parametrize(("code", "expected", "requeued"), [(0, 0, False), (138, 0, True), (2, 2, False)])
def test_a_slurm_job_is_requeued_when_it_saved_before_its_time_ended(
    latte, tmp_path, code, expected, requeued
):
    found = latte("launch", "slurm", "shapes", "run.dir=a b's", "--gpus", "2", "--sbatch=--partition=gpu")
    assert found.code == 0
    assert "\n#SBATCH --signal=USR1@300\n" in found.out
    assert "\n#SBATCH --partition=gpu\n" in found.out
    returned, log = start(tmp_path, found.out, code)
    assert returned == expected
    tasks = [f"{rank}/2 {rank}/2 first 20042: run.dir=a b's" for rank in (0, 1)]
    assert log[:4] == ["scontrol show hostnames node[1-2]", "srun --kill-on-bad-exit=1", *tasks]
    assert log[4:] == (["scontrol requeue 20042"] if requeued else [])
    assert list(tmp_path.glob(".requeue*")) == []


def test_torchrun_is_started_with_the_run(latte, tmp_path):
    script = latte("launch", "torchrun", "shapes", "train.lr=2e-3", "--nodes", "2", "--gpus", "2").out
    code, log = start(tmp_path, script, 5, MASTER_ADDR="first")
    assert code == 5
    assert log == ["/ / first : train.lr=2e-3"]
    assert '--rdzv-endpoint "${MASTER_ADDR:?' in script
    assert "--standalone" in latte("launch", "torchrun", "shapes").out
    (tmp_path / "log").write_text("")
    assert start(tmp_path, script, 0)[0] != 0, "the first node is not named"


def test_a_file_is_written_that_can_be_run(latte, tmp_path):
    found = latte("launch", "slurm", "shapes", "--out", str(tmp_path / "job"))
    assert found.out == f"to start: sbatch {tmp_path / 'job'}\n"
    assert os.access(tmp_path / "job", os.X_OK)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pbs", "shapes"], "torchrun, slurm"),
        (["slurm", "shapes", "--gpus", "3"], "train.global_batch is 16, which 3 processes cannot share"),
        (["slurm", "shapes", "--nodes", "0"], "--nodes is 0"),
        (["torchrun", "shapes", "--restarts", "-1"], "--restarts is -1"),
        (["torchrun", "shapes", "train.lr=-1"], "train.lr"),
    ],
)
def test_what_cannot_be_started_is_refused(latte, words, message):
    found = latte("launch", *words)
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") == 1


def test_processes_that_cannot_share_a_batch_are_refused_and_named(latte, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    found = latte("train", "shapes")
    assert found.code == 2
    assert found.err == (
        "error: rank 1: train.global_batch is 16, which 3 processes cannot share evenly; "
        "give a multiple of 3\n"
    )
