# SPDX-License-Identifier: Apache-2.0
"""Devices and dtypes by name and as torch's own objects, and random numbers that depend on their key alone."""

import os

import pytest
import torch

from latte.checks import InputError
from latte.runtime import (
    DTYPES,
    LIMITED,
    SampleNoise,
    generator,
    limit_threads,
    resolve_device,
    resolve_dtype,
    threads_text,
    usable_cpus,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", ["cpu", "auto", CPU, torch.device("cpu", 0)])
def test_devices_by_name_and_as_objects(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert resolve_device(device).type == "cpu"


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda"), "mps", torch.device("mps"), "cpuu", "xpu"])
def test_a_device_that_is_not_here_is_refused_in_one_line(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(InputError, match="device is") as caught:
        resolve_device(device)
    assert "\n" not in str(caught.value)


def test_the_gpu_of_this_process_unless_an_index_is_given(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert resolve_device("cuda") == resolve_device(torch.device("cuda")) == torch.device("cuda", 2)
    assert resolve_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "fp8"])
def test_dtypes_by_name_and_as_objects(name):
    assert resolve_dtype(name, CPU) == resolve_dtype(DTYPES[name], CPU) == DTYPES[name]


@pytest.mark.parametrize("dtype", ["float8", torch.float8_e5m2, torch.int16, "bf32"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(InputError, match="dtype is"):
        resolve_dtype(dtype, CPU)


def test_random_numbers_depend_on_their_key_alone():
    first = torch.randn(5, generator=generator(3, "noise", 7))
    torch.manual_seed(1)
    assert torch.equal(first, torch.randn(5, generator=generator(3, "noise", 7)))
    assert not torch.equal(first, torch.randn(5, generator=generator(3, "noise", 8)))


def test_the_noise_of_a_sample_does_not_depend_on_its_batch():
    together = SampleNoise([4, 9])
    alone = SampleNoise([9])
    for _ in range(2):
        assert torch.equal(together((2, 3))[1], alone((2, 3))[0])


def test_fp8_needs_a_gpu_that_has_it(monkeypatch):
    with pytest.raises(InputError, match=r"dtype is fp8, .*but cpu is no NVIDIA GPU; use int8, bf16 or fp32"):
        resolve_dtype("fp8", CPU)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (8, 9))
    with pytest.raises(InputError, match=r"compute capability 9.0, Hopper.*but cuda:0 has 8.9"):
        resolve_dtype("fp8", torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    assert resolve_dtype("fp8", torch.device("cuda", 0)) == torch.float8_e4m3fn


def test_int8_needs_a_device_whose_product_works_and_is_right(monkeypatch):
    def missing(a, b):
        raise NotImplementedError("no kernel\nof that name")

    monkeypatch.setattr(torch.ops.aten, "_int_mm", missing)
    with pytest.raises(InputError, match=r"dtype is int8, but cpu has no .*\(no kernel\)"):
        resolve_dtype("int8", CPU)
    monkeypatch.setattr(torch.ops.aten, "_int_mm", lambda a, b: (a.int() @ b.int()) + 1)
    with pytest.raises(InputError, match="product of cpu is wrong"):
        resolve_dtype(torch.int8, CPU)


def groups(root, lines, **files):
    """Write proc/self/cgroup with ``lines`` and ``files`` below sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("\n".join(lines) + "\n")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


def first(folder, quota):
    """Files of a control group of the first version."""
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}


@pytest.fixture
def cpus(monkeypatch):
    """A machine of 64 CPUs, of which 48 are in this process's affinity, and no setting of threads."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv(LIMITED, raising=False)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        (["0::/"], {"cpu.max": "max 100000"}, (48, "CPU affinity")),
        (["0::/"], {"cpu.max": "250000 100000"}, (3, "CPU quota")),
        (["0::/a/b"], {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, (4, "CPU quota")),
        (["0::/not/here"], {"cpu.max": "50000 100000"}, (1, "CPU quota")),
        (["0::/"], {"cpu.max": "9900000 100000"}, (48, "CPU affinity")),
        (["4:memory:/x", "1:cpu,cpuacct:/x"], first("cpu/x", "200000"), (2, "CPU quota")),
        (["1:cpu:/"], first("cpu", "-1"), (48, "CPU affinity")),
        (["0::/"], {"cpu.max": "a b c"}, (48, "CPU affinity")),
        ([], {}, (48, "CPU affinity")),
    ],
)
def test_the_cpus_that_affinity_and_quota_leave(tmp_path, cpus, lines, files, expected):
    assert usable_cpus(groups(tmp_path, lines, **files)) == expected


def test_all_cpus_without_a_limit(tmp_path, cpus, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert usable_cpus(str(tmp_path)) == (64, "")
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cpus(str(tmp_path)) == (64, "")


def test_threads_follow_a_quota_unless_they_are_set(tmp_path, cpus, monkeypatch):
    quota = groups(tmp_path / "quota", ["0::/"], **{"cpu.max": "200000 100000"})
    limit_threads(str(tmp_path))
    assert "OMP_NUM_THREADS" not in os.environ, "torch respects the affinity itself"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    limit_threads(quota)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert threads_text() == f"{torch.get_num_threads()} threads (OMP_NUM_THREADS=7)"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv(LIMITED, "")  # so that it is restored
    limit_threads(quota)
    assert os.environ.pop("OMP_NUM_THREADS") == "2" == os.environ[LIMITED]
    monkeypatch.setattr("latte.runtime.usable_cpus", lambda: (2, "CPU quota"))
    assert threads_text() == f"{torch.get_num_threads()} threads (CPU quota)"


def test_gpu_is_cuda_here():
    with pytest.raises(InputError, match="did you mean 'cuda'"):
        resolve_device("gpu")
