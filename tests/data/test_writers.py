# SPDX-License-Identifier: Apache-2.0
"""Written clips: equal frames give equal bytes in every process, files carry their colours, and nothing
partial stays behind.
"""

import os
import random
import resource
import socket
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from latte.checks import InputError, RunError
from latte.data.media import probe, read_frames
from latte.data.writers import contact_sheet, write_gif, write_mp4
from videos import LEVEL, numbered

WRITE = """
import ctypes, sys
from pathlib import Path
import numpy as np
from latte.cli.main import main
from latte.data.writers import write_gif, write_mp4

malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
print(ctypes.string_at(malloc(4000), 3000)[1000:1004].hex())
out, draw = Path(sys.argv[1]), np.random.default_rng(0)
sizes = [(16, 64, 64), (16, 48, 48), (9, 33, 47), (5, 200, 120), (1, 16, 16), (16, 64, 64)]
for number, (t, height, width) in enumerate(sizes):
    blocks = np.kron(draw.integers(0, 255, (25, 15, 3)), np.ones((8, 8, 1)))[:height, :width]
    frames = np.stack([np.roll(blocks, i, 1) for i in range(t)]).astype(np.uint8)
    write_mp4(out / f"{number}.mp4", frames)
    write_gif(out / f"{number}.gif", frames)
sys.argv = ["latte", "data", "synth", str(out / "synth"), "--count", "6", "--size", "64"]
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's MALLOC_PERTURB_")
def test_equal_frames_give_equal_bytes_whatever_is_in_unwritten_memory(tmp_path):
    contents, memory = [], set()
    for value in ("255", "85"):
        out = tmp_path / value
        environment = os.environ | {"MALLOC_PERTURB_": value}
        done = subprocess.run(
            [sys.executable, "-c", WRITE, out], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        memory.add(done.stdout.split()[0])
        files = sorted(path for path in out.rglob("*") if path.suffix in (".mp4", ".gif"))
        contents.append({path.relative_to(out).as_posix(): path.read_bytes() for path in files})
    assert memory == {"00000000", "aaaaaaaa"}, "unwritten memory differed between the processes"
    different = [name for name in contents[0] if contents[0][name] != contents[1].get(name)]
    print(f"{len(contents[0])} files written twice, {len(different)} differ")
    assert (len(contents[0]), different) == (6 + 6 + 6, [])


def test_mp4_files_are_tagged_with_the_colours_they_hold(tmp_path):
    frames = np.empty((3, 32, 32, 3), np.uint8)
    frames[:] = (200, 60, 120)
    write_mp4(tmp_path / "a.mp4", frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        tags = (frame.color_primaries, frame.color_trc, frame.colorspace, frame.color_range)
    assert tags == (1, 1, 1, 1), "BT.709 primaries, transfer and matrix, limited range (ITU-T H.273)"
    as_tagged = frame.reformat(format="rgb24", src_colorspace="ITU709").to_ndarray()
    otherwise = frame.reformat(format="rgb24", src_colorspace="ITU601").to_ndarray()
    assert np.abs(as_tagged.astype(int) - frames[0]).max() <= 3
    assert np.abs(otherwise.astype(int) - frames[0]).max() > 8, "the tag decides"
    np.testing.assert_allclose(read_frames(tmp_path / "a.mp4", [1])[0], frames[1], atol=3)


def test_partial_files_of_dead_processes_are_removed_and_those_of_running_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    gone = [
        f".a.{host}-{dead.pid}.partial.mp4",
        f".other.b.{host}-{dead.pid}.partial.gif",
        f".c.{dead.pid}.partial.mp4",
    ]
    kept = [
        f".a.{host}-{os.getppid()}.partial.mp4",
        f".a.elsewhere-{dead.pid}.partial.mp4",
        f".d.{dead.pid}.partial.mp4",
    ]
    kept += [".holiday.partial.mp4", ".x.12.partial.jpg"]
    for name in gone + kept:
        (tmp_path / name).write_bytes(b"x")
    long_ago = time.time() - 2 * 24 * 3600
    for name in (gone[2], *kept[3:]):  # a name of 0.1.0, which does not say on which host, goes after a day
        os.utime(tmp_path / name, (long_ago, long_ago))
    write_mp4(tmp_path / "a.mp4", numbered(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "a.mp4"])


def test_a_killed_writer_leaves_nothing_for_ever(tmp_path):
    script = (
        "import sys; from latte.data.writers import complete_file\n"
        "with complete_file(sys.argv[1]) as name:\n"
        "    open(name, 'wb').write(b'half'); print('written', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.mp4")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.kill()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert ".partial" in left[0]
    write_gif(tmp_path / "b.gif", numbered(2))
    assert [path.name for path in tmp_path.iterdir()] == ["b.gif"]


def test_mp4_is_padded_to_even_sizes_deterministic_and_close_to_the_frames(tmp_path):
    frames = numbered(9, 33, 47)
    write_mp4(tmp_path / "deep" / "one.mp4", frames, fps=7.5)
    write_mp4(tmp_path / "two.mp4", frames, fps=7.5)
    assert (tmp_path / "deep" / "one.mp4").read_bytes() == (tmp_path / "two.mp4").read_bytes()
    info = probe(tmp_path / "two.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (9, 34, 48, 7.5)
    assert np.abs(read_frames(info, range(9))[:, :33, :47].astype(int) - frames).mean() < 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "two.mp4"]


def test_gif_keeps_frames_and_colours(tmp_path):
    frames = numbered(10)
    write_gif(tmp_path / "a.gif", frames, fps=10)
    info = probe(tmp_path / "a.gif")
    assert (info.frames, info.fps) == (10, 10.0)
    assert np.abs(read_frames(info, range(10)).astype(int) - frames).max() <= LEVEL


def test_writers_refuse_other_arrays_and_say_why_a_file_cannot_be_written(tmp_path):
    for wrong in (
        np.zeros((3, 8, 8, 3), np.float32),
        np.zeros((3, 3, 8, 8), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ):
        for write in (write_mp4, write_gif):
            with pytest.raises(InputError, match="uint8"):
                write(tmp_path / "a.mp4", wrong)
    (tmp_path / "file").write_text("a file, not a folder")
    for write, name in ((write_mp4, "a.mp4"), (write_gif, "a.gif")):
        with pytest.raises(RunError, match="cannot be written"):
            write(tmp_path / "file" / name, numbered(2))
    before = sorted(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    grain = np.frombuffer(random.Random(0).randbytes(8 * 64 * 64 * 3), np.uint8).reshape(8, 64, 64, 3)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as on a full disk
        for write, name in ((write_mp4, "b.mp4"), (write_gif, "b.gif")):
            with pytest.raises(RunError, match="cannot be written"):
                write(tmp_path / name, grain)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before, "nothing half written stays behind"


def test_contact_sheet_has_a_row_per_clip_and_a_column_per_frame():
    clips = [numbered(5, 32, 32), numbered(3, 32, 32)]
    sheet = np.asarray(contact_sheet(clips, captions=["up", "down"]))
    assert sheet.shape == (2 * (96 + 2 + 18) + 2, 5 * (96 + 2) + 2, 3)
    for row in range(2):
        for column in range(5):
            top, left = 2 + row * 116 + 18, 2 + column * 98
            cell = sheet[top : top + 96, left : left + 96]
            expected = clips[row][column].repeat(3, 0).repeat(3, 1) if column < len(clips[row]) else 255
            assert (cell == expected).all()
    assert contact_sheet(np.zeros((1, 2, 128, 160, 3), np.uint8)).size == (2 * 162 + 2, 128 + 4)
    with pytest.raises(InputError, match="at least one clip, got none"):
        contact_sheet([])
    with pytest.raises(InputError, match="captions"):
        contact_sheet(clips, captions=["up"])


def test_contact_sheet_of_clips_of_several_sizes_shows_each_whole_at_one_scale():
    clips = [numbered(5, 32, 48), numbered(2, 64, 32), numbered(1, 32, 32)]
    sheet = np.asarray(contact_sheet(clips, captions=["wide", "tall", "an image"]))
    assert sheet.shape == ((96 + 192 + 96) + 3 * (2 + 18) + 2, 5 * (144 + 2) + 2, 3)
    top = 2
    for clip in clips:
        height, width = (3 * side for side in clip.shape[1:3])
        for column, frame in enumerate(clip):
            left = 2 + column * (width + 2)
            cell = sheet[top + 18 : top + 18 + height, left : left + width]
            assert (cell == frame.repeat(3, 0).repeat(3, 1)).all()
        blank = sheet[top + 18 : top + 18 + height, 2 + len(clip) * (width + 2) :]
        assert (blank == 255).all()
        top += height + 2 + 18
