# SPDX-License-Identifier: Apache-2.0
"""The training of the built-in temporal autoencoder: its clips, its loss, Muon, and resuming."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latte.autoencoder.builtin_temporal import BuiltinTemporalAutoencoder, BuiltinTemporalCodec
from latte.checks import InputError
from latte.data.procedural import read_motion
from tools import train_temporal_autoencoder
from tools.muon import Muon, orthogonal
from tools.temporal_clips import TRAIN_SEED, cached_pool, render_pool, shape_clip, world_clip
from tools.train_temporal_autoencoder import (
    TemporalConfig,
    draw_batch,
    draw_pools,
    fit,
    held_out_clips,
    make_weights,
    reconstruction_loss,
    to_tensor,
)
from tools.training_loop import schedule, stable_state, train

TINY = TemporalConfig(steps=4, decay_steps=2, clips=9, size=16, frames=5)


@pytest.fixture(scope="module")
def pools() -> train_temporal_autoencoder.Pools:
    return draw_pools(TINY)


@pytest.mark.parametrize("kind", ["world", "shapes", "textures"])
def test_clips_are_a_function_of_seed_and_index(kind):
    pool = render_pool(kind, 5, 3, 5, 16)
    assert pool.shape == (3, 5, 16, 16, 3)
    assert pool.dtype == np.uint8
    assert np.array_equal(pool, render_pool(kind, 5, 3, 5, 16))
    assert not np.array_equal(pool, render_pool(kind, 6, 3, 5, 16))
    assert not np.array_equal(pool[0], pool[1])


def test_frame_rates_of_the_world_differ_and_stay_in_their_range():
    clips = [world_clip(5, index, 5, 16) for index in (3, 12)]  # two pendulums
    for index, clip in zip((3, 12), clips, strict=True):
        assert np.array_equal(clip[0], world_clip(5, index, 1, 16, 8.0)[0]), "the first frame has no rate"
        assert not np.array_equal(clip, world_clip(5, index, 5, 16, 8.0))


def test_half_of_the_shapes_go_there_and_back():
    once = shape_clip(5, 1, 9, 64)
    twice = shape_clip(5, 5, 9, 64)
    assert read_motion(once).direction == read_motion(twice[:5]).direction == "down"
    assert np.array_equal(twice, twice[::-1])


def test_a_pool_is_rendered_once(tmp_path):
    words = (tmp_path, "shapes", 5, 2, 5, 16)
    first = cached_pool(*words)
    [path] = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    assert np.array_equal(cached_pool(*words), first)
    assert path.stat().st_mtime_ns == stamp
    assert np.array_equal(first, render_pool(*words[1:]))


def test_a_batch_is_a_function_of_its_step(pools):
    batch = draw_batch(pools, TINY, 0)
    assert batch.shape == (8, 5, 3, 16, 16)
    assert batch.abs().max() <= 1
    assert torch.equal(batch, draw_batch(pools, TINY, 0))
    assert not torch.equal(batch, draw_batch(pools, TINY, 1))
    assert not torch.equal(batch, draw_batch(pools, replace(TINY, start="a file"), 0))
    assert draw_batch(pools, TINY, 3).shape == (2, 5, 3, 32, 32)


def is_plain(clip: torch.Tensor, pools: train_temporal_autoencoder.Pools) -> bool:
    """Return whether a clip (f c h w) in [-1, 1] is part of one of the pools."""
    pixels = clip.permute(0, 2, 3, 1).add(1).mul(127.5).round().byte().numpy()
    return any(
        np.array_equal(pixels, whole[start : start + len(pixels)])
        for pool in pools.values()
        for whole in pool
        for start in range(len(whole) - len(pixels) + 1)
    )


def test_a_batch_holds_other_content_too(pools):
    plain = [is_plain(clip, pools) for clip in draw_batch(pools, TINY, 1)]
    assert plain[2:5] == [True] * 3, "the world as it is"
    assert plain[6:] == [True] * 2, "a shape and a texture as they are"
    assert not plain[0], "a second shape"


def test_a_mosaic_is_four_clips_side_by_side(pools):
    mosaic = draw_batch(pools, TINY, 3)
    parts = mosaic.unflatten(4, (2, 16)).unflatten(3, (2, 16)).permute(0, 3, 5, 1, 2, 4, 6).flatten(0, 2)
    assert sum(is_plain(part, pools) for part in parts) >= 5


def test_held_out_clips_are_of_every_kind_and_of_no_training(pools):
    clips = held_out_clips(TINY, 1)
    assert len(clips) == 10
    trained = {clip[:1].tobytes() for clip in pools["world"]}
    first = render_pool("world", TRAIN_SEED, 1, 5, 16)[0, :1].tobytes()
    assert first in trained, "the comparison can find one"
    shown = (clip[0].permute(1, 2, 0).add(1).mul(127.5).round().byte().numpy() for [clip] in clips.values())
    assert not any(frame.tobytes() in trained for frame in shown)


def test_the_loss_weighs_moving_pixels_and_the_first_frame_more():
    frames = torch.zeros(1, 5, 3, 4, 4)
    frames[:, 2, :, 0, 0] = 1  # moves in frames 2 and 3

    def loss(frame: int, row: int) -> float:
        decoded = frames.clone()
        decoded[:, frame, :, row, 0] += 0.1
        return reconstruction_loss(decoded, frames).item()

    assert reconstruction_loss(frames, frames) == 0
    assert loss(2, 0) > 1.5 * loss(2, 1)
    assert loss(0, 1) > 1.2 * loss(2, 1)


def test_orthogonal_matrices():
    draw = torch.Generator().manual_seed(0)
    for shape in ((16, 48), (48, 16), (8, 8)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=draw)))
        assert singular.min() > 0.4
        assert singular.max() < 1.3


def test_muon_minimises():
    draw = torch.Generator().manual_seed(0)
    target = torch.randn(6, 2, 3, 3, generator=draw)
    weight = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = Muon([weight], lr=0.05)
    losses = []
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
        optimizer.zero_grad()
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


def test_the_learning_rate_is_constant_and_then_falls_to_0():
    config = replace(TINY, steps=10, decay_steps=4)
    factors = [schedule(config, step, 2, 4) for step in range(10)]
    assert factors == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def weights_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights_of(a), weights_of(b), strict=True))


def test_a_stopped_training_resumes_bit_for_bit(tmp_path, monkeypatch):
    """Also with another number of steps, from the state before the decay."""
    every_step = {"keep_every": 1}
    monkeypatch.setattr(
        train_temporal_autoencoder, "train", lambda *words, **named: train(*words, **{**named, **every_step})
    )
    whole = fit(TINY)
    keep = tmp_path / "state"
    longer = fit(replace(TINY, steps=5, decay_steps=3), keep)
    assert not same(longer, whole)
    with pytest.raises(InputError, match="delete it, or train with those settings"):
        fit(TINY, keep)
    stable_state(keep).replace(keep)
    assert same(fit(TINY, keep), whole)
    with pytest.raises(InputError, match="delete it, or train with those settings"):
        fit(replace(TINY, lr=1.0), keep)


def test_a_training_learns():
    config = replace(TINY, steps=24, decay_steps=12, half=False)
    clip = to_tensor(draw_pools(config)["shapes"][:1])
    losses = []
    for steps in (2, 24):
        model = fit(replace(config, steps=steps, decay_steps=steps // 2))
        with torch.no_grad():
            losses.append(reconstruction_loss(model.decode(model.encode(clip)), clip).item())
    assert losses[1] < 0.8 * losses[0]


def test_the_trained_file_is_a_codec_with_normal_latents(tmp_path):
    out = tmp_path / "new.safetensors"
    card = make_weights(out, TINY, num_clips=1)
    codec = BuiltinTemporalCodec.load(str(out), 16, "cpu")
    assert card["command"].endswith("new.safetensors --steps 4 --decay-steps 2")
    assert set(card["measured"]) >= {"psnr_world_clip", "psnr_world_image", "psnr_shapes", "psnr_snow"}
    pools = draw_pools(TINY)
    clips = torch.cat(list(train_temporal_autoencoder.some_clips(pools, TINY, 512)))
    latent = codec.encode(clips)
    assert latent.mean((0, 1, 3, 4)).abs().max() < 0.02
    assert (latent.std((0, 1, 3, 4)) - 1).abs().max() < 0.02


def test_a_second_training_starts_from_the_first_with_and_without_refiner(tmp_path):
    first = BuiltinTemporalAutoencoder()
    state = first.state_dict()
    state = {name: state[name] for name in state if not name.startswith("refiner.")}
    save_file(state, tmp_path / "first.safetensors")
    start = str(tmp_path / "first.safetensors")
    config = replace(TINY, steps=1, decay_steps=1, lr=0.0, muon_lr=0.0, start=start)
    second = fit(config)
    for name, tensor in state.items():
        assert torch.equal(second.state_dict()[name], tensor) or name.startswith("latent_")
    save_file({"a": torch.zeros(1)}, tmp_path / "first.safetensors")
    with pytest.raises(InputError, match=r"--start: .* lacks decoder.0.bias \(35 faults"):
        fit(config)


def test_the_refiner_adds_nothing_at_first():
    model = BuiltinTemporalAutoencoder()
    hidden = torch.randn(2, 96, 4, 4)
    images = torch.randn(2, 12, 16, 16)
    refined = model.refiner(hidden, images)
    assert torch.equal(refined, images.reshape(8, 3, 16, 16))


def test_a_decoder_trained_alone_reads_the_same_latents(tmp_path):
    start = tmp_path / "start.safetensors"
    make_weights(start, TINY, num_clips=1)
    out = tmp_path / "decoder.safetensors"
    card = make_weights(out, replace(TINY, start=str(start), decoder_only=True), num_clips=1)
    before, after = load_file(start), load_file(out)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "to_pixels", "refiner"}
    assert card["command"].endswith("--start start.safetensors --decoder-only")
    assert card["config"]["start"] == "start.safetensors", "no path of this machine"


def test_a_decoder_alone_needs_the_encoder_that_it_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", str(tmp_path / "out.safetensors"), "--decoder-only"])
    with pytest.raises(SystemExit):
        train_temporal_autoencoder.main()
    assert "--decoder-only needs --start" in capsys.readouterr().err
