# SPDX-License-Identifier: Apache-2.0
"""Resolve rank, device, dtype and random streams; signals that stop a run.

Every random number of the program comes from a ``torch.Generator`` made here from integers and names, never
from global state: in training it is keyed by (seed, step, ...), in sampling by the sample's own seed.
Generators live on the CPU, so a seed means the same numbers on every device.
"""

import hashlib
import logging
import math
import os
import platform
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from latte.checks import InputError, choose
from latte.tables import Later, Table

if TYPE_CHECKING:  # settings are read with this module, before torch is needed
    import torch
    from torch import Tensor

DTYPES: Table[str, "torch.dtype"] = Table(
    {
        "fp32": Later("torch:float32"),
        "bf16": Later("torch:bfloat16"),
        "fp16": Later("torch:float16"),
        "int8": Later("torch:int8"),
        "fp8": Later("torch:float8_e4m3fn"),
    }
)

LOG = logging.getLogger(__name__)
TESTED = {  # package: the oldest and the newest version that the tests ran with
    "torch": ("2.11", "2.15"),
    "numpy": ("1.26", "2.4"),
    "av": ("17.1", "18.1"),
    "diffusers": ("0.35", "0.42"),
    "transformers": ("5.0", "5.24"),
    "peft": ("0.18", "0.21"),
}
LIMITED = "LATTE_LIMITED_THREADS"  # what limit_threads has set, for threads_text
DEFAULT_TIMEOUT = 300.0  # seconds to wait for another process
FASTEST = "fastest"  # instead of a dtype: measured for a model, see latte.model.fastest


def untested_versions() -> list[str]:
    """Return a line for each installed package of TESTED whose version is outside its range."""
    lines = []
    for name, (oldest, newest) in TESTED.items():
        try:
            found = version(name)
        except (PackageNotFoundError, KeyError):
            continue
        number = re.match(r"(\d+)\.(\d+)", found)
        first, last = (tuple(map(int, bound.split("."))) for bound in (oldest, newest))
        if number and not first <= tuple(map(int, number.groups())) <= last:
            lines.append(
                f"{name} {found} is outside the tested range, {oldest} to {newest}; if something fails, "
                "install a version of that range"
            )
    return lines


@cache
def warn_untested() -> None:
    """Log the lines of ``untested_versions``, once in a process, and in the first of several only."""
    if rank() == 0:
        for line in untested_versions():
            LOG.warning("%s", line)


def rank() -> int:
    """Return the index of this process among all of them (torchrun's RANK), 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes (torchrun's WORLD_SIZE), 1 when alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the index of this process on its machine (torchrun's LOCAL_RANK)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def alone() -> Iterator[None]:
    """Make this process the only one inside: what it does there needs no other. It keeps its own GPU."""
    before = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def usable_cpus(root: str = "/") -> tuple[int, str]:
    """Return how many CPUs this process may use, and what limits them: 'CPU affinity', 'CPU quota' of its
    control group (as in a container), or '' when it may use all. ``root`` holds proc and sys.
    """
    cpus = os.cpu_count() or 1
    allowed = cpus
    with suppress(AttributeError, OSError):  # only Linux has it
        allowed = len(os.sched_getaffinity(0))
    quota = math.ceil(min(_quotas(Path(root)), default=allowed))
    if quota < allowed:
        return max(quota, 1), "CPU quota"
    return allowed, "CPU affinity" if allowed < cpus else ""


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs that the control groups of this process may use at a time, for those with a limit."""
    groups = ["0::/", "1:cpu:/"]
    with suppress(OSError):
        groups += (root / "proc/self/cgroup").read_text(encoding="utf-8").split()
    for line in groups:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = root / "sys/fs/cgroup"
        if controllers:
            folder = folder / "cpu"
        for part in ("", *place.strip("/").split("/")):
            folder = folder / part
            with suppress(OSError, ValueError):
                quota, period = _quota_and_period(folder, bool(controllers))
                if quota > 0:
                    yield quota / period


def _quota_and_period(folder: Path, first_version: bool) -> list[float]:
    """Return both numbers of a control group; ValueError for 'max'."""
    if not first_version:
        return [float(word) for word in (folder / "cpu.max").read_text(encoding="utf-8").split()]
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    return [float((folder / name).read_text(encoding="utf-8")) for name in names]


def limit_threads(root: str = "/") -> None:
    """Let torch start as many threads as a CPU quota allows, where neither the user nor torchrun has set
    OMP_NUM_THREADS. To be called before torch is imported, which respects the affinity by itself.

    The load of the machine does not count: the last bits of results depend on the number of threads.
    """
    cpus, reason = usable_cpus(root)
    if reason == "CPU quota" and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(cpus)
        os.environ[LIMITED] = str(cpus)


def threads_text() -> str:
    """Return the number of torch's threads and what limits it, such as '2 threads (CPU quota)'."""
    import torch

    setting = os.environ.get("OMP_NUM_THREADS")
    reason = usable_cpus()[1]
    if setting is not None and os.environ.get(LIMITED) != setting:
        reason = f"OMP_NUM_THREADS={setting}"
    return f"{torch.get_num_threads()} threads" + (f" ({reason})" if reason else "")


def resolve_device(device: "str | torch.device" = "auto") -> "torch.device":
    """Return the device of this process for 'auto', 'cpu', 'cuda', 'mps', 'cuda:1' or a ``torch.device``.

    'cuda' without a number is the process's own GPU (LOCAL_RANK). InputError when this machine has no such
    device.
    """
    import torch

    warn_untested()
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, _, number = str(device).partition(":")
    if kind == "gpu":
        raise InputError("device is 'gpu', which is not one of cpu, cuda, mps; did you mean 'cuda'?")
    if kind == "auto":
        kind = next(name for name in ("cuda", "mps", "cpu") if available[name])
    count = torch.cuda.device_count() if kind == "cuda" else 1
    usable = choose("device", kind, available) and (
        not number or (number.isdecimal() and int(number) < count)
    )
    if not usable:
        raise InputError(f"device is {str(device)!r}, but torch finds no such device here; use auto or cpu")
    if kind != "cuda":
        return torch.device(kind)
    return torch.device(kind, int(number) if number else local_rank())


def resolve_dtype(dtype: "str | torch.dtype", device: "torch.device") -> "torch.dtype":
    """Return the dtype of matrix products for 'auto', a name in DTYPES or the ``torch.dtype`` of one of them.

    'auto' is bf16 on a CUDA device that supports it and fp32 elsewhere. int8
    and fp8, for sampling only, are never chosen by 'auto'. InputError for one that ``device`` lacks.
    """
    import torch

    if dtype == FASTEST:
        raise InputError(
            "dtype is fastest, which is measured for a model, but there is none here; give auto or a dtype"
        )
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if isinstance(dtype, torch.dtype):
        found = choose("dtype", dtype, {known: known for known in DTYPES.values()})
    else:
        found = choose("dtype", dtype, DTYPES)
    check_low_bit(found, device)
    return found


def check_low_bit(dtype: "torch.dtype", device: "torch.device") -> None:
    """InputError for int8 or fp8 on a device without such matrix products, naming what it lacks."""
    import torch

    if dtype == torch.float8_e4m3fn:
        found = f"{device} is no NVIDIA GPU"
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability >= (9, 0):
                return
            found = f"{device} has {capability[0]}.{capability[1]}"
        raise InputError(
            "dtype is fp8, which needs FP8 matrix products with a scale per row (compute capability 9.0, "
            f"Hopper), but {found}; use int8, bf16 or fp32"
        )
    if dtype == torch.int8:
        try:
            ones = torch.ones(32, 32, dtype=torch.int8, device=device)
            right = bool((torch.ops.aten._int_mm(ones, ones.t()) == 32).all())
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"dtype is int8, but {device} has no int8 matrix product in this torch ({reason}); use bf16, "
                "fp16 or fp32"
            ) from error
        if not right:
            raise InputError(f"dtype is int8, but the int8 matrix product of {device} is wrong; use fp32")


def device_name(device: "torch.device") -> str:
    """Return a GPU's name, or the processor's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def machine_name(device: "torch.device") -> str:
    """Return what decides the speed of ``device``: a GPU's name, or a processor's with torch's threads."""
    import torch

    name = device_name(device)
    if device.type == "cuda":
        return name
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} {name} {capability} {torch.get_num_threads()} threads"


def memory_of(device: "torch.device") -> int | None:
    """Return the bytes of memory of ``device``, the machine's own for a CPU; None where that is unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not POSIX
        return None
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")))
    except (OSError, ValueError):  # no container, or one without a limit
        return total


@contextmanager
def borrowed(part: Any, device: "torch.device", home: "torch.device") -> Iterator[None]:
    """Keep ``part`` (anything with ``to``) on ``device`` inside, and at ``home`` afterwards."""
    import torch

    part.to(device)
    try:
        yield
    finally:
        part.to(home)
        if device.type == "cuda" and device != home:
            torch.cuda.empty_cache()


def generator(*key: int | str) -> "torch.Generator":
    """Return a CPU generator, a pure function of ``key`` such as (seed, 'noise', step), on every machine."""
    import torch

    digest = hashlib.sha256("/".join(str(part) for part in key).encode("utf-8", "surrogatepass")).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class SampleNoise:
    """Keep one random stream per sample, so that a sample does not depend on its batch.

    ``noise(shape)`` returns the next standard normal (b, *shape), float32 on the CPU, row i from the stream
    of ``seeds[i]``.
    """

    def __init__(self, seeds: Sequence[int]):
        self.generators = [generator(seed, "sample") for seed in seeds]

    def __call__(self, shape: Sequence[int]) -> "Tensor":
        import torch

        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators])


# SIGHUP: the terminal was closed. SIGUSR1: SLURM's early warning before a time limit. Windows has neither.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)


class StopRequest:
    """``with StopRequest() as stop``: ``stop.code`` is 0 until a signal arrives, then 128 + its number.

    That is the exit code: 130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP), 138 (SIGUSR1). SIGHUP stays ignored
    where nohup ignores it. The previous handlers are restored on exit. Outside the main thread, where
    Python allows no handlers, ``stop.code`` stays 0.
    """

    def __init__(self) -> None:
        self.code = 0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if not ignored_by_nohup(number):
                    self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record the first signal; exit at the second one without saving (committed checkpoints stay)."""
        if self.code:
            os._exit(128 + number)
        self.code = 128 + number


def ignored_by_nohup(number: int) -> bool:
    """Is ``number`` SIGHUP, ignored by the command that started this process, so that closing the terminal
    does not stop it?
    """
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
