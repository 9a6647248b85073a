# SPDX-License-Identifier: Apache-2.0
"""``latte evaluate``: its JSON, its refusals in one line with exit 2, replay, comparison, a model as FAKE."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import tiny_detector
from latte.data.media import probe, write_mp4
from latte.data.procedural import draw_scene, render
from latte.evaluation import features as feature_files
from latte.evaluation import protocols
from latte.evaluation import report as page
from latte.evaluation.detector_files import file_sha256
from latte.evaluation.detectors import DETECTORS
from latte.evaluation.frechet import frechet_distance
from tiny_detector import TINY, render_clip, write_side

TINY3 = replace(TINY, name="tiny3", frames=3)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The tiny protocols and their detector, known by name; small pictures on the page."""
    monkeypatch.setattr(page, "PIXELS", 16)
    monkeypatch.setitem(DETECTORS, "tiny", tiny_detector.SPEC)
    for protocol in (TINY, TINY3):
        monkeypatch.setitem(protocols.PROTOCOLS, protocol.name, protocol)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    write_side(root / "real", range(7))
    write_side(root / "fake", range(50, 57))
    return root


@pytest.fixture
def sides(made, tmp_path):
    """Fresh copies of real/ and fake/ in the working folder."""
    for side in ("real", "fake"):
        shutil.copytree(made / side, tmp_path / side)
    return tmp_path


def test_a_score_with_its_manifest_and_again_from_it(latte, sides):
    first = latte("evaluate", "real", "fake", "--protocol", "tiny", "--device", "cpu", "--json")
    assert first.code == 0, first.err
    found = first.json
    assert {"protocol", "metric", "value", "interval", "floor", "manifest", "manifest_hash", "report"} <= set(
        found
    )
    assert Path(found["manifest"]).parent == Path("evaluations/fake-tiny")
    again = latte("evaluate", "--from-manifest", found["manifest"], "--out", "again", "--json").json
    assert (again["value"], again["manifest_hash"], again["replayed"]) == (
        found["value"],
        found["manifest_hash"],
        "exact",
    )
    both = latte("evaluate", "real", "fake", "--protocol", "tiny", "--compare", found["manifest"])
    assert both.code == 0, both.err
    assert f"fvd (tiny, manifest {found['manifest_hash']})" in both.out
    assert "difference +0, intervals overlap" in both.out

    other = latte("evaluate", "real", "fake", "--protocol", "tiny3", "--compare", found["manifest"])
    assert other.code == 2
    assert len(other.errors) == 1
    assert "preset.name is 'tiny3'" in other.errors[0]
    write_mp4(sides / "real" / "03.mp4", render_clip(999), 8)
    changed = latte("evaluate", "--from-manifest", found["manifest"], "--out", "third")
    assert changed.code == 2
    assert "not those of the manifest" in changed.errors[0]


def other_rate(root):
    for path in (root / "fake").iterdir():
        path.unlink()
    write_side(root / "fake", range(50, 57), fps=25)


REFUSALS = {
    "too few": (
        lambda root: [(root / "fake" / f"0{i}.mp4").unlink() for i in range(3)],
        "takes 6 clips of each side",
    ),
    "duplicate": (
        lambda root: shutil.copy(root / "fake" / "00.mp4", root / "fake" / "copy.mp4"),
        "have the same content",
    ),
    "overlap": (
        lambda root: shutil.copy(root / "real" / "00.mp4", root / "fake" / "taken.mp4"),
        "overlap in 1 videos",
    ),
    "short fake": (
        lambda root: write_mp4(root / "fake" / "short.mp4", render_clip(70, 3), 8),
        "has 3 frames, 4 are needed",
    ),
    "broken fake": (
        lambda root: (root / "fake" / "bad.mp4").write_bytes(b"nothing"),
        "cannot be read, first 'bad.mp4'",
    ),
    "mixed rates": (other_rate, "frame rates differ: real 8 and fake 25"),
    "no folder": (lambda root: shutil.rmtree(root / "real"), "REAL is 'real', but there is no such folder"),
    "empty folder": (
        lambda root: (shutil.rmtree(root / "real"), (root / "real").mkdir()),
        "it holds no video",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_sides_are_refused_in_one_line(latte, sides, name):
    change, message = REFUSALS[name]
    change(sides)
    found = latte("evaluate", "real", "fake", "--protocol", "tiny", "--out", "out")
    assert found.code == 2
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert not (sides / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["real", "fake", "--protocol", "tinny"], "did you mean 'tiny'"),
        (["real"], "REAL or FAKE is missing"),
        (["real", "fake", "--processes", 0], "--processes must be at least 1, got 0"),
        (["real", "fake", "--group", 0], "--group must be at least 1, got 0"),
        (["real", "fake", "--clips", 1], "--clips must be at least 2 for a covariance, got 1"),
        (["real", "fake", "--until", "plans"], "did you mean 'plan'"),
        (["real", "fake", "--compare", "none.json"], "not a manifest of latte evaluate"),
        (["builtin", "fake"], "REAL is 'builtin', which is a model"),
    ],
)
def test_bad_words_are_refused_in_one_line(latte, sides, words, message):
    found = latte("evaluate", *words, *([] if "--protocol" in words else ["--protocol", "tiny"]))
    assert found.code == 2
    assert message in found.errors[0]


def write_shapes(folder, count, frames, side):
    for index in range(count):
        write_mp4(folder / f"{index:02d}.mp4", render(draw_scene(11, index, frames), frames, side, side), 8)
    return folder


def test_a_run_folder_is_sampled_and_scored(latte, run_folder, sides):
    shutil.copytree(run_folder, sides / "run")
    write_shapes(sides / "shapes", 6, 3, 16)
    words = ["shapes", "run", "--protocol", "tiny3", "--sample-seed", 40, "--device", "cpu", "--json"]
    first = latte("evaluate", *words, "--out", "out")
    assert first.code == 0, first.err
    clips = sorted((sides / "out" / "samples").glob("*.mp4"))
    assert [clip.name.split("-")[1] for clip in clips] == [f"{seed:04d}" for seed in range(40, 46)]
    assert probe(clips[0]).fps == 8  # the real side's
    made = json.loads((sides / "out" / "manifest.json").read_text())["manifest"]["generation"]
    assert (made["step"], made["weights"], made["class_rule"], made["sampling_seed"]) == (
        2,
        "EMA",
        "classes in turn",
        40,
    )
    assert made["checkpoint_sha256"]
    assert made["steps"] == 3
    again = latte("evaluate", "--from-manifest", first.json["manifest"], "--out", "again", "--json")
    assert again.code == 0, again.err
    assert (again.json["replayed"], again.json["manifest_hash"]) == ("exact", first.json["manifest_hash"])
    assert (sides / "again" / "samples" / clips[0].name).read_bytes() == clips[0].read_bytes()
    step = latte("evaluate", "shapes", "run/checkpoints/step-2", *words[2:], "--out", "step")
    assert step.json["value"] == first.json["value"]


def test_the_builtin_model_is_scored_by_the_builtin_detector(latte, sides, monkeypatch):
    write_shapes(sides / "shapes", 2, 8, 64)
    monkeypatch.setitem(
        protocols.PROTOCOLS, "two", replace(protocols.PROTOCOLS["builtin"], name="two", frames=8, clips=2)
    )
    found = latte("evaluate", "shapes", "builtin-shapes", "--protocol", "two", "--device", "cpu", "--json")
    assert found.code == 0, found.err
    assert found.json["value"] > 0
    assert Path(found.json["manifest"]).parent == Path("evaluations/builtin-shapes-two")
    assert sorted(
        path.name[:9] for path in (sides / "evaluations/builtin-shapes-two/samples").glob("*.mp4")
    ) == ["seed-0000", "seed-0001"]
    replay = json.loads(Path(found.json["manifest"]).read_text())["replay"]
    assert (replay["model"], replay["sample_seed"]) == ("builtin-shapes", 0)


def features(seed, rows=60, shift=0.0):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def write_features(root):
    """The same two tables in every kind of file: name -> (real, fake)."""
    found = {}
    for side, table in (("real", features(1)), ("fake", features(2, 50, shift=3.0))):
        np.save(root / f"{side}.npy", table.numpy())
        np.savez(root / f"{side}.npz", features=table.numpy(), labels=np.zeros((len(table), 2)))
        torch.save(table, root / f"{side}.pt")
        torch.save({"names": ["a"], "epoch": torch.ones(3), "nested": {"x": table}}, root / f"{side}2.pt")
        safetensors.torch.save_file({"features": table}, root / f"{side}.safetensors")
    for name in ("{}.npy", "{}.npz", "{}.pt", "{}2.pt", "{}.safetensors"):
        found[name] = (name.format("real"), name.format("fake"))
    return found


def test_features_made_elsewhere_are_scored_under_their_own_protocol(latte, sides):
    values = []
    for names in write_features(sides).values():
        found = latte("evaluate", *names, "--protocol", "external", "--out", f"out-{names[0]}", "--json")
        assert found.code == 0, found.err
        values.append(found.json["values"])
        assert (found.json["protocol"], found.json["metric"], found.json["clips"]) == (
            "external",
            "frechet",
            {"real": 60, "fake": 50},
        )
        record = json.loads(Path(found.json["manifest"]).read_text())
        assert record["sides"]["fake"]["sha256"] == file_sha256(sides / names[1])
        assert names[1] in Path(found.json["report"]).read_text()
    assert all(value == values[0] for value in values)
    assert values[0]["frechet"] == pytest.approx(frechet_distance(features(1), features(2, 50, shift=3.0)))
    assert values[0]["precision"] < 0.5
    shown = latte("evaluate", "real.npy", "fake.npy", "--protocol", "external")
    assert "frechet (external, manifest" in shown.out


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def spoil(root):
    write_features(root)
    np.save(root / "objects.npy", np.array([Harmful(), 1], dtype=object), allow_pickle=True)
    torch.save({"x": Harmful()}, root / "harmful.pt")
    np.savez(root / "two.npz", a=np.zeros((9, 2)), b=np.zeros((9, 2)))
    np.save(root / "nan.npy", np.full((9, 5), np.nan))
    np.save(root / "copy.npy", features(1).numpy())
    np.save(root / "wide.npy", np.random.RandomState(0).randn(9, 6))
    np.save(root / "short.npy", np.zeros((3, 5)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["real.npy", "objects.npy"], "nothing in it was run"),
        (["real.npy", "harmful.pt"], "nothing in it was run"),
        (["real.npy", "two.npz"], "holds 2 floating-point tables"),
        (["real.npy", "nan.npy"], "NaN or Inf in row 0"),
        (["real.npy", "copy.npy"], "the same content"),
        (["real.npy", "wide.npy"], "real has 5 features per row and fake 6"),
        (["real.npy", "short.npy"], "at least 8 rows"),
        (["real.npy", "none.npy"], "does not exist"),
        (["real.npy", "fake"], "not real.npy and fake"),
        (["real", "fake"], "not real and fake"),
        (["real.npy", "fake.npy", "--clips", 4], "--clips is about videos"),
        (["real.npy", "fake.npy", "--protocol", "clean"], "give --protocol external"),
    ],
)
def test_bad_features_are_refused_in_one_line(latte, sides, words, message):
    spoil(sides)
    found = latte("evaluate", *words, *([] if "--protocol" in words else ["--protocol", "external"]))
    assert found.code == 2, found.out
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert not (sides / "touched").exists()
    assert not list(sides.rglob("external.json"))


def test_rows_that_occur_twice_are_counted(latte, sides):
    np.save(sides / "real.npy", features(1).numpy())
    np.save(sides / "twice.npy", torch.cat([features(2), features(2)[:7]]).numpy())
    found = latte("evaluate", "real.npy", "twice.npy", "--protocol", "external", "--json")
    assert [found.json["sides"][side]["repeated"] for side in ("real", "fake")] == [0, 7]


def test_an_unknown_weight_file_is_refused(latte, sides):
    (sides / "i3d.pt").write_bytes(b"not these weights")
    (sides / "real" / "bad.mp4").write_bytes(b"nothing")
    words = ["real", "fake", "--protocol", "clean", "--clips", 6, "--detector", "i3d.pt"]
    for side in ("real", "fake"):
        shutil.rmtree(sides / side)
        write_side(sides / side, range(6) if side == "real" else range(50, 56), frames=16)
    found = latte("evaluate", *words)
    assert found.code == 2
    assert len(found.errors) == 1
    assert "SHA-256" in found.errors[0] or "sha256" in found.errors[0]


def test_what_was_asked_for_is_allowed_under_another_name(latte, sides):
    other_rate(sides)
    (sides / "real" / "06.mp4").unlink()
    (sides / "real" / "05.mp4").write_bytes(b"nothing")
    found = latte(
        "evaluate",
        "real",
        "fake",
        "--protocol",
        "tiny",
        "--allow-fewer",
        "--allow-mixed",
        "--out",
        "out",
        "--json",
    )
    assert found.code == 0, found.err
    assert (found.json["protocol"], found.json["clips"]) == ("tiny-nonstandard", {"real": 5, "fake": 5})
    assert "left out: real 05.mp4" in found.err
    manifest = json.loads((sides / "out" / "manifest.json").read_text())["manifest"]
    assert [bad["id"] for bad in manifest["data"]["dropped"]["real"]] == ["05.mp4"]
    assert manifest["pixels"]["codec"] == {
        side: {"codec": {"h264": n}, "fps": {fps: n}}
        for side, n, fps in (("real", 5, "8"), ("fake", 7, "25"))
    }


def test_stages_alone(latte, sides):
    planned = latte(
        "evaluate", "real", "fake", "--protocol", "tiny", "--out", "out", "--until", "plan", "--json"
    ).json
    assert sorted(path.name for path in (sides / "out").iterdir()) == ["clips.jsonl", "dropped.jsonl"]
    scored = latte("evaluate", "real", "fake", "--protocol", "tiny", "--out", "out", "--json").json
    assert planned["plan_sha256"] == scored["plan_sha256"]


def test_a_model_is_sampled_resumed_and_scored(latte, sides, run_folder):
    words = [
        "evaluate",
        "real",
        run_folder,
        "--protocol",
        "tiny3",
        "--out",
        "out",
        "--device",
        "cpu",
        "--sample-seed",
        3,
        "--allow-mixed",  # the frames are smaller
        "--json",
    ]
    first = latte(*words)
    assert first.code == 0, first.err
    clips = sorted((sides / "out" / "samples").glob("seed-*.mp4"))
    labels = ["0-up", "1-down", "2-left", "3-right", "0-up", "1-down"]
    assert [path.name for path in clips] == [
        f"seed-{seed:04d}-{label}.mp4" for seed, label in enumerate(labels, start=3)
    ]
    stamps = [path.stat().st_mtime_ns for path in clips[1:]]
    clips[0].unlink()
    again = latte(*words)
    assert again.json["value"] == first.json["value"]
    assert [path.stat().st_mtime_ns for path in clips[1:]] == stamps
    made = json.loads((sides / "out" / "manifest.json").read_text())["manifest"]["generation"]
    assert (made["class_rule"], made["sampling_seed"], made["weights"], made["step"], made["steps"]) == (
        "classes in turn",
        3,
        "EMA",
        2,
        3,
    )
    replayed = latte("evaluate", "--from-manifest", "out/manifest.json", "--out", "elsewhere", "--json")
    assert replayed.code == 0, replayed.err
    assert (replayed.json["replayed"], replayed.json["value"]) == ("exact", first.json["value"])


MODEL_REFUSALS = {  # clips of REAL, frames, their size; options; what is known before a clip is generated
    "too few real clips": (4, 3, 16, ["--protocol", "tiny3"], "tiny3 takes 6 clips of each side, but real"),
    "other frame size": (6, 3, 32, ["--protocol", "tiny3"], "frame sizes differ: real 32x32 and fake 16x16"),
    "clips too short": (6, 4, 16, ["--protocol", "tiny"], "'generated 0' has 3 frames, 4 are needed"),
    "no detector file": (
        6,
        16,
        16,
        ["--protocol", "long", "--clips", 6],
        "detector 'i3d' needs i3d_torchscript.pt",
    ),
}


@pytest.mark.parametrize("name", MODEL_REFUSALS)
def test_a_model_generates_nothing_before_all_else_is_checked(latte, sides, run_folder, monkeypatch, name):
    count, frames, size, words, message = MODEL_REFUSALS[name]
    monkeypatch.setenv("LATTE_DETECTOR_DIR", str(sides / "detectors"))
    monkeypatch.setitem(
        protocols.PROTOCOLS, "long", replace(TINY3, name="long", detector="i3d", layer="logits")
    )
    write_shapes(sides / "shapes", count, frames, size)
    found = latte("evaluate", "shapes", run_folder, *words, "--device", "cpu", "--out", "out")
    assert found.code == 2
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert not (sides / "out" / "samples").exists()


def test_a_short_model_is_pointed_to_protocols_that_fit(latte, sides, run_folder):
    write_shapes(sides / "shapes", 6, 4, 16)
    found = latte("evaluate", "shapes", run_folder, "--protocol", "tiny", "--device", "cpu")
    assert "protocols for 3 frames: tiny3" in found.errors[0]


def test_a_full_disk_is_noticed_before_clips_are_generated(latte, sides, run_folder, monkeypatch):
    usage = shutil.disk_usage(sides)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    write_shapes(sides / "shapes", 6, 3, 16)
    found = latte("evaluate", "shapes", run_folder, "--protocol", "tiny3", "--device", "cpu", "--out", "out")
    assert found.code == 1
    assert "6 generated clips need about" in found.errors[0]
    assert not (sides / "out" / "samples").exists()


def test_generation_reports_the_time_left(latte, sides, run_folder, monkeypatch):
    monkeypatch.setattr(feature_files, "REPORT_SECONDS", 0.0)
    write_shapes(sides / "shapes", 6, 3, 16)
    found = latte("evaluate", "shapes", run_folder, "--protocol", "tiny3", "--device", "cpu", "--out", "out")
    assert found.code == 0, found.err
    assert "generate: 6 clips of" in found.err
    steps = re.findall(r"generate: (\d+) of (\d+) steps, [\d.e+]+ clips/s, about [\w ]+ left", found.err)
    assert len(steps) >= 6
    assert steps[-1][0] == steps[-1][1]
    assert re.search(r"extract: 2 of 2 parts", found.err)


def test_allow_fewer_generates_as_many_clips_as_there_are_real_ones(latte, sides, run_folder):
    write_shapes(sides / "shapes", 4, 3, 16)
    words = ["shapes", run_folder, "--protocol", "tiny3", "--allow-fewer", "--device", "cpu", "--json"]
    first = latte("evaluate", *words, "--out", "out")
    assert first.json["clips"] == {"real": 4, "fake": 4}
    assert len(list((sides / "out" / "samples").glob("*.mp4"))) == 4
    again = latte("evaluate", "--from-manifest", "out/manifest.json", "--out", "again", "--json")
    assert (again.json["replayed"], again.json["value"]) == ("exact", first.json["value"])


def save_statistics(path, table, **more):
    table = table.numpy()
    np.savez(path, mu=table.mean(0), sigma=np.cov(table, rowvar=False), **more)


def test_statistics_are_used_as_statistics(latte, sides):
    real, fake = features(1), features(2, 50, shift=3.0)
    np.save(sides / "real.npy", real.numpy())
    np.save(sides / "fake.npy", fake.numpy())
    save_statistics(sides / "real.npz", real)
    save_statistics(sides / "fake.npz", fake)
    expected = frechet_distance(real, fake)
    for names in (("real.npz", "fake.npz"), ("real.npy", "fake.npz"), ("real.npz", "fake.npy")):
        found = latte("evaluate", *names, "--protocol", "external", "--out", "out", "--json")
        assert found.code == 0, found.err
        assert found.json["value"] == pytest.approx(expected, rel=1e-9), names
        assert list(found.json["values"]) == ["frechet"]
        assert (found.json["interval"], found.json["floor"]) == (None, None)
        assert "no interval, no floor" in found.json["warnings"][0]
        rows = {
            "real": 60 if names[0] == "real.npy" else None,
            "fake": 50 if names[1] == "fake.npy" else None,
        }
        assert found.json["clips"] == rows
    shown = latte("evaluate", "real.npz", "fake.npz", "--protocol", "external", "--out", "out").out
    assert "warning: statistics do not include the rows" in shown


STATISTICS = {  # what REAL holds, of a mean and a covariance; the reason
    "a lone covariance": (lambda mu, sigma: {"sigma": sigma}, "looks like a covariance"),
    "wrong shapes": (lambda mu, sigma: {"mu": mu[:3], "sigma": sigma}, "expected (k,)"),
    "not symmetric": (lambda mu, sigma: {"mu": mu, "sigma": np.triu(sigma)}, "a sigma that is not symmetric"),
    "not positive": (lambda mu, sigma: {"mu": mu, "sigma": -sigma}, "the eigenvalue"),
    "not finite": (lambda mu, sigma: {"mu": mu * np.inf, "sigma": sigma}, "NaN or Inf in mu or sigma"),
    "features, too": (
        lambda mu, sigma: {"mu": mu, "sigma": sigma, "features": np.zeros((9, 5))},
        "real.npz is ambiguous: it holds the statistics mu and sigma and also features",
    ),
    "other names": (lambda mu, sigma: {"mean": mu, "cov": sigma}, "looks like a covariance"),
    "another width": (
        lambda mu, sigma: {"mu": mu[:4], "sigma": sigma[:4, :4]},
        "real has 4 features per row",
    ),
}


@pytest.mark.parametrize("name", STATISTICS)
def test_bad_or_ambiguous_statistics_are_refused_in_one_line(latte, sides, name):
    arrays, message = STATISTICS[name]
    table = features(1).numpy()
    np.savez(sides / "real.npz", **arrays(table.mean(0), np.cov(table, rowvar=False)))
    save_statistics(sides / "fake.npz", features(2))
    found = latte("evaluate", "real.npz", "fake.npz", "--protocol", "external")
    assert found.code == 2, found.out
    assert len(found.errors) == 1
    assert message in found.errors[0]
    assert not list(sides.rglob("external.json"))


def test_two_clips_a_side_are_scored_with_a_warning(latte, sides):
    words = ["evaluate", "real", "fake", "--protocol", "tiny", "--out", "out"]
    found = latte(*words, "--clips", 2, "--json")
    assert found.code == 0, found.err
    assert found.json["floor"] is None
    assert "2 real and 2 fake rows are too few for an interval or a floor" in found.json["warnings"][0]
    assert "warning: 2 real and 2 fake rows are too few" in found.err
    assert "are too few for an interval" in (sides / "out" / "report.html").read_text()
    assert "warning: 2 real" in latte(*words, "--clips", 2).out


def test_allow_fewer_is_not_suggested_when_it_was_given(latte, sides):
    for path in sorted((sides / "fake").iterdir())[1:]:
        path.unlink()
    found = latte("evaluate", "real", "fake", "--protocol", "tiny", "--allow-fewer")
    assert found.code == 2
    assert "--allow-fewer" not in found.errors[0]
    assert "at least 2 of each side" in found.errors[0]


def other_size(root):
    for path in (root / "fake").iterdir():
        path.unlink()
    for index in range(7):
        write_mp4(root / "fake" / f"{index:02d}.mp4", render_clip(50 + index, size=48), 8)


def test_sides_of_other_frame_sizes_are_refused_unless_allowed(latte, sides):
    other_size(sides)
    words = ["evaluate", "real", "fake", "--protocol", "tiny", "--out", "out"]
    found = latte(*words)
    assert found.code == 2
    assert "frame sizes differ: real 24x24 and fake 48x48" in found.errors[0]
    assert latte(*words, "--allow-mixed").code == 0
    manifest = json.loads((sides / "out" / "manifest.json").read_text())["manifest"]
    assert manifest["pixels"]["frame_size"] == {"real": {"24x24": 7}, "fake": {"48x48": 7}}
    report = (sides / "out" / "report.html").read_text()
    assert "48x48 (7)" in report


@pytest.mark.parametrize("name", [b"caf\xe9.mp4", b"a\x1b[31m.mp4", b"two\nlines.mp4", "б«>&.mp4".encode()])
def test_any_file_name_can_be_scored_reported_and_left_out(latte, sides, name):
    folder = os.fsencode(sides / "real")
    os.rename(folder + b"/00.mp4", folder + b"/" + name)
    with open(folder + b"/broken-" + name, "wb") as file:
        file.write(b"nothing")
    utf8 = b"\xe9" not in name  # other names are skipped by the scan
    words = ["evaluate", "real", "fake", "--protocol", "tiny", "--clips", 6 + utf8, "--out", "out"]
    found = latte(*words)
    assert found.code == 0, found.err
    assert "left out: real broken-" in found.err
    assert found.err.count("left out") == 1 + (not utf8)
    assert "\x1b" not in found.err + found.out
    report = (sides / "out" / "report.html").read_text("utf-8")
    assert "\x1b" not in report
    again = latte("evaluate", "--from-manifest", "out/manifest.json", "--out", "again", "--json")
    assert again.json["replayed"] == "exact"
