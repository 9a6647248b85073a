# SPDX-License-Identifier: Apache-2.0
"""LattePipeline: the same clips as diffusers' own, and folders that it loads."""

import json
import shutil

import pytest
import torch
from support import noise

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checks import InputError, RunError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.guidance import guided
from latte.diffusion.samplers import sample
from latte.inference.prompts import PromptReader
from latte.interop.load import load_external
from latte.interop.pipeline import load_t5, save_pipeline, scheduler_settings
from latte.text.encoders import TextEncoderConfig
from tiny_pipeline import TINY, VAES, tiny_codec, tiny_denoiser, tiny_t5

pytest.importorskip("transformers", reason="needs the extra t2v")

SAME = 1e-4  # of a pixel in 0..1
CALL = {
    "guidance_scale": 7.5,
    "num_inference_steps": 10,
    "video_length": 5,
    "height": 64,
    "width": 64,
    "output_type": "pt",
    "clean_caption": False,
}


def pipeline(folder):
    from diffusers import LattePipeline

    pipe = LattePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def our_clip(
    model, codec, latents, text, null, diffusion=None, sampler="ddim", steps="ddim10"
) -> torch.Tensor:
    """Our own sampling -> (b f 3 H W) in 0..1, the range of the pipeline's tensors."""
    denoise = guided(model, {"text": text}, {"text": null}, 7.5)
    z = sample(
        sampler,
        denoise,
        build_process(diffusion or DiffusionConfig()),
        lambda shape: latents,
        latents.shape[1:],
        steps,
    )
    return codec.decode(z) / 2 + 0.5


@pytest.fixture
def model():
    return tiny_denoiser()


@pytest.mark.parametrize("kind", VAES)
def test_the_pipeline_of_our_folder_draws_our_clip(kind, model, tmp_path):
    codec_, latents = tiny_codec(kind, tmp_path / "vae"), noise(1, 5, 4, 8, 8)
    save_pipeline(model, codec_, *tiny_t5(), DiffusionConfig(), tmp_path / "out")
    pipe = pipeline(tmp_path / "out")
    assert type(pipe.vae).__name__ == kind
    with torch.no_grad():  # as the pipeline does with one prompt: the negative one is cut to its length
        text, null = pipe.encode_prompt("a red circle moves up")
    assert text.shape == null.shape == (1, 6, 12)
    external = pipe(
        "a red circle moves up", latents=latents.transpose(1, 2), decode_chunk_size=3, **CALL
    ).frames
    ours = our_clip(model, codec_, latents, text, null)
    assert external.std() > 0.05
    assert float((ours - external).abs().max()) < SAME
    other, _ = pipe.encode_prompt("a blue square moves down")
    assert float((our_clip(model, codec_, latents, other, null) - external).abs().max()) > 100 * SAME, (
        "the prompt has no say"
    )


@pytest.mark.parametrize("kind", VAES)
@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_given_embeddings_give_the_same_clips(kind, scheduler, model, tmp_path):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    codec_, latents = tiny_codec(kind, tmp_path / "vae", chunk=5), noise(2, 5, 4, 8, 8)
    save_pipeline(model, codec_, *tiny_t5(), DiffusionConfig(), tmp_path / "out")
    pipe = pipeline(tmp_path / "out")
    text, null = noise(2, 7, 12), noise(2, 7, 12, seed=1)
    changes, steps = {}, "ddim10"
    if scheduler == "euler":
        pipe.scheduler = EulerDiscreteScheduler(beta_end=0.02, beta_start=1e-4, timestep_spacing="leading")
        changes, steps = (
            {"timesteps": [*range(999, 0, -100)], "num_inference_steps": None},
            10,
        )  # our grid, the noise itself as start
    else:
        assert isinstance(pipe.scheduler, DDIMScheduler)
    external = pipe(
        None,
        None,
        prompt_embeds=text,
        negative_prompt_embeds=null,
        latents=latents.transpose(1, 2),
        decode_chunk_size=5,
        **{**CALL, **changes},
    ).frames
    ours = our_clip(model, codec_, latents, text, null, None, scheduler, steps)
    assert external.std() > 0.05
    assert float((ours - external).abs().max()) < SAME


def test_it_generates_our_clip_from_our_text_features(model, tmp_path):
    """Left alone it attends to the padding of the negative prompt, and guidance leads elsewhere."""
    codec_, latents = tiny_codec("AutoencoderKL", tmp_path / "vae"), noise(1, 5, 4, 8, 8)
    save_pipeline(model, codec_, *tiny_t5(), DiffusionConfig(), tmp_path / "out")
    words = PromptReader(TextEncoderConfig("t5", str(tmp_path / "out"), 20), "cpu")(["a red circle moves up"])
    text, null = words.text[words.mask][None], words.null_text[words.null_mask][None]
    assert (text.shape[1], null.shape[1]) == (6, 1)
    denoise = guided(model, *words.part(slice(None), torch.device("cpu")), 7.5)
    z = sample(
        "ddim", denoise, build_process(DiffusionConfig()), lambda shape: latents, latents.shape[1:], "ddim10"
    )
    ours, pipe = codec_.decode(z) / 2 + 0.5, pipeline(tmp_path / "out")
    same = {
        "prompt_embeds": text,
        "negative_prompt_embeds": null.expand_as(text),
    }  # one key six times over is attended to as one
    given = pipe(None, None, **same, latents=latents.transpose(1, 2), **CALL).frames
    assert float((ours - given).abs().max()) < SAME
    alone = pipe("a red circle moves up", latents=latents.transpose(1, 2), **CALL).frames
    assert float((ours - alone).abs().max()) > 100 * SAME


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(
    "diffusion",
    [DiffusionConfig(objective="v"), DiffusionConfig("squared_cosine"), DiffusionConfig(num_steps=500)],
)
def test_other_schedules_and_objectives_are_written_to_the_scheduler(diffusion, learn_sigma, tmp_path):
    model, codec_, latents = (
        tiny_denoiser(learn_sigma=learn_sigma),
        tiny_codec("AutoencoderKL", tmp_path / "vae"),
        noise(1, 5, 4, 8, 8),
    )
    save_pipeline(model, codec_, *tiny_t5(), diffusion, tmp_path / "out")
    text, null = noise(1, 7, 12), noise(1, 7, 12, seed=1)
    external = pipeline(tmp_path / "out")(
        None, None, prompt_embeds=text, negative_prompt_embeds=null, latents=latents.transpose(1, 2), **CALL
    ).frames
    assert external.std() > 0.05
    assert float((our_clip(model, codec_, latents, text, null, diffusion) - external).abs().max()) < SAME


def test_a_pipeline_folder_is_a_source_of_weights_autoencoder_and_text_encoder(model, tmp_path):
    encoder, tokenizer = tiny_t5()
    save_pipeline(
        model,
        tiny_codec("AutoencoderKL", tmp_path / "vae"),
        encoder,
        tokenizer,
        DiffusionConfig(),
        tmp_path / "ours",
    )
    pipeline(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs"
    )  # and once more through diffusers' own hands
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        loaded = load_external(folder)
        assert (loaded.layout, loaded.config) == ("LatteT2V", TINY)
        assert all(
            torch.equal(loaded.state_dict[name], tensor) for name, tensor in model.state_dict().items()
        )
        assert (
            build_codec(CodecConfig("kl", str(folder))).fingerprint
            == build_codec(CodecConfig("kl", str(tmp_path / "vae"))).fingerprint
        )
        again, words = load_t5(folder)
        assert all(
            torch.equal(again.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items()
        )
        assert words("a red circle").input_ids == tokenizer("a red circle").input_ids
    shutil.copytree(tmp_path / "ours" / "text_encoder", tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    assert load_t5(tmp_path / "t5")[0].config.d_model == 12, "both in one folder"
    save_pipeline(
        model,
        tiny_codec("AutoencoderKL", tmp_path / "vae"),
        encoder,
        tokenizer,
        DiffusionConfig(),
        tmp_path / "ours",
    )
    (tmp_path / "ours" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"other files \(thesis.tex\)"):
        save_pipeline(
            model,
            tiny_codec("AutoencoderKL", tmp_path / "vae"),
            encoder,
            tokenizer,
            DiffusionConfig(),
            tmp_path / "ours",
        )


def test_parts_that_a_pipeline_cannot_hold_are_refused(model, tmp_path):
    kl, (encoder, tokenizer) = tiny_codec("AutoencoderKL", tmp_path / "vae"), tiny_t5()

    class Hashing:
        pass

    for parts, message in (
        ((kl, Hashing(), tokenizer), "the text encoder is Hashing, but a LattePipeline needs T5EncoderModel"),
        ((build_codec(CodecConfig("builtin")), encoder, tokenizer), "the codec is 'builtin'"),
        ((kl, tiny_t5(16)[0], tokenizer), "width 16, but the model reads captions of 12"),
        ((kl, encoder, [*range(17)]), "the tokenizer has 17 tokens"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            save_pipeline(model, *parts, DiffusionConfig(), tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"cannot sample diffusion.objective=rectified_flow"):
        scheduler_settings(DiffusionConfig(objective="rectified_flow"), True)


def test_an_interrupted_export_leaves_the_older_one(model, tmp_path):
    kl, (encoder, tokenizer) = tiny_codec("AutoencoderKL", tmp_path / "vae"), tiny_t5()
    save_pipeline(model, kl, encoder, tokenizer, DiffusionConfig(), tmp_path / "out")

    class Full(type(tokenizer)):
        def save_pretrained(self, place):
            raise OSError(28, "No space left on device")

    tokenizer.__class__ = Full
    with pytest.raises(RunError, match=r"could not write the pipeline.*No space left on device"):
        save_pipeline(tiny_denoiser(depth=1), kl, encoder, tokenizer, DiffusionConfig(), tmp_path / "out")
    assert load_external(tmp_path / "out").config == TINY
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["tokenizer"] == [
        "transformers",
        "T5Tokenizer",
    ]


@pytest.mark.parametrize("present", ["nothing", "no tokenizer", "no weights"])
def test_half_a_text_encoder_is_refused_in_one_line(present, tmp_path):
    folder, (encoder, tokenizer) = tmp_path / "t5", tiny_t5()
    folder.mkdir()
    if present != "nothing":
        tokenizer.save_pretrained(
            folder / "tokenizer"
        ) if present == "no weights" else encoder.save_pretrained(folder / "text_encoder")
        encoder.config.save_pretrained(folder / "text_encoder")
    with pytest.raises(InputError, match=r"text encoder '.*t5' cannot be read") as caught:
        load_t5(folder)
    assert "\n" not in str(caught.value)
