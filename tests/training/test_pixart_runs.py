# SPDX-License-Identifier: Apache-2.0
"""A run that starts from PixArt-alpha: PixArt frame by frame before its first step, a gate that opens
evenly, and an exact way back in.
"""

from dataclasses import replace

import pytest
import torch
from support import noise, wake

from latte.build import build
from latte.checkpoint.run import load_checkpoint, save_checkpoint
from latte.checks import InputError
from latte.config.run import load_run
from latte.inference.pipeline import VideoPipeline
from latte.interop.diffusers import diffusers_state
from latte.model.text import LatteText
from latte.training.config import TrainConfig, gate_opening
from tiny import WORDS, tiny_text

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "in_channels": 3,
    "out_channels": 6,
    "sample_size": 16,
    "patch_size": 4,
    "caption_channels": 64,
}
T = torch.tensor([3, 777])


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """(a PixArt with random weights, its folder)."""
    from diffusers import PixArtTransformer2DModel

    folder = tmp_path_factory.mktemp("pixart")
    model = wake(PixArtTransformer2DModel(**SIZES), 0.1).eval()
    model.save_pretrained(folder)
    return model, folder


def job(folder, source, *words):
    """The smallest run that starts from ``source``, in ``folder``."""
    start = [
        f"train.init={source}",
        "text.gated_time=true",
        "train.lr=0.01",
        "train.checkpoint_every=1",
        "train.keep_last=9",
    ]
    return build(load_run("shapes-text", [*WORDS, *start, f"run.dir={folder}", *words])[0], "cpu")


def gates(folder) -> list[tuple[float, float]]:
    """That of the model and that of the average, checkpoint by checkpoint."""
    steps = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    return [
        tuple(float(load_checkpoint(path).tensors[group]["time_gate"]) for group in ("model", "ema"))
        for path in steps
    ]


@torch.no_grad()
def test_before_its_first_step_the_run_is_pixart_frame_by_frame(image, tmp_path):
    started = job(tmp_path, image[1])
    fresh = {name: tensor.clone() for name, tensor in started.model.state_dict().items()}
    started.train(until=0)
    model, (z, text) = started.model.eval(), (noise(2, 3, 3, 16, 16), noise(2, 7, 64))
    assert not torch.equal(model.state_dict()["patch.proj.weight"], fresh["patch.proj.weight"]), (
        "nothing was loaded"
    )
    clip = model(z, T, text)
    assert torch.equal(clip, model(z, T, text, temporal=False)), "difference 0 to the image model"
    pictures = torch.stack([image[0](z[:, f], text, T).sample for f in range(3)], 1)
    assert pictures.std() > 0.1
    assert float((clip - pictures).abs().max()) <= 1e-5 * float(pictures.abs().max())


def test_without_a_gate_it_does_not_start(image, tmp_path):
    with pytest.raises(
        InputError,
        match=r"^train.init: text.gated_time is False, but .* is a PixArt.*; set text.gated_time=true$",
    ):
        job(tmp_path / "run", image[1], "text.gated_time=false").train(until=0)
    assert not [file for file in (tmp_path / "run").rglob("*") if file.suffix]


def test_the_gate_opens_evenly_in_model_and_average(image, tmp_path):
    job(tmp_path, image[1], "train.gate_steps=3", "train.steps=5").train()
    thirds = [float(torch.tensor(k / 3)) for k in (1, 2, 3, 3, 3)]
    assert gates(tmp_path) == [(gate, gate) for gate in thirds]
    assert thirds[2:] == [1.0] * 3
    with pytest.raises(InputError, match=r"train.gate_steps is 0, but it must be at least 1"):
        TrainConfig(gate_steps=0)


def test_a_stopped_run_is_the_run_that_was_never_stopped(image, tmp_path):
    words = ["train.gate_steps=7", "train.steps=6"]
    job(tmp_path / "whole", image[1], *words).train()
    for until in (1, 3, 6):
        assert job(tmp_path / "parts", image[1], *words).train(until)["step"] == until
    one, two = (
        load_checkpoint(tmp_path / name / "checkpoints/step-6").tensors for name in ("whole", "parts")
    )
    assert {group: tensors.keys() for group, tensors in one.items()} == {
        group: tensors.keys() for group, tensors in two.items()
    }
    assert all(
        torch.equal(tensor, two[group][name])
        for group, tensors in one.items()
        for name, tensor in tensors.items()
    )
    assert gates(tmp_path / "parts")[-1][0] == float(torch.tensor(6 / 7))
    assert not torch.equal(one["model"]["time_blocks.0.mlp.fc2.weight"], torch.zeros(16, 64)), (
        "nothing temporal was learned"
    )


def test_other_gate_steps_are_announced_and_close_nothing(image, tmp_path, capsys):
    job(tmp_path, image[1], "train.gate_steps=4", "train.steps=2").train()
    job(tmp_path, image[1], "train.gate_steps=8", "train.steps=5").train()
    assert "notice: train.gate_steps was 4 up to step 2 and is 8 from here on" in capsys.readouterr().err
    job(tmp_path, image[1], "train.gate_steps=5", "train.steps=6").train()
    assert [gate for gate, _ in gates(tmp_path)] == [0.25, 0.5, 0.5, 0.5, 0.625, 1.0]
    assert (gate_opening(1, 1.0, 1000), gate_opening(10, 1.3, 5)) == (1.0, 1.0)


def test_a_run_that_starts_from_an_open_gate_keeps_it(image, tmp_path):
    job(tmp_path / "one", image[1], "train.gate_steps=1", "train.steps=1").train()
    job(tmp_path / "two", tmp_path / "one", "train.steps=1").train()
    assert gates(tmp_path / "two") == [(1.0, 1.0)]


def test_a_run_with_a_learned_gate_goes_on(image, tmp_path):
    """As runs were before the loop opened it: a parameter, with moments of its own and an average."""
    job(tmp_path, image[1], "train.steps=1").train()
    found = load_checkpoint(tmp_path / "checkpoints/step-1")
    found.tensors["model"]["time_gate"], found.tensors["ema"]["time_gate"] = (
        torch.tensor([0.3]),
        torch.tensor([0.2]),
    )
    found.tensors["optimizer"] |= {f"time_gate:{what}": torch.ones(1) for what in ("exp_avg", "exp_avg_sq")}
    del found.state["settings"]["gate_steps"]
    save_checkpoint(tmp_path, 1, found.tensors, found.state)
    assert float(
        VideoPipeline.from_pretrained(tmp_path, device="cpu").model.state_dict()["time_gate"]
    ) == float(torch.tensor(0.2))
    assert job(tmp_path, image[1], "train.gate_steps=4", "train.steps=2").train()["step"] == 2
    assert gates(tmp_path)[-1] == (0.5, 0.5)


def test_the_gate_is_reported_when_it_is_not_open_with_the_step_where_it_is():
    gated = LatteText(replace(tiny_text().model.config, gated_time=True))
    gated.open_gate(0.25)
    with pytest.raises(
        InputError,
        match=r"^time_gate is 0.25, but .*; resume training up to step 40 \(train.gate_steps\), where the gate is open",
    ):
        diffusers_state(gated, 40)
    with pytest.raises(
        InputError,
        match=r"resume training up to step train.gate_steps, where the gate is open, or resume with a lower",
    ):
        diffusers_state(gated)
    gated.open_gate(1.0)
    assert len(diffusers_state(gated)) == len(gated.state_dict()) - 1


def test_adapters_leave_the_gate_as_it_is_and_so_want_it_open(image, tmp_path):
    pytest.importorskip("peft", reason="needs the extra lora")
    words = ["lora.rank=2", "text.length=16", "train.steps=2"]
    with pytest.raises(
        InputError,
        match=r"^train.init: time_gate of .* is 0.0, but adapters do not change it.*train the whole model",
    ):
        job(tmp_path / "run", image[1], *words).train()
    trained = tiny_text(depth=2)
    model = wake(LatteText(replace(trained.model.config, gated_time=True)), 0.2)
    model.open_gate(1.0)
    replace(trained, model=model).save_pretrained(tmp_path / "base")
    learned = job(tmp_path / "run", tmp_path / "base", *words, "diffusion.objective=paper")
    learned.train(until=1)
    learned = job(tmp_path / "run", tmp_path / "base", *words, "diffusion.objective=paper")
    learned.train()
    assert all(
        ".lora_" in name for name in load_checkpoint(tmp_path / "run/checkpoints/step-2").tensors["ema"]
    )
    assert VideoPipeline.from_pretrained(tmp_path / "run", device="cpu").model.opened == 1.0


def test_a_pooled_caption_joins_a_trained_model_without_a_change_of_its_clips(tmp_path):
    words = [*WORDS, "train.checkpoint_every=1", "train.steps=1"]
    build(load_run("shapes-text", [*words, f"run.dir={tmp_path / 'old'}"])[0], "cpu").train()
    start = [*words, f"train.init={tmp_path / 'old'}", "text.pooled_caption=true"]
    with pytest.raises(InputError, match=r"pooled\.linear.*train.init_gaps"):
        build(load_run("shapes-text", [*start, f"run.dir={tmp_path / 'new'}"])[0], "cpu").train(until=0)
    found, _ = load_run("shapes-text", [*start, "train.init_gaps=pooled.*", f"run.dir={tmp_path / 'new'}"])
    started = build(found, "cpu")
    started.train(until=0)
    old = VideoPipeline.from_pretrained(tmp_path / "old", device="cpu").model
    z, text = noise(2, 3, 3, 16, 16), noise(2, 7, 64)
    with torch.no_grad():
        assert torch.equal(started.model.eval()(z, T, text), old(z, T, text))
    build(found, "cpu").train()
    with pytest.raises(InputError, match="model.pooled_caption is False, but the weights at .* have True"):
        back = [*words, f"train.init={tmp_path / 'new'}", f"run.dir={tmp_path / 'back'}"]
        build(load_run("shapes-text", back)[0], "cpu").train(until=0)
