# SPDX-License-Identifier: Apache-2.0
"""A new kind of branch is one class and one table entry.

It reaches model, cost, memory plan, training and ablation.
"""

import pytest
import torch
from support import noise, wake
from torch import Tensor, nn

from latte.ablate.axes import make_settings
from latte.config.run import load_run
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.model.blocks import Block, Branch
from latte.model.latte import Latte, ModelConfig
from latte.model.variants import VARIANTS, Parts, Variant
from latte.profile.flops import count, table3
from latte.profile.memory import activations
from latte.profile.plan import plan
from latte.training.step import Task, backward
from tiny import WORDS


class FrameMixer(Branch):
    """A gated convolution along the frames, with a modulation slot of its own."""

    modulation_slot = 2
    mixes_time = True

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=1)

    def table3_rows(self, frames: int, positions: int) -> int:
        return positions

    def forward(self, x: Tensor, images: bool = False) -> Tensor:
        assert not images, "a branch that mixes time is skipped for images"
        y = self.conv(x.transpose(1, 2).flatten(0, 1).mT)  # (bn d f)
        return y.mT.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)  # (b f n d)


def blocks(parts: Parts, depth: int) -> list[Block]:
    return [parts.block(space=parts.space(), mixer=FrameMixer(parts.width)) for _ in range(depth)]


@pytest.fixture
def tiny(monkeypatch) -> ModelConfig:
    """A configuration of the variant, which is registered for the length of a test."""
    monkeypatch.setitem(VARIANTS, "mixer", Variant("frame mixer", blocks, lambda depth: 0, weight=24))
    return ModelConfig(
        depth=2,
        width=16,
        heads=2,
        num_frames=4,
        latent_size=4,
        latent_channels=3,
        num_classes=5,
        variant="mixer",
    )


@torch.no_grad()
def test_its_slot_its_mixing_and_its_images(tiny):
    model = wake(Latte(tiny), 0.2)
    assert model.blocks[0].modulation.num_chunks == 9, "a slot of its own"
    assert model.blocks[0].mixes_time
    z, t, label = noise(1, 4, 3, 4, 4), torch.tensor([500]), torch.tensor([1])
    base = model(z, t, label)
    moved = z.clone()
    moved[:, 1] += 1
    assert ((model(moved, t, label) - base).abs().amax((0, 2, 3, 4)) > 0).all()
    joint = model(torch.cat([z, moved[:, :2]], dim=1), t, label, num_images=2)
    assert torch.equal(joint[:, :4], base)
    alone = model(torch.cat([z, moved[:, 1:2]], dim=1), t, label, num_images=1)
    torch.testing.assert_close(joint[:, 5], alone[:, 4], rtol=1e-4, atol=1e-5)


def test_its_cost_and_memory(tiny):
    model = Latte(tiny)
    assert count(tiny).parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (
        count(tiny).operations > count(ModelConfig(**{**tiny.__dict__, "variant": 3, "depth": 1})).operations
    )
    assert table3(tiny).operations_g > 0
    assert activations(tiny, 2, num_images=2).plain > 0


def test_the_plan_of_a_run(tiny):
    found = plan(load_run("shapes", [*WORDS, "model.variant=mixer"])[0], "cpu")
    assert found.table3.operations_g > 0
    assert found.memory.activations > 0


def test_a_training_step(tiny):
    model = wake(Latte(tiny), 0.05)
    process = build_process(DiffusionConfig())
    device = torch.device("cpu")
    task = Task(model, model, process, OBJECTIVES["paper"], None, 0, 2, None, device, torch.float32, 1)
    labels = torch.zeros(2, 2, dtype=torch.long)
    loss = backward(task, 1, range(2), noise(2, 5, 3, 4, 4), labels)
    assert loss.isfinite().all()
    assert all(block.branches["mixer"].conv.weight.grad.abs().max() > 0 for block in model.blocks)


def test_a_setting_of_the_ablation(tiny):
    base, _ = load_run("shapes", WORDS)
    settings, _ = make_settings(base, ["variant"])
    assert "mixer" in [setting.name for setting in settings]
