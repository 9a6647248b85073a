# SPDX-License-Identifier: Apache-2.0
"""report.html of a run: complete, self-contained, small, and never a reason to stop."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from latte.checks import InputError
from latte.config.describe import changed_settings
from latte.data.writers import write_mp4
from latte.training import report
from latte.training.callbacks import Callback
from latte.training.history import check_comparable, read_history
from latte.training.report import FILE, RunReport, caption_of, embeddable, write_report
from latte.training.trackers import one_line
from tiny_runs import SHORT, Latents, run


def tree(path: Path) -> ElementTree.Element:
    return ElementTree.fromstring(path.read_text("utf-8"))


def titles(path: Path) -> list[str]:
    """The titles of the plots."""
    return [str(svg.get("aria-label")) for svg in tree(path).iter("svg") if svg.get("aria-label")]


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def made_up(folder: Path, steps: int = 10_000, every: int = 1, clips: int = 0) -> Path:
    """A run folder with a line a step, held-out losses, scores, and samples of ``clips`` bytes each."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text("train:\n  steps: 20000\ndata:\n  resolution: 64\n")
    lines = [
        {
            "step": step,
            "loss": 1 / step,
            "grad_norm": 1.0,
            "lr": 1e-4,
            "clips_per_second": 8.0,
            "seconds": step,
        }
        for step in range(1, steps + 1, every)
    ]
    write_lines(folder / "metrics.jsonl", lines)
    held_out = [
        {"step": step, "validation/loss": 2 / step, "validation/loss_t0-249": 1.0}
        for step in range(100, steps + 1, 100)
    ]
    scores = [{"step": step, "score/fvd": 9.5} for step in range(1000, steps + 1, 1000)]
    write_lines(folder / "validation.jsonl", [*held_out, *scores])
    for step in range(1000, steps + 1, 1000) if clips else ():
        (folder / "samples" / f"step-{step:07d}.png").write_bytes(b"")
        clip_folder = folder / "samples" / f"step-{step:07d}"
        clip_folder.mkdir()
        for clip in range(4):
            (clip_folder / f"seed-{clip:04d}-{clip}-up-left.mp4").write_bytes(bytes(clips))
    return folder


def test_a_run_has_its_report_from_the_first_to_the_last_step(tmp_path):
    seen = []

    class Look(Callback):
        def on_step(self, event):
            seen.append(FILE in {path.name for path in event.run_dir.iterdir()})

    def sample(model, step):
        path = tmp_path / "samples" / f"step-{step:07d}.png"
        clip = path.with_suffix("") / "seed-0003-0-up.mp4"
        write_mp4(clip, np.full((2, 16, 16, 3), step, np.uint8))
        path.write_bytes(b"")
        return [path, clip]

    config = replace(SHORT, steps=6, sample_every=3, validate_every=2)
    run(tmp_path, config, sample=sample, held_out=Latents(), callbacks=[Look()])
    assert seen
    assert all(seen)
    page = tree(tmp_path / FILE)
    assert titles(tmp_path / FILE)[::2][:2] == ["Loss", "Held-out loss"]
    text = " ".join(page.itertext())
    assert "Step 6 of 6." in text
    assert "latte sample" in text, "what comes after the last step"
    slides = [item for item in page.iter("div") if item.get("class") == "slide"]
    assert [slide.get("data-name") for slide in slides] == ["3", "6"]
    assert [slide.get("hidden") for slide in slides] == ["", None], "the newest one is shown"
    assert len(list(page.iter("video"))) == 2
    assert "seed 3, up" in text


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    page = write_report(made_up(tmp_path / "run", 1000, clips=100)).read_text("utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) > 1
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?:|@import|url\(|fetch|XMLHttp", page)


def test_ten_thousand_lines_and_large_clips_stay_small(tmp_path):
    folder = made_up(tmp_path / "run", 10_000, clips=1 << 20)
    size = write_report(folder).stat().st_size
    assert 1 << 20 < size < 20 << 20
    page = tree(folder / FILE)
    shown = [slide.get("data-name") for slide in page.iter("div") if slide.get("class") == "slide"]
    assert shown == ["1,000", "10,000"], "10 steps of 4 MiB do not fit, two do"
    assert "2 of 10 steps" in " ".join(page.itertext())


def test_evenly_spaced_steps_fit_the_limit(monkeypatch, tmp_path):
    clip = tmp_path / "a.mp4"
    clip.write_bytes(bytes(10))
    samples = [{step: [clip] for step in range(9)}]
    monkeypatch.setattr(report, "VIDEO_BYTES", 50)
    assert embeddable(range(9), samples) == [0, 2, 4, 6, 8]
    monkeypatch.setattr(report, "VIDEO_BYTES", 10)
    assert embeddable(range(9), samples) == [8]
    monkeypatch.setattr(report, "VIDEO_BYTES", 9)
    assert embeddable(range(9), samples) == []


def test_a_failure_is_printed_once_and_the_run_trains_to_its_end(tmp_path, monkeypatch, capsys):
    calls = []

    def broken(folder, changes):
        calls.append(folder)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_report", broken)
    assert run(tmp_path, replace(SHORT, steps=6))["step"] == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if FILE in line]
    assert len(calls) == len(lines) == 1
    assert "No space left on device" in lines[0]
    assert "training continues without it" in lines[0]


def test_without_the_setting_there_is_no_report(tmp_path):
    run(tmp_path / "off", replace(SHORT, steps=2, report=False))
    assert not (tmp_path / "off" / FILE).exists()
    plain = run(tmp_path / "on", replace(SHORT, steps=2))
    assert (tmp_path / "on" / FILE).is_file()
    assert plain["step"] == 2


def test_writing_stops_where_it_would_cost_too_much(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(report, "write_report", lambda folder, changes: written.append(folder))
    run(tmp_path, replace(SHORT, steps=12, checkpoint_every=1))
    usual = len(written)
    assert usual > 6, "a page that costs nothing is written at every checkpoint"
    monkeypatch.setattr(report, "SHARE", -1.0)
    written.clear()
    run(tmp_path / "again", replace(SHORT, steps=12, checkpoint_every=1))
    assert len(written) == 2, "at the start and at the end"


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"missing does not exist; give a run folder"):
        read_history(tmp_path / "missing")
    with pytest.raises(InputError, match=r"has no config\.yaml that can be read"):
        read_history(tmp_path)
    (tmp_path / "config.yaml").write_text("train: {log_every: 7}\n")
    empty = read_history(tmp_path)
    assert empty.step == 0
    with pytest.raises(InputError, match="has no metrics yet; wait until it has trained 7 steps"):
        check_comparable(empty)
    write_lines(tmp_path / "metrics.jsonl", [{"step": 3, "cost": 1.0}])
    with pytest.raises(InputError, match=r"another version of latte: metrics\.jsonl has step, cost, but no"):
        check_comparable(read_history(tmp_path))


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = made_up(tmp_path / "run", 5)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    found = read_history(folder)
    assert found.step == 5
    assert found.values("loss")[0] == [1, 2, 3, 4, 5]


def test_only_settings_that_differ_from_the_recipe_are_listed(tmp_path):
    from latte.config.run import load_run

    config, _ = load_run("shapes", ["train.lr=3e-4", f"run.dir={tmp_path}"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config)))
    (tmp_path / "command.txt").write_text("2026-01-01T00:00:00 latte train shapes train.lr=3e-4\n")
    assert changed_settings(tmp_path) == ("recipe shapes", [("train.lr", "0.001", "0.0003")])
    (tmp_path / "command.txt").write_text("2026-01-01T00:00:00 latte demo\n")
    stored = asdict(config)
    del stored["model"]["mlp"]  # stored only if it is not the default
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    name, rows = changed_settings(tmp_path)
    assert name == "the defaults"
    assert ("train.lr", "0.0001", "0.0003") in rows
    assert all(there != here for _, there, here in rows)


def test_the_report_lists_them(tmp_path):
    folder = made_up(tmp_path / "run", 5)
    path = write_report(folder, lambda folder: ("recipe shapes", [("train.lr", "1", "2")]))
    cells = [cell.text for cell in tree(path).iter("td")]
    assert cells[cells.index("train.lr") :][:3] == ["train.lr", "1", "2"]
    assert RunReport().changes is None


@pytest.mark.parametrize(
    ("name", "text"),
    [("seed-0007-2-left.mp4", "seed 7, left"), ("step-0000010.png", "step-0000010"), ("seed.mp4", "seed")],
)
def test_clips_are_named_for_people(name, text):
    assert caption_of(Path(name)) == text
    assert one_line(ValueError("a\nb")) == "ValueError: a"
