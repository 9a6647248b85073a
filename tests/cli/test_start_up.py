# SPDX-License-Identifier: Apache-2.0
"""What a command imports before it needs it: torch not for settings and help, diffusers only for codecs of
its own.

Each case is a process of its own; the modules that it has imported at its end are read from it. The many
cases that import no torch are forks of one process that has imported the command line alone.
"""

import json
import subprocess
import sys

import pytest

from latte.config.run import load_run
from latte.profile.plan import plan

RUN = """
import json, sys
sys.argv = ["latte", *sys.argv[1:]]
code = 0
try:
    from latte.cli.main import main
    main()
except SystemExit as leaving:
    code = leaving.code
print(json.dumps([code, sorted(sys.modules)]))
"""


FORKED = """
import json, os, sys
from latte.cli.main import main
for words in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with os.fdopen(reading) as answer:
            print(answer.read(), flush=True)
        os.wait()
        continue
    sys.argv = ["latte", *words]
    code = 0
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code
    os.write(writing, json.dumps([code, sorted(name for name in sys.modules if "." not in name)]).encode())
    os._exit(0)
"""

LIGHT = [
    (["config", "show", "ffs-joint"], 0),
    (["config", "show", "shapes-text", "codec.name=builtin_temporal", "data.frames=17"], 0),
    (["config", "list", "keys"], 0),
    (["config", "list", "recipes"], 0),
    (["config", "list", "samplers"], 0),
    (["config", "list", "codecs"], 0),
    (["config", "list", "no-such-kind"], 2),
    (["plan", "--help"], 0),
    (["train", "--help"], 0),
    (["sample", "--help"], 0),
    (["bench"], 0),
    (["bench", "--help"], 0),
    (["bench", "shapes", "train.lr=-1"], 2),
    (["train", "shapes", "model.sise=S"], 2),
    (["train", "shapes", "train.lr=-1"], 2),
    (["launch", "slurm", "shapes", "--gpus", "2"], 0),
    (["plan", "ffs", "data.frames=three"], 2),
    (["ablate", "no-such-recipe"], 2),
]


def imported(*words: str) -> tuple[int, set[str]]:
    """Return the exit code of ``latte words...`` and the modules that it imported."""
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, set(modules)


@pytest.fixture(scope="module")
def answers() -> list[tuple[int, set[str]]]:
    """Exit code and outermost imported modules of each command of LIGHT."""
    commands = json.dumps([words for words, _ in LIGHT])
    done = subprocess.run(
        [sys.executable, "-c", FORKED, commands], capture_output=True, text=True, check=True, timeout=200
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(LIGHT)
    return [(code, set(modules)) for code, modules in found]


@pytest.mark.parametrize("number", range(len(LIGHT)), ids=[" ".join(words) for words, _ in LIGHT])
def test_settings_help_and_bad_keys_import_no_torch(answers, number):
    code, modules = answers[number]
    assert code == LIGHT[number][1]
    assert "latte" in modules
    assert not {"torch", "diffusers"} & modules


def test_a_second_plan_imports_neither_the_compiler_nor_the_codecs_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan(load_run("ffs", ["model.size=S"])[0], "cpu", kept=True)
    code, modules = imported("plan", "ffs", "model.size=S", "--device", "cpu")
    assert code in (0, None)
    assert "torch" in modules
    assert not {"diffusers", "transformers", "torch._dynamo", "sympy"} & modules


def test_sampling_with_the_built_in_model_imports_no_diffusers_and_no_compiler(tmp_path):
    code, modules = imported(
        "sample", "builtin-shapes", "--count", "1", "--steps", "2", "--out", str(tmp_path / "clips")
    )
    assert code in (0, None)
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 1
    assert "torch" in modules
    assert not {"diffusers", "transformers", "torch._dynamo", "sympy"} & modules
