# SPDX-License-Identifier: Apache-2.0
"""The loop: what it writes, what it refuses, and what it does when a number, the disk or the data go wrong."""

import json
import os
import resource
import shutil
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checkpoint.run import list_checkpoints, load_checkpoint
from latte.checks import InputError, RunError
from latte.data.datasets import DataConfig, build_dataset
from latte.diffusion.loss import OBJECTIVES
from latte.training import optim
from latte.training.callbacks import Callback
from latte.training.config import TrainConfig
from latte.training.optim import FiniteGuard
from tiny_runs import FORKS, SHORT, TINY, Latents, curve, run, tiny_model


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"global_batch": 0},
        {"micro_batch": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"weight_decay": -1.0},
        {"warmup_steps": -1},
        {"decay_steps": -1},
        {"ema_decay": 1.0},
        {"clip_norm": 0.0},
        {"clip_start": -1},
        {"dtype": "fp16"},
        {"checkpoint_every": 0},
        {"keep_last": 0},
        {"num_images": -1},
        {"sample_every": -1},
        {"log_every": 0},
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(InputError, match=f"^train.{next(iter(wrong))} is "):
        TrainConfig(**wrong)


def test_the_curve_holds_what_the_next_reader_needs(tmp_path):
    result = run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "step",
        "lr",
        "clips",
        "loss",
        "mse",
        "vlb",
        "grad_norm",
        "clips_per_second",
        "data_wait_share",
        "seconds",
        "cpu_seconds",
    }
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10, 12]
    assert all(line.keys() == keys for line in lines)
    assert [line["lr"] for line in lines] == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3])
    assert [line["clips"] for line in lines] == [4 * line["step"] for line in lines]
    assert all(before["seconds"] <= after["seconds"] for before, after in pairwise(lines))
    assert all(0 <= line["data_wait_share"] <= 1 for line in lines)
    assert result == {
        "run": str(tmp_path),
        "step": 12,
        "loss": lines[-1]["loss"],
        "checkpoint": str(tmp_path / "checkpoints" / "step-12"),
        "weights_sha256": result["weights_sha256"],
        "interrupted": 0,
    }
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-12"]
    assert {"config.yaml", "command.txt", "env.json"} <= {path.name for path in tmp_path.iterdir()}


def test_training_lowers_the_loss_and_the_average_follows(tmp_path):
    config = replace(SHORT, steps=60, global_batch=8, lr=1e-2, log_every=20, checkpoint_every=60)
    model = tiny_model(replace(TINY, num_classes=None))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run(tmp_path, config, model=model)
    lines = curve(tmp_path)
    assert lines[-1]["mse"] < 0.9 * lines[0]["mse"]
    saved = load_checkpoint(tmp_path / "checkpoints" / "step-60").tensors
    assert saved["model"].keys() == saved["ema"].keys() == before.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(saved["model"][key], value)
        assert not torch.equal(value, before[key])
        assert (saved["ema"][key] - value).norm() < (before[key] - value).norm()


def test_clipping_begins_after_its_start_step(tmp_path):
    """The first Adam step does not depend on the gradient's scale, so look at the moments after a single
    step.
    """
    moments = {}
    for name, change in {
        "never": {"clip_norm": None},
        "later": {"clip_start": 1},
        "now": {"clip_start": 0},
    }.items():
        run(tmp_path / name, replace(SHORT, steps=1, **{"clip_norm": 1e-3, **change}))
        saved = load_checkpoint(tmp_path / name / "checkpoints" / "step-1").tensors["optimizer"]
        moments[name] = (
            sum(value.double().square().sum() for key, value in saved.items() if key.endswith("exp_avg"))
            ** 0.5
            / 0.1
        )
    norm = curve(tmp_path / "never")[0]["grad_norm"]
    assert moments["never"] == pytest.approx(norm, rel=1e-4)
    assert moments["later"] == pytest.approx(norm, rel=1e-4)
    assert moments["now"] == pytest.approx(1e-3, rel=1e-2)
    assert curve(tmp_path / "now")[0]["grad_norm"] == norm


def test_samples_are_drawn_from_the_average_after_the_checkpoint(tmp_path):
    seen = []

    def sample(model, step):
        assert not model.training
        assert (tmp_path / "checkpoints" / f"step-{step}").exists() or step % SHORT.checkpoint_every
        seen.append((step, {key: value.clone() for key, value in model.state_dict().items()}))

    run(tmp_path, replace(SHORT, steps=8, sample_every=3), sample=sample)
    assert [step for step, _ in seen] == [3, 6, 8]
    saved = load_checkpoint(tmp_path / "checkpoints" / "step-6").tensors["ema"]
    assert all(torch.equal(saved[key], value) for key, value in seen[1][1].items())


@pytest.mark.filterwarnings("ignore")  # of the tracer, about itself
def test_a_compiled_model_is_saved_under_its_own_names(tmp_path, monkeypatch):
    compiler, seen = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: seen.append(function) or compiler(function, backend="eager")
    )
    compiled = run(tmp_path / "compiled", replace(SHORT, steps=2, compile=True))
    plain = run(tmp_path / "plain", replace(SHORT, steps=2))
    for result in (compiled, plain):
        tensors = load_checkpoint(Path(result["checkpoint"])).tensors
        assert tensors["model"].keys() == tiny_model().state_dict().keys()
    assert compiled["weights_sha256"] == plain["weights_sha256"]
    assert len(seen) == 1 + len(tiny_model().blocks)  # the trial of the compiler, and every block


def test_frames_and_the_latents_of_their_codec_make_a_run_each(tmp_path):
    """The real parts together: procedural clips, a codec, the model, resumed half-way."""
    data = build_dataset(DataConfig(kind="procedural", resolution=8, frames=3))
    codec = build_codec(CodecConfig(name="pixels"))
    shape = replace(
        TINY, num_classes=4, latent_size=codec.latent_shape(8, 8)[1:], latent_channels=codec.channels
    )
    parts = {"dataset": data, "codec": codec}
    whole = run(tmp_path / "whole", replace(SHORT, steps=6), model=tiny_model(shape), **parts)
    for steps in (2, 6):
        again = run(tmp_path / "again", replace(SHORT, steps=steps), model=tiny_model(shape), **parts)
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert load_checkpoint(Path(again["checkpoint"])).state["facts"]["codec"] == codec.fingerprint


def test_images_behind_the_clips_belong_to_the_run(tmp_path):
    joint = replace(SHORT, num_images=2)
    whole = run(tmp_path / "whole", replace(joint, steps=4))
    for steps in (2, 4):
        again = run(tmp_path / "again", replace(joint, steps=steps))
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert whole["weights_sha256"] != run(tmp_path / "clips alone", replace(SHORT, steps=4))["weights_sha256"]
    with pytest.raises(InputError, match=r"data\.num_images: the run has 2, you gave 3"):
        run(tmp_path / "again", replace(joint, num_images=3))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted through /proc")
def test_no_file_and_no_thread_is_left_behind(tmp_path):
    run(tmp_path, replace(SHORT, steps=1))
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for steps in (3, 6, 9):
        run(tmp_path, replace(SHORT, steps=steps))
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


class Poisoned(Latents):
    """One clip of step 8 holds a NaN or Inf."""

    def __init__(self, bad: float):
        self.bad, self.drawn = bad, 0

    def clip(self, index, stream):
        clip = super().clip(index, stream)
        self.drawn += 1
        if self.drawn == 4 * 7 + 2:
            clip.video[0, 0, 0, 0] = self.bad
        return clip


def poison(place: str, bad: float) -> dict:
    """Arguments of a run in which ``bad`` enters at ``place`` in step 8."""
    if place == "input":
        return {"dataset": Poisoned(bad)}
    model, calls = tiny_model(), []
    if place == "loss":

        def objective(*arguments):
            calls.append(1)
            loss = OBJECTIVES["paper"](*arguments)
            return loss._replace(total=loss.total * bad) if len(calls) == 8 else loss

        return {"objective": objective}

    def spoil(gradient):
        calls.append(1)
        return torch.full_like(gradient, bad) if len(calls) == 8 else gradient

    def break_weight(module, arguments):
        calls.append(1)
        if len(calls) == 8:
            with torch.no_grad():
                module.final_linear.bias[0] = bad

    if place == "gradient":
        model.final_linear.bias.register_hook(spoil)
    else:
        model.register_forward_pre_hook(break_weight)
    return {"model": model}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["input", "loss", "gradient", "weight"])
def test_a_nan_or_inf_ends_the_run_and_is_never_saved(tmp_path, place, bad):
    with pytest.raises(RunError, match="of step 8 is NaN or Inf") as caught:
        run(tmp_path, **poison(place, bad))
    assert "\n" not in str(caught.value)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-3", "step-6"]
    for path in list_checkpoints(tmp_path):
        tensors = load_checkpoint(path).tensors
        assert all(value.isfinite().all() for part in tensors.values() for value in part.values())
    assert all(abs(line["loss"]) < 10 for line in curve(tmp_path))
    assert curve(tmp_path)[-1]["step"] == 6


@pytest.mark.parametrize("often", ["log_every", "sample_every", "checkpoint_every"])
def test_where_looking_has_to_wait_a_bad_number_is_found_before_anything_is_kept(
    tmp_path, monkeypatch, often
):
    """As on a GPU, where the guard does not look at every step: before a line, a sample and a checkpoint it
    does.
    """
    monkeypatch.setattr(optim, "FiniteGuard", lambda device, immediate: FiniteGuard(device, immediate=False))
    config = replace(SHORT, **{"log_every": 100, "sample_every": 100, "checkpoint_every": 100, often: 3})
    sampled = []
    with pytest.raises(RunError, match="of step 8 is NaN or Inf"):
        run(tmp_path, config, dataset=Poisoned(float("nan")), sample=lambda model, step: sampled.append(step))
    kept = [path.name for path in list_checkpoints(tmp_path)]
    found = {
        "log_every": [line["step"] for line in curve(tmp_path)][1:],
        "sample_every": sampled,
        "checkpoint_every": kept,
    }
    assert found[often] == ([3, 6] if often != "checkpoint_every" else ["step-3", "step-6"])


def test_after_a_failure_the_same_command_goes_on(tmp_path):
    with pytest.raises(RunError):
        run(tmp_path / "failed", dataset=Poisoned(float("nan")))
    assert run(tmp_path / "failed")["weights_sha256"] == run(tmp_path / "clean")["weights_sha256"]
    assert curve(tmp_path / "failed") == curve(tmp_path / "clean")


class Empty(Latents):
    def __len__(self):
        return 0


class Frames(Latents):
    latent = False


class Nameless(Latents):
    classes = ()


class MadeElsewhere(Latents):
    def describe(self):
        return {**super().describe(), "codec": "0123"}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"dataset": Empty()}, "the dataset is empty"),
        ({"dataset": Frames()}, "codec is missing, but the data are frames"),
        ({"dataset": Nameless()}, "model.num_classes is 3, but the data have 0 classes"),
        (
            {"model": tiny_model(replace(TINY, num_classes=2))},
            "model.num_classes is 2, but the data have 3 classes",
        ),
        (
            {"dataset": MadeElsewhere(), "codec": build_codec(CodecConfig(name="pixels"))},
            "the latents were made with 0123",
        ),
        ({"model": tiny_model(replace(TINY, latent_channels=3))}, "channels"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_anything_is_trained(tmp_path, parts, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **parts)
    assert list_checkpoints(tmp_path) == []


class Vanished(Latents):
    """From step 8 on, one clip cannot be read; ``error`` is raised for it."""

    def __init__(self, error: Exception):
        self.error = error
        self.count = 0

    def clip(self, index, stream):
        self.count += 1
        if self.count == 4 * 7 + 2:
            raise self.error
        return super().clip(index, stream)


@pytest.mark.parametrize(
    "error", [InputError("clip 17.mp4 cannot be read"), OSError(5, "Input/output error", "17.mp4")]
)
def test_a_clip_that_breaks_during_training_saves_the_last_step_and_is_named(tmp_path, error):
    data = Vanished(error)
    with pytest.raises(RunError, match=r"clips of step 8 could not be loaded: .*17\.mp4") as caught:
        run(tmp_path, dataset=data)
    assert data.count >= 4 * 7 + 2
    message = str(caught.value)
    assert "\n" not in message
    assert f"step 7 was saved in {tmp_path / 'checkpoints' / 'step-7'}" in message
    assert "run.allow_data_change=true" in message
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-6", "step-7"]
    assert run(tmp_path)["weights_sha256"] == run(tmp_path / "clean")["weights_sha256"]


def test_a_bug_in_a_dataset_saves_too_and_keeps_its_own_error(tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        run(tmp_path, dataset=Vanished(ZeroDivisionError("in my augmentation")))
    assert "step 7 was saved" in caught.value.__notes__[0]
    assert list_checkpoints(tmp_path)[-1].name == "step-7"


def test_a_first_clip_that_cannot_be_read_leaves_no_checkpoint(tmp_path):
    data = Vanished(InputError("clip 17.mp4 cannot be read"))
    data.count = 4 * 7
    with pytest.raises(RunError, match="no step was completed"):
        run(tmp_path, dataset=data)
    assert list_checkpoints(tmp_path) == []


class Grown(Latents):
    """One clip more than Latents, under another content hash."""

    def __len__(self):
        return 11

    def describe(self):
        return {**super().describe(), "content": "other"}


def test_changed_data_are_refused_unless_allowed(tmp_path, capsys):
    run(tmp_path, replace(SHORT, steps=6))
    with pytest.raises(InputError, match=r"data\.clips: the run has 10, you gave 11"):
        run(tmp_path, dataset=Grown())
    capsys.readouterr()
    assert run(tmp_path, dataset=Grown(), allow_data_change=True)["step"] == 12
    assert "notice: data.clips was 10 up to step 6 and is 11 from here on" in capsys.readouterr().err


def test_other_classes_are_refused_even_where_changed_data_are_allowed(tmp_path):
    class Renamed(Latents):
        classes = ("up", "down", "right")

    run(tmp_path, replace(SHORT, steps=6))
    with pytest.raises(InputError, match="classes"):
        run(tmp_path, dataset=Renamed(), allow_data_change=True)


def overflow(state_group: str) -> dict:
    """Arguments of a run whose loss stays finite while one tensor of ``state_group`` becomes Inf or NaN."""
    from latte.training import train as loop

    model = tiny_model()
    real = loop.TrainState

    class Spoiled(real):
        def update(self, step, *arguments):
            metrics = super().update(step, *arguments)
            if step == 3:
                tensors = self.parts()[state_group]
                tensors[sorted(tensors)[0]].view(-1)[0] = float("nan")
            return metrics

    return {"model": model, "state": Spoiled}


@pytest.mark.parametrize("state_group", ["model", "ema", "optimizer"])
def test_nan_in_any_part_of_the_state_is_found_before_a_checkpoint(tmp_path, monkeypatch, state_group):
    from latte.training import train as loop

    spoiled = overflow(state_group)
    monkeypatch.setattr(loop, "TrainState", spoiled["state"])
    with pytest.raises(
        RunError,
        match=rf"the checkpoint of step 3 was not written: {state_group} tensor .* holds 1 non-finite of ",
    ) as caught:
        run(tmp_path, replace(SHORT, steps=3), model=spoiled["model"])
    assert "\n" not in str(caught.value)
    assert list_checkpoints(tmp_path) == []


def test_a_learning_rate_that_overflows_the_weights_commits_nothing(tmp_path):
    with pytest.raises(RunError, match="the checkpoint of step 1 was not written: model tensor"):
        run(tmp_path, replace(SHORT, steps=1, lr=1e38, warmup_steps=0, weight_decay=1.0))
    assert list_checkpoints(tmp_path) == []


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_refused_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RunError, match=r"GB free, but a checkpoint takes"):
        run(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_disk_that_holds_one_checkpoint_but_not_all_gives_a_notice(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    size = 4 * 4 * sum(parameter.numel() for parameter in tiny_model().parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(size * 1.5)))
    run(tmp_path, replace(SHORT, steps=1))
    assert "but 3 checkpoints (train.keep_last and the one being written) take" in capsys.readouterr().err


def test_a_run_that_is_already_complete_says_so(tmp_path, capsys):
    run(tmp_path, replace(SHORT, steps=4))
    capsys.readouterr()
    assert run(tmp_path, replace(SHORT, steps=2))["step"] == 4
    assert "already trained to step 4" in capsys.readouterr().err


class Recorder(Callback):
    """Records the events of a run."""

    def __init__(self):
        self.events = []

    def on_start(self, event):
        self.events.append(("start", event.step))

    def on_step(self, event):
        self.events.append(("step", event.step, None if event.metrics is None else event.metrics["step"]))

    def on_samples(self, event, paths):
        self.events.append(("samples", event.step, list(paths)))

    def on_checkpoint(self, event, path):
        assert (path / "manifest.json").exists()
        self.events.append(("checkpoint", event.step, path.name))

    def on_end(self, event):
        self.events.append(("end", event.step))


def test_callbacks_see_the_events_of_a_run_in_order(tmp_path):
    recorder = Recorder()
    sheet = tmp_path / "sheet.png"
    config = replace(SHORT, steps=4, sample_every=3)
    run(tmp_path, config, callbacks=[recorder], sample=lambda model, step: [sheet])
    assert recorder.events == [
        ("start", 0),
        ("step", 1, 1),
        ("step", 2, 2),
        ("step", 3, None),
        ("checkpoint", 3, "step-3"),
        ("samples", 3, [sheet]),
        ("step", 4, 4),
        ("checkpoint", 4, "step-4"),
        ("samples", 4, [sheet]),
        ("end", 4),
    ]
    again = Recorder()
    run(tmp_path, replace(config, steps=5), callbacks=[again])
    assert again.events[0] == ("start", 4)


def test_callbacks_are_ended_when_the_run_fails_and_their_own_errors_come_out(tmp_path):
    recorder = Recorder()
    with pytest.raises(RunError):
        run(tmp_path / "failed", callbacks=[recorder], **poison("loss", float("nan")))
    assert recorder.events[-1] == ("end", 7)

    class Failing(Callback):
        def on_step(self, event):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(tmp_path / "mine", callbacks=[Failing()])


def test_callbacks_change_no_bit(tmp_path):
    watched = run(tmp_path / "watched", callbacks=[Recorder()])
    assert watched["weights_sha256"] == run(tmp_path / "alone")["weights_sha256"]


def test_samples_that_cannot_be_written_are_one_line(tmp_path):
    def sample(model, step):
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"could not write samples to .*No space left"):
        run(tmp_path, replace(SHORT, sample_every=3), sample=sample)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-3"]


OFTEN = replace(SHORT, log_every=1)  # so that the metrics are longer than the settings


def train_on_a_small_disk(folder: str, limit: int, results) -> None:
    torch.set_num_threads(1)
    sys.argv = ["latte"]  # the run records its command: a long one would not fit under the limit either
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        results.put(str(run(Path(folder), OFTEN)["step"]))
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("what", ["the checkpoint of step 9", "the metrics"])
def test_a_disk_that_fills_up_ends_in_one_line_and_the_run_goes_on_later(tmp_path, what):
    """The limit is on the size of one file: 20,000 bytes hold no weights; a limit just above the metrics so
    far, and above the settings, which are written first, takes no further line.
    """
    run(tmp_path, replace(OFTEN, steps=6))
    written = [(tmp_path / name).stat().st_size for name in ("metrics.jsonl", "config.yaml")]
    limit = 20_000 if "checkpoint" in what else max(written) + 20
    results = FORKS.SimpleQueue()
    child = FORKS.Process(target=train_on_a_small_disk, args=(str(tmp_path), limit, results), daemon=True)
    child.start()
    message = results.get()
    child.join(20)
    assert message.startswith(f"RunError: could not write {what} to {tmp_path}")
    assert "File too large" in message
    assert "\n" not in message
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-3", "step-6"]
    assert run(tmp_path, OFTEN)["weights_sha256"] == run(tmp_path / "clean", OFTEN)["weights_sha256"]
    assert curve(tmp_path) == curve(tmp_path / "clean")
