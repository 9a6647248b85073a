# SPDX-License-Identifier: Apache-2.0
"""Distillation: the loss of an interval agrees with the sampler's step, and trajectories are written once."""

from dataclasses import replace

import pytest
import torch
from support import wake

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.guidance import STUDENT_SAMPLERS, Distilled
from latte.diffusion.samplers import SAMPLERS, indices, sample
from latte.inference.generate import SampleConfig
from latte.model.latte import Latte
from latte.runtime import SampleNoise
from latte.training.distill import IntervalObjective, Trajectories, shard_file, write_trajectories
from latte.training.train import train
from tiny_runs import SHORT, TINY

OBJECTIVES = {"v": "v", "flow": "rectified_flow"}
SHAPE = (2, 4, 4, 4)


def curved(z, t):
    """An output that is no constant of the trajectory, with variance channels that are not read."""
    output = torch.tanh(z) + 0.001 * t.view(-1, 1, 1, 1, 1)
    return torch.cat([output, torch.full_like(output, 7.0)], dim=2)


def trajectory_of(prediction, steps, clips=6):
    """(process, timesteps, z (b 1+k f c h w)) of the student's own sampler with ``curved``."""
    process = build_process(DiffusionConfig(objective=OBJECTIVES[prediction], num_steps=100))
    name = STUDENT_SAMPLERS[prediction]
    kept = []

    def denoise(z, t):
        kept.append(z)
        return curved(z, t)

    z = sample(name, denoise, process, SampleNoise(range(clips)), SHAPE, steps)
    return process, indices(SAMPLERS[name], 100, steps), torch.stack([*kept, z], dim=1)


@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("prediction", STUDENT_SAMPLERS)
def test_a_student_whose_steps_are_the_trajectory_has_no_loss(prediction, steps):
    process, timesteps, z = trajectory_of(prediction, steps)
    objective = IntervalObjective(timesteps)
    times = torch.linspace(0, 99, len(z)).long()  # every interval
    exact = objective(curved, process, z, times, z[:, 0])
    assert exact.total.max() < 1e-6
    off = objective(lambda z, t: curved(z, t) + 0.5, process, z, times, z[:, 0])
    assert torch.allclose(off.total, torch.tensor(0.25), rtol=1e-3), "in the units of the output"
    assert torch.equal(off.total, off.mse)


def test_the_model_is_asked_at_the_start_of_the_chosen_interval():
    process, timesteps, z = trajectory_of("v", 4)
    asked = []

    def denoise(zt, t):
        asked.append((zt, t))
        return curved(zt, t)

    IntervalObjective(timesteps)(denoise, process, z, torch.tensor([0, 24, 25, 50, 75, 99]), z[:, 0])
    zt, t = asked[0]
    assert t.tolist() == [99, 99, 74, 49, 24, 24]
    assert torch.equal(zt, z[torch.arange(6), torch.tensor([0, 0, 1, 2, 3, 3])])


def test_trajectories_are_written_once_and_only_under_their_facts(tmp_path):
    calls = []

    def teach(numbers):
        calls.append(list(numbers))
        return torch.stack([torch.full((3, *SHAPE), float(number)) for number in numbers])

    facts = {"steps": 2, "teacher": "abc"}
    write_trajectories(tmp_path, 70, facts, teach)
    assert calls == [list(range(64)), list(range(64, 70))]
    write_trajectories(tmp_path, 70, facts, teach)
    assert len(calls) == 2
    shard_file(tmp_path, 0).unlink()
    write_trajectories(tmp_path, 80, facts, teach)
    assert calls[2:] == [list(range(64)), list(range(64, 80))], "what is missing, and the shard that is short"
    clips = Trajectories(tmp_path, 80, ["a", "b", "c"], facts)
    clip = clips.clip(79, torch.Generator())
    assert (len(clips), clip.label, float(clip.video.mean())) == (80, 79 % 3, 79.0)
    assert clip.video.shape == (3, *SHAPE)
    with pytest.raises(InputError, match=r"holds trajectories of .*abc.*xyz.*another --out"):
        write_trajectories(tmp_path, 80, {**facts, "teacher": "xyz"}, teach)


def test_a_student_learns_the_trajectories_and_a_resumed_run_is_the_same(tmp_path):
    diffusion = DiffusionConfig(objective="v", num_steps=100)
    process = build_process(diffusion)
    timesteps = indices(SAMPLERS["euler"], 100, 2)
    shape = (TINY.num_frames, TINY.latent_channels, *TINY.grid_size)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(8, 3, *shape, generator=generator)
    z[:, 1:] = 0.1 * z[:, 1:] + torch.arange(8).view(-1, 1, 1, 1, 1, 1) % 3
    write_trajectories(tmp_path / "t", 8, {}, lambda numbers: z[list(numbers)])

    def run(folder, until=None):
        torch.manual_seed(0)
        student = Latte(replace(TINY, class_dropout=0.0))
        wake(student)
        return train(
            model=student,
            dataset=Trajectories(tmp_path / "t", 8, ["a", "b", "c"], {}),
            config=replace(SHORT, steps=60, global_batch=8, lr=5e-3, checkpoint_every=20),
            run_dir=tmp_path / folder,
            diffusion=diffusion,
            device="cpu",
            objective=IntervalObjective(timesteps),
            facts={"distilled": {"steps": 2}},
            until=until,
        )

    first = run("once", until=1)["loss"]
    last = run("once")
    assert last["loss"] < 0.5 * first
    assert run("twice")["weights_sha256"] == last["weights_sha256"]
    assert process.prediction == "v"


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        (SampleConfig("euler", 4), True),
        (SampleConfig("euler", "4"), True),
        (SampleConfig("euler", 5), False),
        (SampleConfig("dpmpp", 4), False),
        (SampleConfig("euler", 4, guidance=1.5), False),
    ],
)
def test_a_student_has_one_way_of_sampling(settings, fits):
    distilled = Distilled(4, 1.5, "abc")
    if fits:
        distilled.check_settings("v", settings)
        return
    with pytest.raises(InputError, match=r"was distilled to euler with 4 steps, guidance 1\.5 inside"):
        distilled.check_settings("v", settings)
