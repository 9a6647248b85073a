# SPDX-License-Identifier: Apache-2.0
"""``latte data split`` and ``latte data caption``: what they print, and their exit codes."""

import json

import pytest
from typer.testing import CliRunner

from latte.cli.main import app
from videos import encode, shots


@pytest.fixture
def video(tmp_path):
    """A video of two shots, beside a file that is no video."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.mp4").write_bytes(b"no video")
    return encode(tmp_path / "in" / "v.mp4", shots(30, 40))


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_split_reports_clips_rules_and_what_was_skipped(video, tmp_path):
    out = tmp_path / "out"
    found = run("data", "split", video.parent, "--out", out, "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout.splitlines()[-1])
    assert (result["videos"], result["clips"], result["dropped"]) == (1, 2, 0)
    assert result["rules"] == {"start": 1, "cut": 1}
    assert result["copied"] + result["encoded"] == 2
    assert [bad["path"] for bad in result["skipped"]] == ["broken.mp4"]
    words = run("data", "split", video.parent, "--out", out)
    assert "1 videos, 2 clips" in words.stdout
    assert "skipped: broken.mp4 (not-a-video: " in words.stdout


def test_split_of_nothing_usable_fails(video, tmp_path):
    found = run("data", "split", video.parent / "broken.mp4", "--out", tmp_path / "out")
    assert found.exit_code == 1
    assert "skipped: broken.mp4" in found.stdout
    missing = run("data", "split", tmp_path / "nothing", "--out", tmp_path / "out")
    assert missing.exit_code == 2
    assert "no such folder" in missing.stderr


def test_caption_reports_counts_and_every_clip_that_failed(video, monkeypatch):
    class Fake:
        frames = None

        def __init__(self, *arguments):
            self.calls = 0

        def __call__(self, frames):
            self.calls += 1
            return "a clip"

    monkeypatch.setattr("latte.data.captioner.Captioner", Fake)
    found = run("data", "caption", video.parent, "--model", "tiny/model", "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout.splitlines()[-1])
    assert (result["clips"], result["captioned"], result["kept"]) == (1, 1, 0)
    assert result["skipped"][0]["path"].endswith("broken.mp4")
    again = run("data", "caption", video.parent, "--model", "tiny/model")
    assert "1 videos, 0 captions written, 1 kept" in again.stdout
    assert "broken.mp4 (not-a-video: " in again.stdout
    assert run("data", "caption", "nowhere", "--model", "tiny/model").exit_code == 2
