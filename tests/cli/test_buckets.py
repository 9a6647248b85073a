# SPDX-License-Identifier: Apache-2.0
"""Clips of several shapes in one run, from the commands: what a sheet shows, and sampling at every bucket."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latte.data.media import probe
from tiny import WORDS

SHAPES = ["3x16x16", "3x12x20", "5x20x12", "1x16x24"]
BUCKETS = f"data.buckets=[{','.join(SHAPES)}]"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with four buckets, and its sample sheet."""
    from latte.build import build
    from latte.config.run import load_run

    folder = tmp_path_factory.mktemp("runs") / "mixed"
    words = [*WORDS, BUCKETS, "train.steps=2", f"run.dir={folder}", "train.sample_every=2"]
    build(load_run("shapes", words)[0], "cpu").train()  # warnings are errors: no table is extended
    return folder


def shape_of(path: Path) -> str:
    """frames x height x width of a video file."""
    info = probe(path)
    return f"{info.frames}x{info.height}x{info.width}"


def blank_columns(sheet: np.ndarray) -> int:
    """White columns at the right of an image (h w c)."""
    white = (sheet == 255).all((0, 2))
    return len(white) - int(np.flatnonzero(~white)[-1]) - 1


def test_the_sample_sheet_of_a_run_has_rows_of_several_shapes(trained):
    sheet = np.asarray(Image.open(trained / "samples/step-0000002.png"))
    scale = 8  # of the shortest side, 12, to 96
    heights = [scale * side for side in (20, 16, 16, 12)]  # tall, square, the image, wide: by aspect
    assert sheet.shape == (sum(heights) + 4 * 20 + 2, 5 * (12 * scale + 2) + 2, 3)
    widths = [5 * (12 * scale + 2), 3 * (16 * scale + 2), 24 * scale + 2, 3 * (20 * scale + 2)]
    top = 2 + 18
    for height, width in zip(heights, widths, strict=True):
        row = sheet[top : top + height]
        assert blank_columns(row) == sheet.shape[1] - width, "every frame of the row, and nothing behind"
        top += height + 20


@pytest.mark.parametrize("shape", SHAPES)
def test_every_bucket_of_a_run_can_be_sampled(latte, trained, shape):
    frames, _, size = shape.partition("x")
    found = latte("sample", trained, "--frames", frames, "--size", size, "--count", 1, "--json")
    assert found.code == 0, found.err
    assert "warning" not in found.err
    assert [shape_of(Path(clip["path"])) for clip in found.json["clips"]] == [shape]


@pytest.mark.filterwarnings("default:.*table is extended")
def test_other_shapes_warn_or_name_the_nearest(latte, trained):
    found = latte("sample", trained, "--size", "24x16", "--count", 1)
    assert found.code == 0, found.err
    assert "warning: latents of 24 x 16 are larger than the 20 x 24 the model was trained on" in found.err
    found = latte("sample", trained, "--frames", 6, "--count", 1)
    assert "warning: 6 latent frames are more than the 5 the model was trained on" in found.err
    found = latte("sample", trained, "--size", "18x16")
    assert (found.code, len(found.errors)) == (2, 1)
    assert "the nearest multiples are 16 and 20 for the height 18" in found.errors[0]


@pytest.mark.filterwarnings("default:.*table is extended")
def test_a_weights_folder_of_a_run_knows_its_buckets(latte, trained):
    assert latte("convert", trained, "weights").code == 0
    stored = json.loads(Path("weights/config.json").read_text("utf-8"))
    assert ["x".join(map(str, shape)) for shape in stored["buckets"]] == [SHAPES[0], *SHAPES]
    again = latte("sample", "weights", "--size", "16x24", "--frames", 5, "--count", 1)
    assert again.code == 0, again.err
    assert "warning" not in again.err
    shutil.copytree("weights", "plain")
    del stored["buckets"]
    Path("plain/config.json").write_text(json.dumps(stored), "utf-8")
    assert "warning" in latte("sample", "plain", "--size", "16x24", "--frames", 5, "--count", 1).err


def test_inspect_shows_clips_of_each_bucket_in_turn(latte):
    words = ("data", "inspect", "shapes", *WORDS, BUCKETS, "--json")
    found = latte(*words, "--count", 6)
    assert found.code == 0, found.err
    keys = found.json["clips"]
    assert [int(key.partition("/")[2]) % 4 for key in keys] == [0, 1, 2, 3, 0, 1]
    assert len(set(keys)) == 6
    sheet = np.asarray(Image.open("clips.png"))
    heights = [8 * side for side in (16, 12, 20, 16, 16, 12)]
    assert sheet.shape[0] == sum(heights) + 6 * 20 + 2
    assert len(latte(*words, "data.num_clips=5", "--count", 6).json["clips"]) == 5


def test_inspect_shows_what_the_codec_makes_of_a_clip(latte):
    words = ("data", "inspect", "shapes", *WORDS, BUCKETS, "--count", 4)
    assert latte(*words, "--out", "plain.png").code == 0
    assert latte(*words, "--out", "pixels.png", "--decoded").code == 0
    assert Path("plain.png").read_bytes() == Path("pixels.png").read_bytes(), "pixels are exact"
    coded = (
        "codec.name=builtin",
        "model.patch_size=1",
        "data.resolution=32",
        "data.buckets=[3x32x32,1x24x40]",
    )
    found = latte(*words, *coded, "--out", "coded.png", "--decoded", "--json")
    assert found.code == 0, found.err
    assert "latent_frames" not in found.json
    assert latte(*words, *coded, "--out", "exact.png").code == 0
    one, other = (np.asarray(Image.open(f"{name}.png")).astype(float) for name in ("coded", "exact"))
    assert one.shape == other.shape
    assert 0.1 < abs(one - other).mean() < 10
