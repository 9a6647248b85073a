# SPDX-License-Identifier: Apache-2.0
"""The commands with a codec that compresses time: what a user types counts frames of video."""

from pathlib import Path

import pytest
from PIL import Image

from temporal import TIME_WORDS
from tiny import WORDS

pytestmark = pytest.mark.usefixtures("time_codecs")
RUN = ["shapes", *WORDS, *TIME_WORDS, "train.steps=2"]


@pytest.mark.parametrize("command", [["config", "show"], ["plan"], ["train"]])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.frames=16"], ["data.frames is 16", "1 + 4 k frames", "13 and 17"]),
        (["data.frames=0"], ["frames must be at least 1"]),
        (["data.frames=9", "model.patch=compression"], ["3 latent frames", "model.tube = 2", "5 and 13"]),
        (["data.frames=1", "model.patch=compression"], ["1 latent frames", "numbers are 5"]),
        (["data.frames=9", "model.num_frames=9"], ["model.num_frames is 9", "encodes to 3 latent frames"]),
        (
            ["codec.name=time_blocks", "data.frames=8", "train.num_images=1"],
            ["train.num_images is 1", "encodes no images"],
        ),
    ],
)
def test_lengths_that_do_not_fit_are_one_line_with_the_nearest_ones(latte, command, words, expected):
    found = latte(*command, *RUN, *words)
    assert found.code == 2
    (line,) = found.errors
    assert all(part in line for part in expected), line
    assert not Path("runs").exists()


def test_valid_lengths_of_codec_and_patches_together(latte):
    for frames, tube in ((5, 2), (13, 2), (13, 4), (9, 3)):
        words = [f"data.frames={frames}", "model.patch=compression", f"model.tube={tube}"]
        assert latte("config", "show", *RUN, *words).code == 0


def width_of(samples: str) -> int:
    with Image.open(f"{samples}/step-0000002.png") as sheet:
        return sheet.width


def test_training_from_frames_writes_sheets_of_whole_clips(latte):
    words = ["train.sample_every=2", "train.num_images=2"]
    found = latte("train", *RUN, *words, "--json")
    assert found.code == 0, found.err
    longer = latte("train", *RUN, *words, "data.frames=17", "--out", "longer", "--json")
    assert longer.code == 0, longer.err
    widths = [width_of("runs/shapes/samples"), width_of("longer/samples")]
    assert widths[0] // 9 == widths[1] // 17, "a sheet has one picture per frame of video"
    again = latte("train", *RUN, *words, "train.steps=4", "--json")
    assert again.json["step"] == 4
    other = latte("train", *RUN, *words, "data.frames=13", "train.steps=6")
    assert other.code == 2
    assert any("data.frames: the run has 9, you gave 13" in line for line in other.errors)
