# SPDX-License-Identifier: Apache-2.0
"""``latte ablate``: the keys of its answer, its help, its refusals, and going on after a signal."""

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
    "--graded",
    2,
    "--heldout",
    2,
]


def test_ablate_answers_with_its_keys_and_leaves_results_and_a_report(latte):
    found = latte("ablate", "shapes", "--axes", "temporal_position,conditioning", *SMALL, "--json")
    assert found.code == 0
    assert found.json["out"] == "runs/shapes-ablation"
    arms = found.json["arms"]
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
    assert all(keys <= arm.keys() for arm in arms)
    assert [(arm["axis"], arm["name"], arm["seeds"]) for arm in arms] == [
        ("temporal_position", "absolute", [0, 1]),
        ("temporal_position", "rotary", [0, 1]),
        ("conditioning", "s_adaln", [0, 1]),
        ("conditioning", "all_tokens", [0, 1]),
    ]
    assert arms[0]["run"] == arms[2]["run"] == "runs/shapes-ablation/baseline", "shared"
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
    ("words", "told"),
    [
        (["--axes", "variants"], "did you mean 'variant'"),
        (["--axes", ""], "--axes"),
        (["--axes", "interval"], "data.kind"),
        (["--axes", "init"], "--dit"),
        (["--axes", "patch", "model.num_classes=null", "text.name=builtin"], "text.name"),
        (["--axes", "patch", "--seeds", "a"], "--seeds"),
        (["--axes", "patch", "--points", "0"], "--points"),
        (["--axes", "patch", "--device", "abacus"], "device"),
        (["--axes", "patch", "model.depht=4"], "model.depth"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_written(latte, tmp_path, words, told):
    found = latte("ablate", "shapes", *SMALL, "data.frames=4", *words)
    assert (found.code, len(found.errors)) == (2, 1)
    assert told in found.errors[0]
    assert not (tmp_path / "runs").exists()


def test_a_signal_is_code_143_and_the_same_command_goes_on(latte, monkeypatch):
    command = ["ablate", "shapes", "--axes", "temporal_position", *SMALL, "--json"]
    true, calls = sweep.measure, []

    def measure(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "measure", measure)
        found = latte(*command)
    assert (found.code, len(calls)) == (143, 2)
    assert [arm["seeds"] for arm in found.json["arms"]] == [[0], [0]]
    again = latte(*command)
    assert again.code == 0
    assert "2 of 4 runs are to be trained" in again.err
    assert [arm["seeds"] for arm in again.json["arms"]] == [[0, 1], [0, 1]]
