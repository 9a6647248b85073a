# SPDX-License-Identifier: Apache-2.0
"""Trackers: what each gets, refused when absent, given up when they fail."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from latte.checks import InputError
from latte.data.writers import write_mp4
from latte.training.callbacks import Callback
from latte.training.config import TrainConfig
from latte.training.trackers import TRACKERS, check_trackers, media_name
from tiny_runs import SHORT, curve, run


class FakeRun:
    """What both wandb and trackio do, recorded."""

    def __init__(self, fail_at: int | None = None):
        self.fail_at = fail_at
        self.inits: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0
        self.Video = lambda path: ("video", path)
        self.Image = lambda path: ("image", path)

    def init(self, **settings):
        self.inits.append(settings)
        return self

    def log(self, values, step):
        if self.fail_at is not None and step >= self.fail_at:
            raise ConnectionError("the server\nis gone")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def sample_files(folder: Path):
    """A ``sample`` of train that writes a sheet and a clip."""

    def sample(model, step):
        sheet, clip = folder / f"step-{step:07d}.png", folder / f"step-{step:07d}" / "7.mp4"
        clip.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(sheet)
        write_mp4(clip, np.zeros((3, 16, 16, 3), np.uint8), 8)
        return [sheet, clip]

    return sample


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_metrics_and_samples_and_continues_under_the_same_name(tmp_path, monkeypatch, name):
    fake = FakeRun()
    monkeypatch.setitem(sys.modules, name, fake)
    config = replace(SHORT, steps=6, trackers=(name,), sample_every=6)
    run(tmp_path / "run", replace(config, steps=3), sample=sample_files(tmp_path))
    run(tmp_path / "run", config, sample=sample_files(tmp_path))
    numbers = {step: values for step, values in fake.logged if "train/loss" in values}
    lines = {line["step"]: line for line in curve(tmp_path / "run")}
    assert numbers.keys() == lines.keys()
    for step, values in numbers.items():
        assert values["train/loss"] == lines[step]["loss"]
        assert {"train/lr", "train/grad_norm", "train/clips_per_second", "train/memory_gib"} <= values.keys()
    media = [values for _, values in fake.logged if "train/loss" not in values]
    assert {"samples/sheet", "samples/7"} == {key for values in media for key in values}
    assert {value[0] for values in media for value in values.values()} == {"image", "video"}
    assert fake.finished == 2
    ids = {settings.get("id", settings["name"]) for settings in fake.inits}
    assert len(ids) == 1
    assert fake.inits[0]["config"]["train"]["global_batch"] == 4


def test_a_tracker_that_fails_says_so_once_and_the_run_is_the_same(tmp_path, monkeypatch, capsys):
    fake = FakeRun(fail_at=4)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    watched = run(tmp_path / "watched", replace(SHORT, trackers=("wandb",)))
    shown = capsys.readouterr().err
    assert shown.count("wandb failed at step 4 (ConnectionError: the server)") == 1
    assert shown.count("warning: wandb") == 1
    assert [step for step, _ in fake.logged] == [1, 2]
    plain = run(tmp_path / "plain", SHORT)
    assert watched["weights_sha256"] == plain["weights_sha256"]
    assert curve(tmp_path / "watched") == curve(tmp_path / "plain")


def test_a_tracker_that_cannot_be_opened_is_refused_before_the_first_step(tmp_path, monkeypatch):
    fake = FakeRun()
    fake.init = lambda **settings: (_ for _ in ()).throw(ConnectionError("no network"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(InputError, match=r"wandb could not be started .*no network.*WANDB_MODE=offline"):
        run(tmp_path, replace(SHORT, trackers=("wandb",)))
    assert curve(tmp_path) == []


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=f"the package {name} cannot be imported .*pip install {name}"):
        check_trackers([name])
    with pytest.raises(InputError, match=f"pip install {name}"):
        run(tmp_path, replace(SHORT, trackers=(name,)))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_unknown_tracker_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"train\.trackers.*tensorboard"):
        TrainConfig(trackers=("tensorbord",))


class FakeSummaryWriter:
    """torch's SummaryWriter, recorded."""

    made: ClassVar[list] = []

    def __init__(self, folder, purge_step):
        self.purge_step, self.scalars, self.images, self.closed = purge_step, [], [], False
        FakeSummaryWriter.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, float(value), step))

    def add_image(self, name, picture, step, dataformats):
        self.images.append((name, picture.shape, step, dataformats))

    def flush(self):
        pass

    def close(self):
        self.closed = True


def test_tensorboard_gets_every_number_and_hides_what_is_written_again(tmp_path, monkeypatch):
    FakeSummaryWriter.made.clear()
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FakeSummaryWriter)
    )
    config = replace(SHORT, trackers=("tensorboard",), sample_every=3)

    def sheet(model, step):
        return sample_files(tmp_path)(model, step)[:1]

    run(tmp_path / "run", replace(config, steps=3), sample=sheet)
    run(tmp_path / "run", replace(config, steps=6), sample=sheet)
    first, second = FakeSummaryWriter.made
    assert (first.purge_step, second.purge_step) == (1, 4)
    losses = {step: value for name, value, step in second.scalars if name == "train/loss"}
    lines = {line["step"]: line["loss"] for line in curve(tmp_path / "run")}
    assert losses == {step: lines[step] for step in (4, 6)}
    assert second.images == [("samples/sheet", (8, 8, 3), 6, "HWC")]
    assert first.closed
    assert second.closed


class Recorder(Callback):
    """Every event by name."""

    def __init__(self):
        self.seen = []

    def on_start(self, event):
        self.seen.append(("start", event.step))

    def on_step(self, event):
        self.seen.append(("step", event.step))

    def on_checkpoint(self, event, path):
        self.seen.append(("checkpoint", event.step, path.name))

    def on_end(self, event):
        self.seen.append(("end", event.step))


def test_callbacks_from_python_see_the_run_and_its_settings(tmp_path):
    recorder = Recorder()
    run(tmp_path, replace(SHORT, steps=4, checkpoint_every=3), callbacks=[recorder])
    assert recorder.seen[0] == ("start", 0)
    assert [item[1] for item in recorder.seen if item[0] == "step"] == [1, 2, 3, 4]
    assert [item[2] for item in recorder.seen if item[0] == "checkpoint"] == ["step-3", "step-4"]
    assert recorder.seen[-1] == ("end", 4)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert torch.is_grad_enabled()


def test_names_of_samples_keep_the_weights_apart(tmp_path):
    folder = tmp_path / "samples"
    names = {
        folder / "step-0000100.png": "sheet",
        folder / "step-0000100" / "seed-0001.mp4": "seed-0001",
        folder / "step-0000100-ema-0.05.png": "ema-0.05/sheet",
        folder / "step-0000100-ema-0.05" / "seed-0001.mp4": "ema-0.05/seed-0001",
        tmp_path / "elsewhere" / "7.mp4": "7",
    }
    assert {path: media_name(path, 100) for path in names} == names
