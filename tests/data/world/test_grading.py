# SPDX-License-Identifier: Apache-2.0
"""The grader of the procedural world: right on true clips, and every corruption of a clip is noticed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from latte.checks import InputError
from latte.data.world.grading import GraderNetwork, Share, grade, largest_step, load_grader, size_spread
from latte.data.world.kinds import KINDS
from latte.data.world.scenes import Scene, render, sample_scene
from tools import train_grader

FRAMES = 16
SEED = 77_000  # neither training nor the bounds saw its scenes


def clips_of(scenes: list[Scene]) -> np.ndarray:
    return np.stack([render(scene, FRAMES, 64, 64) for scene in scenes])


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(SEED, index) for index in range(20 * len(KINDS))]


@pytest.fixture(scope="module")
def clips(scenes) -> np.ndarray:
    return clips_of(scenes)


def share_consistent(clips: np.ndarray) -> float:
    grades = grade(clips)
    return sum(each.consistent for each in grades) / len(grades)


def test_true_clips_are_read_right(scenes, clips):
    pairs = list(zip(grade(clips), scenes, strict=True))
    for attribute in ("kind", "colour", "direction"):
        right = sum(getattr(found, attribute) == getattr(scene, attribute) for found, scene in pairs)
        assert right >= 0.99 * len(pairs), attribute
    assert sum(found.consistent for found, _ in pairs) >= 0.99 * len(pairs)


def test_a_grade_does_not_depend_on_the_batch(clips):
    assert grade(clips[:6]) == [grade(clip[None])[0] for clip in clips[:6]]


def recoloured(scene: Scene) -> Scene:
    kind = KINDS[scene.kind]
    return replace(scene, colour=kind.colours[(kind.colours.index(scene.colour) + 2) % len(kind.colours)])


def resized(scene: Scene) -> Scene:
    numbers, place = list(scene.numbers), KINDS[scene.kind].size
    assert place is not None
    numbers[place] = (numbers[place] + 0.5) % 1
    return replace(scene, numbers=tuple(numbers))


def other_ground(scene: Scene) -> Scene:
    grounds = KINDS[scene.kind].backgrounds
    return replace(scene, background=grounds[(grounds.index(scene.background) + 1) % len(grounds)])


def changed_halfway(scenes, clips, chosen, change) -> np.ndarray:
    after = clips_of([change(scenes[index]) for index in chosen])
    return np.concatenate([clips[chosen, : FRAMES // 2], after[:, FRAMES // 2 :]], axis=1)


@pytest.mark.parametrize("change", [recoloured, other_ground])
def test_a_change_of_colour_or_background_is_noticed(scenes, clips, change):
    chosen = list(range(60))
    assert share_consistent(clips[chosen]) >= 0.95
    assert share_consistent(changed_halfway(scenes, clips, chosen, change)) <= 0.1


@pytest.mark.parametrize(
    ("kinds", "at_most"), [(("pendulum", "cube", "walker"), 0.0), (("snow",), 0.2), (("ball", "star"), 0.65)]
)
def test_a_change_of_size_is_noticed(scenes, clips, kinds, at_most):
    chosen = [index for index, scene in enumerate(scenes) if scene.kind in kinds]
    assert share_consistent(clips[chosen]) >= 0.95
    assert share_consistent(changed_halfway(scenes, clips, chosen, resized)) <= at_most


def test_another_kind_in_the_second_half_is_noticed(clips):
    mixed = np.concatenate([clips[:60, : FRAMES // 2], clips[1:61, FRAMES // 2 :]], axis=1)
    assert share_consistent(mixed) == 0


def test_flicker_is_noticed(clips):
    flickering = clips[:60].astype(np.float32)
    flickering[:, 5] *= 0.75
    assert share_consistent(np.rint(flickering).astype(np.uint8)) <= 0.1


def test_blended_clips_and_noise_are_no_scene(clips):
    blended = (clips[:60].astype(np.uint16) + clips[4:64]) // 2
    noise = np.random.default_rng(0).integers(0, 256, clips[:9].shape, dtype=np.uint8)
    assert share_consistent(blended.astype(np.uint8)) <= 0.2
    assert share_consistent(noise) == 0


def test_shuffled_frames_of_what_moves_far_are_noticed(scenes, clips):
    moving = [i for i, scene in enumerate(scenes) if scene.kind in ("ball", "walker", "star", "cube")][:40]
    order = np.random.default_rng(1).permutation(FRAMES)
    assert share_consistent(clips[moving][:, order]) <= 0.7 * share_consistent(clips[moving])


def test_a_reversed_clip_moves_the_other_way(scenes, clips):
    moving = [i for i, scene in enumerate(scenes) if scene.kind in ("ball", "star", "clouds", "waves")][:40]
    found = grade(np.ascontiguousarray(clips[moving, ::-1]))
    opposite = [train_grader.OPPOSITE[scenes[i].direction] for i in moving]
    assert sum(each.direction == way for each, way in zip(found, opposite, strict=True)) >= 38


@pytest.mark.parametrize(
    "clips",
    [
        np.zeros((1, 3, 64, 64, 3), np.uint8),
        np.zeros((16, 64, 64, 3), np.uint8),
        np.zeros((1, 16, 64, 64, 3), np.float32),
        np.zeros((1, 16, 3, 64, 64), np.uint8),
    ],
)
def test_other_shapes_are_refused(clips):
    with pytest.raises(InputError, match="clips must be uint8 of shape"):
        grade(clips)


def test_other_frame_sizes_are_resized(scenes):
    chosen = scenes[:9]
    large = np.stack([render(scene, FRAMES, 96, 96) for scene in chosen])
    assert [each.kind for each in grade(large)] == [scene.kind for scene in chosen]


def test_size_spread_and_largest_step_by_hand():
    assert size_spread(torch.tensor([[0.5, 0.1, 0.6, 0.5, 0.9]])).tolist() == pytest.approx([0.1])
    clip = np.zeros((1, 4, 2, 2, 3), np.uint8)
    clip[0, 3] = 40
    assert largest_step(clip).tolist() == pytest.approx([40.0])


def test_the_weights_in_the_package_have_bounds_and_are_small():
    network = load_grader()
    assert torch.isfinite(network.size_bound).all()
    assert torch.isfinite(network.step_bound).all()
    assert sum(tensor.numel() for tensor in network.state_dict().values()) < 250_000


def test_the_training_tool_learns_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_grader, "set_bounds", lambda network, num_clips: None)
    monkeypatch.setattr(train_grader, "accuracy", lambda network, num_clips: {})
    out = tmp_path / "grader.safetensors"
    command = ["train_grader", str(out), "--batch", "8", "--clips", "18", "--steps"]
    monkeypatch.setattr("sys.argv", [*command, "50"])
    train_grader.main()
    first = torch.load(out.with_suffix(".state"), weights_only=True)
    assert first["step"] == 50
    losses = [
        float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")
    ]
    pool, pool_scenes = train_grader.render_pool(train_grader.TRAIN_SEED, 18)
    batch = train_grader.sample_batch(pool, pool_scenes, 8, 0)
    fresh = train_grader.loss_of(GraderNetwork(), *batch).item()
    assert losses[-1] < 0.8 * fresh
    monkeypatch.setattr("sys.argv", [*command, "50"])
    train_grader.main()
    again = torch.load(out.with_suffix(".state"), weights_only=True)
    assert all(torch.equal(first["network"][name], again["network"][name]) for name in first["network"])


@pytest.mark.parametrize(("hits", "count"), [(0, 64), (60, 64), (64, 64), (1, 2)])
def test_the_interval_of_a_share_solves_wilsons_equation(hits, count):
    share = Share(hits, count)
    low, high = share.interval
    assert 0 <= low <= share.value <= high <= 1
    for bound in (low, high):
        if 0 < bound < 1:
            distance = 1.959964 * (bound * (1 - bound) / count) ** 0.5
            assert abs(share.value - bound) == pytest.approx(distance)
    assert Share.of([True] * hits + [False] * (count - hits)) == share
