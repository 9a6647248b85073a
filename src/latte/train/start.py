# SPDX-License-Identifier: Apache-2.0
"""How a fresh run starts: from random weights, or from those of an image model, with a report of what became of every tensor.

A class model starts from a DiT (Latte, Sec. 3.3.5), a text model from PixArt-alpha (Sec. 4.4).
"""

import logging
from pathlib import Path

from latte.checkpoint.atomic import commit_file, reported
from latte.checkpoint.dit import init_from_dit
from latte.checkpoint.pixart import init_from_pixart
from latte.checkpoint.run import list_checkpoints
from latte.checks import require
from latte.model.text import LatteText, Network

LOG = logging.getLogger(__name__)
REPORT = "init.txt"


def start_from(model: Network, source: str, mapping: str, run_dir: Path) -> None:
    """Fill ``model`` from the DiT or PixArt at ``source`` (file or hub id); the report goes to the log and to ``run_dir``/init.txt.

    Nothing happens, and the file is not needed, when the run has checkpoints: it goes on from them. InputError for a file that does
    not fit, before anything is written.
    """
    if list_checkpoints(run_dir):
        return
    if isinstance(model, LatteText):
        require(mapping == "all", "train.init_mapping", mapping, "PixArt's blocks have one place each in a text model", "leave it out")
        report = init_from_pixart(model, source)
    else:
        report = init_from_dit(model, source, mapping)
    used = "\n".join(f"  used: {name}" for name in report.used)
    LOG.info("%s", used)
    with reported("the report of the start", run_dir / REPORT):
        commit_file(run_dir / REPORT, f"{report}\n{used}\n")
