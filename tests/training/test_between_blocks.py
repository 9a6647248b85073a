# SPDX-License-Identifier: Apache-2.0
"""LayerSync, alignment with the codec, token routing: values by hand, where gradients go, what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import noise

from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError
from latte.config.run import load_run
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.model.latte import Latte
from latte.training.between_blocks import (
    check_network,
    distance_to_latent,
    kept_tokens,
    latent_tokens,
    layer_pair,
    misalignment,
    routed,
    routed_blocks,
)
from latte.training.step import StepOptions, Task, backward
from tiny_runs import SHORT, TINY, run, tiny_model

DEEP = replace(TINY, depth=8)
POSITIONS = range(4)
VIDEO = noise(4, 3, 4, 4, 4)
LABEL = torch.tensor([0, 1, 2, 0])


def gradients(
    model: Latte, layer_sync: float = 0.0, **changes: Any
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
    with pytest.raises(InputError, match=r"train\.codec_align is .*must be in \[0, 10\]"):
        replace(SHORT, codec_align=value)
    with pytest.raises(InputError, match=r"train\.route is .*must be in \[0, 0\.9\]"):
        replace(SHORT, route=value)


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


def test_a_tokens_target_is_the_latent_that_it_covers():
    z = noise(2, 4, 3, 4, 6)
    found = latent_tokens(z, 2, 1)
    assert found.shape == (2, 4, 6, 12)
    torch.testing.assert_close(found[1, 2, 4], z[1, 2, :, 2:4, 2:4].flatten())  # row 1, column 1
    tubes = latent_tokens(z, 2, 2)
    assert tubes.shape == (2, 2, 6, 24)
    torch.testing.assert_close(tubes[0, 1, 5], z[0, 2:4, :, 2:4, 4:6].flatten())


def test_the_distance_is_smooth_l1_after_a_fixed_random_projection():
    tokens = 1000.0 * torch.eye(64).expand(1, 1, 64, 64)
    latent = torch.zeros(1, 1, 4, 16, 16)  # 64 tokens of 16 numbers
    found = distance_to_latent([tokens], latent, 2, 1)
    # 1000 E |N(0, 1/64)| - 1/2, over 1024 numbers of the projection
    assert found.item() == pytest.approx(1000 * (2 / torch.pi) ** 0.5 / 8 - 0.5, rel=0.1)
    assert torch.equal(found, distance_to_latent([tokens], latent, 2, 1))
    video = noise(2, 3, 4, 4, 4)
    zero = torch.zeros(2, 3, 4, 64, requires_grad=True)
    found = distance_to_latent([zero], video, 2, 1)
    torch.testing.assert_close(
        found, F.smooth_l1_loss(torch.zeros(()).expand_as(video), video, reduction="none").flatten(1).mean(1)
    )
    found.sum().backward()
    assert zero.grad is not None
    assert zero.grad.abs().sum() > 0


def test_it_trains_the_early_blocks_alone_and_does_not_depend_on_the_micro_batch():
    model = tiny_model(DEEP)
    plain, before = gradients(model)
    options = StepOptions(codec_align=0.5)
    losses, after = gradients(model, options=options)
    assert losses[0] > plain[0]
    assert torch.equal(losses[1:], plain[1:])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = {int(name.split(".")[1]) for name in changed if name.startswith("blocks.")}
    assert inside == set(range(layer_pair(8)[0] + 1))
    halves, split = gradients(model, options=options, micro_batch=1)
    torch.testing.assert_close(halves, losses)
    for name, gradient in after.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)


def test_routed_tokens_pass_by_the_middle_blocks_and_the_others_see_each_other_alone():
    model = tiny_model(DEEP)
    blocks = routed_blocks(8)
    assert blocks == range(2, 6)
    kept = torch.tensor([[0, 3], [1, 2], [0, 1], [2, 3]])
    t = torch.tensor([10, 300, 600, 900])
    seen: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _, x, index=index: seen.__setitem__(index, x[0]))
        for index, block in enumerate(model.blocks)
    ]
    with routed(model, blocks, kept):
        # registered after the recording ones, so block 2 records all tokens
        output = model(VIDEO, t, label=LABEL)
    for handle in handles:
        handle.remove()
    counts = [seen[index].shape[2] for index in range(8)]
    assert counts == [4, 4, 4, 2, 2, 2, 4, 4]
    for clip, row in enumerate(kept.tolist()):
        others = [n for n in range(4) if n not in row]
        assert torch.equal(seen[6][clip][:, others], seen[2][clip][:, others])
        assert not torch.equal(seen[6][clip][:, row], seen[2][clip][:, row])
    everything = torch.arange(4).expand(4, -1)
    with routed(model, blocks, everything):
        same = model(VIDEO, t, label=LABEL)
    assert torch.equal(same, model(VIDEO, t, label=LABEL))
    assert not torch.equal(output, same)


def test_each_clip_keeps_its_own_share_of_the_tokens():
    streams = [torch.Generator().manual_seed(seed) for seed in range(20)]
    kept = kept_tokens(0.5, 16, streams)
    assert kept.shape == (20, 8)
    assert all(row == sorted(set(row)) for row in kept.tolist())
    assert len({tuple(row) for row in kept.tolist()}) > 15
    assert kept_tokens(0.9, 4, streams).shape == (20, 1)


def test_routing_trains_and_is_independent_of_the_micro_batch():
    model = tiny_model(DEEP)
    options = StepOptions(route=0.5)
    plain, _ = gradients(model)
    losses, whole = gradients(model, options=options)
    assert not torch.equal(plain, losses)
    again, split = gradients(model, options=options, micro_batch=1)
    torch.testing.assert_close(again, losses)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": True}, r"train\.route needs the tokens .*train\.compile hides"),
        ({"gradient_checkpointing": True}, r"does not go with train\.gradient_checkpointing=True"),
        ({"num_images": 2}, r"does not go with train\.num_images=2"),
        ({"layer_sync": 0.2}, r"does not go with train\.layer_sync=0\.2"),
        ({"codec_align": 0.2}, r"does not go with train\.codec_align=0\.2"),
    ],
)
def test_what_routing_excludes_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(SHORT, route=0.5, **changes)


def test_networks_without_a_token_per_patch_are_refused():
    for changes in ({"conditioning": "all_tokens"}, {"value_residual": True}):
        for option in ("route", "codec_align"):
            with pytest.raises(InputError, match=r"need a token for each patch alone, but model\."):
                check_network(replace(SHORT, **{option: 0.5}), replace(DEEP, **changes))
    tubes = replace(DEEP, patch="compression", num_frames=4)
    check_network(replace(SHORT, codec_align=0.5), tubes)
    with pytest.raises(InputError, match=r"no latent of an image that fits a token of 2 frames"):
        check_network(replace(SHORT, codec_align=0.5, num_images=2), tubes)
