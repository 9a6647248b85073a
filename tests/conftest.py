# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite: offline, few threads, GPU tests only where there is a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_COLOR", "1")

import pytest
import torch

from temporal import registered

torch.set_num_threads(1)  # on tiny tensors more threads only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` on a machine without CUDA, with the reason."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def time_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the codecs of ``temporal`` into the table of codecs for one test."""
    registered(monkeypatch)


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes from a fork server that has imported torch already; ``spawn`` imports it for each."""
    from multiprocessing import forkserver

    from latte.data import loader
    from latte.evaluation import features
    from tiny_runs import FORKS

    assert loader.START_METHOD == "spawn"
    forkserver.ensure_running()  # the loader blocks signals: a server that starts then would pass that on
    monkeypatch.setattr(loader, "START_METHOD", FORKS)
    monkeypatch.setattr(features, "get_context", {"spawn": FORKS}.__getitem__)
