# SPDX-License-Identifier: Apache-2.0
"""LayerSync: the cosine by hand, where its gradient goes, what stays as without it, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import noise

from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError
from latte.config.run import load_run
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.model.latte import Latte
from latte.training.config import layer_pair
from latte.training.layer_sync import misalignment
from latte.training.step import StepOptions, Task, backward
from tiny_runs import SHORT, TINY, run, tiny_model

DEEP = replace(TINY, depth=8)
POSITIONS = range(4)
VIDEO = noise(4, 3, 4, 4, 4)
LABEL = torch.tensor([0, 1, 2, 0])


def gradients(
    model: Latte, layer_sync: float, **changes: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss mse vlb) and the gradients by name."""
    model.zero_grad()
    parts: dict[str, Any] = {
        "model": model,
        "forward": model,
        "process": build_process(DiffusionConfig()),
        "objective": OBJECTIVES["paper"],
        "codec": None,
        "seed": 7,
        "global_batch": 4,
        "micro_batch": None,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "options": StepOptions(layer_sync=layer_sync),
    }
    losses = backward(Task(**{**parts, **changes}), 5, POSITIONS, VIDEO, LABEL)
    return losses, {
        name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None
    }


def test_the_pair_is_the_papers_at_its_depth_and_refused_where_there_is_none():
    assert layer_pair(28) == (7, 15)  # blocks 8 and 16, counted from 1
    assert layer_pair(8) == (1, 3)
    assert layer_pair(4) == (0, 1)
    with pytest.raises(InputError, match=r"it has 3; give a model of at least 4 blocks"):
        layer_pair(3)
    for depth in range(4, 60):
        early, deep = layer_pair(depth)
        assert 0 <= early < deep < depth - 1


def test_the_misalignment_is_one_minus_the_mean_cosine_and_the_target_is_fixed():
    early = torch.tensor([[[[3.0, 4.0], [1.0, 0.0]]], [[[1.0, 1.0], [2.0, 0.0]]]], requires_grad=True)
    deep = torch.tensor([[[[4.0, 3.0], [0.0, 5.0]]], [[[2.0, 2.0], [-1.0, 0.0]]]], requires_grad=True)
    found = misalignment([early], [deep])
    torch.testing.assert_close(found, torch.tensor([1 - (24 / 25 + 0) / 2, 1 - (1 - 1) / 2]))
    found.sum().backward()
    assert early.grad is not None
    assert deep.grad is None
    images = misalignment([early, -early], [deep, deep])
    torch.testing.assert_close(images, torch.ones(2))  # the cosines of clip and images cancel


def test_it_adds_its_weight_times_the_misalignment_and_pulls_the_early_blocks_alone():
    model = tiny_model(DEEP)
    plain, before = gradients(model, 0.0)
    losses, after = gradients(model, 0.5)
    more, _ = gradients(model, 1.0)
    assert losses[0] > plain[0]
    torch.testing.assert_close(more[0] - plain[0], 2 * (losses[0] - plain[0]))
    assert torch.equal(losses[1:], plain[1:])
    early, deep = layer_pair(8)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {int(name.split(".")[1]) for name in changed if name.startswith("blocks.")}
    assert inside == set(range(early + 1))
    assert deep not in inside


def test_checkpointing_and_images_give_the_same_and_both_calls_count():
    model = tiny_model(DEEP)
    losses, found = gradients(model, 0.5)
    for stages in (True, "pairs"):
        model.gradient_checkpointing = stages
        again, recomputed = gradients(model, 0.5)
        assert torch.equal(losses, again)
        assert all(torch.equal(found[name], recomputed[name]) for name in found)
    model.gradient_checkpointing = False
    joint, _ = gradients(model, 0.5, num_images=1)
    alone, _ = gradients(model, 0.0, num_images=1)
    assert joint[0] > alone[0]


def test_a_run_resumes_bit_for_bit_and_records_the_weight_only_when_it_has_one(tmp_path):
    config = replace(SHORT, layer_sync=0.5, steps=6)
    whole = run(tmp_path / "whole", config, model=tiny_model(DEEP))
    for steps in (3, 6):
        parts = run(tmp_path / "parts", replace(config, steps=steps), model=tiny_model(DEEP))
    assert parts["weights_sha256"] == whole["weights_sha256"]
    assert load_checkpoint(Path(whole["checkpoint"])).state["settings"]["layer_sync"] == 0.5
    plain = run(tmp_path / "plain", replace(SHORT, steps=1))
    assert "layer_sync" not in load_checkpoint(Path(plain["checkpoint"])).state["settings"]


def test_turning_it_on_later_gives_a_notice(tmp_path, capsys):
    run(tmp_path, replace(SHORT, steps=3), model=tiny_model(DEEP))
    run(tmp_path, replace(SHORT, steps=6, layer_sync=0.2), model=tiny_model(DEEP))
    assert "train.layer_sync was 0.0 up to step 3 and is 0.2 from here on" in capsys.readouterr().err


@pytest.mark.parametrize("value", [-0.1, float("nan"), 11.0])
def test_a_weight_out_of_range_is_refused(value):
    with pytest.raises(InputError, match=r"train\.layer_sync is .*must be in \[0, 10\]"):
        replace(SHORT, layer_sync=value)


def test_a_recipe_with_too_few_blocks_is_refused_before_anything_is_read():
    words = ["model.depth=2", "train.layer_sync=0.2"]
    with pytest.raises(InputError, match=r"it has 2; give a model of at least 4 blocks"):
        load_run("shapes-tiny", words)
    load_run("shapes-text", ["model.depth=2", "train.layer_sync=0.2"])  # two pairs are four blocks


def test_a_shallow_model_and_a_compiled_one_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"it has 2; give a model of at least 4 blocks"):
        run(tmp_path, replace(SHORT, layer_sync=0.2))
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(InputError, match=r"train\.compile hides"):
        replace(SHORT, layer_sync=0.2, compile=True)
