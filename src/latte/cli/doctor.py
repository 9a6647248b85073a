# SPDX-License-Identifier: Apache-2.0
"""``latte doctor``: what this machine has, and whether that is enough to run Latte."""

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from latte.cli.options import Debug, Device, Json, print_result, table

GIB = 1 << 30
MIN_DISK = 1 * GIB
MIN_MEMORY = 2 * GIB


def doctor(device: Device = "auto", as_json: Json = False, debug: Debug = False) -> None:
    """Check this machine: versions, device, video, disk, memory; exit code 1 if a part is missing."""
    facts = examine(device)
    rows = []
    for name, value in facts.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if name != "problems":
            rows.append((name, value))
    problems = [f"problem: {problem}" for problem in facts["problems"]]
    verdict = problems or ["no problems: everything that is needed is installed"]
    print_result(facts, as_json, [*table(rows), *verdict])
    if facts["problems"]:
        raise typer.Exit(1)


def examine(device: str) -> dict[str, Any]:
    """Return the facts, and ``problems``: sentences about what is missing, empty when nothing is."""
    import torch

    from latte import __version__
    from latte.autoencoder.codec import CODECS
    from latte.checkpoint.record import installed
    from latte.runtime import memory_of, resolve_device, usable_cpus

    found = resolve_device(device)
    disk = shutil.disk_usage(Path.cwd()).free
    memory = memory_of(torch.device("cpu"))
    encoders = _video_encoders()
    problems = []
    if encoders is None:
        problems.append("PyAV cannot be imported, so no video can be read or written; pip install 'av>=17.1'")
    elif "libx264" not in encoders:
        problems.append(
            "PyAV was built without libx264, so mp4 files cannot be written; pip install av from PyPI"
        )
    if disk < MIN_DISK:
        problems.append(f"{disk / GIB:.1f} GiB of disk are free here; a run needs at least {MIN_DISK // GIB}")
    if memory is not None and memory < MIN_MEMORY:
        problems.append(f"{memory / GIB:.1f} GiB of memory; even small models need {MIN_MEMORY // GIB}")
    return {
        "latte": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(found) if found.type == "cuda" else found.type,
        "bf16": found.type == "cuda" and torch.cuda.is_bf16_supported(),
        "threads": torch.get_num_threads(),
        "cpus": usable_cpus()[0],
        "autoencoders": list(CODECS),
        "av": installed("av"),
        "video_encoders": encoders or [],
        "diffusers": installed("diffusers"),
        "transformers": installed("transformers"),
        "peft": installed("peft"),
        "bitsandbytes": installed("bitsandbytes"),
        "disk_free_gib": round(disk / GIB, 1),
        "memory_gib": None if memory is None else round(memory / GIB, 1),
        "offline": os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        "terminal": sys.stderr.isatty(),
        "problems": problems,
    }


def _video_encoders() -> list[str] | None:
    """Return the encoders that our files use and PyAV has; None without PyAV."""
    try:
        import av
    except ImportError:
        return None
    found = []
    for name in ("libx264", "gif"):
        try:
            av.Codec(name, "w")
        except ValueError:
            continue
        found.append(name)
    return found
