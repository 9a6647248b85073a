# SPDX-License-Identifier: Apache-2.0
"""Branches that recompute what is cheap: the same bits, the same gradients, half the memory."""

import copy
from typing import Any

import pytest
import torch
from support import noise, wake
from torch.autograd.graph import saved_tensors_hooks

from latte.model.blocks import saves_less
from latte.model.fused import GatedLinear, ModulatedLinear
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig
from latte.profile.memory import activations

SHAPE: dict[str, Any] = {"depth": 2, "width": 16, "heads": 2, "num_frames": 4, "latent_size": 4}
MODELS = {
    **{f"variant {name}": ModelConfig(**SHAPE, num_classes=5, variant=name) for name in (1, 3, 4, "joint")},
    "all tokens": ModelConfig(**SHAPE, num_classes=5, conditioning="all_tokens"),
    "text": TextConfig(**SHAPE, caption_channels=6),
    "options": ModelConfig(**SHAPE, num_classes=5, qk_norm=True, value_residual=True, mlp="swiglu"),
    "text with options": TextConfig(**SHAPE, caption_channels=6, value_residual=True, mlp="swiglu"),
}


def run(model, dtype=torch.float32, **condition) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and gradients by name, for three clips with two images each, all with their own conditions."""
    z = noise(3, 6, 4, 4, 4)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(z, torch.tensor([3, 50, 900]), num_images=2, **condition).float()
    (out * noise(*out.shape, seed=4)).sum().backward()
    return out.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def pair(config) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A model that saves all, its copy that recomputes, and a condition."""
    saving = wake(LatteText(config) if config.reads_text else Latte(config), 0.2)
    lean: Any = copy.deepcopy(saving)
    lean.recompute(True)
    if config.reads_text:
        return saving, lean, {"text": noise(3, 3, 5, 6)}
    return saving, lean, {"label": torch.tensor([[0, 1, 2], [2, 3, 4], [0, 0, 0]])}


@pytest.mark.parametrize("name", MODELS)
def test_same_bits_forward_and_the_same_gradients(name):
    saving, lean, condition = pair(MODELS[name])
    out, exact = run(saving, **condition)
    again, found = run(lean, **condition)
    assert torch.equal(again, out)
    for key, gradient in exact.items():
        assert (found[key] - gradient).norm() <= 1e-6 * gradient.norm(), key


def test_gradients_under_autocast_are_as_far_from_float32_as_those_that_save_all():
    saving, lean, condition = pair(MODELS["variant 1"])
    _, exact = run(copy.deepcopy(saving), **condition)
    distances = []
    for model in (saving, lean):
        _, rough = run(model, torch.bfloat16, **condition)
        distances.append(
            {key: ((rough[key] - value).norm() / value.norm()).item() for key, value in exact.items()}
        )
    assert max(distances[0].values()) > 1e-3, "bfloat16 was used"
    assert all(distances[1][key] <= 2 * error + 1e-3 for key, error in distances[0].items())


@pytest.mark.parametrize("rows", [(2, 1), (1, 1), (2, 3)])  # a condition a clip, one for all, one an image
@pytest.mark.parametrize("gelu", [False, True])
def test_gradients_are_those_of_finite_differences(rows, gelu):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=stream).requires_grad_()

    stream = torch.Generator().manual_seed(0)
    x, shift, scale, gate = draw(2, 3, 4, 5), draw(*rows, 1, 5), draw(*rows, 1, 5), draw(*rows, 1, 5)
    first = draw(7, 5), draw(7)
    last = draw(5, 7), draw(5)
    dtype = torch.float64
    assert torch.autograd.gradcheck(
        lambda *t: ModulatedLinear.apply(*t[:3], 1e-6, *t[3:], dtype), (x, shift, scale, *first)
    )
    inner = draw(2, 3, 4, 7)
    assert torch.autograd.gradcheck(lambda *t: GatedLinear.apply(*t, gelu, dtype), (x, gate, inner, *last))


def saved_bytes(model, condition) -> int:
    """Bytes of what the forward pass keeps, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(noise(1, 4, 4, 16, 16), torch.tensor([7]), **condition)
    return sum(storage.nbytes() for storage in kept.values())


def test_it_saves_half():
    """In units of the tokens (b f n d) in float32, for a block each: 20 without it, 10 with it."""
    config = ModelConfig(depth=8, width=64, heads=2, num_frames=4, latent_size=16, num_classes=5)
    saving, lean, _ = pair(config)
    unit = config.num_tokens * 64 * 4 * 8
    counts = [saved_bytes(model, {"label": torch.tensor([1])}) / unit for model in (saving, lean)]
    assert 19.5 < counts[0] < 22.5
    assert 9.5 < counts[1] < 11.5
    planned = activations(config, 1, adapt=lambda model: model.recompute(True)).plain / unit
    assert abs(planned - counts[1]) < 0.5, "and the plan of memory knows"


def test_under_autocast_it_keeps_no_copies_of_modulation_weights_and_no_last_norm():
    """bf16, in units of the tokens in float32: x twice, qkv, attention and fc1's output are 6 a block."""
    config = ModelConfig(depth=8, width=64, heads=2, num_frames=4, latent_size=16, num_classes=5)
    saving, lean, _ = pair(config)
    unit = config.num_tokens * 64 * 4
    with torch.autocast("cpu", torch.bfloat16):
        counts = [saved_bytes(model, {"label": torch.tensor([1])}) / unit for model in (saving, lean)]
    assert counts[1] < 8 * 6 + 1 + 1.5, "the input of the last layer, and 1.5 for embeddings"
    assert counts[0] > 2 * counts[1]


def test_layers_with_adapters_or_hooks_and_sampling_take_the_path_that_saves_all():
    block: Any = Latte(MODELS["variant 1"]).blocks[0]
    branch = block.branches["space"] if "space" in block.branches else next(iter(block.branches.values()))
    gate = torch.zeros(1)
    assert saves_less(branch, gate)
    assert not saves_less(branch, None)
    with torch.no_grad():
        assert not saves_less(branch, gate)
    handle = branch.proj.register_forward_hook(lambda *_: None)
    assert not saves_less(branch, gate)
    handle.remove()
    branch.qkv = torch.nn.Sequential(branch.qkv)
    assert not saves_less(branch, gate)
