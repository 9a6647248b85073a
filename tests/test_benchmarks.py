# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, print one JSON line each with what a figure needs, and refuse to print from a disturbed machine."""

import importlib
import json
import sys
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch

from latte.checks import InputError
from latte.data.media import write_mp4
from latte.data.procedural import draw_scene, render
from latte.generate import SampleConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = ["--device", "cpu", "--rounds", "3", "--seconds", "0.001", "--max-foreign", "1"]
MODEL = ["--depth", "2", "--width", "32", "--heads", "2", "--frames", "2", "--latent", "4"]
KEYS = {"what", "machine", "device", "threads", "torch", "commit", "repeats", "median_s", "spread", "settings"}


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark(name)`` imports a file of the folder; the matrix product is a small one."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(importlib.import_module("measure").MATMUL, "cpu", 64)
    yield importlib.import_module
    for name in [name for name, module in sys.modules.items() if str(FOLDER) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


@pytest.mark.parametrize(("name", "more"), [("forward", []), ("train_step", ["--micro-batch", "1", "--batch", "2", "--checkpointing"])])
def test_a_benchmark_prints_what_a_figure_needs(benchmark, capsys, name, more):
    line = benchmark(name).main([*TINY, *MODEL, *more])
    assert json.loads(capsys.readouterr().out) == line
    assert {*KEYS, "operations", "share_of_matmul"} <= set(line)
    assert line["repeats"] == 3
    assert line["operations"] > 0
    assert line["share_of_matmul"] > 0


def test_a_training_step_counts_three_forward_passes_per_clip(benchmark, capsys):
    forward = benchmark("forward").main([*TINY, *MODEL])["operations"]
    assert benchmark("train_step").main([*TINY, *MODEL, "--batch", "2"])["operations"] == 6 * forward


def test_data_wait_measures_videos_and_latents(benchmark, capsys):
    small = ["--videos", "2", "--resolution", "16", "--frames", "2", "--batch", "1", "--steps", "10", "--dtype", "fp32"]
    lines = benchmark("data_wait").main([*TINY, *small, "model.depth=2", "model.width=16", "model.heads=2"])
    assert [line["what"] for line in lines] == ["data_wait videos", "data_wait latents"]
    assert all(line.keys() >= KEYS and 0 <= line["wait_share"] <= 1 for line in lines)


def test_the_frechet_benchmark_prints_the_expected_value_beside_its_own(benchmark, capsys):
    line = benchmark("frechet").main(["--rows", "600", "--features", "12", "--repeats", "1"])
    assert json.loads(capsys.readouterr().out) == line
    assert line.keys() >= KEYS | {"processor_s", "peak_gib"}
    assert line["expected"] == pytest.approx(12 * 17 / 1200)
    assert line["value"] == pytest.approx(line["expected"], rel=0.5)


def test_the_i3d_benchmark_compares_equal_networks(benchmark, capsys, monkeypatch):
    i3d = benchmark("i3d")
    monkeypatch.setattr(i3d.measure, "interleave", one_round)
    line = i3d.main([*TINY, "--frames", "9"])
    assert json.loads(capsys.readouterr().out) == line
    assert {*KEYS, "plain_over_ours", "ours_bf16_over_ours"} <= set(line)
    assert line["difference"]["fp32"] < 1e-4 < line["difference"]["bf16"] < 0.2
    assert line["operations"] > 1e10


def one_round(tasks, device, rounds, seconds, max_foreign):
    """What ``interleave`` gives, each task run once and none timed: all took a second."""
    for task in tasks:
        task.run()
    return sys.modules["measure"].Times({task.name: [1.0] * 3 for task in tasks})


def write_shapes(folder, count):
    for index in range(count):
        write_mp4(folder / f"{index}.mp4", render(draw_scene(3, index, 8), 8, 64, 64), 8)
    return folder


@pytest.mark.parametrize("videos", [False, True])
def test_sensitivity_says_from_where_on_a_damage_is_seen(benchmark, capsys, tmp_path, videos):
    words = ["--videos", str(write_shapes(tmp_path / "shapes", 9))] if videos else ["--clips", "4"]
    (summary,) = benchmark("sensitivity").main([*words, "--frames", "8", "--kinds", "shuffled"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    assert lines[-1] == summary
    assert [line["strength"] for line in lines[:-1]] == [0, 0.25, 0.5, 0.75, 1]
    assert summary["rises"] == all(a["value"] < b["value"] for a, b in pairwise(lines[:-1]))
    assert lines[4]["value"] > 1.5 * lines[0]["value"]
    assert (summary["clips"], summary["clips_of"]) == (4, "shapes" if videos else "procedural")
    if videos:
        with pytest.raises(SystemExit):
            benchmark("sensitivity").main([*words, "--kinds", "speed"])


class Obedient:
    """Stands for a trained model: draws what prompts say, but every second clip in another colour."""

    sample, weights = SampleConfig(), "none"

    def generate(self, seeds, prompts):
        for seed, prompt in zip(seeds, prompts, strict=True):
            _, colour, shape, _, direction = prompt.split()
            scene = next(scene for index in count() if (scene := draw_scene(1, index, 8)).direction == direction)
            colour = ("white" if colour != "white" else "red") if seed % 2 else colour
            yield seed, render(replace(scene, shape=shape, colour=colour), 8, 64, 64)


@pytest.mark.parametrize(("words", "combinations"), [(["--hold-out", "6"], 12), (["--hold-out", "6", "--seen"], 60)])
def test_captions_are_graded_part_by_part(benchmark, capsys, monkeypatch, words, combinations):
    captions = benchmark("captions")
    monkeypatch.setattr(captions, "load_trained", lambda source, device, prompts: Obedient())
    monkeypatch.setattr(sys, "argv", ["captions.py", "model", "--count", "24", "--seed", "100", *words])
    captions.main()
    line = json.loads(capsys.readouterr().out)
    assert [line[key] for key in ("shape", "colour", "direction", "all", "coherent")] == [1, 0.5, 1, 0.5, 1]
    assert (line["clips"], line["combinations"], line["held_out"]) == (24, combinations, "--seen" not in words)


def test_captions_of_a_run_that_held_nothing_out_are_refused(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["captions.py", "shapes"])
    with pytest.raises(InputError, match=r"data.hold_out is 0"):
        benchmark("captions").main()


def test_a_disturbed_machine_gives_no_figure(benchmark, capsys, monkeypatch):
    measure = benchmark("measure")
    monkeypatch.setattr(measure, "foreign_share", lambda *_: 0.5)
    with pytest.raises(SystemExit) as stopped:
        benchmark("forward").main([*TINY, *MODEL, "--max-foreign", "0.4"])
    assert "0 clean rounds" in str(stopped.value)
    assert capsys.readouterr().out == ""


def test_rounds_compare_like_with_like(benchmark):
    measure = benchmark("measure")
    times = measure.Times({"a": [2.0, 4.0, 60.0], "b": [1.0, 2.0, 30.0]})
    assert times.ratio("a", "b") == 2.0  # a machine that slowed down mid-way changes both


def test_others_share_of_the_machine(benchmark, monkeypatch):
    measure = benchmark("measure")
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 2)
    assert measure.foreign_share((10.0, 1.0), (14.0, 4.0), wall=2.0) == 0.25  # 4 busy seconds, 3 of them ours, of 4
    assert measure.foreign_share((0.0, 0.0), (0.0, 1.0), wall=1.0) == 0.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal without a GPU is tested where there is none")
def test_the_gpu_benchmark_says_that_it_needs_one(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "gpu"))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        benchmark("run").main()
