# SPDX-License-Identifier: Apache-2.0
"""Laws of an atomic write: complete or absent, unrelated files untouched, permissions of the umask."""

import os
import stat
import threading

import pytest
from safetensors.torch import save_file
from support import noise

from latte.checks import InputError, RunError
from latte.files import commit_file, commit_folder, reported, size_text, sweep_checkpoints


def write_one(folder) -> None:
    (folder / "a.txt").write_text("new")


def test_a_commit_leaves_hidden_neighbours_alone(tmp_path):
    kept = [".tmp-notes", ".old-photos", ".old-gone", ".tmp-ours"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
    commit_folder(tmp_path / "ours", write_one)
    commit_file(tmp_path / "notes", "text")
    assert sorted(item.name for item in tmp_path.iterdir()) == sorted([*kept, "ours", "notes"])
    assert all((tmp_path / name / "thesis.tex").read_text() == "years of work" for name in kept)


def test_writers_in_one_parent_do_not_disturb_each_other(tmp_path):
    """Every writer is inside its commit at the same time; the names of half of them are equal."""
    barrier, errors = threading.Barrier(8, timeout=30), []

    def commit(number: int) -> None:
        def write(folder) -> None:
            barrier.wait()
            (folder / "number").write_text(str(number))
            barrier.wait()

        try:
            commit_folder(tmp_path / f"out-{number}", write)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {path.name: (path / "number").read_text() for path in tmp_path.iterdir()} == {
        f"out-{number}": str(number) for number in range(8)
    }


@pytest.mark.parametrize("kind", ["pipe", "file", "broken link", "device"])
def test_an_existing_destination_of_another_kind_is_refused(kind, tmp_path):
    place = tmp_path / "place"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "file":
        place.write_text("mine")
    elif kind == "broken link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.symlink_to("/dev/null")
    before = os.lstat(place)
    if kind != "broken link":  # whose target does not exist yet
        with pytest.raises(InputError, match="not a folder; choose a new folder"):
            commit_folder(place, write_one)
    if kind in ("pipe", "device"):
        with pytest.raises(InputError, match="not a regular file"):
            commit_file(place, "text")
    after = os.lstat(place)
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    commit_folder(tmp_path / "link", write_one)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "new"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_everything_that_is_committed_has_the_permissions_of_the_umask(mask, tmp_path):
    def write(folder) -> None:
        save_file({"a": noise(3)}, folder / "a.safetensors")  # writes mode 0600 whatever the umask is
        (folder / "deep").mkdir(mode=0o700)
        save_file({"a": noise(3)}, folder / "deep" / "b.safetensors")

    before = os.umask(mask)
    try:
        commit_folder(tmp_path / "folder", write)
        commit_file(tmp_path / "file.safetensors", lambda path: save_file({"a": noise(3)}, path))
        commit_file(tmp_path / "text", "text")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert oct(path.stat().st_mode & 0o777) == oct(expected), path


def test_a_failed_write_changes_nothing_and_is_one_line(tmp_path):
    commit_folder(tmp_path / "ours", write_one)
    commit_file(tmp_path / "text", "before")

    def fail(folder) -> None:
        (folder / "half").write_text("half") if folder.is_dir() else folder.write_text("half")
        raise OSError(28, "No space left on device")

    for write in (
        lambda: commit_folder(tmp_path / "ours", fail),
        lambda: commit_file(tmp_path / "text", fail),
    ):
        with (
            pytest.raises(
                RunError, match=r"could not write it to .*: No space left on device; 9 bytes"
            ) as error,
            reported("it", tmp_path, needed=9),
        ):
            write()
        assert "\n" not in str(error.value)
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["a.txt", "ours", "text"]
    assert (tmp_path / "text").read_text() == "before"


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    path = tmp_path / "taken" / "page.html"
    with (
        pytest.raises(RunError, match=r"write it to .*: \S*/taken is a file, where a folder is needed"),
        reported("it", path),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)


def test_small_sizes_are_not_zero():
    assert [size_text(number) for number in (4096, 3 << 20, 3 << 30)] == ["4.0 KiB", "3.0 MiB", "3.00 GiB"]


def test_a_rename_that_fails_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    commit_folder(tmp_path / "ours", write_one)
    rename, failed = os.rename, []

    def fail_once(source, target) -> None:
        if str(target).endswith("/ours") and not failed:
            failed.append(source)
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output"):
        commit_folder(tmp_path / "ours", lambda folder: (folder / "b.txt").touch())
    assert len(failed) == 1
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["a.txt", "ours"]


def test_the_sweep_knows_its_own_leftovers_only(tmp_path):
    folder = tmp_path / "checkpoints"
    removed = [
        ".tmp-step-3",
        ".tmp-step-3-77-0123abcd",
        ".tmp-pruned-step-1",
        ".tmp-pruned-step-1-77-0123abcd",
    ]
    restored = {".old-step-7": "step-7", ".old-step-8-77-0123abcd": "step-8"}
    kept = [".tmp-notes", ".old-photos", ".old-step-x", ".tmp-step-3.bak", "step-9", "notes"]
    for name in (*removed, *restored, *kept, ".old-step-9-77-0123abcd"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text(name)
    sweep_checkpoints(tmp_path)
    assert sorted(item.name for item in folder.iterdir()) == sorted([*restored.values(), *kept])
    assert (folder / "step-7" / "file").read_text() == ".old-step-7"
    assert (folder / "step-9" / "file").read_text() == "step-9"
