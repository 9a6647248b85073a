# SPDX-License-Identifier: Apache-2.0
"""``latte plan``, ``latte config`` and ``latte doctor``: the keys of their answers."""

import json

import pytest

from latte.cli import doctor
from tiny import WORDS


def test_plan_answers_with_the_papers_numbers(latte):
    found = latte("plan", "ffs", "--json").json
    assert {"parameters", "operations", "table3"} <= found.keys()
    assert (found["parameters"], round(found["table3"]["operations_g"], 6)) == (673_681_568, 5572.695048)


def test_plan_answers_with_memory_batch_disk_and_on_request_the_time(latte):
    words = (
        "plan",
        "shapes",
        *WORDS,
        "train.steps=8",
        "train.micro_batch=2",
        "--device",
        "cpu",
        "--processes",
        2,
    )
    found = latte(*words, "--json").json
    assert {"weights", "gradients", "optimizer", "ema", "activations", "total"} <= found["memory"].keys()
    assert (
        found["memory"]["weights"]
        == found["memory"]["gradients"]
        == found["memory"]["ema"]
        == 4 * found["parameters"]
    )
    assert (found["batch"]["global_batch"], found["batch"]["processes"], found["batch"]["accumulation"]) == (
        4,
        2,
        1,
    )
    assert found["disk"]["kept"] == 3 * found["disk"]["checkpoint"]
    assert found["time"] is None
    assert "hours" not in latte(*words).out
    measured = latte(*words, "--measure")
    assert "hours in all" in measured.out
    assert "4 = 2 processes x 2 clips x 1 accumulated" in measured.out
    assert latte(*words, "--measure", "--json").json["time"].keys() >= {"step_seconds", "hours"}


@pytest.mark.parametrize(("size", "parameters"), [("S", 32_480_672)])
def test_overrides_reach_the_plan_in_both_forms(latte, size, parameters):
    assert latte("plan", "ffs", f"model.size={size}", "--json").json["table3"]["parameters"] == parameters
    assert latte("plan", "ffs", "--model.size", size, "--json").json["parameters"] == parameters
    assert f"{parameters:,}" in latte("plan", "ffs", f"--model.size={size}").out


def test_a_latent_that_patches_do_not_divide_is_refused(latte):
    found = latte("plan", "shapes", "data.resolution=72")
    assert found.code == 2
    assert "the nearest is 8" in found.errors[0]


def test_config_show_gives_every_value_with_its_origin(latte, monkeypatch):
    monkeypatch.setenv("LATTE_TRAIN_LR", "1e-5")
    found = latte("config", "show", "shapes", "model.depth=6", "--json").json
    given = {key: (entry["value"], entry["origin"]) for key, entry in found.items()}
    assert given["train.lr"] == (1e-5, "environment LATTE_TRAIN_LR")
    assert given["model.depth"] == (6, "command line")
    assert given["model.num_frames"] == (8, "derived from data and codec")
    assert found["train.steps"]["origin"].startswith("recipe shapes:")
    assert found["model.size"]["origin"] == "default"
    shown = latte("config", "show").out
    assert len(shown.splitlines()) == len(found)


def test_config_schema_is_a_json_schema(latte):
    found = json.loads(latte("config", "schema").out)
    assert latte("config", "schema", "--json").json == found
    assert found["properties"].keys() >= {"model", "train", "data"}


def test_doctor_says_what_is_here(latte):
    found = latte("doctor", "--json", "--device", "cpu")
    assert found.code == (1 if found.json["problems"] else 0)
    assert {
        "python",
        "torch",
        "device",
        "threads",
        "autoencoders",
        "av",
        "diffusers",
        "disk_free_gib",
        "memory_gib",
        "offline",
    } <= found.json.keys()
    assert found.json["device"] == "cpu"


def test_doctor_exits_with_1_when_something_is_missing(latte, monkeypatch):
    monkeypatch.setattr(doctor, "MIN_MEMORY", 1 << 60)
    monkeypatch.setattr(doctor, "MIN_DISK", 1 << 60)
    monkeypatch.setattr(doctor, "_video_encoders", lambda: None)
    found = latte("doctor")
    assert found.code == 1
    assert found.out.count("problem: ") == 3


def test_plan_ends_with_a_verdict_for_the_memory_at_hand(latte):
    words = ("plan", "shapes", *WORDS, "train.global_batch=4", "--device", "cpu")
    assert latte(*words).out.splitlines()[-1].startswith("verdict: fits: a step needs ")
    needed = latte(*words, "--json").json["memory"]["total"]
    found = latte(*words, "--memory", needed / 2**30, "--json").json["verdict"]
    assert (found["fits"], found["needed"]) == (False, needed)
    assert found["settings"] == ["train.micro_batch=2"]
    checked = latte(*words, *found["settings"], "--json").json
    assert checked["memory"]["total"] == found["needed_with"], "the setting needs what the verdict says"
    assert "fits with train.micro_batch=2" in latte(*words, "--memory", needed / 2**30).out.splitlines()[-1]
    wrong = latte(*words, "--memory", 0)
    assert (wrong.code, len(wrong.errors)) == (2, 1)
