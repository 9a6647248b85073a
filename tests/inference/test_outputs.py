# SPDX-License-Identifier: Apache-2.0
"""A folder of clips: a second run makes only what is missing, and a stopped one ends with the files of one
never stopped.
"""

import json

import numpy as np
import pytest
from PIL import Image

from latte.checks import InputError
from latte.data.media import read_frames
from latte.inference.outputs import mosaic, write_clips
from latte.inference.requests import SampleRequest

REQUESTS = [SampleRequest(seed, seed % 2, ("up", "a/../b")[seed % 2]) for seed in range(5)]
FACTS = {"steps": 3, "size": (8, 8)}


class Painter:
    """Generates a clip that is a function of its seed, and counts."""

    def __init__(self, stop_after=10**6):
        self.drawn, self.stop_after = [], stop_after

    def __call__(self, number, part):
        for request in part:
            if len(self.drawn) == self.stop_after:
                raise KeyboardInterrupt
            self.drawn.append(request.seed)
            yield request.seed, np.full((3, 16, 16, 3), 40 * request.seed, np.uint8)


def contents(folder):
    """Name -> bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_request_has_its_file_and_sheet_and_gif_show_them(tmp_path):
    sheet, gif = write_clips(tmp_path, REQUESTS, Painter(), FACTS, batch=2, fps=8)
    assert {path.name for path in tmp_path.iterdir()} == {request.file for request in REQUESTS} | {
        "clips.json",
        "sheet.png",
        "clips.gif",
    }
    for request in REQUESTS:
        assert abs(int(read_frames(tmp_path / request.file, [2]).mean()) - 40 * request.seed) <= 3
    with Image.open(gif) as moving, Image.open(sheet) as image:
        assert moving.size == (3 * 18 - 2, 2 * 18 - 2)
        assert image.height > 5 * 96


def test_a_second_run_generates_nothing_and_changes_nothing(tmp_path):
    write_clips(tmp_path, REQUESTS, Painter(), FACTS, batch=2, fps=8)
    before, painter = contents(tmp_path), Painter()
    write_clips(tmp_path, REQUESTS, painter, FACTS, batch=2, fps=8)
    assert painter.drawn == []
    assert contents(tmp_path) == before


def test_prompts_are_kept_and_two_that_begin_alike_have_files_of_their_own(tmp_path):
    long = "a very long prompt that says much about what is to be seen, and then "
    requests = [SampleRequest(seed, prompt=long + word) for seed, word in enumerate(("red", "blue"))]
    write_clips(tmp_path, requests, Painter(), FACTS, batch=2, fps=8)
    assert requests[0].file.startswith("seed-0000-a-very-long-prompt-that-says-much-about-")
    assert json.loads((tmp_path / "clips.json").read_text())["prompts"] == {
        request.file: request.prompt for request in requests
    }
    painter, other = Painter(), [requests[0], SampleRequest(1, prompt=long + "green")]
    assert other[1].file != requests[1].file
    assert SampleRequest(1, prompt="caf\u00e9").file != SampleRequest(1, prompt="caf").file
    write_clips(tmp_path, other, painter, FACTS, batch=1, fps=8)
    assert painter.drawn == [1]
    assert json.loads((tmp_path / "clips.json").read_text())["prompts"] == {
        request.file: request.prompt for request in (*requests, other[1])
    }
    assert (tmp_path / requests[1].file).is_file()


@pytest.mark.parametrize("stop", range(5))
def test_a_stopped_run_ends_with_the_files_of_one_never_stopped(tmp_path, stop):
    write_clips(tmp_path / "clean", REQUESTS, Painter(), FACTS, batch=2, fps=8)
    with pytest.raises(KeyboardInterrupt):
        write_clips(tmp_path / "stopped", REQUESTS, Painter(stop), FACTS, batch=2, fps=8)
    painter = Painter()
    write_clips(tmp_path / "stopped", REQUESTS, painter, FACTS, batch=2, fps=8)
    assert painter.drawn == list(range(stop - stop % 2, 5)), "whole batches, from the first that lacks a clip"
    assert contents(tmp_path / "stopped") == contents(tmp_path / "clean")


def test_lost_and_altered_files_are_made_again(tmp_path):
    write_clips(tmp_path, REQUESTS, Painter(), FACTS, batch=1, fps=8)
    before, painter = contents(tmp_path), Painter()
    (tmp_path / REQUESTS[1].file).unlink()
    (tmp_path / REQUESTS[3].file).write_bytes(b"cut")
    write_clips(tmp_path, REQUESTS, painter, FACTS, batch=1, fps=8)
    assert painter.drawn == [1, 3]
    assert contents(tmp_path) == before


def test_more_clips_can_be_added_to_a_folder(tmp_path):
    write_clips(tmp_path, REQUESTS[:2], Painter(), FACTS, batch=2, fps=8)
    painter = Painter()
    write_clips(tmp_path, REQUESTS, painter, FACTS, batch=2, fps=8)
    assert painter.drawn == [2, 3, 4]


def test_clips_of_other_settings_are_left_alone_and_the_difference_is_shown(tmp_path):
    write_clips(tmp_path, REQUESTS, Painter(), FACTS, batch=2, fps=8)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"steps \(3 there, 4 now\)"):
        write_clips(tmp_path, REQUESTS, Painter(), {**FACTS, "steps": 4}, batch=2, fps=8)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 50_000, '{"facts": 3, "files": {}}', json.dumps({"facts": {"steps": 3}})]
)
def test_a_damaged_record_is_an_error(tmp_path, text):
    (tmp_path / "clips.json").write_text(text)
    with pytest.raises(InputError, match="damaged"):
        write_clips(tmp_path, REQUESTS, Painter(), FACTS, batch=2, fps=8)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists and is not a folder"):
        write_clips(tmp_path / "file", REQUESTS, Painter(), FACTS, batch=2, fps=8)


@pytest.mark.parametrize("word", ["../../etc/x", "a\nb", "", "ü" * 300, ".", "a\x00b", "-", "C:\\x", None])
def test_a_hostile_class_name_stays_inside_the_folder(word):
    name = SampleRequest(1, 0, word).file
    assert name.isascii()
    assert "/" not in name
    assert "\\" not in name
    assert name.startswith("seed-0001")
    assert len(name) < 80


def test_names_of_clips_differ_by_seed_and_label():
    requests = [SampleRequest(seed, label, "x/y") for seed in range(3) for label in (None, -1, 0, 1)]
    assert SampleRequest(7, 2, "left").file == "seed-0007-2-left.mp4"
    assert SampleRequest(7, -1, "none").file == "seed-0007-none.mp4"
    assert SampleRequest(7).file == "seed-0007.mp4"
    assert len({request.file for request in requests if request.label != -1}) == 9


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
def test_the_mosaic_holds_every_clip_once(count):
    clips = [np.full((2, 4, 6, 3), 10 * index + 1, np.uint8) for index in range(count)]
    board = mosaic(clips)
    assert [int((board == 10 * index + 1).all(-1).sum()) for index in range(count)] == [2 * 4 * 6] * count
