# SPDX-License-Identifier: Apache-2.0
"""A run of a text model from configuration to clips: exact resume, images, latents with stored features,
PixArt, T5, and its plan.
"""

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import yaml
from safetensors.torch import load_file

from latte.build import build, sheet_prompts
from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError
from latte.config.run import load_run
from latte.data.datasets import build_dataset
from latte.data.encode import encode_dataset
from latte.data.procedural import caption_of, split_combinations
from latte.inference.pipeline import VideoPipeline
from latte.model.text import LatteText
from latte.profile.plan import plan
from latte.text.encoders import BuiltinEncoder, build_text_encoder
from latte.text.t5 import T5Encoder
from tiny import WORDS
from tiny_pipeline import tiny_t5


def config(folder, *words):
    """The smallest text run, in ``folder``."""
    return load_run("shapes-text", [*WORDS, "train.log_every=1", f"run.dir={folder}", *words])[0]


def train(folder, *words) -> str:
    """The weights' hash after training."""
    return build(config(folder, *words), "cpu").train()["weights_sha256"]


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path):
    whole = train(tmp_path / "whole", "train.steps=6")
    assert build(config(tmp_path / "parts", "train.steps=6"), "cpu").train(until=3)["step"] == 3
    assert train(tmp_path / "parts", "train.steps=6") == whole
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    assert len({line["loss"] for line in lines[0]}) == 6


@pytest.mark.parametrize("images", [0, 2])
def test_a_step_does_not_depend_on_the_micro_batch(tmp_path, images):
    words = ["train.steps=2", f"train.num_images={images}"]
    train(tmp_path / "whole", *words)
    train(tmp_path / "split", *words, "train.micro_batch=1")
    one, two = (
        load_file(tmp_path / name / "checkpoints/step-2/ema.safetensors") for name in ("whole", "split")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_captions_matter_and_so_does_their_dropout(tmp_path):
    """From the third step on: of a fresh model the first two steps move the last layer, then what looks at
    the caption.
    """
    hashes = {train(tmp_path / f"{p}", "train.steps=3", f"text.dropout={p}") for p in (0.0, 0.9)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("word", "reported"), [("text.dropout=0.3", "text.dropout"), ("data.hold_out=7", "data.hold_out")]
)
def test_a_run_resumes_with_its_own_text_only(tmp_path, word, reported):
    train(tmp_path, "train.steps=1")
    with pytest.raises(InputError, match=reported):
        train(tmp_path, "train.steps=2", word)


def test_a_run_resumes_with_its_own_text_encoder_only(tmp_path, monkeypatch):
    train(tmp_path, "train.steps=1")
    monkeypatch.setattr(BuiltinEncoder, "fingerprint", "0" * 16)
    with pytest.raises(InputError, match=r"text.encoder: the run has .*, you gave .0000"):
        train(tmp_path, "train.steps=2")


def test_data_without_captions_are_refused(tmp_path):
    captionless = config(tmp_path)
    dataset = build_dataset(captionless.data)
    encode_dataset(
        replace(captionless.data, num_clips=4), codec := build(captionless, "cpu").codec, tmp_path / "latents"
    )
    assert codec.name == "pixels"
    manifest = json.loads((tmp_path / "latents/manifest.json").read_text())
    for video in manifest["videos"]:
        video["caption"] = None
    (tmp_path / "latents/manifest.json").write_text(json.dumps(manifest))
    assert dataset.captions
    with pytest.raises(InputError, match=r"text.name is builtin, but the data have no captions"):
        build(
            config(tmp_path, "data.kind=latents", f"data.root={tmp_path / 'latents'}", "data.hold_out=0"),
            "cpu",
        )


def test_sheets_show_captions_of_the_data_and_held_out_ones(tmp_path):
    found = config(tmp_path, "train.steps=2", "train.sample_every=1")
    prompts = sheet_prompts(found, build_dataset(found.data))
    held = {caption_of(*combination) for combination in split_combinations(6)[1]}
    assert [prompt in held for prompt in prompts] == [False] * 4 + [True] * 4
    build(found, "cpu").train()
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.png")) == [
        "step-0000001.png",
        "step-0000002.png",
    ]


WORLD = ("data.scenes=world", "data.language=mixed", "data.resolution=32", "text.length=24")


def test_sheets_of_the_world_show_held_out_captions_too(tmp_path):
    found = config(tmp_path, *WORLD)
    prompts = sheet_prompts(found, build_dataset(found.data))
    held = set(found.data.scene_set.held_out_captions)
    assert [prompt in held for prompt in prompts] == [False] * 4 + [True] * 4


def test_latents_of_the_world_train_as_the_world_itself(tmp_path):
    """Every clip of the set is in every step, in the same order."""
    words = ["train.steps=2"]
    found = config("unused", *WORLD, "data.num_clips=9")
    encode_dataset(found.data, build(found, "cpu").codec, tmp_path / "latents", "float32")
    latents = (f"data.root={tmp_path / 'latents'}", "data.resolution=32", "text.length=24", "data.hold_out=0")
    direct = train(tmp_path / "direct", *WORLD, "data.num_clips=9", *words)
    assert train(tmp_path / "stored", "data.kind=latents", *latents, *words) == direct
    other = train(tmp_path / "other", *WORLD, "data.num_clips=9", "data.language=en", *words)
    assert other != direct, "the captions are read"


def test_a_run_recorded_without_scenes_and_language_resumes_as_moving_shapes(tmp_path):
    """The configurations and checkpoints of 0.1.0 do not have them."""
    whole = train(tmp_path / "whole", "train.steps=4")
    folder = tmp_path / "parts"
    build(config(folder, "train.steps=4"), "cpu").train(until=2)
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    removed = [recorded["data"].pop(key) for key in ("scenes", "language")]
    assert removed == ["shapes", None]
    assert "scenes" not in json.dumps(load_checkpoint(folder / "checkpoints/step-2").state["facts"])
    (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert build(load_run(str(folder), [])[0], "cpu").train()["weights_sha256"] == whole
    with pytest.raises(InputError, match=r"data.scenes: the run has nothing, you gave \"world\""):
        build(config(folder, *WORLD, "train.steps=5"), "cpu").train()


def encoded(folder, text):
    """Latents of eight procedural clips, with the features of their captions by ``text``."""
    found = config("unused", "data.hold_out=0")
    encode_dataset(
        replace(found.data, num_clips=8), build(found, "cpu").codec, folder, dtype="float32", text=text
    )
    return ["data.kind=latents", f"data.root={folder}", "data.hold_out=0", "train.steps=2"]


def test_stored_features_train_as_those_read_on_the_fly_and_are_not_read_again(tmp_path, monkeypatch):
    words = encoded(tmp_path / "plain", None)
    on_the_fly = train(tmp_path / "one", *words)
    words = encoded(tmp_path / "stored", BuiltinEncoder(8))
    monkeypatch.setattr("latte.build.encode_captions", None)
    assert train(tmp_path / "two", *words) == on_the_fly


def test_features_of_another_encoder_are_refused(tmp_path, monkeypatch):
    words = encoded(tmp_path / "latents", BuiltinEncoder(8))
    with pytest.raises(
        InputError, match=r"text.name is 't5', but the captions in .* were encoded by 'builtin'"
    ):
        train(tmp_path / "run", *words, "text.name=t5")
    with pytest.raises(InputError, match=r"text.length is 4, but caption .* has 6 tokens"):
        train(tmp_path / "run", *words, "text.length=4")
    monkeypatch.setattr(BuiltinEncoder, "fingerprint", "0" * 16)
    with pytest.raises(InputError, match=r"the text encoder is 0000.*were encoded by"):
        train(tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def t5(tmp_path):
    """The folder of a tiny random T5 of 12 channels."""
    for part in tiny_t5():
        part.save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


def test_a_run_with_t5_trains_samples_and_frees_it(tmp_path, t5, monkeypatch):
    events = []
    for name in ("encode", "free"):
        plain = getattr(T5Encoder, name)
        monkeypatch.setattr(
            T5Encoder,
            name,
            lambda self, *words, name=name, plain=plain: events.append(name) or plain(self, *words),
        )
    words = ["text.name=t5", f"text.path={t5}", "text.length=20", "train.steps=2"]
    train(tmp_path / "run", *words)
    assert events[-1] == "free"
    assert events.index("free") == len(events) - 1, "all captions in one reading"
    trained = VideoPipeline.from_pretrained(tmp_path / "run", device="cpu", prompts=["a red circle moves up"])
    assert trained.model.config.caption_channels == 12
    assert trained.reader.known.features.keys() == {"", "a red circle moves up"}
    before = len(events)
    (_, clip) = next(trained.generate([3], prompts=["a red circle moves up"]))
    assert len(events) == before, "the prompt was read before the model was made"
    trained.save_pretrained(tmp_path / "folder")
    shutil.move(t5, tmp_path / "moved")
    with pytest.raises(InputError, match=r"text\.path is not set, but the text encoder 't5' needs weights"):
        VideoPipeline.from_pretrained(tmp_path / "folder", device="cpu", prompts=["up"])
    again = VideoPipeline.from_pretrained(
        tmp_path / "folder", device="cpu", text_encoder_path=str(tmp_path / "moved")
    )
    assert (next(again.generate([3], prompts=["A red circle moves up "]))[1] == clip).all(), (
        "lower case, stripped"
    )


def test_another_t5_than_the_models_is_refused(tmp_path, t5):
    train(tmp_path / "run", "text.name=t5", f"text.path={t5}", "text.length=20", "train.steps=1")
    network, tokenizer = tiny_t5()
    with torch.no_grad():
        network.encoder.final_layer_norm.weight += 1
    for part in (network, tokenizer):
        part.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="but the model was trained with"):
        VideoPipeline.from_pretrained(
            tmp_path / "run", device="cpu", text_encoder_path=str(tmp_path / "other"), prompts=["up"]
        )


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_stored_t5_features_train_as_those_read_on_the_fly_in_either_precision(
    tmp_path, t5, monkeypatch, kind
):
    monkeypatch.setattr("latte.text.t5.precision", lambda device: kind)  # as if the CPU were a GPU
    text = ["text.name=t5", f"text.path={t5}", "text.length=20"]
    on_the_fly = train(tmp_path / "one", *encoded(tmp_path / "plain", None), *text)
    words = encoded(tmp_path / "stored", build_text_encoder(config("unused", *text).text))
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "stored/captions-00000.safetensors").values()
    } == {kind}
    monkeypatch.setattr("latte.build.encode_captions", None)
    assert train(tmp_path / "two", *words, *text) == on_the_fly


def test_captions_too_long_are_reported_before_the_weights_are_read(tmp_path, t5):
    (t5 / "model.safetensors").unlink()
    words = ["text.name=t5", f"text.path={t5}", "text.length=2"]
    with pytest.raises(
        InputError, match=r"^a caption, 'a .*', has 8 tokens, but text.length is 2 \(.*; give text.length=8"
    ):
        train(tmp_path / "run", *words)
    with pytest.raises(InputError, match=r"^the caption of 0/\d, 'a .*', has 8 tokens.*; give text.length=8"):
        train(tmp_path / "run", *encoded(tmp_path / "latents", None), *words)
    with pytest.raises(InputError, match="cannot be read"):
        train(tmp_path / "run", *words, "text.length=8")
    with pytest.raises(InputError, match=r"^the caption of 0/\d, 'a .*', has 8 tokens.*; give text.length=8"):
        encoded(tmp_path / "stored", build_text_encoder(config("unused", *words).text))
    assert not (tmp_path / "stored").exists()
    assert not (tmp_path / "run").exists()


def test_features_that_take_much_memory_are_reported(tmp_path, monkeypatch, caplog):
    build(config(tmp_path), "cpu")
    words = encoded(tmp_path / "latents", BuiltinEncoder(8))
    monkeypatch.setattr("latte.build.LARGE_FEATURES", 1000)
    assert not caplog.records
    job = build(config(tmp_path), "cpu")
    (record,) = caplog.records
    assert record.args == (64, sum(tokens.nbytes for tokens in job.captions.features.values()) / 2**30)
    assert record.message == (
        "the features of 64 captions will take 0.0 GiB of memory in every process; to read them from disk, "
        "encode once: latte data encode, then data.kind=latents"
    )
    build(config(tmp_path, *words), "cpu")
    assert len(caplog.records) == 1, "stored ones are not in memory"


def test_captions_that_a_mirror_makes_wrong_are_reported_when_training_begins(tmp_path, caplog):
    found = config("unused", "data.hold_out=0")
    encode_dataset(
        replace(found.data, num_clips=8),
        build(found, "cpu").codec,
        tmp_path / "latents",
        text=BuiltinEncoder(8),
    )
    manifest = json.loads((tmp_path / "latents/manifest.json").read_text())
    manifest["settings"]["flip"] = True
    (tmp_path / "latents/manifest.json").write_text(json.dumps(manifest))
    words = ["data.kind=latents", f"data.root={tmp_path / 'latents'}", "data.hold_out=0"]
    build(config(tmp_path / "run", *words), "cpu")
    assert not caplog.records
    build(config(tmp_path / "run", *words, "data.flip=true"), "cpu")
    (record,) = caplog.records
    sides = [
        caption
        for caption in {video["caption"] for video in manifest["videos"]}
        if caption.endswith(("left", "right"))
    ]
    assert record.message.startswith(f"{len(sides)} of ")
    assert record.message.endswith("but data.flip mirrors half of the clips; set data.flip=false")


def test_stored_t5_features_need_no_t5(tmp_path, t5):
    reader = build_text_encoder(config("unused", "text.name=t5", f"text.path={t5}", "text.length=20").text)
    words = [*encoded(tmp_path / "latents", reader), "text.name=t5", "text.length=20"]
    with pytest.raises(InputError, match=r"have 12; give text.path"):
        train(tmp_path / "run", *words)
    with pytest.raises(InputError, match="cannot be read"):
        train(tmp_path / "run", *words, f"text.path={tmp_path / 'nowhere'}")
    (t5 / "model.safetensors").rename(t5 / "away")
    with pytest.raises(InputError, match="cannot be read"):
        train(tmp_path / "run", *words, f"text.path={t5}")
    (t5 / "away").rename(t5 / "model.safetensors")
    assert train(tmp_path / "run", *words, f"text.path={t5}")


@pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install 'latte-video[bits8]')"
)
def test_features_in_int8_and_in_more_do_not_mix(tmp_path, t5):
    words = ["text.name=t5", f"text.path={t5}", "text.length=20"]
    plain, eight = (
        build_text_encoder(config("unused", *words, *more).text) for more in ([], ["text.bits=8"])
    )
    data = encoded(tmp_path / "latents", eight)
    with pytest.raises(InputError, match=r"the text encoder is .* were encoded by .*-8bit"):
        train(tmp_path / "run", *data, *words)
    assert train(tmp_path / "run", *data, *words, "text.bits=8")
    with pytest.raises(InputError, match=r"text.encoder: the run has .*-8bit"):
        train(
            tmp_path / "run",
            *data[:-1],
            "train.steps=3",
            *words,
            "data.root=" + encoded(tmp_path / "other", plain)[1].split("=")[1],
        )


def test_a_run_starts_from_pixart(tmp_path):
    from diffusers import PixArtTransformer2DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 2,
        "in_channels": 3,
        "out_channels": 6,
        "sample_size": 16,
        "patch_size": 4,
        "caption_channels": 64,
    }
    torch.manual_seed(0)
    image = PixArtTransformer2DModel(**sizes)
    image.save_pretrained(tmp_path / "pixart")
    words = [f"train.init={tmp_path / 'pixart'}", "text.gated_time=true", "train.steps=1", "train.lr=1e-12"]
    train(tmp_path / "run", *words)
    tensors = load_file(tmp_path / "run/checkpoints/step-1/model.safetensors")
    expected = image.state_dict()["transformer_blocks.1.attn1.to_q.weight"]
    torch.testing.assert_close(tensors["space_blocks.1.attention.q.weight"], expected, rtol=0, atol=1e-9)
    assert float(tensors["time_gate"]) == pytest.approx(1 / 1000)
    report = (tmp_path / "run/init.txt").read_text()
    assert "PixArt-alpha" in report
    assert "missing: time_gate" in report
    assert isinstance(VideoPipeline.from_pretrained(tmp_path / "run", device="cpu").model, LatteText)
    with pytest.raises(InputError, match=r"train.init_mapping is 'spatial'"):
        train(tmp_path / "other", *words, "train.init_mapping=spatial")
    with pytest.raises(InputError, match=r"model.depth is 4, but the PixArt .* has 2"):
        train(tmp_path / "other", *words, "model.depth=4")


def test_a_plan_of_a_text_run_is_what_it_costs():
    found = config("unused", "text.length=8", "train.num_images=2")
    planned, model = plan(found, "cpu", measure=True), LatteText(found.network)
    assert planned.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert planned.memory.weights == 4 * planned.parameters
    assert (
        planned.memory.activations
        == planned.memory.without_checkpointing
        > planned.memory.with_checkpointing
        > 0
    )
    assert (planned.table3, planned.tokens, planned.latent) == (None, 3 * 4 * 4, (3, 3, 16, 16))
    assert planned.time.step_seconds > 0
    longer = plan(config("unused", "text.length=80", "train.num_images=2"), "cpu")
    assert longer.operations > planned.operations
    assert longer.memory.activations > planned.memory.activations
