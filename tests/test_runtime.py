# SPDX-License-Identifier: Apache-2.0
"""Devices and dtypes by name and as torch's own objects, and random numbers that depend on their key alone."""

import pytest
import torch

from latte.checks import InputError
from latte.runtime import DTYPES, SampleNoise, generator, resolve_device, resolve_dtype

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
