# SPDX-License-Identifier: Apache-2.0
"""The memory of a training step, counted without computing, against what autograd saves."""

from dataclasses import replace

import pytest
import torch
from support import noise, wake

from latte.model.latte import Latte, ModelConfig
from latte.profile import memory
from latte.training.optim import OPTIMIZERS, TrainState

TINY = ModelConfig(depth=4, width=32, heads=4, latent_size=8, num_frames=4, num_classes=5)


def truly_saved(config, clips, num_images=0, dtype=torch.float32, checkpointing=False, device="cpu"):
    """Bytes of all storages that a real forward pass saves, without the weights'."""
    model = wake(Latte(config)).to(device)
    model.gradient_checkpointing = checkpointing
    z = noise(clips, config.num_frames + num_images, config.latent_channels, *config.grid_size).to(device)
    label = torch.zeros((clips, 1 + num_images) if num_images else (clips,), dtype=torch.long, device=device)
    found, alive = {}, []

    def keep(tensor):
        alive.append(tensor)  # an address means something while its storage lives
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(device, dtype, enabled=dtype != torch.float32),
    ):
        out = model(z, torch.zeros(clips, dtype=torch.long, device=device), label, num_images)
    assert out.grad_fn is not None
    for parameter in model.parameters():
        found.pop(parameter.data_ptr(), None)
    return sum(found.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("changes", "num_images"),
    [
        ({}, 0),
        ({}, 2),
        ({"variant": 2}, 0),
        ({"variant": 3}, 2),
        ({"variant": 4}, 0),
        ({"variant": "joint"}, 0),
        ({"temporal_position": "rotary"}, 0),
        ({"conditioning": "all_tokens"}, 2),
        ({"patch": "compression"}, 0),
    ],
)
def test_activations_are_what_autograd_saves(changes, num_images, checkpointing):
    config = replace(TINY, **changes)
    found = memory.activations(config, 3, num_images)
    true = truly_saved(config, 3, num_images, checkpointing=checkpointing)
    assert (found.kept if checkpointing else found.plain) == pytest.approx(true, rel=1e-3)


def test_reduced_precision_is_followed(monkeypatch):
    monkeypatch.setattr(memory, "RAISED", set())  # autocast on the CPU leaves norms alone
    found, true = (
        memory.activations(TINY, 3, dtype=torch.bfloat16),
        truly_saved(TINY, 3, dtype=torch.bfloat16),
    )
    assert found.plain == pytest.approx(true, rel=0.01)
    assert found.plain < 0.7 * memory.activations(TINY, 3).plain


@pytest.mark.gpu
def test_reduced_precision_is_followed_on_a_gpu():
    config = replace(TINY, width=64, heads=2)
    true = truly_saved(config, 3, dtype=torch.bfloat16, device="cuda")
    assert memory.activations(config, 3, dtype=torch.bfloat16).plain == pytest.approx(true, rel=0.02)


def test_checkpointing_keeps_less_and_one_block_is_recomputed_at_a_time():
    found = memory.activations(TINY, 3)
    assert found.kept < found.checkpointed < found.plain
    assert found.plain / 5 < found.recomputed < found.plain / 4, (
        "the largest of four equal blocks; patches and the last layer beside them"
    )


def test_pairs_of_blocks_keep_half_as_many_inputs_and_recompute_two_blocks():
    single, pairs = (memory.activations(TINY, 3, checkpointing=stages) for stages in (True, "pairs"))
    assert pairs.kept == pytest.approx(truly_saved(TINY, 3, checkpointing="pairs"), rel=1e-3)
    tokens = 3 * TINY.num_tokens * TINY.dimensions[1] * memory.FLOAT32
    assert single.kept - pairs.kept == pytest.approx(2 * tokens, rel=0.05), "two of the four inputs"
    assert pairs.recomputed == pytest.approx(2 * single.recomputed, rel=0.05)
    assert pairs.plain == single.plain


def test_activations_grow_with_the_clips_and_the_blocks():
    one, two, deep = (
        memory.activations(replace(TINY, depth=depth), clips).plain
        for clips, depth in ((1, 4), (2, 4), (2, 8))
    )
    assert 1.9 < two / one <= 2
    assert 1.9 < deep / two <= 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_are_those_of_training(optimizer):
    model = Latte(TINY)
    train_state = TrainState(model, 1e-3, 0.0, 0.9, optimizer=optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
    train_state.optimizer.step()
    true = {
        group: sum(tensor.nbytes for tensor in tensors.values())
        for group, tensors in train_state.parts().items()
    }
    found = memory.states(TINY, optimizer=optimizer)
    assert (found.weights, found.gradients, found.optimizer, found.ema) == (
        true["model"],
        gradients,
        true["optimizer"],
        true["ema"],
    )
    assert found.checkpoint == sum(true.values())
