# SPDX-License-Identifier: Apache-2.0
"""``latte bench``: the list, an answer per question, what is left out and what is refused."""

import json

import pytest

from latte.cli.bench import QUESTIONS
from latte.config.run import load_run
from latte.profile import bench, timing

TINY = ["shapes-tiny", "model.depth=2", "model.width=16", "model.heads=2", "data.frames=2"]
TINY += ["train.global_batch=2", "data.num_clips=2"]
FAST = ["--rounds", "1", "--seconds", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_yard(monkeypatch):
    monkeypatch.setitem(timing.MATMUL, "cpu", 32)


def answers(found):
    return {line["what"]: line for line in map(json.loads, found.out.splitlines())}


def test_every_question_is_answered_in_a_line_of_its_own(latte):
    found = latte("bench", *TINY, *FAST, "--json")
    assert found.code == 0
    lines = answers(found)
    assert list(lines) == list(QUESTIONS)
    for line in lines.values():
        assert line["median_s"] > 0
        assert line["rounds"] == 1
        assert {"machine", "device", "threads", "torch", "latte", "other_load", "spread"} <= set(line)
    assert lines["forward"]["over_forward"] == 1
    assert {name for name, line in lines.items() if "share_of_matmul" in line} == {
        "forward",
        "step",
        "encode",
    }
    step = lines["step"]
    assert step["clips_per_second"] == pytest.approx(2 / step["median_s"], rel=1e-2)
    sample = lines["sample"]
    assert (sample["steps"], sample["guided_steps"], sample["steps_run"]) == (20, 20, 2)
    assert sample["denoising_s"] == pytest.approx(10 * sample["median_s"], rel=1e-2)
    assert sample["clip_s"] == pytest.approx(sample["denoising_s"] + lines["decode"]["median_s"], rel=1e-2)


def test_people_get_a_table_and_what_it_means(latte):
    found = latte("bench", *TINY, *FAST, "--only", "step", "--only", "encode")
    first, *rows, hours, encoding = found.out.splitlines()[:5]
    assert first.split()[0] == "what"
    assert [row.split()[0] for row in rows] == ["step", "encode"]
    assert hours.startswith("training on latents: 480 steps of 2 clips take")
    assert "latte data encode" in encoding


def test_guided_steps_outside_the_interval_cost_a_forward_pass():
    times = timing.Times({"forward": [1.0, 1.0], "sample": [6.0, 6.0], "decode": [0.5, 0.5]})
    line = {"steps": 10, "guided_steps": 4, "steps_run": 2, "guidance": 2.0, "median_s": 6.0}
    assert bench.latency(line, times)["denoising_s"] == 4 * 3.0 + 6 * 1.0
    assert bench.latency(line, times)["clip_s"] == 18.5
    unguided = {**line, "guidance": 1.0, "guided_steps": 0}
    assert bench.latency(unguided, times)["denoising_s"] == 30.0


def test_the_interval_decides_which_steps_are_guided():
    config, _ = load_run(TINY[0], [*TINY[1:], "sample.guidance_interval=[0.3,1.5]"])
    (line,) = bench.measure(config, QUESTIONS, ["sample"], "cpu", rounds=1, seconds=0)
    assert 0 < line["guided_steps"] < line["steps"] == 20


def test_without_data_the_rest_is_answered(latte):
    words = ["sky", "model.size=S", "model.depth=2", "model.width=16", "model.heads=2", "data.frames=2"]
    words += ["data.root=nowhere", "data.resolution=32", "train.global_batch=1", "codec.name=builtin"]
    found = latte("bench", *words, *FAST, "--json", "--only", "forward", "--only", "data")
    assert (found.code, found.out) == (2, "")
    assert "nowhere" in found.err
    lines = answers(latte("bench", *words, *FAST, "--json"))
    assert "nowhere" in lines["data"]["skipped"]
    assert all("median_s" in line for name, line in lines.items() if name != "data")
    shown = latte("bench", *words, *FAST)
    assert "data was left out: " in shown.err
    assert "\ndata" not in shown.out


def test_a_step_that_does_not_fit_into_memory_is_refused_before_it_is_built(latte, monkeypatch):
    monkeypatch.setattr(bench, "memory_of", lambda device: 1 << 20)
    found = latte("bench", "shapes", *FAST, "--only", "step")
    assert found.code == 2
    assert "a training step of 16 clips needs" in found.err
    assert "has 1.0 MiB; give a smaller train.micro_batch" in found.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shapes", "--only", "forwards"], "--only is 'forwards', which is not one of forward, step"),
        (["shapes", "--rounds", "0"], "--rounds is 0, but it must be at least 1"),
        (["--only", "forward"], "give a recipe"),
        (["no-such-recipe"], "no-such-recipe"),
        (["shapes", "--dtype", "fp8", "--device", "cpu"], "fp8"),
    ],
)
def test_what_cannot_be_measured_is_refused(latte, words, message):
    found = latte("bench", *words)
    assert found.code == 2
    assert message in found.err


def test_the_list_names_questions_and_the_scripts_of_a_checkout(latte, monkeypatch, tmp_path):
    found = json.loads(latte("bench", "--json").out)
    assert found["questions"] == list(QUESTIONS)
    assert found["scripts"]["benchmarks/forward.py"].startswith("Seconds of a forward pass")
    assert "benchmarks/measure.py" not in found["scripts"], "not a benchmark itself"
    monkeypatch.setattr("latte.cli.bench.SCRIPTS", tmp_path / "benchmarks")  # as in an installed wheel
    assert "a checkout of the source has more" in latte("bench").out


def test_a_question_of_the_user_is_one_entry(latte, monkeypatch):
    monkeypatch.setitem(
        QUESTIONS, "mine", lambda parts: bench.Question(timing.Task("mine", lambda: None), 4, {"own": 1})
    )
    assert "data, mine" in " ".join(latte("bench", "--help").out.split())
    lines = answers(latte("bench", *TINY, *FAST, "--json", "--only", "mine"))
    assert list(lines) == ["mine"]
    assert (lines["mine"]["own"], lines["mine"]["clips"]) == (1, 4)
