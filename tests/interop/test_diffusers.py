# SPDX-License-Identifier: Apache-2.0
"""LatteT2V folders: diffusers loads what we write, we load what diffusers writes, bit for bit and with the
same output.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import noise, wake

from latte.checks import InputError
from latte.interop.coverage import translate
from latte.interop.diffusers import TABLE, diffusers_config, diffusers_state, save_diffusers
from latte.interop.load import load_external
from latte.model.text import LatteText, TextConfig

TINY = TextConfig(depth=2, width=32, heads=2, num_frames=4, latent_size=8, caption_channels=12)
T = torch.tensor([3, 777])


@pytest.fixture
def ours():
    return wake(LatteText(TINY), 0.1).eval()


@torch.no_grad()
def test_diffusers_loads_our_folder_and_gives_the_same_output(ours, tmp_path):
    from diffusers import LatteTransformer3DModel

    save_diffusers(ours, tmp_path / "transformer")
    external, info = LatteTransformer3DModel.from_pretrained(
        tmp_path / "transformer", output_loading_info=True
    )
    assert not any(info.values()), info
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    expected = external.eval()(z.transpose(1, 2), T, text).sample.transpose(1, 2)
    assert float((ours(z, T, text) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_round_trip_bit_for_bit_both_ways(ours, tmp_path):
    from diffusers import LatteTransformer3DModel

    external = LatteTransformer3DModel(
        **{key: value for key, value in diffusers_config(TINY).items() if key[0] != "_"}
    )
    external.save_pretrained(tmp_path / "theirs")
    loaded = load_external(tmp_path / "theirs")
    assert (loaded.layout, loaded.config, loaded.report.dropped) == ("LatteT2V", TINY, {})
    save_diffusers(loaded.model(), tmp_path / "again")
    first, second = (
        load_file(tmp_path / place / "diffusion_pytorch_model.safetensors") for place in ("theirs", "again")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    save_diffusers(ours, tmp_path / "again")
    back = load_external(tmp_path / "again")
    assert back.state_dict.keys() == ours.state_dict().keys()
    assert all(torch.equal(back.state_dict[name], tensor) for name, tensor in ours.state_dict().items())


def test_every_name_of_the_published_size():
    from diffusers import LatteTransformer3DModel

    with torch.device("meta"):
        model = LatteText(TextConfig())
        external = LatteTransformer3DModel(
            **{key: value for key, value in diffusers_config(model.config).items() if key[0] != "_"}
        )
    exported = {name: tensor.shape for name, tensor in diffusers_state(model).items()}
    assert exported == {name: tensor.shape for name, tensor in external.state_dict().items()}
    assert len(exported) == 967
    names = translate(exported, TABLE, "to_ours")
    assert translate(names.values(), TABLE, "to_external") == {ours: name for name, ours in names.items()}


def test_a_pipeline_folder_a_bare_file_and_the_old_buffer(ours, tmp_path):
    save_diffusers(ours, tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text("{}")
    assert load_external(tmp_path).config == TINY
    state = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.save({**state, "caption_projection.y_embedding": torch.zeros(120, 12)}, tmp_path / "t2v.pt")
    loaded = load_external(tmp_path / "t2v.pt", heads=2)
    assert loaded.report.dropped == {"caption_projection.y_embedding": "is a buffer that no prompt uses"}
    assert loaded.config.num_frames == 16  # it does not follow from the tensors
    assert all(torch.equal(loaded.state_dict[name], tensor) for name, tensor in ours.state_dict().items())
    with pytest.raises(InputError, match="give heads="):
        load_external(tmp_path / "t2v.pt")


def test_the_first_uploads_card_with_other_keys(ours, tmp_path):
    save_diffusers(ours, tmp_path / "t")
    card = json.loads((tmp_path / "t" / "config.json").read_text())
    del card["video_length"]
    card |= {
        "_class_name": "Transformer2DModel",
        "attention_type": "default",
        "norm_num_groups": 32,
        "use_linear_projection": False,
    }
    (tmp_path / "t" / "config.json").write_text(json.dumps(card))
    assert load_external(tmp_path / "t").config.num_frames == 16


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norm_type", "ada_norm_zero", "norm_type"),
        ("activation_fn", "geglu", "gelu-approximate"),
        ("norm_eps", 1e-5, "norm_eps"),
        ("num_attention_heads", 3, "3 heads of width 16.*width 32"),
        ("sample_size", "64", "must be an integer of at least 1"),
        ("video_length", -1, "must be an integer of at least 1"),
        ("interpolation_scale", 2, "needs 1"),
        ("num_layers", 3, "num_layers 3, but the tensors have 2; the folder is mixed"),
        ("in_channels", 8, "the tensors have 4"),
        ("out_channels", 4, "the tensors have 8"),
        ("patch_size", 4, "the tensors have 2"),
        ("cross_attention_dim", 64, "the tensors have 32"),
        ("caption_channels", 4096, "the tensors have 12"),
    ],
)
def test_a_card_of_another_network_is_refused(key, value, message, ours, tmp_path):
    save_diffusers(ours, tmp_path / "t")
    card = json.loads((tmp_path / "t" / "config.json").read_text())
    (tmp_path / "t" / "config.json").write_text(json.dumps({**card, key: value}))
    with pytest.raises(InputError, match=message) as error:
        load_external(tmp_path / "t")
    assert "\n" not in str(error.value)


def test_heads_that_contradict_the_card_are_refused_and_so_is_a_folder_without_one(ours, tmp_path):
    save_diffusers(ours, tmp_path / "t")
    assert load_external(tmp_path / "t", heads=2).config == TINY
    with pytest.raises(InputError, match=r"heads is 4, but config.json has 2"):
        load_external(tmp_path / "t", heads=4)
    (tmp_path / "t" / "config.json").unlink()
    for heads in (None, 2):
        with pytest.raises(
            InputError, match=r"no config.json, .* incomplete: fetch it again, or use the weight file itself"
        ):
            load_external(tmp_path / "t", heads=heads)
    file = tmp_path / "t" / "diffusion_pytorch_model.safetensors"
    assert load_external(file, heads=2).config.dimensions == TINY.dimensions
    with pytest.raises(InputError, match="heads must be at least 1, got 0"):
        load_external(file, heads=0)


def test_missing_and_extra_tensors_are_refused_unless_named(ours, tmp_path):
    save_diffusers(ours, tmp_path / "t")
    file = tmp_path / "t" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["pos_embed.cls_token"] = torch.zeros(1)
    del state["temporal_transformer_blocks.1.attn1.to_q.weight"]
    save_file(state, file)
    with pytest.raises(InputError, match=r"1 tensors missing.*1 tensors unexpected"):
        load_external(tmp_path / "t")
    loaded = load_external(
        tmp_path / "t", allow_missing=["time_blocks.1.*"], allow_unexpected=["pos_embed.cls_token"]
    )
    assert loaded.report.missing == ["time_blocks.1.attention.q.weight"]
    assert loaded.report.unexpected == ["pos_embed.cls_token"]
    assert loaded.model().time_blocks[1].attention.q.weight.std() > 0


def test_exports_only_what_diffusers_can_express_and_only_into_its_own_folder(tmp_path):
    gated = LatteText(
        TextConfig(depth=1, width=32, heads=2, latent_size=8, caption_channels=12, gated_time=True)
    )
    with pytest.raises(InputError, match=r"time_gate is 0, but diffusers has no gate"):
        save_diffusers(gated, tmp_path / "t")
    with torch.no_grad():
        gated.time_gate.fill_(1)
    save_diffusers(gated, tmp_path / "t")
    assert load_external(tmp_path / "t").config.gated_time is False
    wide = LatteText(TextConfig(depth=1, width=32, heads=2, latent_size=(8, 12), caption_channels=12))
    with pytest.raises(InputError, match="square grid"):
        save_diffusers(wide, tmp_path / "u")
    (tmp_path / "t" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"holds other files \(thesis.tex\)"):
        save_diffusers(gated, tmp_path / "t")
    assert (tmp_path / "t" / "thesis.tex").exists()
