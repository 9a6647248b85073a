# SPDX-License-Identifier: Apache-2.0
"""``latte sample``, ``evaluate``, ``data encode`` and ``ablate`` in several processes: the same files as one
process writes, also when one of them fails and another number of processes goes on.
"""

import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_detector
from encoded import SHAPES, TWO_CLIPS, pixels
from latte.ablate import sweep
from latte.ablate.axes import make_settings
from latte.ablate.plan import Plan, base_config
from latte.checks import InputError, RunError
from latte.cli.main import app
from latte.config.run import load_run
from latte.data import encoder as encoding
from latte.data.encode import encode_dataset
from latte.distributed import Group, command_group
from latte.evaluation import features, protocols
from latte.evaluation import report as page
from latte.evaluation.detectors import DETECTORS
from latte.evaluation.evaluate import EvaluateConfig, evaluate
from latte.evaluation.sources import open_side
from latte.inference import outputs
from several import SECONDS, next_group, started, together
from tiny import WORDS
from tiny_detector import TINY, write_side

CPU = torch.device("cpu")
APART = ("train.log", ".lock", "env.json", "report.html", "command.txt")  # with times and places
TIMEOUT = 4.0  # seconds after which a process without a sign of life is taken for dead
SAMPLE = ["builtin-shapes", "--count", "7", "--batch", "2", "--steps", "2", "--device", "cpu"]


def program(*words: str) -> tuple[int, str]:
    """Return (exit code, stdout) of the program in this process."""
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as left:
        app(args=list(words), prog_name="latte")
    return left.value.code or 0, out.getvalue()


def generate(folder: Path, ranks: Group) -> Any:
    return program("sample", *SAMPLE, "--out", str(folder))


def encode(folder: Path, ranks: Group) -> Any:
    """Five shards."""
    config = replace(SHAPES, num_clips=10)
    return encode_dataset(config, pixels(), folder, shard_bytes=TWO_CLIPS, ranks=ranks)


def score(folder: Path, ranks: Group) -> Any:
    """Six shards of two clips."""
    page.PIXELS = 16
    features.SHARD = 2
    DETECTORS["tiny"] = tiny_detector.SPEC
    protocols.PROTOCOLS["tiny"] = TINY
    sides = [open_side(side, folder.parent.parent / side, folder / "probes") for side in ("real", "fake")]
    config = EvaluateConfig(protocol="tiny", device="cpu")
    return evaluate(*sides, config, folder, ranks=ranks)


def ablate(folder: Path, ranks: Group) -> Any:
    """Four runs, each measured twice."""
    words = [*WORDS, "data.frames=4", "diffusion.objective=paper", "train.steps=4"]
    base = base_config(load_run("shapes", words)[0])
    plan = Plan(base, "shapes", (), ("temporal_position",), folder, (0, 1), points=2, heldout=3, generated=2)
    settings = make_settings(base, plan.axes)[0]
    return sweep.sweep(plan, settings, CPU, lambda line: None, lambda: None, ranks)


JOBS: dict[str, Callable[[Path, Group], Any]] = {
    "sample": generate,
    "encode": encode,
    "evaluate": score,
    "ablate": ablate,
}
PLACES = {  # where a piece of each job's work is done: one process fails there
    "sample": (outputs, "write_mp4"),
    "encode": (encoding, "write_shard"),
    "evaluate": (features, "extract_rows"),
    "ablate": (sweep, "append"),
}


def run_job(name: str, folder: Path) -> Any:
    """Return what a job returned or the message of its error."""
    if name == "sample":  # opens the group itself
        return generate(folder, Group())
    try:
        with command_group(CPU, TIMEOUT) as ranks:
            return JOBS[name](folder, ranks)
    except (InputError, RunError) as error:
        return str(error)


def all_jobs(rank: int, folder: Path) -> dict[str, Any]:
    """Return what each job returned."""
    answers = {name: run_job(name, folder / name) for name in JOBS if not next_group()}
    size = os.environ["WORLD_SIZE"]
    if size == "3":
        next_group()
        words = ["--count", "1", "--steps", "2", "--device", "cpu", "--sequence-parallel", size]
        answers["shared"] = program(
            "sample", "builtin-shapes", *words, "--out", str(folder.parent / "shared")
        )
    return answers


def wait_for(path: Path) -> None:
    """Return when another process has written ``path``."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def failing_jobs(rank: int, folder: Path) -> dict[str, Any]:
    """Return the message of each job when rank 1 fails at its first piece of work, after another process has
    done one, and in the last job is killed there.
    """
    messages = {}
    for name in JOBS:
        next_group()
        calls = []
        place, function = PLACES[name]
        unbroken = getattr(place, function)

        def fail(*arguments: Any, name=name, calls=calls, unbroken=unbroken) -> Any:
            calls.append(1)
            done, begun = (folder.parent / f"{name}-{word}" for word in ("done", "begun"))
            if rank == 1:
                begun.touch()
                wait_for(done)
                if name == "ablate":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RunError("the disk is full")
            if len(calls) == 2:
                wait_for(begun)
            result = unbroken(*arguments)
            done.touch()
            return result

        setattr(place, function, fail)
        messages[name] = run_job(name, folder / name)
        setattr(place, function, unbroken)
    return messages


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """The videos that are scored."""
    folder = tmp_path_factory.mktemp("several")
    write_side(folder / "real", range(8))
    write_side(folder / "fake", range(50, 58))
    return folder


@pytest.fixture(scope="module")
def one(folders) -> Path:
    """The files of one process."""
    (answers,) = together(1, all_jobs, folders / "one")
    assert answers["sample"][0] == answers["ablate"] == 0
    assert isinstance(answers["encode"], dict)
    assert isinstance(answers["evaluate"], dict)
    return folders / "one"


@pytest.fixture(scope="module")
def three(folders) -> tuple[Path, list[dict[str, Any]]]:
    """The files of three processes, and what each returned."""
    return folders / "three", together(3, all_jobs, folders / "three")


@pytest.fixture(scope="module")
def broken(folders) -> tuple[Path, list[dict[str, Any]]]:
    """The files of three processes of which one failed, finished by two; the messages of those that lived."""
    folder = folders / "broken"
    with started(3, failing_jobs, folder) as (_, pipes):
        assert pipes[0].poll(SECONDS)
        assert pipes[2].poll(SECONDS)
        answers = [pipes[rank].recv() for rank in (0, 2)]
    assert all(good for good, _ in answers), answers
    left = {name: sorted(path.name for path in (folder / name).rglob("*")) for name in JOBS}
    together(2, all_jobs, folder)
    return folder, [*(answer for _, answer in answers), left]


def content(folder: Path) -> dict[str, bytes]:
    """Return every file of a job but what depends on the clock, the machine and the address of the folder."""
    return dict(files(folder))


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        timed = "/checkpoints/" in name and path.suffix == ".json"  # seconds, and hashes of files with them
        if not path.is_file() or timed or name.startswith("probes/") or path.name in APART:
            continue
        text = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".yaml"):
            text = b"\n".join(timeless(line) for line in text.replace(bytes(folder), b"FOLDER").splitlines())
        yield name, text


def timeless(line: bytes) -> bytes:
    """Return a line of JSON without times and the number of processes; another line as it is."""
    try:
        values = json.loads(line)
    except ValueError:
        return b"" if b"wall_seconds" in line or b'"processes"' in line else line
    if not isinstance(values, dict):
        return line
    kept = {key: value for key, value in values.items() if "second" not in key and key != "data_wait_share"}
    return json.dumps(kept).encode()


@pytest.mark.parametrize("name", JOBS)
def test_three_processes_write_what_one_writes(one, three, name):
    found, expected = (content(folder / name) for folder in (three[0], one))
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []
    assert len(expected) > 3


def test_three_processes_share_a_clip_and_its_record_says_so(folders, three):
    assert [answers["shared"][0] for answers in three[1]] == [0, 0, 0]
    names = {path.name for path in (folders / "shared").iterdir()}
    assert names == {"clips.json", "clips.gif", "sheet.png", "seed-0000-0-up.mp4"}
    facts = json.loads((folders / "shared" / "clips.json").read_text())["facts"]
    assert facts["sequence_parallel"] == 3


def test_rank_0_alone_prints(three):
    printed = [answers["sample"] for answers in three[1]]
    assert [code for code, _ in printed] == [0, 0, 0]
    assert [len(out.splitlines()) for _, out in printed] == [9, 0, 0]


def test_all_processes_return_the_same(three):
    for name in ("encode", "evaluate", "ablate"):
        answers = [answers[name] for answers in three[1]]
        assert answers[0] == answers[1] == answers[2]
    assert three[1][0]["encode"]["new_shards"] == 5


def test_a_process_that_fails_or_dies_ends_all_and_is_named(broken):
    for answers in broken[1][:2]:
        assert answers["sample"][0] == 1
        for name in ("encode", "evaluate"):
            assert answers[name] == "rank 1 of 3 failed: the disk is full"
        assert answers["ablate"].startswith("rank 1 of 3 did not answer within 4 s: it has stopped, died")
        assert "train.timeout" not in answers["ablate"]
    left = broken[1][2]
    assert any(name.startswith(".clips-") for name in left["sample"]), "the job was killed part-way"
    assert 0 < sum(name.startswith("shard-") for name in left["encode"]) < 5
    assert any(name.startswith("results-") for name in left["ablate"])


@pytest.mark.parametrize("name", JOBS)
def test_another_number_of_processes_finishes_what_is_left(one, broken, name):
    found, expected = (content(folder / name) for folder in (broken[0], one))
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []


def test_processes_that_do_not_share_the_work_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("evaluate", "ablate"):
        with pytest.raises(InputError, match=r"2 processes .*pass ranks="):
            JOBS[name](folders / "x" / name, Group())
    monkeypatch.setenv("RANK", "1")
    assert program("config", "list") == (0, ""), "rank 0 alone runs what is one process"
