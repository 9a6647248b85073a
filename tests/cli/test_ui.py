# SPDX-License-Identifier: Apache-2.0
"""``latte ui`` before it serves: what is missing or wrong is one line and exit code 2."""

import importlib.metadata
import socket

import pytest
from typer.testing import CliRunner

from latte.cli.main import app

RUN = CliRunner()


def refused(*words: str, **environment) -> str:
    """Return the line of an error of ``latte ui words...``."""
    done = RUN.invoke(app, ["ui", *words], env=environment)
    assert done.exit_code == 2, done.output
    (line,) = done.output.strip().splitlines()
    return line


@pytest.fixture
def gradio(monkeypatch):
    """Make gradio 6.31 look installed."""
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "6.31.0" if name == "gradio" else real(name)
    )


def test_without_the_extra_the_line_says_how_to_install(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "pip install 'latte-video[ui]'" in refused()


@pytest.mark.parametrize("found", ["5.49.1", "6.19.0", "4.0"])
def test_a_gradio_with_known_holes_is_refused(monkeypatch, found):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: found)
    line = refused()
    assert found in line
    assert "6.20" in line


def test_listening_elsewhere_needs_a_password(gradio):
    assert "LATTE_UI_AUTH" in refused("--host", "0.0.0.0")
    assert "USER:PASSWORD" in refused("--host", "0.0.0.0", LATTE_UI_AUTH="secret")


def test_a_busy_port_is_one_line(gradio, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = refused("--port", str(taken.getsockname()[1]), "--out", str(tmp_path / "out"))
    assert "another program may have it" in line


def test_what_is_no_folder_is_refused(gradio, tmp_path):
    assert "--runs" in refused("--runs", str(tmp_path / "nothing"))
    assert "--data" in refused("--data", str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("x")
    assert "--out" in refused("--out", str(tmp_path / "file"))
