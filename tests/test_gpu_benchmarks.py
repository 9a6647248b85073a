# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmarks: their smoke runs on a CPU, their checks, and what the driver does with its time."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
EXPECTED = {
    "forward": ["G1 forward, batch 1", "G1 forward, batch 8"],
    "train": ["G4 losses", "G4 training step", "G4 training against released", "G5 clips in one step"],
    "clip": [
        "G2 clip, released loop",
        "G2 clip, DDPM",
        "G2 clip, 50 steps",
        "G2 clip, 20 steps",
        "G2 clip, own against released",
        "G3 text clip, 50 steps",
        "G3 text clip, 50 steps, cache",
        "G3 text clip, 20 steps",
    ],
    "score": [
        "G6 features and statistics",
        "G6 score of 2048 clips",
        "G7 decode 16 frames of 256",
        "G7 decode 16 frames of 512",
    ],
    "start": ["G8 first step, cold", "G8 first step, warm"],
}


@pytest.fixture
def module(monkeypatch):
    """``module(name)`` imports a file of the folder."""
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in [
        name for name, found in sys.modules.items() if str(FOLDER.parent) in str(vars(found).get("__file__"))
    ]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    ["forward", *(pytest.param(name, marks=pytest.mark.nightly) for name in EXPECTED if name != "forward")],
)
def test_the_smoke_run_of_a_script_answers_its_goals(name, tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--smoke", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-1000:]
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["what"] for line in lines] == EXPECTED[name]
    assert done.stdout.splitlines() == out.read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert line["smoke"]
        assert line.get("verdict", "smoke") == "smoke"


def test_every_goal_is_answered_by_a_script_and_has_its_field(module):
    goals = module("goals").GOALS
    answered = {what for whats in EXPECTED.values() for what in whats}
    assert {what for what in goals if "fp8" not in what} <= answered
    assert set(EXPECTED) == set(module("run").SCRIPTS)
    assert all((FOLDER / f"{name}.py").exists() for name in EXPECTED)


def test_verdicts(module):
    verdict = module("goals").verdict
    assert verdict("G7 decode 16 frames of 256", {"decode_s": 0.02}, "NVIDIA H200", False).startswith(
        "reached"
    )
    assert verdict("G7 decode 16 frames of 256", {"decode_s": 0.04}, "NVIDIA H200", False).startswith(
        "missed"
    )
    assert "H200" in verdict("G7 decode 16 frames of 256", {"decode_s": 0.02}, "NVIDIA H100", False)
    assert verdict("G2 clip, own against released", {"ratio": 30}, "NVIDIA H100", False).startswith("reached")
    assert verdict("G2 clip, own against released", {"ratio": 20}, "NVIDIA H100", False).startswith("missed")
    assert verdict("G2 clip, own against released", {"ratio": 30}, "any", True) == "smoke"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_script_says_so(module):
    with pytest.raises(SystemExit, match="needs a CUDA device; --smoke"):
        module("goals").Run("about", [])


def test_a_wrong_result_ends_a_script(module, tmp_path):
    run = module("goals").Run("about", ["--smoke", "--out", str(tmp_path / "out")])
    exact = torch.ones(4)
    assert run.close("a", exact * 1.01, exact, 0.02) == pytest.approx(0.01, rel=1e-2)
    for wrong in (exact * 1.03, exact * float("nan")):
        with pytest.raises(SystemExit, match="relative RMS distance"):
            run.close("a", wrong, exact, 0.02)


def driver(module, monkeypatch, tmp_path, scripts):
    """Return run.main over little scripts, name -> (seconds allowed, Python code)."""
    run = module("run")
    for name, (_, code) in scripts.items():
        (tmp_path / f"{name}.py").write_text(
            "import sys, json, pathlib\nout = pathlib.Path(sys.argv[2])\n" + code, encoding="utf-8"
        )
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "SCRIPTS", {name: seconds for name, (seconds, _) in scripts.items()})
    monkeypatch.setenv("OUT", str(tmp_path))
    return run.main


SAVE = "out.open('a').write(json.dumps({'what': 'x', 'verdict': 'reached'}) + chr(10))\n"


def test_the_driver_resumes_and_leaves_for_later_what_does_not_fit(module, monkeypatch, tmp_path, capsys):
    main = driver(module, monkeypatch, tmp_path, {"a": (5, SAVE), "b": (1000, SAVE)})
    with pytest.raises(SystemExit) as left:
        main(["--limit", "60", "--only", "a", "b"])
    assert left.value.code == 3
    assert "b waits" in capsys.readouterr().err
    assert (tmp_path / "gpu-done.txt").read_text(encoding="utf-8").split() == ["a"]
    main(["--limit", "2000", "--only", "a", "b"])
    assert (tmp_path / "gpu-done.txt").read_text(encoding="utf-8").split() == ["a", "b"]
    assert len((tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()) == 2, "a ran once"


def test_the_driver_reads_what_an_earlier_machine_has_done(module, monkeypatch, tmp_path):
    main = driver(module, monkeypatch, tmp_path, {"a": (5, "sys.exit(1)"), "b": (5, SAVE)})
    earlier = tmp_path / "earlier.txt"
    earlier.write_text("a\n", encoding="utf-8")
    main(["--done", str(earlier), "--only", "a", "b"])
    assert (tmp_path / "gpu-done.txt").read_text(encoding="utf-8").split() == ["a", "b"]


def test_a_script_that_fails_does_not_stop_the_others(module, monkeypatch, tmp_path, capsys):
    main = driver(module, monkeypatch, tmp_path, {"a": (5, "sys.exit('wrong')"), "b": (5, SAVE)})
    with pytest.raises(SystemExit) as left:
        main(["--only", "a", "b"])
    assert left.value.code == 1
    assert (tmp_path / "gpu-done.txt").read_text(encoding="utf-8").split() == ["b"]
    assert "x: reached" in capsys.readouterr().err
