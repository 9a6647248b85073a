# SPDX-License-Identifier: Apache-2.0
"""What a run says before its first step, and its expected time."""

import logging
from pathlib import Path

import torch

from latte.build import build
from latte.config.run import load_run
from latte.files import size_text
from latte.profile import header as module
from latte.profile.header import ExpectedTime, header
from latte.profile.plan import plan
from latte.training.callbacks import MetricsAccumulator, TrainEvent
from tiny import WORDS

CPU = torch.device("cpu")


def test_the_header_states_the_parts_with_their_numbers():
    words = [*WORDS, "data.num_clips=40", "data.hold_out=0.2", "train.steps=20", "train.micro_batch=3"]
    job = build(load_run("shapes", words)[0], "cpu")
    found = "\n".join(header(job.config, job.model, job.dataset, job.held_out, CPU))
    parameters = sum(parameter.numel() for parameter in job.model.parameters())
    for text in (
        "device: cpu",
        "float32",
        f"{parameters:,} parameters",
        "clips: 32, held out: 8",
        "3 frames, latent 3 x 3 x 16 x 16, 48 tokens",
        "batch: 4 clips = 3 clips x 2 accumulated x 1 processes; 20 steps see 80, each 2.5 times",
        "MiB a device",
    ):
        assert text in found, found


def test_of_several_processes_each_has_its_part(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    words = [*WORDS, "train.parallel=fsdp", "train.sequence_parallel=2"]
    job = build(load_run("shapes", words)[0], "cpu")
    found = "\n".join(header(job.config, job.model, job.dataset, job.held_out, CPU))
    assert "batch: 4 clips = 2 clips x 1 accumulated x 2 groups of 2 processes" in found
    held = plan(job.config, "cpu", 4).memory
    assert f"memory of a step: about {size_text(held.total)} a device" in found


def test_an_unlimited_set_is_called_that():
    job = build(load_run("shapes", [*WORDS, "data.hold_out=0.2"])[0], "cpu")
    found = "\n".join(header(job.config, job.model, job.dataset, job.held_out, CPU))
    assert "clips: unlimited" in found
    assert "times" not in found


def test_the_expected_time_is_logged_once_after_some_steps(monkeypatch, caplog):
    caplog.set_level(logging.INFO, module.__name__)
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    model = torch.nn.Linear(1, 1)
    event = TrainEvent(Path("run"), 7, 1007, model, model, MetricsAccumulator.__new__(MetricsAccumulator))
    callback = ExpectedTime()
    callback.on_start(event)
    for step in range(8, 30):
        event.step = step
        callback.on_step(event)
    assert [record.getMessage() for record in caplog.records] == [
        "expected time: 33 min 08 s for 994 more steps, 2 s each"
    ]
