# SPDX-License-Identifier: Apache-2.0
"""The layout's rules, read from the syntax trees of src/latte: who may import whom, what is banned, and which calls open a back door.

Each rule is a function from (file, tree) to a list of complaints; ``test_each_rule_catches_its_crime`` proves that it can complain.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "latte"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))

# An import goes only to an earlier row or stays inside its own package; packages of one row do not import each other.
# Everyone may import checks, which imports nothing of ours; the entry points __init__ and __main__ have no row.
STOREYS = (
    ("checks", "runtime", "files", "page"),
    ("model", "diffusion", "autoencoder", "text", "checkpoint"),
    ("data", "interop"),
    ("evaluation", "train", "inference"),
    ("config", "recipes"),
    ("build", "profile"),
    ("demo", "ablate", "report", "ui"),
    ("cli",),
)
STOREY = {name: number for number, names in enumerate(STOREYS) for name in names}

WITHOUT_DIFFUSERS = ("model/", "diffusion/process.py", "diffusion/loss.py", "evaluation/", "train/")
LAZY = {"diffusers", "av", "transformers", "gradio", "peft", "bitsandbytes"}
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

BACK_DOORS = {
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
REVIEWED: set[tuple[str, str]] = {  # exceptions that somebody has read, (file, call): at most three
    ("__init__.py", "import_module"),  # the public dozen, each imported when it is asked for
    (
        "model/card.py",
        "import_module",
    ),  # from_pretrained is a method of the model, and the one door for weights stands above it
}


def parse(file: str) -> ast.Module:
    return ast.parse((SOURCE / file).read_text(encoding="utf-8"), file)


def imports(file: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Every imported module, dotted and absolute, with its line; ``from latte import x`` counts as latte.x."""
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
    """Modules imported when the file itself is imported: not those inside functions or under TYPE_CHECKING."""
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
        if first != "latte" or there in (here, "__version__") or (there == "checks" and here != "checks"):
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
        if m.split(".")[0] in LAZY
    ]


def opens_back_doors(file: str, tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if call in BACK_DOORS and (file, call) not in REVIEWED:
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
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.match(r"[\w.-]+", name).group().lower().replace("-", "_") for name in wanted}
    return names | {"yaml" if "pyyaml" in names else "", "PIL" if "pillow" in names else ""} - {""}


DECLARED = _declared()
RULES = (breaks_storeys, imports_wrong_modules, opens_back_doors)


@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps_the_rule(rule):
    assert len(FILES) > 10
    assert [complaint for file in FILES for complaint in rule(file, parse(file))] == []


@pytest.mark.parametrize(
    ("rule", "file", "crime"),
    [
        (breaks_storeys, "model/latte.py", "from latte.train.train import train"),
        (breaks_storeys, "model/latte.py", "from latte.data import clips"),
        (breaks_storeys, "model/latte.py", "def f():\n    import latte.config.run"),
        (breaks_storeys, "model/latte.py", "from ..data import clips"),
        (breaks_storeys, "model/latte.py", "from latte import Latte"),
        (breaks_storeys, "checks.py", "from latte import runtime"),
        (breaks_storeys, "novelty.py", "import math"),
        (imports_wrong_modules, "data/media.py", "import av"),
        (imports_wrong_modules, "data/media.py", "try:\n    import av\nexcept ImportError:\n    av = None"),
        (imports_wrong_modules, "data/media.py", "class Reader:\n    from diffusers import DDPMScheduler"),
        (imports_wrong_modules, "train/loop.py", "def f():\n    import diffusers"),
        (imports_wrong_modules, "data/clips.py", "def f():\n    import torchvision.transforms"),
        (imports_wrong_modules, "data/clips.py", "import pandas"),
        (opens_back_doors, "checkpoint/run.py", "torch.load(path)"),
        (opens_back_doors, "checkpoint/run.py", "torch.load(path, weights_only=False)"),
        (opens_back_doors, "checkpoint/run.py", "torch.jit.load(path)"),
        (opens_back_doors, "checkpoint/run.py", "np.load(path, allow_pickle=True)"),
        (opens_back_doors, "checkpoint/run.py", "subprocess.run(line, shell=True)"),
        (opens_back_doors, "checkpoint/run.py", "yaml.load(text, Loader)"),
        (opens_back_doors, "checkpoint/run.py", "eval(text)"),
        (opens_back_doors, "model/latte.py", "import_module('latte.train.train')"),
    ],
)
def test_each_rule_catches_its_crime(rule, file, crime):
    assert rule(file, ast.parse(crime))


@pytest.mark.parametrize(
    ("file", "deed"),
    [
        (
            "model/latte.py",
            "from latte.checks import InputError\nfrom latte.model import blocks\nfrom . import patches",
        ),
        ("cli/train.py", "from latte import __version__\ndef f():\n    from latte.train.train import train"),
        ("data/media.py", "def f():\n    import av"),
        ("checkpoint/run.py", "model.eval()\ntorch.load(path, weights_only=True)\nyaml.safe_load(text)"),
    ],
)
def test_no_rule_complains_about_good_code(file, deed):
    assert [complaint for rule in RULES for complaint in rule(file, ast.parse(deed))] == []


def test_reviewed_exceptions_are_few_and_used():
    calls = {
        (file, ast.unparse(n.func))
        for file in FILES
        for n in ast.walk(parse(file))
        if isinstance(n, ast.Call)
    }
    assert len(REVIEWED) <= 3
    assert calls >= REVIEWED, "an exception that nothing uses any more"


def test_every_source_file_says_its_licence():
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


def test_names_say_what_is_inside():
    assert [file for file in FILES if BANNED_NAMES & set(file.removesuffix(".py").split("/"))] == []
    assert [file for file in FILES if file.endswith("/__init__.py") and parse(file).body] == []
