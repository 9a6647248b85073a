# SPDX-License-Identifier: Apache-2.0
"""Every recipe of the paper against the paper's and the released code's numbers, and every recipe at all."""

import re
from dataclasses import replace

import pytest

from latte.autoencoder.config import compression_at
from latte.config.run import load_run, recipes
from latte.model.latte import SIZES
from latte.profile.plan import plan

PAPER = {  # kind, classes, guidance, clipping from step on: video only, joint
    "ffs": ("faceforensics", None, 1.0, 20_000, 500_000),
    "sky": ("skytimelapse", None, 1.0, 20_000, 20_000),
    "ucf101": ("ucf101", 101, 7.0, 100_000, 100_000),
    "taichi": ("taichi", None, 1.0, 500_000, 500_000),
}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", PAPER)
def test_settings_of_the_paper(name, joint):
    config, _ = load_run(name + "-joint" * joint)
    kind, classes, guidance, *clip = PAPER[name]
    assert (config.data.kind, config.model.num_classes, config.sample.guidance) == (kind, classes, guidance)
    assert (config.train.num_images, config.train.global_batch, config.train.clip_start) == (
        8 * joint,
        (5, 4)[joint] * 8,
        clip[joint],
    )
    assert (config.model.size, config.model.variant, config.model.patch_size, config.model.learn_sigma) == (
        "XL",
        1,
        2,
        True,
    )
    assert (
        config.data.frames,
        config.data.resolution,
        config.data.interval,
        config.data.rule,
        config.data.flip,
    ) == (16, 256, 3, "strict", True)
    assert (config.train.lr, config.train.ema_decay, config.train.clip_norm, config.train.weight_decay) == (
        1e-4,
        0.9999,
        0.1,
        0.0,
    )
    assert (config.codec.name, config.sample.sampler, config.sample.steps) == ("kl", "ddpm", 250)
    assert (config.diffusion.schedule, config.diffusion.num_steps, config.diffusion.objective) == (
        "linear",
        1000,
        "paper",
    )


@pytest.mark.parametrize("name", PAPER)
def test_the_joint_recipe_differs_in_nothing_else(name):
    alone, joint = load_run(name)[0], load_run(f"{name}-joint")[0]
    same = {"num_images": 0, "global_batch": alone.train.global_batch, "clip_start": alone.train.clip_start}
    assert replace(joint, train=replace(joint.train, **same), run=alone.run) == alone


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_settles_and_names_its_own_command(name):
    config, _ = load_run(name)
    compression = compression_at(config.codec.name, config.codec.path)
    assert config.model.num_frames == compression.latent_frames(config.data.frames)
    assert re.search(rf"#   latte (train|ablate) {name}(\s|$)", recipes()[name].read_text())


@pytest.mark.parametrize("size", SIZES)
def test_any_size_is_one_word(size):
    config, _ = load_run("ffs", [f"model.size={size}"])
    assert (
        plan(config).table3.parameters
        == {"S": 32_480_672, "B": 129_547_040, "L": 456_815_648, "XL": 673_681_568}[size]
    )
