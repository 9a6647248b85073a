# SPDX-License-Identifier: Apache-2.0
"""The scripts of ``latte completion``: bash runs its own, those of zsh and fish hold the same words."""

import shutil
import subprocess

import pytest
import typer

from latte.cli.completion import walk
from latte.cli.main import app
from latte.config.run import recipes
from latte.diffusion.config import SAMPLERS

TRY = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_latte; printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_recipes_and_names(latte, tmp_path):
    script = tmp_path / "latte.bash"
    script.write_text(latte("completion", "bash").out)

    def completed(*words: str) -> list[str]:
        command = ["bash", "-u", "-c", TRY, "bash", str(script), "latte", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert completed("tr") == ["train"]
    assert completed("data", "sc") == ["scan"]
    assert set(completed("train", "")) >= {*recipes(), "--out", "train.lr="}
    assert completed("train", "shapes-ti") == ["shapes-tiny"]
    assert completed("data", "scan", "shapes-ti") == ["shapes-tiny"]
    assert completed("sample", "--sampler", "") == list(SAMPLERS)
    assert completed("evaluate", "--protocol", "latte-paper-t") == ["latte-paper-taichi"]
    assert completed("config", "list", "sam") == ["samplers"]
    assert completed("train", "shapes", "data.reso") == ["data.resolution="]
    assert completed("plan", "--mem") == ["--memory"]
    assert completed("brew", "x") == []


def test_zsh_loads_the_function_of_bash(latte):
    lines = latte("completion", "zsh").out.splitlines()
    assert lines[1] == "autoload -U +X bashcompinit && bashcompinit"
    assert lines[3:] == latte("completion", "bash").out.splitlines()[1:]


def test_fish_has_a_line_for_every_command_and_option(latte):
    lines = latte("completion", "fish").out.splitlines()
    for path, found in walk(typer.main.get_command(app)):
        last = path.split()[-1] if path else "__fish_use_subcommand"
        for name in found.subcommands:
            assert any(last in line and f" -a {name} " in line for line in lines), (path, name)
        for option in found.options:
            assert any(last in line and f" -l {option.removeprefix('--')} " in line for line in lines), option
    samplers = " ".join(SAMPLERS)
    assert any("-l sampler -x -a" in line and samplers in line for line in lines)


def test_another_shell_is_refused_by_name(latte):
    found = latte("completion", "bsh")
    assert (found.code, len(found.errors)) == (2, 1)
    assert found.errors[0].startswith(
        "error: SHELL is 'bsh', which is not one of bash, zsh, fish; did you mean"
    )
