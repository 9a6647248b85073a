# SPDX-License-Identifier: Apache-2.0
"""Every container comes back frame by frame; a seek equals decoding from the start; what is broken is refused
or cut, never a crash.
"""

import json
import os
import random
import sys
import time
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

import av
import numpy as np
import pytest
from PIL import Image
from support import shared

from latte.checks import InputError
from latte.data import frame_folder as framefolder
from latte.data import media, video_stream
from latte.data.frame_folder import read_image
from latte.data.media import Unreadable, decode_frames, probe, read_frames
from latte.data.video_stream import is_video_name
from videos import encode, number_of, numbered

KINDS = {
    "a.mp4": ("libx264", {"g": "12", "bf": "2"}),
    "a.mov": ("libx264", {"g": "12", "bf": "0"}),
    "a.mkv": ("libx264", {"g": "12", "bf": "2"}),
    "a.avi": ("mpeg4", {"g": "12"}),
    "a.webm": ("libvpx", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    "a.mpg": ("mpeg1video", {"g": "12"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_container_is_read_and_a_seek_equals_sequential_decoding(tmp_path, name):
    codec, options = KINDS[name]
    path = encode(tmp_path / name, numbered(60), codec, **options)
    info = probe(path)
    assert (info.frames, info.height, info.width, info.fps, info.notes) == (60, 48, 64, 25.0, ())
    np.testing.assert_allclose(info.times, np.arange(60) / 25, atol=6e-4)  # mkv and webm count milliseconds
    everything = read_frames(path, range(60))
    assert [number_of(frame) for frame in everything] == [i % 38 for i in range(60)]
    costs = []
    for first in (0, 5, 23, 24, 37, 51, 55):
        span = [first, first + 2, first + 4]
        frames, decoded = decode_frames(info, span)
        np.testing.assert_array_equal(frames, everything[span])
        costs.append(decoded)
    if name != "a.mpg":  # a program stream has no index to seek by
        assert len(info.keys) > 3
        assert max(costs) <= 12 + 5 < 56, f"decoded {costs} frames for spans of 5 in groups of 12"


def test_order_and_repeats_are_as_asked_and_indices_outside_are_refused(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(30), g="10")
    info = probe(path)
    assert [number_of(frame) for frame in read_frames(info, [21, 3, 21, 12])] == [21, 3, 21, 12]
    for wrong in ([30], [-1], []):
        with pytest.raises(InputError, match=r"0\.\.\.29"):
            read_frames(info, wrong)
    with pytest.raises(Unreadable, match="frame 30 does not decode"):
        read_frames(path, [2, 30])


def test_a_seek_that_lands_elsewhere_is_never_believed(tmp_path):
    info = probe(encode(tmp_path / "a.mp4", numbered(60), g="12"))
    for wrong in (
        replace(info, start=info.start + 1),
        replace(info, keys=(0, 7, 19, 31)),
        replace(info, steps=((1024, 59),)),
    ):
        frames, _ = decode_frames(wrong, [33, 35])
        assert [number_of(frame) for frame in frames] == [33, 35]


def test_a_stream_that_decodes_otherwise_after_a_seek_is_read_from_its_start(tmp_path, monkeypatch):
    """As 4:4:4 files of old x264 do, without an error: what the decoder needs to know is in the first
    packet alone.
    """
    even = {"g": "10", "sc_threshold": "0"}
    path, other = (
        encode(tmp_path / "a.mp4", numbered(30), **even),
        encode(tmp_path / "b.mp4", numbered(30) // 2, **even),
    )
    assert probe(path).keys == (0, 10, 20)
    honest = media.decode_stream
    monkeypatch.setattr(
        media, "decode_stream", lambda path, seek=None: honest(path if seek is None else str(other), seek)
    )
    info = probe(path)
    assert info.keys == (0,)
    frames, decoded = decode_frames(info, [22])
    assert (number_of(frames[0]), decoded) == (22, 23)


def test_uneven_frame_times_are_kept(tmp_path):
    ticks = list(accumulate([20, 40, 40, 250, 33, 100, 20, 20, 66], initial=0))
    info = probe(encode(tmp_path / "a.mkv", numbered(10), ticks=ticks))
    np.testing.assert_allclose(info.times, [tick / 1000 for tick in ticks], atol=1e-9)
    assert info.fps == pytest.approx(9 / 0.589, abs=1e-3)
    assert [number_of(frame) for frame in read_frames(info, [9, 4])] == [9, 4]


FORMATS = [
    ("yuv420p", (48, 64)),
    ("yuv422p", (48, 64)),
    ("yuv420p10le", (48, 64)),
    ("full", (48, 64)),
    ("yuv444p", (47, 65)),
]


@pytest.mark.parametrize(("pix_fmt", "size"), FORMATS)
def test_pixel_formats_and_odd_sizes_keep_their_colours(tmp_path, pix_fmt, size):
    colour = np.array([200, 60, 120])
    frames = np.empty((3, *size, 3), np.uint8)
    frames[:] = colour
    full = pix_fmt == "full"
    path = encode(
        tmp_path / "a.mp4", frames, pix_fmt="yuv420p" if full else pix_fmt, full_range=full, crf="4"
    )
    assert probe(path).frames == 3
    assert probe(path).height == size[0]
    read = read_frames(path, [0, 2])
    assert read.shape == (2, *size, 3)
    np.testing.assert_allclose(read.mean((0, 1, 2)), colour, atol=4)


def with_display_matrix(path, matrix):
    """Rewrite (a b c d) of an mp4's track header, which sends (x, y) to (a x + c y, b x + d y), y
    downwards.
    """
    data = bytearray(path.read_bytes())

    def packed(a, b, c, d):
        fixed = [round(value * 65536) & 0xFFFFFFFF for value in (a, b, 0, c, d, 0, 0, 0)]
        return b"".join(value.to_bytes(4, "big") for value in (*fixed, 1 << 30))

    at = data.index(packed(1, 0, 0, 1), data.index(b"tkhd"))
    data[at : at + 36] = packed(*matrix)
    path.write_bytes(data)


SIGNED = [((1, 0, 0, 1), s, t) for s in (1, -1) for t in (1, -1)] + [
    ((0, 1, 1, 0), s, t) for s in (1, -1) for t in (1, -1)
]
MATRICES = [(s * a, t * b, s * c, t * d) for (a, b, c, d), s, t in SIGNED]  # all 8 turns and mirror images


@pytest.mark.parametrize("matrix", MATRICES)
def test_every_display_matrix_is_applied_as_players_do(tmp_path, matrix):
    path = encode(tmp_path / "a.mp4", numbered(4, 32, 64))
    stored = read_frames(path, [1])[0]
    with_display_matrix(path, matrix)
    a, b, c, d = matrix
    height, width = stored.shape[:2]
    shown = {(a * x + c * y, b * x + d * y): stored[y, x] for y in range(height) for x in range(width)}
    left, top = min(x for x, _ in shown), min(y for _, y in shown)
    expected = np.empty(stored.shape if a else stored.swapaxes(0, 1).shape, np.uint8)
    for (x, y), pixel in shown.items():
        expected[y - top, x - left] = pixel
    info = probe(path)
    assert ((info.height, info.width), info.notes) == (expected.shape[:2], ())
    np.testing.assert_array_equal(read_frames(info, [1])[0], expected)


def test_other_angles_are_turned_to_the_nearest_quarter_and_noted(tmp_path):
    path = encode(tmp_path / "a.mp4", numbered(4, 32, 64))
    with_display_matrix(path, (0.5, 0.8660254, -0.8660254, 0.5))
    info = probe(path)
    assert (info.height, info.width) == (64, 32)
    assert [note.partition(":")[0] for note in info.notes] == ["rotation"]


EXIF = {  # orientation -> upright pixels, by where the EXIF standard puts row 0 and column 0
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
    8: lambda x: x.swapaxes(0, 1)[::-1],
    9: lambda x: x,
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("value", EXIF)
def test_images_are_shown_upright_by_their_exif_orientation(tmp_path, suffix, value):
    exif = Image.Exif()
    exif[0x0112] = value
    pixels = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8))
    folder = tmp_path / "clip"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(pixels).save(
            folder / f"{number}.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {})
        )
    expected = EXIF[value](pixels)
    info = probe(folder)
    assert (info.frames, (info.height, info.width), info.notes) == (2, expected.shape, ())
    for found in (read_image(str(folder / f"0.{suffix}")), read_frames(info, [1])[0]):
        assert np.abs(found.astype(int) - expected[..., None]).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_broken_exif_block_is_ignored(tmp_path, suffix):
    broken = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12"
    Image.fromarray(numbered(1)[0]).save(tmp_path / f"1.{suffix}", exif=broken)
    assert read_image(str(tmp_path / f"1.{suffix}")).shape == (48, 64, 3)
    assert probe(tmp_path).frames == 1


def test_sixteen_bit_images_and_bmp_are_read_and_transparency_is_noted(tmp_path):
    grey = (np.arange(48 * 64).reshape(48, 64) * 21).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(
        read_image(str(tmp_path / "deep.png")), np.repeat((grey >> 8)[..., None], 3, 2)
    )
    Image.fromarray(numbered(1)[0]).save(tmp_path / "plain.bmp")
    np.testing.assert_array_equal(read_image(str(tmp_path / "plain.bmp")), numbered(1)[0])
    for kind, mode in (("opaque", 255), ("clear", 100)):
        folder = tmp_path / kind
        folder.mkdir()
        Image.new("RGBA", (8, 8), (9, 9, 9, mode)).save(folder / "1.png")
    assert probe(tmp_path / "opaque").notes == ()
    assert probe(tmp_path / "clear").notes == ("alpha: transparency is dropped",)


def test_pixels_that_are_not_square_are_shown_as_players_do(tmp_path):
    for name, aspect, width in (("a.mp4", "16/11", 93), ("b.mp4", "1/2", 32), ("c.mp4", "6/1", 64)):
        path = encode(tmp_path / name, numbered(3), aspect=aspect)
        info = probe(path)
        assert (info.width, info.height) == (width, 48)
        frames = read_frames(info, [0, 2])
        assert frames.shape == (2, 48, width, 3)
        assert [number_of(frame) for frame in frames] == [0, 2]
        assert [note.partition(":")[0] for note in info.notes] == (["aspect"] if name == "c.mp4" else [])


def test_what_a_player_shows_otherwise_is_noted(tmp_path):
    paths = {
        "interlaced.mp4": encode(tmp_path / "interlaced.mp4", numbered(4), flags="+ildct+ilme"),
        "hdr.mp4": encode(tmp_path / "hdr.mp4", numbered(4), pix_fmt="yuv420p10le", transfer=16),
        "alpha.mov": tmp_path / "alpha.mov",
    }
    with av.open(str(tmp_path / "alpha.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=25)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "argb"
        container.mux(
            stream.encode(av.VideoFrame.from_ndarray(np.full((16, 16, 4), 90, np.uint8), format="argb"))
        )
        container.mux(stream.encode())
    for name, path in paths.items():
        info = probe(path)
        assert [note.partition(":")[0] for note in info.notes] == [name.partition(".")[0]], info.notes
        assert info.damage is None


def test_a_change_of_size_ends_the_clip_and_counts_as_damage(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        small = av.CodecContext.create("mjpeg", "w")
        small.height, small.width, small.pix_fmt, small.time_base = 32, 32, "yuvj420p", Fraction(1, 25)
        for index, array in enumerate([*numbered(3), *numbered(3, 32, 32)]):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuvj420p")
            frame.pts, frame.time_base = index, Fraction(1, 25)
            for packet in (stream if index < 3 else small).encode(frame):
                packet.stream = stream
                container.mux(packet)
    info = probe(path)
    assert info.frames == 3
    assert (
        str(info.damage)
        == "size-change: only the first 3 frames are used: frames are 32x32 from there, not 64x48"
    )


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.wmv", "wmv2"), ("a.MTS", "libx264"), ("a.flv", "flv1"), ("a.ogv", "libtheora"), ("a.3gp", "mpeg4")],
)
def test_more_containers_are_read(tmp_path, name, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    path = encode(tmp_path / name, numbered(30), codec, g="10")
    info = probe(path)
    assert (info.frames, info.damage) == (30, None)
    assert [number_of(frame) for frame in read_frames(info, [0, 25])] == [0, 25]
    bare = path.rename(tmp_path / "clip")
    assert is_video_name(str(bare)) == (name != "a.MTS"), "mpegts has no signature"


def tiny_frames_on_a_large_canvas(num_frames: int, side: int) -> bytes:
    """A gif of 1x1 pixels on a canvas of side x side: 25 bytes per frame, side * side pixels to decode."""
    size = side.to_bytes(2, "little")
    head = b"GIF89a" + size + size + b"\x80\x00\x00" + b"\x00\x00\x00\xff\xff\xff"
    control = b"\x21\xf9\x04\x00\x04\x00\x00\x00"
    frame = control + b"\x2c" + bytes(4) + b"\x01\x00\x01\x00\x00" + b"\x02\x02\x44\x01\x00"
    return head + frame * num_frames + b"\x3b"


def test_a_small_file_of_many_large_frames_is_refused_in_bounded_time(tmp_path):
    path = tmp_path / "a.gif"
    path.write_bytes(tiny_frames_on_a_large_canvas(20, 200))
    assert probe(path).frames == 20
    path.write_bytes(tiny_frames_on_a_large_canvas(5000, 4000))
    began = time.process_time()
    with pytest.raises(
        Unreadable, match=r"too-large: its \d+ bytes decode to more than \d+ pixels"
    ) as refusal:
        probe(path)
    print(f"{path.stat().st_size} bytes refused after {time.process_time() - began:.1f} s")
    assert "\n" not in str(refusal.value)
    assert time.process_time() - began < 30


def test_without_frame_times_a_file_is_read_from_its_start_at_the_rate_of_its_header(tmp_path):
    """B frames in avi, as UCF101 has them, come out with time stamps that do not increase."""
    info = probe(encode(tmp_path / "a.avi", numbered(30), bf="2", g="10"))
    assert (info.frames, info.fps, info.stamps) == (30, 25.0, [])
    assert info.times == [i / 25 for i in range(30)]
    frames, decoded = decode_frames(info, [21, 25])
    assert ([number_of(frame) for frame in frames], decoded) == ([21, 25], 26)


def test_endless_files_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "MAX_FRAMES", 7)
    monkeypatch.setattr(framefolder, "MAX_FRAMES", 7)
    info = probe(encode(tmp_path / "a.mp4", numbered(9)))
    assert (info.frames, str(info.damage).split(":")[0]) == (7, "limit")
    folder = probe(save_frames(tmp_path / "clip", range(9)))
    assert (folder.frames, str(folder.damage).split(":")[0]) == (7, "limit")


def test_a_gif_with_a_palette_and_uneven_delays(tmp_path):
    images = [Image.fromarray(frame).quantize(64) for frame in numbered(12)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=[40, 90] * 6)
    info = probe(tmp_path / "a.gif")
    assert info.frames == 12
    np.testing.assert_allclose(np.diff(info.times), [0.04, 0.09] * 5 + [0.04], atol=1e-9)
    assert [number_of(frame) for frame in read_frames(info, [11, 0, 7])] == [11, 0, 7]


def save_frames(folder, numbers, suffix="png", name="frame_{}"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in zip(numbers, numbered(len(numbers)), strict=True):
        Image.fromarray(frame).save(folder / f"{name.format(number)}.{suffix}")
    return folder


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_folder_of_numbered_images_counts_by_number(tmp_path, suffix):
    folder = save_frames(tmp_path / "clip", [1, 2, 3, 9, 10, 11, 100], suffix)
    (folder / "thumb.png").write_bytes(b"no number, no frame")
    info = probe(folder)
    assert (info.frames, info.height, info.width, info.times) == (7, 48, 64, [])
    assert info.notes == (
        "gaps: 93 numbers are missing between 1 and 100; frames are used in order",
        "unused: 1 images have no number in their name and are not used",
    )
    assert info.damage is None
    assert [number_of(frame) for frame in read_frames(info, [0, 3, 4, 6])] == [0, 3, 4, 6]
    assert decode_frames(folder, [4, 4])[1] == 1


def test_a_broken_image_ends_the_clip_and_two_clips_in_one_folder_are_refused(tmp_path):
    folder = save_frames(tmp_path / "clip", range(8))
    whole = (folder / "frame_5.png").read_bytes()
    (folder / "frame_5.png").write_bytes(whole[: len(whole) // 2])
    assert probe(folder).frames == 5
    assert "only the first 5 frames are used: frame_5.png does not decode" in str(probe(folder).damage)
    Image.new("RGB", (10, 10)).save(folder / "frame_3.png")
    assert probe(folder).frames == 3
    assert "frame_3.png is 10x10, not 64x48" in str(probe(folder).damage)
    (folder / "frame_2.png").write_bytes(whole[:-40] + bytes(40))
    assert probe(folder).frames == 2
    (folder / "frame_0.png").write_bytes(b"junk")
    with pytest.raises(Unreadable, match=r"no-frames: .*frame_0.png"):
        probe(folder)
    with pytest.raises(Unreadable, match="damaged"):
        read_frames(folder, [0])
    with pytest.raises(Unreadable, match="frame 9 does not decode"):
        read_frames(folder, [7, 9])
    with pytest.raises(Unreadable, match="differ in size"):
        read_frames(folder, [1, 3])
    save_frames(folder, [7], name="other_{}")
    with pytest.raises(Unreadable, match="have the same number"):
        probe(folder)
    with pytest.raises(Unreadable, match="no-frames"):
        probe(save_frames(tmp_path / "none", []))


def test_a_cut_file_counts_up_to_its_last_good_frame(tmp_path):
    whole = encode(tmp_path / "a.mkv", numbered(60), g="12").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 6 // 10])
    info = probe(tmp_path / "cut.mkv")
    assert 10 < info.frames < 59
    assert str(info.damage).startswith("damaged: ")
    assert "60" in str(info.damage) or "only the first" in str(info.damage)
    assert number_of(read_frames(info, [info.frames - 1])[0]) == (info.frames - 1) % 38


def test_disguises_devices_and_giants_are_refused(tmp_path, monkeypatch):
    good = encode(tmp_path / "good.mp4", numbered(5))
    disguises = {
        "text.mp4": (b"hello " * 200, "not-a-video"),
        "concat.mp4": (b"ffconcat version 1.0\nfile good.mp4\n", "not-a-video"),
        "playlist.mp4": (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n",
            "not-a-video",
        ),
        "vector.mp4": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>', "not-a-video"),
        "empty.mp4": (b"", "empty"),
    }
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    disguises["png.mp4"] = ((tmp_path / "picture.png").read_bytes(), "not-a-video")
    for name, (data, code) in disguises.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Unreadable) as refusal:
            probe(tmp_path / name)
        assert refusal.value.reason.startswith(code), refusal.value.reason
        assert name in str(refusal.value)
    for name, code in {
        "nothing.mp4": "missing",
        "subfile,,start,0,end,0,,:good.mp4": "missing",
        "nul\0.mp4": "missing",
    }.items():
        with pytest.raises(Unreadable, match=code):
            probe(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(Unreadable, match="not-a-file"):
        probe(tmp_path / "pipe.mp4")
    monkeypatch.setattr("latte.data.video_stream.MAX_PIXELS", 48 * 64 - 1)
    monkeypatch.setitem(video_stream.LIMIT, "max_pixels", str(48 * 64 - 1))
    monkeypatch.setitem(video_stream.OPENING, "max_pixels", str(48 * 64 - 1))
    monkeypatch.setattr(framefolder, "MAX_PIXELS", 48 * 64 - 1)
    for giant in (good, encode(tmp_path / "bomb.avi", numbered(2), "png", "rgb24")):
        with pytest.raises(Unreadable, match=r"too-large|not-a-video|damaged"):
            probe(giant)
    with pytest.raises(Unreadable, match="no-frames"):
        probe(save_frames(tmp_path / "giants", [1, 2]))


@pytest.mark.parametrize(
    "name",
    ["with space.mp4", "ü#1%20.MP4", "line\nbreak.mp4", "-dash.mp4", os.fsdecode(b"not-utf8-\xff.mp4")],
)
def test_names_of_any_kind(tmp_path, name):
    source = encode(tmp_path / "source.mp4", numbered(3))
    try:
        source.rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system does not take the name")
    assert probe(tmp_path / name).frames == 3


def mutants(data: bytes, count: int, seed: int):
    """``count`` copies of a file: cut short, or with 1, 4 or 40 bytes changed."""
    draw = random.Random(seed)
    for index in range(count):
        copy = bytearray(data)
        if index % 4 == 0:
            del copy[draw.randrange(len(copy)) :]
        for _ in range((0, 1, 4, 40)[index % 4]):
            copy[draw.randrange(len(copy))] = draw.randrange(256)
        yield bytes(copy)


def test_mutated_files_are_read_or_refused_but_never_crash_or_hang(tmp_path):
    whole = part = refused = failed_later = 0
    slowest, open_before = 0.0, None
    for name in ("a.mp4", "a.avi", "a.webm"):
        codec, options = KINDS[name]
        data = encode(tmp_path / name, numbered(30), codec, **options).read_bytes()
        for index, mutant in enumerate(mutants(data, 40, seed=len(name))):
            path = tmp_path / f"{index}-{name}"
            path.write_bytes(mutant)
            began = time.perf_counter()
            try:
                info = probe(path)
                asked = sorted({0, info.frames // 2, info.frames - 1})
                frames = read_frames(info, asked)
                assert frames.shape == (len(asked), info.height, info.width, 3)
                whole, part = whole + (info.frames == 30), part + (info.frames < 30)
            except Unreadable as refusal:
                refused += 1
                failed_later += "does not decode" in refusal.reason
            slowest = max(slowest, time.perf_counter() - began)
            path.unlink()
            if sys.platform == "linux":
                open_before = open_before or len(os.listdir("/proc/self/fd"))
    print(
        f"whole {whole}, in part {part}, refused {refused} (of these at reading {failed_later}), "
        f"slowest {slowest:.2f} s"
    )
    assert whole + part + refused == 120
    assert min(whole, part, refused) >= 10
    assert failed_later == 0, "what a probe promises can be read"
    assert slowest < 5
    if open_before:
        assert len(os.listdir("/proc/self/fd")) <= open_before, "file descriptors leak"


ASPECTS = {"Name with spaces \u00e9 #1.MP4": 128 / 117, "qcif_carphone.mp4": 128 / 117}  # of pixels
NOTES = {
    "hevc_10bit_hdr.mp4": {"hdr"},
    "two_video_two_audio_streams.mp4": {"streams"},
    "ucf101_xvid_audio.avi": {"no-timing"},
}


def test_every_odd_file_is_read_as_its_manifest_says_or_refused():
    folder = shared("data", "odd")
    read = refused = 0
    for entry in json.loads((folder / "manifest.json").read_text()):
        path = folder / entry["file"]
        if "open_error" in entry:
            with pytest.raises(Unreadable, match=r"not-a-video|empty|no-video-stream"):
                probe(path)
            refused += 1
            continue
        info = probe(path)
        assert info.frames == entry["decoded_frames"], entry["file"]
        turned = entry["rotation"] % 180 != 0
        width = round(entry["width"] * ASPECTS.get(entry["file"], 1))
        assert (info.width, info.height) == (width, entry["height"])[:: -1 if turned else 1]
        first = read_frames(info, [0])[0].reshape(-1, 3).mean(0)
        np.testing.assert_allclose(first, entry["first_frame_mean_rgb"], atol=0.11, err_msg=entry["file"])
        if info.frames * info.height * info.width < 1.5e7:
            everything = read_frames(path, range(info.frames))
            for index in (info.frames // 2, info.frames - 1):
                np.testing.assert_array_equal(
                    read_frames(info, [index])[0], everything[index], err_msg=entry["file"]
                )
        assert bool(info.damage) == bool(
            "decode_error" in entry or entry["file"] in ("truncated.mkv", "header_says_30_decodes_25.mp4")
        )
        codes = {note.partition(":")[0] for note in info.notes} - {"damaged"}
        assert codes == NOTES.get(entry["file"], set()), entry["file"]
        read += 1
    print(f"{read} files read, {refused} refused")
    assert (read, refused) == (27, 3)
