# SPDX-License-Identifier: Apache-2.0
"""``latte sample``: files, keys, labels, and the refusals of the command line."""

import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latte.checkpoint.run import fingerprint, manifest_text
from latte.cli.sample import read_size, read_steps
from latte.data.media import probe, read_frames
from latte.data.writers import write_mp4


def test_sample_writes_an_mp4_each_a_gif_and_a_sheet(latte, run_folder):
    found = latte("sample", run_folder, "--count", 3, "--seed", 5, "--json")
    assert found.code == 0
    assert [(clip["seed"], clip["label"]) for clip in found.json["clips"]] == [
        (5, "up"),
        (6, "down"),
        (7, "left"),
    ]
    for clip in found.json["clips"]:
        info = probe(clip["path"])
        assert (info.frames, info.height, info.width, info.fps) == (3, 16, 16, 8)
    assert Path(found.json["sheet"]).suffix == ".png"
    assert all(Path(found.json[key]).is_file() for key in ("sheet", "gif"))


def test_options_reach_the_clips(latte, run_folder):
    words = [
        "--labels",
        "left,3",
        "--count",
        2,
        "--frames",
        2,
        "--size",
        "8x12",
        "--steps",
        "ddim2",
        "--sampler",
        "ddim",
        "--eta",
        0.5,
    ]
    found = latte(
        "sample",
        run_folder,
        *words,
        "--guidance",
        2,
        "--batch",
        1,
        "--fps",
        4,
        "--out",
        "here",
        "--dtype",
        "fp32",
        "--json",
    )
    assert found.code == 0, found.err
    assert [(clip["label"], clip["class"]) for clip in found.json["clips"]] == [("left", 2), ("right", 3)]
    info = probe(found.json["clips"][0]["path"])
    assert (info.frames, info.height, info.width, info.fps) == (2, 8, 12, 4)
    assert Path(found.json["sheet"]) == Path("here/sheet.png")


def test_solver_settings_reach_the_clips_and_their_record(latte, run_folder, tmp_path):
    words = ["--sampler", "unipc", "--steps", 8, "--guidance", 2, "--count", 1, "--json"]
    more = ["--order", 3, "--guidance-interval", "0.3,5", "--cache", 0.3]
    plain, chosen = (
        latte("sample", run_folder, *words, *extra, "--out", tmp_path / name)
        for name, extra in (("plain", []), ("chosen", more))
    )
    assert (plain.code, chosen.code) == (0, 0)
    assert "step cache: " in chosen.err
    facts = [
        json.loads((tmp_path / name / "clips.json").read_text())["facts"] for name in ("plain", "chosen")
    ]
    assert {key: facts[1][key] for key in facts[1].keys() - facts[0].keys()} == {
        "order": 3,
        "guidance_interval": [0.3, 5.0],
        "cache": 0.3,
    }
    clips = [read_frames(probe(found.json["clips"][0]["path"]), range(3)) for found in (plain, chosen)]
    assert not np.array_equal(*clips)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guidance-interval", "5"], "--guidance-interval '5' must be two noise levels LOW,HIGH"),
        (["--guidance-interval", "5,0.3", "--guidance", 2], "guidance_interval is [5.0, 0.3]"),
        (["--guidance-interval", "0.3,5", "--guidance", 1], "but guidance is 1, which is no guidance"),
        (["--guidance-interval", "900,901", "--guidance", 2], "so nothing would be guided; widen it"),
        (["--cache", 7], "cache is 7.0, but must be above 0 and at most 1"),
        (["--cache", 0.1, "--steps", 1], "cache needs at least 4 steps"),
        (
            ["--quality", "fast", "--steps", 9],
            "--quality fast (quality=) is unipc with 10 steps, but --steps 9",
        ),
        (
            ["--quality", "paper", "--sampler", "ddim"],
            "but --sampler ddim was given too; leave one of the two",
        ),
        (["--quality", "good"], "fast, high, paper"),
        (["--order", 4, "--sampler", "dpmpp"], "order is 4, but sampler dpmpp has the orders 1, 2, 3"),
    ],
)
def test_wrong_solver_settings_are_one_line(latte, run_folder, tmp_path, words, message):
    found = latte("sample", run_folder, "--count", 1, *words, "--out", tmp_path / "out")
    assert found.code == 2
    assert message in found.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_same_command_keeps_what_is_there_and_other_settings_get_another_folder(latte, run_folder):
    first = latte("sample", run_folder, "--json").json
    stamps = {clip["path"]: Path(clip["path"]).stat().st_mtime_ns for clip in first["clips"]}
    assert len(stamps) == 4
    assert latte("sample", run_folder, "--json").json == first
    assert stamps == {path: Path(path).stat().st_mtime_ns for path in stamps}
    assert (
        Path(latte("sample", run_folder, "--steps", 2, "--json").json["sheet"]).parent
        != Path(first["sheet"]).parent
    )
    refused = latte("sample", run_folder, "--steps", 2, "--out", Path(first["sheet"]).parent)
    assert refused.code == 2
    assert "steps (3 there, 2 now)" in refused.errors[0]


def test_first_and_last_frames_reach_the_clips(latte, run_folder, tmp_path):
    Image.new("RGB", (40, 30), (200, 60, 20)).save("start.png")
    write_mp4(Path("end.mp4"), np.stack([np.full((16, 16, 3), level, np.uint8) for level in (250, 20)]))
    found = latte("sample", run_folder, "--first", "start.png", "--last", "end.mp4", "--count", 1, "--json")
    assert found.code == 0, found.err
    clip = read_frames(found.json["clips"][0]["path"], [0, 2]).astype(int)
    assert abs(clip[0] - (200, 60, 20)).mean() < 12
    assert abs(clip[1] - 20).mean() < 12, "the last frame of the video"
    other = latte("sample", run_folder, "--first", "start.png", "--count", 1, "--json")
    assert other.json["sheet"] != found.json["sheet"], "another image is another folder"


def test_longer_clips_in_windows(latte, run_folder):
    found = latte("sample", run_folder, "--frames", 7, "--window", 3, "--count", 1, "--json")
    assert found.code == 0, found.err
    assert probe(found.json["clips"][0]["path"]).frames == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "sidewise"], "up, down, left, right"),
        (["--labels", "up,4"], "0 to 3"),
        (["--labels", ","], "names no class"),
        (["--count", 0], "--count must be at least 1, got 0"),
        (["--seed", -1], "--seed must be in [0, 2^63), got -1"),
        (["--size", "big"], "HEIGHTxWIDTH"),
        (["--size", "10"], "nearest multiple"),
        (["--steps", "0"], "sample.steps"),
        (["--steps", "lots"], "lots"),
        (["--sampler", "ddmp"], "did you mean 'ddpm'"),
        (["--guidance", -1], "sample.guidance"),
        (["--batch", 0], "sample.batch"),
        (["--frames", 0], "frames"),
        (["--window", 0], "window"),
        (["--window", 2, "--longer", "chain"], "did you mean 'chained'"),
        (["--overlap", 2], "needs --window"),
        (["--longer", "chained"], "needs --window"),
        (["--window", 2, "--frames", 5, "--overlap", 2], "overlap"),
        (["--first", "none.png"], "missing"),
        (["--last", "none.mp4"], "none.mp4"),
        (["--dtype", "fp99"], "dtype"),
        (["--device", "abacus"], "device"),
    ],
)
def test_wrong_options_are_one_line(latte, run_folder, words, message):
    found = latte("sample", run_folder, *words)
    assert found.code == 2, found.err
    assert len(found.errors) == 1
    assert message in found.errors[0]


def test_prompts_from_the_command_line_and_a_file(latte, text_run_folder, tmp_path):
    (tmp_path / "more.txt").write_text("\ufeffa green circle moves up\n\n  a blue square moves down \n")
    words = [
        "--prompt",
        "a red square moves left",
        "--prompts",
        "more.txt",
        "--count",
        2,
        "--seed",
        7,
        "--negative",
        "noise",
        "--json",
    ]
    found = latte("sample", text_run_folder, *words)
    assert found.code == 0, found.err
    prompts = ["a red square moves left", "a green circle moves up", "a blue square moves down"]
    assert [(clip["seed"], clip["prompt"]) for clip in found.json["clips"]] == [
        (7 + i, prompts[i // 2]) for i in range(6)
    ]
    paths = [Path(clip["path"]) for clip in found.json["clips"]]
    assert paths[2].name.startswith("seed-0009-a-green-circle-moves-up-"), (
        "without the mark that some editors put first"
    )
    record = json.loads((paths[0].parent / "clips.json").read_text())
    assert record["prompts"] == {path.name: prompts[i // 2] for i, path in enumerate(paths)}
    assert (record["facts"]["negative"], len(record["facts"]["text_encoder"])) == ("noise", 16)
    assert latte("sample", text_run_folder, *words).json == found.json
    other = latte("sample", text_run_folder, "--prompt", "a red square moves left", "--seed", 7, "--json")
    assert Path(other.json["sheet"]).parent != paths[0].parent, "another negative prompt is another folder"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reads text, but no prompt was given"),
        (["--labels", "up"], "--labels up is for class models"),
        (["--prompt", "red", "--labels", "up"], "--labels up is for class models"),
        (["--prompt", "word " * 9], "has 10 tokens, but text.length is 8"),
        (["--prompt", "red", "--negative", "word " * 9], "has 10 tokens"),
        (["--prompt", "  "], "is blank"),
        (
            ["--prompt", "red", "--text-bits", 8],
            "text.bits is 8, but the text encoder 'builtin' does not read it",
        ),
        (["--prompt", "red", "--offload"], "leave --offload out"),
        (["--prompt", "red", "--decoder", "nowhere"], "nowhere"),
        (["--prompt", "red", "--lora", "nowhere"], "nowhere"),
        (["--prompts", "none.txt"], "cannot be read"),
        (["--prompts", "empty.txt"], "holds no prompt"),
        (["--prompts", "bytes.txt"], "cannot be read"),
        (["--prompt", "red", "--count", 0], "--count must be at least 1, got 0"),
        (["--prompt", "red", "--seed", -3], "--seed must be in [0, 2^63), got -3"),
    ],
)
def test_wrong_prompts_are_one_line(latte, text_run_folder, tmp_path, words, message):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    found = latte("sample", text_run_folder, *words)
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert message in found.errors[0]


def test_first_frames_windows_and_more_frames_work_with_prompts(latte, text_run_folder, tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 30)).save(tmp_path / "red.png")
    words = ["sample", text_run_folder, "--prompt", "a red square moves left", "--json"]
    found = [
        latte(*words, *more)
        for more in (
            [],
            ["--first", "red.png", "--last", "red.png"],
            ["--frames", 6, "--window", 3],
            ["--frames", 6, "--window", 3, "--longer", "chained", "--overlap", 1],
        )
    ]
    assert [one.code for one in found] == [0, 0, 0, 0], [one.err for one in found]
    clips = [read_frames(info := probe(one.json["clips"][0]["path"]), range(info.frames)) for one in found]
    assert [len(clip) for clip in clips] == [3, 3, 6, 6]
    assert np.abs(clips[2].astype(int) - clips[3]).max() > 8
    assert len({one.json["sheet"] for one in found}) == 4, "other settings, other folders"
    for frame in (0, -1):
        assert np.abs(clips[1][frame].reshape(-1, 3).mean(0) - (200, 30, 30)).max() < 12, (
            "the given colour is there"
        )
    assert np.abs(clips[0][0].reshape(-1, 3).mean(0) - (200, 30, 30)).max() > 12


@pytest.mark.parametrize(
    "words", [["--prompt", "red"], ["--negative", "red"], ["--text-encoder", "t5"], ["--text-bits", 8]]
)
def test_a_prompt_for_a_model_that_reads_none_is_refused(latte, run_folder, words):
    found = latte("sample", run_folder, *words)
    assert (found.code, len(found.errors)) == (2, 1)
    assert "reads no text" in found.errors[0]


def test_a_damaged_checkpoint_is_an_error_or_skipped(latte, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    file = tmp_path / "run/checkpoints/step-2/ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = latte("sample", tmp_path / "run")
    assert found.code == 2
    assert "damaged" in found.errors[0]


def test_a_codec_that_is_not_the_runs_is_refused(latte, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    text = (
        config.read_text()
        .replace("name: pixels", "name: builtin")
        .replace("resolution: 16", "resolution: 128")
    )
    config.write_text(text.replace("latent_channels: 3", "latent_channels: 4"))
    found = latte("sample", tmp_path / "run")
    assert found.code == 2
    assert "latent_channels is 4" in found.err


@pytest.mark.parametrize(("text", "size"), [("64", (64, 64)), ("64x96", (64, 96)), (None, None)])
def test_sizes(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize(
    ("text", "steps"), [("50", 50), ("ddim50", "ddim50"), (None, None), ("10,5", "10,5")]
)
def test_steps(text, steps):
    assert read_steps(text) == steps


@pytest.mark.parametrize("place", ["", "file", "fifo", "file/below", "a" * 300])
def test_an_output_that_cannot_be_a_folder_is_refused_before_the_model_is_read(
    latte, tmp_path, monkeypatch, place
):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setattr("latte.inference.pipeline.open_source", lambda *_: pytest.fail("the model was read"))
    before = sorted(path.name for path in tmp_path.iterdir())
    found = latte("sample", "builtin-shapes", "--out", place)
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert "--out" in found.errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", 10**9], "at most 100,000"),
        (["--frames", 10**7, "--batch", 4], "GiB for its pixels alone"),
        (["--size", "80000x80000"], "GiB for its pixels alone"),
        (["--steps", "ddim99999999999999999999"], "steps"),
        (["--steps", 10**8], "1000"),
        (["--guidance", "1e30"], "sample.guidance"),
        (["--guidance", "nan"], "sample.guidance"),
        (["--seed", 2**64], "--seed must be in"),
    ],
)
def test_absurd_numbers_are_refused_at_once_and_leave_nothing(latte, run_folder, tmp_path, words, message):
    began = time.monotonic()
    found = latte("sample", run_folder, *words, "--out", "clips")
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert message in found.errors[0]
    assert not (tmp_path / "clips").exists()
    assert time.monotonic() - began < 20


def test_more_clips_than_the_disk_holds_are_refused_before_the_first(
    latte, run_folder, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    found = latte("sample", run_folder, "--count", 1000, "--out", "clips")
    assert (found.code, len(found.errors)) == (1, 1), found.err
    assert "only 10,000 are free" in found.errors[0]
    assert not (tmp_path / "clips").exists()
    assert latte("sample", run_folder, "--count", 1, "--out", "clips").code == 0


@pytest.mark.parametrize("fault", ["weights", "latent"])
def test_samples_that_are_not_finite_are_an_error_and_no_file(
    latte, run_folder, tmp_path, monkeypatch, fault
):
    """NaN in the EMA weights alone, with a manifest that fits them; and in what the sampler returns."""
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    if fault == "weights":
        folder = run / "checkpoints" / "step-2"
        tensors = load_file(folder / "ema.safetensors")
        next(iter(tensors.values())).flatten()[0] = float("nan")
        save_file(tensors, folder / "ema.safetensors")
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["ema.safetensors"] = fingerprint(folder / "ema.safetensors")
        (folder / "manifest.json").write_text(manifest_text(manifest["files"]))
    else:
        monkeypatch.setattr(
            "latte.inference.generate.sample", lambda *arguments: torch.full((2, *arguments[4]), float("nan"))
        )
    found = latte("sample", run, "--count", 2, "--out", "clips")
    assert found.code in (1, 2), found.err
    assert len(found.errors) == 1
    assert re.search("NaN|non-finite", found.err), found.err
    assert not (tmp_path / "clips").exists()


def test_a_first_frame_is_turned_as_its_exif_orientation_says(latte, run_folder):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255  # white above black
    image = Image.fromarray(np.rot90(upright).copy())  # stored turned; orientation 6 turns it back
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save("turned.png", exif=exif)
    Image.fromarray(upright).save("upright.png")
    clips = []
    for name in ("turned.png", "upright.png"):
        found = latte("sample", run_folder, "--first", name, "--count", 1, "--out", name[:-4], "--json")
        assert found.code == 0, found.err
        clips.append(read_frames(found.json["clips"][0]["path"], [0])[0].astype(int))
    assert np.abs(clips[0] - clips[1]).max() <= 2
    assert clips[1][:4].mean() > 200 > 50 > clips[1][-4:].mean(), (
        "the two halves differ, so a turn would show"
    )


def test_a_prompt_that_is_not_utf8_is_refused_and_odd_ones_are_not(latte, text_run_folder):
    found = latte("sample", text_run_folder, "--prompt", "caf\udce9")
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert "is not valid UTF-8" in found.errors[0]
    odd = ["\u0440\u044b\u0431\u0430 \u9c7c", "\x1b[31mred\n\tblue", "\U0001f420 \u202e"]
    words = [word for prompt in odd for word in ("--prompt", prompt)]
    found = latte("sample", text_run_folder, *words)
    assert found.code == 0, found.err
    assert "\x1b" not in found.out + found.err
    found = latte("sample", text_run_folder, *words, "--json")
    assert [clip["prompt"] for clip in found.json["clips"]] == odd


def test_a_killed_writers_partial_file_is_removed_and_other_files_are_not(latte, run_folder, tmp_path):
    words = ["sample", run_folder, "--count", 1, "--out", "clips"]
    assert latte(*words).code == 0
    folder = tmp_path / "clips"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    partial = [f".seed-0000-0-up.{host}-{process}.partial.mp4" for process in (dead.pid, os.getpid())]
    old = ".seed-0000-0-up.1.partial.mp4"  # as 0.1.0 called it
    for name in (*partial, old, ".holiday.mp4"):
        (folder / name).write_bytes(b"cut")
    os.utime(folder / old, (0, 0))
    assert latte(*words).code == 0
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left == {partial[1], ".holiday.mp4"}


def test_a_run_without_a_checkpoint_gets_a_command_that_can_be_pasted(latte, tmp_path):
    folder = tmp_path / "my run; ls"
    folder.mkdir()
    (folder / "config.yaml").write_text("version: 1\n")
    found = latte("sample", folder)
    assert found.code == 2
    command = found.errors[0].split("train it first: ")[1]
    assert shlex.split(command) == ["latte", "train", str(folder)]


def test_a_folder_of_0_1_0_with_its_record_is_continued(latte, run_folder, tmp_path):
    words = ["sample", run_folder, "--count", 2, "--out", "clips", "--json"]
    first = latte(*words).json
    (tmp_path / "clips/clips.json").rename(tmp_path / "clips/album.json")
    stamps = {clip["path"]: Path(clip["path"]).stat().st_mtime_ns for clip in first["clips"]}
    assert latte(*words).json == first
    assert stamps == {path: Path(path).stat().st_mtime_ns for path in stamps}
    assert latte(*words[:-1], "--steps", 2).code == 2, "its settings are read"
