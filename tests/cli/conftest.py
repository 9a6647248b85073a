# SPDX-License-Identifier: Apache-2.0
"""The program in this process: ``latte("plan", "ffs")`` -> exit code, stdout, stderr, the object of --json."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from latte.cli.main import app
from tiny import WORDS


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The object of the last line of stdout."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def errors(self) -> list[str]:
        """The lines of stderr that report an error."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def latte(capfd, tmp_path, monkeypatch) -> Callable[..., Answer]:
    """Call the program in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*words: object) -> Answer:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            app(args=[str(word) for word in words], prog_name="latte")
        found = capfd.readouterr()
        return Answer(left.value.code or 0, found.out, found.err)

    return call


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """A finished run of two steps. Copy it before changing it."""
    return train(tmp_path_factory.mktemp("runs") / "tiny", "shapes")


@pytest.fixture(scope="session")
def text_run_folder(tmp_path_factory):
    """A finished run of two steps of a model that reads captions. Copy it before changing it."""
    return train(tmp_path_factory.mktemp("runs") / "words", "shapes-text")


def train(folder: Path, recipe: str) -> Path:
    """``folder``, with the smallest run of a recipe in it."""
    with pytest.raises(SystemExit) as left:
        app(args=["train", recipe, *WORDS, "train.steps=2", "--out", str(folder)], prog_name="latte")
    assert not left.value.code
    return folder
