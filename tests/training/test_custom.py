# SPDX-License-Identifier: Apache-2.0
"""Training from Python: any map-style dataset, runs that can be sampled from and resumed, and what is
refused.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import latte
from latte.checkpoint.run import list_checkpoints, load_latest
from latte.checks import InputError
from latte.config.run import load_run
from latte.runtime import generator
from latte.training.custom import CustomDataset
from tiny_runs import SHORT, curve

CODEC = latte.build_codec(latte.CodecConfig(name="pixels"))
SHAPE = latte.ModelConfig(
    depth=2, width=16, heads=2, patch_size=4, num_frames=3, latent_size=8, latent_channels=3, num_classes=2
)
CONFIG = replace(SHORT, steps=3, checkpoint_every=2)
VIDEO = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8, 3), dtype=np.uint8)


class Frames(torch.utils.data.Dataset):
    """Six clips of 3 frames of 8 x 8; with ``augment`` mirrored at random by torch's global generator."""

    classes = ("dog", "cat")

    def __init__(self, augment: bool = False):
        self.augment = augment

    def __len__(self) -> int:
        return len(VIDEO)

    def __getitem__(self, index):
        video = VIDEO[index]
        if self.augment and torch.rand(()) < 0.5:
            video = video[:, :, ::-1].copy()
        return video, index % 2


class Floats(Frames):
    """The same clips as float (f 3 H W) in [-1, 1], as mappings without class names."""

    classes = None

    def __getitem__(self, index):
        video, label = super().__getitem__(index)
        frames = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 127.5 - 1  # (f 3 H W)
        return {"video": frames, "label": torch.tensor(label)}


class Only(Frames):
    """Clips that are all ``item``."""

    def __init__(self, item):
        super().__init__()
        self.item = item

    def __getitem__(self, index):
        return self.item


def new_model(config: latte.ModelConfig = SHAPE) -> latte.Latte:
    torch.manual_seed(0)
    return latte.Latte(config)


def train(run_dir: Path, **changes) -> dict:
    parts = {"model": new_model(), "dataset": Frames(), "codec": CODEC, "config": CONFIG, "run_dir": run_dir}
    return latte.train(**{**parts, **changes}, device="cpu")


def test_a_run_from_python_can_be_sampled_with_its_codec_and_class_names(tmp_path):
    result = train(tmp_path)
    pipe = latte.VideoPipeline.from_pretrained(tmp_path, device="cpu")
    assert (pipe.classes, pipe.codec.name) == (["dog", "cat"], "pixels")
    videos = pipe(class_labels=["dog", "cat"], num_inference_steps=2, seed=0).frames
    assert videos.shape == (2, 3, 8, 8, 3)
    assert pipe.weights == result["weights_sha256"]


@pytest.mark.parametrize("num_classes", [2, None])
def test_every_diffusion_setting_is_recorded_and_must_stay(tmp_path, num_classes):
    diffusion = latte.DiffusionConfig(objective="v", num_steps=200)
    model = new_model(replace(SHAPE, num_classes=num_classes))
    train(tmp_path, model=model, diffusion=diffusion)
    assert load_run(tmp_path)[0].diffusion == diffusion
    with pytest.raises(InputError, match=r"diffusion\.objective: the run has \"v\", you gave \"paper\""):
        train(tmp_path, model=new_model(replace(SHAPE, num_classes=num_classes)))


@pytest.mark.parametrize("augment", [False, True])
def test_a_run_from_python_resumes_bit_for_bit_with_random_augmentation(tmp_path, augment):
    whole = train(tmp_path / "whole", dataset=Frames(augment), config=replace(CONFIG, steps=5))
    for steps in (2, 5):
        torch.manual_seed(steps)  # the global generator must not matter
        again = train(
            tmp_path / "parts",
            model=whole_model(),
            dataset=Frames(augment),
            config=replace(CONFIG, steps=steps),
        )
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def whole_model() -> latte.Latte:
    with torch.random.fork_rng():
        return new_model()


def test_augmentation_is_drawn_anew_for_each_clip_and_disturbs_no_global_state():
    dataset = CustomDataset(Frames(augment=True), 2, latent=False)
    before = torch.get_rng_state()
    clips = [dataset.clip(0, generator("clip", draw)).video for draw in range(16)]
    assert torch.equal(before, torch.get_rng_state())
    mirrored = sum(not torch.equal(clip, clips[0]) for clip in clips)
    assert 0 < mirrored < 16
    assert torch.equal(dataset.clip(0, generator("clip", 3)).video, clips[3])


def test_uint8_and_float_items_give_the_same_run(tmp_path):
    first = train(tmp_path / "uint8")
    second = train(tmp_path / "float", dataset=Floats())
    assert first["weights_sha256"] == second["weights_sha256"]
    facts = load_latest(tmp_path / "float").state["facts"]
    assert facts["classes"] == ["0", "1"]


def test_latents_need_no_codec_and_images_ride_behind_clips(tmp_path):
    latents = [torch.randn(3, 4, 8, 8, generator=generator("z", index)) for index in range(4)]
    model = new_model(replace(SHAPE, latent_channels=4, num_classes=None))
    result = train(tmp_path, model=model, dataset=latents, codec=None, config=replace(CONFIG, num_images=2))
    assert result["step"] == 3
    assert load_run(tmp_path)[0].data.kind == "custom"


def test_workers_change_no_bit(tmp_path, quick_start):
    alone = train(tmp_path / "alone", workers=0)
    assert train(tmp_path / "workers", workers=1)["weights_sha256"] == alone["weights_sha256"]


def test_a_run_of_0_1_0_without_diffusion_and_classes_resumes(tmp_path):
    train(tmp_path / "whole", config=replace(CONFIG, log_every=3))
    train(tmp_path, config=replace(CONFIG, steps=2, log_every=3))
    folder = list_checkpoints(tmp_path)[-1]
    state = json.loads((folder / "state.json").read_text())
    for key in ("diffusion", "classes"):
        del state["facts"][key]
    state["tally"] = state.pop("metrics")
    state["facts"]["data"] = {"kind": "custom", "clips": 6, "classes": ["dog", "cat"]}
    from latte.checkpoint.run import load_checkpoint, save_checkpoint

    save_checkpoint(tmp_path, 2, load_checkpoint(folder).tensors, state)
    assert train(tmp_path, config=replace(CONFIG, log_every=3))["step"] == 3
    assert curve(tmp_path) == curve(tmp_path / "whole")


def test_the_command_line_says_how_to_resume_it(tmp_path):
    from latte.build import build

    train(tmp_path)
    with pytest.raises(InputError, match=r"call latte\.train again with that dataset"):
        build(load_run(tmp_path, ["train.steps=9"])[0], "cpu")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield VIDEO[0], 0


FLOAT = torch.zeros(3, 3, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": Stream()}, "dataset is a Stream without length or indexing"),
        ({"dataset": Only(("a video", 0))}, "item 0 of dataset is a str; give a video"),
        (
            {"dataset": Only((VIDEO[0][..., :2], 0))},
            r"item 0 of dataset is torch.uint8 of shape \(3, 8, 8, 2\)",
        ),
        (
            {"dataset": Only((FLOAT.double()[0], 0))},
            r"is torch.float64 of shape \(3, 8, 8\); give uint8 \(frames",
        ),
        (
            {"dataset": Only((VIDEO[0, :2], 0))},
            r"the first clip \(2, 3, 8, 8\) has latents of \(2, 3, 8, 8\)",
        ),
        ({"dataset": Only((FLOAT + 255, 0))}, r"values up to 255, but float frames must be in \[-1, 1\]"),
        ({"dataset": Only((VIDEO[0], 7))}, "a label is 7, but the model has classes 0 to 1"),
        ({"codec": None}, r"is torch.uint8 of shape .*; give a float latent"),
        ({"dataset": []}, "the dataset is empty"),
    ],
)
def test_items_that_are_no_clips_of_the_model_are_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        train(tmp_path, **changes)
    assert "\n" not in str(caught.value)
    assert list_checkpoints(tmp_path) == []
