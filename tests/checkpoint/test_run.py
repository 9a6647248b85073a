# SPDX-License-Identifier: Apache-2.0
"""Laws of a checkpoint: it is all there or not there, comes back bit for bit, and no altered byte of it is
ever used.
"""

import json
import os
import random
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support import noise

from latte.checkpoint.lock import run_lock
from latte.checkpoint.record import describe_run
from latte.checkpoint.run import (
    has_listed_sizes,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    newest,
    save_checkpoint,
    verify,
)
from latte.checks import InputError, RunError
from latte.files import sweep_checkpoints
from latte.tensors import tensors_sha256
from tiny_runs import FORKS


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "ema": {"w": noise(3, 4, seed=step), "n": torch.tensor(step)},
        "optimizer": {"m": noise(5, seed=-step)},
    }


def save(run_dir: Path, step: int, keep: int | None = None) -> Path:
    return save_checkpoint(run_dir, step, tensors(step), {"note": f"state of {step}"}, keep)


def is_that_of(path: Path, step: int) -> bool:
    """Is the checkpoint at ``path`` bit for bit the one that ``save`` writes for ``step``?"""
    found = load_checkpoint(path)
    same = all(
        torch.equal(found.tensors[group][key], value)
        for group, part in tensors(step).items()
        for key, value in part.items()
    )
    return same and found.step == step and found.state["note"] == f"state of {step}"


def alter(file: Path, offset: int, value: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= value
    file.write_bytes(content)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    odd = torch.tensor([-0.0, 1e-45, 3.4e38])
    groups = {
        "model": {
            "odd": odd,
            "half": noise(2, 3).to(torch.bfloat16),
            "turned": noise(3, 2).T,
            "scalar": torch.tensor(7),
        },
        "empty": {},
    }
    path = save_checkpoint(tmp_path, 5, groups, {"seconds": 0.1, "nested": {"list": [1, None, "é"]}})
    found = load_checkpoint(path)
    assert found.step == 5
    assert found.state == {"seconds": 0.1, "nested": {"list": [1, None, "é"]}, "step": 5}
    assert tensors_sha256(found.tensors["model"]) == tensors_sha256(groups["model"])
    assert found.tensors["empty"] == {}
    assert sorted(file.suffix for file in path.iterdir()) == [
        ".json",
        ".json",
        ".safetensors",
        ".safetensors",
    ]


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    modes = {file.stat().st_mode for file in save(tmp_path, 1).iterdir()}
    assert len(modes) == 1


def test_only_reads_and_verifies_what_is_asked_for(tmp_path):
    path = save(tmp_path, 1)
    (path / "optimizer.safetensors").unlink()
    assert set(load_checkpoint(path, only=["ema"]).tensors) == {"ema"}
    with pytest.raises(InputError, match=r"optimizer\.safetensors is missing"):
        load_checkpoint(path)
    with pytest.raises(InputError, match=r"lists no model\.safetensors"):
        load_checkpoint(path, only=["model"])


def test_every_altered_byte_and_every_cut_is_found_and_the_file_named(tmp_path):
    path, copy, dice, found = save(tmp_path, 1), tmp_path / "copy", random.Random(0), 0
    files = sorted(file.name for file in path.iterdir())
    for trial in range(300):
        shutil.copytree(path, copy)
        file = copy / files[trial % len(files)]
        size = file.stat().st_size
        if trial < 200:
            alter(file, dice.randrange(size), dice.randrange(1, 256))
        else:
            os.truncate(file, dice.randrange(size))
        try:
            load_checkpoint(copy)
        except InputError as error:
            found += file.name in str(error) and str(copy) in str(error)
        shutil.rmtree(copy)
    print(f"{found} of 300 damaged checkpoints refused")
    assert found == 300
    assert is_that_of(path, 1)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_but_refused_by_name(tmp_path):
    save(tmp_path, 10), save(tmp_path, 20)
    newest = save(tmp_path, 30)
    alter(newest / "ema.safetensors", 90, 1)
    report = []
    assert load_latest(tmp_path, warn=report.append).step == 20
    assert latest_checkpoint(tmp_path, warn=report.append) == tmp_path / "checkpoints" / "step-20"
    assert "ema.safetensors has sha256" in report[0]
    assert "resuming from the earlier checkpoint" in report[1]
    assert (
        latest_checkpoint(tmp_path, only=["optimizer"], warn=report.append) == newest
    )  # the damage is in the other file
    with pytest.raises(InputError, match="is damaged"):
        load_checkpoint(newest)
    for path in list_checkpoints(tmp_path):
        (path / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no checkpoint .* can be read \(3 of 3 are damaged"):
        latest_checkpoint(tmp_path, warn=report.append)
    assert latest_checkpoint(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "{}/outside.safetensors", ".hidden", "deep/er.safetensors", "line\n.json"],
)
def test_a_manifest_names_plain_files_of_its_own_folder_only(tmp_path, name):
    """The file is there, with the size and hash that the manifest gives: it is refused for its name alone."""
    path = save(tmp_path, 1)
    file = path / name.format(tmp_path)
    file.parent.mkdir(exist_ok=True)
    shutil.copy(path / "ema.safetensors", file)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name.format(tmp_path)] = manifest["files"]["ema.safetensors"]
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    with pytest.raises(InputError, match=r"manifest\.json is not as it was written"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[" * 100_000, '{"files": 3, "format": 1}', "\x00", '{"format": 1, "files": {}}\n'],
)
def test_a_malformed_manifest_is_one_clear_line(tmp_path, text):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest\.json") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_means_the_same_in_other_bytes_is_refused_too(tmp_path):
    path = save(tmp_path, 1)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("\n ", "\n\t", 1))
    with pytest.raises(InputError, match="is not as it was written"):
        load_checkpoint(path)


def test_weights_that_fit_their_hash_and_are_no_safetensors_are_refused(tmp_path):
    """Hashes are no defence against a hostile writer: the reader of each file has to be safe by itself."""
    path = save(tmp_path, 1)
    (path / "ema.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    files = {file.name: atomic_fingerprint(file) for file in path.iterdir() if file.name != "manifest.json"}
    (path / "manifest.json").write_text(
        json.dumps({"format": 1, "files": files}, indent=1, sort_keys=True) + "\n"
    )
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(path)


def atomic_fingerprint(file: Path) -> dict:
    import hashlib

    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_retention_never_removes_the_only_good_checkpoint(tmp_path, monkeypatch):
    """Random histories of saves, damage and resumes: the newest is good after every save, and no more than
    ``keep`` stay beside what was passed over as damaged.
    """
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    dice, pruned, fallbacks = random.Random(0), 0, 0
    for history in range(100):
        run_dir, keep, step = tmp_path / str(history), dice.randint(1, 3), 0
        for _ in range(dice.randint(2, 6)):
            step += 1
            before = len(list_checkpoints(run_dir))
            path = save(run_dir, step, keep)
            assert is_that_of(path, step)
            kept = [int(one.name[5:]) for one in list_checkpoints(run_dir)]
            assert sum(one <= step for one in kept) <= keep
            pruned += len(kept) <= before
            if dice.random() < 0.4:
                victim = dice.choice(list_checkpoints(run_dir)) / "ema.safetensors"
                alter(victim, 80, 1) if dice.random() < 0.5 else os.truncate(victim, 3)
                good = [one for one in list_checkpoints(run_dir) if whole(one)]
                newest = int(good[-1].name[5:]) if good else 0
                fallbacks += newest < step
                step = newest
    print(f"{pruned} saves pruned, {fallbacks} resumes fell back")
    assert pruned > 50
    assert fallbacks > 20


def whole(path: Path) -> bool:
    try:
        return bool(verify(path))
    except InputError:
        return False


def test_a_cut_checkpoint_does_not_count_among_those_kept(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    os.truncate(tmp_path / "checkpoints/step-3/ema.safetensors", 3)
    assert not has_listed_sizes(tmp_path / "checkpoints/step-3")
    save(tmp_path, 4, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1", "step-2", "step-4"]


class Crash:
    """In a child process: die at once, without any clean-up, at the ``point``-th change this process makes
    in ``folder``.
    """

    def __init__(self, folder: Path, point: int):
        self.folder, self.point, self.seen = str(folder), point, 0
        os.fsync = lambda handle: self.count()
        sys.addaudithook(self.receive)

    def receive(self, event: str, arguments: tuple) -> None:
        if event in (
            "open",
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.chmod",
        ) and self.folder in str(arguments[0]):
            self.count()

    def count(self) -> None:
        self.seen += 1
        if self.seen == self.point:
            os._exit(77)


def crash_everywhere(folder: str, results) -> None:
    """Crash at every point of a commit that prunes, and of one that replaces a good folder; report how each
    state recovered.
    """
    torch.set_num_threads(1)
    os.fsync = lambda handle: None  # a process that dies takes nothing with it that the system has been given
    for case in ("prune", "replace"):
        for point in range(1, 200):
            run_dir = Path(folder) / f"{case}-{point}"
            save(run_dir, 1), save(run_dir, 2)
            if case == "replace":
                save(run_dir, 3)
            child = os.fork()
            if child == 0:
                Crash(run_dir, point)
                save(run_dir, 3, keep=2)
                os._exit(0)
            crashed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
            inside = bool(list(run_dir.glob("checkpoints/.*")))
            sweep_checkpoints(run_dir)
            report = []
            latest = latest_checkpoint(run_dir, warn=report.append)
            step = int(latest.name[5:])
            fine = step in ((2, 3) if case == "prune" else (3,)) and is_that_of(latest, step)
            fine = fine and not report and not list(run_dir.glob("checkpoints/.*"))
            fine = fine and is_that_of(save(run_dir, 4, keep=2), 4)
            results.put((case, point, crashed, inside, fine))
            shutil.rmtree(run_dir)
            if not crashed:
                break
    results.put(None)


def test_a_crash_at_any_point_of_a_commit_loses_nothing(tmp_path):
    results = FORKS.SimpleQueue()
    child = FORKS.Process(target=crash_everywhere, args=(str(tmp_path), results), daemon=True)
    child.start()
    seen = list(iter(results.get, None))
    child.join(20)
    crashed = {case: sum(one[2] for one in seen if one[0] == case) for case in ("prune", "replace")}
    print(f"crashes {crashed}, {sum(one[3] for one in seen)} of them left something behind")
    assert min(crashed.values()) >= 12
    assert sum(one[3] for one in seen) >= 12
    assert [one for one in seen if not one[4]] == []


def save_on_a_small_disk(folder: str, limits: list[int], results) -> None:
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save_checkpoint(
                Path(folder),
                2,
                {"model": {"w": torch.zeros(5000)}, "ema": {"w": torch.zeros(6000)}},
                {"text": "x" * 3000},
            )
            results.put((limit, None, 0))
        except Exception as error:
            results.put(
                (limit, f"{type(error).__name__}: {error}", len(list(Path(folder).glob("checkpoints/.*"))))
            )
    results.put(None)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_as_it_was(tmp_path):
    save(tmp_path, 1)
    limits = [0, 1, 100, 2999, 3100, 8192, 20_000, 20_100, 24_000, 24_050]
    results = FORKS.SimpleQueue()
    child = FORKS.Process(
        target=save_on_a_small_disk, args=(str(tmp_path), [*limits, 30_000], results), daemon=True
    )
    child.start()
    seen = list(iter(results.get, None))
    child.join(20)
    assert seen.pop() == (30_000, None, 0)
    assert len(seen) == len(limits)
    for limit, message, left in seen:
        assert message is not None, limit
        assert left == 0
        assert message.startswith("RunError: could not write the checkpoint of step 2 to ")
        assert "File too large" in message
        assert "step-1 is unchanged" in message
        assert "47,0" in message  # 44,000 bytes of weights and 3,0.. of text are needed
        assert "\n" not in message
    assert is_that_of(tmp_path / "checkpoints/step-1", 1)


def test_unwritable_places_are_errors_and_never_a_reported_success(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for place in (file, loop, Path("/proc/nothing")):
        with pytest.raises(RunError, match="could not write the checkpoint of step 1"):
            save(place, 1)
        with pytest.raises(InputError, match=r"run\.dir is .* cannot be written"), run_lock(place):
            pass


def hold(folder: str, pipe) -> None:
    with run_lock(Path(folder)):
        pipe.send(os.getpid())
        pipe.recv()


def test_a_second_trainer_is_refused_with_the_first_ones_pid_and_a_dead_one_is_forgotten(tmp_path):
    (tmp_path / ".lock").write_text(
        "process 1 on elsewhere\n"
    )  # what is written there does not matter, the system's lock does
    here, there = FORKS.Pipe()
    child = FORKS.Process(target=hold, args=(str(tmp_path), there), daemon=True)
    child.start()
    assert here.poll(60)
    pid = here.recv()
    assert pid == child.pid
    with pytest.raises(InputError, match=f"process {pid} on .* is training"), run_lock(tmp_path):
        pass
    child.kill()
    child.join(20)
    with run_lock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
        with pytest.raises(InputError, match=f"process {os.getpid()} "), run_lock(tmp_path):
            pass


def test_a_run_describes_itself_without_the_environments_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canary_in_a_coal_mine")
    config = {"train": {"lr": 1e-4, "size": (32, 48), "none": None}, "data": {"root": "é"}}
    describe_run(tmp_path, config, torch.device("cpu"), "latte train ffs")
    for program in ("/somewhere/bin/latte", "/somewhere/latte/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program, "train", "my run.yaml"])
        describe_run(tmp_path, config, torch.device("cpu"))
    written = yaml.safe_load((tmp_path / "config.yaml").read_text("utf-8"))
    assert written == {"train": {"lr": 1e-4, "size": [32, 48], "none": None}, "data": {"root": "é"}}
    environment = json.loads((tmp_path / "env.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])  # a CUDA build adds its local part
    assert environment["device"] == "cpu"
    commands = [line.partition(" ")[2] for line in (tmp_path / "command.txt").read_text().splitlines()]
    assert commands == ["latte train ffs", "latte train 'my run.yaml'", "python -m latte train 'my run.yaml'"]
    assert all("canary" not in file.read_text("utf-8") for file in tmp_path.iterdir())


def test_the_hash_of_tensors_knows_names_types_shapes_and_bits_but_no_order():
    a, b = noise(2, 3, seed=1), noise(4, seed=2)
    seen = {
        tensors_sha256(one)
        for one in (
            {"a": a, "b": b},
            {"a": b, "b": a},
            {"a": a.view(3, 2), "b": b},
            {"a": a.double(), "b": b},
        )
    }
    assert len(seen) == 4
    assert tensors_sha256({"b": b, "a": a}) == tensors_sha256({"a": a, "b": b})
    assert tensors_sha256({"a": torch.tensor(0.0)}) != tensors_sha256({"a": torch.tensor(-0.0)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", ["ema", "optimizer"])
def test_nonfinite_tensors_are_named_and_not_committed(group, value, tmp_path):
    save(tmp_path, 1)
    groups = tensors(2)
    name = {"ema": "w", "optimizer": "m"}[group]
    groups[group][name].view(-1)[2] = value
    with pytest.raises(
        RunError, match=rf"step 2 was not written: {group} tensor '{name}' holds 1 non-finite"
    ) as error:
        save_checkpoint(tmp_path, 2, groups, {})
    assert "step-1 is unchanged" in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def test_a_nonfinite_checkpoint_of_an_earlier_version_is_refused_by_name(tmp_path, monkeypatch):
    save(tmp_path, 1)
    groups = tensors(2)
    groups["ema"]["w"][0, 0] = float("nan")
    with monkeypatch.context() as before:
        before.setattr("latte.checkpoint.run.find_nonfinite", lambda tensors: None)
        path = save_checkpoint(tmp_path, 2, groups, {})
    with pytest.raises(InputError, match="ema tensor 'w' holds 1 non-finite of 12 values"):
        load_checkpoint(path)
    assert load_checkpoint(path, only=["optimizer"]).step == 2
    warnings = []
    assert load_latest(tmp_path, warn=warnings.append).step == 1
    assert "'w' holds 1 non-finite" in warnings[0]


def rotate(folder: str, pipe) -> None:
    """Save one checkpoint after the other, each removing the one before, until the pipe is closed."""
    torch.set_num_threads(1)
    os.fsync = lambda handle: None
    step = 1
    while not pipe.poll():
        save(Path(folder), step, keep=1)
        step += 1
    pipe.send(step)


def test_readers_never_see_damage_while_a_trainer_rotates(tmp_path):
    save(tmp_path, 0)
    here, there = FORKS.Pipe()
    child = FORKS.Process(target=rotate, args=(str(tmp_path), there), daemon=True)
    child.start()
    warnings, steps = [], set()
    for trial in range(1500):
        if trial % 2:
            found = load_latest(tmp_path, warn=warnings.append)
            steps.add(found.step)
        else:
            assert latest_checkpoint(tmp_path, warn=warnings.append) is not None
    here.send("stop")
    assert here.poll(60)
    saved = here.recv()
    child.join(20)
    print(f"{saved} checkpoints saved during 1500 reads of {len(steps)} different ones")
    assert saved > 100
    assert len(steps) > 20
    assert warnings == []


def test_a_checkpoint_that_vanishes_or_cannot_be_read_falls_back(tmp_path, monkeypatch):
    save(tmp_path, 1), save(tmp_path, 2)
    warnings = []

    def refuse(file, *words, **rest):
        if "step-2" in str(file) and str(file).endswith(".safetensors"):
            raise OSError(5, "Input/output error")
        return open(file, *words, **rest)

    monkeypatch.setattr("latte.checkpoint.run.open", refuse, raising=False)
    assert load_latest(tmp_path, warn=warnings.append).step == 1
    assert "cannot be read (Input/output error)" in warnings[0]
    assert not any("delete" in warning for warning in warnings)
    shutil.rmtree(tmp_path / "checkpoints/step-1")
    with pytest.raises(InputError, match="restore one from a backup") as error:
        load_latest(tmp_path, warn=warnings.append)
    assert "delete" not in str(error.value)


def test_an_error_of_the_system_while_reading_falls_back_like_damage(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    warnings = []

    def read(path: Path) -> int:
        if path.name == "step-2":
            raise PermissionError(13, "Permission denied")
        return load_checkpoint(path).step

    assert newest(tmp_path, read, warnings.append) == 1
    assert "Permission denied" in warnings[0]


def test_a_vanished_checkpoint_is_looked_for_again(tmp_path):
    """Between listing and reading, the only checkpoint is replaced by the next one."""
    save(tmp_path, 1)
    reads, warnings = [], []

    def read(path: Path) -> int:
        reads.append(path.name)
        if len(reads) == 1:
            save(tmp_path, 2, keep=1)
        return load_checkpoint(path).step

    assert newest(tmp_path, read, warnings.append) == 2
    assert (reads, warnings) == (["step-1", "step-2"], [])


def test_the_lock_on_windows_is_msvcrts_and_leaves_the_holders_name_readable(tmp_path, monkeypatch):
    """Simulated: the module that Windows has instead of fcntl, with its mandatory lock of a byte range."""
    locked: dict[int, int] = {}

    class Msvcrt:
        LK_NBLCK = 2

        @staticmethod
        def locking(handle: int, mode: int, count: int) -> None:
            assert (mode, count) == (2, 1)
            place = os.lseek(handle, 0, os.SEEK_CUR)
            file = os.fstat(handle).st_ino
            if locked.get(file) == place:
                raise PermissionError(13, "Permission denied")
            locked[file] = place

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "msvcrt", Msvcrt)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with run_lock(tmp_path):
        text = (tmp_path / ".lock").read_text()
        assert text == f"process {os.getpid()} on {os.uname().nodename}\n"
        assert min(locked.values()) > len(text), "the holder's name must stay readable"
        with pytest.raises(InputError, match=f"process {os.getpid()} on .* is training"), run_lock(tmp_path):
            pass


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def refuse(file) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("latte.checkpoint.lock.acquire", refuse)
    with pytest.raises(InputError, match=r"cannot lock files .No locks available."), run_lock(tmp_path):
        pass
