# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: curves overlaid, same-seed clips, settings that differ, and whether scores differ."""

import json
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import safetensors.torch
import torch
from torch import Tensor
from typer.testing import CliRunner

from latte.checks import InputError
from latte.cli.main import app
from latte.config.run import load_run
from latte.evaluation.evaluate import EvaluateConfig
from latte.evaluation.manifest import ADDED, GROUPS, manifest_hash
from latte.evaluation.scores import score
from latte.interop.readers import fetch
from latte.report import differences, open_runs, paired_interval, setting_rows, summaries, write_comparison
from latte.runtime import generator
from latte.training.history import read_history
from latte.training.report import headline

CONFIG = EvaluateConfig("builtin", clips=64)
ROWS = 64


def features(key: str, shift: float = 0.0) -> Tensor:
    """Made-up rows (64 8)."""
    return torch.randn(ROWS, 8, generator=generator("report", key)) + shift


def write_run(folder: Path, fake: Tensor | None = None, *, real: str = "real", lr: float = 1e-3) -> Path:
    """A run of 20 steps with two samples and, with ``fake``, a score at step 10."""
    folder.mkdir(parents=True)
    config = {"train": {"steps": 40, "lr": lr}, "run": {"dir": str(folder)}, "data": {"resolution": 16}}
    (folder / "config.yaml").write_text(json.dumps(config))
    lines = [{"step": step, "loss": 1 / step, "grad_norm": 1.0, "lr": lr} for step in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    clips = folder / "samples" / "step-0000010"
    clips.mkdir(parents=True)
    clips.with_suffix(".png").write_bytes(b"")
    for seed in range(2):
        (clips / f"seed-000{seed}-0-up.mp4").write_bytes(b"clip of " + folder.name.encode())
    if fake is not None:
        write_score(folder, features(real), fake)
    return folder


def write_score(folder: Path, real: Tensor, fake: Tensor) -> None:
    """The files of an evaluation of step 10."""
    found = score(real, fake, CONFIG.chosen_protocol)
    manifest = {
        group: dict.fromkeys((*fields, *ADDED.get(group, ())), "same") for group, fields in GROUPS.items()
    }
    manifest["pixels"]["frame_size"] = {"real": {"16": 1}, "fake": {"16": 1}}
    manifest["generation"] |= {"interval": None, "other": None}
    out = folder / "scores" / "step-0000010"
    out.mkdir(parents=True)
    interval = [found.interval.low, found.interval.high] if found.interval else None
    written = {"format": 1, "metric": "fvd", "protocol": "builtin-nonstandard", "value": found.value}
    written |= {"interval": interval, "manifest": manifest, "manifest_hash": manifest_hash(manifest)}
    (out / "manifest.json").write_text(json.dumps({**written, "replay": {"config": asdict(CONFIG)}}))
    for side, rows in (("real", real), ("fake", fake)):
        safetensors.torch.save_file({"features": rows}, out / f"{side}.safetensors")
    (folder / "validation.jsonl").write_text(json.dumps({"step": 10, "score/fvd": found.value}) + "\n")


def test_a_difference_is_significant_where_it_is_larger_than_chance(tmp_path):
    near = features("fake", 0.5)
    folders = [
        write_run(tmp_path / "near", near),
        write_run(tmp_path / "far", near + 1.0),
        write_run(tmp_path / "same", near + 0.02 * features("noise")),
    ]
    far, same = differences(open_runs(folders))
    assert (far.base, far.run, far.step) == ("near", "far", 10)
    assert far.significant is True
    assert far.low is not None
    assert 0 < far.low < far.value < far.high
    assert same.significant is False
    backwards = differences(open_runs([folders[1], folders[0]]))[0]
    assert backwards.value == pytest.approx(-far.value)
    assert backwards.significant is True


def test_pairs_of_the_same_clips_make_the_interval_narrow():
    real = features("real")
    fake = features("fake", 0.5)
    protocol = CONFIG.chosen_protocol
    close = paired_interval("fvd", protocol, real, fake, fake + 0.01)
    other = paired_interval("fvd", protocol, real, fake, features("another", 0.51))
    assert close[1] - close[0] < 0.2 * (other[1] - other[0])
    assert close[0] < other[1]


def test_what_has_no_verdict_has_a_reason(tmp_path):
    fake = features("fake")
    base = write_run(tmp_path / "base", fake)
    elsewhere = write_run(tmp_path / "elsewhere", fake, real="others")
    without = write_run(tmp_path / "without")
    gone = write_run(tmp_path / "gone", fake)
    (gone / "scores" / "step-0000010" / "fake.safetensors").unlink()
    found = differences(open_runs([base, elsewhere, without, gone]))
    assert [one.run for one in found] == ["elsewhere", "gone"]
    assert [one.significant for one in found] == [None, None]
    assert "different clips" in found[0].note
    assert "no features that can be read (FileNotFoundError)" in found[1].note


def test_the_page_overlays_curves_and_puts_same_seeds_together(tmp_path):
    runs = open_runs([write_run(tmp_path / "a", features("a")), write_run(tmp_path / "b", features("b"))])
    path = tmp_path / "out" / "page.html"
    write_comparison(runs, path)
    page = ElementTree.fromstring(path.read_text("utf-8"))
    loss = next(svg for svg in page.iter("svg") if svg.get("aria-label") == "Loss")
    assert [title.text for title in loss.iter("title")] == ["a", "b"]
    captions = [item.text for item in page.iter("figcaption") if "seed" in str(item.text)]
    assert captions == [f"{run}: seed {seed}, up" for seed in (0, 1) for run in "ab"]
    clips = [item.get("src") for item in page.iter("video")]
    assert len(set(clips)) == 2, "each run's own clips"


@pytest.mark.parametrize("open_run", [read_history, load_run, fetch])
def test_a_misspelt_run_folder_gets_the_one_beside_it(tmp_path, monkeypatch, open_run):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_run(tmp_path / "runs" / "small")
    with pytest.raises(InputError, match="did you mean 'runs/small'"):
        open_run(Path("runs/smal"))


def test_a_loss_older_than_the_last_step_says_its_step(tmp_path):
    folder = write_run(tmp_path / "a")
    assert summaries(open_runs([folder]))[0]["loss"] == "0.05"
    (folder / "validation.jsonl").write_text('{"step": 29, "validation/loss": 2.0}\n')
    (row,) = summaries(open_runs([folder]))
    assert (row["step"], row["loss"]) == (29, "0.05 (step 20)")
    assert "loss at step 20" in headline(open_runs([folder])[0])


def test_only_settings_that_differ_are_listed_and_never_the_folder(tmp_path):
    runs = open_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=2e-3)])
    assert setting_rows(runs) == [("train.lr", "0.001", "0.002")]


def test_a_setting_that_is_stored_only_if_changed_is_shown_with_its_default(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    config = json.loads((folders[1] / "config.yaml").read_text())
    (folders[1] / "config.yaml").write_text(json.dumps({**config, "model": {"qk_norm": True, "mlp": "gelu"}}))
    assert setting_rows(open_runs(folders)) == [("model.qk_norm", "false", "true")]


def test_runs_of_the_same_name_get_their_paths(tmp_path):
    runs = open_runs([write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run")])
    assert [run.name for run in runs] == [str(tmp_path / name / "run") for name in "xy"]


def test_each_folder_that_cannot_be_compared_is_a_line(tmp_path):
    good = write_run(tmp_path / "good")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("train: {}\n")
    with pytest.raises(InputError) as caught:
        open_runs([good, tmp_path / "absent", tmp_path / "new", good])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert "absent does not exist" in lines[0]
    assert "new has no metrics yet" in lines[1]
    assert "given twice" in lines[2]


def test_the_command_prints_a_line_for_each_run_and_the_verdict(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    near = features("fake", 0.5)
    write_run(tmp_path / "near", near)
    write_run(tmp_path / "far", near + 1.0)
    found = CliRunner().invoke(app, ["report", "near", "far"])
    assert found.exit_code == 0, found.output
    assert "far minus near at step 10" in found.stdout
    assert ", significant" in found.stdout
    assert "near is at step 20 of 40" in found.stderr
    assert (tmp_path / "comparison.html").is_file()
    result = json.loads(CliRunner().invoke(app, ["report", "near", "far", "--json"]).stdout.splitlines()[-1])
    assert [run["step"] for run in result["runs"]] == [20, 20]
    assert result["differences"][0]["significant"] is True
    alone = CliRunner().invoke(app, ["report", "near"])
    assert alone.exit_code == 0
    assert (tmp_path / "near" / "report.html").is_file()
    assert CliRunner().invoke(app, ["report", "nowhere"]).exit_code == 2
