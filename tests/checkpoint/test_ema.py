# SPDX-License-Identifier: Apache-2.0
"""EMA weights of several widths: the profiles by hand, exact across a resume, and any width afterwards."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latte.checkpoint.ema import combination, decay_at, exponent, overlaps, read_ema, stored_widths
from latte.checkpoint.run import load_checkpoint, save_checkpoint
from latte.checks import InputError
from latte.config.run import load_run
from latte.inference.pipeline import VideoPipeline
from latte.inference.run_folder import open_source
from latte.profile.memory import states
from latte.training.config import TrainConfig
from tiny_runs import SHORT, TINY, run

WIDTHS = (0.05, 0.15)
EVERY = replace(SHORT, ema_widths=WIDTHS, checkpoint_every=1, keep_last=20)


def profile(steps: int, width: float) -> np.ndarray:
    """The share of every step's weights in the average after ``steps``, by the recursion itself."""
    shares = np.zeros(steps)
    for step in range(1, steps + 1):
        kept = decay_at(step, width)
        shares *= kept
        shares[step - 1] = 1 - kept
    return shares


@pytest.mark.parametrize("width", [0.02, 0.1, 0.25])
def test_a_width_is_the_standard_deviation_of_its_profile(width):
    shares = profile(20_000, width)
    place = np.arange(1, 20_001) / 20_000
    mean = (shares * place).sum()
    deviation = np.sqrt((shares * (place - mean) ** 2).sum())
    assert shares.sum() == pytest.approx(1)
    assert deviation == pytest.approx(width, rel=1e-3)
    assert exponent(width) > 0


def test_products_of_profiles_are_those_of_the_recursion():
    one, other = profile(4_000, 0.1), profile(6_000, 0.2)
    expected = (np.pad(one, (0, 2_000)) * other).sum()
    assert overlaps([(4_000, 0.1)], [(6_000, 0.2)])[0, 0] == pytest.approx(expected, rel=1e-2)
    assert overlaps([(6_000, 0.2)], [(4_000, 0.1)])[0, 0] == pytest.approx(expected, rel=1e-2)


def test_widths_between_stored_ones_are_combined_and_distant_ones_are_not():
    stored = [(step, width) for step in (6_000, 8_000, 10_000) for width in (0.05, 0.1)]
    factors, error = combination(stored, (10_000, 0.07))
    padded = [np.pad(profile(step, width), (0, 10_000 - step)) for step, width in stored]
    made = sum(factor * part for factor, part in zip(factors, padded, strict=True))
    target = profile(10_000, 0.07)
    found = np.linalg.norm(made - target) / np.linalg.norm(target)
    assert found == pytest.approx(error, abs=2e-3)
    assert error < 0.03
    assert combination(stored, (10_000, 0.1))[1] < 1e-6
    assert combination(stored[-2:], (10_000, 0.25))[1] > 0.1


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of 12 steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    run(folder, EVERY)
    return folder


def average(folder: Path, width: float) -> dict[str, torch.Tensor]:
    """The exact EMA weights after 12 steps, from the checkpoints of all."""
    shares = profile(12, width)
    total: dict[str, Any] = {}
    for step in range(1, 13):
        tensors = load_checkpoint(folder / "checkpoints" / f"step-{step}", only={"model"}).tensors["model"]
        for name, tensor in tensors.items():
            total[name] = total.get(name, 0) + shares[step - 1] * tensor.double()
    return total


def test_stored_weights_are_the_average_of_all_steps(trained):
    last = trained / "checkpoints" / "step-12"
    assert stored_widths(last) == list(WIDTHS)
    for width in WIDTHS:
        found, error = read_ema(last, width)
        assert error == 0
        for name, tensor in average(trained, width).items():
            torch.testing.assert_close(found[name], tensor.float(), rtol=1e-5, atol=1e-6)


def test_a_width_chosen_afterwards_is_near_its_average(trained):
    last = trained / "checkpoints" / "step-12"
    found, error = read_ema(last, 0.1)
    assert 0 < error < 0.05
    exact = average(trained, 0.1)
    moved = load_checkpoint(last, only={"model"}).tensors["model"]
    distance = torch.cat([(found[name] - exact[name]).flatten() for name in exact]).norm()
    spread = torch.cat([(moved[name] - exact[name]).flatten() for name in exact]).norm()
    assert distance < 0.1 * spread


def test_a_resumed_run_has_the_same_weights_of_every_width(trained, tmp_path):
    run(tmp_path, EVERY, until=5)
    run(tmp_path, EVERY)
    for width in WIDTHS:
        once, _ = read_ema(trained / "checkpoints" / "step-12", width)
        resumed, _ = read_ema(tmp_path / "checkpoints" / "step-12", width)
        assert all(torch.equal(once[name], resumed[name]) for name in once)
    with pytest.raises(InputError, match=r"train.ema_widths: the run has \[0.05, 0.15\], you gave \[\]"):
        run(tmp_path, replace(EVERY, ema_widths=()))


def test_the_other_weights_do_not_notice(trained, tmp_path):
    run(tmp_path, replace(EVERY, ema_widths=(), checkpoint_every=12))
    for group in ("model", "ema", "optimizer"):
        plain = load_checkpoint(tmp_path / "checkpoints" / "step-12", only={group}).tensors[group]
        other = load_checkpoint(trained / "checkpoints" / "step-12", only={group}).tensors[group]
        assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_sampling_reads_the_width(trained):
    model, _ = open_source(trained, ema=0.15).load()
    expected, _ = read_ema(trained / "checkpoints" / "step-12", 0.15)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_buffers_keep_the_last_value(tmp_path):
    for step, gate in ((1, 0.5), (2, 1.0)):
        tensors = {"time_gate": torch.tensor([gate]), "weight": torch.full((2,), float(step))}
        save_checkpoint(tmp_path, step, {"ema-0.05": tensors, "ema-0.1": tensors}, {})
    found, error = read_ema(tmp_path / "checkpoints" / "step-2", 0.07)
    assert found["time_gate"] == 1.0
    assert error < 0.05


def test_what_cannot_be_made_is_refused_in_one_line(trained, tmp_path):
    last = trained / "checkpoints" / "step-12"
    for width, reason in (
        (0.01, r"make only to \d+% of its profile"),
        (0.5, r"a width must be in \(0, 0.28\]"),
    ):
        with pytest.raises(InputError, match=reason):
            read_ema(last, width)
    run(tmp_path, replace(SHORT, steps=3))
    with pytest.raises(InputError, match=r"no EMA weights by width; train with train.ema_widths"):
        open_source(tmp_path, ema=0.1)
    with pytest.raises(InputError, match="chooses EMA weights of a run, but builtin is none"):
        VideoPipeline.from_pretrained("builtin", ema=0.1)
    for widths in ((0.3,), (0.0,), (0.1, 0.1)):
        with pytest.raises(InputError, match=r"train.ema_widths is .* give e.g. 0.05,0.1"):
            TrainConfig(ema_widths=widths)


def test_the_setting_is_read_from_words_and_counted():
    config, _ = load_run("shapes-tiny", ["train.ema_widths=0.05,0.1"])
    assert config.train.ema_widths == (0.05, 0.1)
    assert states(TINY, num_emas=3).ema == 3 * states(TINY).ema
