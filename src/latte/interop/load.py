# SPDX-License-Identifier: Apache-2.0
"""The checkpoint loader: path or hub id -> what it is -> configuration, tensors under our names, and a
coverage report.

``resolve`` says what a path or id of a model is: the one answer for training, sampling, evaluation and
conversion. The layout of weights follows from the names of the tensors, the sizes from their shapes. Every
load logs its report, and a load that does not use every tensor is refused unless the exceptions are named.
To add a layout: a file with ``recognise`` and ``understand``, and one entry in LAYOUTS.
"""

import logging
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latte.checks import InputError, nearest, printable
from latte.files import source_sha256, stamp
from latte.interop import diffusers, dit, official, pixart
from latte.interop.coverage import (
    BRANCHES,
    Config,
    Coverage,
    Understanding,
    build,
    compare,
    expected_tensors,
    some,
    unwrap,
)
from latte.interop.readers import (
    BUILTIN,
    HUB_ID,
    INDEX,
    PICKLED,
    SAFE,
    fetch,
    find_weights,
    read_card,
    read_json,
    read_tensors,
)
from latte.model.denoiser import Denoiser
from latte.model.latte import ModelConfig
from latte.model.pretrained import CONFIG, WEIGHTS, check_depth, file_tensors_sha256, parse_config
from latte.model.text import LatteText, TextConfig
from latte.tensors import without_memory

LOG = logging.getLogger(__name__)

RUN_CONFIG, STEP = "config.yaml", re.compile(r"step-(\d+)")
FACTS = {"diffusion", "codec", "sample", "classes"}  # what stands beside a model's keys in config.json
KINDS = {
    "run": f"a run folder ({RUN_CONFIG})",
    "checkpoint": "a checkpoint of a run (checkpoints/step-N)",
    "weights": f"a weights folder of latte ({WEIGHTS} and {CONFIG})",
    "pipeline": f"a diffusers pipeline folder ({INDEX})",
    "external": f"an external checkpoint (file or folder: {', '.join(SAFE + PICKLED)})",
    "hub": "a hub id (owner/name)",
    "builtin": f"a model of the package ({', '.join(BUILTIN)})",
}


@dataclass(frozen=True)
class Source:
    """A resolved source. ``name`` is what the user gave, ``kind`` one of KINDS.

    ``path`` is the local file or folder: of a checkpoint its own folder, of a weight file inside a weights
    folder that folder, of a hub id the download. ``origin`` is local, hub or builtin. The kind of a hub id
    is ``hub`` only as long as nothing was fetched; afterwards it is what the download holds. The kind of a
    name in BUILTIN is ``weights``.
    """

    name: str
    kind: str
    path: Path
    origin: str = "local"

    @property
    def run(self) -> Path | None:
        """The run folder of a run or of a checkpoint of one, else None."""
        if self.kind == "checkpoint":
            return self.path.parents[1]
        return self.path if self.kind == "run" else None

    @property
    def step(self) -> int | None:
        """The training step of a checkpoint, else None."""
        match = STEP.fullmatch(self.path.name) if self.kind == "checkpoint" else None
        return int(match[1]) if match else None

    def layout(self) -> str:
        """Return which of LAYOUTS the weights have; InputError for a run, and for unknown layouts."""
        if self.run is not None:
            raise InputError(f"{self.name} is {KINDS[self.kind]}, not an external checkpoint")
        return recognise(unwrap(read_tensors(self.path, BRANCHES)[0]), self.name)


def resolve(source: str | Path, field: str = "MODEL", download: bool = True) -> Source:
    """Return what ``source`` is, by names of files only; a hub id is fetched unless ``download`` is False.

    A local path wins over a hub id of the same name. Raises InputError, naming ``field`` and everything
    that was looked for, when it is not one of KINDS.
    """
    name, path = str(source), Path(source)
    if name in BUILTIN:
        folder = BUILTIN[name]
        if not (folder / CONFIG).is_file():
            raise InputError(
                f"{field} is {name!r}, but this installation lacks {folder / CONFIG}; install latte again"
            )
        return Source(name, "weights", folder, "builtin")
    try:
        exists = bool(name.strip()) and path.exists()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise InputError(
            f"{field} is {name[:100]!r}, which cannot be a path ({type(error).__name__}); check the name"
        ) from None
    if not exists and is_hub_id(name):
        if not download:
            return Source(name, "hub", path, "hub")
        path = fetch(source)
        kind = kind_of_path(path) or "external"  # its reader explains what is wrong with it
        return Source(name, kind, path.parent if kind == "weights" and path.is_file() else path, "hub")
    try:
        kind = kind_of_path(path) if exists else None
    except OSError as error:
        raise InputError(
            f"{field} is {name!r}, which cannot be read ({error.strerror}); check its permissions"
        ) from None
    if kind is None:
        raise InputError(f"{field} is {name!r}, {why_unknown(path, exists)}; use {', '.join(KINDS.values())}")
    return Source(name, kind, path.parent if kind == "weights" and path.is_file() else path)


def is_hub_id(name: str) -> bool:
    """Could ``name`` be owner/name or owner/name/file of the hub?"""
    return bool(HUB_ID.fullmatch(name)) and not {".", ".."} & set(name.split("/"))


def kind_of_path(path: Path) -> str | None:
    """Return the kind of an existing file or folder, or None."""
    if path.is_file():
        if path.name == WEIGHTS and is_weights_folder(path.parent):
            return "weights"
        if looks_like_weights(path.name):
            return "external"
        return None
    if not path.is_dir():
        return None
    if (path / RUN_CONFIG).is_file():
        return "run"
    in_checkpoints = path.absolute().parent.name == "checkpoints"
    if in_checkpoints and STEP.fullmatch(path.name) and (path.absolute().parents[1] / RUN_CONFIG).is_file():
        return "checkpoint"
    if is_weights_folder(path):
        return "weights"
    if (path / INDEX).is_file():
        return "pipeline"
    found = any(looks_like_weights(item.name) for item in path.iterdir()) or (path / "transformer").is_dir()
    if found:
        return "external"
    return None


def is_weights_folder(folder: Path) -> bool:
    """Does ``folder`` hold weights with what sampling needs beside them, as
    ``VideoPipeline.save_pretrained`` writes?

    A folder of the bare model, which ``Latte.save_pretrained`` writes, is an external checkpoint: it has no
    codec.
    """
    if not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()):
        return False
    try:
        values = read_json(folder / CONFIG)
    except InputError:
        return True  # a damaged config.json, which the reader of the folder reports
    return not values or bool(FACTS & values.keys())


def looks_like_weights(name: str) -> bool:
    """Is ``name`` that of a weight file, of an unfinished download of one, or of a distributed checkpoint?"""
    return name.endswith((*SAFE, *PICKLED, ".index.json", ".incomplete")) or name == ".metadata"


def why_unknown(path: Path, exists: bool) -> str:
    """Explain why ``path`` is nothing known."""
    if not exists:
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"which does not exist{nearest(printable(path.name), map(printable, names))}"
    if path.is_dir():
        return "which is a folder without weights"
    if path.is_file():
        return "which is a file of another kind"
    return "which is neither a regular file nor a folder"


Understand = Callable[[Mapping[str, Tensor], Mapping[str, Any] | None, int | None], Understanding]


@dataclass(frozen=True)
class Layout:
    """One layout of weight files.

    ``recognise(names)``: does a file with these tensors have this layout? ``understand(tensors,
    config.json, heads)`` returns its configuration and the translation of its names. ``hint`` states what to
    do about a file that holds only a part of a model; ``silence(model)`` makes the missing part contribute
    nothing.
    """

    recognise: Callable[[Mapping[str, Any]], bool]
    understand: Understand
    hint: str = ""
    silence: Callable[[Any], None] = lambda model: None


def recognise(names: Iterable[str], source: str | Path) -> str:
    """Return the layout of a file with these tensor names; raise InputError when none of LAYOUTS fits."""
    known = dict.fromkeys(names)
    for name, layout in LAYOUTS.items():
        if layout.recognise(known):
            return name
    raise InputError(
        f"weights {source} have an unknown layout: the first tensors are {some(sorted(known))}; "
        f"use a checkpoint of {', '.join(LAYOUTS)}"
    )


def understand_ours(kind: type[ModelConfig] | type[TextConfig]) -> Understand:
    """Return the ``understand`` of our own layout, where config.json holds the whole configuration."""

    def understand(
        tensors: Mapping[str, Tensor], card: Mapping[str, Any] | None, heads: int | None
    ) -> Understanding:
        if card is None:
            raise InputError("there is no config.json beside the file; use the complete weights folder")
        return Understanding(parse_config(kind, card, Path("config.json")), {name: name for name in tensors})

    return understand


def is_latte(names: Mapping[str, Any]) -> bool:
    """Does a file with these names hold our own Latte?"""
    return (
        "patch.proj.weight" in names
        and "final_linear.weight" in names
        and "space_blocks.0.table" not in names
    )


LAYOUTS = {
    "Latte": Layout(is_latte, understand_ours(ModelConfig)),
    "LatteText": Layout(lambda names: "space_blocks.0.table" in names, understand_ours(TextConfig)),
    "LatteT2V": Layout(diffusers.recognise, diffusers.understand),
    "PixArt-alpha": Layout(pixart.recognise, pixart.understand, pixart.HINT, LatteText.zero_time_blocks),
    "DiT": Layout(dit.recognise, dit.understand),
    "released Latte": Layout(official.recognise, official.understand),
}


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
