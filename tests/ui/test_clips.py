# SPDX-License-Identifier: Apache-2.0
"""Requests, uploads and outputs of the page, and the command of a clip, which gives the same clip."""

import os
import shlex
import time

import numpy as np
import pytest
from PIL import Image

from latte.checks import InputError
from latte.data.media import write_mp4
from latte.ui.clips import ClipSettings, Output, Studio, decode_image, new_id, seeds, whole
from latte.ui.desk import CancelledJob, Job
from latte.ui.shelf import Shelf, UiConfig
from latte.page.html import animation

CLIP = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)


@pytest.fixture
def studio(tmp_path):
    return Studio(
        Shelf(UiConfig(models=("builtin-shapes",), out=tmp_path / "out", device="cpu", dtype="fp32"))
    )


def job() -> Job:
    return Job(lambda job: None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be in"),
        ({"steps": -5}, "steps must be in"),
        ({"steps": 10**9}, "steps must be in"),
        ({"guidance": -1.0}, "guidance must be in"),
        ({"guidance": float("nan")}, "guidance must be in"),
        ({"sampler": "dpmp"}, "sampler is 'dpmp'"),
        ({"quality": "best"}, "quality is 'best'"),
        ({"condition": "x" * 1001}, "1001 characters"),
        ({"negative": "x" * 1001}, "negative prompt"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        ClipSettings("builtin-shapes", **values)


def test_numbers_of_the_page_are_whole_and_in_range():
    assert whole("steps", 4.0) == 4
    for value in (None, 1.5, "4", float("inf"), float("nan"), 1e300):
        with pytest.raises(InputError, match="whole number"):
            whole("steps", value)
    assert list(seeds(7, 2)) == [7, 8]
    for start, count in ((-1, 1), (2**31, 1), (0, 0), (0, 5)):
        with pytest.raises(InputError, match="must be in"):
            seeds(start, count)


def test_the_command_of_a_clip_gives_the_same_clip(studio, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from latte.cli.main import app

    image = tmp_path / "first.png"
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(image)
    first = studio.keep_image(str(image))
    settings = ClipSettings("builtin-shapes", "left", sampler="ddim", steps=2, guidance=1.5, first=first)
    seen = job()
    output = studio.make(seen, settings, 5)
    assert (seen.step, seen.steps) == (2, 2)
    assert seen.shown.dtype == np.uint8
    assert seen.shown.ndim == 4
    assert output.command.startswith("latte sample builtin-shapes --count 1 --seed 5 --labels left")
    done = CliRunner().invoke(app, [*shlex.split(output.command)[1:], "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    (again,) = (tmp_path / "again").glob("*.mp4")
    assert again.read_bytes() == (tmp_path / "out" / output.file).read_bytes()
    (found,) = studio.outputs()
    assert found == output


def test_a_cancelled_job_writes_nothing(studio, tmp_path):
    stopped = job()
    stopped.stopped = True
    with pytest.raises(CancelledJob):
        studio.make(stopped, ClipSettings("builtin-shapes", "left", sampler="ddim", steps=2), 5)
    assert not (tmp_path / "out").exists()


def test_models_are_offered_by_name_only(studio):
    with pytest.raises(InputError, match="model is '"):
        studio.pipeline("../secret")
    described = studio.describe(job(), "builtin-shapes")
    assert described["classes"] == ["up", "down", "left", "right"]
    assert not described["text"]
    assert "64 x 64" in described["about"]


def test_class_names_with_commas_become_numbers(studio):
    command = ClipSettings("builtin-shapes", "a, b").command(studio.shelf, False, 0, 3)
    assert "--labels 3" in command


def test_a_prompt_is_quoted(studio):
    command = ClipSettings("builtin-shapes", "it's; rm -rf $HOME").command(studio.shelf, True, 0, None)
    assert shlex.split(command)[-5] == "it's; rm -rf $HOME" or "it's; rm -rf $HOME" in shlex.split(command)


def output_of(studio, seed: int) -> Output:
    made = Output(
        new_id(), ClipSettings("builtin-shapes", "left"), seed, "latte sample", 0.1, time.time() + seed
    )
    return studio.write(made, CLIP, 8)


def test_outputs_have_random_names_and_an_age_limit(studio, tmp_path):
    old, new = output_of(studio, 1), output_of(studio, 2)
    other = tmp_path / "out" / "thesis.mp4"
    other.write_bytes(b"mine")
    assert studio.outputs() == [new, old]
    assert len({old.id[:4], new.id[:4]}) == 2
    past = time.time() - 25 * 3600
    for path in [*(tmp_path / "out").glob(f"{old.id}.*"), other]:
        os.utime(path, (past, past))
    assert studio.outputs() == [new]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [other.name, new.file, f"{new.id}.json"]
    )


def test_a_damaged_record_is_left_out(studio, tmp_path):
    made = output_of(studio, 1)
    (tmp_path / "out" / f"{made.id}.json").write_text("[1")
    assert studio.outputs() == []


def test_an_upload_is_decoded_again_and_stored_without_what_it_carried(studio, tmp_path):
    path = tmp_path / "photo.jpg"
    picture = Image.fromarray(np.full((20, 30, 3), 120, np.uint8))
    exif = Image.Exif()
    exif[270] = "a secret place"
    picture.save(path, exif=exif)
    name = studio.keep_image(str(path))
    kept = tmp_path / "out" / name
    assert kept.suffix == ".png"
    assert b"secret" not in kept.read_bytes()
    with Image.open(kept) as again:
        assert again.size == (30, 20)
    assert studio.keep_image(None) is None


@pytest.mark.parametrize("kind", ["text", "svg", "clip", "empty", "large", "bomb"])
def test_an_upload_that_is_no_sane_picture_is_refused(kind, tmp_path, monkeypatch):
    path = tmp_path / "upload.png"
    if kind == "text":
        path.write_text("hello")
    elif kind == "svg":
        path.write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')
    elif kind == "clip":
        write_mp4(tmp_path / "clip.mp4", CLIP, 8)
        path.write_bytes((tmp_path / "clip.mp4").read_bytes())
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "large":
        path.write_bytes(bytes((8 << 20) + 1))
    else:
        Image.new("1", (9000, 9000)).save(path)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"image|picture") as caught:
        decode_image(path)
    assert str(tmp_path) not in str(caught.value)
    assert time.monotonic() - began < 1


def test_a_preview_is_an_animated_picture():
    import base64
    import io

    head, _, content = animation(CLIP).partition(",")
    assert head == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.n_frames == len(CLIP)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"host": "0.0.0.0"}, "needs a password"),
        ({"host": "192.168.0.7", "auth": "me:"}, "USER:PASSWORD"),
        ({"auth": "secret"}, "USER:PASSWORD"),
        ({"port": 70000}, "--port"),
        ({"keep_hours": 0}, "--keep-hours"),
        ({"models": ()}, "MODEL"),
    ],
)
def test_settings_of_the_server_are_checked(values, message):
    with pytest.raises(InputError, match=message):
        UiConfig(**values)


def test_listening_elsewhere_is_fine_with_a_password():
    assert UiConfig(host="0.0.0.0", auth="me:secret").port == 7860
    assert UiConfig().host == "127.0.0.1"
