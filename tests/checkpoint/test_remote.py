# SPDX-License-Identifier: Apache-2.0
"""A run whose checkpoints are copied to a store goes on anywhere; a store that fails costs nothing here."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from latte.checkpoint import remote
from latte.checkpoint.remote import MANIFEST, Mirror, Store, fetch_run, local_copy
from latte.checkpoint.run import list_checkpoints, load_checkpoint, save_checkpoint
from latte.checks import InputError, RunError
from latte.training.config import TrainConfig
from tiny_runs import SHORT, assert_same, run


@pytest.fixture
def memory():
    """A store in memory."""
    store = fsspec.filesystem("memory")
    yield "memory://bucket/run"
    store.store.clear()
    store.pseudo_dirs[:] = [""]


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path, memory) -> str:
    """URL of a store that this process has."""
    return {"memory": memory, "file": f"file://{tmp_path / 'store'}"}[request.param]


def steps_in(url: str) -> list[str]:
    """The complete checkpoints of a store."""
    return Store(url, "x").checkpoints()


def moved_on(url: str, tmp_path: Path) -> None:
    """A run is copied as it goes; continued elsewhere it ends bit for bit as one that never moved."""
    config = replace(SHORT, mirror=url)
    run(tmp_path / "here", config, until=7)
    assert steps_in(url)[-1] == "step-7"
    run(tmp_path / "there", config)
    found = steps_in(url)
    assert found[-1] == "step-12"
    assert set(found) <= {"step-9", "step-12"}, "those that the run has removed are removed there, too"
    run(tmp_path / "straight", SHORT)
    assert_same(tmp_path / "there", tmp_path / "straight")
    run(tmp_path / "third", config)
    assert [path.name for path in list_checkpoints(tmp_path / "third")] == ["step-12"]
    assert {"metrics.jsonl", "config.yaml", "env.json"} <= set(Store(url, "x").names())
    stale = replace(config, steps=12)
    run(tmp_path / "here", stale)  # at step 7: the newer checkpoint is fetched
    assert_same(tmp_path / "here", tmp_path / "straight")


def test_a_run_resumes_from_its_copy(url, tmp_path):
    moved_on(url, tmp_path)


def checkpoint(run_dir: Path, step: int) -> Path:
    return save_checkpoint(run_dir, step, {"ema": {"w": torch.ones(3)}}, {}, keep=2)


def test_a_copy_without_its_manifest_is_none_and_a_damaged_one_is_passed_over(memory, tmp_path, capsys):
    mirror = Mirror(memory, tmp_path)
    for step in (1, 2, 3):
        mirror.copy(checkpoint(tmp_path, step))
    store = Store(memory, "x")
    store.remove("checkpoints", "step-3", MANIFEST)
    assert steps_in(memory) == ["step-2"]
    mirror.copy(tmp_path / "checkpoints/step-3")
    mirror.copy(checkpoint(tmp_path, 4))
    store.fs.pipe_file(store.path("checkpoints", "step-4", "ema.safetensors"), b"cut")
    fetch_run(memory, tmp_path / "new")
    warning, notice = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {memory}/checkpoints/step-4 was passed over: checkpoint ")
    assert "ema.safetensors has" in warning
    assert notice == f"notice: step-3 was fetched from {memory}"
    assert [path.name for path in list_checkpoints(tmp_path / "new")] == ["step-3"]
    assert not list((tmp_path / "new/checkpoints").glob(".*"))
    store.fs.pipe_file(store.path("checkpoints", "step-3", "ema.safetensors"), b"cut")
    with pytest.raises(InputError, match=r"no checkpoint of .* can be read, all 2 are damaged"):
        fetch_run(memory, tmp_path / "other")


def test_a_full_store_warns_and_is_tried_again_and_the_end_of_the_run_says_what_is_missing(
    memory, tmp_path, capsys, monkeypatch
):
    def full(*arguments: object) -> None:
        raise OSError(errno.EDQUOT, "Quota exceeded")

    mirror = Mirror(memory, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(type(mirror.store.fs), "put_file", full)
        mirror.push(checkpoint(tmp_path, 1))
        mirror.wait()
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1
        assert (
            "step-1 could not be copied to train.mirror ([Errno 122] Quota exceeded); training goes"
            in warning
        )
        with pytest.raises(RunError, match=r"step-1 is complete, but it could not be copied to .*make room"):
            mirror.flush()
        with pytest.raises(RunError, match="step-2 is complete"):
            run(tmp_path / "run", replace(SHORT, steps=2, mirror=memory))
        assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-2"]
    mirror.push(checkpoint(tmp_path, 2))
    mirror.flush()
    assert steps_in(memory) == ["step-2"]
    run(tmp_path / "run", replace(SHORT, steps=2, mirror=memory))
    assert steps_in(memory) == ["step-2"]


def test_the_manifest_is_copied_last(memory, tmp_path, monkeypatch):
    copied = []
    real = Store.put

    def put(store: Store, file: Path, *names: str) -> None:
        copied.append(names[-1])
        real(store, file, *names)

    monkeypatch.setattr(Store, "put", put)
    Mirror(memory, tmp_path).copy(checkpoint(tmp_path, 1))
    assert sorted(copied[:-1]) == ["ema.safetensors", "state.json"]
    assert copied[-1] == MANIFEST


def test_one_copy_at_a_time_and_the_newest_next(memory, tmp_path, monkeypatch, capsys):
    gate = threading.Event()
    copied = []
    real = Mirror.copy

    def slow(mirror: Mirror, path: Path) -> None:
        copied.append(path.name)
        assert gate.wait(60)
        real(mirror, path)

    monkeypatch.setattr(Mirror, "copy", slow)
    mirror = Mirror(memory, tmp_path)
    for step in (1, 2, 3, 4):
        mirror.push(checkpoint(tmp_path, step))
        while not copied:
            time.sleep(0.01)
    assert copied == ["step-1"]
    shutil.rmtree(tmp_path / "checkpoints/step-1", ignore_errors=True)  # removed while it is copied
    gate.set()
    mirror.flush()
    assert copied == ["step-1", "step-4"]
    assert capsys.readouterr().err == "", "a checkpoint that the run has removed is not missing"
    assert steps_in(memory) == ["step-4"]


def test_a_store_that_cannot_be_used_is_one_line_before_training(tmp_path, monkeypatch):
    for url, message in {
        "nowhere://bucket/x": "cannot be opened .*install the package",
        "s3://user:secret@host/x": "without a user name",
        f"file://{tmp_path / 'file' / 'x'}": "cannot be used .*check the address",
    }.items():
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=message) as caught:
            run(tmp_path / "run", replace(SHORT, mirror=url))
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="must be a URL such as"):
        TrainConfig(mirror="/a/path")
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 0.1)
    hanging = Store("memory://x", "train.mirror")
    with pytest.raises(InputError, match=r"no answer within 0\.1 s"):
        hanging.asked(time.sleep, 2)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_store_that_does_not_answer_does_not_keep_the_process():
    code = (
        "import time\n"
        "from latte.checkpoint import remote\n"
        "remote.ANSWER_SECONDS = 0.1\n"
        "try:\n"
        "    remote.Store('memory://x', 'train.mirror').asked(time.sleep, 3600)\n"
        "except remote.InputError:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert done.stdout == "refused\n", done.stderr


def test_what_a_copy_left_of_a_removed_checkpoint_is_removed(url, tmp_path):
    mirror = Mirror(url, tmp_path)
    store = Store(url, "x")
    store.put(checkpoint(tmp_path, 1) / "ema.safetensors", "checkpoints", "step-1", "ema.safetensors")
    for step in (2, 3):
        checkpoint(tmp_path, step)
    mirror.copy(tmp_path / "checkpoints/step-3")
    assert store.names("checkpoints") == ["step-3"], "nor an empty folder"
    assert steps_in(url) == ["step-3"]


def test_a_fetch_that_is_interrupted_loses_no_metrics(memory, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/metrics.jsonl").write_text("{}\n")
    Mirror(memory, tmp_path / "here").copy(checkpoint(tmp_path / "here", 1))
    real = Store.get

    def stop(store: Store, file: Path, *names: str) -> None:
        if names == ("metrics.jsonl",):
            raise InputError("the network is gone")
        real(store, file, *names)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "get", stop)
        with pytest.raises(InputError, match="the network is gone"):
            fetch_run(memory, tmp_path / "there")
    fetch_run(memory, tmp_path / "there")
    assert (tmp_path / "there/metrics.jsonl").read_text() == "{}\n"
    assert [path.name for path in list_checkpoints(tmp_path / "there")] == ["step-1"]


def test_the_best_checkpoint_is_fetched_too(memory, tmp_path, capsys):
    mirror = Mirror(memory, tmp_path)
    for step in (1, 2, 3):
        about = {"best": {"step": 1}}
        mirror.copy(save_checkpoint(tmp_path, step, {"ema": {"w": torch.ones(3)}}, about, 1, {1}))
    assert steps_in(memory) == ["step-1", "step-3"]
    fetch_run(memory, tmp_path / "there")
    assert [path.name for path in list_checkpoints(tmp_path / "there")] == ["step-1", "step-3"]
    assert load_checkpoint(tmp_path / "there/checkpoints/step-1").step == 1
    Store(memory, "x").remove("checkpoints", "step-1", "ema.safetensors")
    capsys.readouterr()
    fetch_run(memory, tmp_path / "elsewhere")
    assert "checkpoints/step-1, the best one, was passed over" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path / "elsewhere")] == ["step-3"]


def test_a_damaged_checkpoint_here_is_replaced_by_the_good_one_of_the_store(memory, tmp_path):
    path = checkpoint(tmp_path, 3)
    Mirror(memory, tmp_path).copy(path)
    weights = path / "ema.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"!")
    fetch_run(memory, tmp_path)
    assert weights.read_bytes() == good
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-3"]


def latents(folder: Path, value: float, settings: str) -> None:
    """A folder that looks as one of latents to ``local_copy``."""
    folder.mkdir(exist_ok=True)
    save_file({"x": torch.full((4,), value)}, folder / "shard-00000.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"settings": settings}))


def test_latents_are_copied_once_and_again_when_they_were_encoded_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"file://{tmp_path / 'latents'}"
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        local_copy(url)
    latents(tmp_path / "latents", 1.0, "a")
    folder = local_copy(url)
    shard = folder / "shard-00000.safetensors"
    first = shard.read_bytes()
    before = os.stat(shard).st_ino
    assert local_copy(url) == folder
    assert os.stat(shard).st_ino == before, "nothing is copied twice"
    latents(tmp_path / "latents", 2.0, "b")
    local_copy(url)
    assert shard.read_bytes() != first
    assert (folder / "manifest.json").read_text() == '{"settings": "b"}'


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    latents(tmp_path / "latents", 1.0, "a")
    with pytest.raises(RunError, match=r"could not write the copy of data\.root to .*cache is a file"):
        local_copy(f"file://{tmp_path / 'latents'}")


def test_latents_that_were_copied_before_an_interruption_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    latents(tmp_path / "latents", 1.0, "a")
    save_file({"y": torch.ones(3)}, tmp_path / "latents/shard-00001.safetensors")
    copied = []
    real = Store.get

    def get(store: Store, file: Path, *names: str) -> None:
        copied.append(names[-1])
        if copied == ["shard-00000.safetensors", "shard-00001.safetensors"]:
            raise InputError("the network is gone")
        real(store, file, *names)

    monkeypatch.setattr(Store, "get", get)
    for _ in range(2):
        try:
            folder = local_copy(f"file://{tmp_path / 'latents'}")
        except InputError:
            continue
    assert copied == ["shard-00000.safetensors", "shard-00001.safetensors", "shard-00001.safetensors"]
    assert len(list(folder.glob("*.safetensors"))) == 2


@pytest.fixture
def s3(monkeypatch):
    """URL of a bucket of an S3-compatible server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/moto-api/").close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket/runs/shapes"
    server.kill()
    server.wait(20)


@pytest.mark.skipif(not (find_spec("s3fs") and find_spec("moto")), reason="needs s3fs and moto[server]")
@pytest.mark.filterwarnings("ignore")
def test_an_s3_store(s3, tmp_path, monkeypatch):
    moved_on(s3, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    latents(tmp_path / "latents", 1.0, "a")
    store = Store("s3://bucket/latents", "x")
    for file in (tmp_path / "latents").iterdir():
        store.put(file, file.name)
    copied = local_copy("s3://bucket/latents") / "shard-00000.safetensors"
    assert copied.read_bytes() == (tmp_path / "latents/shard-00000.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"s3://nobucket/x, which cannot be used"):
        fetch_run("s3://nobucket/x", tmp_path / "new")
