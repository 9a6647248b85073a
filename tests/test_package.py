# SPDX-License-Identifier: Apache-2.0
"""The package and what surrounds it: types, size, tested versions, container, ComfyUI nodes, issue forms."""

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import latte
from latte.runtime import TESTED, untested_versions

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "latte"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
DOCKERFILE = ROOT / "integrations" / "docker" / "Dockerfile"
MAX_WHEEL = 40 << 20  # bytes
WEIGHTS = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.safetensors"))


def requirement(name: str) -> str:
    """The line of pyproject.toml for a package, among dependencies and extras."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return next(line for line in lines if re.match(rf"{name}\b", line))


def test_the_package_is_typed_and_small():
    assert (SOURCE / "py.typed").is_file()
    files = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < MAX_WHEEL
    assert len(WEIGHTS) >= 6


def test_type_checkers_see_the_public_names():
    tree = ast.parse((SOURCE / "__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {name.asname for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert typed == set(latte.__all__) - {"__version__"}


def test_public_functions_and_methods_have_annotations():
    bare = []
    count = 0
    for name in set(latte.__all__) - {"__version__", "Trained"}:
        value = getattr(latte, name)
        members = [(name, value)]
        if inspect.isclass(value):
            own = vars(value).items()
            members = [(f"{name}.{key}", item) for key, item in own if key == "__call__" or key[0] != "_"]
        for place, member in members:
            function = inspect.unwrap(getattr(member, "__func__", member))
            if not inspect.isfunction(function) or not function.__module__.startswith("latte"):
                continue
            count += 1
            parameters = list(inspect.signature(function).parameters.values())
            first = [] if "." not in place or isinstance(member, staticmethod) else parameters[:1]
            missing = [p.name for p in parameters if p not in first and p.annotation is p.empty]
            if missing or "return" not in function.__annotations__:
                bare.append((place, missing))
    assert count > 20
    assert bare == []


@pytest.mark.parametrize("name", TESTED)
def test_the_tested_ranges_begin_at_the_lower_bounds(name):
    assert f">={TESTED[name][0]}" in requirement(name)


def test_torch_is_bounded_by_the_newest_tested_version():
    major, minor = map(int, TESTED["torch"][1].split("."))
    assert f"<{major}.{minor + 1}" in requirement("torch")


def test_a_version_outside_the_tested_range_is_said_once_with_the_range(monkeypatch, caplog):
    installed = {name: f"{newest}.7" for name, (_, newest) in TESTED.items()}
    monkeypatch.setattr("latte.runtime.version", installed.__getitem__)
    assert untested_versions() == []
    installed["torch"] = "2.99.0+cpu"
    installed["av"] = "9.0"
    oldest, newest = TESTED["torch"]
    lines = untested_versions()
    assert len(lines) == 2
    assert f"torch 2.99.0+cpu is outside the tested range, {oldest} to {newest}" in lines[0]
    latte.runtime.warn_untested.cache_clear()
    with caplog.at_level("WARNING", logger="latte"):
        latte.runtime.resolve_device("cpu")
        latte.runtime.resolve_device("cpu")
    assert [record.getMessage() for record in caplog.records] == lines
    latte.runtime.warn_untested.cache_clear()


def test_a_package_that_is_missing_or_of_an_odd_version_is_not_a_warning(monkeypatch):
    monkeypatch.setattr("latte.runtime.version", {"torch": "unknown"}.__getitem__)
    assert untested_versions() == []


def test_the_notice_names_every_packaged_weight_file():
    notice = (ROOT / "NOTICE").read_text("utf-8")
    assert [name for name in WEIGHTS if name not in notice] == []
    named = re.findall(r"[\w/]+\.safetensors", notice)
    assert sorted(named) == WEIGHTS
    assert "NOTICE" in PROJECT["license-files"]


def test_the_dockerfile_copies_what_exists_and_installs_what_is_declared():
    text = DOCKERFILE.read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    instructions = [line.split()[0] for line in lines]
    assert instructions[:2] == ["ARG", "FROM"]
    known = {"ARG", "FROM", "ENV", "RUN", "COPY", "USER", "WORKDIR", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert set(instructions) <= known
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert len(copied) >= 5
    assert [name for name in copied if not (ROOT / name).exists()] == []
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "src"}
    assert needed <= set(copied), "building the package reads them"
    defaults = dict(line.split()[1].split("=") for line in lines if line.startswith("ARG"))
    assert set(defaults["EXTRAS"].split(",")) <= PROJECT["optional-dependencies"].keys()
    oldest, newest = (tuple(map(int, bound.split("."))) for bound in TESTED["torch"])
    assert oldest <= tuple(map(int, defaults["TORCH_VERSION"].split(".")))[:2] <= newest
    assert defaults["PYTHON"] >= PROJECT["requires-python"].removeprefix(">=")
    used = set(re.findall(r"\$\{?(\w+)", text))
    assert set(defaults) <= used
    assert json.loads(lines[-2].removeprefix("ENTRYPOINT ")) == ["latte"]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=str)
def test_issue_forms_are_complete(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    if path.name == "config.yml":
        assert form == {"blank_issues_enabled": True}
        return
    assert form.keys() >= {"name", "description", "body"}
    names = [item["id"] for item in form["body"]]
    assert len(set(names)) == len(names) >= 3
    assert {item["type"] for item in form["body"]} <= {"textarea", "input", "checkboxes", "dropdown"}
    assert all(item["attributes"].get("label") for item in form["body"])
    assert any(item.get("validations", {}).get("required") for item in form["body"])


@pytest.fixture
def nodes():
    """The module of ComfyUI nodes, loaded as ComfyUI loads a folder of custom_nodes."""
    folder = ROOT / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location(
        "custom_latte", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield sys.modules["custom_latte.nodes"]
    finally:
        for name in [name for name in sys.modules if name.startswith("custom_latte")]:
            del sys.modules[name]


def test_comfyui_nodes_state_their_inputs_and_outputs(nodes):
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert len(nodes.NODE_CLASS_MAPPINGS) == 3
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        names = [*inputs["required"], *inputs.get("optional", {})]
        parameters = inspect.signature(getattr(node(), node.FUNCTION)).parameters
        assert list(parameters) == names
        assert node.CATEGORY
        assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
    from latte.inference.quality import QUALITIES

    assert set(nodes.QUALITIES) - {"model"} == set(QUALITIES)


def test_comfyui_nodes_load_sample_and_save(nodes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (pipe,) = nodes.LatteLoad().load("builtin-shapes", "cpu", "fp32", False)
    text = pipe.classes[0]
    frames, fps = nodes.LatteSample().sample(pipe, text, 3, "model", 2, 0.0)
    assert frames.dtype == torch.float32
    assert frames.ndim == 4
    assert frames.shape[-1] == 3
    assert 0 <= frames.min() <= frames.max() <= 1
    expected = pipe(class_labels=text, seed=3, num_inference_steps=2, output_type="uint8").frames[0]
    assert np.array_equal(nodes.to_uint8(frames), expected)
    for number in (1, 2):
        result = nodes.LatteSave().save(frames, fps, "clip")
        assert Path(result["result"][0]) == tmp_path / f"clip-000{number}.mp4"
        assert (tmp_path / f"clip-000{number}.mp4").stat().st_size > 0
    with pytest.raises(latte.InputError, match="is not a name inside"):
        nodes.LatteSave().save(frames, fps, "../clip")


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_the_wheel_installs_in_a_clean_environment_and_makes_a_clip(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < MAX_WHEEL
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"latte/py.typed", *(f"latte/{name}" for name in WEIGHTS)} <= names
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    torch_now = torch.__version__.partition("+")[0]
    install = [scripts / "python", "-m", "pip", "install", "-q", str(wheel), f"torch=={torch_now}"]
    subprocess.run(install, check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_HUB_OFFLINE"] = "1"
    command = [scripts / "latte", "sample", "a purple cube rotates left", "--out", "clips", "--json"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    clip = json.loads(found.stdout.splitlines()[-1])["clips"][0]["path"]
    assert (tmp_path / clip).stat().st_size > 0
    place = subprocess.run(
        [scripts / "python", "-c", "import latte; print(latte.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path / "env") in place.stdout
