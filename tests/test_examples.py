# SPDX-License-Identifier: Apache-2.0
"""The examples run: scripts of at most 40 lines, and a notebook without outputs."""

import ast
import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = {  # script: its arguments here, the last line that it prints
    "train_custom_dataset.py": (["2", "run"], "uint8 (2, 8, 32, 32, 3)"),
    "custom_autoencoder.py": (["2", "run"], "(1, 8, 32, 32, 3)"),
    "custom_sampler.py": (["2"], "clipped: uint8 (1, 8, 64, 64, 3), see clipped.mp4"),
}
NOTEBOOK = EXAMPLES / "first_minute.ipynb"


@pytest.fixture
def tables():
    """The tables that examples add to, as they were before."""
    from latte.autoencoder.codec import CODECS
    from latte.diffusion.config import SAMPLERS

    yield
    CODECS.pop("shuffle", None)
    SAMPLERS.pop("clipped", None)


def test_every_example_is_tested_and_short():
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == set(SCRIPTS)
    lines = {name: len((EXAMPLES / name).read_text("utf-8").splitlines()) for name in SCRIPTS}
    assert {name: count for name, count in lines.items() if count > 40} == {}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys, tables):
    arguments, last = SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert list(tmp_path.rglob("*.mp4")) or name == "custom_autoencoder.py"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_the_notebook_has_no_outputs_and_is_small():
    assert [cell for cell in cells() if cell.get("outputs") or cell.get("execution_count")] == []
    assert NOTEBOOK.stat().st_size < 20_000


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sources = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    assert len(sources) >= 6
    names: dict = {"__name__": "notebook"}
    for source in sources:
        source = source.replace("STEPS = 60", "STEPS = 2")
        ast.parse(source)
        exec(compile(source, NOTEBOOK.name, "exec"), names)
    printed = capsys.readouterr().out
    assert "True" in printed.splitlines(), "a clip does not depend on its batch"
    assert names["result"]["step"] == 2
    assert (tmp_path / "up.mp4").is_file()
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.nightly
@pytest.mark.skipif(
    not (importlib.util.find_spec("nbclient") and importlib.util.find_spec("ipykernel")),
    reason="needs nbclient and ipykernel",
)
def test_the_notebook_runs_in_a_kernel(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs" / "squares").is_dir()
