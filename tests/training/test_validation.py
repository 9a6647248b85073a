# SPDX-License-Identifier: Apache-2.0
"""The held-out loss, scores and the best checkpoint: fixed draws, exact across stops and processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latte.checkpoint.run import list_checkpoints, load_checkpoint
from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.loss import OBJECTIVES
from latte.distributed import Group
from latte.runtime import generator
from latte.training.config import TrainConfig
from latte.training.step import Task
from latte.training.validation import RANGES, Validation, range_bounds
from tiny_runs import SHORT, Latents, curve, run, tiny_model

WATCHED = replace(SHORT, steps=8, validate_every=2, validate_clips=5)
CPU = torch.device("cpu")


def lines(run_dir: Path) -> list[dict]:
    """validation.jsonl."""
    return [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()]


class Unreadable(Latents):
    """Held-out clips that cannot be read any more."""

    def clip(self, index, stream):
        raise OSError("the disk is gone")


def task(model, seed: int = 0) -> Task:
    """A task of the paper's objective."""
    process = build_process(DiffusionConfig())
    objective = OBJECTIVES["paper"]
    return Task(model, model, process, objective, None, seed, 4, None, CPU, torch.float32)


def test_the_loss_is_that_of_the_formula():
    model = tiny_model().eval()
    found = Validation(task(model), model, Latents(), None, 3, Group())()
    process = build_process(DiffusionConfig())
    errors = torch.zeros(3, RANGES, dtype=torch.float64)
    for index in range(3):
        clip = Latents().clip(index, generator(0, "validation", "clip", index))
        stream = generator(0, "validation", "noise", index)
        t = torch.tensor(
            [int(torch.randint(*bounds, (1,), generator=stream)) for bounds in range_bounds(1000)]
        )
        eps = torch.randn((RANGES, *clip.video.shape), generator=stream)
        for r in range(RANGES):
            zt = process.add_noise(clip.video[None], t[r : r + 1], eps[r : r + 1])
            with torch.no_grad():
                output = model(zt, t[r : r + 1], label=torch.tensor([clip.label]))
            errors[index, r] = (output[:, :, :4] - eps[r]).square().mean()
        assert all(
            low <= step < high for step, (low, high) in zip(t.tolist(), range_bounds(1000), strict=True)
        )
    assert found["validation/mse"] == pytest.approx(float(errors.mean()), rel=1e-5)
    ranges = [found[f"validation/loss_t{low}-{high - 1}"] for low, high in range_bounds(1000)]
    assert found["validation/loss"] == pytest.approx(sum(ranges) / RANGES)
    assert len(set(ranges)) == RANGES


class Half(Group):
    """One of two processes whose sums are added by the test."""

    def all_reduce(self, tensors):
        """Keep them."""
        self.kept.extend(tensors)

    def max(self, number):
        """Nothing fails elsewhere."""
        return number


def test_two_processes_add_up_to_exactly_what_one_finds():
    model = tiny_model().eval()
    kept: list[torch.Tensor] = []
    for rank in range(2):
        group = Half(rank, 2)
        object.__setattr__(group, "kept", kept)
        Validation(task(model), model, Latents(), None, 5, group)()
    alone = Half(0, 1)
    object.__setattr__(alone, "kept", [])
    Validation(task(model), model, Latents(), None, 5, alone)()
    assert torch.equal(kept[0] + kept[1], alone.kept[0])
    assert not torch.equal(kept[0], alone.kept[0])


def test_the_curve_of_a_resumed_run_is_that_of_one_that_never_stopped(tmp_path):
    parts = {"held_out": Latents()}
    run(tmp_path / "whole", WATCHED, **parts)
    for until in (3, 5, 8):
        run(tmp_path / "again", WATCHED, until=until, **parts)
    found = lines(tmp_path / "again")
    assert [line["step"] for line in found] == [2, 4, 6, 8]
    assert found == lines(tmp_path / "whole")
    assert len({line["validation/loss"] for line in found}) == 4


def test_a_point_after_the_last_checkpoint_is_measured_again_once(tmp_path):
    run(tmp_path, WATCHED, until=3, held_out=Latents())
    with open(tmp_path / "validation.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "validation/loss": 7.0}\n')
    run(tmp_path, WATCHED, held_out=Latents())
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 8]
    assert 7.0 not in [line["validation/loss"] for line in lines(tmp_path)]


def test_watching_changes_nothing_of_the_run(tmp_path):
    plain = run(tmp_path / "plain", replace(SHORT, steps=8))
    watched = run(tmp_path / "watched", WATCHED, held_out=Latents())
    assert watched["weights_sha256"] == plain["weights_sha256"]
    assert curve(tmp_path / "watched") == curve(tmp_path / "plain")
    assert not (tmp_path / "plain" / "validation.jsonl").exists()


def test_scores_come_at_their_steps_and_decide_the_best_checkpoint(tmp_path):
    values = {2: 5.0, 4: 3.0, 6: 4.0, 8: 6.0, 10: 9.0, 12: 7.0}

    def score(model, step):
        assert not model.training
        return {"score/fvd": values[step], "score/kvd": -values[step]}

    config = replace(SHORT, score_every=2, keep_best="score", keep_last=2, checkpoint_every=3)
    for until in (5, 12):
        result = run(tmp_path, config, until=until, score=score)
    assert {line["step"]: line["score/fvd"] for line in lines(tmp_path)} == values
    assert result["best"] == str(tmp_path / "checkpoints" / "step-4")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-4", "step-9", "step-12"]
    best = load_checkpoint(tmp_path / "checkpoints" / "step-12").state["best"]
    assert best == {"step": 4, "value": 3.0, "by": "score/fvd"}
    score.higher_is_better = True
    result = run(tmp_path / "higher", config, score=score)
    assert result["best"].endswith("step-10")


def test_the_best_by_loss(tmp_path):
    config = replace(WATCHED, keep_best="loss", keep_last=1, checkpoint_every=100)
    result = run(tmp_path, config, held_out=Latents())
    found = {line["validation/loss"]: line["step"] for line in lines(tmp_path)}
    assert result["best"] == str(tmp_path / "checkpoints" / f"step-{found[min(found)]}")
    assert Path(result["best"]).is_dir()


@pytest.mark.parametrize(
    ("config", "parts", "message"),
    [
        (WATCHED, {}, r"validate_every is 2, but no clips are held out; give data\.hold_out"),
        (replace(SHORT, score_every=2), {}, r"score_every is 2, but there is nothing to score with"),
    ],
)
def test_measurements_without_what_they_need_are_refused(tmp_path, config, parts, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, config, **parts)


def test_the_best_by_what_is_never_measured_is_refused():
    with pytest.raises(
        InputError, match=r"keep_best is loss, which is never measured; set train\.validate_every"
    ):
        TrainConfig(keep_best="loss")
    with pytest.raises(InputError, match=r"train\.keep_best"):
        TrainConfig(keep_best="fvd", score_every=1)


def test_held_out_clips_that_cannot_be_read_end_the_run_with_their_error(tmp_path):
    with pytest.raises(OSError, match="the disk is gone"):
        run(tmp_path, WATCHED, held_out=Unreadable())
