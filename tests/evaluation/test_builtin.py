# SPDX-License-Identifier: Apache-2.0
"""The built-in detector knows what procedural clips show, sees damage, and is the one that figures were measured with."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from latte.checks import InputError
from latte.evaluation import builtin
from latte.evaluation.builtin import WEIGHTS, BuiltinDetector, moments, neighbours
from latte.evaluation.detectors import Detector, build_detector
from latte.evaluation.frechet import frechet_distance
from latte.train.detector import DetectorConfig, draw_batch, fit, make_weights, measure, procedural_clips, targets, to_input

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
    """New weights would make other figures under the same protocol: they need a new version of it."""
    assert detector.tensors_sha256 == "dd715091b0c5c4bc40658250cd56d63609838676e1ed9911361584cfa01a1a23"


def test_size_and_card(detector, card):
    assert WEIGHTS.stat().st_size <= 1_500_000
    assert card["parameters"] == sum(p.numel() for p in detector.network.parameters())
    least = {"direction": 0.99, "colour": 0.99, "shape": 0.8}  # as measured; shapes are not known surely
    assert all(card["figures"][f"{name}_{frames}_frames"] >= share for name, share in least.items() for frames in (8, 16))
    assert "ompares with nothing else" in detector.card


def test_it_needs_no_download(monkeypatch, tmp_path):
    monkeypatch.setenv("LATTE_OFFLINE", "1")
    monkeypatch.setenv("LATTE_DETECTOR_DIR", str(tmp_path))
    assert build_detector("builtin").describe()["dimension"] == 128
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("frames", [8, 16])
def test_it_knows_unseen_scenes(detector, frames):
    found = measure(detector.network, 64, frames, UNSEEN)
    assert min(found["direction"], found["colour"]) >= 0.95
    assert found["shape"] >= 0.65  # 0.33 by chance
    assert max(found["speed_error"], found["size_error"]) < 0.5  # guessing the middle is wrong by about 0.5 and more


def test_features_do_not_depend_on_the_batch(detector):
    clips = procedural_clips(UNSEEN, 5, 6)[0]
    whole = detector(clips)
    assert torch.equal(whole, torch.cat([detector(clip[None]) for clip in clips]))
    torch.testing.assert_close(build_detector("builtin", group=3)(clips), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(detector.network(to_input(clips)), whole, rtol=1e-4, atol=1e-4)


def test_order_and_speed_change_the_features(detector):
    clips = procedural_clips(UNSEEN, 8, 8)[0]
    still = detector(clips)
    for other in (clips.flip(1), clips[:, [0, 2, 1, 3, 4, 6, 5, 7]], clips[:, ::2]):
        assert ((detector(other) - still).norm(dim=1) > 0.1 * still.norm(dim=1)).all()


@pytest.mark.parametrize("name", ["blur", "frozen"])
def test_the_distance_rises_with_damage(detector, monkeypatch, name):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sensitivity

    real, clean = detector(sensitivity.draw_clips(1, 48, 8)), sensitivity.draw_clips(sensitivity.FAKE_SEED, 48, 8)
    strengths = sensitivity.DAMAGES[name][1]
    values = [frechet_distance(real, detector(sensitivity.damaged(name, strength, clean))) for strength in strengths[::2]]
    assert values == sorted(values)
    assert values[-1] > 1.15 * values[0]  # 48 clips of 128 features: mostly bias
    del sys.modules["sensitivity"]


def test_every_damage_leaves_strength_0_alone(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import sensitivity

    clips = sensitivity.draw_clips(sensitivity.FAKE_SEED, 2, 8)
    for name, (_, strengths) in sensitivity.DAMAGES.items():
        assert len(strengths) == 5
        assert torch.equal(sensitivity.damaged(name, strengths[0], clips), clips)
        most = sensitivity.damaged(name, strengths[-1], clips)
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
    with pytest.raises(InputError, match="leave it out"):
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
    with pytest.raises(InputError, match="not what was written"):
        build_detector("builtin")


def test_neighbours_and_moments_are_what_they_say():
    x = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = neighbours(x)
    for t in range(4):
        torch.testing.assert_close(found[:, t], torch.cat([x[:, max(t - 1, 0)], x[:, t], x[:, min(t + 1, 3)]], 1))
    values = x.transpose(1, 2).flatten(2)
    torch.testing.assert_close(moments(x), torch.cat([values.mean(2), values.std(2, correction=0)], 1), rtol=1e-4, atol=1e-4)


def test_a_batch_is_a_function_of_its_step_and_its_labels_are_true():
    pool = procedural_clips(5, 8, 16)
    config = replace(SMALL, batch=64)
    for step in (0, 1):  # both speeds
        clips, labels = draw_batch(pool, config, step)
        assert all(torch.equal(a, b) for a, b in zip(draw_batch(pool, config, step), (clips, labels), strict=True))
        bright = (clips.float().amax(-1) > 60).float()
        places = torch.arange(64.0)
        y, x = ((bright * axis).sum((2, 3)) / bright.sum((2, 3)) for axis in (places[:, None], places))
        path = torch.stack([x[:, -1] - x[:, 0], y[:, -1] - y[:, 0]], 1) / 64 / (config.frames - 1)
        ways = torch.tensor([[0.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.0]])
        torch.testing.assert_close(path, ways[labels[:, 0].long()] * labels[:, 3:4], rtol=0, atol=1e-3)
        assert targets(labels)[0].abs().max() < 1.2


def test_a_fresh_training_is_a_function_of_its_seed(tmp_path):
    one, two = fit(SMALL), fit(SMALL)
    assert isinstance(one, BuiltinDetector)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_the_trained_file_is_a_detector(detector, tmp_path, monkeypatch):
    out = tmp_path / "new.safetensors"
    monkeypatch.setattr("latte.train.detector.measure", lambda model, frames: {"direction": 0.25})
    make_weights(tmp_path / "first.safetensors", replace(SMALL, steps=1))
    card = make_weights(out, replace(SMALL, steps=2), tmp_path / "first.safetensors")
    assert card["before"]["config"]["steps"] == 1
    assert (card["config"]["steps"], card["figures"]["direction_16_frames"]) == (2, 0.25)
    monkeypatch.setattr(builtin, "WEIGHTS", out)
    assert detector.tensors_sha256 != (other := build_detector("builtin")).tensors_sha256
    assert other(torch.zeros(1, 4, 64, 64, 3, dtype=torch.uint8)).shape == (1, 128)
