# SPDX-License-Identifier: Apache-2.0
"""A configuration becomes objects that fit together, or the numbers that do not are reported."""

from dataclasses import replace

import pytest
import torch

import latte.runtime
from latte.build import build, build_model, sheet_prompts
from latte.checks import InputError
from latte.config.run import RunConfig, load_run
from latte.data.media import write_mp4
from latte.data.procedural import draw_scene, render
from latte.inference.pipeline import VideoPipeline
from latte.inference.requests import class_requests, prompt_requests
from latte.model.latte import ModelConfig
from latte.profile.flops import count
from tiny import WORDS


def config(*words, recipe=None):
    return load_run(recipe, words)[0]


@pytest.fixture
def videos(tmp_path):
    """Two classes of two clips of 4 frames, and one file that is no video."""
    for index in range(4):
        write_mp4(
            tmp_path / f"videos/{'ab'[index % 2]}/{index}.mp4", render(draw_scene(0, index, 4), 4, 16, 16)
        )
    (tmp_path / "videos/a/broken.mp4").write_bytes(b"no video")
    return tmp_path / "videos"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (16, (32, 32), 4)),
        (["data.resolution=[64,96]", "data.frames=5"], (5, (8, 12), 4)),
        (["codec.name=taef2", "data.resolution=64"], (16, (8, 8), 32)),
        (["codec.name=builtin", "data.resolution=64"], (16, (8, 8), 4)),
        (["codec.name=pixels", "data.resolution=24", "model.patch_size=3"], (16, (24, 24), 3)),
        (
            ["data.resolution=80", "model.patch_size=5"],
            (16, (10, 10), 4),
        ),  # the default latent of 32 would not take this patch
    ],
)
def test_frames_size_and_channels_follow_from_data_and_codec(words, expected):
    found = config(*words).model
    assert (found.num_frames, found.grid_size, found.latent_channels) == expected


@pytest.mark.parametrize("key", ["num_frames", "latent_size", "latent_channels"])
def test_what_was_set_by_hand_is_taken_when_it_fits_and_refused_with_both_numbers_when_not(key):
    fitting, wrong = {"num_frames": (16, 12), "latent_size": (32, 16), "latent_channels": (4, 16)}[key]
    assert getattr(config(f"model.{key}={fitting}").model, key) == fitting
    with pytest.raises(
        InputError, match=rf"model.{key} is {wrong}, but .* {'32 x 32' if key == 'latent_size' else fitting}"
    ):
        config(f"model.{key}={wrong}")


def test_all_contradictions_are_reported_at_once():
    with pytest.raises(InputError) as error:
        config("model.num_frames=8", "model.latent_size=16", "model.latent_channels=8")
    assert len(str(error.value).split("\n")) == 3


def test_a_configuration_made_by_hand_is_checked_too():
    with pytest.raises(InputError, match=r"model.num_frames is 8, but data.frames is 16"):
        RunConfig(model=ModelConfig(num_frames=8))


def test_a_size_that_the_codec_or_the_patches_do_not_divide_is_reported_with_the_nearest():
    with pytest.raises(
        InputError,
        match=r"data.resolution is 100, but codec 'kl' reduces each side 8 times; the nearest multiple is 96",
    ):
        config("data.resolution=100")
    with pytest.raises(
        InputError, match=r"model.latent_size is 9, but must be a multiple of model.patch_size = 2"
    ):
        config("data.resolution=72")


def test_the_weights_are_a_function_of_the_seed_alone():
    small = ModelConfig(depth=2, width=16, heads=2, latent_size=4)
    torch.manual_seed(1)
    first = build_model(small, 5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again, other = build_model(small, 5), build_model(small, 6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "building a model must not disturb other draws"


def test_build_makes_what_the_configuration_names():
    job = build(config(*WORDS, recipe="shapes"), "cpu")
    assert count(job.model.config).parameters == sum(
        parameter.numel() for parameter in job.model.parameters()
    )
    assert (job.codec.name, job.dataset.classes, job.device.type) == (
        "pixels",
        ["up", "down", "left", "right"],
        "cpu",
    )
    clip = job.dataset.clip(0, latte.runtime.generator(0))
    assert job.codec.encode(clip.video[None]).shape[1:] == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.num_classes=3"],
            r"model.num_classes is 3, but the data have 4 classes \(up, down, left, right\); set "
            r"model.num_classes=4",
        ),
        (
            ["data.labels=false"],
            r"model.num_classes is 4, but the data have no classes; set model.num_classes=null",
        ),
    ],
)
def test_classes_that_do_not_fit_the_data_are_reported_with_what_to_set(words, message):
    with pytest.raises(InputError, match=message):
        build(config(*WORDS, *words, recipe="shapes"), "cpu")


def test_an_unconditional_model_may_learn_from_labelled_data(videos):
    words = [word for word in WORDS if not word.startswith("data.resolution")]
    job = build(config(*words, "data.resolution=16", f"data.root={videos}"), "cpu")
    assert (job.dataset.classes, job.model.config.num_classes) == (["a", "b"], None)


def test_broken_files_are_noted_and_the_run_goes_on(videos, tmp_path):
    run = tmp_path / "run"
    result = build(
        config(*WORDS, f"data.root={videos}", "train.steps=1", "model.num_classes=2", f"run.dir={run}"), "cpu"
    ).train()
    assert result["step"] == 1
    assert "broken.mp4" in (run / "skipped.jsonl").read_text()


def test_no_data_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"data.root is missing"):
        build(config(*WORDS), "cpu")
    with pytest.raises(InputError, match="no such folder"):
        build(config(*WORDS, f"data.root={tmp_path / 'nowhere'}"), "cpu")
    with pytest.raises(InputError, match="holds no video"):
        build(config(*WORDS, f"data.root={tmp_path}"), "cpu")


def test_sheets_are_drawn_while_training(tmp_path):
    words = [word for word in WORDS if "sample_every" not in word]
    build(
        config(*words, "train.steps=3", "train.sample_every=2", f"run.dir={tmp_path}", recipe="shapes"), "cpu"
    ).train()
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.png")) == [
        "step-0000002.png",
        "step-0000003.png",
    ]


@pytest.mark.parametrize("recipe", ["shapes", "shapes-text"])
def test_samples_of_training_are_the_files_that_sampling_from_the_checkpoint_writes(tmp_path, recipe):
    words = [*WORDS, "train.steps=4", "train.sample_every=2", f"run.dir={tmp_path / 'run'}", "train.lr=0.01"]
    job = build(load_run(recipe, words)[0], "cpu")
    job.train()
    for step in (2, 4):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step}"
        pipe = VideoPipeline.from_pretrained(checkpoint, dtype="fp32", device="cpu")
        if pipe.reader:
            requests = prompt_requests(sheet_prompts(job.config, job.dataset), None, 0)
            requests = [replace(request, seed=seed) for seed, request in enumerate(requests)]
        else:
            requests = class_requests(pipe, None, 4, 0)
        again = tmp_path / f"again-{step}"
        pipe.write_clips(requests, again, facts={})
        folder = tmp_path / "run" / "samples" / f"step-{step:07d}"
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(path.name for path in again.glob("*.mp4"))
        assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    first, last = (tmp_path / "run" / "samples" / f"step-{step:07d}" / names[0] for step in (2, 4))
    assert first.read_bytes() != last.read_bytes()


def test_samples_of_other_ema_weights_are_those_of_their_width(tmp_path):
    words = [*WORDS, "train.steps=4", "train.sample_every=4", f"run.dir={tmp_path / 'run'}", "train.lr=0.01"]
    build(load_run("shapes", [*words, "train.ema_widths=0.05,0.15"])[0], "cpu").train()
    samples = tmp_path / "run" / "samples"
    assert len(list(samples.glob("step-0000004*.png"))) == 3
    clips = {}
    for width in (None, 0.05, 0.15):
        pipe = VideoPipeline.from_pretrained(tmp_path / "run", dtype="fp32", device="cpu", ema=width)
        again = tmp_path / f"again-{width}"
        pipe.write_clips(class_requests(pipe, None, 4, 0), again, facts={})
        folder = samples / ("step-0000004" + (f"-ema-{width}" if width else ""))
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(path.name for path in again.glob("*.mp4"))
        assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
        clips[width] = (folder / names[0]).read_bytes()
    assert len(set(clips.values())) == 3, "the weights differ"
