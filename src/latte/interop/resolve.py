# SPDX-License-Identifier: Apache-2.0
"""What a path or id of a model is: the one answer for training, sampling, evaluation and conversion."""

import re
from dataclasses import dataclass
from pathlib import Path

from latte.checks import InputError, nearest, printable
from latte.interop.key_maps import BRANCHES, unwrap
from latte.interop.layouts import recognise
from latte.interop.readers import BUILTIN, HUB_ID, INDEX, PICKLED, SAFE, fetch, read_json, read_tensors
from latte.model.pretrained import CONFIG, WEIGHTS

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
