# SPDX-License-Identifier: Apache-2.0
"""A fresh run that starts from a DiT: its weights, its report, and what does not fit; a run that goes on needs no DiT."""

import logging
from dataclasses import replace

import pytest
import torch
from reference.official import dit_state

from latte.build import build
from latte.checkpoint.run import latest_checkpoint, load_checkpoint
from latte.checks import InputError
from latte.config import load_run
from latte.model.latte import Latte
from tiny import WORDS
from training import SHORT, TINY, run

LABELS = "y_embedder.embedding_table.weight"


@pytest.fixture
def dit(tmp_path):
    """A DiT of two blocks that fits TINY, and its file."""
    state = dit_state(depth=2, width=16, side=4)
    torch.save(state, tmp_path / "DiT.pt")
    return state, tmp_path / "DiT.pt"


def start(folder, path, **changes):
    """One step, too small to move a weight, of a run that starts from ``path``; its last checkpoint's tensors."""
    config = replace(SHORT, **{"steps": 1, "lr": 1e-12, "init": str(path), **changes})
    run(folder, config, model=Latte(TINY))
    return load_checkpoint(latest_checkpoint(folder)).tensors


def test_weights_and_average_start_as_the_dits(dit, tmp_path):
    state, path = dit
    tensors = start(tmp_path / "run", path)
    for group in ("model", "ema"):
        for k, attention in enumerate(("space", "time")):
            found = tensors[group][f"blocks.{k}.branches.{attention}.qkv.weight"]
            torch.testing.assert_close(found, state[f"blocks.{k}.attn.qkv.weight"], rtol=0, atol=1e-9)
        assert float(tensors[group]["label_embedding.table.weight"].abs().max()) < 1e-9


def test_the_mapping_is_followed(dit, tmp_path):
    state, path = dit
    tensors = start(tmp_path / "run", path, init_mapping="spatial")["model"]
    torch.testing.assert_close(tensors["blocks.0.branches.space.proj.bias"], state["blocks.0.attn.proj.bias"], rtol=0, atol=1e-9)
    assert not torch.allclose(tensors["blocks.1.branches.time.proj.bias"], state["blocks.1.attn.proj.bias"], atol=1e-3)


def test_log_and_file_report_every_tensor_of_dit_and_of_the_model(dit, tmp_path, caplog):
    state, path = dit
    with caplog.at_level(logging.INFO, logger="latte"):
        tensors = start(tmp_path / "run", path, init_mapping="spatial")["model"]
    report = (tmp_path / "run/init.txt").read_text()
    said = {line.split()[1]: line.split()[0] for line in report.splitlines()[1:]}
    assert {name for name in state if name not in said} == set(), "used or skipped"
    assert said[LABELS] == "dropped:"
    assert said["blocks.1.attn.qkv.weight"] == "dropped:"
    assert said["label_embedding.table.weight"] == "missing:"
    counts = list(said.values())
    assert counts.count("used:") + counts.count("missing:") == len(tensors)
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert all(line in logged for line in report.splitlines())


def test_a_run_that_goes_on_is_not_started_again_and_needs_no_dit(dit, tmp_path):
    _, path = dit
    before = start(tmp_path / "run", path)["model"]
    report = (tmp_path / "run/init.txt").read_text()
    path.unlink()
    after = start(tmp_path / "run", path, steps=2)["model"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    assert (tmp_path / "run/init.txt").read_text() == report
    with pytest.raises(InputError):
        start(tmp_path / "another", path)


def test_another_width_is_told_with_both_and_nothing_is_written(tmp_path):
    torch.save(dit_state(depth=2, width=32, side=4), tmp_path / "DiT.pt")
    with pytest.raises(InputError, match=r"model.width is 16, but the DiT at .*DiT.pt has a width of 32") as error:
        start(tmp_path / "run", tmp_path / "DiT.pt")
    assert "\n" not in str(error.value)
    assert not [file for file in (tmp_path / "run").rglob("*") if file.suffix]


def test_a_mapping_that_does_not_exist_is_told_with_the_nearest():
    with pytest.raises(InputError, match=r"train.init_mapping.*did you mean 'spatial'"):
        load_run("shapes", ["train.init=DiT.pt", "train.init_mapping=spatia"])


def test_latte_train_starts_from_a_dit(tmp_path):
    torch.save(dit_state(depth=2, width=16, side=16, channels=3, patch=4), tmp_path / "DiT.pt")
    words = [*WORDS, "model.num_classes=4", "train.steps=1", f"train.init={tmp_path / 'DiT.pt'}", f"run.dir={tmp_path / 'run'}"]
    assert build(load_run("shapes", words)[0], "cpu").train()["step"] == 1
    assert "0 unexpected, 0 mismatched" in (tmp_path / "run/init.txt").read_text()
    assert load_run(tmp_path / "run")[0].train.init == str(tmp_path / "DiT.pt")
