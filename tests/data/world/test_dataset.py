# SPDX-License-Identifier: Apache-2.0
"""The world as ``data.kind=procedural data.scenes=world``: pure clips, kinds as labels, captions without the
held-out ones, and moving shapes as they were.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from encoded import SHAPES, latents_of, pixels
from latte.checks import InputError
from latte.data.base import PROCEDURAL
from latte.data.datasets import DataConfig, LatentDataset, ProceduralDataset, build_dataset
from latte.data.encode import encode_dataset
from latte.data.joint import JointDataset
from latte.data.loader import load_batch
from latte.data.world.dataset import WorldScenes
from latte.data.world.kinds import KINDS
from latte.data.world.scenes import CHINESE
from latte.runtime import generator

WORLD = DataConfig(kind="procedural", scenes="world", resolution=32, frames=4, num_clips=6, seed=3)
LANGUAGES = ("en", "zh", "mixed")


def is_chinese(text: str) -> bool:
    return not text.isascii()


def test_a_clip_is_a_function_of_seed_and_index():
    data = build_dataset(replace(WORLD, num_clips=None))
    assert data.classes == list(KINDS)
    assert len(data) > 10**12
    clips = [data.clip(index, generator(0)) for index in (0, 7, 10**9)]
    again = build_dataset(replace(WORLD, num_clips=None))
    for index, clip in zip((10**9, 7, 0), clips[::-1], strict=True):
        same = again.clip(index, generator(1))
        assert torch.equal(clip.video, same.video)
        assert (clip.label, clip.caption, clip.key) == (same.label, same.caption, same.key)
        assert clip.video.shape == (4, 3, 32, 32)
        assert clip.key == f"3/{index}"
        assert clip.label == index % len(KINDS)
    other = build_dataset(replace(WORLD, seed=4)).clip(0, generator(0))
    assert not torch.equal(other.video, clips[0].video)


def test_sixteen_frames_are_two_seconds_whatever_the_number_of_frames():
    long = build_dataset(replace(WORLD, frames=16)).clip(5, generator(0)).video
    assert torch.equal(build_dataset(WORLD).clip(5, generator(0)).video, long[:4])
    wide = build_dataset(replace(WORLD, resolution=(32, 48))).clip(5, generator(0)).video
    assert wide.shape == (4, 3, 32, 48)


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_hold_those_of_every_clip_and_none_that_is_held_out(language):
    config = replace(WORLD, hold_out=6, language=language)
    data = build_dataset(config)
    held_out = config.scene_set.held_out_captions
    used = Counter(config.scene_set.caption(index) for index in range(12000))
    assert set(used) <= set(data.captions)
    assert len(used) > 0.7 * len(data.captions), "rare ones need more than 12,000 clips to occur"
    assert data.captions == sorted(set(data.captions))
    assert len(held_out) > 50
    assert not set(held_out) & set(data.captions)
    everything = replace(config, hold_out=0).scene_set
    assert set(everything.captions) == set(held_out) | set(data.captions)
    assert everything.held_out_captions == []
    chinese = sum(is_chinese(text) * count for text, count in used.items()) / used.total()
    low, high = {"en": (0, 0), "zh": (1, 1), "mixed": (0.48, 0.52)}[language]
    assert low <= chinese <= high


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_caption_names_what_the_clip_shows_in_any_language(language):
    scenes = replace(WORLD, language=language).scene_set
    assert isinstance(scenes, WorldScenes)
    for index in range(200):
        scene, caption = scenes._scene(index), scenes.caption(index)
        words = caption.replace(",", "").split()
        if is_chinese(caption):
            assert CHINESE[scene.colour] in caption
            assert CHINESE[scene.direction] in caption
        else:
            assert scene.colour in words
            assert scene.direction in (*words, "none")
        assert scenes.classes[scenes.label(index)] == scene.kind


def test_the_language_changes_captions_alone():
    english, chinese = (
        build_dataset(replace(WORLD, language=name)).clip(2, generator(0)) for name in ("en", "zh")
    )
    assert torch.equal(english.video, chinese.video)
    assert english.caption != chinese.caption


def test_images_and_joint_batches_are_those_of_the_clips():
    data = build_dataset(WORLD)
    image = data.image(4, generator(7))
    clip = data.clip(4, generator(0))
    assert image.video.shape == (1, 3, 32, 32)
    assert any(torch.equal(image.video[0], frame) for frame in clip.video)
    assert (image.label, image.caption) == (clip.label, clip.caption)
    batch = load_batch(JointDataset(data, 2), 0, 0, 2)
    assert batch.video.shape == (2, 6, 3, 32, 32)


def test_latents_of_the_world_are_its_clips(tmp_path):
    config = replace(WORLD, language="mixed", hold_out=6)
    encode_dataset(config, pixels(), tmp_path / "out", dtype="float32")
    source, latents = ProceduralDataset(config), LatentDataset(latents_of(config, tmp_path / "out"))
    assert latents.classes == source.classes
    for index in range(6):
        clip, latent = source.clip(index), latents.clip(index, generator(0))
        assert torch.equal(clip.video, latent.video)
        assert (clip.label, clip.caption, clip.key) == (latent.label, latent.caption, latent.key)
    with pytest.raises(InputError, match="other settings"):
        encode_dataset(replace(config, language="zh"), pixels(), tmp_path / "out", dtype="float32")


def test_descriptions_name_what_the_clips_depend_on_and_those_of_shapes_stay():
    assert build_dataset(SHAPES).describe() == {
        "kind": "procedural",
        "clips": 6,
        "classes": ["up", "down", "left", "right"],
        "seed": 3,
        "resolution": [16, 16],
        "frames": 4,
    }
    described = build_dataset(WORLD).describe()
    assert (described["scenes"], described["language"]) == ("world", "en")
    assert build_dataset(replace(WORLD, language="en")).describe() == described
    changes = ({"language": "zh"}, {"hold_out": 6}, {"seed": 4}, {"frames": 5}, {"resolution": 33})
    for change in changes:
        assert build_dataset(replace(WORLD, **change)).describe() != described, change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scenes": "wrld"},
            "data.scenes is 'wrld', which is not one of shapes, world, curtains; did you mean 'world'?",
        ),
        ({"scenes": "shapes", "language": "en"}, "data.language is 'en', but the captions of moving shapes"),
        ({"language": "fr"}, "data.language must be one of en, zh, mixed, got 'fr'"),
        ({"resolution": (31, 64)}, "data.resolution must be at least 32 for data.scenes=world, got 31 x 64"),
        ({"hold_out": 1}, "data.hold_out must be one of 0, 2, 4, 5, 6, 7, 8 for data.scenes=world, got 1"),
        ({"hold_out": 3}, "for data.scenes=world, got 3; other shares leave a colour untrained"),
        ({"hold_out": 9}, "for data.scenes=world, got 9"),
        ({"kind": "latents", "seed": 0, "num_clips": None}, "data.scenes is 'world', but data.kind=latents"),
        (
            {"kind": "folder", "seed": 0, "num_clips": None, "scenes": "shapes", "language": "zh"},
            "data.language",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(InputError) as caught:
        replace(WORLD, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PROCEDURAL)
def test_every_set_of_scenes_keeps_the_protocol(name):
    scenes = replace(WORLD, scenes=name, hold_out=6).scene_set
    for index in (0, 11):
        assert scenes.caption(index) in scenes.captions
        assert 0 <= scenes.label(index) < len(scenes.classes)
        assert scenes.render_clip(index).shape == (4, 32, 32, 3)
        clip = replace(scenes.config, resolution=64, frames=8).scene_set.render_clip(index)
        assert len(clip) >= scenes.min_graded_frames
        assert scenes.read_label(clip) == scenes.label(index)
        assert scenes.is_consistent(clip)
        other = replace(scenes.config, resolution=64, frames=8).scene_set.render_clip(index + 1)
        assert not scenes.is_consistent(np.concatenate([clip[:4], other[4:]]))
    assert scenes.held_out_captions == sorted(scenes.held_out_captions)
