# SPDX-License-Identifier: Apache-2.0
"""LoRA: nothing changes until it is trained, nothing else is trained, and merging again leaves
every bit of the base.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import noise, wake

from latte.checks import InputError, RunError, printable
from latte.interop.lora import (
    LoraConfig,
    add_lora,
    base_state,
    load_lora,
    lora_layers,
    lora_state,
    merged,
    merged_state,
    read_settings,
    save_lora,
    target_names,
)
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig
from tiny_pipeline import seeded

peft = pytest.importorskip("peft", reason="needs the extra lora")

SMALL = {"depth": 2, "width": 16, "heads": 2, "num_frames": 4, "latent_size": 4}
Z, T, LABEL, TEXT = noise(2, 4, 4, 4, 4), torch.tensor([3, 700]), torch.tensor([0, 2]), noise(2, 5, 6)
KINDS = ("class", "text")
TARGETS = {"class": ("qkv", "proj", "mlp"), "text": ("qkv", "proj", "cross", "mlp")}


def plain(kind: str):
    """The same model at every call."""
    if kind == "text":
        return wake(seeded(lambda: LatteText(TextConfig(**SMALL, caption_channels=6))), 0.1)
    return wake(seeded(lambda: Latte(ModelConfig(**SMALL, num_classes=3))), 0.1)


def answer(model):
    return model(Z, T, TEXT if isinstance(getattr(model, "config", None), TextConfig) else LABEL)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def adapted(kind: str, steps: int = 0, targets=None, rank: int = 2):
    """A model with adapters, after some steps of AdamW towards a fixed answer."""
    model = plain(kind)
    add_lora(model, LoraConfig(rank, 4.0, targets or TARGETS[kind]))
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01
    )
    for _ in range(steps):
        optimizer.zero_grad()
        answer(model).sub(1).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_nothing_and_leave_the_global_stream_alone(kind):
    before, state = answer(plain(kind)), torch.get_rng_state()
    model = adapted(kind)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(answer(model), before)
    assert same(lora_state(model), lora_state(adapted(kind))), "a function of the seed"
    other = plain(kind)
    add_lora(other, LoraConfig(2, 4.0, TARGETS[kind]), seed=1)
    assert not same(lora_state(model), lora_state(other))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_are_trained_and_the_base_keeps_every_bit(kind):
    base, model = copied(plain(kind).state_dict()), adapted(kind)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == lora_state(model).keys()
    fresh = copied(lora_state(model))
    loss = float(answer(model).detach().sub(1).square().mean())
    model = adapted(kind, steps=5)
    assert same(base_state(model), base)
    assert all(not torch.equal(lora_state(model)[name], tensor) for name, tensor in fresh.items())
    assert float(answer(model).detach().sub(1).square().mean()) < loss


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_folded_and_adapted_models_are_one_and_the_base_is_left_alone(kind):
    with torch.enable_grad():
        model = adapted(kind, steps=5)
    base, expected = copied(base_state(model)), answer(model)
    plain_one = merged(model)
    torch.testing.assert_close(answer(plain_one), expected, rtol=1e-4, atol=1e-5)
    assert same(dict(plain_one.state_dict()), merged_state(model))
    assert not lora_layers(plain_one)
    assert not torch.allclose(answer(plain(kind)), expected, rtol=1e-2)
    assert same(base_state(model), base)
    assert torch.equal(answer(model), expected)


def test_the_update_is_alpha_over_rank_b_a():
    model = adapted("class", steps=3, targets=("mlp",))
    state, base = merged_state(model), base_state(model)
    for name in lora_layers(model):
        a, b = (
            model.get_submodule(name).get_submodule(f"lora_{side}.default").weight.double() for side in "AB"
        )
        change = state[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        torch.testing.assert_close(change, 4.0 / 2 * b @ a, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "targets", "leaves"),
    [
        ("class", ("qkv",), {"qkv"}),
        ("class", ("proj", "mlp"), {"proj", "fc1", "fc2"}),
        ("text", ("qkv",), {"q", "k", "v"}),
        ("text", ("cross",), {"q", "k", "v", "proj"}),
    ],
)
def test_targets_mean_their_projections_in_every_block(kind, targets, leaves):
    names = target_names(plain(kind), targets)
    assert {name.split(".")[-1] for name in names} == leaves
    assert all("blocks." in name and ("cross" in name) == (targets == ("cross",)) for name in names)
    assert len(names) == len(leaves) * (4 if kind == "text" and targets != ("cross",) else 2)
    model = adapted(kind, targets=targets)
    assert sorted(lora_layers(model)) == names


@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_every_variant_of_the_class_model_takes_adapters(variant):
    model = wake(Latte(ModelConfig(**SMALL, variant=variant)))
    before = model(Z, T)
    add_lora(model, LoraConfig(2, 2.0, ("qkv", "proj", "mlp")))
    assert torch.equal(model(Z, T), before)
    model(Z, T).square().mean().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_adapters_go_out_and_come_back_and_peft_itself_reads_them(kind, tmp_path):
    with torch.enable_grad():
        model = adapted(kind, steps=4)
    save_lora(model, tmp_path / "lora")
    assert sorted(file.name for file in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert sum(
        tensor.numel() for tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()
    ) == sum(tensor.numel() for tensor in lora_state(model).values())
    ours, external = plain(kind), plain(kind)
    load_lora(ours, tmp_path / "lora")
    assert same(dict(ours.state_dict()), dict(model.state_dict()))
    assert torch.equal(answer(ours), answer(model))
    wrapped = peft.PeftModel.from_pretrained(external, tmp_path / "lora")
    assert torch.equal(wrapped(Z, T, TEXT if kind == "text" else LABEL), answer(model))
    save_lora(ours, tmp_path / "lora")
    (tmp_path / "lora" / "thesis.tex").touch()
    with pytest.raises(InputError, match="other files"):
        save_lora(ours, tmp_path / "lora")


def test_adapters_of_other_weights_or_broken_ones_are_refused_and_change_nothing(tmp_path):
    save_lora(adapted("class"), tmp_path / "a")
    other = wake(plain("class"), seed=9)
    state = copied(other.state_dict())
    with pytest.raises(InputError, match=r"the model's weights have hash .* was trained on"):
        load_lora(other, tmp_path / "a")
    weights, card = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(card.read_text())
    name = next(iter(tensors))
    for change, message in (
        ({name: tensors[name][:, :3].contiguous()}, "does not match this"),
        ({"base_model.model.more.lora_A.weight": torch.zeros(2, 2)}, "does not match this"),
    ):
        save_file({**tensors, **change}, weights)
        with pytest.raises(InputError, match=message):
            load_lora(other, tmp_path / "a")
    save_file(tensors, weights)
    for change in ({"use_dora": True}, {"r": "8"}, {"peft_type": "LOHA"}, {"target_modules": "all-linear"}):
        card.write_text(json.dumps({**settings, **change}))
        with pytest.raises(InputError, match="plain LoRA") as caught:
            load_lora(other, tmp_path / "a")
        assert "\n" not in str(caught.value)
    assert same(dict(other.state_dict()), state)
    card.write_text(json.dumps(settings))
    load_lora(other, tmp_path / "a")  # a file without the hash, as other programs write it
    with pytest.raises(InputError, match="adapters already"):
        load_lora(other, tmp_path / "a")
    with pytest.raises(InputError, match="adapters already"):
        add_lora(other, LoraConfig(2))
    with pytest.raises(InputError, match="no separate adapters to save"):
        save_lora(plain("class"), tmp_path / "b")
    with pytest.raises(
        InputError, match=r"holds no adapters .adapter_config.json is missing.; use a folder of latte convert"
    ):
        load_lora(plain("class"), tmp_path / "b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "lora.rank must be at least 1"),
        ({"rank": 2, "alpha": 0}, "lora.alpha must be positive"),
        ({"rank": 2, "targets": ()}, "lora.targets is empty"),
        ({"rank": 2, "targets": ("qvk",)}, "did you mean 'qkv'"),
        ({"alpha": 4.0}, "without lora.rank there are no adapters"),
        ({"targets": ("mlp",)}, "without lora.rank there are no adapters"),
    ],
)
def test_a_wrong_configuration_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        LoraConfig(**given)


def test_a_target_that_the_model_has_not_is_refused():
    model = plain("class")
    with pytest.raises(
        InputError,
        match=r"lora.targets has 'cross', but Latte has no such projection; give some of qkv, proj, mlp",
    ):
        add_lora(model, LoraConfig(2, targets=("qkv", "cross")))
    with pytest.raises(InputError, match="adapters need a rank"):
        add_lora(model, LoraConfig())
    assert not lora_layers(model)


PEFT_DEFAULTS = {
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_qalora": False,
    "loftq_config": {},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_dora", True),
        ("use_rslora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("rank_pattern", {"blocks.0": 4}),
        ("alpha_pattern", {"blocks.0": 4}),
        ("layers_to_transform", [0]),
        ("layer_replication", [[0, 1]]),
        ("modules_to_save", ["final_linear"]),
        ("trainable_token_indices", [1]),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("exclude_modules", ["blocks.0"]),
        ("a_kind_of_next_year\x1b[2J", True),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_their_key(key, value, tmp_path):
    save_lora(adapted("class"), tmp_path / "a")
    card, model = tmp_path / "a" / "adapter_config.json", plain("class")
    settings = {**json.loads(card.read_text()), **PEFT_DEFAULTS}
    card.write_text(json.dumps({**settings, key: value}))
    with pytest.raises(InputError) as error:
        load_lora(model, tmp_path / "a")
    message = str(error.value)
    assert f"{printable(key)} is " in message
    assert message.isprintable()
    assert not lora_layers(model)
    card.write_text(json.dumps(settings))
    load_lora(plain("class"), tmp_path / "a")


def test_every_setting_that_peft_writes_for_plain_lora_is_accepted(tmp_path):
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], lora_dropout=0.1).save_pretrained(tmp_path)
    assert read_settings(tmp_path / "adapter_config.json") == (4, 8, ["qkv"])


def test_nonfinite_adapters_are_neither_saved_nor_loaded(tmp_path):
    model = adapted("class")
    save_lora(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0] = float("inf")
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(InputError, match=f"'{name}' holds"):
        load_lora(plain("class"), tmp_path / "a")
    with torch.no_grad():
        next(iter(lora_state(model).values()))[0] = float("nan")
    with pytest.raises(RunError, match="NaN or Inf"):
        save_lora(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
