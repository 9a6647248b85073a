# SPDX-License-Identifier: Apache-2.0
"""The verdict about the memory at hand: it fits, or the first setting in order of cost that does."""

from dataclasses import replace

import pytest
import torch

from latte.profile.fit import ROOM, judge, verdict_text
from latte.profile.plan import Batch, Memory
from latte.training.config import TrainConfig

STATES = 40
HELD = Memory(10, 10, 10, 10, 160, 200, without_checkpointing=160, with_checkpointing=32, dtype="float32")
BATCH = Batch(8, 1, 8, 1, clips_seen=8, clips=None, epochs=None)
TRAIN = TrainConfig(global_batch=8)


def count(train: TrainConfig, clips: int, parts: int) -> Memory:
    """A step of 20 bytes a clip: a fifth with checkpointing, half of that in bf16."""
    saved = clips * (4 if train.gradient_checkpointing else 20) // (2 if train.dtype == "bf16" else 1)
    return replace(HELD, activations=saved, total=STATES // parts + saved)


@pytest.mark.parametrize(
    ("available", "settings", "processes", "needed"),
    [
        (230, None, None, 200),
        (200, ("train.micro_batch=4",), None, 120),  # 200 leaves no room for the codec
        (90, ("train.micro_batch=2",), None, 80),
        (67, ("train.micro_batch=1",), None, 60),
        (64, ("train.gradient_checkpointing=true", "train.micro_batch=4"), None, 56),
        (49, ("train.gradient_checkpointing=true", "train.micro_batch=1"), None, 44),
        (40, ("train.parallel=fsdp", "train.gradient_checkpointing=true", "train.micro_batch=4"), 2, 36),
        (11, ("train.parallel=fsdp", "train.gradient_checkpointing=true", "train.micro_batch=1"), 8, 9),
        (5, (), None, None),
    ],
)
def test_the_setting_that_fits_is_the_cheapest_in_time(available, settings, processes, needed):
    found = judge(TRAIN, BATCH, HELD, 1, torch.device("cpu"), available, count)
    assert found.fits == (settings is None)
    assert found.settings == (settings or ())
    assert found.processes == processes
    assert (found.needed if settings is None else found.needed_with) == needed
    if found.needed_with:
        assert found.needed_with <= ROOM * available


def test_bf16_is_for_gpus_and_comes_after_checkpointing():
    found = judge(TRAIN, BATCH, HELD, 1, torch.device("cuda"), 48, count)
    assert found.settings == ("train.gradient_checkpointing=true", "train.dtype=bf16", "train.micro_batch=1")
    assert judge(TRAIN, BATCH, HELD, 1, torch.device("cpu"), 48, count).processes == 2


def test_settings_that_exclude_each_other_are_not_proposed():
    found = judge(replace(TRAIN, route=0.5), BATCH, HELD, 1, torch.device("cpu"), 55, count)
    assert "train.gradient_checkpointing=true" not in found.settings


def test_states_that_are_split_already_are_not_split_again():
    train = replace(TRAIN, parallel="fsdp")
    batch = replace(BATCH, processes=4, micro_batch=2)
    held = replace(
        HELD, activations=40, total=STATES // 4 + 40, without_checkpointing=40, with_checkpointing=8
    )
    assert judge(train, batch, held, 4, torch.device("cpu"), 50, count).needed == 50
    fewer = judge(train, batch, held, 4, torch.device("cpu"), 34, count)
    assert (fewer.settings, fewer.needed_with) == (("train.micro_batch=1",), 30)
    finer = judge(train, batch, held, 4, torch.device("cpu"), 11, count)
    assert (finer.processes, finer.needed_with) == (8, 9)


def test_the_verdict_in_words():
    def words(device: str, available: int | None) -> str:
        return verdict_text(judge(TRAIN, BATCH, HELD, 1, torch.device(device), available, count))

    assert words("cpu", 1 << 30).startswith(
        "fits: a step needs 0.2 KiB on each device, this machine has 1.00"
    )
    assert words("cuda", None).endswith("no cuda is here; give its memory in GiB, e.g. --memory 80")
    assert "less than 10% to spare; fits with train.micro_batch=4: " in words("cpu", 201)
    assert "on 8 devices" in words("cpu", 11)
    assert words("cpu", 5).endswith("take a smaller model.size, data.frames or data.resolution")
