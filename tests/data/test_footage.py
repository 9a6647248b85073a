# SPDX-License-Identifier: Apache-2.0
"""Long videos become clips: the right frames, copied where possible, a manifest, resuming after a stop."""

import json
import os

import numpy as np
import pytest

import latte.data.footage as footage_module
from latte.checks import InputError
from latte.data.footage import MANIFEST, SplitConfig, clip_names, split_footage
from latte.data.media import decode_frames, probe
from latte.data.pieces import Footage, NotCopied, check_copy, copy_packets
from latte.data.shots import Shot
from videos import encode, shots


def clips_of(record: dict, key: str = "v.mp4") -> list[dict]:
    return record["sources"][key]["clips"]


@pytest.fixture
def video(tmp_path):
    """Shots of 30, 40 and 35 frames at 25 fps, a key frame at each cut."""
    (tmp_path / "in").mkdir()
    return encode(tmp_path / "in" / "v.mp4", shots(30, 40, 35))


def test_shots_that_begin_at_key_frames_are_copied_and_show_the_same_frames(video, tmp_path):
    record = split_footage(video, tmp_path / "out", SplitConfig(min_seconds=0))
    clips = clips_of(record)
    assert [(clip["first_frame"], clip["frames"], clip["rule"]) for clip in clips] == [
        (0, 30, "start"),
        (30, 40, "cut"),
        (70, 35, "cut"),
    ]
    assert [clip["written"] for clip in clips] == ["copied"] * 3
    for clip in clips:
        first = clip["first_frame"]
        expected, _ = decode_frames(video, range(first, first + clip["frames"]))
        found, _ = decode_frames(tmp_path / "out" / clip["file"], range(clip["frames"]))
        assert np.array_equal(found, expected)
        assert clip["start"] == pytest.approx(first / 25)
        assert clip["end"] - clip["start"] == pytest.approx(clip["frames"] / 25)
        assert probe(tmp_path / "out" / clip["file"]).fps == 25
    assert json.loads((tmp_path / "out" / MANIFEST).read_text("utf-8")) == record


def test_a_shot_without_a_key_frame_is_encoded_and_said_so(tmp_path):
    video = encode(tmp_path / "v.mp4", shots(30, 40), sc_threshold="0", g="250")
    record = split_footage(video, tmp_path / "out", SplitConfig())
    written = [clip["written"] for clip in clips_of(record)]
    assert written[1] == "encoded"
    for clip in clips_of(record):
        first = clip["first_frame"]
        expected, _ = decode_frames(video, range(first, first + clip["frames"]))
        found, _ = decode_frames(tmp_path / "out" / clip["file"], range(clip["frames"]))
        assert probe(tmp_path / "out" / clip["file"]).frames == clip["frames"]
        assert np.abs(found.astype(int) - expected).mean() < 4


def test_a_copy_that_shows_other_frames_is_refused(video, tmp_path):
    footage = Footage.read(str(video))
    copied = tmp_path / "copy.mp4"
    copy_packets(footage, Shot(30, 70, "cut"), str(copied))
    check_copy(str(copied), footage, Shot(30, 70, "cut"))
    for other in (Shot(29, 69, "cut"), Shot(30, 69, "cut"), Shot(30, 71, "cut")):
        with pytest.raises(NotCopied):
            check_copy(str(copied), footage, other)
    with pytest.raises(NotCopied):
        copy_packets(footage, Shot(25, 65, "cut"), str(copied))


def test_uneven_times_stay(tmp_path):
    ticks = [20 * t + (7 if t % 3 == 1 else 0) for t in range(70)]
    video = encode(tmp_path / "v.mp4", shots(30, 40), ticks=ticks, sc_threshold="0", g="250")
    record = split_footage(video, tmp_path / "out", SplitConfig(min_seconds=0))
    for clip in clips_of(record):
        first = clip["first_frame"]
        expected_times = [(tick - ticks[first]) / 1000 for tick in ticks[first : first + clip["frames"]]]
        assert probe(tmp_path / "out" / clip["file"]).times == pytest.approx(expected_times, abs=2e-3)
    assert clips_of(record)[1]["written"] == "encoded"


def test_a_video_without_a_change_of_scene_is_one_clip(tmp_path):
    video = encode(tmp_path / "v.mp4", shots(60))
    (clip,) = clips_of(split_footage(video, tmp_path / "out", SplitConfig()))
    assert (clip["frames"], clip["rule"], clip["written"]) == (60, "start", "copied")


def test_short_pieces_are_dropped_and_long_ones_cut(video, tmp_path):
    config = SplitConfig(min_seconds=0.3, max_seconds=0.7)
    record = split_footage(video, tmp_path / "out", config)
    clips = clips_of(record)
    parts = ["start", "length", "cut", "length", "length", "cut", "length", "length"]
    assert [clip["rule"] for clip in clips] == parts
    assert all(0.3 <= clip["end"] - clip["start"] <= 0.7 for clip in clips)
    assert sum(clip["frames"] for clip in clips) == 105
    strict = split_footage(video, tmp_path / "long", SplitConfig(min_seconds=1.3))
    assert [clip["frames"] for clip in clips_of(strict)] == [40, 35]
    assert [piece["frames"] for piece in strict["sources"]["v.mp4"]["dropped"]] == [30]


def test_an_interrupted_split_continues_and_finished_clips_stay(video, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = footage_module.write_piece
    calls = []

    def stop(footage, piece, path):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(footage, piece, path)

    monkeypatch.setattr(footage_module, "write_piece", stop)
    with pytest.raises(KeyboardInterrupt):
        split_footage(video, out, SplitConfig())
    assert calls == ["v-0000.mp4", "v-0001.mp4", "v-0002.mp4"], "the interruption happened"
    stored = json.loads((out / MANIFEST).read_text("utf-8"))
    assert not stored["sources"]["v.mp4"]["complete"]
    before = [os.stat(out / f"v-000{number}.mp4").st_mtime_ns for number in range(2)]
    record = split_footage(video, out, SplitConfig())
    assert calls[3:] == ["v-0002.mp4"]
    assert [os.stat(out / f"v-000{number}.mp4").st_mtime_ns for number in range(2)] == before
    assert record == split_footage(video, tmp_path / "other", SplitConfig())
    split_footage(video, out, SplitConfig())
    assert len(calls) == 7, "a finished split writes nothing"


def test_a_changed_video_is_split_again_and_its_old_clips_go(video, tmp_path):
    out = tmp_path / "out"
    split_footage(video, out, SplitConfig())
    encode(video, shots(50))
    os.utime(video, ns=(1, 1))
    record = split_footage(video, out, SplitConfig())
    assert [clip["frames"] for clip in clips_of(record)] == [50]
    assert sorted(path.name for path in out.glob("*.mp4")) == ["v-0000.mp4"]


def test_a_damaged_video_is_skipped_by_name_and_the_rest_goes_on(video, tmp_path):
    (video.parent / "broken.mp4").write_bytes(b"no video")
    record = split_footage(video.parent, tmp_path / "out", SplitConfig())
    assert list(record["sources"]) == ["v.mp4"]
    assert record["skipped"]["broken.mp4"].startswith("not-a-video: ")


def test_what_cannot_be_split_is_refused(video, tmp_path):
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="is inside"):
        split_footage(video.parent, video.parent / "clips", SplitConfig())
    with pytest.raises(InputError, match="holds no video"):
        split_footage(empty, out, SplitConfig())
    split_footage(video, out, SplitConfig())
    with pytest.raises(InputError, match=r"made with min_seconds 1\.0, not 2"):
        split_footage(video, out, SplitConfig(min_seconds=2))
    (out / MANIFEST).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        split_footage(video, out, SplitConfig())
    with pytest.raises(InputError, match="--max-seconds must be at least"):
        SplitConfig(min_seconds=2, max_seconds=3)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["a/v.mp4", "b/v.mp4"], ["a/v", "b/v"]),
        (["v.mp4", "v.avi"], ["v.mp4", "v.avi"]),
        (["V.mp4", "v.avi"], ["V.mp4", "v.avi"]),
        (["a:b?.mp4"], ["a_b_"]),
        (["a?.mp4", "a_.mp4"], ["a_", "a__"]),
    ],
)
def test_names_of_clips_are_distinct_and_allowed_on_every_system(keys, names):
    assert list(clip_names(keys).values()) == names
