# SPDX-License-Identifier: Apache-2.0
"""Training on clips of several shapes: killed, resumed and shared by two processes it is one run."""

import math
import os
import signal
import socket
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from latte import distributed
from latte.checkpoint.run import latest_checkpoint, load_checkpoint
from latte.checks import InputError
from latte.data.base import Clip
from latte.data.buckets import Bucket, Buckets
from latte.data.joint import JointDataset
from latte.data.order import order_of
from latte.runtime import generator
from latte.training.callbacks import Callback
from latte.training.step import micro_batch_of
from tiny_runs import FORKS, SHORT, TINY, assert_same, curve, run, tiny_model

# fmt: off
SHAPES = (Bucket(3, 4, 4, (3, 4, 4), 12), Bucket(3, 4, 8, (3, 4, 8), 24), Bucket(1, 4, 4, (1, 4, 4), 4))
# fmt: on


class MixedLatents:
    """Random latents of three shapes: 10 clips, 5 clips of twice the width, 3 images."""

    latent = True
    classes = ("up", "down", "left")
    skipped = ()
    buckets = Buckets(SHAPES[0], SHAPES)
    members = (tuple(range(10)), tuple(range(10, 15)), tuple(range(15, 18)))

    def __len__(self) -> int:
        return 18

    def bucket(self, index: int) -> Bucket:
        """The shape of item ``index``."""
        return SHAPES[(index >= 10) + (index >= 15)]

    def clip(self, index: int, stream: torch.Generator) -> Clip:
        """Item ``index``, moved a little."""
        frames, height, width = self.bucket(index).latent
        z = torch.randn(frames, 4, height, width, generator=generator("mixed", index))
        return Clip(z + 0.1 * torch.randn(z.shape, generator=stream), index % 3, None, f"item-{index}")

    def image(self, index: int, stream: torch.Generator) -> Clip:
        """The first frame of item ``index``."""
        clip = self.clip(index, stream)
        return replace(clip, video=clip.video[:1])

    def describe(self) -> dict:
        """What identifies the set."""
        return {"kind": "mixed", "clips": len(self)}


class KillAt(Callback):
    """Ends the process behind a step, as the system does."""

    def __init__(self, step: int):
        self.step = step

    def on_step(self, event) -> None:
        """Kill this process."""
        if event.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def mixed_run(folder: Path, config=SHORT, **changes) -> dict:
    return run(folder, config, dataset=MixedLatents(), **changes)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """The folder of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("clean")
    mixed_run(folder)
    return folder


def killed(folder: str, step: int) -> None:
    torch.set_num_threads(1)
    mixed_run(Path(folder), callbacks=[KillAt(step)])


def test_a_killed_run_resumes_without_losing_a_bit(tmp_path, clean):
    for step in (2, 10):  # before the first checkpoint, and between two
        child = FORKS.Process(target=killed, args=(str(tmp_path), step), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, "the kill happened"
    assert latest_checkpoint(tmp_path).name == "step-9"
    mixed_run(tmp_path)
    assert_same(tmp_path, clean)


@pytest.mark.parametrize("stops", [(1, 5), (4, 11)])
def test_a_stopped_run_resumes_without_losing_a_bit(tmp_path, clean, stops):
    for steps in (*stops, SHORT.steps):
        mixed_run(tmp_path, replace(SHORT, steps=steps))
    assert_same(tmp_path, clean)


def test_the_run_trained_on_every_bucket_and_counts_its_clips(clean):
    order = order_of(MixedLatents(), 0, SHORT.global_batch)
    assert order.sizes == (4, 2, 12)
    assert {order.batch(step)[0] for step in range(SHORT.steps)} == {0, 1, 2}
    lines = curve(clean)
    assert [line["clips"] for line in lines] == [order.clips_before(line["step"]) for line in lines]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_micro_batches_change_only_roundings(tmp_path, clean):
    mixed_run(tmp_path, replace(SHORT, micro_batch=2))
    for line, expected in zip(curve(tmp_path), curve(clean), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_a_micro_batch_has_the_same_tokens_in_every_bucket():
    task = SimpleNamespace(global_batch=8, micro_batch=4)
    assert [micro_batch_of(task, size) for size in (8, 16, 4, 2, 1)] == [4, 8, 2, 1, 1]
    assert micro_batch_of(SimpleNamespace(global_batch=8, micro_batch=None), 16) is None


def test_images_behind_a_clip_have_its_frame_size():
    data = JointDataset(MixedLatents(), 2)
    picked = set()
    for index in (0, 12, 16):
        for draw in range(40):
            clip = data.clip(index, generator(draw))
            frames, height, width = data.dataset.bucket(index).latent
            assert clip.video.shape == (frames + 2, 4, height, width)
            picked.add((index, clip.label[1]))
    assert len(picked) == 9
    assert [data.pooled(12, pick) for pick in range(data.pool_size(12))] == [10, 11, 12, 13, 14]
    assert [data.pooled(16, pick) for pick in range(data.pool_size(0))] == [*range(10), 15, 16, 17]


def one_of_two(rank: int, port: int, folder: str) -> None:
    """One of two processes, as torchrun starts it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    distributed.STARTUP_TIMEOUT = timedelta(seconds=60)
    mixed_run(Path(folder), replace(SHORT, lr=1e-4))


def test_two_processes_train_as_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        FORKS.Process(target=one_of_two, args=(rank, port, str(tmp_path / "two")), daemon=True)
        for rank in range(2)
    ]
    for child in children:
        child.start()
    mixed_run(tmp_path / "one", replace(SHORT, lr=1e-4))
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    two, one = (load_checkpoint(latest_checkpoint(tmp_path / name)) for name in ("two", "one"))
    assert two.step == one.step == SHORT.steps
    for group in ("model", "ema"):
        for name, tensor in one.tensors[group].items():
            torch.testing.assert_close(two.tensors[group][name], tensor, rtol=0, atol=1e-6)
    for line, expected in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert line == pytest.approx(expected, rel=1e-5)


def test_a_budget_that_holds_no_clip_is_refused_before_training(tmp_path):
    with pytest.raises(InputError, match=r"one clip of bucket 3x4x8 has 24; give train.global_batch=2, or"):
        mixed_run(tmp_path, replace(SHORT, global_batch=1), model=tiny_model(TINY))
    assert not list(tmp_path.glob("checkpoints/*"))
