# SPDX-License-Identifier: Apache-2.0
"""Stills behind a clip: drawn independently, with labels of their own, and a training step that the model takes them through."""

import pytest
import torch
from support import noise, wake

from latte.checks import InputError
from latte.data.datasets import DataConfig, ProceduralDataset
from latte.data.joint import JointDataset, append_images
from latte.data.loader import load_batch
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.model.latte import Latte, ModelConfig
from latte.runtime import generator
from latte.training.step import Task, backward

CONFIG = DataConfig(kind="procedural", resolution=16, frames=4, num_clips=40)


def test_the_clip_is_the_one_without_stills():
    plain = ProceduralDataset(CONFIG)
    joint = JointDataset(plain, 3).clip(7, generator(0, "a"))
    assert joint.video.shape == (7, 3, 16, 16)
    assert torch.equal(joint.video[:4], plain.clip(7).video)
    assert joint.label[0] == plain.clip(7).label


def test_every_still_is_a_frame_of_the_set_with_its_own_label():
    plain = ProceduralDataset(CONFIG)
    frames = {
        plain.clip(i).video[f].numpy().tobytes(): plain.clip(i).label for i in range(40) for f in range(4)
    }
    seen = set()
    for index in range(12):
        clip = JointDataset(plain, 4).clip(index, generator(index, "stills"))
        for still, label in zip(clip.video[4:], clip.label[1:], strict=True):
            assert frames[still.numpy().tobytes()] == label
            seen.add(still.numpy().tobytes())
    assert len(seen) > 20  # of 48 draws out of 160: independent, not the clip's own


def test_sizes_must_agree():
    with pytest.raises(InputError, match="height and width must be the same"):
        append_images(noise(4, 3, 16, 16), noise(2, 3, 8, 8))
    with pytest.raises(InputError, match="num_images"):
        JointDataset(ProceduralDataset(CONFIG), 0)


def test_a_joint_step_trains_the_spatial_path_and_leaves_time_to_the_clip():
    """With the loss on the stills alone, nothing of the temporal blocks gets a gradient."""
    model = wake(
        Latte(
            ModelConfig(
                depth=2, width=16, heads=2, num_frames=4, latent_size=16, latent_channels=3, num_classes=4
            )
        )
    )
    batch = load_batch(JointDataset(ProceduralDataset(CONFIG), 2), 0, 0, 2)
    assert batch.label.shape == (2, 3)
    out = model(batch.video, torch.tensor([10, 500]), batch.label, num_images=2)
    out[:, 4:].square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.blocks[1].parameters())
    assert all(p.grad.any() for p in model.blocks[0].parameters())
    model.zero_grad()
    process, cpu = build_process(DiffusionConfig()), torch.device("cpu")
    task = Task(model, model, process, OBJECTIVES["paper"], None, 0, 2, None, cpu, torch.float32, 2)
    assert backward(task, 1, [0, 1], batch.video, batch.label).isfinite().all()
    assert all(p.grad.any() for p in model.parameters())
