# SPDX-License-Identifier: Apache-2.0
"""Features that were made elsewhere: the same figures, under the protocol "external", which promises nothing about clips and pixels.

Such a figure compares with another one only when whoever made the features says so; the file says what was read, by hash.
Axes: n rows, k features.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latte import __version__
from latte import page as report
from latte.checks import InputError, require
from latte.evaluation.detector_files import file_sha256
from latte.evaluation.detectors import Pixels
from latte.evaluation.frechet import check_bank
from latte.evaluation.manifest import plain
from latte.evaluation.plan import SIDES
from latte.evaluation.protocols import Protocol
from latte.evaluation.report import figures
from latte.evaluation.scores import ROOT, Scores, score
from latte.evaluation.sources import digest
from latte.files import commit_file, reported
from latte.interop.archive import read_tensors

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")
EXTERNAL = Protocol(
    "external",
    "external",
    "external",
    Pixels(),
    "Features made elsewhere: which clips, frames, pixels and network they are of is not known here. Covariance over N - 1.",
    metrics=("frechet", "kernel", "jedi", "precision", "recall"),
)


def is_bank(path: str | None) -> bool:
    """Is ``path`` a file whose name is that of features?"""
    return path is not None and path.endswith(SUFFIXES) and not Path(path).is_dir()


def read_bank(path: Path) -> Tensor:
    """The features (n k) in a file: its only table of floating numbers, or the one called 'features'. Nothing in the file is run.

    InputError for a file that is not there, holds none or several tables, or more than plain numbers.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a file of features ({', '.join(SUFFIXES)})")
    tensors = read_tensors(path) if path.suffix != ".npy" else {"": read_array(path)}
    tables = {
        name: tensor for name, tensor in tensors.items() if tensor.ndim == 2 and tensor.is_floating_point()
    }
    found = tables.get("features", next(iter(tables.values())) if len(tables) == 1 else None)
    if found is None:
        shapes = ", ".join(
            f"{name or 'one'} {tensor.dtype} {tuple(tensor.shape)}"
            for name, tensor in list(tensors.items())[:4]
        )
        raise InputError(
            f"{path} holds {len(tables)} tables of floating numbers ({shapes}); keep one (n k), or call it 'features'"
        )
    check_bank(path.name, found, rows=8)
    return found


def read_array(path: Path) -> Tensor:
    """A .npy file; InputError for an array of objects, which is a program, and for other files of that name."""
    try:
        return torch.from_numpy(np.ascontiguousarray(np.load(path, allow_pickle=False)))
    except (ValueError, TypeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} was refused, nothing in it was run: {reason}; give an array of numbers"
        ) from error


def facts_of(path: Path, bank: Tensor) -> dict[str, Any]:
    """What the record says about a side. ``repeated`` counts rows that are equal to an earlier one: clips that were taken twice?"""
    rows, width = bank.shape
    repeated = rows - len(torch.unique(bank, dim=0))
    return {
        "file": path.name,
        "sha256": file_sha256(path),
        "rows": rows,
        "width": width,
        "dtype": str(bank.dtype).removeprefix("torch."),
        "repeated": repeated,
    }


def score_files(real: str | Path, fake: str | Path, out: Path) -> dict[str, Any]:
    """Figures of two files of features -> what ``--json`` prints; out/external.json and out/report.html hold them with what was read."""
    paths = {"real": Path(real), "fake": Path(fake)}
    banks = {side: read_bank(path) for side, path in paths.items()}
    facts = {side: facts_of(paths[side], banks[side]) for side in SIDES}
    same = facts["real"]["sha256"] == facts["fake"]["sha256"]
    require(
        not same,
        "REAL and FAKE",
        str(fake),
        "both files have the same content",
        "give the features of two sets",
    )
    scores = score(banks["real"], banks["fake"], EXTERNAL)
    fixed = {
        "protocol": EXTERNAL.name,
        "version": EXTERNAL.version,
        "ddof": EXTERNAL.ddof,
        "root": ROOT,
        "banks": facts,
    }
    result = {**plain(scores), **fixed, "manifest_hash": digest(fixed)[:12]}
    with reported("the figures", out):
        out.mkdir(parents=True, exist_ok=True)
        commit_file(out / "external.json", json.dumps(result, indent=1) + "\n")
        commit_file(out / "report.html", page(scores, result))
    return {
        **result,
        "dropped": 0,
        "manifest": str(out / "external.json"),
        "report": str(out / "report.html"),
    }


def page(scores: Scores, result: Mapping[str, Any]) -> report.Html:
    """The figures for people, and the two files."""
    keys = ("file", "rows", "width", "dtype", "repeated", "sha256")
    return report.page(
        f"{scores.metric.capitalize()} distance {report.number(scores.value)} (external)",
        f"Features made elsewhere, record {result['manifest_hash']}, latte {__version__}.",
        *figures(scores, EXTERNAL.name),
        report.section(
            "The features",
            report.prose(EXTERNAL.note),
            report.table(
                ["side", *keys], [(side, *(result["banks"][side][key] for key in keys)) for side in SIDES]
            ),
        ),
    )
