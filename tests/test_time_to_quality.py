# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training to a fixed quality: targets that are reached, that never are, and bad ones."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from latte.checks import InputError
from tiny import WORDS

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = [*WORDS, "train.steps=4", "diffusion.objective=v"]
COUNTS = ["--every", "2", "--heldout", "2", "--count", "0", "--seeds", "0,1"]


@pytest.fixture
def benchmark(monkeypatch):
    """The module; its neighbours are imported from the folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield importlib.import_module("time_to_quality")
    torch.set_num_threads(threads)
    for name in ("time_to_quality", "measure"):
        sys.modules.pop(name, None)


def test_a_target_that_is_met_ends_the_run_and_is_one_line(benchmark, capsys, tmp_path):
    line = benchmark.main(["shapes", *SMALL, *COUNTS, "--loss", "1e9", "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(line))
    assert (line["reached"], line["steps"], line["clips"]) == ("2 of 2", 2, 8)
    assert line["processor_minutes"] >= 0
    assert all(set(seed["v_error"]) == set(benchmark.LEVELS) for seed in line["seeds"])
    first, second = (seed["heldout_loss"] for seed in line["seeds"])
    assert first != second


def test_a_target_that_is_never_met_ends_and_is_named(benchmark, capsys, tmp_path):
    with pytest.raises(SystemExit, match=r"seed 0, 1 did not reach the targets in 4 steps"):
        benchmark.main(["shapes", *SMALL, *COUNTS, "--loss", "1e-9", "--out", str(tmp_path)])
    line = json.loads(capsys.readouterr().out)
    assert (line["reached"], line["processor_minutes"]) == ("0 of 2", None)
    assert [point["step"] for point in line["seeds"][0]["points"]] == [2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"no target is given; give --loss, --accuracy or --consistency"),
        (["--accuracy", "95"], r"--accuracy is 95\.0, but it is a fraction"),
        (["--loss", "-1"], r"a target must be positive"),
        (["--loss", "1", "--every", "0"], r"--every must be at least 1"),
        (["--loss", "1", "text.name=builtin", "model.num_classes=null"], r"only models of classes"),
        (["--accuracy", "0.9"], r"label_accuracy cannot be measured for this recipe"),
    ],
)
def test_what_cannot_be_measured_is_refused(benchmark, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        benchmark.main(["shapes", *SMALL, *COUNTS, "--out", str(tmp_path), *options])
