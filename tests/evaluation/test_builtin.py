# SPDX-License-Identifier: Apache-2.0
"""The built-in detector reads procedural clips, detects corruptions, and has the weights of the published
scores.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from latte.checks import InputError
from latte.evaluation.detectors import Detector, build_detector
from latte.evaluation.frechet import frechet_distance
from latte.evaluation.networks import builtin
from latte.evaluation.networks.builtin import (
    CLASSES,
    MEASURES,
    NUM_FEATURES,
    OUTPUTS,
    WEIGHTS,
    BuiltinDetector,
    moments,
    neighbours,
)
from latte.runtime import generator
from tools import detector_clips
from tools import train_detector as training
from tools.detector_clips import draw_batch, draw_corruptions, draw_pool, procedural_clips, show, to_input
from tools.train_detector import DetectorConfig, fit, make_weights, measure

UNSEEN = 123_456
BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
SMALL = DetectorConfig(steps=3, batch=2, clips=4)


@pytest.fixture(scope="module")
def detector() -> Detector:
    return build_detector("builtin")


@pytest.fixture(scope="module")
def card() -> dict:
    with safe_open(WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()["card"])


def test_the_weights_never_change(detector):
    """Other weights would give other scores under the same protocol: they need a new version of it."""
    assert detector.tensors_sha256[:16] == "529e66012020b9e0"


def test_size_and_card(detector, card):
    assert WEIGHTS.stat().st_size <= 850_000
    assert card["parameters"] == sum(p.numel() for p in detector.network.parameters())
    assert all(card["figures"][f"{name}_{frames}_frames"] >= 0.99 for name in CLASSES for frames in (8, 16))
    assert "Not comparable with any other" in detector.card


def test_it_needs_no_download(monkeypatch, tmp_path):
    monkeypatch.setenv("LATTE_OFFLINE", "1")
    monkeypatch.setenv("LATTE_DETECTOR_DIR", str(tmp_path))
    assert build_detector("builtin").describe()["dimension"] == NUM_FEATURES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frames", [8, 16])
def test_it_knows_unseen_scenes(detector, frames):
    found = measure(detector.network, 64, frames, UNSEEN)
    assert min(found[name] for name in CLASSES) >= 0.98
    assert (
        max(value for name, value in found.items() if name.endswith("_error")) < 0.15
    )  # a guessed size would be wrong by 0.83


def test_features_do_not_depend_on_the_batch(detector):
    clips = procedural_clips(UNSEEN, 5, 6)[0]
    whole = detector(clips)
    assert torch.equal(whole, torch.cat([detector(clip[None]) for clip in clips]))
    torch.testing.assert_close(build_detector("builtin", group=3)(clips), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(detector.network(to_input(clips)), whole, rtol=1e-4, atol=1e-4)


def test_order_and_speed_change_the_features(detector):
    clips = procedural_clips(UNSEEN, 8, 8)[0]
    plain = detector(clips)
    for other in (clips.flip(1), clips[:, [0, 2, 1, 3, 4, 6, 5, 7]], clips[:, ::2]):
        assert ((detector(other) - plain).norm(dim=1) > 0.1 * plain.norm(dim=1)).all()


@pytest.mark.parametrize("name", ["blur", "frozen"])
def test_the_distance_increases_with_corruption(detector, monkeypatch, name):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sensitivity

    real, clean = (
        detector(sensitivity.render_clips(1, 48, 8)),
        sensitivity.render_clips(sensitivity.FAKE_SEED, 48, 8),
    )
    strengths = sensitivity.CORRUPTIONS[name][1]
    values = [
        frechet_distance(real, detector(sensitivity.corrupt(name, strength, clean)))
        for strength in strengths[::2]
    ]
    assert values == sorted(values)
    assert values[-1] > 1.15 * values[0]  # 48 clips of 128 features: mostly bias
    del sys.modules["sensitivity"]


def test_strength_0_changes_nothing(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sensitivity

    clips = sensitivity.render_clips(sensitivity.FAKE_SEED, 2, 8)
    for name, (_, strengths) in sensitivity.CORRUPTIONS.items():
        assert len(strengths) == 5
        assert torch.equal(sensitivity.corrupt(name, strengths[0], clips), clips)
        most = sensitivity.corrupt(name, strengths[-1], clips)
        assert most.dtype == torch.uint8
        assert most.shape == clips.shape
        assert not torch.equal(most, clips)
    del sys.modules["sensitivity"]


def test_wrong_clips_and_given_files_are_refused(detector):
    with pytest.raises(InputError, match="at least 4"):
        detector(torch.zeros(1, 3, 64, 64, 3, dtype=torch.uint8))
    for shape in ((1, 3, 3, 64, 64), (1, 3, 4, 64, 32), (1, 4, 4, 64, 64)):
        with pytest.raises(InputError, match="64 x 64"):
            detector.network(torch.zeros(shape))
    with pytest.raises(InputError, match="reads no weight file"):
        build_detector("builtin", path=WEIGHTS)


def test_damaged_weights_are_refused(monkeypatch, tmp_path):
    broken = tmp_path / "builtin.safetensors"
    shutil.copyfile(WEIGHTS, broken)
    with open(broken, "r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)[0]
        file.seek(-100, 2)
        file.write(bytes([byte ^ 1]))
    monkeypatch.setattr(builtin, "WEIGHTS", broken)
    with pytest.raises(InputError, match="changed after it was written"):
        build_detector("builtin")


def test_neighbours_and_moments_are_what_they_say():
    x = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = neighbours(x)
    for t in range(4):
        torch.testing.assert_close(
            found[:, t], torch.cat([x[:, max(t - 1, 0)], x[:, t], x[:, min(t + 1, 3)]], 1)
        )
    values = x.transpose(1, 2).flatten(2)
    greatest = torch.stack([x[:, t].flatten(2).max(2).values for t in range(4)]).mean(0)
    expected = torch.cat([values.mean(2), values.std(2, correction=0), greatest], 1)
    torch.testing.assert_close(moments(x), expected, rtol=1e-4, atol=1e-4)


def centres(clips):
    """Position (b t 2) of the shape in every frame of uint8 (b t h w c), x and y in frame sides."""
    bright = (clips.float().amax(-1) > 60).float()
    axis = (torch.arange(64.0) + 0.5) / 64
    return torch.stack(
        [(bright * line).sum((2, 3)) / bright.sum((2, 3)) for line in (axis, axis[:, None])], -1
    )


def answer(labels, name):
    """The column ``name`` of labels (b 16)."""
    return labels[:, list(OUTPUTS).index(name)]


WAYS = torch.tensor([[0.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])


def test_a_batch_is_a_function_of_its_step_and_its_labels_are_true(monkeypatch):
    monkeypatch.setattr(detector_clips, "draw_corruptions", lambda draw: {})
    pool = draw_pool(5, 16)
    for step, frames in ((0, 8), (1, 8), (2, 16)):  # every speed and length
        clips, labels = draw_batch(pool, 32, 0, step)
        assert all(
            torch.equal(a, b) for a, b in zip(draw_batch(pool, 32, 0, step), (clips, labels), strict=True)
        )
        assert clips.shape == (32 if frames == 8 else 16, frames, 64, 64, 3)
        path = centres(clips)
        speed = answer(labels, "speed")[:, None] * 0.02 + 0.035
        torch.testing.assert_close(
            (path[:, -1] - path[:, 0]) / (frames - 1),
            WAYS[answer(labels, "direction").long()] * speed,
            rtol=0,
            atol=2e-3,
        )
        middle = torch.stack([answer(labels, "x"), answer(labels, "y")], 1) * 0.2 + 0.5
        middle[:, 1] += (
            0.2 * (answer(labels, "size") * 0.015 + 0.155) * (answer(labels, "shape") == 2)
        )  # a triangle's centroid
        torch.testing.assert_close(path.mean(1), middle, rtol=0, atol=5e-3)
        assert (labels[:, -5:] == 0).all()
        brightest = (
            torch.stack([clip.flatten(0, 2)[clip.flatten(0, 2).sum(1).argmax()] for clip in clips]) / 127.5
            - 1
        )
        torch.testing.assert_close(
            labels[:, [list(OUTPUTS).index(name) for name in ("red", "green", "blue")]], brightest
        )


@pytest.mark.parametrize("strengths", [{"shuffled": 0.5}, {"frozen": 0.4}, {"shuffled": 1.0, "frozen": 0.3}])
def test_corrupted_order_is_labelled_as_the_pixels_show(strengths):
    clips, scenes = draw_pool(6, 4)
    draw = generator("damaged order")
    for clip, scene in zip(clips, scenes, strict=True):
        shown, labels = show(clip, scene, torch.arange(15, -1, -1), True, strengths, draw)
        path = centres(shown[None])[0]
        steps = path.diff(dim=0).norm(dim=1)
        found = {name: float(answer(labels[None], name)) for name in MEASURES}
        assert 0.02 * (2 ** found["motion"] - 1) == pytest.approx(float(steps.mean()), abs=2e-3)
        assert found["frozen"] / 2 == pytest.approx(
            float((shown.diff(dim=0) == 0).flatten(1).all(1).float().mean())
        )
        usual = (
            WAYS[["up", "down", "left", "right"].index(scene.direction)]
            * scene.speed
            * torch.tensor([1.0, -1.0])
        )
        wrong = ((path.diff(dim=0) - usual).norm(dim=1) > scene.speed / 2) & (steps > scene.speed / 2)
        assert found["erratic"] / 2 == pytest.approx(float(wrong.float().mean()))
        assert (
            (found["speed"] != found["speed"])
            == (answer(labels[None], "direction").item() < 0)
            == bool(wrong.any())
        )


def test_corrupted_pixels_are_labelled():
    (clip,), (scene,) = draw_pool(8, 1)
    draw = generator("damaged pixels")
    shown, labels = show(clip, scene, torch.arange(8), False, {"blur": 3.0, "noise": 24.0, "hue": 60.0}, draw)
    found = dict(zip(OUTPUTS, labels.tolist(), strict=True))
    assert (found["blur"], found["noise"]) == (2.0, 2.0)
    assert found["hue"] == (0.0 if scene.colour == "white" else 1.5)
    assert found["colour"] < 0
    assert (
        20 < float((shown[:, :8, :8].float() - torch.tensor([24.0, 26.0, 34.0])).std()) < 26
    )  # dark ground is clamped at 0
    turned, labels = show(clip, scene, torch.arange(8), False, {"hue": 60.0}, draw)
    red = list(OUTPUTS).index("red")
    peak = turned[0].flatten(0, 1).float()[clip[0].flatten(0, 1).float().sum(1).argmax()]
    torch.testing.assert_close(labels[red : red + 3], peak / 127.5 - 1, rtol=0, atol=0.02)


def test_every_corruption_occurs_and_two_of_five_clips_have_none():
    draw = generator("kinds of damage")
    drawn = [draw_corruptions(draw) for _ in range(600)]
    assert sum(not kinds for kinds in drawn) == pytest.approx(240, abs=50)
    assert max(len(kinds) for kinds in drawn) == 2
    for name, most in detector_clips.STRENGTHS.items():
        found = [kinds[name] for kinds in drawn if name in kinds]
        assert len(found) > 50
        assert 0 < min(found) < 0.1 * most < 0.9 * most < max(found) <= most


def test_a_fresh_training_is_a_function_of_its_seed(tmp_path):
    one, two = fit(SMALL), fit(SMALL)
    assert isinstance(one, BuiltinDetector)
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )


def test_a_stopped_training_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.training_loop.KEEP_EVERY", 2)
    keep, config, whole = tmp_path / "state", replace(SMALL, steps=4), draw_batch

    steps = []

    def counted(pool, batch, seed, step):
        steps.append(step)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return whole(pool, batch, seed, step)

    monkeypatch.setattr(training, "draw_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        fit(config, keep=keep)
    assert steps[3:] == [0, 1, 2, 3]  # the first three batches are looked at to condition the layers
    resumed = fit(config, keep=keep)
    assert steps[10:] == [2, 3]
    assert all(
        torch.equal(a, b)
        for a, b in zip(resumed.state_dict().values(), fit(config).state_dict().values(), strict=True)
    )
    with pytest.raises(InputError, match="delete it"):
        fit(replace(config, steps=5), keep=keep)


def test_layers_begin_with_outputs_of_mean_0_and_variance_1():
    model, clips = BuiltinDetector(), draw_batch(draw_pool(5, 8), 16, 0, 0)[0]
    training.condition(model, clips)
    for layer in (model.stem, model.time2, model.second):
        outputs = []
        with layer.register_forward_hook(
            lambda _module, _inputs, output, outputs=outputs: outputs.append(output)
        ):
            model.embed(to_input(clips))
        values = outputs[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(values.mean(1), torch.zeros(len(values)), rtol=0, atol=1e-3)
        torch.testing.assert_close(values.var(1), torch.ones(len(values)), rtol=0, atol=1e-2)


def test_clean_clips_have_features_of_about_unit_variance(detector):
    features = detector(procedural_clips(UNSEEN, 96, 16)[0])
    assert features.mean(0).abs().max() < 1
    assert 0.3 < features.var(0).mean() < 1.5


def test_the_trained_file_is_a_detector(detector, tmp_path, monkeypatch):
    out = tmp_path / "new.safetensors"
    monkeypatch.setattr(training, "measure", lambda model, frames: {"direction": 0.25})
    monkeypatch.setattr(training, "SCALED", 96)
    make_weights(tmp_path / "first.safetensors", replace(SMALL, steps=1))
    card = make_weights(out, replace(SMALL, steps=2), tmp_path / "first.safetensors")
    assert card["before"]["config"]["steps"] == 1
    assert (card["config"]["steps"], card["figures"]["direction_16_frames"]) == (2, 0.25)
    monkeypatch.setattr(builtin, "WEIGHTS", out)
    assert detector.tensors_sha256 != (other := build_detector("builtin")).tensors_sha256
    assert other(torch.zeros(1, 4, 64, 64, 3, dtype=torch.uint8)).shape == (1, NUM_FEATURES)
