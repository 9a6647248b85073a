# SPDX-License-Identifier: Apache-2.0
"""Remote stores through fsspec: a run's checkpoints are copied there and fetched from there, latents read.

A URL such as ``s3://bucket/runs/shapes``, ``gs://...``, ``file:///...`` or ``memory://...`` names a folder.
torch brings fsspec; the package of a store (s3fs, gcsfs) has to be installed. A checkpoint in a store is
complete when its manifest is there, which is written last. Credentials come from where the store's own tools
take them, never from the URL.
"""

import errno
import hashlib
import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from latte.checkpoint.lock import folder_lock
from latte.checkpoint.run import MANIFEST, STATE, latest_checkpoint, list_checkpoints, step_of, verify
from latte.checks import InputError, RunError, check, printable
from latte.files import commit_file, commit_folder, reported, user_cache

T = TypeVar("T")
ANSWER_SECONDS = 60.0  # until a store that does not answer counts as unreachable
OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "abfs", "az", "oss")
MARK = ".latte"  # a file that shows that a store can be written
FAILURES = (OSError, RuntimeError, ValueError, TypeError, ImportError, LookupError)  # what stores raise


def is_remote(place: str | None) -> bool:
    """Return whether ``place`` is a URL of a store and not a path."""
    return place is not None and "://" in place


class Store:
    """A folder of a remote store. ``field`` is the setting that names it, for errors.

    InputError for a URL with a password, and for a kind of store whose package is missing.
    """

    def __init__(self, url: str, field: str):
        self.url = url.rstrip("/")
        self.field = field
        check(
            is_remote(url) and "@" not in urlsplit(url).netloc,
            f"{field} is {printable(url)}, but it must be a URL without a user name, such as "
            "s3://bucket/folder; credentials belong into the environment or the files of the store's tools",
        )
        import fsspec

        try:
            self.fs, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"{field} is {printable(url)}, which cannot be opened ({first_line(error)}); install the "
                "package of that store: pip install 'latte-video[remote]' for s3://"
            ) from error
        self.root = root.rstrip("/")

    def path(self, *names: str) -> str:
        """Return the store's own name of a file below the folder."""
        return "/".join([self.root, *names])

    def names(self, *folder: str) -> list[str]:
        """Return the names in a folder, [] when there is none."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(*folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(PurePosixPath(str(name).rstrip("/")).name for name in found)

    def has(self, *names: str) -> bool:
        """Return whether there is such a file."""
        self.fs.invalidate_cache()
        return self.fs.exists(self.path(*names))

    def put(self, file: Path, *names: str) -> None:
        """Copy a local file into the store."""
        self.make_folder(*names[:-1])
        self.fs.put_file(str(file), self.path(*names))

    @property
    def has_folders(self) -> bool:
        """Whether the store has folders apart from its files."""
        return urlsplit(self.url).scheme not in OBJECT_STORES

    def make_folder(self, *names: str) -> None:
        """Make a folder where there are any: object stores have none, and would make a bucket."""
        if self.has_folders:
            self.fs.makedirs(self.path(*names), exist_ok=True)

    def get(self, file: Path, *names: str) -> None:
        """Copy a file of the store to the local ``file``; InputError when the store fails, OSError for a full
        disk.
        """
        try:
            self.fs.get_file(self.path(*names), str(file))
        except FAILURES as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{self.field} is {printable(self.url)}, from which {'/'.join(names)} could not be copied "
                f"({first_line(error)}); check the network, then start again: what is complete is kept"
            ) from error

    def size(self, *names: str) -> int:
        """Return the bytes of a file."""
        return int(self.fs.size(self.path(*names)))

    def remove(self, *names: str) -> None:
        """Remove a file."""
        self.fs.rm_file(self.path(*names))

    def remove_folder(self, *names: str) -> None:
        """Remove an empty folder where there are any."""
        if self.has_folders:
            self.fs.rmdir(self.path(*names))

    def checkpoints(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        return [name for name in self.begun() if self.has("checkpoints", name, MANIFEST)]

    def begun(self) -> list[str]:
        """Return the names of the checkpoints of which there are files, complete or not, oldest first."""
        names = [name for name in self.names("checkpoints") if name.removeprefix("step-").isdecimal()]
        return sorted(names, key=lambda name: step_of(Path(name)))

    def asked(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return ``function(*arguments)`` of a store that answers in time; InputError when it does not, or
        refuses.
        """
        answer: Future[T] = Future()

        def ask() -> None:
            try:
                answer.set_result(function(*arguments))
            except BaseException as error:
                answer.set_exception(error)

        # A daemon: those of a pool would keep the process until the store answers.
        threading.Thread(target=ask, daemon=True, name="store").start()
        reason = f"no answer within {ANSWER_SECONDS:g} s"
        if wait([answer], ANSWER_SECONDS).done:
            error = answer.exception()
            if error is None:
                return answer.result()
            if not isinstance(error, FAILURES):
                raise error
            reason = first_line(error)
        raise InputError(
            f"{self.field} is {printable(self.url)}, which cannot be used ({reason}); check the address, the "
            "network and the credentials, or leave it out"
        )


def first_line(error: BaseException) -> str:
    """Return what an error says, on one line."""
    text = str(error).strip() or type(error).__name__
    return printable(text.splitlines()[0])


class Damaged(Exception):
    """A checkpoint of a store whose files are not those of its manifest."""


def fetch_run(url: str | None, run_dir: Path) -> None:
    """Bring the newest good checkpoint of the store ``url``, with the best one and the small files beside it,
    into ``run_dir`` unless that has a good one as new. Nothing to do without a URL.

    InputError for a store that cannot be read or written: that is found out here, before anything is trained.
    A damaged checkpoint is passed over with a warning.
    """
    if url is None:
        return
    store = Store(url, "train.mirror")
    store.asked(store.make_folder)
    store.asked(store.fs.pipe_file, store.path(MARK), b"")
    own = newest_good_step(run_dir)
    names = store.asked(store.checkpoints)
    for name in reversed(names):
        if step_of(Path(name)) <= own:
            return
        path = run_dir / "checkpoints" / name
        try:
            with reported(f"{url}/checkpoints/{name}", path):
                commit_folder(path, lambda folder, name=name: fetch_with_others(store, name, folder, run_dir))
        except Damaged as error:
            print(f"warning: {url}/checkpoints/{name} was passed over: {error}", file=sys.stderr)
            continue
        print(f"notice: {name} was fetched from {url}", file=sys.stderr)
        return
    check(
        not names or own > 0,
        f"no checkpoint of {printable(url)} can be read, all {len(names)} are damaged (see the warnings); "
        "restore one from a backup, or train into another train.mirror",
    )


def newest_good_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint whose files are intact, 0 without one."""
    try:
        path = latest_checkpoint(run_dir, warn=lambda warning: None)
    except InputError:  # all are damaged
        return 0
    return step_of(path) if path else 0


def fetch_with_others(store: Store, name: str, folder: Path, run_dir: Path) -> None:
    """``fetch_checkpoint``, then the best checkpoint and the small files of the run into ``run_dir``: an
    interrupted fetch does not commit ``folder``, so the next start brings them.
    """
    fetch_checkpoint(store, name, folder)
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    best = f"step-{state['best']['step']}" if state.get("best") else name
    path = run_dir / "checkpoints" / best
    if best != name and not path.exists():
        try:
            commit_folder(path, lambda empty: fetch_checkpoint(store, best, empty))
        except Damaged as error:
            print(
                f"warning: {store.url}/checkpoints/{best}, the best one, was passed over: {error}",
                file=sys.stderr,
            )
    for file in store.asked(store.names):
        if is_small(Path(file)):
            store.get(run_dir / file, file)


def fetch_checkpoint(store: Store, name: str, folder: Path) -> None:
    """Copy a checkpoint of the store into the empty ``folder`` and verify it."""
    for file in store.asked(store.names, "checkpoints", name):
        store.get(folder / file, "checkpoints", name, file)
    try:
        verify(folder)
    except InputError as error:
        raise Damaged(str(error)) from error


def is_small(file: Path) -> bool:
    """Return whether ``file`` of a run folder is copied beside the checkpoints: settings, metrics."""
    return file.suffix in (".jsonl", ".yaml", ".txt", ".json") and not file.name.startswith(".")


def local_copy(url: str) -> Path:
    """Return a folder of the user's cache with the files of the folder of latents ``url``.

    They are copied unless they are there already; latents that were encoded again have another manifest, and
    all of them are copied again. One process of a machine copies, the others wait for it. InputError when the
    store cannot be read, RunError when the disk refuses.
    """
    store = Store(url, "data.root")
    folder = user_cache() / "latents" / hashlib.sha256(store.url.encode()).hexdigest()[:16]
    names = [name for name in store.asked(store.names) if name.endswith(".safetensors")]
    check(
        store.asked(store.has, MANIFEST),
        f"data.root is {printable(url)}, which holds no {MANIFEST}; give a folder made by latte data encode",
    )
    with reported("the copy of data.root", folder), folder_lock(folder):
        manifest = store.asked(store.fs.cat_file, store.path(MANIFEST))
        known = folder / MANIFEST
        if not known.is_file() or known.read_bytes() != manifest:
            for file in folder.glob("*.safetensors"):
                file.unlink()
            commit_file(known, manifest.decode())  # first: what is copied now is kept after an interruption
        for name in names:
            file = folder / name
            size = store.asked(store.size, name)
            if not file.is_file() or file.stat().st_size != size:
                with reported(f"{url}/{name}", file, size):
                    commit_file(file, lambda path, name=name: store.get(path, name))
    return folder


class Mirror:
    """Copies checkpoints to a store, one at a time, in a thread; without a URL it does nothing.

    A copy that fails gives a warning and is tried again with the next checkpoint; those that were passed by
    meanwhile are left out. The local run is never touched.
    """

    def __init__(self, url: str | None, run_dir: Path):
        self.run_dir = run_dir
        self.store = Store(url, "train.mirror") if url else None
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()
        self.due: Path | None = None
        self.reason: str | None = None  # why the last copy failed

    def push(self, checkpoint: Path) -> None:
        """Begin to copy ``checkpoint``, or do it after the copy that is under way."""
        if self.store is None:
            return
        with self.lock:
            self.due = checkpoint
            if self.thread is None:
                self.thread = threading.Thread(target=self.work, daemon=True, name="mirror")
                self.thread.start()

    def work(self) -> None:
        """Copy what is due until nothing is."""
        while True:
            with self.lock:
                checkpoint = self.due
                self.due = None
                if checkpoint is None:
                    self.thread = None
                    return
            self.reason = None
            try:
                self.copy(checkpoint)
            except FAILURES as error:
                if not checkpoint.is_dir():  # removed meanwhile: a newer one is due
                    continue
                self.reason = first_line(error)
                print(
                    f"warning: {checkpoint} could not be copied to train.mirror ({self.reason}); training "
                    "goes on, and the next checkpoint is tried again",
                    file=sys.stderr,
                )

    def copy(self, checkpoint: Path) -> None:
        """Copy a checkpoint, its manifest last, and the small files of the run; then remove those checkpoints
        from the store that the run has removed.
        """
        store = self.store
        assert store is not None
        files = sorted(checkpoint.iterdir(), key=lambda file: (file.name == MANIFEST, file.name))
        for file in files:
            store.put(file, "checkpoints", checkpoint.name, file.name)
        for file in self.run_dir.iterdir():
            if file.is_file() and is_small(file):
                store.put(file, file.name)
        kept = {path.name for path in list_checkpoints(self.run_dir)}
        step = step_of(checkpoint)
        for name in store.begun():
            if name not in kept and step_of(Path(name)) < step:
                for file in sorted(store.names("checkpoints", name), key=lambda file: file != MANIFEST):
                    store.remove("checkpoints", name, file)
                store.remove_folder("checkpoints", name)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is being copied, at most so long."""
        thread = self.thread
        if thread is not None:
            thread.join(seconds)

    def flush(self) -> None:
        """Copy the newest checkpoint if it is not in the store yet; RunError when that fails again."""
        if self.store is None:
            return
        self.wait()
        paths = list_checkpoints(self.run_dir)
        if not paths:
            return
        try:
            if self.reason is not None or not self.store.has("checkpoints", paths[-1].name, MANIFEST):
                self.copy(paths[-1])
        except FAILURES as error:
            raise RunError(
                f"{paths[-1]} is complete, but it could not be copied to train.mirror={self.store.url} "
                f"({first_line(error)}); make the store reachable or make room, then run the same command "
                "again"
            ) from error
