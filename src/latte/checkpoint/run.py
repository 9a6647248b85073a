# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: committed atomically, verified byte for byte when read, safetensors and JSON only.

``checkpoints/step-N/`` holds one safetensors file per group of tensors, state.json, and manifest.json with the size and SHA-256 of
every other file. Neither safetensors nor torch notices a flipped bit in the weights, so nothing is used before its hash fits.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latte.checks import InputError
from latte.files import TEMPORARY, commit_folder, reported

T = TypeVar("T")
FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
MAX_MANIFEST_BYTES = 1 << 20
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: ``tensors[group][name]`` on the CPU, and the JSON ``state``."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict


def say_on_stderr(message: str) -> None:
    """Where warnings go unless the caller has a better place."""
    print(message, file=sys.stderr)


def save_checkpoint(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, object],
    keep: int | None = None,
) -> Path:
    """Commit ``tensors`` (group -> name -> tensor) and ``state`` (plain data) as ``run_dir``/checkpoints/step-``step``.

    With ``keep``, older checkpoints beyond the newest ``keep`` are removed afterwards. Raises RunError, with the path and the bytes
    needed, when the disk refuses; every earlier checkpoint is then as it was.
    """
    run_dir = Path(run_dir)
    path = run_dir / "checkpoints" / f"step-{step}"
    text = json.dumps({**state, "step": step}, indent=1, allow_nan=False) + "\n"
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values()) + len(text)

    def write(folder: Path) -> None:
        (folder / STATE).write_text(text, encoding="utf-8")
        for name, group in tensors.items():
            file = folder / f"{name}.safetensors"
            save_file({key: tensor.detach().contiguous() for key, tensor in group.items()}, file)
            shutil.copymode(folder / STATE, file)  # safetensors makes it private whatever the umask says
        (folder / MANIFEST).write_text(
            manifest_text({file.name: fingerprint(file) for file in folder.iterdir()}), encoding="utf-8"
        )

    earlier = list_checkpoints(run_dir)
    kept = f"; {earlier[-1]} is as it was" if earlier else ""
    with reported(f"the checkpoint of step {step}", path, needed, kept):
        commit_folder(path, write)
        if keep is not None:
            prune(run_dir, step, keep)
    return path


def load_checkpoint(path: Path, only: Collection[str] | None = None) -> Checkpoint:
    """Read and verify a checkpoint folder; ``only`` limits which groups of tensors are read (and verified).

    Raises InputError naming the file when anything is missing, cut short, altered, or not a checkpoint of ours.
    """
    path = Path(path)
    files = verify(path, only)
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = {Path(name).stem: load_file(path / name) for name in files if name.endswith(".safetensors")}
        return Checkpoint(path, int(state["step"]), tensors, state)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, f"it cannot be read ({error})") from error


def verify(path: Path, only: Collection[str] | None = None) -> list[str]:
    """Names of the files of the checkpoint ``path`` that are asked for, after each has been found with its size and SHA-256."""
    manifest = read_manifest(path)
    wanted = manifest if only is None else {STATE, *(f"{group}.safetensors" for group in only)}
    for name in wanted:
        if name not in manifest:
            raise damaged(path, f"{MANIFEST} lists no {name}")
        if not (path / name).is_file():
            raise damaged(path, f"{name} is missing, which {MANIFEST} lists")
        for what, found in fingerprint(path / name).items():
            if found != manifest[name][what]:
                raise damaged(path, f"{name} has {what} {found}, but {MANIFEST} says {manifest[name][what]}")
    return sorted(wanted)


def read_manifest(path: Path) -> dict[str, dict]:
    """File name -> {bytes, sha256} of a checkpoint folder; InputError unless it is exactly what ``save_checkpoint`` writes."""
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"checkpoint {path} has no {MANIFEST}, so it is no complete checkpoint; give a folder checkpoints/step-N of a run"
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
    """The one way of writing a manifest, so that every altered byte of it shows."""
    return json.dumps({"format": FORMAT, "files": files}, indent=1, sort_keys=True) + "\n"


def fingerprint(file: Path) -> dict[str, int | str]:
    """{bytes, sha256} of a file's content."""
    with open(file, "rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def damaged(path: Path, how: str) -> InputError:
    """The message about a checkpoint that cannot be trusted."""
    return InputError(
        f"checkpoint {path} is damaged: {how}; use another checkpoint, or delete this folder to go on from the one before"
    )


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoint folders of a run, oldest first, not verified."""
    found = {
        int(match[1]): path
        for path in Path(run_dir).glob("checkpoints/step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found)]


def latest_checkpoint(
    run_dir: Path, only: Collection[str] | None = None, say: Callable[[str], None] = say_on_stderr
) -> Path | None:
    """The newest checkpoint of a run whose files all fit (``only``: state and these groups); None when the run has none.

    A damaged one is passed over with a warning through ``say``; InputError when all are damaged.
    """

    def read(path: Path) -> Path:
        verify(path, only)
        return path

    return newest(run_dir, read, say)


def load_latest(
    run_dir: Path, only: Collection[str] | None = None, say: Callable[[str], None] = say_on_stderr
) -> Checkpoint | None:
    """``load_checkpoint`` of what ``latest_checkpoint`` finds, reading every file once."""
    return newest(run_dir, lambda path: load_checkpoint(path, only), say)


def newest(run_dir: Path, read: Callable[[Path], T], say: Callable[[str], None]) -> T | None:
    """``read`` of the newest checkpoint that ``read`` does not refuse."""
    paths = list_checkpoints(run_dir)
    for path in reversed(paths):
        try:
            found = read(path)
        except InputError as error:
            say(f"warning: {error}")
            continue
        if path != paths[-1]:
            say(f"warning: going on from the earlier checkpoint {path}")
        return found
    if paths:
        raise InputError(
            f"every checkpoint of {run_dir} is damaged ({len(paths)} of {len(paths)}); restore one, "
            "or delete the folder checkpoints to start over"
        )
    return None


def prune(run_dir: Path, step: int, keep: int) -> None:
    """Remove checkpoints older than that of ``step``, which has just been committed and is therefore good, beyond ``keep`` in all.

    Those whose files do not have the sizes of their manifest do not count and go first. Later steps are left alone: they can only
    be ones that a resume has passed over as damaged, and training will replace them.
    """
    steps = {path: int(path.name.removeprefix("step-")) for path in list_checkpoints(run_dir)}
    earlier = sorted(
        (path for path in steps if steps[path] < step),
        key=lambda path: (looks_whole(path), steps[path]),
        reverse=True,
    )
    for path in earlier[max(keep - 1, 0) :]:
        gone = path.with_name(
            f"{TEMPORARY}pruned-{path.name}"
        )  # renamed first: a half-removed checkpoint is never seen
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def looks_whole(path: Path) -> bool:
    """Do the files have the sizes of their manifest? (The hashes of old checkpoints are not recomputed at every save.)"""
    try:
        return all(
            (path / name).stat().st_size == entry["bytes"] for name, entry in read_manifest(path).items()
        )
    except (InputError, OSError):
        return False
