# SPDX-License-Identifier: Apache-2.0
"""``VideoPipeline`` as diffusers' users call it: arguments, output types, seeds, images, device and dtype."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import wake

import latte
from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checks import InputError, RunError
from latte.data.media import probe, read_frames
from latte.diffusion.config import DiffusionConfig
from latte.inference.generate import SampleConfig
from latte.model.latte import Latte
from latte.runtime import resolve_device
from tiny import CLASSES, MODEL, tiny_text, tiny_trained


@pytest.fixture(scope="module")
def pipe():
    return tiny_trained()


def frames(pipe, *arguments, **options):
    """uint8 frames (b t h w c) of a call."""
    return pipe(*arguments, output_type="uint8", **options).frames


def test_a_call_gives_the_frames_of_generate(pipe):
    config = SampleConfig(sampler="dpmpp", steps=2, guidance=2.0, batch=2)
    expected = [clip for _, clip in pipe.generate([7, 8, 9], ["up", "left", -1], config=config, size=(8, 12))]
    found = pipe(
        class_labels=["up", "left", "none"],
        height=8,
        width=12,
        num_inference_steps=2,
        guidance_scale=2.0,
        sampler="dpmpp",
        batch_size=2,
        seed=7,
        output_type="uint8",
    )
    assert found.seeds == [7, 8, 9]
    assert found.frames.shape == (3, 3, 8, 12, 3)
    assert (found.frames == np.stack(expected)).all()


def test_output_types_hold_the_same_pixels(pipe):
    exact = frames(pipe, class_labels="up", seed=3)
    array = pipe(class_labels="up", seed=3).frames
    tensor = pipe(class_labels="up", seed=3, output_type="pt").frames
    images = pipe(class_labels="up", seed=3, output_type="pil").frames
    assert (array.dtype, array.shape, array.min() >= 0, array.max() <= 1) == (
        np.float32,
        exact.shape,
        True,
        True,
    )
    assert (np.rint(array * 255) == exact).all()
    assert tensor.shape == (1, 3, 3, 16, 16)
    assert (tensor.movedim(2, -1).mul(255).round().numpy() == exact).all()
    assert (np.stack([np.asarray(image) for image in images[0]]) == exact[0]).all()
    with pytest.raises(InputError, match=r"output_type is 'latents'.*np, pt, pil, uint8"):
        pipe(class_labels="up", output_type="latents")


def test_several_videos_per_prompt_count_their_seeds_on():
    pipe = tiny_text()
    found = pipe(
        ["red", "blue"], negative_prompt="green", num_videos_per_prompt=2, seed=5, guidance_scale=2.0
    )
    assert found.seeds == [5, 6, 7, 8]
    config = SampleConfig(sampler="ddim", steps=3, batch=2, guidance=2.0)
    prompts = ["red", "red", "blue", "blue"]
    expected = dict(pipe.generate([5, 6, 7, 8], prompts=prompts, negative="green", config=config))
    assert (np.rint(found.frames * 255) == np.stack(list(expected.values()))).all()


def test_seeds_come_from_a_list_a_generator_or_torch(pipe):
    assert pipe(class_labels=["up", "down"], seed=[9, 2]).seeds == [9, 2]
    by_generator = [
        pipe(class_labels=["up", "down"], generator=torch.Generator().manual_seed(4)).seeds for _ in range(2)
    ]
    assert by_generator[0] == by_generator[1] != [4, 5]
    sources = [torch.Generator().manual_seed(4), torch.Generator().manual_seed(5)]
    assert pipe(class_labels=["up", "down"], generator=sources).seeds[0] == by_generator[0][0]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = (pipe(class_labels="up").seeds for _ in range(2))
        torch.manual_seed(1)
        assert pipe(class_labels="up").seeds == first != second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "class_labels is missing, but tiny has the classes 0 to 3"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"class_labels": "sidewise"}, "up, down, left, right"),
        ({"class_labels": 4}, "out of range"),
        ({"prompt": "red"}, "reads no text"),
        ({"class_labels": 0, "seed": -1}, "seed must be in"),
        ({"class_labels": [0, 1], "seed": [1]}, "1 seeds for 2 videos"),
        ({"class_labels": 0, "seed": 1, "generator": torch.Generator()}, "pass one of them"),
        ({"class_labels": 0, "num_videos_per_prompt": 0}, "num_videos_per_prompt must be at least 1"),
        ({"class_labels": 0, "num_videos_per_prompt": 10**9}, "at most 100,000"),
        ({"class_labels": 0, "num_frames": 0}, "frames must be at least 1"),
        ({"class_labels": 0, "num_frames": 10**12, "window": 3}, "GiB for its pixels alone"),
        ({"class_labels": 0, "num_inference_steps": 1001}, "1000"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "guidance"),
        ({"class_labels": 0, "height": 10}, "nearest multiple"),
        ({"class_labels": 0, "image": "none.png"}, "none.png"),
        ({"class_labels": 0, "image": np.zeros((4, 4), np.uint8)}, "shape"),
        ({"class_labels": 0, "image": np.full((4, 4, 3), 300.0)}, "floats in"),
        ({"class_labels": 0, "image": [1, 2]}, "PIL image"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_computed(pipe, monkeypatch, options, message):
    monkeypatch.setattr(type(pipe.model), "forward", lambda *_: pytest.fail("the model was called"))
    with pytest.raises(InputError, match=message):
        pipe(**options)


def test_images_of_every_kind_are_the_first_and_the_last_frame(pipe, tmp_path):
    first = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(first).save(tmp_path / "first.png")
    kinds = [
        first,
        first.astype(np.float32) / 255,
        torch.from_numpy(first).movedim(-1, 0),
        torch.from_numpy(first).movedim(-1, 0)[None].float() / 255,
        Image.fromarray(first),
        tmp_path / "first.png",
        str(tmp_path / "first.png"),
    ]
    found = [
        frames(pipe, class_labels="up", seed=1, image=image, last_image=255 - first)[0] for image in kinds
    ]
    for clip in found:
        assert (clip[0] == first).all(), "pixels as latents: equal"
        assert (clip[-1] == 255 - first).all()
        assert (clip == found[0]).all()


def test_the_callback_sees_every_step_and_its_timestep(pipe):
    seen = []
    pipe(
        class_labels=["up", "down", "left"],
        seed=0,
        num_inference_steps=3,
        callback_on_step_end=lambda *arguments: seen.append(arguments),
    )
    assert [step for _, step, _, _ in seen] == list(range(6)), "two batches of three steps"
    timesteps = [timestep for _, _, timestep, _ in seen]
    assert timesteps[:3] == timesteps[3:] == sorted(timesteps[:3], reverse=True)
    assert len(set(timesteps)) == 3
    assert all(part is pipe and kwargs == {} for part, _, _, kwargs in seen)
    assert not pipe.model._forward_pre_hooks


def test_device_and_dtype_are_what_torch_and_diffusers_accept(tmp_path):
    tiny_trained().save_pretrained(tmp_path)
    for device in ("cpu", torch.device("cpu")):
        pipe = latte.VideoPipeline.from_pretrained(tmp_path, device=device, dtype=torch.bfloat16)
        assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.bfloat16)
    half = frames(pipe, class_labels="up", seed=1)
    assert pipe.to("cpu", torch.float32) is pipe
    full = frames(pipe, class_labels="up", seed=1)
    assert 0 < np.abs(half.astype(int) - full).mean() < 5
    assert pipe.to(dtype="bf16").dtype == torch.bfloat16
    assert (frames(pipe, class_labels="up", seed=1) == half).all()
    for target in ("abacus", "cuda:99", "cpu:x"):
        with pytest.raises(InputError, match="device"):
            pipe.to(target)
    with pytest.raises(InputError, match="dtype"):
        latte.VideoPipeline.from_pretrained(tmp_path, dtype=torch.int16)
    with pytest.raises(InputError, match="CPU offload needs a GPU"):
        pipe.enable_model_cpu_offload("cpu")


def test_a_gpu_is_named_by_number_or_by_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    names = ("cuda", "auto", "cuda:0", torch.device("cuda", 0))
    assert [str(resolve_device(name)) for name in names] == ["cuda:1", "cuda:1", "cuda:0", "cuda:0"]
    with pytest.raises(InputError, match="no such device"):
        resolve_device("cuda:2")


@pytest.mark.gpu
def test_offload_on_a_gpu_gives_the_same_video():
    pipe = tiny_trained().to("cuda", torch.float32)
    before = frames(pipe, class_labels="up", seed=1)
    pipe.enable_model_cpu_offload()
    assert next(pipe.model.parameters()).device.type == "cpu"
    assert (frames(pipe, class_labels="up", seed=1) == before).all()
    assert next(pipe.model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("what", ["weights", "decoder"])
def test_nan_is_an_error_that_names_the_seed_and_no_frame_comes_out(monkeypatch, what):
    pipe = tiny_trained()
    if what == "weights":
        with torch.no_grad():
            next(pipe.model.parameters()).fill_(float("nan"))
    else:
        real = type(pipe.codec).decode

        def decode(codec, z):
            video = real(codec, z)
            video[1, 0, 0, 0, 0] = float("inf")
            return video

        monkeypatch.setattr(type(pipe.codec), "decode", decode)
    clips = pipe.generate([4, 5], [0, 1])
    with pytest.raises(RunError, match=r"(?i)nan|inf") as error:
        next(clips)
    if what == "decoder":
        assert "decoded video of seed 5" in str(error.value)


def test_a_model_that_was_saved_alone_is_loaded_with_what_it_lacks(tmp_path):
    model = wake(Latte(MODEL)).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"only the denoiser.*codec=.*diffusion="):
        latte.VideoPipeline.from_pretrained(tmp_path)
    codec = build_codec(CodecConfig(name="pixels"))
    with pytest.raises(InputError, match="diffusion=") as error:
        latte.VideoPipeline.from_pretrained(tmp_path, codec=codec)
    assert "codec=" not in str(error.value)
    pipe = latte.VideoPipeline.from_pretrained(
        tmp_path, device="cpu", codec=codec, diffusion=DiffusionConfig()
    )
    config = SampleConfig(sampler="ddim", steps=2)
    own = latte.VideoPipeline("x", model, DiffusionConfig(), None, codec, CLASSES, config, "")
    (_, found), (_, expected) = (next(each.generate([1], [2], config=config)) for each in (pipe, own))
    assert (found == expected).all()


def test_what_is_saved_comes_back_whole(tmp_path):
    pipe = tiny_trained()
    pipe.save_pretrained(tmp_path / "a")
    again = latte.VideoPipeline.from_pretrained(tmp_path / "a", device="cpu")
    assert again.facts() == pipe.facts()
    again.save_pretrained(tmp_path / "b")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()
    }


def test_videos_are_exported_from_every_output_type(pipe, tmp_path):
    for number, kind in enumerate(("np", "pt", "pil", "uint8")):
        video = pipe(class_labels="up", seed=1, output_type=kind).frames[0]
        path = latte.export_to_video(video, tmp_path / f"{number}.mp4", fps=4)
        info = probe(path)
        assert (info.frames, info.height, info.width, info.fps) == (3, 16, 16, 4)
    clips = [read_frames(tmp_path / f"{number}.mp4", [0, 1, 2]) for number in range(4)]
    assert all((clip == clips[0]).all() for clip in clips)
    assert latte.export_to_video(video, tmp_path / "x.gif").endswith("x.gif")
    with pytest.raises(InputError, match=r"file ending is '.avi'"):
        latte.export_to_video(video, tmp_path / "x.avi")
    with pytest.raises(InputError, match="one video"):
        latte.export_to_video(video[None], tmp_path / "x.mp4")
    with pytest.raises(InputError, match="floats in"):
        latte.export_to_video(video.astype(np.float32), tmp_path / "x.mp4")


def test_pyright_knows_the_public_classes(tmp_path):
    """A type checker sees the classes, not ``object``; skipped where pyright is not installed."""
    program = Path(sys.executable).with_name("pyright")
    if not program.exists():
        pytest.skip("pyright is not installed")
    file = tmp_path / "use.py"
    file.write_text(
        "from typing import reveal_type\nfrom latte import Latte, VideoPipeline, export_to_video\n"
        "reveal_type(Latte)\nreveal_type(VideoPipeline.from_pretrained('builtin'))\n"
        "reveal_type(export_to_video)\n"
    )
    root = Path(latte.__file__).parents[1]
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{root.as_posix()}"]}}')
    done = subprocess.run([str(program), "-p", str(tmp_path)], capture_output=True, text=True, check=False)
    if "installing" in done.stdout.lower() and "error" in done.stderr.lower():
        pytest.skip("pyright needs the network for its first start")
    assert 'Type of "Latte" is "type[Latte]"' in done.stdout
    assert 'is "VideoPipeline"' in done.stdout
    assert '"object"' not in done.stdout
