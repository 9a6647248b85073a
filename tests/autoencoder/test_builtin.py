# SPDX-License-Identifier: Apache-2.0
"""The built-in codec is as good as its card states, and has the weights that the built-in model learned."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support import noise

from latte.autoencoder.builtin import WEIGHTS, BuiltinCodec
from latte.data.clips import to_float, to_uint8
from latte.data.procedural import draw_scene, read_motion, render
from tools.train_autoencoder import (
    TRAIN_SEED,
    AutoencoderConfig,
    draw_batch,
    fit,
    make_weights,
    measure,
    procedural_frames,
)

UNSEEN = 123_456


@pytest.fixture(scope="module")
def codec() -> BuiltinCodec:
    return BuiltinCodec.load(None, 16, "cpu")


@pytest.fixture(scope="module")
def card() -> dict:
    with safe_open(WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()["card"])


def test_the_weights_never_change(codec):
    """A model is tied to the latents that it learned.

    New weights need a new name, or every built-in model breaks.
    """
    assert codec.fingerprint == "e42f04ac7221ceed"


def test_size_and_card(codec, card):
    assert WEIGHTS.stat().st_size <= 900_000
    assert card["parameters"] == sum(p.numel() for p in codec.network.parameters()) == 409_408
    assert card["figures"]["psnr_noise_0"] >= 34


def test_the_card_is_true_on_other_frames(codec, card):
    clips = [to_float(render(draw_scene(UNSEEN, index, 8), 8, 64, 64))[::3] for index in range(16)]
    frames = torch.stack(clips)
    latent = codec.encode(frames)
    psnr = {}
    for size in (0.0, 0.1, 0.3):
        decoded = codec.decode(latent + size * noise(*latent.shape))
        psnr[size] = (10 * torch.log10(4 / (decoded - frames).square().mean((2, 3, 4)))).mean().item()
    assert psnr[0.0] == pytest.approx(card["figures"]["psnr_noise_0"], abs=1.0)
    assert psnr[0.0] - psnr[0.1] < 0.5
    assert psnr[0.3] > 33


def test_latents_have_mean_0_and_variance_1(codec):
    frames = torch.stack(
        [to_float(render(draw_scene(UNSEEN, index, 4), 4, 64, 64))[:1] for index in range(64)]
    )
    latent = codec.encode(frames)
    assert latent.mean((0, 1, 3, 4)).abs().max() < 0.05
    assert (latent.std((0, 1, 3, 4)) - 1).abs().max() < 0.1


def test_decoded_clips_still_show_what_they_showed(codec):
    for index in range(8):
        scene = draw_scene(UNSEEN, index, 8)
        latent = codec.encode(to_float(render(scene, 8, 64, 64))[None])
        seen = read_motion(to_uint8(codec.decode(latent + 0.3 * noise(*latent.shape, seed=index))[0]))
        assert (seen.direction, seen.colour, seen.shape, seen.coherent) == (
            scene.direction,
            scene.colour,
            scene.shape,
            True,
        )


def test_a_fresh_training_is_a_function_of_its_seed_and_learns():
    config = AutoencoderConfig(steps=10, batch=8, lr=2e-2, clips=4, size=32)
    one, two = fit(config), fit(config)
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
    latent = one.encode(procedural_frames(TRAIN_SEED, 4, 32).float() / 127.5 - 1)
    assert latent.mean((0, 2, 3)).abs().max() < 1e-3
    assert (latent.var((0, 2, 3)) - 1).abs().max() < 1e-2
    first = fit(replace(config, steps=1))
    assert measure(one, 32, 8)["psnr_noise_0"] > measure(first, 32, 8)["psnr_noise_0"] + 1


def test_the_trained_file_is_a_codec(tmp_path):
    out = tmp_path / "new.safetensors"
    card = make_weights(out, AutoencoderConfig(steps=2, batch=4, clips=2, size=32))
    codec = BuiltinCodec.load(str(out), 16, "cpu")
    assert codec.fingerprint != "e42f04ac7221ceed"
    assert card["config"]["steps"] == 2
    assert codec.encode(torch.zeros(1, 1, 3, 64, 64)).shape == (1, 1, 4, 8, 8)


def test_a_batch_holds_other_content_too():
    pool = procedural_frames(5, 4, 32)
    config = AutoencoderConfig(batch=12, clips=4, size=32)
    batch = draw_batch(pool, config, 3)
    assert torch.equal(batch, draw_batch(pool, config, 3))
    assert not torch.equal(batch, draw_batch(pool, config, 4))
    known = {frame.numpy().tobytes() for frame in pool}
    plain = [np.rint((frame.numpy() + 1) * 127.5).astype(np.uint8).tobytes() in known for frame in batch]
    assert not any(plain[:2])  # two shapes at once
    assert all(plain[4:])
