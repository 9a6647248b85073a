# SPDX-License-Identifier: Apache-2.0
"""What a run folder says about itself: config.yaml, command.txt (one line per start), env.json.

Versions, device and commit are recorded by name; the environment's variables never are, because secrets
live there.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from latte.files import commit_file, reported
from latte.runtime import world_size

if TYPE_CHECKING:
    import torch

RENAMED_KEYS: dict[str, str] = {}  # config keys renamed since 0.1.0: old dotted key -> new dotted key

PACKAGES = (
    "latte-video",
    "torch",
    "numpy",
    "safetensors",
    "pillow",
    "diffusers",
    "av",
    "transformers",
    "peft",
    "bitsandbytes",
)


def describe_run(
    run_dir: Path, config: Mapping[str, object], device: "torch.device", command: str | None = None
) -> None:
    """Write the three files; ``config`` is plain data, ``command`` defaults to this process's own command
    line.

    Raises RunError when the folder cannot be written.
    """
    program = Path(sys.argv[0])
    command = command or shlex.join(
        [*(["python", "-m", "latte"] if program.name == "__main__.py" else [program.name]), *sys.argv[1:]]
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with reported("the run's description", run_dir):
        commit_file(run_dir / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        commit_file(
            run_dir / "env.json", json.dumps({"started": now, **environment(device)}, indent=2) + "\n"
        )
        with open(run_dir / "command.txt", "a", encoding="utf-8") as file:
            file.write(f"{now} {command}\n")


def recorded_setting(run_dir: Path, section: str, key: str) -> object:
    """Return the value of ``section.key`` in the config.yaml of ``run_dir``; None without."""
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return config[section][key]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        return None


def environment(device: "torch.device") -> dict[str, object]:
    """Versions of what computes, the device, the threads and the source's commit."""
    import torch

    return {
        "commit": source_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }


def installed(package: str) -> str | None:
    """The installed version of ``package``, or None; nothing is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def source_commit() -> str | None:
    """The commit of the source tree that this package runs from, with '+' when files differ from it; None
    for an installed package.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")


def read_fingerprint(part: Mapping[str, Any]) -> str | None:
    """Return the recorded fingerprint of a codec or text encoder; version 0.1.0 wrote it under
    ``identity``.
    """
    return part.get("fingerprint", part.get("identity"))
