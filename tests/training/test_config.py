# SPDX-License-Identifier: Apache-2.0
"""Settings that do not fit the number of steps: what is refused, and what gives a notice."""

import pytest

from latte.checks import InputError
from latte.training.config import TrainConfig, check_schedule, learning_rate

QUIET = {"ema_warmup": True, "checkpoint_every": 10, "warmup_steps": 0, "clip_norm": None}


@pytest.mark.parametrize(
    ("settings", "fit"),
    [
        ({"steps": 400, "decay_steps": 2000}, 400),
        ({"steps": 400, "decay_steps": 400, "warmup_steps": 100}, 300),
        ({"steps": 10, "decay_steps": 1, "warmup_steps": 20}, 0),
    ],
)
def test_a_decay_that_does_not_fit_is_refused_with_the_largest_that_does(settings, fit):
    with pytest.raises(InputError, match=rf"give train\.decay_steps={fit} or less"):
        check_schedule(TrainConfig(**{**QUIET, **settings}), gated=False)
    config = TrainConfig(**{**QUIET, **settings, "decay_steps": fit})
    check_schedule(config, gated=False)
    if config.warmup_steps <= config.steps:
        rates = [
            learning_rate(step, 1.0, config.warmup_steps, fit, config.steps)
            for step in range(1, config.steps + 1)
        ]
        assert max(rates) > 0.99


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"steps": 10, "warmup_steps": 20}, "train.warmup_steps is 20"),
        ({"steps": 10, "clip_norm": 1.0, "clip_start": 10}, "train.clip_start is 10"),
        ({"steps": 10, "gate_steps": 40}, "train.gate_steps is 40"),
        ({"steps": 10, "checkpoint_every": 11}, "train.checkpoint_every is 11"),
        ({"steps": 10, "ema_warmup": False, "ema_decay": 0.999}, "train.ema_decay is 0.999"),
    ],
)
def test_a_setting_without_full_effect_gives_one_notice_and_a_fitting_one_none(settings, start):
    quiet = {**QUIET, "gate_steps": 10}
    (notice,) = check_schedule(TrainConfig(**{**quiet, **settings}), gated=True)
    assert notice.startswith(start)
    assert "train.steps is 10" in notice or "after 10 steps" in notice
    assert check_schedule(TrainConfig(**{**quiet, "steps": 10}), gated=True) == []


def test_a_model_without_a_gate_gets_no_notice_of_it():
    assert check_schedule(TrainConfig(**{**QUIET, "steps": 10, "gate_steps": 40}), gated=False) == []


def test_a_resumed_run_may_be_shorter_than_its_decay(tmp_path):
    """Its learning rate was checked when it began, and old runs must stay usable."""
    from dataclasses import replace

    from tiny_runs import SHORT, run

    run(tmp_path, replace(SHORT, steps=8, decay_steps=4))
    assert run(tmp_path, replace(SHORT, steps=9, decay_steps=20))["step"] == 9
