# SPDX-License-Identifier: Apache-2.0
"""``dtype=fastest``: the measured choice, once per machine and shape, and its record in a run."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from latte.checkpoint.record import recorded_setting
from latte.checks import InputError
from latte.inference.pipeline import VideoPipeline
from latte.model import fastest as module
from latte.model.config import ModelConfig, TextConfig
from latte.runtime import resolve_dtype
from latte.training.config import TrainConfig
from latte.training.step import with_dtype
from tiny_runs import SHORT, run

CPU = torch.device("cpu")
TINY = ModelConfig(depth=4, width=32, heads=2, num_frames=4, latent_size=8, num_classes=3)


class Clock:
    """Seconds that pass only while work is done."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        def run():
            self.now += next(seconds)

        return run


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file of measurements, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latte" / module.FILE


@pytest.fixture
def measured(monkeypatch):
    """Seconds that the next measurements shall find, and the list of those that were made."""
    answers = [{"fp32": 1.0, "bf16": 0.5}]
    made = []

    def measure(work):
        made.append(sorted(work))
        return answers[-1]

    monkeypatch.setattr(module, "measure", measure)
    return answers, made


@pytest.mark.parametrize(
    ("bf16", "name"), [(0.5, "bf16"), (0.96, "bf16"), (0.975, "fp32"), (1.0, "fp32"), (3.0, "fp32")]
)
def test_the_fastest_is_taken_and_fp32_wins_a_tie(bf16, name):
    assert module.choice({"fp32": 1.0, "bf16": bf16}) == name


@pytest.mark.parametrize("bf16", [0.1, 0.5, 0.9, 0.97, 0.98, 1.0, 1.5])
def test_the_choice_is_never_more_than_three_percent_slower_than_the_best(bf16):
    seconds = {"fp32": 1.0, "bf16": bf16}
    assert seconds[module.choice(seconds)] <= 1.03 * min(seconds.values())


def test_measuring_takes_turns_and_one_disturbed_round_does_not_count():
    clock = Clock()
    slow = iter([0.5, *[0.030] * 100])
    disturbed = iter([0.5, 0.010, 0.9, *[0.010] * 100])
    found = module.measure({"fp32": clock.work(slow), "bf16": clock.work(disturbed)}, clock)
    assert found == pytest.approx({"fp32": 0.030, "bf16": 0.010})


def test_measuring_ends_after_its_budget_and_a_few_rounds_of_slow_work():
    clock = Clock()
    quick = iter([0.0, *[0.01] * 100])
    module.measure({"fp32": clock.work(quick)}, clock)
    assert module.BUDGET <= clock.now <= module.BUDGET + 0.011
    clock = Clock()
    module.measure({"fp32": clock.work(iter([5.0] * 100))}, clock)
    assert clock.now == 5.0 * (1 + module.FEWEST_ROUNDS)


def test_a_dtype_that_the_device_lacks_is_reported_and_left_out(caplog):
    def missing():
        raise NotImplementedError("no kernel for BFloat16\nand a trace")

    caplog.set_level("INFO", "latte")
    found = module.measure({"fp32": lambda: None, "bf16": missing})
    assert list(found) == ["fp32"]
    assert "dtype: bf16 does not work on this device (no kernel for BFloat16)" in caplog.text
    assert module.describe(found) == "fp32 1.00 x, no bf16 on this device"
    with pytest.raises(InputError, match=r"fp32 fails on this device: no kernel"):
        module.measure({"fp32": missing})


def test_the_second_answer_comes_from_the_cache(cache, measured, caplog):
    caplog.set_level("INFO", "latte")
    answers, made = measured
    assert module.fastest(TINY, CPU, 2, training=True) == "bf16"
    answers.append({"fp32": 1.0, "bf16": 2.0})
    assert module.fastest(TINY, CPU, 2, training=True) == "bf16"
    assert made == [["bf16", "fp32"]]
    assert caplog.messages[-1] == "dtype: fastest is bf16 (fp32 1.00 x, bf16 2.00 x, measured earlier)"
    assert len(json.loads(cache.read_text())) == 1


def test_other_shapes_tasks_and_machines_are_measured(cache, measured, monkeypatch):
    _, made = measured
    module.fastest(TINY, CPU, 2, training=True)
    module.fastest(TINY, CPU, 2, training=False)
    module.fastest(TINY, CPU, 3, training=True)
    module.fastest(ModelConfig(**{**vars(TINY), "width": 64}), CPU, 2, training=True)
    monkeypatch.setattr(module, "machine_name", lambda device: "another processor")
    module.fastest(TINY, CPU, 2, training=True)
    monkeypatch.setattr(torch, "__version__", "99.0")
    module.fastest(TINY, CPU, 2, training=True)
    assert len(made) == 6


DAMAGED = [
    "",
    "[]",
    "{",
    "null",
    '{"KEY": {"fp32": "fast"}}',
    '{"KEY": {"fp64": 1.0}}',
    '{"KEY": {}}',
    '{"KEY": {"fp32": -1.0, "bf16": 1.0}}',
    '{"KEY": 3}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_is_measured_again_and_replaced(cache, measured, content):
    _, made = measured
    module.fastest(TINY, CPU, 2, training=True)
    (key,) = json.loads(cache.read_text())
    cache.write_text(content.replace('"KEY"', json.dumps(key)))
    assert module.fastest(TINY, CPU, 2, training=True) == "bf16"
    assert len(made) == 2
    assert json.loads(cache.read_text())[key] == {"fp32": 1.0, "bf16": 0.5}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        TINY,
        ModelConfig(depth=4, width=32, heads=2, variant=4, patch="compression", latent_size=(8, 12)),
        TextConfig(depth=3, width=32, heads=2, num_frames=4, latent_size=8, caption_channels=16),
    ],
)
def test_every_model_is_measured_for_real_without_touching_random_numbers(cache, config, training):
    before = torch.random.get_rng_state()
    assert module.fastest(config, CPU, 2, training) in module.CANDIDATES
    assert torch.equal(before, torch.random.get_rng_state())
    (seconds,) = json.loads(cache.read_text()).values()
    assert list(seconds) == list(module.CANDIDATES)


def test_large_shapes_are_cut_to_few_tokens_and_small_ones_are_not():
    shape, clips = module.cut(ModelConfig(size="XL", latent_size=64), 8)
    assert (shape.depth, clips, shape.dimensions[1]) == (2, 1, 1152)
    assert module.FEWEST_TOKENS / 2 <= shape.num_tokens <= 2 * module.FEWEST_TOKENS
    shape, clips = module.cut(TINY, 7)
    assert (shape.num_frames, shape.grid_size, clips) == (4, (8, 8), 7)


def test_fastest_without_a_model_is_refused():
    with pytest.raises(InputError, match="dtype is fastest, which is measured for a model"):
        resolve_dtype("fastest", CPU)


def test_sampling_takes_the_measured_dtype(cache, measured):
    assert VideoPipeline.from_pretrained("builtin", dtype="fastest").dtype == torch.bfloat16
    assert VideoPipeline.from_pretrained("builtin").dtype == torch.float32


def test_a_run_keeps_the_dtype_it_began_with(cache, measured, tmp_path, caplog):
    caplog.set_level("INFO", "latte")
    answers, made = measured
    asked = TrainConfig(dtype="fastest", global_batch=6, micro_batch=2)
    first = with_dtype(asked, TINY, CPU, tmp_path)
    assert first == TrainConfig(dtype="bf16", global_batch=6, micro_batch=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {"dtype": "fp32"}}))
    assert with_dtype(asked, TINY, CPU, tmp_path).dtype == "fp32"
    assert "dtype: fp32, as recorded in" in caplog.text
    (tmp_path / "config.yaml").write_text("train: [")
    assert with_dtype(asked, TINY, CPU, tmp_path).dtype == "bf16"
    assert with_dtype(TrainConfig(), TINY, CPU, tmp_path).dtype == "auto"
    assert recorded_setting(tmp_path / "nothing", "train", "dtype") is None
    assert len(made) == 1
    assert answers == [{"fp32": 1.0, "bf16": 0.5}]


def test_training_records_the_dtype_and_resuming_needs_no_measurement(cache, measured, tmp_path):
    answers, made = measured
    asked = replace(SHORT, dtype="fastest", steps=3)
    run(tmp_path, asked, until=2)
    assert recorded_setting(tmp_path, "train", "dtype") == "bf16"
    answers.append({"fp32": 1.0, "bf16": 2.0})
    cache.unlink()
    run(tmp_path, asked)
    assert recorded_setting(tmp_path, "train", "dtype") == "bf16"
    assert len(made) == 1
