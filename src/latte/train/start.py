# SPDX-License-Identifier: Apache-2.0
"""How a fresh run starts: from random weights, or from a DiT's, with a report of what became of every tensor (Latte, Sec. 3.3.5)."""

import logging
from pathlib import Path

from latte.checkpoint.atomic import commit_file, reported
from latte.checkpoint.dit import init_from_dit
from latte.checkpoint.run import list_checkpoints
from latte.model.latte import Latte

LOG = logging.getLogger(__name__)
REPORT = "init.txt"


def start_from(model: Latte, source: str, mapping: str, run_dir: Path) -> None:
    """Fill ``model`` from the DiT at ``source`` (file or hub id); the report goes to the log and to ``run_dir``/init.txt.

    Nothing happens, and the file is not needed, when the run has checkpoints: it goes on from them. InputError for a file that does
    not fit, before anything is written.
    """
    if list_checkpoints(run_dir):
        return
    report = init_from_dit(model, source, mapping)  # logs what is missing and skipped
    used = "\n".join(f"  used: {name}" for name in report.used)
    LOG.info("%s", used)
    with reported("the report of the start", run_dir / REPORT):
        commit_file(run_dir / REPORT, f"{report}\n{used}\n")
