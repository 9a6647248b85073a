# SPDX-License-Identifier: Apache-2.0
"""The text-to-video model: against diffusers' network of the same weights, and the laws it must follow."""

import json
from dataclasses import replace

import pytest
import torch
from support import noise, wake

from latte.checks import InputError
from latte.model.positions import spatial_table
from latte.model.text import LatteText, TextConfig, scaled_table
from latte.model.text_blocks import PooledCaption

TINY = TextConfig(depth=2, width=32, heads=2, num_frames=4, latent_size=8, caption_channels=12)
T = torch.tensor([3, 777])


def tiny(**changes) -> LatteText:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wake(LatteText(replace(TINY, **changes)), 0.1).eval()


def mask_of(*lengths: int, width: int = 7) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def in_diffusers(model: LatteText, frames: int):
    from diffusers import LatteTransformer3DModel

    from latte.interop.diffusers import diffusers_config, diffusers_state

    config = {key: value for key, value in diffusers_config(model.config).items() if not key.startswith("_")}
    expected = LatteTransformer3DModel(**{**config, "video_length": frames})
    expected.load_state_dict(diffusers_state(model))
    return expected.eval()


@pytest.mark.parametrize(
    ("frames", "size", "lengths", "temporal", "changes"),
    [
        (4, (8, 8), None, True, {}),
        (4, (8, 8), None, False, {}),
        (1, (8, 8), None, True, {}),
        (4, (6, 12), None, True, {}),
        (4, (8, 8), (3, 7), True, {}),
        (6, (8, 8), (7, 1), True, {}),
        (4, (8, 8), (3, 7), True, {"learn_sigma": False, "patch_size": 4, "depth": 3, "heads": 4}),
        (2, (8, 8), None, True, {"latent_size": 128}),  # positions in steps of a half
    ],
    ids=[
        "plain",
        "temporal-off",
        "one-frame",
        "non-square",
        "masked",
        "six-frames",
        "other-sizes",
        "coarse-positions",
    ],
)
@pytest.mark.filterwarnings("ignore:.*frames are more")
@torch.no_grad()
def test_equals_diffusers_on_the_same_weights(frames, size, lengths, temporal, changes):
    ours = tiny(**changes)
    z, text = noise(2, frames, 4, *size), noise(2, 7, 12, seed=5)
    mask = None if lengths is None else mask_of(*lengths)
    bias = None if mask is None else (1 - mask.float())[:, None].repeat_interleave(frames, 0) * -10000.0
    expected = in_diffusers(ours, frames)(
        z.transpose(1, 2), T, text, bias, enable_temporal_attentions=temporal
    ).sample.transpose(1, 2)
    found = ours(z, T, text, mask, temporal=temporal)
    assert expected.std() > 0.1
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("gated", [False, True])
def test_the_published_size_exactly(gated):
    with torch.device("meta"):
        model = LatteText(TextConfig(gated_time=gated))
    assert len(model.state_dict()) == 967 + gated
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_057_246_880


@torch.no_grad()
def test_a_prompt_alone_and_beside_longer_ones():
    model = tiny()
    z, t = noise(4, 4, 4, 8, 8), torch.tensor([3, 200, 777, 999])
    text, mask = noise(4, 20, 12, seed=1), mask_of(5, 20, 12, 1, width=20)
    batch = model(z, t, text, mask)
    for index, length in enumerate((5, 20, 12, 1)):
        row = slice(index, index + 1)
        alone = model(z[row], t[row], text[row, :length])
        assert float((alone - batch[row]).abs().max()) < 1e-6 * float(batch.abs().max())
    text[~mask] = 1e3  # whatever the padding holds
    torch.testing.assert_close(model(z, t, text, mask), batch, rtol=0, atol=0)
    assert not torch.equal(model(z, t, text), batch), "the mask has no effect"


@pytest.mark.parametrize("own", [False, True])
@torch.no_grad()
def test_images_leave_the_clip_untouched_and_are_denoised_alone(own):
    model = tiny()
    clip, images = noise(2, 4, 4, 8, 8), noise(2, 3, 4, 8, 8, seed=1)
    text, mask = (
        noise(2, 4, 7, 12, seed=2),
        torch.stack([mask_of(3, 7), mask_of(5, 2), mask_of(7, 7), mask_of(1, 6)], 1),
    )
    if not own:
        text, mask = text[:, 0].contiguous(), mask[:, 0]
    out = model(torch.cat([clip, images], 1), T, text, mask, num_images=3)
    first = (text[:, 0], mask[:, 0]) if own else (text, mask)
    assert torch.equal(out[:, :4], model(clip, T, *first))
    for index in range(3):
        captions = (text[:, 1 + index], mask[:, 1 + index]) if own else (text, mask)
        image = model(images[:, index : index + 1], T, *captions, temporal=False)
        torch.testing.assert_close(out[:, 4 + index : 5 + index], image, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_who_sees_whom():
    model = tiny()
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    moved = z.clone()
    moved[:, 2] += 1
    apart = (
        (model(moved, T, text, temporal=False) - model(z, T, text, temporal=False)).abs().amax((0, 2, 3, 4))
    )
    assert apart.count_nonzero() == 1, "without time a frame sees itself alone"
    assert ((model(moved, T, text) - model(z, T, text)).abs().amax((0, 2, 3, 4)) > 1e-4).all(), (
        "with time every frame sees every other"
    )
    words = text.clone()
    words[:, 3] += 1
    assert ((model(z, T, words) - model(z, T, text)).abs().amax((0, 2, 3, 4)) > 1e-4).all(), (
        "every frame reads every word"
    )


@torch.no_grad()
def test_frames_know_their_place_unless_there_is_one():
    model = tiny()
    z, text = noise(2, 1, 4, 8, 8), noise(2, 7, 12)
    out = model(z.expand(-1, 4, -1, -1, -1), T, text)
    assert ((out[:, 1:] - out[:, :-1]).abs().amax((0, 2, 3, 4)) > 1e-3).all()
    gated = tiny(gated_time=True)
    out = gated(z.expand(-1, 4, -1, -1, -1), T, text)
    torch.testing.assert_close(out[:, 1:], out[:, :-1], rtol=1e-5, atol=1e-5)
    assert ((out[:, :1] - gated(z, T, text, temporal=False)).abs() > 1e-3).any(), "the temporal blocks run"


@torch.no_grad()
def test_a_stilled_model_is_an_image_model_whatever_its_modulation():
    model = tiny(gated_time=True)
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    assert not torch.equal(model(z, T, text), model(z, T, text, temporal=False))
    model.zero_time_blocks()
    assert torch.equal(model(z, T, text), model(z, T, text, temporal=False))
    plain, gated = tiny(), tiny(gated_time=True)
    gated.load_state_dict({**plain.state_dict(), "time_gate": torch.ones(1)})
    assert torch.equal(gated(z, T, text), plain(z, T, text))


@torch.no_grad()
def test_the_gate_is_no_parameter_and_opens_to_a_model_without_one():
    plain, gated = tiny(), tiny(gated_time=True)
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    assert [name for name, _ in gated.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert gated.state_dict().keys() - plain.state_dict().keys() == {"time_gate"}
    outs = []
    for share in (0.0, 0.5, 1.0):
        gated.open_gate(share)
        assert gated.opened == float(gated.state_dict()["time_gate"]) == share
        outs.append(gated(z, T, text))
    assert torch.equal(outs[2], plain(z, T, text))
    assert plain.opened == 1.0
    assert all((outs[1] - out).abs().max() > 1e-3 for out in (outs[0], outs[2]))
    with pytest.raises(InputError, match=r"gate must be between 0 and 1, got 1.5"):
        gated.open_gate(1.5)
    with pytest.raises(InputError, match="no temporal gate"):
        plain.open_gate(1.0)


@pytest.mark.filterwarnings("ignore")  # of the tracer, about itself
def test_a_compiled_model_is_not_compiled_again_when_its_gate_opens():
    model, traced = tiny(gated_time=True), []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    counts = []
    for share in (0.0, 0.25, 0.5, 1.0):
        model.open_gate(share)
        out = compiled(z, T, text)
        out.square().mean().backward()
        assert torch.equal(out, model(z, T, text)), "the gate of the trace is the model's"
        counts.append(len(traced))
    assert counts[0] > 0
    assert set(counts) == {counts[0]}


def test_a_fresh_model_predicts_zero_and_every_parameter_learns():
    model = LatteText(replace(TINY, gated_time=True))
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    assert not model(z, T, text).any()
    wake(model, 0.05)
    model(z, T, text, mask_of(3, 7)).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_gradient_checkpointing_changes_nothing():
    model = tiny()
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    grads = []
    for model.gradient_checkpointing in (False, True, "pairs"):
        model.zero_grad()
        model(z, T, text, mask_of(3, 7)).square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, *others in zip(*grads, strict=True):
        for other in others:
            torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-6)


def test_trains_on_clips_with_images():
    model = tiny()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    z, text = noise(2, 6, 4, 8, 8), noise(2, 3, 7, 12)
    losses = []
    for _ in range(3):
        loss = (model(z, T, text, num_images=2)[:, :, :4] - z).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_save_and_load(tmp_path):
    model = tiny(latent_size=(8, 12), table_size=8, gated_time=True)
    model.save_pretrained(tmp_path)
    loaded = LatteText.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert json.loads((tmp_path / "config.json").read_text())["caption_channels"] == 12
    z, text = noise(2, 4, 4, 8, 12), noise(2, 7, 12)
    assert torch.equal(loaded(z, T, text), model(z, T, text))


@torch.no_grad()
def test_matrix_products_in_bfloat16():
    model = tiny()
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    expected = model(z, T, text, mask_of(3, 7))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(z, T, text, mask_of(3, 7))
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)


def test_the_table_is_the_trained_one_stretched():
    spans = TextConfig(latent_size=32).spans
    assert torch.equal(scaled_table(16, 16, spans, 32), spatial_table(16, 16, 32))
    stretched = scaled_table(32, 8, spans, 32).view(32, 8, 32)
    trained = spatial_table(16, 16, 32).view(16, 16, 32)
    torch.testing.assert_close(stretched[::2], trained[:, ::2], rtol=0, atol=1e-6)
    assert TextConfig(latent_size=(32, 64), table_size=128).spans == (32, 32)
    assert TextConfig(latent_size=(32, 192)).spans == (16, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "XXL"}, "did you mean 'XL'"),
        ({"depth": 0}, "from 1 to"),
        ({"width": 30, "heads": 2}, "must be a multiple of 4 .*; the nearest is 32"),
        ({"heads": 5}, "the next smaller divisor is 4"),
        ({"latent_size": 7}, "the nearest is 8"),
        ({"table_size": 7}, "the nearest is 8"),
        ({"caption_channels": 0}, "from 1 to"),
        ({"caption_channels": 10**9}, "from 1 to"),
        ({"depth": 10_000_000}, "from 1 to"),
        ({"table_size": 10**9}, "from 1 to"),
    ],
)
def test_wrong_configurations_state_the_rule_and_what_to_do(changes, message):
    with pytest.raises(InputError, match=message) as error:
        replace(TINY, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("z", "text", "mask", "images", "message"),
    [
        ((2, 4, 3, 8, 8), (2, 7, 12), None, 0, "model takes 4"),
        ((2, 4, 4, 8, 9), (2, 7, 12), None, 0, "the nearest is 8"),
        ((2, 4, 4, 8, 8), (2, 7, 12), None, 4, "at least one"),
        ((2, 4, 4, 8, 8), (2, 7, 13), None, 0, "model takes 12"),
        ((2, 4, 4, 8, 8), (3, 7, 12), None, 0, "2 clips"),
        ((2, 4, 4, 8, 8), (7, 12), None, 0, r"need \(b l k\)"),
        ((2, 6, 4, 8, 8), (2, 2, 7, 12), None, 2, "2 images each"),
        ((2, 4, 4, 8, 8), (2, 7, 12), (4, 4, 4), 0, "mask has shape"),
        ((2, 4, 4, 8, 8), (2, 7, 12), (7, 0), 0, "end token"),
        ((3, 4, 4, 8, 8), (3, 7, 12), None, 0, "t has shape"),
    ],
)
def test_wrong_calls_state_the_rule_and_what_to_do(z, text, mask, images, message):
    with pytest.raises(InputError, match=message) as error:
        tiny()(noise(*z), T, noise(*text), None if mask is None else mask_of(*mask), images)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_more_frames_than_trained_are_announced():
    with pytest.warns(UserWarning, match="6 latent frames are more than the 4"):
        tiny()(noise(2, 6, 4, 8, 8), T, noise(2, 7, 12))
    model = tiny()
    model.trained_on([(6, 8, 8)])
    model(noise(2, 6, 4, 8, 8), T, noise(2, 7, 12))  # warnings are errors here


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_agrees_with_the_cpu():
    model = tiny()
    z, text, mask = noise(2, 4, 4, 8, 8), noise(2, 7, 12), mask_of(3, 7)
    expected = model(z, T, text, mask)
    found = model.cuda()(z.cuda(), T.cuda(), text.cuda(), mask.cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_pooled_caption_reaches_the_temporal_blocks():
    """Without cross-attention in the spatial blocks only the pooled caption can make a difference."""
    z, first, second = noise(2, 4, 4, 8, 8), noise(2, 7, 12), noise(2, 7, 12, seed=9)
    for pooled in (False, True):
        model = tiny(pooled_caption=pooled)
        for block in model.space_blocks:
            block.cross.proj.weight.zero_()
        same = torch.equal(model(z, T, first), model(z, T, second))
        assert same != pooled


@torch.no_grad()
def test_the_pooled_caption_is_the_mean_of_its_valid_tokens_and_starts_at_nothing():
    text, mask = noise(1, 2, 5, 32), mask_of(2, 5, width=5)[None]
    pooled = PooledCaption(32)
    expected = torch.stack((text[0, 0, :2].mean(0), text[0, 1].mean(0)))[None]  # (1 2 d)
    torch.testing.assert_close(pooled(text, mask), pooled.linear(expected))
    torch.testing.assert_close(pooled(text, None), pooled.linear(text.mean(2)))
    plain, model = LatteText(TINY), LatteText(replace(TINY, pooled_caption=True))
    assert model.state_dict().keys() - plain.state_dict().keys() == {
        "pooled.linear.weight",
        "pooled.linear.bias",
    }
    assert not model.pooled.linear.weight.any()


@torch.no_grad()
def test_captions_of_images_are_pooled_each_for_itself():
    model = tiny(pooled_caption=True)
    z, text = noise(1, 6, 4, 8, 8), noise(1, 3, 7, 12)  # 4 frames and 2 images, a caption for each of the 3
    out = model(z, T[:1], text, num_images=2)
    torch.testing.assert_close(out[:, :4], model(z[:, :4], T[:1], text[:, 0]), rtol=1e-4, atol=1e-5)
    for image in (1, 2):
        alone = model(z[:, 3 + image : 4 + image], T[:1], text[:, image], temporal=False)
        torch.testing.assert_close(out[:, 3 + image : 4 + image], alone, rtol=1e-4, atol=1e-5)


def test_a_pooled_caption_is_stored_only_where_there_is_one_and_has_no_place_elsewhere():
    assert "pooled_caption" not in TINY.stored()
    pooled = replace(TINY, pooled_caption=True)
    assert pooled.stored()["pooled_caption"] is True
    with pytest.raises(InputError, match=r"model.pooled_caption is True, but diffusers has no place for it"):
        in_diffusers(LatteText(pooled), 4)
