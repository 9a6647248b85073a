# SPDX-License-Identifier: Apache-2.0
"""Starting from PixArt-alpha: at step 0 every frame is exactly the image of PixArt."""

import json
from dataclasses import replace

import pytest
import torch
from support import noise

from latte.checks import InputError
from latte.interop.coverage import translate
from latte.interop.diffusers import TABLE
from latte.interop.load import load_external
from latte.interop.pixart import from_pixart, init_from_pixart
from latte.model.text import LatteText, TextConfig
from latte.runtime import generator

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": 12,
}
T = torch.tensor([3, 777])


def pixart(**changes):
    from diffusers import PixArtTransformer2DModel

    model, draw = PixArtTransformer2DModel(**{**SIZES, **changes}), generator("pixart")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    pixart().save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


@torch.no_grad()
def test_at_step_0_every_frame_is_pixarts_picture(folder):
    from diffusers import PixArtTransformer2DModel

    model, _ = from_pixart(folder, num_frames=4)
    z, text, mask = noise(2, 4, 4, 8, 8), noise(2, 7, 12), torch.arange(7) < torch.tensor([[3], [7]])
    clip = model(z, T, text, mask)
    assert torch.equal(clip, model(z, T, text, mask, temporal=False)), "difference 0 to the image model"
    external = PixArtTransformer2DModel.from_pretrained(folder)
    pictures = torch.stack(
        [external(z[:, f], text, T, encoder_attention_mask=mask).sample for f in range(4)], 1
    )
    assert pictures.std() > 0.1
    assert float((clip - pictures).abs().max()) < 1e-5 * float(pictures.abs().max())


@torch.no_grad()
def test_without_the_gate_only_the_table_moves_the_frames(folder):
    model, _ = from_pixart(folder, num_frames=4, gated_time=False)
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    assert not torch.equal(model(z, T, text), model(z, T, text, temporal=False))
    assert torch.equal(model(z[:, :1], T, text), model(z[:, :1], T, text, temporal=False))


def test_then_the_new_blocks_learn(folder):
    model, report = from_pixart(folder, num_frames=4)
    optimiser = torch.optim.SGD(model.parameters(), 1e-2)
    z, text = noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        optimiser.zero_grad()
        (model(z, T, text)[:, :, :4] - z.roll(1, 1)).square().mean().backward()
        optimiser.step()
    frozen = [name for name, parameter in model.named_parameters() if torch.equal(parameter, start[name])]
    assert [name for name in frozen if name in report.missing] == []
    assert (model(z, T, text) - model(z, T, text, temporal=False)).abs().max() > 1e-4


def test_what_is_new_is_reported_and_a_function_of_the_seed(folder):
    (one, report), (same, _), (other, _) = (
        from_pixart(folder, num_frames=4, seed=seed) for seed in (0, 0, 1)
    )
    assert len(report.used) == len(report.used + report.unexpected + list(report.mismatched))
    assert {name.split(".")[0] for name in report.missing} == {"time_blocks", "time_gate"}
    assert len(report.missing) == 2 * 13 + 1
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.time_blocks[0].attention.q.weight, other.time_blocks[0].attention.q.weight)


def test_every_published_name_has_its_place():
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        external = PixArtTransformer2DModel(sample_size=64, caption_channels=4096).state_dict()
        ours = LatteText(TextConfig()).state_dict()
    names = translate(external, TABLE, "to_ours")
    assert len(external) == len(names) == 603
    assert sum(tensor.numel() for tensor in external.values()) == 610_856_096
    assert all(ours[names[name]].shape == tensor.shape for name, tensor in external.items())
    new = ours.keys() - set(names.values())
    assert (len(new), sum(ours[name].numel() for name in new)) == (364, 446_390_784)


def test_the_loader_refuses_it_with_the_way_to_start_from_it(folder):
    with pytest.raises(
        InputError, match=r"27 tensors missing.*start a run from it with train.init.*'time_\*'"
    ):
        load_external(folder)
    loaded = load_external(folder, allow_missing=["time_*"])
    assert (loaded.layout, len(loaded.report.missing)) == ("PixArt-alpha", 27)
    model, z, text = loaded.model(), noise(2, 4, 4, 8, 8), noise(2, 7, 12)
    with torch.no_grad():
        assert model(z, T, text).std() > 0.1
        assert torch.equal(model(z, T, text), model(z, T, text, temporal=False)), "what is new has no say"


def test_fills_a_model_of_its_own_size_only(folder):
    config = TextConfig(
        depth=2, width=32, heads=2, latent_size=(4, 8), table_size=8, caption_channels=12, gated_time=True
    )
    init_from_pixart(LatteText(config), folder)
    for changes, message in [
        ({"width": 64}, "model.width is 64, but the PixArt at .* has 32; set model.width=32"),
        ({"depth": 3}, "model.depth is 3, but"),
        ({"heads": 4}, "model.heads is 4, but"),
        ({"table_size": None}, "set table_size=8 .text.table_size in a run"),
        (
            {"caption_channels": 13},
            "model.caption_channels is 13, but the PixArt at .* has 12; use the text encoder",
        ),
        ({"learn_sigma": False}, "model.learn_sigma is False, but the PixArt at .* has True"),
        ({"patch_size": 4}, "model.patch_size is 4, but"),
        ({"latent_channels": 3}, "model.latent_channels is 3, but"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            init_from_pixart(LatteText(replace(config, **changes)), folder)
        assert "\n" not in str(error.value)


def test_the_model_of_1024_pixels_and_other_networks_are_refused(tmp_path):
    pixart(use_additional_conditions=True, attention_head_dim=18, cross_attention_dim=36).save_pretrained(
        tmp_path / "large"
    )
    with pytest.raises(InputError, match="resolution and aspect ratio"):
        from_pixart(tmp_path / "large")
    pixart(interpolation_scale=2).save_pretrained(tmp_path / "sigma")
    with pytest.raises(InputError, match="interpolation_scale"):
        from_pixart(tmp_path / "sigma")
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match=r"not PixArt-alpha \(first tensors: weight\)"):
        from_pixart(tmp_path / "other.pt")


def test_a_bare_file_needs_the_heads(folder, tmp_path):
    (folder / "diffusion_pytorch_model.safetensors").rename(tmp_path / "pixart.safetensors")
    with pytest.raises(InputError, match="give heads="):
        from_pixart(tmp_path / "pixart.safetensors")
    model, _ = from_pixart(tmp_path / "pixart.safetensors", heads=2)
    assert model.config.grid_size == (64, 64)  # the published model's, when no config.json says otherwise
    assert json.loads((folder / "config.json").read_text())["sample_size"] == 8
