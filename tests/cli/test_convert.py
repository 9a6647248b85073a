# SPDX-License-Identifier: Apache-2.0
"""``latte convert``: weights in from every layout, out to every layout, and one line with exit 2 for what
does not go.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference.official import dit_state, released_state
from safetensors.torch import load_file
from support import wake

from latte.inference.generate import SampleConfig
from latte.inference.pipeline import VideoPipeline
from latte.interop.load import load_external
from latte.interop.pipeline import save_pipeline
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig
from tiny_pipeline import NAMES, VAES, tiny_codec, tiny_denoiser, tiny_t5
from videos import encode, numbered


@pytest.fixture
def released(tmp_path):
    state = released_state(classes=5)
    torch.save({"ema": state}, tmp_path / "ucf.pt")
    return state


def test_released_file_to_our_folder_and_back_bit_for_bit(latte, released, tmp_path):
    answer = latte("convert", "ucf.pt", "ours", "--heads", 4, "--json")
    assert answer.code == 0
    found = answer.json
    assert found.keys() >= {"out", "used", "missing", "unexpected"}
    assert (found["out"], len(found["used"]), found["missing"], found["unexpected"]) == (
        "ours",
        len(released) - 2,
        [],
        [],
    )
    assert "51 tensors used, 0 missing" in answer.err, "the report is on stderr"
    assert latte("convert", "ours", "again.pt", "--to", "official").code == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)["ema"]
    assert all(torch.equal(again[name], released[name]) for name in found["used"])
    model = Latte.from_pretrained(tmp_path / "ours")
    assert torch.equal(model.final_linear.weight, released["final_layer.linear.weight"])
    card = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert card["codec"] == {"name": "kl", "path": None, "fingerprint": None}
    assert card["diffusion"]["num_steps"] == 1000


def test_a_run_goes_out_and_comes_back_with_what_it_knows(latte, run_folder, tmp_path):
    assert latte("convert", run_folder, "ours").code == 0
    ours, run = (
        VideoPipeline.from_pretrained(tmp_path / "ours", device="cpu"),
        VideoPipeline.from_pretrained(run_folder, device="cpu"),
    )
    assert (ours.weights, ours.classes, ours.codec.fingerprint, ours.diffusion) == (
        run.weights,
        run.classes,
        run.codec.fingerprint,
        run.diffusion,
    )
    assert latte("convert", run_folder, "out.pt", "--to", "official").code == 0
    assert latte("convert", "out.pt", "back", "--heads", run.model.config.dimensions[2]).code == 0
    assert all(
        torch.equal(tensor, run.model.state_dict()[name])
        for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items()
    )
    assert latte("convert", "ours", "twice").code == 0
    assert VideoPipeline.from_pretrained(tmp_path / "twice", device="cpu").classes == run.classes


def test_text_to_video_to_diffusers_and_back(latte, tmp_path):
    model = wake(
        LatteText(TextConfig(depth=1, width=32, heads=2, latent_size=8, num_frames=4, caption_channels=12))
    )
    model.save_pretrained(tmp_path / "ours")
    assert latte("convert", "ours", "transformer", "--to", "diffusers").code == 0
    assert load_external(tmp_path / "transformer").layout == "LatteT2V"
    assert latte("convert", "transformer", "back").code == 0
    back = LatteText.from_pretrained(tmp_path / "back")
    assert back.config == model.config
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
    wrong = latte("convert", "ours", "x.pt", "--to", "official")
    assert (wrong.code, len(wrong.errors)) == (2, 1)
    assert "use --to diffusers" in wrong.errors[0]


def test_named_gaps_are_allowed(latte, released, tmp_path):
    del released["blocks.1.attn.qkv.bias"]
    torch.save({**released, "more": torch.ones(1)}, tmp_path / "ucf.pt")
    assert latte("convert", "ucf.pt", "ours", "--heads", 4).code == 2
    answer = latte(
        "convert",
        "ucf.pt",
        "ours",
        "--heads",
        4,
        "--allow-missing",
        "blocks.1.*",
        "--allow-unexpected",
        "more",
        "--json",
    )
    assert (answer.code, answer.json["missing"], answer.json["unexpected"]) == (
        0,
        ["blocks.1.branches.time.qkv.bias"],
        ["more"],
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ucf.pt", "ours"], "give heads="),
        (["ucf.pt", "ours", "--heads", 5], "heads"),
        (["ucf.pt", "ours", "--to", "oficial"], "did you mean 'official'"),
        (["ucf.pt", "x", "--heads", 4, "--to", "diffusers"], "use --to official"),
        (["ucf.pt", "taken", "--heads", 4], "folder taken already exists"),
        (
            ["ucf.pt", "x", "--heads", 4, "--to", "pipeline"],
            "is text to video, but this model reads no captions",
        ),
        (["nothing.pt", "ours"], "which does not exist"),
        (["empty", "ours"], "a folder without weights"),
        (["evil.pt", "ours"], "nothing in them was run: a call of __builtin__.exec"),
        (["owner/name", "ours"], "hub"),
    ],
)
def test_what_does_not_go_is_one_line_and_exit_2(words, message, latte, released, tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, ("open('marker', 'w').close()",)

    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    (tmp_path / "empty").mkdir()
    torch.save({"ema": released, "x": Evil()}, tmp_path / "evil.pt")
    before = sorted(tmp_path.rglob("*"))
    answer = latte("convert", *words)
    assert (answer.code, len(answer.errors)) == (2, 1)
    assert message in answer.errors[0]
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written, nothing was run"


def test_a_dit_becomes_a_start(latte, tmp_path):
    torch.save(dit_state(), tmp_path / "dit.pt")
    answer = latte("convert", "dit.pt", "start", "--heads", 4, "--json")
    assert (answer.code, answer.json["layout"]) == (0, "DiT")
    assert set(answer.json["dropped"]) == {"pos_embed", "y_embedder.embedding_table.weight"}


def test_a_pipeline_goes_in_and_out(latte, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra t2v")
    from latte.diffusion.config import DiffusionConfig

    model = tiny_denoiser()
    save_pipeline(
        model, tiny_codec("AutoencoderKL", tmp_path / "vae"), *tiny_t5(), DiffusionConfig(), tmp_path / "in"
    )
    alone = latte("convert", "in/transformer", "out", "--to", "pipeline")
    assert (alone.code, len(alone.errors)) == (2, 1)
    assert "a pipeline holds its text encoder" in alone.errors[0]
    half = latte("convert", "in/transformer", "out", "--to", "pipeline", "--text-encoder", "in")
    assert (half.code, "give --codec" in half.errors[0]) == (2, True)
    assert latte("convert", "in", "out", "--to", "pipeline").code == 0, "a pipeline's folder holds its parts"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ]
    state = load_external(tmp_path / "out").state_dict
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    needless = latte("convert", "in", "ours", "--text-encoder", "in")
    assert (needless.code, "is for --to pipeline" in needless.errors[0]) == (2, True)
    ours = latte("convert", "in", "ours", "--codec", "in")
    assert ours.code == 0
    assert (
        "kl is not part of the folder, nor is its path; sample with: latte sample FOLDER --codec-path in"
        in ours.err
    )
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["codec"]["path"] is None


@pytest.mark.parametrize("kind", VAES)
def test_a_pipeline_is_sampled_as_it_is_and_goes_out_with_its_own_autoencoder(kind, latte, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra t2v")
    from latte.diffusion.config import DiffusionConfig

    save_pipeline(
        tiny_denoiser(), tiny_codec(kind, tmp_path / "vae"), *tiny_t5(), DiffusionConfig(), tmp_path / "in"
    )
    words = ["--prompt", "a red circle moves up", "--steps", "ddim5", "--json"]
    released = latte("sample", "in", *words)
    assert released.code == 0, released.err
    record = json.loads((Path(released.json["sheet"]).parent / "clips.json").read_text())["facts"]
    assert (record["sampler"], record["guidance"]) == ("ddim", 7.5), "the released model's settings"
    assert latte("convert", "in", "ours").code == 0
    card = json.loads((tmp_path / "ours/config.json").read_text())
    assert (card["codec"]["name"], card["text"]["path"]) == (NAMES[kind], None), "no path of this machine"
    drawn = pixels("in")
    assert np.abs(pixels("ours", codec_path="in", text_encoder_path="in") - drawn).max() <= 1
    alone = latte("sample", "ours", *words)
    assert (alone.code, "--text-encoder" in alone.errors[0]) == (2, True), alone.err
    alone = latte("sample", "in/transformer", *words)
    assert (alone.code, "give its autoencoder with --codec-path" in alone.errors[0]) == (2, True)
    half = latte("sample", "in/transformer", *words, "--codec-path", "in")
    assert (half.code, "give its T5 with --text-encoder" in half.errors[0]) == (2, True)
    assert latte("sample", "in/transformer", *words, "--codec-path", "in", "--text-encoder", "in").code == 0
    assert np.abs(pixels("in/transformer", codec_path="in", text_encoder_path="in") - drawn).max() <= 1


def pixels(source: str, **places) -> np.ndarray:
    """A clip; without guidance, since random weights at 7.5 blow the last bit of a product up to grey
    levels.
    """
    trained = VideoPipeline.from_pretrained(source, device="cpu", **places)
    config = SampleConfig(sampler="ddim", steps="ddim5")
    return next(trained.generate([0], prompts=["a red circle moves up"], config=config))[1].astype(int)


def test_another_decoder_decodes_the_frames(latte, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra t2v")
    from latte.diffusion.config import DiffusionConfig

    save_pipeline(
        tiny_denoiser(),
        tiny_codec("AutoencoderKL", tmp_path / "vae"),
        *tiny_t5(),
        DiffusionConfig(),
        tmp_path / "in",
    )
    tiny_codec("AutoencoderKLTemporalDecoder", tmp_path / "other")
    words = ["sample", "in", "--prompt", "a red circle moves up", "--steps", "ddim5", "--json"]
    plain, temporal = latte(*words), latte(*words, "--decoder", "other")
    assert (plain.code, temporal.code) == (0, 0), temporal.err
    assert temporal.json["sheet"] != plain.json["sheet"], "other settings, other outputs"
    assert (
        Path(temporal.json["clips"][0]["path"]).read_bytes()
        != Path(plain.json["clips"][0]["path"]).read_bytes()
    )
    card = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**card, "scaling_factor": 0.5}))
    refused = latte(*words, "--decoder", "other")
    assert (refused.code, "--decoder other: its latents" in refused.errors[0]) == (2, True)


def test_a_released_file_is_sampled_when_it_is_said_where_its_autoencoder_is(latte, tmp_path):
    tiny_codec("AutoencoderKL", tmp_path / "vae")
    torch.save({"ema": released_state(depth=2, width=384)}, tmp_path / "released.pt")
    alone = latte("sample", "released.pt", "--steps", 2, "--count", 1, "--frames", 3, "--size", 64)
    assert (alone.code, "--codec-path" in alone.errors[0]) == (2, True), alone.err
    found = latte(
        "sample",
        "released.pt",
        "--steps",
        2,
        "--count",
        1,
        "--frames",
        3,
        "--size",
        64,
        "--codec-path",
        "vae",
        "--json",
    )
    assert found.code == 0, found.err


def test_a_run_is_pushed_to_the_hub_and_a_refusal_is_one_line(latte, run_folder, monkeypatch):
    pushed = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            if repo_id != "owner/name":
                raise OSError("401 Client Error\nand much more")
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **others):
            pushed.update({file.name: file.read_bytes() for file in folder_path.iterdir()})
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert latte("convert", run_folder, "owner/name", "--to", "hub", "--licence", "cc-by-4.0").code == 0
    assert pushed.keys() >= {"model.safetensors", "config.json", "README.md"}
    assert b"cc-by-4.0" in pushed["README.md"]
    refused = latte("convert", run_folder, "unknown/name", "--to", "hub")
    assert refused.code == 1
    message = "could not push to the hub as unknown/name (401 Client Error); use OWNER/NAME, and log in first"
    assert refused.errors == [f"error: {message}: hf auth login"]


def test_what_is_known_of_a_run_is_on_its_card(latte, run_folder, tmp_path):
    score = tmp_path / "m.json"
    score.write_text("{}")
    broken = latte("convert", run_folder, "ours", "--score", score)
    assert (broken.code, len(broken.errors)) == (2, 1)
    assert "is not a manifest of latte evaluate" in broken.errors[0]
    elsewhere = latte("convert", run_folder, "out.pt", "--to", "official", "--licence", "mit")
    assert (elsewhere.code, "writes no model card" in elsewhere.errors[0]) == (2, True)
    assert latte("convert", run_folder, "ours", "--licence", "cc-by-4.0", "--data", "moving shapes").code == 0
    card = (tmp_path / "ours" / "README.md").read_text()
    assert 'license: "cc-by-4.0"' in card
    assert "| data | moving shapes |" in card
    assert "| step | 2 |\n| clips seen | 8 |" in card
    assert latte("convert", "ours", "again").code == 0, "and it stays there"
    assert (tmp_path / "again" / "README.md").read_text() == card
    assert latte("convert", run_folder, "plain").code == 0
    assert (
        "| data | kind procedural, resolution 16, frames 3, interval 1, scenes shapes |"
        in (tmp_path / "plain" / "README.md").read_text()
    )


@pytest.mark.parametrize("name", ["", ".", " "])
def test_an_empty_destination_is_refused(name, latte, released, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    answer = latte("convert", "ucf.pt", name, "--heads", 4)
    assert (answer.code, len(answer.errors)) == (2, 1)
    assert "choose a new folder, e.g. ./weights" in answer.errors[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("to", ["latte", "official"])
def test_a_pipe_or_device_as_destination_is_refused_and_stays(to, latte, released, tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    answer = latte("convert", "ucf.pt", "pipe.pt", "--heads", 4, "--to", to)
    assert (answer.code, len(answer.errors)) == (2, 1)
    assert "already exists (a named pipe)" in answer.errors[0]
    assert (tmp_path / "pipe.pt").is_fifo()


def test_hidden_files_beside_the_destination_are_left_alone(latte, released, tmp_path):
    for name in (".tmp-notes", ".old-photos", ".old-gone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").touch()
    before = sorted(tmp_path.rglob("*"))
    assert latte("convert", "ucf.pt", "ours", "--heads", 4).code == 0
    after = [path for path in sorted(tmp_path.rglob("*")) if "ours" not in path.parts]
    assert after == before


def test_a_model_saved_alone_converts_and_names_its_missing_codec(latte, tmp_path):
    model = wake(Latte(ModelConfig(depth=2, width=16, heads=2, num_frames=4, latent_size=4)))
    model.save_pretrained(tmp_path / "bare")
    assert latte("convert", "bare", "ours", "--codec", "owner/vae").code == 0
    facts = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert facts["codec"]["path"] == "owner/vae"
    alone = latte("sample", "bare", "--count", 1)
    assert (alone.code, len(alone.errors)) == (2, 1)
    assert "--codec-path" in alone.errors[0]


def test_one_checkpoint_of_a_run_goes_out(latte, run_folder, tmp_path):
    checkpoint = next((run_folder / "checkpoints").glob("step-*"))
    answer = latte("convert", checkpoint, "ours", "--json")
    assert (answer.code, answer.json["layout"]) == (0, f"run, step {checkpoint.name[5:]}")


def test_nonfinite_and_quantized_files_are_one_line_and_nothing_is_written(latte, released, tmp_path):
    released["blocks.1.attn.qkv.bias"][2] = float("inf")
    torch.save({"ema": released}, tmp_path / "inf.pt")
    quantized = {name: tensor.to(torch.int8) for name, tensor in released_state(classes=5).items()}
    torch.save({"ema": quantized}, tmp_path / "int8.pt")
    for name, message in (
        ("inf.pt", "blocks.1.attn.qkv.bias' holds 1 non-finite"),
        ("int8.pt", "are quantized: "),
    ):
        answer = latte("convert", name, "ours", "--heads", 4)
        assert (answer.code, len(answer.errors)) == (2, 1)
        assert message in answer.errors[0]
        assert not (tmp_path / "ours").exists()


def test_a_clip_goes_onto_the_card_the_newest_sample_of_a_run_by_itself(run_folder, latte, tmp_path):
    shutil.copytree(run_folder, "run")
    Path("run/samples/step-0000001").mkdir(parents=True)
    encode(Path("run/samples/step-0000001/0.mp4"), numbered(40, 300, 400))
    found = latte("convert", "run", "ours", "--licence", "mit")
    assert found.code == 0, found.err
    assert "![a generated clip](clip.webp)" in Path("ours/README.md").read_text()
    with Image.open("ours/clip.webp") as picture:
        assert (picture.n_frames, picture.size) == (20, (256, 192))
    assert str(tmp_path) not in Path("ours/README.md").read_text() + Path("ours/config.json").read_text()
    given = latte("convert", "run", "given", "--clip", "run/samples/step-0000001/0.mp4")
    assert given.code == 0
    assert Path("given/clip.webp").read_bytes() == Path("ours/clip.webp").read_bytes()
    Path("note.txt").write_text("no clip")
    for words, message in (
        (("--clip", "nowhere.mp4"), "--clip nowhere.mp4 is no file"),
        (("--clip", "note.txt"), "--clip note.txt cannot be read"),
        (("--clip", "note.txt", "--to", "official"), "--to official writes no model card"),
    ):
        refused = latte("convert", "run", "none", *words)
        assert (refused.code, len(refused.errors)) == (2, 1), refused.err
        assert message in refused.errors[0]
    assert not Path("none").exists()
