# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: committed atomically, verified byte for byte when read, safetensors and JSON only.

``checkpoints/step-N/`` holds the safetensors files of every group of tensors (one, or one of each process
that saved a part, see ``latte.checkpoint.split``), state.json, and manifest.json with the size and SHA-256 of
every other file. Neither safetensors nor torch notices a flipped bit in the weights, so nothing is used
before its hash matches. Readers need no lock: a trainer may commit and remove checkpoints while they read.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from latte.checkpoint.split import file_name, groups_in, open_group, write_whole
from latte.checks import InputError, RunError
from latte.files import TEMPORARY, commit_folder, reported, sync, unique_name
from latte.tensors import find_nonfinite

T = TypeVar("T")
Tensors = Mapping[str, Mapping[str, Tensor]]
"""Group -> name -> tensor."""

Files = dict[str, dict]
"""Name -> {bytes, sha256} of the files of a checkpoint."""

FORMAT = 1
SPLIT_FORMAT = 2  # a group in several files, which earlier versions cannot read
MANIFEST = "manifest.json"
STATE = "state.json"
MAX_MANIFEST_BYTES = 1 << 24
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
WORTH_THREADS = 64 << 20  # bytes whose hashes are computed in several threads
LISTINGS = 100  # how often a reader lists the checkpoints again while a trainer changes them


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``tensors[group][name]`` on the CPU, or their ``Rows`` that are not read yet,
    and the JSON ``state``.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Any]]
    state: dict


def print_warning(message: str) -> None:
    """Print to stderr, the default place of warnings."""
    print(message, file=sys.stderr)


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Tensors,
    state: Mapping[str, object],
    keep: int | None = None,
    protected: Collection[int] = (),
    count: int = 1,
    others: Callable[[Path], Callable[[], Files]] | None = None,
) -> Path:
    """Commit ``tensors`` and ``state`` (plain data) as ``run_dir``/checkpoints/step-``step``.

    With ``keep``, older checkpoints beyond the newest ``keep`` are removed afterwards, but not those of the
    steps ``protected``. With ``count`` processes these are the parts of the first one: ``others(folder)``
    lets the others write theirs into the uncommitted folder, and calling what it returns waits for them.
    Raises RunError when a tensor holds NaN/Inf (it is named), or when the disk refuses (with the path and the
    number of bytes needed); every earlier checkpoint is then unchanged.
    """
    run_dir = Path(run_dir)
    path = run_dir / "checkpoints" / f"step-{step}"
    earlier = list_checkpoints(run_dir)
    kept = f"; {earlier[-1]} is unchanged" if earlier else ""
    check_parts(tensors, step, kept)
    text = json.dumps({**state, "step": step}, indent=1, allow_nan=False) + "\n"
    needed = sum(tensor.nbytes for members in tensors.values() for tensor in members.values()) + len(text)

    def write(folder: Path) -> None:
        finished = others(folder) if others else dict
        (folder / STATE).write_text(text, encoding="utf-8")
        files = write_parts(folder, tensors, 1, count) | {STATE: fingerprint(folder / STATE)}
        (folder / MANIFEST).write_text(manifest_text(files | finished()), encoding="utf-8")

    with reported(f"the checkpoint of step {step}", path, needed, kept):
        commit_folder(path, write)
        if keep is not None:
            prune(run_dir, step, keep, protected)
    return path


def check_parts(tensors: Tensors, step: int, kept: str = "") -> None:
    """RunError, naming the tensor, when one that is to be saved holds NaN/Inf."""
    for group, members in tensors.items():
        found = find_nonfinite(members)
        if found:
            raise RunError(
                f"the checkpoint of step {step} was not written: {group} tensor {found} (NaN or Inf){kept}; "
                "lower train.lr, or resume from an earlier checkpoint"
            )


def write_parts(folder: Path, tensors: Tensors, number: int, count: int) -> Files:
    """Write what process ``number`` (1, 2, ...) of ``count`` has of every group; return its files."""
    files: Files = {}
    for group, members in tensors.items():
        name = file_name(group, number, count)
        stored = {key: tensor.detach().contiguous() for key, tensor in members.items()}
        save_file(stored, folder / name)
        if number > 1:  # the first one flushes the files of its own machine
            sync(folder / name)
        files[name] = fingerprint(folder / name)
    return files


def load_checkpoint(path: Path, only: Collection[str] | None = None) -> Checkpoint:
    """Read and verify a checkpoint folder; ``only`` limits which groups of tensors are read (and verified).

    Raises InputError naming the file when anything is missing, truncated, altered or not a checkpoint of
    ours, and naming the tensor when one holds NaN/Inf.
    """
    verify(path, only)
    found = open_checkpoint(path, only)
    with readable(found.path):
        tensors = {
            group: {name: rows.read() for name, rows in members.items()}
            for group, members in found.tensors.items()
        }
    return Checkpoint(found.path, found.step, tensors, found.state)


def open_checkpoint(path: Path, only: Collection[str] | None = None) -> Checkpoint:
    """Return a checkpoint that was verified before; its tensors are ``Rows``, read when they are needed.

    InputError as for ``load_checkpoint``.
    """
    path = Path(path)
    manifest = read_manifest(path)
    with readable(path):
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        files = groups_in(manifest)
        chosen = files if only is None else {group: files[group] for group in only}
        tensors = {group: open_group(path, names) for group, names in chosen.items()}
        return Checkpoint(path, int(state["step"]), tensors, state)


def merge_checkpoint(path: Path, out: Path) -> list[str]:
    """Write the checkpoint ``path`` to the new folder ``out`` with one file per group, tensor by tensor: no
    more than one tensor is in memory. Return the names of the groups.

    InputError as for ``load_checkpoint``, RunError when the disk refuses.
    """
    verify(path)
    tensors = open_checkpoint(path).tensors

    def write(folder: Path) -> None:
        shutil.copyfile(path / STATE, folder / STATE)
        for group, rows in tensors.items():
            write_whole(rows, folder / file_name(group))
        files = {file.name: fingerprint(file) for file in folder.iterdir()}
        (folder / MANIFEST).write_text(manifest_text(files), encoding="utf-8")

    with readable(path), reported("the merged checkpoint", out):
        commit_folder(out, write)
    return sorted(tensors)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what reading a damaged checkpoint raises into one InputError."""
    try:
        yield
    except (InputError, RunError):
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"it cannot be read ({error})") from error


def verify(path: Path, only: Collection[str] | None = None) -> list[str]:
    """Check size and SHA-256 of the state and of the groups in ``only`` (None: of every file), several files
    at a time; return the names.
    """
    path = Path(path)
    manifest = read_manifest(path)
    names = set(manifest)
    if only is not None:
        names = {STATE}
        for group in only:
            if group not in (groups := groups_in(manifest)):
                raise damaged(path, f"{MANIFEST} lists no {file_name(group)}")
            names.update(groups[group])
    ordered = sorted(names)
    if sum(manifest[name]["bytes"] for name in ordered) < WORTH_THREADS:
        for name in ordered:
            verify_file(path, name, manifest[name])
        return ordered
    with ThreadPoolExecutor(min(len(ordered), os.cpu_count() or 1)) as pool:
        list(pool.map(lambda name: verify_file(path, name, manifest[name]), ordered))
    return ordered


def verify_file(path: Path, name: str, listed: Mapping[str, Any]) -> None:
    """InputError unless file ``name`` of the checkpoint ``path`` has the ``listed`` size and SHA-256."""
    try:
        found = fingerprint(path / name)
    except FileNotFoundError:
        raise damaged(path, f"{name} is missing, but {MANIFEST} lists it") from None
    except OSError as error:
        raise damaged(path, f"{name} cannot be read ({error.strerror})") from error
    for key, value in found.items():
        if value != listed[key]:
            raise damaged(path, f"{name} has {key} {value}, but {MANIFEST} lists {listed[key]}")


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
        exact = STATE in files and manifest_text(files) == text
        exact = exact and all(
            PLAIN_NAME.fullmatch(name) and entry.keys() == {"bytes", "sha256"}
            for name, entry in files.items()
        )
        groups_in(files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, f"{MANIFEST} cannot be read ({error})") from error
    if not exact:
        raise damaged(path, f"{MANIFEST} is not as it was written (format {FORMAT} or {SPLIT_FORMAT})")
    return files


def manifest_text(files: Mapping[str, Mapping]) -> str:
    """Return the only spelling of a manifest, so that every altered byte of it is noticed."""
    split = any(len(names) > 1 for names in groups_in(files).values())
    number = SPLIT_FORMAT if split else FORMAT
    return json.dumps({"format": number, "files": files}, indent=1, sort_keys=True) + "\n"


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
