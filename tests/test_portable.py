# SPDX-License-Identifier: Apache-2.0
"""Windows and macOS, simulated: signals, processes, files and names, and no float64 on a device like mps.

What a simulation cannot show is not claimed: no test here ran on either system. The lock of Windows is in
tests/checkpoint/test_run.py, imports without POSIX in tests/test_storeys.py.
"""

import importlib.util
import os
import signal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import latte.runtime
from latte.checks import InputError
from latte.data import loader
from latte.data.footage import clip_names
from latte.data.writers import is_running
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.files import sync
from latte.inference.requests import SampleRequest
from latte.model.latte import Latte, ModelConfig
from latte.runtime import resolve_device, resolve_dtype

ONLY_POSIX = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL", "SIGALRM", "pthread_sigmask")


@pytest.fixture
def windows_signals(monkeypatch):
    """The module signal without what Windows lacks, and a second copy of latte.runtime that saw it so."""
    for name in ONLY_POSIX:
        monkeypatch.delattr(signal, name)
    spec = importlib.util.spec_from_file_location("runtime_on_windows", latte.runtime.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_stops_at_the_signals_that_windows_has(windows_signals):
    assert windows_signals.STOP_SIGNALS == (signal.SIGINT, signal.SIGTERM)
    with windows_signals.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.code == 130


def test_workers_start_where_signals_cannot_be_blocked(windows_signals):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        with loader.stop_signals_blocked():
            loader.ignore_stop_signals(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_no_process_is_asked_by_a_signal_on_windows(monkeypatch):
    def kill(pid, number):
        raise AssertionError("signal 0 ends a process on Windows")

    monkeypatch.setattr(os, "kill", kill)
    monkeypatch.setattr(os, "name", "nt")
    assert is_running(4)


def test_a_folder_is_not_opened_to_flush_it_on_windows(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    opened = []
    real = os.open

    def record(path, flags, *rest):
        opened.append((os.path.basename(path), flags & os.O_RDWR))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", record)
    monkeypatch.setattr(os, "name", "nt")
    sync(tmp_path)
    assert opened == []
    sync(file)
    assert opened == [("file", os.O_RDWR)], "Windows flushes only what is open for writing"


@pytest.mark.parametrize("text", ['a<b>c:d"e|f?g*h', "über\\..\\x", "con", "x" * 500, "a\nb"])
def test_names_of_files_are_allowed_on_windows(text):
    names = [SampleRequest(seed=1, prompt=text).file, clip_names([f"{text}.mp4".replace("\n", "")])]
    for name in (names[0], *(f"{name}-0000.mp4" for name in names[1].values())):
        assert not set(name) & set('<>:"\\|?*\n'), name
        assert len(os.fsencode(name)) <= 200
        assert name.partition(".")[0].upper() not in {"CON", "NUL", "AUX", "PRN", "COM1", "LPT1"}


def test_long_names_stay_distinct():
    keys = [f"{'x' * 230}{letter}.mp4" for letter in "ab"]
    assert len(set(clip_names(keys).values())) == 2


def test_mps_is_found_and_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    device = resolve_device("mps")
    assert resolve_dtype("auto", device) == torch.float32
    with pytest.raises(InputError, match="mps is no NVIDIA GPU"):
        resolve_dtype("fp8", device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    with pytest.raises(InputError, match="torch finds no such device here"):
        resolve_device("mps")


class NoFloat64(TorchDispatchMode):
    """The meta device as one without float64: what mps is."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.count += 1
                if tensor.dtype == torch.float64:
                    raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {function}")
        return found


@pytest.mark.parametrize("position", ["absolute", "rotary"])
@pytest.mark.parametrize("objective", ["paper", "rectified_flow", "v_min_snr"])
def test_a_training_step_needs_no_float64_on_its_device(position, objective):
    config = ModelConfig(depth=2, width=32, heads=2, num_frames=4, latent_size=4, temporal_position=position)
    model = Latte(config).to("meta")
    process = build_process(DiffusionConfig(objective=objective))
    z = torch.empty(2, 4, 4, 4, 4, device="meta")
    t = torch.tensor([3, 500])
    with NoFloat64() as mode:
        loss = OBJECTIVES[objective](model, process, z, t, z)
        loss.total.mean().backward()
    assert mode.count > 100
    with NoFloat64(), pytest.raises(TypeError, match="float64"):
        z.double()
