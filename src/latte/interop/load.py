# SPDX-License-Identifier: Apache-2.0
"""The checkpoint loader: file, folder or hub id -> configuration, tensors under our names, and a coverage
report.

The layout follows from the names of the tensors, the sizes from their shapes. Every load logs its report,
and a load that does not use every tensor is refused unless the exceptions are named.
"""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte.checks import InputError
from latte.files import source_sha256, stamp
from latte.interop.coverage import Config, Coverage, build, compare, expected_tensors
from latte.interop.key_maps import BRANCHES, unwrap
from latte.interop.layouts import LAYOUTS, recognise
from latte.interop.readers import find_weights, read_card, read_tensors
from latte.interop.resolve import KINDS, resolve
from latte.model.denoiser import Denoiser
from latte.model.pretrained import check_depth, file_tensors_sha256
from latte.tensors import without_memory

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """An external checkpoint under our names, in the precision it was stored in.

    ``facts`` are the plain values that the file holds beside its tensors, ``card`` is the config.json
    beside it (empty when there is none).
    """

    layout: str
    config: Config
    state_dict: dict[str, Tensor]
    report: Coverage
    facts: dict[str, str]
    card: dict[str, Any]

    def model(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        """Return the model for inference (eval mode, no gradients) in ``dtype``; allowed gaps hold fresh
        weights.
        """
        with torch.device("cpu") if self.report.missing else without_memory():
            model = build(self.config)
        model.load_state_dict(self.state_dict, strict=False, assign=True)
        if self.report.missing:
            LAYOUTS[self.layout].silence(model)
        return model.to(dtype).requires_grad_(False).eval()


def load_external(
    source: str | Path,
    heads: int | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> Loaded:
    """Load weights of any layout in LAYOUTS from a file, a folder or a hub id, and log the coverage report.

    ``heads`` is needed for a width that is not in Table 4. ``allow_missing`` and ``allow_unexpected`` are
    patterns of tensor names, such as 'time_blocks.*', that may be missing (or of another shape) and left
    over. Raises InputError, in one line, for everything else that does not fit, for files that hold code,
    are truncated, mixed, quantized or non-finite, for runs and for unknown layouts.
    """
    found = resolve(source, "weights")
    if found.run is not None:
        raise InputError(
            f"weights {source} are {KINDS[found.kind]}; open it with latte.VideoPipeline.from_pretrained, "
            f"or export it first: latte convert {shlex.quote(str(found.run))} NEW_FOLDER"
        )
    file = find_weights(found.path)
    before = [] if file.suffix == ".json" else stamp(file)  # an index says nothing about the shards
    stored, facts = read_tensors(found.path, BRANCHES)
    tensors = unwrap(stored)
    name = recognise(tensors, source)
    layout = LAYOUTS[name]
    card = read_card(found.path)
    try:
        understood = layout.understand(tensors, card, heads)
        check_depth(understood.config, tensors)
    except InputError as error:
        raise InputError(f"weights {source} ({name}): {error}") from None
    state, report = compare(str(source), name, tensors, understood, expected_tensors(understood.config))
    LOG.info("%s", report)
    report.refuse(allow_missing, allow_unexpected, layout.hint)
    expected = (card or {}).get("weights_sha256")
    complete = not (report.missing or report.unexpected or report.mismatched)
    rule = f"{name} {source_sha256()[:16]} "  # of the names
    if expected is not None and complete and file_tensors_sha256(file, before, state, rule) != expected:
        raise InputError(
            f"weights {source} have another hash than weights_sha256 in config.json "
            f"({str(expected)[:16]}): they belong "
            "to another model or were altered; fetch the folder again"
        )
    return Loaded(name, understood.config, state, report, facts, card or {})
