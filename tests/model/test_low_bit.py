# SPDX-License-Identifier: Apache-2.0
"""int8 and FP8 products: against float64 by hand, close to the float32 model, and no change of that model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import noise, wake
from torch import nn

from latte.checks import InputError
from latte.inference.generate import autocast
from latte.model.blocks import MLP
from latte.model.latte import Latte, ModelConfig
from latte.model.low_bit import PORTION, Fp8Linear, Int8Linear, LowBitMLP, fast_gelu, low_bit
from latte.model.text import LatteText, TextConfig

CPU = torch.device("cpu")
CLASSES = ModelConfig(depth=4, width=64, heads=4, num_frames=8, latent_size=16, num_classes=5)
TEXT = TextConfig(depth=2, width=64, heads=4, num_frames=8, latent_size=16, caption_channels=12)


def by_hand(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """The product of rounded integers, token by token and channel by channel, in float64."""
    weight, rows = layer.weight.detach().double(), x.double()
    weight_scale = weight.abs().amax(1) / 127
    scale = rows.abs().amax(1) / 127
    products = (rows / scale[:, None]).round() @ (weight / weight_scale[:, None]).round().T
    return products * scale[:, None] * weight_scale + layer.bias.detach().double()


def relative_rms(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()


@torch.no_grad()
def test_a_layer_is_the_product_of_rounded_numbers_with_a_scale_for_each_token_and_channel():
    layer = wake(nn.Linear(48, 80), 0.3)
    assert isinstance(layer, nn.Linear)
    layer.weight[3] *= 1000.0  # an outlier channel spoils no other
    x = noise(2, PORTION + 7, 48) * torch.logspace(-3, 3, PORTION + 7)[:, None]  # nor a token another
    x[0, 0] = 0.0
    found = Int8Linear(layer)(x)
    rows = x.flatten(0, 1)
    assert torch.equal(found[0, 0], layer.bias), "a token of zeros"
    torch.testing.assert_close(
        found.flatten(0, 1)[1:].double(), by_hand(layer, rows[1:]), rtol=1e-4, atol=1e-4
    )
    exact = layer(x)
    for channel in (0, 3):
        assert relative_rms(found[..., channel], exact[..., channel]) < 0.02
    assert relative_rms(found[0, 1], exact[0, 1]) < 0.02


@torch.no_grad()
def test_an_mlp_in_portions_is_its_two_layers():
    plain = wake(MLP(32), 0.2)
    assert isinstance(plain, MLP)
    x = noise(1, 3, PORTION, 32)
    first, last = Int8Linear(plain.fc1), Int8Linear(plain.fc2)
    exact = last(F.gelu(first(x), approximate="tanh"))
    torch.testing.assert_close(LowBitMLP(first, last)(x), exact, rtol=0, atol=2e-2)
    assert relative_rms(LowBitMLP(first, last)(x), exact) < 3e-3
    values = torch.linspace(-12, 12, 4001)
    torch.testing.assert_close(fast_gelu(values), F.gelu(values, approximate="tanh"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["class", "text"])
@torch.no_grad()
def test_a_model_in_int8_is_close_to_float32_and_leaves_it_alone(name):
    condition = {"label": torch.tensor([1, 4])}
    model = wake(Latte(CLASSES))
    if name == "text":
        condition = {"text": noise(2, 5, 12)}
        model = wake(LatteText(TEXT))
    before = copy.deepcopy(model.state_dict())
    z, t = noise(2, 8, 4, 16, 16), torch.tensor([20, 700])
    exact = model(z, t, **condition)
    rough = autocast(model, CPU, torch.int8)  # pyright: ignore[reportArgumentType]
    assert 1e-5 < relative_rms(rough(z, t, **condition), exact) < 3e-3
    assert torch.equal(model(z, t, **condition), exact)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kinds = [type(module) for block in rough.blocks for module in block.modules()]
    assert kinds.count(Int8Linear) == (len(rough.blocks) * 4 if name == "class" else 2 * 10 + 2 * 6)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    rough(z, t, **condition)
    handle.remove()
    assert calls == [1], "hooks of the model see its low-bit form"


@torch.no_grad()
def test_fp8_is_close_to_the_layer(monkeypatch):
    """The GPU's product, replaced by one of the same definition: scales of rows and columns."""

    def product(a, b, scale_a, scale_b, out_dtype):
        assert a.dtype == b.dtype == torch.float8_e4m3fn
        assert (scale_a.shape, scale_b.shape) == ((len(a), 1), (1, b.shape[1]))
        return ((a.float() @ b.float()) * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    layer = wake(nn.Linear(48, 80), 0.3)
    assert isinstance(layer, nn.Linear)
    x = noise(70, 48) * torch.logspace(-3, 3, 70)[:, None]
    error = relative_rms(Fp8Linear(layer)(x)[-1].float(), layer(x)[-1])
    assert 1e-3 < error < 0.06


def test_a_width_that_a_gpu_does_not_take_is_refused():
    narrow = Latte(ModelConfig(depth=2, width=24, heads=2, num_frames=2, latent_size=4, num_classes=2))
    with pytest.raises(
        InputError, match=r"dtype is int8, but a layer has 24 and 72 features.*multiples of 16"
    ):
        low_bit(narrow, torch.int8, torch.device("cuda"))
