# SPDX-License-Identifier: Apache-2.0
"""The procedural world: frames are functions of (seed, time), attributes vary, held-out combinations do not
appear.
"""

import re
from collections import Counter

import numpy as np
import pytest

from latte.checks import InputError
from latte.data.world.canvas import Canvas
from latte.data.world.kinds import COLOURS, KINDS
from latte.data.world.scenes import (
    CHINESE,
    LANGUAGES,
    TEMPLATES,
    caption,
    combinations,
    paraphrases,
    render,
    render_frame,
    sample_scene,
    split_combinations,
)

CLIPS = len(KINDS)


@pytest.mark.parametrize("index", range(CLIPS))
def test_a_frame_depends_on_seed_and_time_alone(index):
    scene = sample_scene(3, index)
    clip = render(scene, 5, 32, 32, fps=4)
    again = [render_frame(sample_scene(3, index), time, 32, 32) for time in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert (clip == np.stack(again[::-1])).all()
    assert clip.dtype == np.uint8
    assert clip.shape == (5, 32, 32, 3)


@pytest.mark.parametrize("index", range(CLIPS))
def test_every_kind_moves_between_frames_and_differs_between_seeds(index):
    first, second = (render(sample_scene(seed, index), 4, 64, 64).astype(float) for seed in (1, 2))
    steps = abs(np.diff(first, axis=0)).mean((1, 2, 3))
    assert (steps > 0.05).all()
    assert abs(first - second).mean() > 2


@pytest.mark.parametrize("index", range(CLIPS))
@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64)])
def test_other_aspects_show_the_subject_inside_the_frame(index, height, width):
    clip = render(sample_scene(5, index), 3, height, width)
    assert clip.shape == (3, height, width, 3)
    assert clip.reshape(3, -1).std(1).min() > 5


@pytest.mark.parametrize("index", [0, 3, 7, 8])
def test_the_subject_stays_inside_the_frame_for_four_seconds(index):
    for seed in range(20):
        scene = sample_scene(seed, index)
        colour = np.array(COLOURS[scene.colour])
        for time in (0, 0.9, 2.1, 3.9):
            frame = render_frame(scene, time, 64, 64).astype(float)
            shown = abs(frame - colour).max(-1) < 30
            assert shown.sum() > 15, (seed, time)
            assert not shown[:, [0, -1]].any(), (seed, time)


def test_edges_are_antialiased():
    canvas = Canvas(32, 32, (0.0, 0.0, 0.0))
    canvas.circle((0.5, 0.5), 0.3, (255.0, 255.0, 255.0))
    levels = canvas.pixels()[..., 0]
    assert 20 < ((levels > 10) & (levels < 245)).sum() < 140
    assert abs(levels.sum() / 255 / 32**2 - np.pi * 0.3**2) < 0.002  # coverage keeps the area


@pytest.mark.parametrize(
    "corners",
    [[(0.2, 0.2), (0.8, 0.2), (0.8, 0.6), (0.2, 0.6)], [(0.2, 0.6), (0.8, 0.6), (0.8, 0.2), (0.2, 0.2)]],
)
def test_a_polygon_is_filled_whichever_way_its_corners_run(corners):
    canvas = Canvas(50, 50, (0.0, 0.0, 0.0))
    canvas.polygon(corners, (255.0, 255.0, 255.0))
    assert abs(canvas.pixels()[..., 0].sum() / 255 / 50**2 - 0.6 * 0.4) < 0.01


def test_kinds_come_in_turn_and_attributes_vary():
    scenes = [sample_scene(0, index) for index in range(40 * CLIPS)]
    assert Counter(scene.kind for scene in scenes) == dict.fromkeys(KINDS, 40)
    for name, kind in KINDS.items():
        of_kind = [scene for scene in scenes if scene.kind == name]
        assert {scene.colour for scene in of_kind} == set(kind.colours)
        assert {scene.direction for scene in of_kind} == set(kind.directions)
        assert len({scene.background for scene in of_kind}) == len(kind.backgrounds)


def test_held_out_combinations_are_never_sampled_and_every_attribute_remains():
    trained, held_out = split_combinations(6)
    assert {c[1] for c in trained} == set(COLOURS)
    assert not set(trained) & set(held_out)
    assert len(trained) + len(held_out) == len(combinations())
    assert {c[0] for c in held_out} == set(KINDS)
    for name, kind in KINDS.items():
        colours = {c[1] for c in trained if c[0] == name}
        assert colours == set(kind.colours) or kind.directions == ("none",)
        assert {c[2] for c in trained if c[0] == name} == set(kind.directions)
    seen = {sample_scene(1, index, hold_out=6).combination for index in range(60 * CLIPS)}
    assert not seen & set(held_out)
    asked = {sample_scene(1, index, hold_out=6, held_out=True).combination for index in range(20 * CLIPS)}
    assert asked <= set(held_out)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("index", range(CLIPS))
def test_captions_name_what_the_scene_shows(language, index):
    scene = sample_scene(2, index)
    names = [scene.colour] + [scene.direction] * (scene.direction != "none")
    for text in paraphrases(scene, language):
        for name in names:
            assert (name if language == "en" else CHINESE[name]) in text
        assert "{" not in text
    assert caption(scene, language) in paraphrases(scene, language)


def test_every_kind_has_paraphrases_in_every_language():
    for templates in TEMPLATES.values():
        assert templates.keys() == KINDS.keys()
        assert min(len(set(texts)) for texts in templates.values()) >= 2


def test_an_unknown_language_is_refused():
    with pytest.raises(InputError, match="language must be one of en, zh, got 'fr'"):
        paraphrases(sample_scene(0, 0), "fr")


def test_captions_have_the_right_article():
    texts = {text for index in range(600) for text in paraphrases(sample_scene(3, index))}
    assert any(" an orange " in f" {text} " for text in texts)
    assert not [text for text in texts if re.search(r"\ba [aeiou]|\ban [^aeiou]", text)]
