# SPDX-License-Identifier: Apache-2.0
"""Text becomes the value that its field asks for, from YAML, environment and command line alike."""

import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from latte.checkpoint.record import RENAMED_KEYS
from latte.checks import InputError
from latte.config.layers import MAX_PROBLEMS, Plain, read_environment, read_value, read_words, read_yaml

HINTS = {
    "version": int,
    "train.lr": float,
    "train.steps": int,
    "data.flip": bool,
    "data.root": str | None,
    "data.frames": int | None,
    "data.resolution": int | tuple[int, int],
    "sample.steps": int | str,
    "sample.weights": tuple[float, ...] | None,
}


def values(layer):
    """Key -> value of a layer without problems."""
    assert layer.problems == []
    return {key: read_value(entry.raw, HINTS[key]) for key, entry in layer.entries.items()}


def from_yaml(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    return read_yaml(tmp_path / "a.yaml", "a.yaml", HINTS)


@pytest.mark.parametrize(
    ("text", "key", "value", "what_pyyaml_makes_of_it"),
    [
        ("1e-4", "train.lr", 1e-4, "1e-4"),
        ("1e-4", "data.root", "1e-4", "1e-4"),
        ("010", "train.steps", 10, 8),
        ("010", "data.root", "010", 8),
        ("1_000", "data.root", "1_000", 1000),
        ("on", "data.flip", True, True),
        ("on", "data.root", "on", True),
        ("no", "sample.steps", "no", False),
        ("1:30", "data.root", "1:30", 90),
        ("2024-01-02", "data.root", "2024-01-02", ...),
        ("0x10", "data.root", "0x10", 16),
        ("~", "data.root", None, None),
        ('"null"', "data.root", "null", "null"),
        ("None", "data.root", "None", "None"),
        ("1e6", "train.steps", 1_000_000, "1e6"),
        ("16", "sample.steps", 16, 16),
        ("ddim50", "sample.steps", "ddim50", "ddim50"),
        ("[64, 32]", "data.resolution", (64, 32), [64, 32]),
        ("64", "data.resolution", 64, 64),
        ("[1, 2.5, 1e-3]", "sample.weights", (1.0, 2.5, 1e-3), ...),
    ],
)
def test_a_value_is_what_its_field_says_and_not_what_yaml_guesses(
    tmp_path, text, key, value, what_pyyaml_makes_of_it
):
    section, leaf = key.split(".")
    found = values(from_yaml(tmp_path, f"{section}:\n  {leaf}: {text}\n"))[key]
    assert found == value
    assert type(found) is type(value)
    if what_pyyaml_makes_of_it is not ...:
        assert yaml.safe_load(text) == what_pyyaml_makes_of_it


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.steps", "1:30"),
        ("train.steps", "2.5"),
        ("train.steps", "ten"),
        ("train.steps", "0x10"),
        ("train.steps", "null"),
        ("train.steps", "1e300"),
        ("train.lr", "nan"),
        ("train.lr", "inf"),
        ("train.lr", "1e999"),
        ("train.lr", "fast"),
        ("data.flip", "1"),
        ("data.flip", "maybe"),
        ("data.resolution", "[64]"),
        ("data.resolution", "[64, 64, 64]"),
        ("data.resolution", "[64, wide]"),
        ("data.resolution", "64x64"),
        ("data.frames", "[8]"),
        ("data.root", "[a, b]"),
        ("data.root", "{a: b}"),
        ("train.steps", "٣"),
        ("train.steps", "9" * 30),
        ("train.steps", "9" * 19),
        ("train.steps", str(2**63)),
        ("train.steps", str(-(2**63))),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, key, text):
    section, leaf = key.split(".")
    layer = from_yaml(tmp_path, f"{section}:\n  {leaf}: {text}\n")
    with pytest.raises(ValueError):
        read_value(layer.entries[key].raw, HINTS[key])


def test_quotes_keep_null_a_text_and_do_not_harm_numbers(tmp_path):
    found = values(from_yaml(tmp_path, "data:\n  root: 'null'\n  frames: '8'\n"))
    assert found == {"data.root": "null", "data.frames": 8}


def test_origin_is_file_and_line(tmp_path):
    layer = from_yaml(tmp_path, "# a comment\ntrain:\n  lr: 1\n\n  steps: 2\n")
    assert {key: entry.origin for key, entry in layer.entries.items()} == {
        "train.lr": "a.yaml:3",
        "train.steps": "a.yaml:5",
    }


def test_unknown_keys_repeated_keys_and_wrong_sections_are_all_reported_with_line_and_nearest(tmp_path):
    layer = from_yaml(
        tmp_path,
        "train:\n  stepz: 2\n  lr: 1\n  lr: 2\ndata: 7\nframes: 3\nsample:\nodd: {a: {b: c}}\n? [x]\n: 1\n",
    )
    assert layer.problems == [
        "a.yaml:2: train.stepz = 2: unknown setting; did you mean 'train.steps'?".replace("= 2", "= '2'"),
        "a.yaml:4: train.lr is given again (first in a.yaml:3); keep one of the two",
        "a.yaml:5: data is a section, not '7'; put its keys under it, indented",
        "a.yaml:6: frames = '3': unknown setting; did you mean 'data.frames'?",
        "a.yaml:8: odd = {...}: unknown setting",
        "a.yaml:9: ? = '1': unknown setting",
    ]
    assert values(read_words([], HINTS)) == {}


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: b: c",
        "- 1\n- 2",
        "only words",
        "a: !!python/object:os.system x",
        "\t- x",
        "%YAML 9.9\n---\na: 1",
        "a: *nothing",
        "\x00",
        "[" * 1200,
        "a: 1\n--- \nb: 2",
    ],
)
def test_what_is_no_settings_file_ends_in_one_line_or_in_problems(tmp_path, text):
    try:
        problems = from_yaml(tmp_path, text).problems
    except InputError as error:
        problems = [str(error)]
    assert len(problems) == 1
    assert "a.yaml" in problems[0]
    assert "\n" not in problems[0]


def test_aliases_that_would_grow_without_end_cost_nothing(tmp_path):
    bomb = (
        "a0: &a0 [x, x]\n"
        + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
        + "train: &t\n  lr: 1\n  steps: *t\n"
    )
    layer = from_yaml(tmp_path, bomb)
    assert len(layer.problems) == MAX_PROBLEMS
    assert layer.all_problems()[-1] == f"{40 - MAX_PROBLEMS} more problems of this kind"
    assert max(map(len, layer.problems)) < 200


@pytest.mark.parametrize(
    "text",
    [
        "sample:\n  weights: [" + "1, " * 60_000 + "1]\n",
        "sample:\n  weights: " + "[" * 30_000 + "]" * 30_000 + "\n",
        "".join(f"key{number}: 1\n" for number in range(8_000)),
        "".join(f"a{number}: [" + "x, " * 40 + "x]\n" for number in range(900)),
        "train:\n  " + "k" * 200_000 + ": 1\n",
        "train:\n  steps: " + "9" * 200_000 + "\n",
        "data:\n  frames: {" + "a: {" * 20_000 + "}" * 20_000 + "}\n",
        "a: &a [1]\n" + "".join(f"k{number}: *a\n" for number in range(8_000)),
    ],
    ids=["list", "deep", "unknown keys", "lists", "long key", "long number", "deep mapping", "aliases"],
)
def test_a_large_file_costs_little_time_and_few_lines(tmp_path, text):
    began = time.process_time()
    problems = []
    try:
        layer = from_yaml(tmp_path, text)
        problems = layer.all_problems()
        for key, entry in layer.entries.items():
            with pytest.raises(ValueError):
                read_value(entry.raw, HINTS[key])
    except InputError as error:
        problems = str(error).split("\n")
    assert time.process_time() - began < 2
    assert len(problems) <= MAX_PROBLEMS + 1
    assert all("a.yaml" in problem for problem in problems[:MAX_PROBLEMS])
    assert max(map(len, problems), default=0) < 300


def test_a_renamed_key_is_read_and_its_new_name_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(RENAMED_KEYS, "train.rate", "train.lr")
    (tmp_path / "a.yaml").write_text("train:\n  rate: 1\n")
    places = {
        "a.yaml:2": read_yaml(tmp_path / "a.yaml", "a.yaml", HINTS),
        "environment LATTE_TRAIN_RATE": read_environment({"LATTE_TRAIN_RATE": "1"}, HINTS),
        "command line": read_words(["train.rate=1"], HINTS),
    }
    assert all(values(layer) == {"train.lr": 1.0} for layer in places.values())
    assert caplog.messages == [f"{place}: train.rate is now called train.lr" for place in places]
    (tmp_path / "a.yaml").write_text("train:\n  rate: 1\n  lr: 2\n")
    assert len(read_yaml(tmp_path / "a.yaml", "a.yaml", HINTS).problems) == 1, "given twice"


def test_files_of_another_kind_are_refused(tmp_path):
    for content, why in [(b"\xff\xfe\x00", "UTF-8"), (b"a" * (2 << 20), "larger than 262,144 bytes")]:
        (tmp_path / "b.yaml").write_bytes(content)
        with pytest.raises(InputError, match=why):
            read_yaml(tmp_path / "b.yaml", "b.yaml", HINTS)


def test_words_in_their_three_forms_and_the_last_one_counts():
    words = [
        "train.lr=3e-4",
        "--train.steps=7",
        "--data.root",
        "a=b",
        "data.frames=none",
        "train.lr=1e-3",
        "data.resolution=64,32",
    ]
    expected = {
        "train.lr": 1e-3,
        "train.steps": 7,
        "data.root": "a=b",
        "data.frames": None,
        "data.resolution": (64, 32),
    }
    assert values(read_words(words, HINTS)) == expected


def test_bad_words_are_all_reported():
    problems = read_words(["train.lrr=1", "train.steps", "--frames", "3", "x=1"], HINTS).problems
    assert problems == [
        "command line: train.lrr = '1': unknown setting; did you mean 'train.lr'?",
        "command line: 'train.steps' is not key=value; did you mean 'train.steps'?",
        "command line: frames = '3': unknown setting; did you mean 'data.frames'?",
        "command line: x = '1': unknown setting",
    ]


def test_environment_reads_its_own_variables_and_reports_misspelt_ones():
    layer = read_environment(
        {"LATTE_TRAIN_LR": "1e-3", "LATTE_HOME": "/x", "LATTE_DATA_FRAMEZ": "secret", "PATH": "y"}, HINTS
    )
    assert {key: (entry.raw, entry.origin) for key, entry in layer.entries.items()} == {
        "train.lr": ("1e-3", "environment LATTE_TRAIN_LR")
    }
    assert layer.problems == [
        "environment LATTE_DATA_FRAMEZ: unknown setting; did you mean 'LATTE_DATA_FRAMES'?"
    ]


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**17), 10**17))
def test_every_number_survives_being_written_and_read(real, whole):
    assert read_value(Plain(repr(real)), float) == real
    assert read_value(Plain(yaml.safe_dump(real).split("\n")[0]), float) == real
    assert read_value(Plain(yaml.safe_dump(whole).split("\n")[0]), int) == whole
    assert read_value(Plain(str(whole)), int | str) == whole


@given(st.text())
def test_any_word_is_read_or_reported(word):
    layer = read_words([word], HINTS)
    assert len(layer.problems) + len(layer.entries) == 1
    for hint in HINTS.values():
        try:
            read_value(Plain(word), hint)
        except ValueError:
            assert hint not in (str | None, int | str)


def test_a_file_that_is_too_deep_is_refused_before_it_is_composed(tmp_path, monkeypatch):
    monkeypatch.setattr(yaml, "compose", lambda *arguments, **options: pytest.fail("composed"))
    for text in ("a: " + "[" * 9 + "]" * 9, "a: [" + "1, " * 20_000 + "1]"):
        with pytest.raises(InputError, match=r"a.yaml:1 .*: (nested 9 levels deep|over 20,000 values)"):
            from_yaml(tmp_path, text)
