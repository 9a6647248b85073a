# SPDX-License-Identifier: Apache-2.0
"""Counted costs that are kept between commands: counting imports torch's compiler and the codec's library.

A cost is a pure function of settings and code, so its key holds both: the settings it depends on, this
package's source and the versions of the libraries. What depends on files of the user is counted each time.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from latte.config.run import RunConfig
from latte.files import keep_entry, kept_entries, source_sha256

FILE = "costs.json"
LIBRARIES = ("diffusers", "transformers")
T = TypeVar("T")


class Counter:
    """``counter(Cost, compute, *settings)`` returns ``compute()``, from the user's cache if ``kept``.

    Nothing is kept for a run whose codec or text encoder is described by files at a path.
    """

    def __init__(self, config: RunConfig | None = None, kept: bool = False):
        self.kept = kept and config is not None and config.codec.path is None and config.text.path is None

    def __call__(self, kind: type[T], compute: Callable[[], T], *settings: Any) -> T:
        """Return the cost, a dataclass ``kind`` or a dictionary; ``settings`` decide it and have a repr."""
        if not self.kept:
            return compute()
        parts = [kind.__name__, *map(repr, settings), *environment()]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        adapter = TypeAdapter(kind)
        found = kept_entries(FILE).get(key)
        if found is not None:
            try:
                return adapter.validate_python(found)
            except ValidationError:
                pass  # damaged: counted again
        cost = compute()
        keep_entry(FILE, key, cost if isinstance(cost, dict) else asdict(cost))  # pyright: ignore
        return cost


def environment() -> list[str]:
    """Return what decides a count beside the settings: the source and the libraries."""
    versions = [str(torch.__version__)]
    for name in LIBRARIES:
        try:
            versions.append(version(name))
        except PackageNotFoundError:
            versions.append("")
    return [source_sha256(), *versions]
