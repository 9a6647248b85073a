# SPDX-License-Identifier: Apache-2.0
"""Groups of tensors in several files are the tensors that were divided among them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import noise

from latte.checkpoint.run import (
    fingerprint,
    load_checkpoint,
    manifest_text,
    merge_checkpoint,
    open_checkpoint,
    save_checkpoint,
    verify,
    write_parts,
)
from latte.checkpoint.split import file_name, groups_in, open_group, write_whole
from latte.checks import InputError
from latte.tensors import tensors_sha256

WHOLE = {
    "ema": {"w": noise(10, 3), "short": noise(2), "turned": noise(7, 4).T},
    "optimizer": {"m": noise(5).to(torch.bfloat16), "step": torch.tensor(4.0)},
}


def part(number: int, count: int) -> dict[str, dict[str, torch.Tensor]]:
    """What process ``number`` of ``count`` has, divided as torch.chunk does."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for group, tensors in WHOLE.items():
        found[group] = {}
        for name, tensor in tensors.items():
            if tensor.ndim == 0 and number == 1:
                found[group][name] = tensor
            elif tensor.ndim and len(chunks := tensor.chunk(count)) >= number:
                found[group][name] = chunks[number - 1]
    return found


def saved(run_dir: Path, count: int = 3, step: int = 7) -> Path:
    """Commit a checkpoint of ``count`` processes."""

    def others(folder: Path):
        files = [write_parts(folder, part(number, count), number, count) for number in range(2, count + 1)]
        return lambda: {name: entry for names in files for name, entry in names.items()}

    return save_checkpoint(run_dir, step, part(1, count), {"note": "x"}, count=count, others=others)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_what_several_processes_save_comes_back_bit_for_bit(tmp_path, count):
    path = saved(tmp_path, count)
    assert len(list(path.glob("*.safetensors"))) == 2 * count
    assert json.loads((path / "manifest.json").read_text())["format"] == (1 if count == 1 else 2)
    found = load_checkpoint(path)
    assert (found.step, found.state["note"]) == (7, "x")
    for group, tensors in WHOLE.items():
        assert tensors_sha256(found.tensors[group]) == tensors_sha256(tensors)


def test_any_rows_are_read_and_no_others(tmp_path):
    rows = open_checkpoint(saved(tmp_path)).tensors["ema"]["w"]
    assert (rows.shape, rows.dtype, rows.ndim) == ((10, 3), torch.float32, 2)
    for start in range(11):
        for stop in range(start, 11):
            assert torch.equal(rows.read(start, stop), WHOLE["ema"]["w"][start:stop])


def test_the_merged_file_is_the_one_that_safetensors_writes(tmp_path):
    """Byte for byte, for every kind of number and any name."""
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)
    kinds += (torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {f"é{index}": torch.ones(index + 1, 2).to(kind) for index, kind in enumerate(kinds)}
    tensors |= {"none": torch.zeros(0, 3), "scalar": torch.tensor(2), "a": noise(3)}
    save_file(tensors, tmp_path / "expected.safetensors")
    split = [name for name in tensors if len(name) == 2 and name != "é0"]
    for number in (1, 2):
        pieces = {name: tensors[name].chunk(2)[number - 1].contiguous() for name in split}
        rest = {name: tensor for name, tensor in tensors.items() if number == 1 and name not in split}
        save_file({**pieces, **rest}, tmp_path / file_name("all", number, 2))
    write_whole(open_group(tmp_path, [file_name("all", number, 2) for number in (1, 2)]), tmp_path / "merged")
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_one_group_is_read_without_the_others(tmp_path):
    path = saved(tmp_path)
    (path / "optimizer-00002-of-00003.safetensors").unlink()
    assert set(load_checkpoint(path, only=["ema"]).tensors) == {"ema"}
    with pytest.raises(InputError, match=r"optimizer-00002-of-00003\.safetensors is missing"):
        load_checkpoint(path)


def test_a_part_that_no_manifest_lists_is_named(tmp_path):
    """As if a manifest had been written before the last process had finished."""
    path = saved(tmp_path)
    (path / "manifest.json").unlink()
    (path / "ema-00003-of-00003.safetensors").unlink()
    files = {file.name: fingerprint(file) for file in path.iterdir()}
    with pytest.raises(ValueError, match=r"ema-00003-of-00003\.safetensors"):
        groups_in(files)
    text = json.dumps({"format": 2, "files": files}, indent=1, sort_keys=True) + "\n"
    (path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"damaged: .*ema-00003-of-00003\.safetensors .*is missing"):
        load_checkpoint(path)


def test_parts_that_do_not_continue_each_other_are_refused(tmp_path):
    path = saved(tmp_path)
    file = path / "ema-00002-of-00003.safetensors"
    save_file({**load_file(file), "w": noise(4, 2)}, file)
    (path / "manifest.json").unlink()
    files = {file.name: fingerprint(file) for file in path.iterdir()}
    (path / "manifest.json").write_text(manifest_text(files))
    with pytest.raises(
        InputError, match=r"damaged: .*w of ema-00002-of-00003\.safetensors does not continue"
    ):
        load_checkpoint(path)


def test_large_files_are_verified_in_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("latte.checkpoint.run.WORTH_THREADS", 0)
    path = saved(tmp_path)
    assert len(verify(path)) == 7
    (path / "ema-00002-of-00003.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match=r"ema-00002-of-00003\.safetensors has bytes 3"):
        verify(path)


def test_merging_makes_a_checkpoint_of_whole_files(tmp_path):
    path = saved(tmp_path)
    assert merge_checkpoint(path, tmp_path / "merged") == ["ema", "optimizer"]
    merged = load_checkpoint(tmp_path / "merged")
    assert sorted(file.name for file in merged.path.iterdir()) == [
        "ema.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]
    assert merged.state == load_checkpoint(path).state
    for group, tensors in WHOLE.items():
        assert tensors_sha256(merged.tensors[group]) == tensors_sha256(tensors)
    expected = {name: tensor.contiguous() for name, tensor in WHOLE["ema"].items()}
    save_file(expected, tmp_path / "expected")
    assert (merged.path / "ema.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
