# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, print one JSON line each with what a number needs, and refuse to print from a disturbed machine."""

import importlib
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import count, pairwise, zip_longest
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checks import InputError
from latte.data.media import write_mp4
from latte.data.procedural import DIRECTIONS, draw_scene, render
from latte.data.world.scenes import caption, sample_scene
from latte.data.world.scenes import render as render_world
from latte.inference.generate import SampleConfig
from latte.profile import timing
from temporal import time_codec
from tiny import tiny_trained

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = ["--device", "cpu", "--rounds", "3", "--seconds", "0.001", "--max-other-load", "1"]
MODEL = ["--depth", "2", "--width", "32", "--heads", "2", "--frames", "2", "--latent", "4"]
KEYS = {
    "what",
    "machine",
    "device",
    "threads",
    "torch",
    "commit",
    "repeats",
    "median_s",
    "spread",
    "settings",
}


@pytest.fixture
def benchmark(monkeypatch):
    """``benchmark(name)`` imports a file of the folder; the matrix product is a small one."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setitem(importlib.import_module("measure").MATMUL, "cpu", 64)
    yield importlib.import_module
    for name in [
        name for name, module in sys.modules.items() if str(FOLDER) in str(getattr(module, "__file__", ""))
    ]:
        del sys.modules[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_benchmark_can_be_imported_and_describes_its_options(benchmark, capsys, name):
    """Some run only in the nightly tests; what they import must be there all the same."""
    module = benchmark(name)
    if not hasattr(module, "main"):
        return
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    assert left.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("forward", []),
        ("train_step", ["--micro-batch", "1", "--batch", "2", "--checkpointing", "--recompute"]),
    ],
)
def test_a_benchmark_prints_what_a_number_needs(benchmark, capsys, name, more):
    line = benchmark(name).main([*TINY, *MODEL, *more])
    assert json.loads(capsys.readouterr().out) == line
    assert {*KEYS, "operations", "share_of_matmul"} <= set(line)
    assert line["repeats"] == 3
    assert line["operations"] > 0
    assert line["share_of_matmul"] > 0


def test_precision_compares_with_a_model_that_computes_the_same(benchmark, capsys):
    line = benchmark("precision").main([*TINY, *MODEL, "--classes", "3"])
    assert json.loads(capsys.readouterr().out) == line
    assert line["fp32"]["relative_rms"] < 1e-5, "the reference is ours, organised otherwise"
    assert line["fp32"]["relative_rms"] < line["int8"]["relative_rms"] < 0.02
    assert all(line[name]["ratio"] > 0 for name in ("fp32", "bf16", "int8"))
    assert line["fastest"]["name"] in ("fp32", "bf16")


def test_the_targets_compare_equal_models(benchmark, capsys):
    benchmark("targets").main([*TINY, *MODEL, "--latent", "8", "--processor-time", "--compile", "off"])
    lines = {line["what"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(lines) == ["forward", "sampling", "step", "activations", "growth"]
    for part in ("forward", "sampling"):
        errors = lines[part]["relative_rms"]
        assert errors["plain"] == 0
        assert errors["fp32"] < 1e-5 < errors["int8"] < 0.02
        assert all(way["plain_over"] > 0 for way in lines[part]["ways"].values())
    losses = lines["step"]["losses"]
    assert losses["fp32"] == losses["fp32 recompute"] == pytest.approx(losses["plain"], rel=1e-4)
    shares = lines["activations"]["share_of_plain"]
    assert shares["plain"] == 1 > shares["fp32"] > shares["fp32 recompute"]
    assert lines["growth"]["tokens"]["operations"] > 3


def test_a_profile_divides_the_whole_time(benchmark, capsys):
    benchmark("targets").main([*TINY, *MODEL, "--latent", "8", "--processor-time", "--parts", "profile"])
    forward, step = map(json.loads, capsys.readouterr().out.splitlines())
    assert (forward["what"], step["what"]) == ("profile of the forward pass", "profile of the training step")
    for way in (*forward["ways"].values(), *step["ways"].values()):
        assert sum(way["shares"].values()) == pytest.approx(1, abs=0.01)
        assert way["shares"]["products"] > 0
    assert "aten::_int_mm" in forward["ways"]["int8"]["largest"]
    assert step["ways"]["fp32"]["shares"]["optimizer"] > forward["ways"]["fp32"]["shares"]["optimizer"]


@pytest.mark.nightly
def test_a_second_score_is_measured_by_its_parts(benchmark, capsys):
    line = benchmark("second_score").main(["--clips", "2", "--size", "32", "--rounds", "1"])
    assert json.loads(capsys.readouterr().out) == line
    assert line["score"] > 1
    assert line["real_side"] > 1
    assert 0 < line["real_share"] < 1
    assert 0 < line["bf16_relative_rms_one_clip"] < 0.1


def test_latent_clips_are_counted_for_both_ways_of_reading(benchmark, capsys):
    line = benchmark("latent_clips").main(["--clips", "20", "--rounds", "2"])
    assert json.loads(capsys.readouterr().out) == line
    assert line["ratio"] > 0
    assert line["clips_per_second"] > 0


def test_a_training_step_counts_three_forward_passes_per_clip(benchmark, capsys):
    forward = benchmark("forward").main([*TINY, *MODEL])["operations"]
    assert benchmark("train_step").main([*TINY, *MODEL, "--batch", "2"])["operations"] == 6 * forward


@pytest.mark.nightly
def test_processes_that_share_a_clip_are_compared_with_one(benchmark, capsys):
    line = benchmark("shared_sampling").main([*MODEL, "--rounds", "2", "--steps", "1"])
    assert json.loads(capsys.readouterr().out) == line
    assert line["difference"] <= 1e-5
    assert 0 < line["processor_over_one"] < 4


@pytest.mark.nightly
def test_processes_are_compared_with_one(benchmark, capsys):
    line = benchmark("processes").main([*MODEL, "--batch", "2", "--rounds", "2", "--steps", "1"])
    assert json.loads(capsys.readouterr().out) == line
    assert line["median_s"].keys() == {"alone", "buckets", "after_backward", "fsdp"}
    for side in ("buckets", "after_backward", "fsdp"):
        assert line[side]["efficiency"] == pytest.approx(line[side]["speed_over_one"] / 2, rel=0.01)
        assert 0 < line[side]["processor_efficiency"] < 2


def test_saving_compares_both_ways(benchmark, capsys):
    line = benchmark("saving").main([*MODEL, "--rounds", "1"])
    assert json.loads(capsys.readouterr().out) == line
    assert line["median_s"].keys() == line["processor_s"].keys() == {"synchronous", "asynchronous"}


def test_data_wait_measures_videos_latents_and_buckets(benchmark, capsys):
    small = [
        "--videos",
        "3",
        "--resolution",
        "16",
        "--frames",
        "2",
        "--batch",
        "1",
        "--steps",
        "10",
        "--dtype",
        "fp32",
    ]
    lines = benchmark("data_wait").main([*TINY, *small, "model.depth=2", "model.width=16", "model.heads=2"])
    sources = ["videos", "latents", "buckets"]
    assert [line["what"] for line in lines] == [f"data_wait {source}" for source in sources]
    assert [line["repeats"] for line in lines] == [5, 5, 5]
    assert all(line.keys() >= KEYS and 0 <= line["wait_share"] <= 1 for line in lines)


def test_the_frechet_benchmark_prints_the_expected_value_beside_its_own(benchmark, capsys):
    line = benchmark("frechet").main(["--rows", "600", "--features", "12", "--repeats", "1"])
    assert json.loads(capsys.readouterr().out) == line
    assert line.keys() >= KEYS | {"processor_s", "peak_gib"}
    assert line["expected"] == pytest.approx(12 * 17 / 1200)
    assert line["value"] == pytest.approx(line["expected"], rel=0.5)


@pytest.mark.nightly
def test_the_i3d_benchmark_compares_equal_networks(benchmark, capsys, monkeypatch):
    i3d = benchmark("i3d")
    monkeypatch.setattr(i3d.measure, "timed", one_round)
    line = i3d.main([*TINY, "--frames", "9"])
    assert json.loads(capsys.readouterr().out) == line
    assert {*KEYS, "plain_over_ours", "ours_bf16_over_ours"} <= set(line)
    assert line["difference"]["fp32"] < 1e-4 < line["difference"]["bf16"] < 0.2
    assert line["operations"] > 1e10


def one_round(options, tasks, device):
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


class Stand:
    """Stands for a trained model: generates what it is asked for, bar what ``spoil(scene, seed)`` changes."""

    name, weights, classes, reader, sample = "stand", "none", [], object(), SampleConfig()

    def __init__(self, data, spoil=lambda scene, seed: scene):
        self.about = {"data": {"kind": "procedural", **data}}
        self.spoil = spoil
        self.asked = []


class Shapes(Stand):
    """Moving shapes from prompts, or from labels."""

    def generate(self, seeds, labels, prompts, config):
        for seed, label, prompt in zip_longest(seeds, labels or [], prompts or []):
            direction = list(DIRECTIONS)[label] if labels else prompt.split()[-1]
            found = (draw_scene(1, index, 8) for index in count())
            scene = next(scene for scene in found if scene.direction == direction)
            if prompts:
                _, colour, shape, _, _ = prompt.split()
                scene = replace(scene, shape=shape, colour=colour)
            yield seed, render(self.spoil(scene, seed), 8, 64, 64)


class World(Stand):
    """Scenes of the world from prompts."""

    def generate(self, seeds, labels, prompts, config):
        scenes = [sample_scene(100, index, 8, held) for held in (True, False) for index in range(18)]
        known = {caption(scene, "mixed"): scene for scene in scenes}
        self.asked.append(list(prompts))
        for seed, prompt in zip(seeds, prompts, strict=True):
            yield seed, render_world(self.spoil(known[prompt], seed), 17, 64, 64)


def recoloured(scene, seed):
    """Every second clip in another colour."""
    return replace(scene, colour="red" if scene.colour != "red" else "green") if seed % 2 else scene


def share(line, side, *parts):
    return [line[side][part]["share"] for part in parts]


def test_prompts_of_moving_shapes_are_graded_part_by_part(benchmark, capsys, monkeypatch):
    obedience = benchmark("obedience")
    model = Shapes({"hold_out": 6}, recoloured)
    monkeypatch.setattr(obedience.VideoPipeline, "from_pretrained", lambda source, **_: model)
    line = obedience.main(["model", "--count", "24", "--seed", "100"])
    assert json.loads(capsys.readouterr().out) == line
    assert (line["what"], line["model"], line["clips"]) == ("obedience", "model", 24)
    for side in ("held_out", "trained"):
        assert share(line, side, "kind", "colour", "direction", "all", "consistent") == [1, 0.5, 1, 0.5, 1]
        low, high = line[side]["colour"]["interval"]
        assert 0.2 < low < 0.5 < high < 0.8
    assert set(line["held_out"]["groups"]) <= {"circle", "square", "triangle"}


def test_captions_of_the_world_are_graded_for_combinations_held_out_and_trained(benchmark, monkeypatch):
    obedience = benchmark("obedience")
    data = {"scenes": "world", "language": "mixed", "hold_out": 8}
    model = World(data)
    monkeypatch.setattr(obedience.VideoPipeline, "from_pretrained", lambda source, **_: model)
    words = ["model", "--count", "18", "--seed", "100"]
    line = obedience.main(words)
    expected = [
        [caption(sample_scene(100, index, 8, held), "mixed") for index in range(18)] for held in (True, False)
    ]
    assert model.asked == expected, "the held-out ones first"
    for side in ("held_out", "trained"):
        assert share(line, side, "kind", "colour", "direction", "consistent", "all") == [1] * 5
        assert line[side]["all"]["interval"][1] == 1 > line[side]["all"]["interval"][0] > 0.7
    assert len(line["trained"]["groups"]) == 9
    spoilt = World(data, recoloured)
    monkeypatch.setattr(obedience.VideoPipeline, "from_pretrained", lambda source, **_: spoilt)
    line = obedience.main(words)
    assert share(line, "held_out", "kind", "colour", "consistent") == [1, 0.5, 1]
    unknown = World({"kind": "latents"})
    monkeypatch.setattr(obedience.VideoPipeline, "from_pretrained", lambda source, **_: unknown)
    with pytest.raises(InputError, match="--scenes world or shapes"):
        obedience.main(words)
    few = ["model", "--count", "4", "--seed", "100"]
    line = obedience.main([*few, "--scenes", "world", "--hold-out", "8", "--language", "mixed"])
    assert share(line, "held_out", "all") == [1]


def test_labels_are_graded_by_direction_and_other_classes_refused(benchmark, monkeypatch):
    obedience = benchmark("obedience")
    model = Shapes({})
    model.reader, model.classes = None, list(DIRECTIONS)
    monkeypatch.setattr(obedience.VideoPipeline, "from_pretrained", lambda source, **_: model)
    line = obedience.main(["model", "--count", "8"])
    assert share(line, "labels", "direction", "consistent", "keeps_colour", "all") == [1] * 4
    assert set(line["labels"]["groups"]) == set(DIRECTIONS)
    model.classes = ["cat"]
    with pytest.raises(InputError, match="classes are cat, but only the directions"):
        obedience.main(["model"])


def test_a_run_gives_a_curve_over_its_checkpoints(benchmark, monkeypatch, tmp_path):
    obedience = benchmark("obedience")
    for step in (5, 10, 20):
        (tmp_path / f"checkpoints/step-{step}").mkdir(parents=True)
    metrics = [
        {"step": step, "seconds": 2 * step, "cpu_seconds": step, "loss": 1 / step} for step in (4, 10, 18)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    monkeypatch.setattr(obedience, "list_checkpoints", lambda run: list(run.glob("checkpoints/*")))
    spoilt = {"step-5": recoloured}

    def model(source, **_):
        return Shapes({}, spoilt.get(Path(source).name, lambda scene, seed: scene))

    monkeypatch.setattr(obedience.VideoPipeline, "from_pretrained", model)
    line = obedience.main([str(tmp_path), "--every", "--count", "4"])
    assert [(part["step"], part["train_cpu_seconds"]) for part in line["curve"]] == [
        (5, 4),
        (10, 10),
        (20, 18),
    ]
    assert [share(part, "trained", "colour")[0] for part in line["curve"]] == [0.5, 1, 1]
    assert "held_out" not in line, "nothing was held out"
    with pytest.raises(InputError, match="has no checkpoints"):
        obedience.main([str(tmp_path / "nothing"), "--every"])


class Perfect:
    """Stands for a trained model: draws procedural scenes as they are, 8 frames of 64 x 64, bar what ``spoil(clip, seed)`` does to them."""

    name, weights, sample, classes, reader = "perfect", "none", SampleConfig(), [*DIRECTIONS], None
    model = SimpleNamespace(config=SimpleNamespace(num_frames=8))
    codec = build_codec(CodecConfig(name="pixels"))

    def __init__(self, spoil=lambda clip, seed: clip):
        self.spoil = spoil

    def frame_size(self):
        return 64, 64

    def generate(self, seeds, labels=None, conditioning_frames=None, frames=8, **_):
        for seed in seeds:
            yield seed, self.spoil(render(draw_scene(1000, seed - 1000, frames), frames, 64, 64), seed)


def test_true_clips_are_graded_right_in_every_part(benchmark, capsys, monkeypatch):
    given = benchmark("given")
    monkeypatch.setattr(given, "load", lambda *_: Perfect())
    lines = given.main(["--count", "8", "--seed", "1000", "--strengths", "0", "40"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    assert [(line["given"], line["strength"]) for line in lines] == [
        (g, s) for g in ("first", "both", "middle") for s in (0, 40)
    ]
    for line in lines:
        assert [line[key] for key in ("colour", "shape", "coherent", "all", "direction")] == [1] * 5
        assert (line["worst"], line["psnr"], line["clips"]) == (0, None, 8)
        assert line["step"] == line["step_true"] == pytest.approx(line["step_beside"], rel=0.05)


def other_colour(clip, seed):
    """Every second clip in another colour, but for its first frame."""
    return np.concatenate([clip[:1], clip[1:, ..., ::-1]]) if seed % 2 else clip


def test_clips_that_leave_their_conditioning_frame_are_noticed(benchmark, monkeypatch):
    given = benchmark("given")
    scenes = [draw_scene(1000, index, 8) for index in range(8)]
    turned = sum(
        scene.colour in ("red", "blue", "yellow") for scene in scenes[1::2]
    )  # red and blue change places, yellow turns cyan
    assert turned
    clips = given.procedural(Perfect(), 8, 1000, 8)
    line = given.measure(Perfect(other_colour), clips, "first", 40.0, 1000)
    assert line["colour"] == line["all"] == pytest.approx(1 - turned / 8, abs=1e-3)
    assert (line["shape"], line["direction"], line["worst"]) == (1, 1, 0)
    assert line["step"] > 1.5 * line["step_true"] > line["step_beside"]
    backwards = given.measure(Perfect(lambda clip, seed: clip[::-1]), clips, "both", 40.0, 1000)
    assert (backwards["colour"], backwards["direction"]) == (1, 0)
    assert backwards["worst"] > 100
    assert 5 < backwards["psnr"] < 30


def changed(clip, seed):
    """From the middle on another colour, mirrored left to right."""
    half = len(clip) // 2
    return np.concatenate([clip[:half], clip[half:, :, ::-1, ::-1]])


def test_longer_clips_that_change_are_distinguished_from_those_that_do_not(benchmark):
    longer, clips = (
        benchmark("longer"),
        [render(draw_scene(1000, index, 16), 16, 64, 64) for index in range(8)],
    )
    true = longer.judge(clips, 8, True)
    assert [true[key] for key in ("one_shape", "same_colour", "same_shape", "same", "clips")] == [
        1,
        1,
        1,
        1,
        8,
    ]
    assert true["seam"] < 1.3
    assert [true[key] for key in ("motion", "detail", "contrast")] == [pytest.approx(1, abs=0.05)] * 3
    keeps = [draw_scene(1000, index, 16).colour not in ("red", "blue", "yellow") for index in range(8)]
    other = longer.judge([changed(clip, 0) for clip in clips], 8, True)
    assert other["same_colour"] == other["same"] == pytest.approx(sum(keeps) / 8, abs=1e-3)
    assert sum(keeps) < 8
    assert (other["same_shape"], other["one_shape"]) == (1, 1)
    assert other["seam"] > 2 * true["seam"]
    faded = longer.continuity(np.linspace(1, 0.5, 16)[:, None, None, None] * np.full((16, 8, 8, 3), 200.0), 8)
    assert faded["level"] == pytest.approx(200 * 0.5 * 8 / 15)


@pytest.mark.parametrize("videos", [False, True])
def test_the_benchmarks_of_conditioning_frames_and_longer_clips_run_a_model(
    benchmark, monkeypatch, tmp_path, videos
):
    words = ["--count", "2", *(["--videos", str(write_shapes(tmp_path / "shapes", 2))] if videos else [])]
    given, longer = benchmark("given"), benchmark("longer")
    monkeypatch.setattr(given.VideoPipeline, "from_pretrained", lambda *_, **__: tiny_trained())
    for line in given.main([*words, "--given", "first", "--strengths", "0"]):
        assert (line["worst"], line["psnr"]) == (0, None), "pixels as latents: exact"
        assert ("colour" in line) == (not videos)
    lines = longer.main([*words, "--sheets", str(tmp_path / "sheets")])
    assert [line["method"] for line in lines] == ["real", *longer.METHODS]
    assert all(line["frames"] == 6 and ("same" in line) == (not videos) for line in lines)
    assert len({line["step"] for line in lines}) == len(lines), "each method generates its own clips"
    assert {path.name for path in (tmp_path / "sheets").iterdir()} == {
        f"{line['method']}-6.png" for line in lines
    }


@pytest.mark.usefixtures("time_codecs")
def test_these_benchmarks_count_frames_of_video_where_the_codec_compresses_time(benchmark, monkeypatch):
    """Three latent frames are 9 frames of video, six are 21."""
    given, longer = benchmark("given"), benchmark("longer")
    codec = time_codec()  # 2 x 2 pixels per latent pixel
    channels, size = codec.channels, 16
    small = tiny_trained(latent_channels=channels, latent_size=size, num_frames=3)
    monkeypatch.setattr(given.VideoPipeline, "from_pretrained", lambda *_, **__: replace(small, codec=codec))
    (line,) = given.main(["--count", "1", "--given", "first", "--strengths", "0"])
    assert line["psnr"] is None or line["psnr"] > 40, "a first image is a latent frame of its own"
    lines = longer.main(["--count", "1", "--methods", "plain", "freenoise"])
    assert {(line["frames"], line["window"]) for line in lines} == {(21, 9)}


def test_a_disturbed_machine_gives_no_number(benchmark, capsys, monkeypatch):
    monkeypatch.setattr(timing, "other_load", lambda *_: 0.5)
    with pytest.raises(SystemExit) as stopped:
        benchmark("forward").main([*TINY, *MODEL, "--max-other-load", "0.4"])
    assert "0 clean rounds" in str(stopped.value)
    assert capsys.readouterr().out == ""


def test_rounds_compare_like_with_like(benchmark):
    measure = benchmark("measure")
    times = measure.Times({"a": [2.0, 4.0, 60.0], "b": [1.0, 2.0, 30.0]})
    assert times.ratio("a", "b") == 2.0  # a machine that slowed down mid-way changes both


def test_others_share_of_the_machine(benchmark, monkeypatch):
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    assert (
        timing.other_load((10.0, 1.0), (14.0, 4.0), wall=2.0) == 0.25
    )  # 4 busy seconds, 3 of them ours, of 4
    assert timing.other_load((0.0, 0.0), (0.0, 1.0), wall=1.0) == 0.0


@pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install 'latte-video[bits8]')"
)
def test_int8_is_measured_against_float32(benchmark):
    line = benchmark("int8").main(["--width", "128", "--layers", "2", "--prompts", "2", "--tokens", "5"])
    assert line["float32_bytes"] == 4 * line["parameters"]
    assert line["bfloat16"]["bytes"] == 2 * line["parameters"]
    assert line["bits8"]["bytes"] < line["float32_bytes"]
    assert 0.001 < line["bits8"]["relative_error"] < 0.1
    assert 0.001 < line["bfloat16"]["relative_error"] < 0.1


def test_the_step_cache_is_compared_with_as_many_plain_steps(benchmark, capsys):
    words = ["builtin-shapes", "--count", "2", "--steps", "8", "--thresholds", "0.000001", "0.5"]
    line = benchmark("step_cache").main(words)
    assert json.loads(capsys.readouterr().out) == line
    never, often = line["cached"]
    assert (never["evaluations"], never["plain_steps"], never["psnr"]) == (8, 8, None)
    assert often["evaluations"] < 8
    assert often["plain_steps"] == round(often["evaluations"])
    assert often["times_fewer"] == pytest.approx(8 / often["evaluations"])
    assert 5 < often["psnr"] < 60


def test_more_steps_of_a_solver_are_nearer_to_the_limit(benchmark, capsys):
    line = benchmark("solver_distance").main(["--count", "1", "--limit", "24", "--steps", "2", "8"])
    assert json.loads(capsys.readouterr().out) == line
    assert {"euler", "dpmpp", "unipc --order 3"} <= set(line["distances"])
    assert all(few > many > 0 for few, many in line["distances"].values())


def test_ways_of_sampling_are_compared_and_their_clips_kept(benchmark, capsys, tmp_path):
    words = ["--ways", "dpmpp:4", "unipc:2:1", "--count", "4", "--real", "8", "--seeds", "0", "1"]
    line = benchmark("sample_quality").main([*words, "--keep", str(tmp_path)])
    assert json.loads(capsys.readouterr().out) == line
    few = line["ways"]["unipc:2:1"]
    assert (line["ways"]["dpmpp:4"]["evaluations"], few["evaluations"], few["times_fewer"]) == (8, 2, 4)
    assert few["distance_range"][0] <= few["distance"] <= few["distance_range"][1]
    assert few["distance_ratio"] == pytest.approx(few["distance"] / line["ways"]["dpmpp:4"]["distance"])
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(kept) == 4, "two ways, two seeds"
    again = benchmark("sample_quality").main([*words, "--keep", str(tmp_path)])
    assert again == line
    assert kept == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


@pytest.mark.nightly
def test_start_up_is_compared_with_the_import_of_torch(benchmark, capsys):
    line = benchmark("start_up").main(["--rounds", "1", "--commands", "config show"])
    assert json.loads(capsys.readouterr().out) == line
    assert line["import_torch_seconds"] > 0
    assert 0 < line["processor"]["config show"] < 1, "settings must not import torch"


def test_the_cost_of_watching_is_a_share_of_the_run(benchmark, capsys):
    pytest.importorskip("tensorboard")
    words = ["train.steps=4", "train.log_every=1", "train.global_batch=2", "model.depth=2", "model.width=16"]
    line = benchmark("watching").main(["shapes-tiny", *words, "--report-steps", "500", "--clip-bytes", "10"])
    assert json.loads(capsys.readouterr().out) == line
    assert set(line["shares"]) == {"off", "tensorboard", "report"}
    assert all(0 < share < 1 for share in line["shares"].values())
    assert 0 < line["report"]["mb"] < 1
