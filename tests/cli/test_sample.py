# SPDX-License-Identifier: Apache-2.0
"""``latte sample``: files, keys, labels, and the refusals of the command line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def test_pictures_that_are_given_reach_the_clips(latte, run_folder, tmp_path):
    Image.new("RGB", (40, 30), (200, 60, 20)).save("start.png")
    write_mp4(Path("end.mp4"), np.stack([np.full((16, 16, 3), level, np.uint8) for level in (250, 20)]))
    found = latte("sample", run_folder, "--first", "start.png", "--last", "end.mp4", "--count", 1, "--json")
    assert found.code == 0, found.err
    clip = read_frames(found.json["clips"][0]["path"], [0, 2]).astype(int)
    assert abs(clip[0] - (200, 60, 20)).mean() < 12
    assert abs(clip[1] - 20).mean() < 12, "the last frame of the video"
    other = latte("sample", run_folder, "--first", "start.png", "--count", 1, "--json")
    assert other.json["sheet"] != found.json["sheet"], "another picture is another album"


def test_longer_clips_in_windows(latte, run_folder):
    found = latte("sample", run_folder, "--frames", 7, "--window", 3, "--count", 1, "--json")
    assert found.code == 0, found.err
    assert probe(found.json["clips"][0]["path"]).frames == 7


@pytest.mark.parametrize(
    ("words", "told"),
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
def test_wrong_options_are_told_in_one_line(latte, run_folder, words, told):
    found = latte("sample", run_folder, *words)
    assert found.code == 2, found.err
    assert len(found.errors) == 1
    assert told in found.errors[0]


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
    assert Path(other.json["sheet"]).parent != paths[0].parent, "another negative is another album"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "reads text, but no prompt was given"),
        (["--labels", "up"], "reads text, but no prompt was given"),
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
def test_wrong_prompts_are_told_in_one_line(latte, text_run_folder, tmp_path, words, told):
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    found = latte("sample", text_run_folder, *words)
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert told in found.errors[0]


def test_given_pictures_windows_and_more_frames_go_with_prompts(latte, text_run_folder, tmp_path):
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
    assert len({one.json["sheet"] for one in found}) == 4, "other settings, other albums"
    for frame in (0, -1):
        assert np.abs(clips[1][frame].reshape(-1, 3).mean(0) - (200, 30, 30)).max() < 12, (
            "what was given is there"
        )
    assert np.abs(clips[0][0].reshape(-1, 3).mean(0) - (200, 30, 30)).max() > 12


@pytest.mark.parametrize(
    "words", [["--prompt", "red"], ["--negative", "red"], ["--text-encoder", "t5"], ["--text-bits", 8]]
)
def test_a_prompt_for_a_model_that_reads_none_is_refused(latte, run_folder, words):
    found = latte("sample", run_folder, *words)
    assert (found.code, len(found.errors)) == (2, 1)
    assert "reads no text" in found.errors[0]


def test_a_damaged_checkpoint_is_told_or_passed_over(latte, run_folder, tmp_path):
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
