# SPDX-License-Identifier: Apache-2.0
"""Counts are kept between plans, under everything that decides them."""

import json
from dataclasses import asdict

import pytest

from latte.config.run import load_run
from latte.profile import kept
from latte.profile import plan as module
from latte.profile.plan import plan
from tiny import WORDS

COUNTS = ("staging", "count", "states", "table3", "encoding_operations", "activations")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The file of counts, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latte" / kept.FILE


@pytest.fixture
def counted(monkeypatch):
    """Which counts were made."""
    made = []
    for name in COUNTS:
        original = getattr(module, name)

        def call(*arguments, name=name, original=original):
            made.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, call)
    return made


def planned(*words, recipe="shapes", **options):
    found = plan(load_run(recipe, [*WORDS, *words])[0], "cpu", **{"kept": True, **options})
    return asdict(found)


@pytest.mark.parametrize("recipe", ["shapes", "shapes-text"])
def test_a_second_plan_counts_nothing_and_says_the_same(cache, counted, recipe):
    plain = planned(recipe=recipe, kept=False)  # makes the position tables, which stay in this process
    expected = sorted({*COUNTS} - ({"table3"} if recipe == "shapes-text" else set()))
    counted.clear()
    assert planned(recipe=recipe, kept=False) == planned(recipe=recipe)
    assert sorted(counted) == sorted([*expected, *expected])
    counted.clear()
    again = planned(recipe=recipe)
    assert counted == []
    assert again | {"sampling": plain["sampling"]} == plain


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.steps=7"], set()),
        (["train.micro_batch=1"], {"activations"}),
        (["train.num_images=1"], {"activations"}),
        (["train.recompute=true"], {"activations"}),
        (["train.dtype=bf16"], {"activations"}),
        (["train.optimizer=muon"], {"states"}),
        (["lora.rank=2", "train.init=builtin-shapes"], {"states", "activations"}),
        (["sample.batch=3"], {"staging"}),
        (["codec.chunk=2"], {"staging", "encoding_operations"}),
        (["model.depth=4"], {*COUNTS}),
    ],
)
def test_a_setting_counts_again_what_it_decides(cache, counted, words, expected):
    planned()
    counted.clear()
    found = planned(*words)
    assert set(counted) == expected
    assert found == planned(*words, kept=False)


@pytest.mark.parametrize("change", ["source_sha256", "version"])
def test_other_code_and_other_libraries_count_again(cache, counted, monkeypatch, change):
    planned()
    counted.clear()
    monkeypatch.setattr(kept, change, lambda *name: "another")
    planned()
    assert sorted(counted) == sorted(COUNTS)


def test_a_damaged_file_is_counted_again(cache, counted):
    first = planned()
    counted.clear()
    cache.write_text(cache.read_text()[:-1])
    assert planned() == first
    assert sorted(counted) == sorted(COUNTS)


def test_a_count_of_another_form_is_counted_again(cache, counted):
    first = planned()
    entries = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: {"parameters": "many"} for key in entries}))
    counted.clear()
    found = planned()
    assert {"count", "states", "table3", "encoding_operations", "activations"} <= set(counted)
    assert found["parameters"] == first["parameters"]


@pytest.mark.parametrize("part", ["codec", "text"])
def test_what_depends_on_files_of_the_user_is_not_kept(cache, part):
    config = load_run("shapes-text", WORDS)[0]
    section = getattr(config, part)
    object.__setattr__(section, "path", "somewhere")
    assert [kept.Counter(config, kept=True)(dict, lambda: {"n": 1}) for _ in range(2)] == [{"n": 1}] * 2
    assert not cache.exists()
