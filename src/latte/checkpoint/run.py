# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: committed atomically, verified byte for byte when read, safetensors and JSON only.

``checkpoints/step-N/`` holds one safetensors file per group of tensors, state.json, and manifest.json with
the size and SHA-256 of every other file. Neither safetensors nor torch notices a flipped bit in the
weights, so nothing is used before its hash matches. Readers need no lock: a trainer may commit and remove
checkpoints while they read.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latte.checks import InputError, RunError
from latte.files import TEMPORARY, commit_folder, reported, unique_name
from latte.tensors import find_nonfinite

T = TypeVar("T")
FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_MANIFEST_BYTES = 1 << 20
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
LISTINGS = 20  # how often a reader lists the checkpoints again while a trainer changes them


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``tensors[group][name]`` on the CPU, and the JSON ``state``."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict


def print_warning(message: str) -> None:
    """Print to stderr, the default place of warnings."""
    print(message, file=sys.stderr)


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
    keep: int | None = None,
    protected: Collection[int] = (),
) -> Path:
    """Commit ``tensors`` (group -> name -> tensor) and ``state`` (plain data) as
    ``run_dir``/checkpoints/step-``step``.

    With ``keep``, older checkpoints beyond the newest ``keep`` are removed afterwards, but not those of the
    steps ``protected``. Raises RunError when
    a tensor holds NaN/Inf (it is named), or when the disk refuses (with the path and the number of bytes
    needed); every earlier checkpoint is then unchanged.
    """
    run_dir = Path(run_dir)
    path = run_dir / "checkpoints" / f"step-{step}"
    earlier = list_checkpoints(run_dir)
    kept = f"; {earlier[-1]} is unchanged" if earlier else ""
    for group, members in tensors.items():
        found = find_nonfinite(members)
        if found:
            raise RunError(
                f"the checkpoint of step {step} was not written: {group} tensor {found} (NaN or Inf){kept}; "
                "lower train.lr, or resume from an earlier checkpoint"
            )
    text = json.dumps({**state, "step": step}, indent=1, allow_nan=False) + "\n"
    needed = sum(tensor.nbytes for members in tensors.values() for tensor in members.values()) + len(text)

    def write(folder: Path) -> None:
        (folder / STATE).write_text(text, encoding="utf-8")
        for name, members in tensors.items():
            stored = {key: tensor.detach().contiguous() for key, tensor in members.items()}
            save_file(stored, folder / f"{name}.safetensors")
        files = {file.name: fingerprint(file) for file in folder.iterdir()}
        (folder / MANIFEST).write_text(manifest_text(files), encoding="utf-8")

    with reported(f"the checkpoint of step {step}", path, needed, kept):
        commit_folder(path, write)
        if keep is not None:
            prune(run_dir, step, keep, protected)
    return path


def load_checkpoint(path: Path, only: Collection[str] | None = None) -> Checkpoint:
    """Read and verify a checkpoint folder; ``only`` limits which groups of tensors are read (and verified).

    Raises InputError naming the file when anything is missing, truncated, altered or not a checkpoint of
    ours, and naming the tensor when one holds NaN/Inf.
    """
    path = Path(path)
    files = verify(path, only)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = {Path(name).stem: load_file(path / name) for name in files if name.endswith(".safetensors")}
        checkpoint = Checkpoint(path, int(state["step"]), tensors, state)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"it cannot be read ({error})") from error
    for group, members in tensors.items():
        found = find_nonfinite(members)
        if found:
            raise InputError(
                f"checkpoint {path} cannot be used: {group} tensor {found} (NaN or Inf); use an earlier "
                "checkpoint"
            )
    return checkpoint


def verify(path: Path, only: Collection[str] | None = None) -> list[str]:
    """Check size and SHA-256 of the state and of the groups in ``only`` (None: of every file); return the
    names.
    """
    manifest = read_manifest(path)
    names = manifest if only is None else {STATE, *(f"{group}.safetensors" for group in only)}
    for name in names:
        if name not in manifest:
            raise damaged(path, f"{MANIFEST} lists no {name}")
        try:
            found = fingerprint(path / name)
        except FileNotFoundError:
            raise damaged(path, f"{name} is missing, but {MANIFEST} lists it") from None
        except OSError as error:
            raise damaged(path, f"{name} cannot be read ({error.strerror})") from error
        for key, value in found.items():
            if value != manifest[name][key]:
                raise damaged(path, f"{name} has {key} {value}, but {MANIFEST} lists {manifest[name][key]}")
    return sorted(names)


def read_manifest(path: Path) -> dict[str, dict]:
    """Return file name -> {bytes, sha256} of a checkpoint; InputError unless ``save_checkpoint`` wrote
    exactly that.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"checkpoint {path} has no {MANIFEST}, so it is not a complete checkpoint; "
            "use a folder checkpoints/step-N of a run"
        )
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read(MAX_MANIFEST_BYTES)
        manifest = json.loads(text)
        files = manifest["files"]
        exact = manifest["format"] == FORMAT and STATE in files and manifest_text(files) == text
        exact = exact and all(
            PLAIN_NAME.fullmatch(name) and entry.keys() == {"bytes", "sha256"}
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"{MANIFEST} cannot be read ({error})") from error
    if not exact:
        raise damaged(path, f"{MANIFEST} is not as it was written (format {FORMAT})")
    return files


def manifest_text(files: Mapping[str, Mapping]) -> str:
    """Return the only spelling of a manifest, so that every altered byte of it is noticed."""
    return json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n"


def fingerprint(file: Path) -> dict[str, int | str]:
    """Return {bytes, sha256} of a file's content."""
    with open(file, "rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def damaged(path: Path, reason: str) -> InputError:
    """Return the error about a checkpoint that cannot be trusted."""
    return InputError(
        f"checkpoint {path} is damaged: {reason}; use another checkpoint, or restore this one from a backup"
    )


def step_of(checkpoint: Path) -> int:
    """Return N of a checkpoint folder step-N."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the committed checkpoint folders of a run, oldest first, not verified."""
    found = {
        int(match[1]): path
        for path in Path(run_dir).glob("checkpoints/step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found)]


def latest_checkpoint(
    run_dir: Path, only: Collection[str] | None = None, warn: Callable[[str], None] = print_warning
) -> Path | None:
    """Return the newest checkpoint of a run whose files are intact; None when the run has none.

    ``only`` limits the check to the state and these groups. A damaged checkpoint is skipped with a warning
    through ``warn``; InputError when all are damaged.
    """

    def read(path: Path) -> Path:
        verify(path, only)
        return path

    return newest(run_dir, read, warn)


def load_latest(
    run_dir: Path, only: Collection[str] | None = None, warn: Callable[[str], None] = print_warning
) -> Checkpoint | None:
    """``load_checkpoint`` of what ``latest_checkpoint`` finds, reading every file once."""
    return newest(run_dir, lambda path: load_checkpoint(path, only), warn)


def newest(run_dir: Path, read: Callable[[Path], T], warn: Callable[[str], None]) -> T | None:
    """Return ``read`` of the newest checkpoint that ``read`` does not refuse.

    A trainer that commits and removes checkpoints at the same time is no damage: after a failed read the
    folder is listed again, and only a checkpoint that fails and is still there counts as damaged.
    """
    paths = settled_listing(run_dir)
    warnings = []
    for _ in range(LISTINGS):
        changed = False
        warnings = []
        for path in reversed(paths):
            try:
                found = read(path)
            except (InputError, OSError) as error:
                now = settled_listing(run_dir)
                changed = now != paths
                if changed:
                    paths = now
                    break
                warnings.append(f"warning: {error}")
                continue
            if path != paths[-1]:
                warnings.append(f"warning: resuming from the earlier checkpoint {path}")
            for warning in warnings:
                warn(warning)
            return found
        if not changed:
            break
    for warning in warnings:
        warn(warning)
    if paths:
        raise InputError(
            f"no checkpoint of {run_dir} can be read ({len(paths)} of {len(paths)} are damaged, see the "
            "warnings); "
            "restore one from a backup, or train into another run.dir"
        )
    return None


def settled_listing(run_dir: Path) -> list[Path]:
    """``list_checkpoints``, again if it is empty only because a trainer replaces the only checkpoint just
    now.
    """
    for _ in range(LISTINGS):
        paths = list_checkpoints(run_dir)
        if paths or not any(Path(run_dir).glob(f"checkpoints/{TEMPORARY}*")):
            break
        time.sleep(0.05)
    return paths


def prune(run_dir: Path, step: int, keep: int, protected: Collection[int] = ()) -> None:
    """Remove checkpoints older than that of ``step``, which was just committed and is therefore good,
    beyond ``keep``; not those of the steps ``protected``.

    Those whose files do not have the sizes in their manifest do not count and are removed first. Later
    steps stay: they can only be checkpoints that a resume skipped as damaged, and training will replace
    them.
    """
    steps = {path: step_of(path) for path in list_checkpoints(run_dir)}
    earlier = [path for path in steps if steps[path] < step]
    earlier.sort(key=lambda path: (has_listed_sizes(path), steps[path]), reverse=True)
    for path in earlier[max(keep - 1, 0) :]:
        if steps[path] in protected:
            continue
        removed = unique_name(path, f"{TEMPORARY}pruned-")  # renamed first: no reader sees half a checkpoint
        os.rename(path, removed)
        shutil.rmtree(removed, ignore_errors=True)


def has_listed_sizes(path: Path) -> bool:
    """Do the files have the sizes in their manifest? (Hashes of old checkpoints are not recomputed at every
    save.)
    """
    try:
        return all(
            (path / name).stat().st_size == entry["bytes"] for name, entry in read_manifest(path).items()
        )
    except (InputError, OSError):
        return False
