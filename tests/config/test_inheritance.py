# SPDX-License-Identifier: Apache-2.0
"""YAML files that name a base: what they change, what they keep, and bases that cannot be."""

import pytest

from latte.ablate.axes import BASELINE, make_settings
from latte.ablate.plan import base_config
from latte.checks import InputError
from latte.config.run import flat, load_run


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_a_file_changes_its_base_and_keeps_the_rest(tmp_path):
    path = write(tmp_path, "more.yaml", "base: shapes\ntrain:\n  layer_sync: 0.2\n  steps: 9000\n")
    config, origin = load_run(path, ["train.lr=3e-4"])
    parent, _ = load_run("shapes")
    changed = {key for key, value in flat(config).items() if value != flat(parent)[key]}
    assert changed == {"train.layer_sync", "train.steps", "train.lr", "run.dir"}
    assert config.run.dir == "runs/more"
    assert origin["train.layer_sync"].endswith("more.yaml:3")
    assert origin["model.depth"].startswith("base shapes:")


def test_a_base_may_be_a_file_beside_it_with_a_base_of_its_own(tmp_path):
    write(tmp_path, "first.yaml", "base: shapes-tiny\ntrain:\n  steps: 7\n  decay_steps: 0\n")
    path = write(tmp_path, "second.yaml", "base: first.yaml\ntrain:\n  optimizer: muon\n")
    config, _ = load_run(path)
    assert (config.train.steps, config.train.optimizer) == (7, "muon")
    assert config.model == load_run("shapes-tiny")[0].model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: shaeps\n", r"x\.yaml:1: base is 'shaeps', which is no recipe and no YAML file beside"),
        ("base: x.yaml\n", r"x\.yaml:1: base is 'x\.yaml', which inherits from this file"),
        ("base: y.yaml\n", r"base y\.yaml:1: base is 'x\.yaml', which inherits from this file"),
        ("base: shapes\ntrain:\n  optimiser: muon\n", r"x\.yaml:3: .*unknown setting.*train\.optimizer"),
        ("base: [shapes]\n", r"base is \['shapes'\], which is no recipe"),
    ],
)
def test_a_base_that_cannot_be_is_one_line(tmp_path, text, message):
    write(tmp_path, "y.yaml", "base: x.yaml\n")
    with pytest.raises(InputError, match=message):
        load_run(write(tmp_path, "x.yaml", text))


def test_an_ablation_is_a_short_file(tmp_path):
    path = write(tmp_path, "sync.yaml", "base: shapes\ntrain:\n  layer_sync: 0.3\nrun:\n  dir: elsewhere\n")
    base = base_config(load_run("shapes")[0])
    settings, _ = make_settings(base, [str(path)])
    assert [(one.axis, one.name, one.run, one.overrides) for one in settings] == [
        ("sync", "off", BASELINE, {}),
        ("sync", "on", "sync-on", {"train.layer_sync": 0.3}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  layer_sink: 1\n", r"bad\.yaml:2: .*unknown setting"),
        ("train:\n  steps: many\n", r"train\.steps must be a whole number, got 'many'"),
        ("base: shapes\n", r"leaves nothing to compare"),
    ],
)
def test_a_file_of_an_ablation_that_cannot_be_is_one_line(tmp_path, text, message):
    base = base_config(load_run("shapes")[0])
    with pytest.raises(InputError, match=message):
        make_settings(base, [str(write(tmp_path, "bad.yaml", text))])
    with pytest.raises(InputError, match=r"--axes .*none\.yaml is no file"):
        make_settings(base, [str(tmp_path / "none.yaml")])


def test_the_fast_recipe_changes_optimizer_layers_and_autoencoder_of_shapes():
    config, _ = load_run("fast")
    parent, _ = load_run("shapes")
    changed = {key for key, value in flat(config).items() if value != flat(parent)[key]}
    assert changed == {
        "codec.name",
        "train.optimizer",
        "train.lr",
        "run.dir",
        "model.num_frames",
        "model.mlp",
        "model.latent_channels",
    }
