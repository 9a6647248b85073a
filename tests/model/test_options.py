# SPDX-License-Identifier: Apache-2.0
"""QK-norm, value residual and SwiGLU: each by hand, and a model without them is stored as it always was."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from support import noise, wake
from torch.nn import functional as F

from latte.ablate.axes import make_settings
from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError
from latte.config.run import load_run
from latte.interop.diffusers import diffusers_state
from latte.interop.official import official_state
from latte.model.blocks import SpaceAttention, SwiGLU, TimeAttention
from latte.model.config import OPTIONS, BlockOptions, ModelConfig, TextConfig
from latte.model.latte import Latte
from latte.model.positions import AbsoluteTime
from latte.model.text import LatteText
from latte.profile.flops import count
from latte.training.between_blocks import captured
from tiny_runs import TINY, run, tiny_model

ALL: dict[str, Any] = {"qk_norm": True, "value_residual": True, "mlp": "swiglu"}
TEXT = TextConfig(depth=2, width=32, heads=2, num_frames=3, latent_size=4, caption_channels=6)
CLASS = ModelConfig(depth=4, width=32, heads=2, num_frames=3, latent_size=4, num_classes=3)


def test_queries_and_keys_are_normed_in_every_head():
    attention: Any = wake(SpaceAttention(16, 2, BlockOptions(qk_norm=True)), 0.5)
    x = noise(2, 3, 5, 16)
    q, k, v = attention.qkv(x).double().view(2, 3, 5, 3, 2, 8).permute(3, 0, 1, 4, 2, 5)  # (b f h n k)
    q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.norm.query.weight.double()
    k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.norm.key.weight.double()
    weights = (q @ k.mT / 8**0.5).softmax(-1)
    expected = (weights @ v).transpose(2, 3).flatten(3)  # (b f n d)
    torch.testing.assert_close(attention(x), attention.proj(expected.float()), rtol=1e-4, atol=1e-5)


def test_values_are_mixed_with_those_of_the_first_attention():
    options = BlockOptions(value_residual=True)
    first, second = SpaceAttention(16, 2, options), TimeAttention(16, 2, AbsoluteTime(8), options)
    first.value_residual.share = None  # pyright: ignore
    with torch.no_grad():
        second.value_residual.share.fill_(0.25)  # pyright: ignore
    x, y = noise(1, 3, 4, 16), noise(1, 3, 4, 16, seed=1)
    values: list[torch.Tensor] = []
    first(x, values=values)
    found = second(y, values=values)
    q, k, v = second.qkv(y).view(1, 3, 4, 3, 16).unbind(-2)  # each (b f n d)
    v = 0.75 * v + 0.25 * first.qkv(x)[..., 32:]
    heads = [part.view(3, 4, 2, 8).permute(1, 2, 0, 3) for part in (q, k, v)]  # each (n h f k)
    out = F.scaled_dot_product_attention(*heads).permute(2, 0, 1, 3).reshape(1, 3, 4, 16)
    torch.testing.assert_close(found, second.proj(out), rtol=1e-4, atol=1e-6)


def test_swiglu_has_as_many_weights_as_the_gelu_layer():
    layer: Any = SwiGLU(384)
    x = noise(1, 1, 5, 384)
    a, b = (x @ layer.fc1.weight.T + layer.fc1.bias).split(1024, dim=-1)
    expected = (a * torch.sigmoid(a) * b) @ layer.fc2.weight.T + layer.fc2.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert layer.fc1.weight.numel() + layer.fc2.weight.numel() == 8 * 384**2


@pytest.mark.parametrize("config", [CLASS, TEXT], ids=["class", "text"])
def test_parameters_and_operations(config):
    depth = config.num_blocks
    plain, every = count(config), count(replace(config, **ALL))
    hidden = 80  # 8/3 of 32, to a multiple of 16
    mlp = (3 * 32 * hidden + 2 * hidden + 32) - (8 * 32 * 32 + 4 * 32 + 32)
    attentions = depth + (config.depth if config.reads_text else 0)  # cross-attention is normed, too
    assert every.parameters - plain.parameters == depth * mlp + attentions * 2 * 16 + depth - 1
    tokens = 3 * 4
    assert every.operations - plain.operations == depth * 2 * tokens * (3 * 32 * hidden - 8 * 32 * 32)


@pytest.mark.parametrize("config", [CLASS, TEXT], ids=["class", "text"])
@pytest.mark.parametrize("option", ALL)
def test_every_option_reaches_the_output_the_gradient_and_images(config, option):
    model: Any = wake(replace(config, **{option: ALL[option]}).build(), 0.2)
    plain: Any = wake(config.build(), 0.2)
    condition = {"text": noise(2, 3, 6)} if config.reads_text else {"label": torch.tensor([0, 1])}
    z, t = noise(2, 5, 4, 4, 4), torch.tensor([3, 500])
    out = model(z, t, **condition, num_images=2)
    other = plain(z, t, **condition, num_images=2)
    assert not torch.allclose(out[:, :3], other[:, :3])
    assert not torch.allclose(out[:, 3:], other[:, 3:])
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        alone = model(z[:, :3], t, **condition)
    torch.testing.assert_close(out[:, :3], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [CLASS, TEXT], ids=["class", "text"])
def test_checkpointing_compiling_and_bfloat16(config):
    model: Any = wake(replace(config, **ALL).build(), 0.2)
    condition = {"text": noise(2, 3, 6)} if config.reads_text else {"label": torch.tensor([0, 1])}
    inputs = noise(2, 3, 4, 4, 4), torch.tensor([3, 500])
    expected = model(*inputs, **condition)
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing = True
    again = model(*inputs, **condition)
    again.square().mean().backward()
    assert torch.equal(again, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs, **condition).float()
    assert 0 < (rough - expected).norm() < 0.05 * expected.norm()


def test_layer_sync_reads_the_tokens_and_not_the_values():
    model: Any = wake(replace(CLASS, value_residual=True).build(), 0.2)
    with captured(model, (0, 2)) as (early, deep):
        model(noise(1, 3, 4, 4, 4), torch.tensor([5]))
    assert early[0].shape == deep[0].shape == (1, 3, 4, 32)


@pytest.mark.parametrize("config", [CLASS, TEXT], ids=["class", "text"])
def test_defaults_are_not_stored_and_old_configurations_are_read(config):
    stored = json.loads(json.dumps(config.stored()))
    assert not set(stored) & set(OPTIONS)
    assert list(stored) == [name for name in asdict(config) if name not in OPTIONS]
    assert type(config)(**stored) == config
    every = replace(config, **ALL)
    assert {name: every.stored()[name] for name in ALL} == ALL
    assert type(config)(**every.stored()) == every
    assert not [name for name in config.build().state_dict() if ".norm." in name or "share" in name]


def test_weights_folders_hold_the_options(tmp_path):
    model: Any = wake(Latte(replace(CLASS, **ALL))).eval()
    model.save_pretrained(tmp_path / "every")
    again = Latte.from_pretrained(tmp_path / "every")
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    Latte(CLASS).save_pretrained(tmp_path / "none")
    assert not set(json.loads((tmp_path / "none" / "config.json").read_text())) & set(OPTIONS)


def test_a_run_resumes_with_its_options_and_refuses_others(tmp_path):
    config = replace(TINY, **ALL)
    whole = run(tmp_path / "whole", model=tiny_model(config))
    run(tmp_path / "parts", model=tiny_model(config), until=6)
    assert run(tmp_path / "parts", model=tiny_model(config))["weights_sha256"] == whole["weights_sha256"]
    with pytest.raises(InputError, match=r'model.mlp: the run has "swiglu", you gave "gelu"'):
        run(tmp_path / "parts", model=tiny_model(replace(config, mlp="gelu")))


def test_a_run_without_options_has_the_facts_of_older_versions(tmp_path):
    run(tmp_path, until=3)
    facts = load_checkpoint(tmp_path / "checkpoints" / "step-3").state["facts"]
    assert not set(facts["model"]) & set(OPTIONS)
    with pytest.raises(InputError, match=r"model.qk_norm: the run has false, you gave true"):
        run(tmp_path, model=tiny_model(replace(TINY, qk_norm=True)))


@pytest.mark.parametrize("option", ALL)
def test_layouts_without_a_place_refuse_in_one_line(option):
    changes: Any = {option: ALL[option]}
    for state, model, layout in (
        (official_state, Latte(replace(CLASS, **changes)), "the released code"),
        (diffusers_state, LatteText(replace(TEXT, **changes)), "diffusers"),
    ):
        with pytest.raises(InputError) as error:
            state(model)  # pyright: ignore
        assert f"model.{option} is {ALL[option]}, but {layout} has no place for it" in str(error.value)
        assert "\n" not in str(error.value)


def test_an_unknown_layer_is_named_and_options_are_axes():
    with pytest.raises(InputError, match=r"model.mlp is 'relu'.*swiglu"):
        ModelConfig(mlp="relu")
    base, _ = load_run("shapes-tiny", ["model.qk_norm=true"])
    assert base.model.qk_norm
    settings, _ = make_settings(base, ["qk_norm", "value_residual", "mlp"])
    assert any(setting.config.model.mlp == "swiglu" for setting in settings)
