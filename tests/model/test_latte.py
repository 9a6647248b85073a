# SPDX-License-Identifier: Apache-2.0
"""The whole model: against slow loops, against diffusers' DiT, and the laws it must follow."""

import itertools
import json
import time
from dataclasses import replace

import pytest
import torch
from reference.model import latte as slow_latte
from support import noise, wake

from latte.checks import InputError
from latte.model.conditioning import CONDITIONINGS, drop_labels
from latte.model.latte import SIZES, Latte, ModelConfig
from latte.model.patches import PATCHES
from latte.model.positions import TEMPORAL_POSITIONS, spatial_table, temporal_table
from latte.model.variants import VARIANTS
from latte.runtime import generator

TINY = ModelConfig(
    depth=4, width=16, heads=2, num_frames=4, latent_size=(4, 6), latent_channels=3, num_classes=5
)
GRID = list(itertools.product(VARIANTS, PATCHES, CONDITIONINGS, TEMPORAL_POSITIONS))


def tiny(variant=1, patch="uniform", conditioning="s_adaln", position="absolute", **changes) -> Latte:
    config = replace(
        TINY, variant=variant, patch=patch, conditioning=conditioning, temporal_position=position, **changes
    )
    return wake(Latte(config), 0.2)


@pytest.mark.parametrize(("variant", "patch", "conditioning", "position"), GRID)
@torch.no_grad()
def test_agrees_with_slow_loops(variant, patch, conditioning, position):
    model = tiny(variant, patch, conditioning, position).double()
    z, labels = noise(1, 6, 3, 4, 6, dtype=torch.float64), torch.tensor([[2, 0, 4]])
    fast = model(z, torch.tensor([321]), labels, num_images=2)[0]
    slow = slow_latte(model.config, model.state_dict(), z[0], 321, [2, 0, 4], num_images=2)
    # the timestep features and the position tables are float32 by design, so they bound the agreement
    assert fast.std() > 0.1
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_agrees_with_slow_loops_to_rounding(variant, monkeypatch):
    """With the two float32 tables widened, the rest agrees to 1e-10."""
    import latte.model.latte as latte_module
    import latte.model.positions as positions

    monkeypatch.setattr(latte_module, "spatial_table", lambda r, c, d: wide_spatial(positions, r, c, d))
    monkeypatch.setattr(positions, "temporal_table", lambda f, d: positions.sincos(torch.arange(f), d))
    for position in TEMPORAL_POSITIONS:
        model = tiny(variant, position=position).double()
        z = noise(1, 4, 3, 4, 6, dtype=torch.float64)
        fast = model(z, torch.tensor([0]), torch.tensor([1]))[
            0
        ]  # t = 0: cosines 1 and sines 0 are exact in float32
        slow = slow_latte(model.config, model.state_dict(), z[0], 0, [1])
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-10)


def wide_spatial(positions, rows, columns, width):
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.cat(
        [positions.sincos(x.flatten(), width // 2), positions.sincos(y.flatten(), width // 2)], dim=1
    )


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_one_frame_through_the_spatial_path_is_diffusers_dit():
    """Independent oracle: a single-block DiT of diffusers with our weights copied in."""
    from diffusers import DiTTransformer2DModel

    d, heads, classes = 32, 2, 5
    expected = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=d // heads,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_eps=1e-6,
    ).eval()
    ours = wake(
        Latte(ModelConfig(depth=4, width=d, heads=heads, variant=2, latent_size=8, num_classes=classes)), 0.1
    ).eval()
    ours.blocks = ours.blocks[:2]  # the spatial half
    their = expected.state_dict()
    for i, block in enumerate(ours.blocks):
        # diffusers gives every block its own timestep and label embedding
        name = f"transformer_blocks.{i}"
        actual = dict(block.named_parameters())
        q, k, v = actual["branches.space.qkv.weight"].chunk(3)
        qb, kb, vb = actual["branches.space.qkv.bias"].chunk(3)
        pairs = {
            "attn1.to_q.weight": q,
            "attn1.to_k.weight": k,
            "attn1.to_v.weight": v,
            "attn1.to_q.bias": qb,
            "attn1.to_k.bias": kb,
            "attn1.to_v.bias": vb,
            "attn1.to_out.0.weight": actual["branches.space.proj.weight"],
            "attn1.to_out.0.bias": actual["branches.space.proj.bias"],
            "ff.net.0.proj.weight": actual["branches.mlp.fc1.weight"],
            "ff.net.0.proj.bias": actual["branches.mlp.fc1.bias"],
            "ff.net.2.weight": actual["branches.mlp.fc2.weight"],
            "ff.net.2.bias": actual["branches.mlp.fc2.bias"],
            "norm1.linear.weight": actual["modulation.linear.weight"],
            "norm1.linear.bias": actual["modulation.linear.bias"],
            "norm1.emb.timestep_embedder.linear_1.weight": ours.time_embedding.fc1.weight,
            "norm1.emb.timestep_embedder.linear_1.bias": ours.time_embedding.fc1.bias,
            "norm1.emb.timestep_embedder.linear_2.weight": ours.time_embedding.fc2.weight,
            "norm1.emb.timestep_embedder.linear_2.bias": ours.time_embedding.fc2.bias,
            "norm1.emb.class_embedder.embedding_table.weight": ours.label_embedding.table.weight,
        }
        for key, value in pairs.items():
            their[f"{name}.{key}"].copy_(value)
    their["pos_embed.proj.weight"].copy_(ours.patch.proj.weight)
    their["pos_embed.proj.bias"].copy_(ours.patch.proj.bias)
    their["proj_out_1.weight"].copy_(ours.final_modulation.linear.weight)
    their["proj_out_1.bias"].copy_(ours.final_modulation.linear.bias)
    their["proj_out_2.weight"].copy_(ours.final_linear.weight)
    their["proj_out_2.bias"].copy_(ours.final_linear.bias)
    expected.load_state_dict(their)
    for block in (
        expected.transformer_blocks
    ):  # diffusers spreads the 128 frequencies over 127 steps, DiT's own code over 128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    z, t, label = noise(2, 4, 8, 8), torch.tensor([7, 901]), torch.tensor([3, 1])
    expected = expected(z, timestep=t, class_labels=label).sample
    ours.time_enters = 99
    torch.testing.assert_close(ours(z[:, None], t, label)[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_a_fresh_model_predicts_zero_and_learns_from_the_first_step():
    model = Latte(TINY)
    out = model(noise(1, 4, 3, 4, 6), torch.tensor([5]), torch.tensor([1]))
    assert out.abs().max() == 0
    (out - 1).square().sum().backward()
    assert model.final_linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_frame_reaches_every_frame(variant):
    model = tiny(variant)
    z, t, label = noise(1, 4, 3, 4, 6), torch.tensor([500]), torch.tensor([1])
    base = model(z, t, label)
    for source in range(4):
        moved = z.clone()
        moved[:, source, :, 0, 0] += 1
        reached = (model(moved, t, label) - base).abs().amax((0, 2, 3, 4))
        assert (reached > 0).all()


@torch.no_grad()
def test_spatial_blocks_never_mix_frames():
    model = tiny(2)
    model.blocks = model.blocks[:2]  # spatial half of variant 2
    z = noise(1, 4, 3, 4, 6)
    base = model(z, torch.tensor([5]))
    z[:, 2] += 1
    changed = (model(z, torch.tensor([5])) - base).abs().amax((0, 2, 3, 4)) > 0
    assert changed.tolist() == [False, False, True, False]


@pytest.mark.parametrize(("variant", "patch", "conditioning", "position"), GRID)
@torch.no_grad()
def test_images_leave_the_clip_untouched(variant, patch, conditioning, position):
    model = tiny(variant, patch, conditioning, position)
    clip, images, t = noise(2, 4, 3, 4, 6), noise(2, 3, 3, 4, 6, seed=1), torch.tensor([500, 20])
    labels = torch.tensor([[0, 1, 2, 3], [4, 3, 2, -1]])
    joint = model(torch.cat([clip, images], dim=1), t, labels, num_images=3)
    assert torch.equal(joint[:, :4], model(clip, t, labels[:, 0]))
    order = torch.tensor([2, 0, 1])
    reordered = torch.cat([labels[:, :1], labels[:, 1:][:, order]], dim=1)
    shuffled = model(torch.cat([clip, images[:, order]], dim=1), t, reordered, num_images=3)
    assert torch.equal(shuffled[:, :4], joint[:, :4])
    torch.testing.assert_close(shuffled[:, 4:], joint[:, 4:][:, order], rtol=1e-4, atol=1e-5)
    assert (joint[:, 4] - joint[:, 5]).abs().max() > 1e-3


@torch.no_grad()
def test_variant_2_is_variant_1_with_its_blocks_reordered():
    one, two = tiny(1), tiny(2)
    state = one.state_dict()
    order = [0, 2, 1, 3]  # spatial blocks first
    renamed = {k: v for k, v in state.items() if not k.startswith("blocks.")}
    for new, old in enumerate(order):
        renamed |= {
            k.replace(f"blocks.{old}.", f"blocks.{new}."): v
            for k, v in state.items()
            if k.startswith(f"blocks.{old}.")
        }
    two.load_state_dict(renamed)
    one.blocks = torch.nn.ModuleList(one.blocks[i] for i in order)
    one.time_enters = 2
    z, t, label = noise(1, 4, 3, 4, 6), torch.tensor([77]), torch.tensor([4])
    assert torch.equal(one(z, t, label), two(z, t, label))


@torch.no_grad()
def test_rotary_depends_on_differences_only():
    from latte.model.positions import RotaryTime, rotate_pairs, sincos

    q, k = (noise(1, 1, 1, 8, seed=seed, dtype=torch.float64) for seed in (0, 1))
    sin, cos = sincos(torch.arange(40), 8).chunk(2, dim=-1)

    def score(i: int, j: int) -> float:
        query = rotate_pairs(q, sin[i : i + 1], cos[i : i + 1])
        key = rotate_pairs(k, sin[j : j + 1], cos[j : j + 1])
        return (query * key).sum().item()

    assert score(3, 7) == pytest.approx(score(30, 34), abs=1e-12)
    assert abs(score(3, 7) - score(3, 9)) > 1e-3
    with pytest.raises(InputError, match="even"):
        RotaryTime(5)


@torch.no_grad()
def test_any_size_and_length_at_call_time():
    model, rotary = tiny(), tiny(position="rotary")
    t = torch.tensor([3])
    assert model(noise(1, 2, 3, 2, 4), t).shape == (1, 2, 6, 2, 4)
    with pytest.warns(UserWarning, match="9 latent frames are more than the 4"):
        assert model(noise(1, 9, 3, 4, 6), t).shape == (1, 9, 6, 4, 6)
    assert rotary(noise(1, 9, 3, 4, 6), t).shape == (1, 9, 6, 4, 6)
    with pytest.warns(UserWarning, match="8 x 6 are larger than the 4 x 6"):
        model(noise(1, 4, 3, 8, 6), t)


@torch.no_grad()
def test_shapes_of_training_extend_the_positions_without_a_warning_and_without_a_change():
    model = tiny()
    t = torch.tensor([3])
    z = noise(1, 9, 3, 8, 4)
    with pytest.warns(UserWarning, match="table is extended"):
        expected = model(z, t)
    model.trained_on([(9, 2, 4), (1, 8, 2)])
    assert model.trained_extent == (9, 8, 6), "the most of each, the shape of the configuration among them"
    assert torch.equal(model(z, t), expected), "warnings are errors here"
    with pytest.warns(UserWarning, match="10 latent frames are more than the 9"):
        model(noise(1, 10, 3, 4, 6), t)
    with pytest.warns(UserWarning, match="4 x 8 are larger than the 8 x 6"):
        model(noise(1, 4, 3, 4, 8), t)


def test_a_position_is_the_same_in_clips_of_every_shape():
    small = spatial_table(4, 6, 16).reshape(4, 6, 16)
    assert torch.equal(spatial_table(9, 8, 16).reshape(9, 8, 16)[:4, :6], small)
    assert torch.equal(temporal_table(9, 16)[:4], temporal_table(4, 16))


@torch.no_grad()
def test_a_clip_does_not_depend_on_its_batch():
    """In float64, over 40 seeds.

    What float32 kernels round differently for another batch size is no part of the law.
    """
    model = tiny().double()
    t, label = torch.tensor([1, 500, 999]), torch.tensor([0, 1, -1])
    errors = []
    for seed in range(40):
        z = noise(3, 4, 3, 4, 6, seed=seed, dtype=torch.float64)
        together = model(z, t, label)
        for i in range(3):
            alone = model(z[i : i + 1], t[i : i + 1], label[i : i + 1])[0]
            errors.append(float((alone - together[i]).abs().max() / together[i].abs().max()))
    assert len(errors) == 120
    assert max(errors) < 1e-12


@torch.no_grad()
def test_null_class_is_the_last_row_minus_one_and_none():
    model = tiny()
    z, t = noise(1, 4, 3, 4, 6), torch.tensor([9])
    null = model(z, t)
    assert torch.equal(null, model(z, t, torch.tensor([-1])))
    assert torch.equal(null, model(z, t, torch.tensor([5])))
    assert not torch.equal(null, model(z, t, torch.tensor([0])))


def test_label_dropout_is_all_or_none_per_clip_and_at_its_rate():
    labels = torch.arange(4000).reshape(1000, 4)
    dropped = drop_labels(labels, 0.1, generator(0, "drop"))
    gone = (dropped == -1).all(1)
    assert ((dropped == labels).all(1) | gone).all()
    assert 70 < gone.sum() < 130
    assert torch.equal(dropped, drop_labels(labels, 0.1, generator(0, "drop")))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stages", [True, "pairs"])
def test_gradient_checkpointing_changes_nothing(variant, stages):
    model = tiny(variant)
    z, t = noise(2, 4, 3, 4, 6), torch.tensor([3, 4])
    model(z, t).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing = stages
    model(z, t).square().sum().backward()
    for a, b in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-5, atol=1e-5)


COMBINATIONS = [(*choices, images) for choices in GRID if choices[0] != "joint" for images in (0, 2)]
OFTEN = [choices for number, choices in enumerate(COMBINATIONS) if number.bit_count() % 2 == 0]


def test_every_three_choices_occur_together_in_the_combinations_that_are_always_tested():
    for three in itertools.combinations(range(5), 3):
        all_of_them = {tuple(choices[k] for k in three) for choices in COMBINATIONS}
        assert {tuple(choices[k] for k in three) for choices in OFTEN} == all_of_them


@pytest.mark.parametrize(
    ("variant", "patch", "conditioning", "position", "images"),
    [pytest.param(*c, marks=() if c in OFTEN else pytest.mark.nightly) for c in COMBINATIONS],
)
def test_all_64_combinations_train_one_step_save_and_load(
    variant, patch, conditioning, position, images, tmp_path
):
    model = tiny(variant, patch, conditioning, position)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    z, t = noise(2, 4 + images, 3, 4, 6), torch.tensor([3, 700])
    labels = torch.zeros((2, 1 + images) if images else 2, dtype=torch.long)
    before = model(z, t, labels, num_images=images)[:, :, :3].square().mean()
    before.backward()
    optimiser.step()
    assert model(z, t, labels, num_images=images)[:, :, :3].square().mean() < before
    model.save_pretrained(tmp_path)
    loaded = Latte.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(z, t, labels, num_images=images), model(z, t, labels, num_images=images))
    assert json.loads((tmp_path / "config.json").read_text())["variant"] == variant


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_table_4(size):
    depth, width, heads = ModelConfig(size=size).dimensions
    assert (depth, width, heads) == {
        "S": (12, 384, 6),
        "B": (12, 768, 12),
        "L": (24, 1024, 16),
        "XL": (28, 1152, 16),
    }[size]


def test_depth_follows_the_parameter_budget():
    assert [ModelConfig(variant=v).dimensions[0] for v in (1, 2, 3, 4)] == [28, 28, 23, 23]
    assert [ModelConfig(size=s, variant=3).dimensions[0] for s in SIZES] == [10, 10, 20, 23]
    assert ModelConfig(variant=3, depth=7).dimensions[0] == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "XXL"}, "not one of S, B, L, XL; did you mean 'XL'"),
        ({"variant": 5}, "not one of 1, 2, 3, 4, joint"),
        ({"patch": "uniforn"}, "did you mean 'uniform'"),
        ({"conditioning": "adaln"}, "s_adaln"),
        ({"temporal_position": "rotery"}, "did you mean 'rotary'"),
        ({"depth": 5}, "multiple of 2; the nearest is 4"),
        ({"width": 18}, "must be a multiple of 4 .*; the nearest is 16"),
        ({"width": 32, "heads": 5}, "must divide model.width = 32; the next smaller divisor is 4"),
        (
            {"variant": 4, "width": 24, "heads": 3},
            "splits the heads between space and time; the nearest valid number is 4",
        ),
        ({"latent_size": 33}, "multiple of model.patch_size = 2; the nearest is 32"),
        ({"patch": "compression", "tube": 3}, "multiple of model.tube = 3; the nearest is 15"),
        ({"num_classes": 0}, "from 1 to"),
        ({"class_dropout": 1.0}, r"must be in \[0, 1\), got 1.0"),
        ({"num_frames": 0}, "from 1 to"),
        ({"depth": 0}, "from 1 to"),
        ({"width": 2.5}, "an integer from 1 to"),
    ],
)
def test_wrong_configurations_state_the_rule_and_what_to_do(changes, message):
    with pytest.raises(InputError, match=message) as error:
        ModelConfig(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"depth": 10_000_000},
        {"depth": 10**30},
        {"width": 10**9},
        {"width": 2**40, "heads": 2**40},
        {"heads": 10**12},
        {"num_frames": 10**9},
        {"latent_size": 10**9},
        {"latent_size": (8, 10**9)},
        {"latent_channels": 10**9},
        {"num_classes": 10**12},
        {"patch_size": 10**9},
        {"tube": 10**9, "patch": "compression"},
        {"depth": 1000, "width": 65_536, "heads": 64},
        {"width": 65_536, "heads": 64, "latent_size": 8192, "depth": 2},
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(changes):
    start = time.perf_counter()
    with pytest.raises(InputError, match="model") as error:
        ModelConfig(**{"num_classes": 5, **changes})
    assert time.perf_counter() - start < 1
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_wrong_calls_state_the_rule_and_what_to_do():
    model, t = tiny(), torch.tensor([1])
    with pytest.raises(InputError, match="takes 3"):
        model(noise(1, 4, 4, 4, 6), t)
    with pytest.raises(InputError, match=r"5, but must be a multiple of .*; the nearest is 4"):
        model(noise(1, 4, 3, 5, 6), t)
    with pytest.raises(InputError, match="classes 0 to 4"):
        model(noise(1, 4, 3, 4, 6), t, torch.tensor([6]))
    with pytest.raises(InputError, match="1 images each need"):
        model(noise(1, 4, 3, 4, 6), t, torch.zeros(1, 3, dtype=torch.long), num_images=1)
    with pytest.raises(InputError, match="at least one"):
        model(noise(1, 4, 3, 4, 6), t, num_images=4)
    with pytest.raises(InputError, match="unconditional"):
        tiny(num_classes=None)(noise(1, 4, 3, 4, 6), t, torch.tensor([1]))
    with pytest.raises(InputError, match=r"multiple of model\.tube = 2"):
        tiny(patch="compression")(noise(1, 3, 3, 4, 6), t)
    with pytest.raises(InputError, match="even"):
        tiny(position="rotary", width=20, heads=4)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_agrees_with_the_cpu(variant):
    model = tiny(variant)
    z, t, label = noise(2, 4, 3, 4, 6), torch.tensor([3, 900]), torch.tensor([0, 1])
    expected = model(z, t, label)
    torch.testing.assert_close(
        model.cuda()(z.cuda(), t.cuda(), label.cuda()).cpu(), expected, rtol=1e-3, atol=1e-4
    )
