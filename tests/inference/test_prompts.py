# SPDX-License-Identifier: Apache-2.0
"""A prompt's clip does not depend on its batch; guidance steers away from the negative prompt; the wrong
encoder is refused.
"""

import logging
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.samplers import SAMPLERS, sample
from latte.inference.generate import SampleConfig, condition
from latte.inference.prompts import PromptReader
from latte.runtime import SampleNoise
from latte.text.encoders import BuiltinEncoder, TextEncoderConfig
from tiny import tiny_text, tiny_trained
from tiny_pipeline import tiny_t5

PROMPTS = ["red", "a blue circle moves up", "", "a very long prompt with eleven words in it is here"]
SEEDS = [3, 1, 4, 15]


@pytest.fixture(scope="module")
def trained():
    return tiny_text()


def latents(trained, rows, sampler="ddim", scale=2.0, negative=""):
    """z of some of the seeds and prompts, drawn together."""
    prompts = trained.reader([PROMPTS[row] for row in rows], negative)
    denoise = condition(trained.model, None, prompts, len(rows), scale, torch.float32)(slice(None))
    shape = (3, 3, 16, 16)
    return sample(
        sampler,
        denoise,
        build_process(trained.diffusion),
        SampleNoise([SEEDS[row] for row in rows]),
        shape,
        4,
        0.0,
        torch.device("cpu"),
        None,
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_latent_of_a_prompt_does_not_depend_on_the_prompts_beside_it(trained, sampler):
    if "epsilon" not in SAMPLERS[sampler].predictions:
        trained = replace(trained, diffusion=DiffusionConfig(objective="rectified_flow"))
    together = latents(trained, range(4), sampler)
    for row in range(4):
        assert (latents(trained, [row], sampler) - together[row]).abs().max() <= 1e-6 * together.abs().max()
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_prompt_and_the_negative_change_the_clip_and_guidance_one_reads_no_negative(trained):
    plain = latents(trained, [1])
    by_prompt = latents(trained, [1], scale=1.0)
    assert (plain - by_prompt).abs().max() > 1e-3
    assert (plain - latents(trained, [1], negative="red")).abs().max() > 1e-4
    assert torch.equal(by_prompt, latents(trained, [1], scale=1.0, negative="red"))


def test_guidance_is_u_plus_scale_times_c_minus_u(trained):
    c_side = trained.reader(["red"])
    u_side = trained.reader(["blue"])
    prompts = trained.reader(["red"], "blue")
    z, t = torch.randn(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with torch.no_grad():
        c, u = (trained.model(z, t, side.text, side.mask) for side in (c_side, u_side))
        out = condition(trained.model, None, prompts, 1, 3.0, torch.float32)(slice(None))(z, t)
    assert (c - u)[:, :, :3].abs().max() > 1e-4, "the two must differ, or the test is empty"
    torch.testing.assert_close(out[:, :, :3], (u + 3 * (c - u))[:, :, :3], rtol=1e-4, atol=1e-5)


def test_clips_of_a_batch_are_those_drawn_alone(trained):
    config = SampleConfig(sampler="dpmpp", steps=3, guidance=2.0, batch=4)
    together = dict(trained.generate(SEEDS, prompts=PROMPTS, config=config))
    for seed, prompt in zip(SEEDS, PROMPTS, strict=True):
        alone = dict(trained.generate([seed], prompts=[prompt], config=replace(config, batch=1)))[seed]
        assert int(np.abs(alone.astype(int) - together[seed].astype(int)).max()) <= 1


def test_each_prompt_is_encoded_once_and_the_encoder_freed_before_the_model_runs(trained, monkeypatch):
    calls = []

    class Watched(BuiltinEncoder):
        def encode(self, prompts):
            calls.append(list(prompts))
            return super().encode(prompts)

        def free(self):
            calls.append("freed")

    monkeypatch.setattr(
        "latte.inference.prompts.build_text_encoder", lambda config, device: Watched(config.length)
    )
    reader = PromptReader(TextEncoderConfig(name="builtin", length=16), "cpu")
    reader.learn(["red", "blue"])
    reader(["red", "blue", "red"], "red")
    reader(["green"])
    assert calls == [["", "red", "blue"], "freed", ["", "green"], "freed"]


def test_another_encoder_than_the_models_is_refused():
    reader = PromptReader(TextEncoderConfig(name="builtin"), "cpu", fingerprint="0" * 16)
    with pytest.raises(InputError, match="the model was trained with 0000"):
        reader(["red"])


@pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install 'latte-video[bits8]')"
)
@pytest.mark.parametrize("learned", [None, 8])
def test_prompts_may_be_read_in_other_bits_than_the_captions_and_a_warning_says_so(tmp_path, caplog, learned):
    for part in tiny_t5():
        part.save_pretrained(tmp_path)
    config = TextEncoderConfig(name="t5", path=str(tmp_path), length=10, bits=learned)
    before = PromptReader(config, "cpu")
    before.learn(["a red circle"])
    fingerprint = before.fingerprint
    with caplog.at_level(logging.WARNING, "latte"):
        PromptReader(config, "cpu", fingerprint).learn(["a red circle"])
    assert not caplog.records, "the same bits"
    reader = PromptReader(replace(config, bits=None if learned else 8), "cpu", fingerprint)
    for prompt in ("a red circle", "up", "down"):
        reader.learn([prompt])
    assert (reader.fingerprint, reader.used) == (
        fingerprint,
        f"{fingerprint}-8bit" if learned is None else fingerprint.removesuffix("-8bit"),
    )
    assert [record.message.split(":")[-1] for record in caplog.records] == [
        " the same weights in another precision"
    ], "once"
    network, _ = tiny_t5()
    network.encoder.final_layer_norm.weight.data += 1
    network.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the model was trained with"):
        PromptReader(reader.config, "cpu", fingerprint).learn(["up"])


def test_wrong_prompts_are_refused(trained):
    with pytest.raises(InputError, match="reads text, but no prompt"):
        trained.generate([0])
    with pytest.raises(InputError, match="there are 2 seeds"):
        list(trained.generate([0, 1], prompts=["red"]))
    with pytest.raises(InputError, match="reads text; give a prompt instead"):
        trained.generate([0], [1], prompts=["red"])
    with pytest.raises(InputError, match="it must be a text"):
        trained.generate([0], prompts=[1])
    with pytest.raises(InputError, match="reads no text"):
        tiny_trained().generate([0], prompts=["red"])
    with pytest.raises(InputError, match="has 21 tokens"):
        trained.generate([0], prompts=["word " * 20])
