# SPDX-License-Identifier: Apache-2.0
"""Starting from DiT: which tensor goes where, what is reported, and that a picture model survives it."""

import pytest
import torch
from reference.official import dit_state, released_latte
from support import noise

from latte.checks import InputError
from latte.interop.dit import MAPPINGS, init_from_dit
from latte.interop.load import load_external
from latte.model.latte import Latte, ModelConfig

PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")


def tiny(**changes) -> Latte:
    return Latte(
        ModelConfig(
            **{
                "depth": 4,
                "width": 32,
                "heads": 4,
                "latent_size": 8,
                "num_frames": 4,
                "num_classes": 5,
                **changes,
            }
        )
    )


@pytest.fixture
def dit(tmp_path):
    def write(**sizes):
        state = dit_state(**sizes)
        torch.save(state, tmp_path / "dit.pt")
        return state, tmp_path / "dit.pt"

    return write


def places(model, state, attention):
    """DiT's block that each of our blocks holds, None for fresh ones; every part of a block must come from
    the same one.
    """
    found = []
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for block, name in zip(model.blocks, attention, strict=True):
        branch = block.branches[name]
        ours = (
            branch.qkv.weight,
            branch.proj.bias,
            block.branches["mlp"].fc1.bias,
            block.branches["mlp"].fc2.weight,
            block.modulation.linear.weight,
        )
        kinds = ("weight", "bias", "bias", "weight", "weight")
        sources = {
            next((k for k in range(depth) if torch.equal(tensor, state[f"blocks.{k}.{part}.{kind}"])), None)
            for tensor, part, kind in zip(ours, PARTS, kinds, strict=True)
        }
        assert len(sources) == 1
        found.append(sources.pop())
    return found


@pytest.mark.parametrize(
    ("variant", "mapping", "depth", "expected"),
    [
        (1, "all", 4, [0, 1, 2, 3]),
        (1, "spatial", 4, [0, None, 2, None]),
        (1, "spatial-first", 4, [0, None, 1, None]),
        (1, "spatial", 2, [0, None, 1, None]),
        (1, "all", 2, [0, 1, None, None]),
        (2, "all", 4, [0, 1, 2, 3]),
        (2, "spatial", 4, [0, 2, None, None]),
        (3, "all", 6, [0, 1, 2, 3]),
        (3, "spatial", 6, [0, 1, 3, 4]),
        ("joint", "spatial", 8, [0, 2, 4, 6]),
    ],
)
def test_where_the_blocks_go(variant, mapping, depth, expected, dit):
    state, path = dit(depth=depth)
    model = tiny(variant=variant)
    report = init_from_dit(model, path, mapping)
    attention = {
        1: ["space", "time"] * 2,
        2: ["space"] * 2 + ["time"] * 2,
        3: ["space"] * 4,
        "joint": ["joint"] * 4,
    }[variant]
    assert places(model, state, attention) == expected
    filled = [k for k in expected if k is not None]
    assert len(report.used) == 10 * len(filled) + 10
    unused = {name for name in state if name.startswith("blocks.") and int(name.split(".")[1]) not in filled}
    assert set(report.dropped) == unused | {"pos_embed", "y_embedder.embedding_table.weight"}
    assert not report.unexpected
    assert not report.mismatched
    assert set(report.used) | set(report.dropped) == set(state), "every tensor of the file is accounted for"
    assert len(report.used) + len(report.missing) == len(model.state_dict()), "and every tensor of the model"
    assert not model.label_embedding.table.weight.any()
    assert report.missing[0] == "label_embedding.table.weight"
    assert "tensors used" in str(report)


def test_the_published_depth_gives_every_second_block():
    assert [MAPPINGS["spatial"](j, 14, 28) for j in range(14)] == list(range(0, 28, 2))
    assert [MAPPINGS["spatial-first"](j, 14, 28) for j in range(14)] == list(range(14))
    assert len({MAPPINGS["spatial"](j, 23, 28) for j in range(23)}) == 23


@torch.no_grad()
def test_one_frame_of_the_joint_variant_is_dit(dit):
    state, path = dit(depth=4)
    model = tiny(variant="joint", temporal_position="rotary")
    init_from_dit(model, path)
    z, t = noise(2, 1, 4, 8, 8), torch.tensor([3, 777])
    state["y_embedder.embedding_table.weight"].zero_()
    expected = released_latte(state, z, t, 4, torch.tensor([0, 0]), picture=True)
    assert float((model(z, t) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_spatial_mapping_keeps_frames_apart_until_trained(dit):
    """The temporal blocks start as the identity, so only DiT's blocks 0 and 2 act."""
    state, path = dit(depth=4)
    model = tiny(temporal_position="rotary", num_classes=None)
    init_from_dit(model, path, "spatial")
    z, t = noise(2, 4, 4, 8, 8), torch.tensor([3, 777])
    kept = {
        name: tensor
        for name, tensor in state.items()
        if not name.startswith(("blocks.1.", "blocks.2.", "blocks.3."))
    }
    kept |= {
        name.replace("blocks.2.", "blocks.1."): tensor
        for name, tensor in state.items()
        if name.startswith("blocks.2.")
    }
    expected = released_latte(kept, z, t, 4, picture=True)
    assert float((model(z, t) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_a_loaded_dit_is_an_unconditional_latte_block_for_block(dit):
    _, path = dit(depth=4)
    loaded = load_external(path, heads=4)
    assert (loaded.layout, loaded.config.num_classes, loaded.report.missing) == ("DiT", None, [])
    assert loaded.report.dropped.keys() == {"pos_embed", "y_embedder.embedding_table.weight"}
    model = tiny(num_classes=None)
    init_from_dit(model, path)
    assert all(torch.equal(tensor, loaded.state_dict[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "sizes", "mapping", "message"),
    [
        ({"width": 64}, {}, "all", "model.width is 64, but the DiT at .* has 32"),
        ({"width": 384, "heads": 4}, {"width": 384}, "all", "a DiT of width 384 has 6; set model.heads=6"),
        ({"variant": 4}, {}, "all", "half of DiT's heads.*only variants 1, 2, 3 and joint"),
        ({"conditioning": "all_tokens"}, {}, "all", "need their modulation"),
        ({}, {}, "spatia", "did you mean 'spatial'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes, sizes, mapping, message, dit):
    model, (_, path) = tiny(**changes), dit(**{"depth": 2, **sizes})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=message) as error:
        init_from_dit(model, path, mapping)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_shapes_are_reported_and_left_alone(dit):
    _, path = dit(depth=4)
    model = tiny(patch="compression", learn_sigma=False)
    before = model.patch.proj.weight.clone()
    report = init_from_dit(model, path)
    assert report.mismatched.keys() == {
        "x_embedder.proj.weight",
        "final_layer.linear.weight",
        "final_layer.linear.bias",
    }
    assert torch.equal(model.patch.proj.weight, before)
    assert "mismatched: x_embedder.proj.weight has shape (32, 4, 2, 2) instead of (32, 4, 2, 2, 2)" in str(
        report
    )


def test_a_table_of_another_order_and_another_network_are_refused(dit, tmp_path):
    state, path = dit(depth=2)
    torch.save({**state, "pos_embed": state["pos_embed"].roll(16, 2)}, path)
    with pytest.raises(InputError, match="pos_embed differs by"):
        init_from_dit(tiny(), path)
    torch.save({"weight": torch.ones(3)}, path)
    with pytest.raises(InputError, match=r"not a DiT \(first tensors: weight\)"):
        init_from_dit(tiny(), path)
