# SPDX-License-Identifier: Apache-2.0
"""The README is true: its two commands, what .ci/run runs, its Python blocks. Its other commands and links:
test_book.py.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from book import blocks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = "python3 -m venv .venv && .venv/bin/python -m pip install -q -e {} -c .ci/constraints.txt"
INSTALL_AND_RUN = INSTALL.format(".") + " && .venv/bin/latte demo"
INSTALL_AND_TEST = INSTALL.format("'.[test]'") + " && .venv/bin/python -m pytest -q"


def ci_steps(script: str) -> list[str]:
    """The commands of .ci/run that do something, as the README would write them."""
    lines = [line for line in script.splitlines() if re.match(r"(\[|\.venv|python)", line)]
    return [
        re.sub(r'^\[ .* \] \|\| "\$\{PYTHON:-python3\}"', "python3", line).removesuffix(' "$@"')
        for line in lines
    ]


def drift(readme: str, script: str) -> list[str]:
    """What differs between the README's two commands, the agreed ones, and .ci/run."""
    found = [
        f"README lacks: {line}"
        for line in (INSTALL_AND_RUN, INSTALL_AND_TEST)
        if line not in readme.splitlines()
    ]
    if ci_steps(script) != INSTALL_AND_TEST.split(" && "):
        found.append(f".ci/run runs {ci_steps(script)}")
    return found


def test_the_two_commands_are_the_agreed_ones_and_ci_runs_the_second():
    script = ROOT / ".ci" / "run"
    assert drift(README, script.read_text(encoding="utf-8")) == []
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [("pytest -q", "pytest -x"), ("'.[test]'", "'.[dev]'"), (" -m venv .venv", " -m venv env")],
)
def test_drift_is_noticed(old, new):
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert drift(README, script.replace(old, new)) != []
    assert drift(README.replace(old, new), script) != []


def test_the_architecture_page_is_complete():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([\w./]+)` \|", page, re.MULTILINE)
    source = ROOT / "src" / "latte"
    here = {f"{path.name}/" for path in source.iterdir() if path.is_dir() and path.name != "__pycache__"}
    here |= {path.name for path in source.glob("*.py")}
    assert here - set(listed) == set(), "packages and top-level modules that the page lacks"
    assert [name for name in listed if not (source / name).exists()] == [], "listed but not there"
    core = [name for name in listed if "/" in name.rstrip("/")]
    assert 20 <= len(core) <= 28


def test_the_storeys_of_the_page_are_the_tested_ones():
    from test_storeys import STOREYS

    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^(\d)  (.*)$", page, re.MULTILINE)
    assert len(rows) == len(STOREYS)
    for number, text in rows:
        absent = {"report", "ui"}  # planned names that hold a place
        assert [name for name in STOREYS[int(number)] if name not in text and name not in absent] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(README, "python")
    assert code
    for block in code:
        exec(compile(block, "README.md", "exec"), {})


def test_no_block_asks_for_a_banned_way_in():
    assert not re.search(r"--extra-index-url|curl .*\| *(ba)?sh|sudo ", README)


def test_the_numbers_of_the_built_in_model_are_those_of_its_card():
    card = (ROOT / "src/latte/builtin/README.md").read_text(encoding="utf-8")
    row = next(line for line in card.splitlines() if "held out of training" in line)
    expected = [round(float(share)) for share in re.findall(r"\| (\d+\.\d) %", row)[:4]]
    sentence = README.split("held out of training", 1)[1].split("(docs/results.md)")[0]
    assert [int(share) for share in re.findall(r"(\d+) %", sentence)] == expected
