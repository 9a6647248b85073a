# SPDX-License-Identifier: Apache-2.0
"""``latte ablate``: the keys of its answer, its help, its refusals, and resuming after a signal."""

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from latte.ablate import sweep
from latte.ablate.axes import AXES
from latte.config.run import recipes
from tiny import WORDS

SMALL = [
    *WORDS,
    "data.frames=4",
    "--seeds",
    "0,1",
    "--steps",
    2,
    "--points",
    1,
    "--generated",
    2,
    "--heldout",
    2,
]


def test_ablate_answers_with_its_keys_and_leaves_results_and_a_report(latte):
    found = latte("ablate", "shapes", "--axes", "temporal_position,conditioning", *SMALL, "--json")
    assert found.code == 0
    assert found.json["out"] == "runs/shapes-ablation"
    settings = found.json["settings"]
    assert settings == found.json["arms"], "the key of 0.1.0"
    keys = {
        "name",
        "axis",
        "seeds",
        "heldout_loss",
        "label_accuracy",
        "score",
        "parameters",
        "operations",
        "seconds",
    }
    assert all(keys <= setting.keys() for setting in settings)
    assert [(setting["axis"], setting["name"], setting["seeds"]) for setting in settings] == [
        ("temporal_position", "absolute", [0, 1]),
        ("temporal_position", "rotary", [0, 1]),
        ("conditioning", "s_adaln", [0, 1]),
        ("conditioning", "all_tokens", [0, 1]),
    ]
    assert settings[0]["run"] == settings[2]["run"] == "runs/shapes-ablation/baseline", "shared"
    lines = [json.loads(line) for line in Path("runs/shapes-ablation/results.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 2
    assert all(line["step"] == 2 and 0 < line["heldout_loss"] < 10 for line in lines)
    assert all(0 <= line["label_accuracy"] <= 1 and line["score"] > 0 for line in lines)
    page = Path(found.json["report"]).read_text()
    assert "latte ablate shapes --axes=temporal_position,conditioning --seeds=0,1" in page
    config = yaml.safe_load(
        Path("runs/shapes-ablation/conditioning-all_tokens/seed-1/config.yaml").read_text()
    )
    assert (config["model"]["conditioning"], config["run"]["seed"], config["train"]["steps"]) == (
        "all_tokens",
        1,
        2,
    )


def test_the_help_names_every_axis(latte):
    words = latte("ablate", "--help").out.replace("│", " ").split()
    assert set(AXES) <= {word.strip(",.") for word in words}


def test_the_small_recipe_that_the_help_names_exists():
    assert "shapes-tiny" in recipes()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--axes", "variants"], "did you mean 'variant'"),
        (["--axes", ""], "--axes"),
        (["--axes", "interval"], "data.kind"),
        (["--axes", "init"], "--dit"),
        (["--axes", "patch", "model.num_classes=null", "text.name=builtin"], "text.name"),
        (["--axes", "patch", "--seeds", "a"], "--seeds"),
        (["--axes", "patch", "--out", ""], "--out is empty"),
        (["--axes", "patch", "--out="], "--out is empty"),
        (["--axes", "patch", "--out", "/dev/null"], "is not a folder"),
        (["--axes", "patch", "--graded", "2"], "--graded is now called --generated"),
        (["--axes", "patch", "--points", "0"], "--points"),
        (["--axes", "patch", "--device", "abacus"], "device"),
        (["--axes", "patch", "model.depht=4"], "model.depth"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_written(latte, tmp_path, words, expected):
    found = latte("ablate", "shapes", *SMALL, "data.frames=4", *words)
    assert (found.code, len(found.errors)) == (2, 1)
    assert expected in found.errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_signal_is_code_143_and_the_same_command_resumes(latte, monkeypatch):
    command = ["ablate", "shapes", "--axes", "temporal_position", *SMALL, "--json"]
    original = sweep.measure_run
    calls = []

    def measure(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "measure_run", measure)
        found = latte(*command)
    assert (found.code, len(calls)) == (143, 2)
    assert [setting["seeds"] for setting in found.json["settings"]] == [[0], [0]]
    again = latte(*command)
    assert again.code == 0
    assert "2 of 4 runs are to be trained" in again.err
    assert [one["seeds"] for one in again.json["settings"]] == [[0, 1], [0, 1]]
