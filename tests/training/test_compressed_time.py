# SPDX-License-Identifier: Apache-2.0
"""Training with a codec that compresses time: clips are encoded as clips, images by themselves."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import noise

import latte
from latte.checks import InputError
from latte.config.run import load_run
from latte.data.datasets import DataConfig, build_dataset
from latte.runtime import generator
from latte.training.step import encode
from temporal import BlockCodec, DrawnTimeCodec, TimeCodec, time_codec
from tiny_runs import SHORT, curve

pytestmark = pytest.mark.usefixtures("time_codecs")
CONFIG = replace(SHORT, steps=3, checkpoint_every=2)
SHAPE = latte.ModelConfig(
    depth=2, width=16, heads=2, patch_size=2, num_frames=3, latent_size=4, latent_channels=12, num_classes=2
)


class Frames:
    """Five clips of 9 frames of 8 x 8, in two classes."""

    classes = ("dog", "cat")

    def __init__(self, frames: int = 9):
        self.video = np.random.default_rng(0).integers(0, 256, (5, frames, 8, 8, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, index):
        return self.video[index], index % 2


def encoded(codec: TimeCodec, video: torch.Tensor, positions, num_images: int = 0) -> torch.Tensor:
    """The latents of step 5 of a run with seed 7."""
    task = SimpleNamespace(codec=codec, num_images=num_images, seed=7, device=torch.device("cpu"))
    return encode(task, 5, positions, video)


@pytest.mark.parametrize("kind", [TimeCodec, DrawnTimeCodec])
def test_images_behind_a_clip_are_latent_frames_of_their_own(kind):
    codec = time_codec(kind)
    clips = noise(2, 9, 3, 4, 4)
    images = noise(2, 3, 3, 4, 4, seed=1)
    found = encoded(codec, torch.cat((clips, images), 1), [6, 7], num_images=3)
    assert found.shape == (2, 3 + 3, 12, 2, 2)
    for row, position in enumerate((6, 7)):
        stream = generator(7, "encode", 5, position)
        assert torch.equal(found[row, :3], codec.encode(clips[row : row + 1], stream)[0])
        each = codec.encode(images[row].unsqueeze(1), stream)  # (3 1 c h w)
        assert torch.equal(found[row, 3:], each[:, 0])
    alone = encoded(codec, clips, [6, 7])
    assert torch.equal(found[:, :3], alone), "the clip depends on its images"


def test_a_clip_depends_on_its_place_and_not_on_its_batch():
    codec = time_codec(DrawnTimeCodec)
    video = noise(3, 5, 3, 4, 4)
    together = encoded(codec, video, [1, 2, 3])
    assert torch.equal(together[1:2], encoded(codec, video[1:2], [2]))
    assert not torch.equal(together[1:2], encoded(codec, video[1:2], [3]))


def train(tmp_path, codec, dataset=None, model=SHAPE, config=CONFIG, **changes) -> dict:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = latte.Latte(model)
    return latte.train(
        model=network, dataset=dataset or Frames(), codec=codec, config=config, run_dir=tmp_path, **changes
    )


def test_a_custom_dataset_of_frames_trains_resumes_and_its_record_counts_frames(tmp_path):
    codec = time_codec()
    config = replace(CONFIG, num_images=2)
    whole = train(tmp_path / "whole", codec, config=config)
    train(tmp_path / "parts", codec, config=config, until=2)
    assert train(tmp_path / "parts", codec, config=config)["weights_sha256"] == whole["weights_sha256"]
    assert curve(tmp_path / "parts")[-1]["loss"] == curve(tmp_path / "whole")[-1]["loss"]
    record, _ = load_run(tmp_path / "whole")
    assert (record.data.frames, record.data.size, record.codec.name) == (9, (8, 8), "time")
    assert record.model.num_frames == 3
    pipe = latte.VideoPipeline.from_pretrained(str(tmp_path / "whole"), device="cpu")
    clip = pipe(class_labels=["cat"], num_inference_steps=2).frames[0]
    assert clip.shape == (9, 8, 8, 3)


@pytest.mark.parametrize(
    ("kind", "frames", "model", "config", "message"),
    [
        (
            TimeCodec,
            10,
            SHAPE,
            CONFIG,
            "the number of frames of the first clip is 10, .* the nearest valid numbers are 9 and 13",
        ),
        (
            TimeCodec,
            13,
            SHAPE,
            CONFIG,
            r"has latents of \(4, 12, 4, 4\) .*takes \(3, 12, 4, 4\); change the clips \(to 9 frames\)",
        ),
        (
            BlockCodec,
            12,
            SHAPE,
            replace(CONFIG, num_images=1),
            "train.num_images is 1, but codec 'time_blocks' encodes no images",
        ),
    ],
)
def test_clips_and_images_that_the_codec_does_not_take_are_refused_first(
    tmp_path, kind, frames, model, config, message
):
    with pytest.raises(InputError, match=message) as caught:
        train(tmp_path / "run", time_codec(kind), Frames(frames), model, config)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("c*"))


def test_other_datasets_are_checked_too(tmp_path):
    data = DataConfig(kind="procedural", frames=8, resolution=8, num_clips=4)
    with pytest.raises(InputError, match=r"first clip is 8, .* nearest valid numbers are 5 and 9"):
        train(tmp_path / "run", time_codec(), build_dataset(data), replace(SHAPE, num_classes=4))
