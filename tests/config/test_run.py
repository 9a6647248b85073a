# SPDX-License-Identifier: Apache-2.0
"""Layers, origins, every bad key at once, recipes, and a run folder that reloads to what it was made from."""

import json
import re
from dataclasses import asdict

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from latte.checks import InputError
from latte.config.describe import describe_keys, field_comments
from latte.config.layers import OTHER_NAMES
from latte.config.run import DERIVED, HINTS, RunConfig, flat, load_run, recipes, schema
from latte.model.text import TextConfig


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Configurations build small float64 tables, for which two threads are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refused(run, overrides=()):
    """The lines of the message with which ``load_run`` refuses."""
    with pytest.raises(InputError) as error:
        load_run(run, overrides)
    return str(error.value).split("\n")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.batch_size", "train.global_batch"),
        ("train.learning_rate", "train.lr"),
        ("data.num_frames", "data.frames"),
        ("model.hidden_size", "model.width"),
    ],
)
def test_names_of_other_programs_are_understood(name, meant):
    assert refused("shapes", [f"{name}=4"])[0].endswith(f"did you mean {meant!r}?")


def test_other_names_mean_settings_that_exist():
    assert set(OTHER_NAMES.values()) <= set(HINTS)
    assert not set(OTHER_NAMES) & set(HINTS)


def test_a_value_comes_from_the_last_layer_that_names_it(tmp_path, monkeypatch):
    file = tmp_path / "own.yaml"
    file.write_text("train:\n  lr: 1e-3\n  steps: 10\n  ema_decay: 0.5\n")
    monkeypatch.setenv("LATTE_TRAIN_STEPS", "20")
    monkeypatch.setenv("LATTE_TRAIN_EMA_DECAY", "0.6")
    config, origins = load_run(file, ["train.ema_decay=0.7"])
    assert (config.train.lr, config.train.steps, config.train.ema_decay, config.train.weight_decay) == (
        1e-3,
        20,
        0.7,
        0.0,
    )
    assert origins["train.lr"] == f"{file}:2"
    assert origins["train.steps"] == "environment LATTE_TRAIN_STEPS"
    assert origins["train.ema_decay"] == "command line"
    assert origins["train.weight_decay"] == "default"
    assert origins.keys() == flat(config).keys() == HINTS.keys()


def test_every_bad_key_value_and_range_is_reported_at_once_with_its_place(tmp_path, monkeypatch):
    file = tmp_path / "bad.yaml"
    file.write_text("model:\n  num_frame: 8\n  depth: deep\ntrain:\n  lr: -1\ndata:\n  flip: perhaps\n")
    monkeypatch.setenv("LATTE_TRAIN_STEPZ", "3")
    lines = refused(file, ["sample.guidence=2", "diffusion.schedule=lineer", "codec.chunk=0"])
    assert len(lines) == 8
    for line, words in zip(
        lines,
        [
            (f"{file}:2", "model.num_frame", "'8'", "model.num_frames"),
            ("environment LATTE_TRAIN_STEPZ", "LATTE_TRAIN_STEPS"),
            ("command line", "sample.guidence", "sample.guidance"),
            (f"{file}:3", "model.depth", "'deep'", "a whole number"),
            (f"{file}:7", "data.flip", "'perhaps'", "true or false"),
            ("command line", "diffusion.schedule", "'lineer'", "linear"),
            ("command line", "codec.chunk", "0"),
            (f"{file}:5", "train.lr", "-1"),
        ],
        strict=True,
    ):
        assert all(word in line for word in words), (line, words)


def test_overrides_with_dashes_and_spaces_are_the_same():
    config, _ = load_run("shapes", ["--model.size", "S", "--train.steps=4", "model.latent_size=[8,8]"])
    assert (config.model.size, config.train.steps, config.model.latent_size) == ("S", 4, (8, 8))


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_loads_and_names_its_command(name):
    config, _ = load_run(name)
    assert config.run.dir == f"runs/{name}"
    head = recipes()[name].read_text().split("version:")[0]
    assert re.search(rf"latte \w+ {name}\b", head)
    assert all(line.startswith("#") for line in head.strip().splitlines())
    assert yaml.safe_load(recipes()[name].read_text())["version"] == 1


def test_the_four_recipes_are_there():
    assert set(recipes()) >= {"ffs", "shapes", "sky-small", "actions-small"}


def test_ffs_is_the_papers_setting():
    config, _ = load_run("ffs")
    assert (
        config.model.size,
        config.model.patch_size,
        config.data.frames,
        config.data.resolution,
        config.data.interval,
    ) == ("XL", 2, 16, 256, 3)
    assert (config.train.lr, config.train.ema_decay, config.train.clip_norm, config.train.clip_start) == (
        1e-4,
        0.9999,
        0.1,
        20_000,
    )
    assert (config.train.global_batch, config.codec.name, config.model.num_classes, config.sample.steps) == (
        40,
        "kl",
        None,
        250,
    )


@pytest.mark.parametrize("name", ["shape", "no/such.yaml", ""])
def test_an_unknown_run_is_refused_with_the_recipes(name):
    if name:
        assert "shapes" in refused(name)[0]
    else:
        assert "config.yaml" in refused(name)[0]  # the empty name is this folder


def test_a_run_folder_reloads_to_the_same_configuration_from_any_folder(tmp_path):
    config, _ = load_run(
        "shapes",
        [
            "train.lr=3e-05",
            "data.resolution=[64,32]",
            "codec.path=none",
            "model.num_classes=null",
            "run.seed=7",
        ],
    )
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config)), encoding="utf-8")
        again, origins = load_run(folder)
        assert again.run.dir == str(folder)
        assert origins["run.dir"] == "the run folder"
        assert flat(again) | {"run.dir": ""} == flat(config) | {"run.dir": ""}
    assert load_run(tmp_path / "a", ["run.dir=else"])[0].run.dir == "else"


def test_with_a_text_encoder_the_model_section_makes_a_text_model():
    config, _ = load_run("shapes-text", ["model.depth=2", "text.table_size=16"])
    assert config.network == TextConfig(
        depth=2, width=144, heads=4, num_frames=8, latent_size=8, caption_channels=64, table_size=16
    )
    assert load_run("shapes")[0].network == load_run("shapes")[0].model


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.num_classes=4", "model.num_classes is 4"),
        ("model.variant=3", "model.variant is 3"),
        ("model.patch=compression", "model.patch is 'compression'"),
        ("model.tube=4", "model.tube is 4"),
        ("model.conditioning=all_tokens", "model.conditioning is 'all_tokens'"),
        ("model.class_dropout=0.2", "model.class_dropout is 0.2"),
        ("text.name=builtn", "did you mean 'builtin'"),
        ("text.dropout=2", "text.dropout must be in"),
        ("data.hold_out=1", "data.hold_out is 1"),
    ],
)
def test_what_a_text_model_has_not_is_refused(word, expected):
    (line,) = refused("shapes-text", [word])
    assert expected in line
    assert line.startswith("command line")


NAMES_AND_PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(NAMES_AND_PATHS, st.floats(1e-30, 1e30), st.integers(0, 2**62), st.booleans())
def test_any_value_survives_the_way_through_the_file(tmp_path_factory, text, real, whole, flag):
    config = RunConfig()
    values = asdict(config)
    values["codec"]["path"], values["train"]["lr"], values["run"]["seed"], values["data"]["flip"] = (
        text,
        real,
        whole,
        flag,
    )
    file = tmp_path_factory.mktemp("yaml") / "a.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    again, _ = load_run(file)
    assert (again.codec.path, again.train.lr, again.run.seed, again.data.flip) == (text, real, whole, flag)


def test_another_version_of_the_file_is_refused(tmp_path):
    (tmp_path / "new.yaml").write_text("version: 2\n")
    assert "version is 2" in refused(tmp_path / "new.yaml")[0]


def test_the_schema_knows_every_key_and_forbids_others():
    found = schema()
    assert set(found["properties"]) == {key.split(".")[0] for key in HINTS}
    assert {f"train.{key}" for key in found["$defs"]["TrainConfig"]["properties"]} == {
        key for key in HINTS if key.startswith("train.")
    }
    assert all(part["additionalProperties"] is False for part in found["$defs"].values())
    json.dumps(found)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
NAMES = st.sampled_from([*HINTS, "model", "train", "lr", "steps"])
YAML = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(YAML)
def test_any_yaml_loads_or_is_refused_in_lines(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("yaml") / "a.yaml"
    file.write_text(yaml.safe_dump(value), encoding="utf-8")
    problems = []
    try:
        load_run(file)
    except InputError as error:
        problems = str(error).split("\n")
    assert all(line.startswith((str(file), DERIVED)) for line in problems), problems


def test_a_problem_of_two_values_names_the_place_of_both():
    (line,) = refused("shapes", ["data.frames=4", "model.num_frames=5"])
    assert line.startswith("command line: model.num_frames is 5, but data.frames is 4")
    (line,) = refused("shapes", ["model.num_frames=5"])
    assert re.search(r"\(data.frames is set by recipe shapes:\d+\)$", line)


@pytest.mark.parametrize("text", ["a\0b", "a\udcffb"])
def test_a_text_that_cannot_be_a_name_is_refused(tmp_path, text):
    for key in ("data.root", "codec.path", "run.dir", "train.init"):
        (line,) = refused("shapes", [f"{key}={text}"])
        assert line.startswith(f"command line: {key} is 'a")
        line.encode()
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"data": {"root": text}}))
    assert len(refused(tmp_path / "a.yaml")) == 1


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "/dev/null", "a\nb"])
def test_a_run_that_no_file_can_be_is_one_line(name):
    assert len(refused(name)) == 1


def test_every_key_has_a_description():
    keys = describe_keys()
    assert [key.name for key in keys] == list(HINTS)
    assert [key.name for key in keys if not key.description] == []


def test_a_description_is_the_comment_of_its_field():
    source = """
class Config:
    first: int = 1  # on the line
    # above,
    # in two lines
    second: int | None = (
        None
    )
    third: tuple[str, ...] = (
        "a",  # inside
    )
    fourth: str = "# no comment"
"""
    found = field_comments(source)
    assert found == {"first": "on the line", "second": "above, in two lines", "third": "inside"}


WORDS = (
    "1e-4",
    "010",
    "on",
    "1:30",
    "null",
    "[1,2]",
    "{a: 1}",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "nan",
    "inf",
    "",
    "9" * 18,
)
WORDS += (
    "1e300",
    "1e-300",
    "-0.5",
    "0.5",
    "[]",
    "[0, 0]",
    "[-1, 8]",
    "ddim50",
    "ddim0",
    "10,0",
    "pixels",
    "auto",
    "a\0b",
)
VALUES = st.one_of(st.sampled_from(WORDS), st.text(max_size=12), st.integers(), st.floats().map(repr))
OVERRIDES = st.tuples(
    st.sampled_from([*HINTS, "model.deepth", "x", "", "model", ".lr", "train.lr.x"]), VALUES
)


@seed(7)
@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([None, *recipes()]), st.lists(OVERRIDES, min_size=1, max_size=4))
def test_any_overrides_load_or_are_refused_in_lines(tmp_path_factory, run, overrides):
    words = [f"{key}={value}" for key, value in overrides]
    try:
        config, _ = load_run(run, words)
    except InputError as error:
        lines = str(error).split("\n")
        assert all(": " in line for line in lines), lines
        assert all(len(line) < 600 for line in lines), lines
        return
    file = tmp_path_factory.mktemp("fuzz") / "a.yaml"
    file.write_text(yaml.safe_dump(asdict(config)), encoding="utf-8")
    assert flat(load_run(file)[0]) | {"run.dir": ""} == flat(config) | {"run.dir": ""}, "it survives its file"
