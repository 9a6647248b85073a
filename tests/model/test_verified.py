# SPDX-License-Identifier: Apache-2.0
"""A verified weight file is not hashed again, and one that changed in any way always is."""

import json
import os
import shutil
import time

import pytest
import torch

from latte import files as verified
from latte.checks import InputError
from latte.inference import stored
from latte.inference.pipeline import VideoPipeline
from latte.interop.load import load_external
from latte.model import pretrained
from latte.model.latte import Latte


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A weights folder that settled long ago, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SETTLED", -1.0)
    VideoPipeline.from_pretrained("builtin-shapes").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def work(monkeypatch):
    """Which of the two passes over all weights were made."""
    found = []
    for name in ("tensors_sha256", "check_weights"):
        original = getattr(pretrained, name)

        def counted(*arguments, name=name, original=original):
            found.append(name)
            return original(*arguments)

        monkeypatch.setattr(pretrained, name, counted)
    return found


def load(folder):
    pipe = VideoPipeline.from_pretrained(folder)
    return pipe.model.state_dict()


WAYS = [
    load,
    lambda folder: Latte.from_pretrained(folder).state_dict(),
    lambda folder: load_external(folder).state_dict,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_second_load_reads_the_weights_once(folder, work, way):
    tensors = way(folder)
    assert work == ["check_weights", "tensors_sha256"]
    work.clear()
    again = way(folder)
    assert work == []
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keep_date", [True, False])
@pytest.mark.parametrize("replace", [True, False])
def test_a_changed_file_is_refused_whatever_its_size_and_date(
    folder, work, tmp_path, replace, keep_date, way
):
    way(folder)
    file = folder / stored.WEIGHTS
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    time.sleep(0.01)
    if replace:
        (tmp_path / "other").write_bytes(content)
        os.replace(tmp_path / "other", file)
    else:
        file.write_bytes(content)
    if keep_date:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    work.clear()
    with pytest.raises(InputError, match=r"were altered|does not match weights_sha256"):
        way(folder)
    assert work == ["check_weights", "tensors_sha256"]


def test_a_copy_at_another_place_is_verified_for_itself(folder, work, tmp_path):
    load(folder)
    shutil.copytree(folder, tmp_path / "copy")
    work.clear()
    load(tmp_path / "copy")
    assert len(work) == 2


def test_a_file_that_has_just_been_written_is_not_remembered(folder, work, monkeypatch):
    monkeypatch.setattr(verified, "SETTLED", 3600.0)
    load(folder)
    work.clear()
    load(folder)
    assert len(work) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": [[1], null, 3]}'])
def test_a_damaged_memory_is_as_none(folder, work, tmp_path, content):
    load(folder)
    (tmp_path / "cache" / "latte" / verified.VERIFIED).write_text(content)
    work.clear()
    load(folder)
    assert len(work) == 2


def test_without_a_cache_every_load_verifies(folder, work, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    load(folder)
    load(folder)
    assert len(work) == 4


def test_only_the_newest_files_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "SETTLED", -1.0)
    monkeypatch.setattr(verified, "MAX_FILES", 2)
    for name in "abc":
        (tmp_path / name).write_text(name)
        verified.remember(tmp_path / name, verified.stamp(tmp_path / name), name)
    assert [verified.known(tmp_path / name) for name in "abc"] == [None, "b", "c"]
    assert len(json.loads((tmp_path / "cache" / "latte" / verified.VERIFIED).read_text())) == 2
