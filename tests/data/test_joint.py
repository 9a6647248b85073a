# SPDX-License-Identifier: Apache-2.0
"""Images behind a clip: drawn independently, with their own labels, and passed through a training step."""

from itertools import combinations

import pytest
import torch
from support import noise, wake

from latte.checks import InputError
from latte.data.datasets import Clip, DataConfig, ProceduralDataset
from latte.data.joint import JointDataset, append_images
from latte.data.loader import load_batch
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.model.latte import Latte, ModelConfig
from latte.runtime import generator
from latte.training.step import Task, backward

CONFIG = DataConfig(kind="procedural", resolution=16, frames=4, num_clips=40)


def test_the_clip_is_the_one_without_images():
    plain = ProceduralDataset(CONFIG)
    joint = JointDataset(plain, 3).clip(7, generator(0, "a"))
    assert joint.video.shape == (7, 3, 16, 16)
    assert torch.equal(joint.video[:4], plain.clip(7).video)
    assert joint.label[0] == plain.clip(7).label


def test_every_image_is_a_frame_of_the_dataset_with_its_own_label():
    plain = ProceduralDataset(CONFIG)
    frames = {
        plain.clip(i).video[f].numpy().tobytes(): plain.clip(i).label for i in range(40) for f in range(4)
    }
    seen = set()
    for index in range(12):
        clip = JointDataset(plain, 4).clip(index, generator(index, "images"))
        for image, label in zip(clip.video[4:], clip.label[1:], strict=True):
            assert frames[image.numpy().tobytes()] == label
            seen.add(image.numpy().tobytes())
    assert len(seen) > 20  # of 48 draws out of 160: independent, not the clip's own


class Sources:
    """Eight videos whose frames show the number of their video."""

    classes = ("one",)
    latent = False
    captions = ()
    skipped = ()

    def __len__(self):
        return 8

    def clip(self, index, generator):
        return Clip(torch.full((2, 3, 4, 4), float(index)), 0, None, str(index))

    def image(self, index, generator):
        return Clip(torch.full((1, 3, 4, 4), float(index)), 0, None, str(index))

    def describe(self):
        return {}


def test_the_images_of_one_clip_come_from_several_videos_and_not_from_its_own():
    """Each of the 6 images is uniform over the 8 videos and independent of the clip and of the others."""
    joint = JointDataset(Sources(), 6)
    draws = [
        (
            index,
            [int(image) for image in joint.clip(index, generator(seed, index, "draw")).video[2:, 0, 0, 0]],
        )
        for seed in range(40)
        for index in range(8)
    ]
    images = [image for _, picks in draws for image in picks]
    expected = len(images) / 8
    chi2 = sum((images.count(number) - expected) ** 2 / expected for number in range(8))
    assert chi2 < 24.3, f"chi-squared {chi2:.1f} with 7 degrees of freedom (0.1 % level)"
    own = sum(picks.count(index) for index, picks in draws) / len(images)
    assert 1 / 8 - 0.03 < own < 1 / 8 + 0.03, (
        "share of images from the clip's own video (1/8 by chance, 4 sigma)"
    )
    equal = [sum(one == two for one, two in combinations(picks, 2)) for _, picks in draws]
    share = sum(equal) / (15 * len(draws))
    assert 1 / 8 - 0.02 < share < 1 / 8 + 0.02, "share of pairs of images from one video"
    assert min(len(set(picks)) for _, picks in draws) >= 2


def test_sizes_must_agree():
    with pytest.raises(
        InputError, match=r"^images of shape \(2, 3, 8, 8\) do not fit a clip of shape \(4, 3, 16, 16\)"
    ):
        append_images(noise(4, 3, 16, 16), noise(2, 3, 8, 8))
    with pytest.raises(InputError, match=r"^train\.num_images must be at least 1 .*, got 0$"):
        JointDataset(ProceduralDataset(CONFIG), 0)


def test_a_joint_step_trains_the_spatial_path_and_leaves_time_to_the_clip():
    """With the loss on the images only, nothing of the temporal blocks gets a gradient."""
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
