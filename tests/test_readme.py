# SPDX-License-Identifier: Apache-2.0
"""The README is true: its two commands, what .ci/run runs, every ``latte`` line, file and Python block."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL_AND_RUN = "python3 -m venv .venv && .venv/bin/python -m pip install -q -e . && .venv/bin/latte demo"
INSTALL_AND_TEST = "python3 -m venv .venv && .venv/bin/python -m pip install -q -e '.[test]' && .venv/bin/python -m pytest -q"


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every line of the shell blocks and every inline `latte ...`, without comments and environment."""
    lines = [line for block in blocks(text, "(?:sh|bash|console)?") for line in block.splitlines()]
    lines += re.findall(r"`(latte [^`]*)`", text)
    return [line.split("#")[0].strip().replace(".venv/bin/latte", "latte") for line in lines if line.strip()]


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


def unknown(line: str) -> str | None:
    """The command or option in a ``latte ...`` line that does not exist; None when all exist."""
    from latte.cli.main import app

    here, words = typer.main.get_command(app), shlex.split(line)[1:]
    while hasattr(here, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in here.commands:
            return name
        here = here.commands[name]
    options = {
        option for parameter in here.params for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help"}
    given = [word.split("=")[0] for word in words if word.startswith("--") and "." not in word]
    return next((word for word in given if word not in options), None)


def test_every_latte_line_exists():
    lines = [
        part.strip()
        for line in commands(README)
        for part in line.split("&&")
        if part.strip().startswith("latte ")
    ]
    assert len(lines) >= 5
    assert [(line, unknown(line)) for line in lines if unknown(line)] == []


def test_a_line_that_does_not_exist_is_noticed():
    assert unknown("latte brew") == "brew"
    assert unknown("latte demo --sugar 2") == "--sugar"
    assert unknown("latte data brew x") == "brew"
    assert unknown("latte --help") is None


def test_every_file_that_the_documents_name_exists():
    for page in (
        "README.md",
        "README.zh-CN.md",
        "CONTRIBUTING.md",
        "docs/architecture.md",
        "docs/results.md",
    ):
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"\]\((?!http|#)([^)#]+)", text)
        assert [name for name in named if not (ROOT / page).parent.joinpath(name).exists()] == [], page


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
