# SPDX-License-Identifier: Apache-2.0
"""The layout's rules, read from the syntax trees of src/latte: who imports whom, banned modules and calls.

Each rule is a function from (file, tree) to a list of complaints; ``test_each_rule_finds_its_violation``
proves that it can complain. The import graph has no cycle, and every module imports where POSIX is missing.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "latte"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))

# An import goes to an earlier row or stays inside its package; a row's packages do not import each other.
# All may import checks and tables, which import nothing of ours; __init__ and __main__, the entry points, have no row.
FREE = ("checks", "tables")
STOREYS = (
    ("checks", "tables", "runtime", "files", "page", "tensors"),
    ("model", "diffusion", "autoencoder", "text", "checkpoint", "distributed"),
    ("data", "interop"),
    ("evaluation", "training", "inference"),
    ("config", "recipes"),
    ("build", "profile", "scoring"),
    ("demo", "ablate", "report", "ui"),
    ("cli",),
)
STOREY = {name: number for number, names in enumerate(STOREYS) for name in names}

WITHOUT_DIFFUSERS = ("model/", "diffusion/", "evaluation/", "training/")
LAZY = {"diffusers", "av", "transformers", "gradio", "peft", "bitsandbytes"}
OF_GRADIO = ("ui/tabs.py", "ui/watch.py")  # they need the extra ui, and are imported with it only
BANNED = {
    "torchvision",
    "timm",
    "decord",
    "cv2",
    "scipy",
    "accelerate",
    "lightning",
    "pytorch_lightning",
    "hydra",
    "omegaconf",
    "einops",
    "matplotlib",
    "pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "shelve",
    "marshal",
    "requests",
}
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

UNSAFE_CALLS = {
    "pickle.load",
    "pickle.loads",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "exec",
    "os.system",
    "os.popen",
    "dcp.load",
    "torch.distributed.checkpoint.load",
    "__import__",
    "import_module",
    "importlib.import_module",
}
REVIEWED: set[tuple[str, str]] = {  # reviewed exceptions, (file, call)
    # public names, and entries of tables, imported at first use: places written in the source, never input
    ("__init__.py", "import_module"),
    ("tables.py", "import_module"),
}


@cache
def parse(file: str) -> ast.Module:
    return ast.parse((SOURCE / file).read_text(encoding="utf-8"), file)


def imports(file: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every imported module, absolute, with its line; ``from latte import x`` counts as latte.x."""
    package = ["latte", *file.split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                if node.level
                else node.module
            )
            yield from (
                (f"{base}.{alias.name}" if base == "latte" else base, node.lineno) for alias in node.names
            )


def outer_imports(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Modules imported when the file itself is: not those inside functions or under TYPE_CHECKING."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", node.lineno
        waiting.extend(ast.iter_child_nodes(node))


def breaks_storeys(file: str, tree: ast.Module) -> list[str]:
    here = file.split("/")[0].removesuffix(".py")
    if here in ("__init__", "__main__"):
        return []  # the entry points
    found = [] if here in STOREY else [f"{file}: {here} has no storey; give it one in tests/test_storeys.py"]
    for module, line in imports(file, tree):
        first, _, rest = module.partition(".")
        there = rest.split(".")[0]
        if first != "latte" or there in (here, "__version__") or (there in FREE and here not in FREE):
            continue
        if STOREY.get(there, len(STOREYS)) >= STOREY.get(here, 0):
            found.append(f"{file}:{line}: {here} imports {module}, which is not on a lower storey")
    return found


def imports_wrong_modules(file: str, tree: ast.Module) -> list[str]:
    found = []
    for module, line in imports(file, tree):
        first = module.split(".")[0]
        if first in BANNED:
            found.append(f"{file}:{line}: {first} is banned")
        if first == "diffusers" and file.startswith(WITHOUT_DIFFUSERS):
            found.append(f"{file}:{line}: no diffusers here")
        if first not in sys.stdlib_module_names | DECLARED | {"latte"}:
            found.append(f"{file}:{line}: {first} is not a dependency in pyproject.toml")
    return found + [
        f"{file}:{line}: import {m} inside the function that uses it"
        for m, line in outer_imports(tree)
        if m.split(".")[0] in LAZY and not (m.startswith("gradio") and file in OF_GRADIO)
    ]


def makes_unsafe_calls(file: str, tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        words = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if call in UNSAFE_CALLS and (file, call) not in REVIEWED:
            found.append(f"{file}:{node.lineno}: {call}")
        if call == "torch.load" and words.get("weights_only") != "True":
            found.append(f"{file}:{node.lineno}: torch.load without weights_only=True")
        if (
            words.get("weights_only") == "False"
            or words.get("shell", "False") != "False"
            or words.get("allow_pickle", "False") != "False"
        ):
            found.append(f"{file}:{node.lineno}: {call} with weights_only=False, shell or allow_pickle")
    return found


def _declared() -> set[str]:
    """Import names of the dependencies and extras that pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.match(r"[\w.-]+", name).group().lower().replace("-", "_") for name in requirements}
    names |= {"yaml" if "pyyaml" in names else "", "PIL" if "pillow" in names else ""} - {""}
    return names | {"fsspec"}  # torch requires it itself


DECLARED = _declared()
RULES = (breaks_storeys, imports_wrong_modules, makes_unsafe_calls)


def module_of(file: str) -> str:
    """'data/media.py' -> 'latte.data.media'."""
    return ".".join(["latte", *file.removesuffix(".py").removesuffix("/__init__").split("/")])


def graph_of(sources: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports anywhere in its file, except under TYPE_CHECKING."""
    modules = {module_of(file): (file, tree) for file, tree in sources.items()}
    graph = {}
    for module, (file, tree) in modules.items():
        typing_only = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        found = {name for name, _ in imports(file, tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node not in typing_only:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        hidden = {node.module for node in typing_only if isinstance(node, ast.ImportFrom)}
        graph[module] = (found & modules.keys()) - hidden - {module}
    return graph


def cycle_of(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some cycle, empty when there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            if cycle := visit(imported, [*path, module]):
                return cycle
        done.add(module)
        return []

    return next((cycle for module in graph if (cycle := visit(module, []))), [])


def test_no_module_imports_itself_through_others():
    assert cycle_of(graph_of({file: parse(file) for file in FILES})) == []


def test_the_cycle_search_finds_one():
    sources = ("def f():\n    from latte.b import c", "from latte import c", "import latte.a")
    trees = {f"{name}.py": ast.parse(text) for name, text in zip("abc", sources, strict=True)}
    assert cycle_of(graph_of(trees)) == ["latte.a", "latte.b", "latte.c", "latte.a"]
    trees["c.py"] = ast.parse("if TYPE_CHECKING:\n    from latte.a import f")
    assert cycle_of(graph_of(trees)) == []


def test_at_most_eight_storeys():
    assert len(STOREYS) <= 8


WITHOUT_POSIX = """
import importlib, os, signal, sys, sysconfig
sysconfig.get_config_vars()
# these may use POSIX themselves:
import torch, numpy, PIL.Image, yaml, pydantic, typer, safetensors, rich, huggingface_hub.repocard
missing = ["fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline"]
sys.modules.update(dict.fromkeys(missing))  # None: import raises ImportError
ours = "fork getuid geteuid getgid sysconf mkfifo mknod fchmod chown getpgid setsid killpg O_DIRECTORY"
signals = "SIGHUP SIGUSR1 SIGUSR2 SIGKILL SIGALRM SIGPIPE setitimer alarm pthread_sigmask"
for module, names in ((os, ours), (signal, signals)):
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
sys.platform = "win32"
failed = []
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except (ImportError, AttributeError) as error:
        failed.append(f"{name}: {error}")
print(len(sys.argv) - 1, failed)
"""


def test_every_module_imports_without_posix():
    modules = [module_of(file) for file in FILES if not file.startswith(("__main__", *OF_GRADIO))]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_POSIX, *modules, "fcntl"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.startswith(f"{len(modules) + 1} ['fcntl: "), "the injected fault, the last, is all"


@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps_the_rule(rule):
    assert len(FILES) > 10
    assert [complaint for file in FILES for complaint in rule(file, parse(file))] == []


@pytest.mark.parametrize(
    ("rule", "file", "violation"),
    [
        (breaks_storeys, "model/latte.py", "from latte.training.train import train"),
        (breaks_storeys, "model/latte.py", "from latte.data import clips"),
        (breaks_storeys, "model/latte.py", "def f():\n    import latte.config.run"),
        (breaks_storeys, "model/latte.py", "from ..data import clips"),
        (breaks_storeys, "model/latte.py", "from latte import Latte"),
        (breaks_storeys, "checks.py", "from latte import runtime"),
        (breaks_storeys, "novelty.py", "import math"),
        (imports_wrong_modules, "data/media.py", "import av"),
        (imports_wrong_modules, "data/media.py", "try:\n    import av\nexcept ImportError:\n    av = None"),
        (imports_wrong_modules, "data/media.py", "class Reader:\n    from diffusers import DDPMScheduler"),
        (imports_wrong_modules, "training/loop.py", "def f():\n    import diffusers"),
        (imports_wrong_modules, "diffusion/samplers.py", "def f():\n    import diffusers"),
        (imports_wrong_modules, "data/clips.py", "def f():\n    import torchvision.transforms"),
        (imports_wrong_modules, "data/clips.py", "import pandas"),
        (makes_unsafe_calls, "checkpoint/run.py", "torch.load(path)"),
        (makes_unsafe_calls, "checkpoint/run.py", "torch.load(path, weights_only=False)"),
        (makes_unsafe_calls, "checkpoint/run.py", "torch.jit.load(path)"),
        (makes_unsafe_calls, "checkpoint/run.py", "np.load(path, allow_pickle=True)"),
        (makes_unsafe_calls, "checkpoint/run.py", "subprocess.run(line, shell=True)"),
        (makes_unsafe_calls, "checkpoint/run.py", "yaml.load(text, Loader)"),
        (makes_unsafe_calls, "checkpoint/run.py", "eval(text)"),
        (makes_unsafe_calls, "model/latte.py", "import_module('latte.training.train')"),
    ],
)
def test_each_rule_finds_its_violation(rule, file, violation):
    assert rule(file, ast.parse(violation))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "model/latte.py",
            "from latte.checks import InputError\nfrom latte.model import blocks\nfrom . import patches",
        ),
        (
            "cli/train.py",
            "from latte import __version__\ndef f():\n    from latte.training.train import train",
        ),
        ("data/media.py", "def f():\n    import av"),
        ("checkpoint/run.py", "model.eval()\ntorch.load(path, weights_only=True)\nyaml.safe_load(text)"),
    ],
)
def test_no_rule_complains_about_good_code(file, source):
    assert [complaint for rule in RULES for complaint in rule(file, ast.parse(source))] == []


def test_reviewed_exceptions_are_few_and_used():
    calls = {
        (file, ast.unparse(n.func))
        for file in FILES
        for n in ast.walk(parse(file))
        if isinstance(n, ast.Call)
    }
    assert len(REVIEWED) <= 2
    assert calls >= REVIEWED, "an exception that nothing uses any more"


def test_every_source_file_names_its_licence():
    here = [ROOT / part for part in ("src", "tests", "benchmarks")]
    files = [
        path for folder in here for path in folder.rglob("*.py") if path.read_text(encoding="utf-8").strip()
    ]
    assert len(files) > 10
    assert [
        path.name
        for path in files
        if "SPDX-License-Identifier: Apache-2.0" not in path.read_text(encoding="utf-8")[:200]
    ] == []


def test_no_file_has_a_meaningless_name():
    assert [file for file in FILES if BANNED_NAMES & set(file.removesuffix(".py").split("/"))] == []
    assert [file for file in FILES if file.endswith("/__init__.py") and parse(file).body] == []
