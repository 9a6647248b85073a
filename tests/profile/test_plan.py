# SPDX-License-Identifier: Apache-2.0
"""What a run costs, against the paper's numbers and against real runs, without data or weights."""

import pytest
import torch

from latte.autoencoder.codec import CODECS
from latte.build import build
from latte.checks import InputError
from latte.config.run import load_run
from latte.data.media import write_mp4
from latte.data.procedural import draw_scene, render
from latte.model.latte import Latte
from latte.profile.plan import plan
from tiny import WORDS, tiny_trained
from tiny_external import save_external


def config(*words, recipe=None):
    return load_run(recipe, words)[0]


@pytest.mark.parametrize("name", [name for name in CODECS if name != "diffusers"])
def test_a_plan_needs_neither_data_nor_weights(name):
    shape = CODECS[name].compression
    frames = shape.nearest_frames(9)[0]
    words = [f"codec.name={name}", "data.root=nowhere", "data.resolution=64", "model.size=S"]
    found = plan(config(*words, f"data.frames={frames}"))
    side = 64 // shape.spatial_factor
    assert found.latent == (shape.latent_frames(frames), shape.channels, side, side)
    assert found.tokens == found.latent[0] * (side // 2) ** 2


def test_a_codec_whose_configuration_decides_is_planned_by_it(tmp_path):
    save_external("wan_22", tmp_path)
    words = ["data.root=nowhere", "data.resolution=64", "data.frames=17", "model.size=S", "codec.name=wan"]
    assert plan(config(*words, f"codec.path={tmp_path}")).latent == (5, 6, 4, 4)
    assert plan(config(*words, "codec.name=kl", "codec.path=nowhere")).latent == (17, 4, 8, 8), (
        "needs no file"
    )
    with pytest.raises(InputError, match=r"codec.path: nowhere .* is no folder"):
        config(*words, "codec.path=nowhere")


def test_the_plan_of_the_paper_is_the_papers():
    found = plan(config(recipe="ffs"))
    assert found.parameters == found.table3.parameters == 673_681_568
    assert found.table3.operations_g == pytest.approx(5572.695048, abs=1e-6)
    assert found.tokens == 16 * 16 * 16
    assert found.clips_seen == 150_000 * 40


def test_tubes_count_as_one_token():
    words = ["model.size=S", "data.resolution=64"]
    assert (
        plan(config(*words, "model.patch=compression", "model.tube=4")).tokens
        == plan(config(*words)).tokens // 4
    )


@pytest.mark.parametrize(
    ("words", "processes", "expected"),
    [
        ((), 1, (40, 1, 40, 1)),
        (("train.micro_batch=5",), 1, (40, 1, 5, 8)),
        (("train.micro_batch=5",), 4, (40, 4, 5, 2)),
        (("train.micro_batch=3",), 4, (40, 4, 3, 4)),
        (("train.micro_batch=50",), 4, (40, 4, 10, 1)),
    ],
)
def test_the_batch_is_divided_as_training_divides_it(words, processes, expected):
    batch = plan(config(*WORDS, "train.global_batch=40", "train.steps=10", *words), "cpu", processes).batch
    assert (batch.global_batch, batch.processes, batch.micro_batch, batch.accumulation) == expected
    assert batch.share <= batch.micro_batch * batch.accumulation < batch.share + batch.micro_batch
    assert (batch.clips_seen, batch.clips, batch.epochs) == (400, None, None)


def test_processes_that_cannot_share_the_batch_are_refused():
    with pytest.raises(
        InputError,
        match=r"train.global_batch is 4, which 3 processes cannot share evenly; give a multiple of 3",
    ):
        plan(config(*WORDS), "cpu", 3)


def test_epochs_are_counted_when_the_data_are_there(tmp_path):
    for index in range(3):
        write_mp4(tmp_path / f"{index}.mp4", render(draw_scene(0, index, 4), 4, 16, 16))
    batch = plan(config(*WORDS, f"data.root={tmp_path}", "train.steps=6"), "cpu").batch
    assert (batch.clips_seen, batch.clips, batch.epochs) == (24, 3, 8.0)
    batch = plan(config(*WORDS, f"data.root={tmp_path}", "train.steps=6", "data.hold_out=0.3"), "cpu").batch
    assert (batch.clips_seen, batch.clips, batch.epochs) == (24, 2, 12.0)


def test_pairs_of_blocks_are_planned():
    one, pairs = (
        plan(config(*WORDS, "model.depth=6", f"train.gradient_checkpointing={stages}"), "cpu").memory
        for stages in ("true", "pairs")
    )
    assert pairs.activations != one.activations
    assert pairs.activations == pairs.with_checkpointing


def test_memory_adds_up_and_checkpointing_lowers_it():
    plain, saving = (
        plan(config(*WORDS, "model.depth=6", f"train.gradient_checkpointing={on}"), "cpu").memory
        for on in (False, True)
    )
    for found in (plain, saving):
        assert (
            found.total == found.weights + found.gradients + found.optimizer + found.ema + found.activations
        )
    assert (plain.activations, saving.activations) == (plain.without_checkpointing, plain.with_checkpointing)
    assert saving.total < plain.total
    assert plain.dtype == "float32"


def test_recomputing_what_is_cheap_halves_the_activations():
    words = [*WORDS, "model.depth=6"]
    plain, lean = (
        plan(config(*words, f"train.recompute={on}"), "cpu").memory.activations for on in (False, True)
    )
    assert 0.4 < lean / plain < 0.65


def test_the_micro_batch_and_the_precision_decide_the_activations():
    words = [*WORDS, "model.width=64", "train.global_batch=8"]
    full, half, lowered = (
        plan(config(*words, extra), "cpu").memory.activations
        for extra in ("train.micro_batch=8", "train.micro_batch=4", "train.dtype=bf16")
    )
    assert full / 2 <= half < 0.6 * full
    assert 0.4 * full < lowered < 0.9 * full


def test_the_disk_is_that_of_a_run(tmp_path):
    words = [*WORDS, "train.steps=5", "train.checkpoint_every=1", "train.keep_last=2", f"run.dir={tmp_path}"]
    found = plan(config(*words, recipe="shapes"), "cpu").disk
    build(config(*words, recipe="shapes"), "cpu").train()
    files = list((tmp_path / "checkpoints").glob("step-*/*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert len(files) == 6
    assert found.kept == 2 * found.checkpoint == sum(file.stat().st_size for file in files) - headers


def test_time_is_measured_only_when_asked(monkeypatch):
    steps = []
    draw = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: (steps.append(1), draw(self, *args))[1]
    )
    words = [*WORDS, "train.steps=7200", "train.micro_batch=2", "train.num_images=2"]
    assert plan(config(*words, recipe="shapes"), "cpu").time is None
    assert not steps
    found = plan(config(*words, recipe="shapes"), "cpu", measure=True).time
    assert len(steps) == 4, "one to warm up, three to measure"
    assert 0 < found.step_seconds < 10
    assert found.hours == pytest.approx(2 * found.step_seconds)


def test_the_accumulated_micro_batches_are_part_of_a_step(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(
        "latte.profile.step_time.now", lambda device: float(next(clock))
    )  # every part of a step takes a second
    words = [*WORDS, "train.global_batch=12", "train.micro_batch=3"]
    assert plan(config(*words), "cpu", processes=2, measure=True).time.step_seconds == 2 * 1.0 + 1.0


@pytest.mark.parametrize("on", [False, True])
def test_training_checkpoints_gradients_when_asked(on, tmp_path, monkeypatch):
    seen = []
    forward = Latte.forward
    monkeypatch.setattr(
        Latte,
        "forward",
        lambda self, *args, **condition: (
            seen.append(self.gradient_checkpointing),
            forward(self, *args, **condition),
        )[1],
    )
    words = [*WORDS, "train.steps=1", f"train.gradient_checkpointing={on}", f"run.dir={tmp_path}"]
    build(config(*words, recipe="shapes"), "cpu").train()
    assert seen == [on]


def test_a_run_of_adapters_costs_what_it_costs(tmp_path):
    """Against the tensors of such a run: gradients, moments, EMA, checkpoints are those of the adapters."""
    pytest.importorskip("peft", reason="needs the extra lora")
    tiny_trained().save_pretrained(tmp_path / "base")
    adapters = [
        "diffusion.objective=paper",
        f"train.init={tmp_path / 'base'}",
        "lora.rank=2",
        "lora.targets=mlp",
    ]
    words = [
        *WORDS,
        *adapters,
        "train.steps=2",
        "train.checkpoint_every=1",
        "train.keep_last=2",
        f"run.dir={tmp_path / 'run'}",
    ]
    found, full = plan(config(*words, recipe="shapes"), "cpu"), plan(config(*WORDS, recipe="shapes"), "cpu")
    width, blocks = 16, 2
    assert found.trainable == blocks * 2 * (2 * width + 2 * 4 * width), (
        "rank 2, two layers of width and four times as much"
    )
    assert (full.trainable, found.parameters) == (full.parameters, full.parameters)
    assert found.memory.weights == full.memory.weights + 4 * found.trainable
    assert found.memory.gradients == found.memory.ema == 4 * found.trainable
    assert found.memory.activations < full.memory.activations, (
        "what goes into a frozen layer need not be kept"
    )
    build(config(*words, recipe="shapes"), "cpu").train()
    files = list((tmp_path / "run/checkpoints").glob("step-*/*.safetensors"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert (
        found.disk.kept == 2 * found.disk.checkpoint == sum(file.stat().st_size for file in files) - headers
    )


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has the GPU that the test wants to be without"
)
def test_a_gpu_that_is_not_here_is_planned_for_but_not_measured():
    words = [*WORDS, "train.dtype=auto"]
    here, there = (plan(config(*words, recipe="shapes-text"), device) for device in ("cpu", "cuda"))
    assert (here.sampling["dtype"], there.sampling["dtype"], there.memory.dtype) == (
        "float32",
        "bfloat16",
        "bfloat16",
    )
    assert there.memory.activations < here.memory.activations
    assert there.sampling["denoiser"]["weights"] == here.sampling["denoiser"]["weights"], (
        "weights stay float32"
    )
    with pytest.raises(InputError, match="torch finds no such device here"):
        plan(config(*WORDS), "cuda", measure=True)
    with pytest.raises(InputError, match="device is 'abacus'"):
        plan(config(*WORDS), "abacus")
