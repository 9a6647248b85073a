# SPDX-License-Identifier: Apache-2.0
"""Features or statistics made elsewhere: the same scores, under the protocol "external", which fixes neither
clips nor pixels.

Such a score compares with another one only if both were made alike, which is up to the user; the record
states by hash what was read. Statistics are the mean and covariance that FID tools store (``np.savez(FILE,
mu=mu, sigma=sigma)``): a Frechet distance needs no more.
Axes: n rows, k features.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latte import __version__
from latte.checks import InputError, check, printable
from latte.evaluation.detector_files import file_sha256
from latte.evaluation.detectors import Pixels
from latte.evaluation.frechet import (
    SYMMETRY,
    Gaussian,
    check_features,
    check_widths,
    frechet_of,
    gaussian,
    gaussian_of_moments,
)
from latte.evaluation.manifest import ROOT, plain
from latte.evaluation.metrics import METRICS
from latte.evaluation.plan import SIDES
from latte.evaluation.protocols import Protocol
from latte.evaluation.report import headline
from latte.evaluation.scores import Scores, refuse_nonfinite, score
from latte.evaluation.sources import digest
from latte.files import commit_file, reported
from latte.interop.archive import read_tensors
from latte.page import html

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")
STATISTICS = {"mu", "sigma"}
EXTERNAL = Protocol(
    "external",
    "external",
    "external",
    Pixels(),
    "Features made elsewhere: their clips, frames, pixels and network are unknown here. Covariance over N "
    "- 1.",
    metrics=("frechet", "kernel", "jedi", "precision", "recall"),
)


@dataclass(frozen=True)
class Statistics:
    """The mean and covariance of features whose rows are not known."""

    mean: Tensor  # (k,)
    covariance: Tensor  # (k k)


def is_features(path: str | None) -> bool:
    """Return whether ``path`` is named like a file of features."""
    return path is not None and path.endswith(SUFFIXES) and not Path(path).is_dir()


def read_features(path: Path) -> Tensor | Statistics:
    """Return the features (n k) in a file, or its statistics; no code in the file is run.

    Features are its only floating-point table, or the one called 'features'; statistics are 'mu' (k,) and
    'sigma' (k k). InputError for a file that is missing, holds neither or both, or more than plain numbers,
    and for a table that looks like a covariance.
    """
    if not path.is_file():
        raise InputError(f"{printable(path)} does not exist; give a file of features ({', '.join(SUFFIXES)})")
    tensors = {"": read_array(path)} if path.suffix == ".npy" else read_tensors(path)
    tables = {name: t for name, t in tensors.items() if t.ndim == 2 and t.is_floating_point()}
    shapes = ", ".join(f"{name or 'one'} {t.dtype} {tuple(t.shape)}" for name, t in list(tensors.items())[:4])
    if set(tensors) >= STATISTICS:
        others = sorted(set(tables) - STATISTICS)
        check(
            not others,
            f"{printable(path)} is ambiguous: it holds the statistics mu and sigma and also "
            f"{', '.join(others)} ({shapes}); keep one of them in the file",
        )
        gaussian_of_moments(tensors["mu"], tensors["sigma"], printable(path), EXTERNAL.ddof)
        return Statistics(tensors["mu"], tensors["sigma"])
    found = tables.get("features", next(iter(tables.values())) if len(tables) == 1 else None)
    if found is None:
        raise InputError(
            f"{printable(path)} holds {len(tables)} floating-point tables ({shapes}); keep one (rows, "
            "features), or name it 'features'; statistics are named 'mu' and 'sigma'"
        )
    refuse_covariance(path, found)
    check_features(printable(path.name), found, rows=8)
    return found


def refuse_covariance(path: Path, table: Tensor) -> None:
    """InputError if ``table`` is square and symmetric: a covariance, which would be scored as rows of
    features.
    """
    if table.shape[0] != table.shape[1] or table.shape[0] < 2 or not torch.isfinite(table).all():
        return
    table = table.double()
    if float((table - table.T).abs().max()) <= SYMMETRY * float(table.abs().max()):
        raise InputError(
            f"{printable(path)} holds a symmetric square table {tuple(table.shape)}, which looks like a "
            "covariance and not like rows of features; give statistics as np.savez(FILE, mu=mean, "
            "sigma=covariance)"
        )


def read_array(path: Path) -> Tensor:
    """Return the array of a .npy file; InputError for an array of objects, which could run code, and for
    other files.
    """
    try:
        return torch.from_numpy(np.ascontiguousarray(np.load(path, allow_pickle=False)))
    except (ValueError, TypeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{printable(path)} was refused, nothing in it was run: {reason}; give an array of numbers"
        ) from error


def facts_of(path: Path, features: Tensor | Statistics) -> dict[str, Any]:
    """Return what is recorded of a side. ``repeated`` counts rows equal to an earlier one, e.g. clips taken
    twice.
    """
    facts: dict[str, Any] = {"file": path.name, "sha256": file_sha256(path)}
    if isinstance(features, Statistics):
        dtype = str(features.covariance.dtype).removeprefix("torch.")
        return facts | {"rows": None, "width": len(features.mean), "dtype": dtype, "repeated": None}
    rows, width = features.shape
    dtype = str(features.dtype).removeprefix("torch.")
    repeated = rows - len(torch.unique(features, dim=0))
    return facts | {"rows": rows, "width": width, "dtype": dtype, "repeated": repeated}


def score_statistics(real: Tensor | Statistics, fake: Tensor | Statistics, protocol: Protocol) -> Scores:
    """Return the Frechet distance of two sides of which one or both are statistics: no other metric, interval
    or floor.
    """
    metric = next(name for name in protocol.metrics if METRICS[name].is_frechet)
    summaries: dict[str, Gaussian] = {}
    rows: dict[str, int | None] = dict.fromkeys(SIDES)
    for side, features in zip(SIDES, (real, fake), strict=True):
        if isinstance(features, Statistics):
            summaries[side] = gaussian_of_moments(features.mean, features.covariance, side, protocol.ddof)
        else:
            summaries[side] = gaussian(features, side)
            rows[side] = len(features)
    check_widths(len(summaries["real"].mean), len(summaries["fake"].mean))
    values = {metric: frechet_of(summaries["real"], summaries["fake"], protocol.ddof)}
    refuse_nonfinite(values)
    warning = "statistics do not include the rows: no interval, no floor, and the number of clips is unknown"
    value = values[metric]
    return Scores(metric, value, values, None, None, None, rows["real"], rows["fake"], (warning,))


def score_files(real: str | Path, fake: str | Path, out: Path) -> dict[str, Any]:
    """Score two files of features or statistics and return what ``--json`` prints; out/external.json and
    out/report.html keep it.
    """
    paths = {"real": Path(real), "fake": Path(fake)}
    features = {side: read_features(path) for side, path in paths.items()}
    facts = {side: facts_of(paths[side], features[side]) for side in SIDES}
    check(
        facts["real"]["sha256"] != facts["fake"]["sha256"],
        f"REAL and FAKE have the same content ({printable(paths['fake'])}); give the features of two sets",
    )
    tables = {side: table for side, table in features.items() if isinstance(table, Tensor)}
    if len(tables) == len(SIDES):
        scores = score(tables["real"], tables["fake"], EXTERNAL)
    else:
        scores = score_statistics(features["real"], features["fake"], EXTERNAL)
    record = {
        "protocol": EXTERNAL.name,
        "version": EXTERNAL.version,
        "ddof": EXTERNAL.ddof,
        "root": ROOT,
        "banks": facts,  # hashed under the key of 0.1.0
    }
    result = {**plain(scores), **record, "sides": facts, "manifest_hash": digest(record)[:12]}
    with reported("the scores", out):
        out.mkdir(parents=True, exist_ok=True)
        commit_file(out / "external.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
        commit_file(out / "report.html", page(scores, result))
    return {
        **result,
        "dropped": 0,
        "manifest": str(out / "external.json"),
        "report": str(out / "report.html"),
    }


def page(scores: Scores, result: Mapping[str, Any]) -> html.Html:
    """Return the report page: the scores and the two files."""
    keys = ("file", "rows", "width", "dtype", "repeated", "sha256")
    rows = [(side, *(result["sides"][side][key] for key in keys)) for side in SIDES]
    return html.page(
        f"{scores.metric.capitalize()} distance {html.number(scores.value)} (external)",
        f"Features made elsewhere, record {result['manifest_hash']}, latte {__version__}.",
        *headline(scores, EXTERNAL.name),
        html.section("The features", html.prose(EXTERNAL.note), html.table(["side", *keys], rows)),
    )
