# SPDX-License-Identifier: Apache-2.0
"""From PixArt-alpha to a LattePipeline by command: refused while the gate is opening, and exactly ours in
diffusers once it is open.
"""

import pytest
import torch
from support import noise, wake

from latte.inference.pipeline import VideoPipeline
from tiny import WORDS
from tiny_pipeline import tiny_codec, tiny_t5

pytest.importorskip("transformers", reason="needs the extra t2v")

T = torch.tensor([3, 777])


@pytest.fixture
def words(tmp_path):
    """The smallest run from a random PixArt on an autoencoder's latents and a T5's captions, all of them in
    the working folder.
    """
    from diffusers import PixArtTransformer2DModel

    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "num_layers": 2,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 4,
        "patch_size": 2,
        "caption_channels": 12,
    }
    wake(PixArtTransformer2DModel(**sizes), 0.1).save_pretrained(tmp_path / "pixart")
    tiny_codec("AutoencoderKL", tmp_path / "vae")
    for part in tiny_t5():
        part.save_pretrained(tmp_path / "t5")
    return [
        *WORDS,
        "model.patch_size=2",
        "data.resolution=32",
        "codec.name=kl",
        "codec.path=vae",
        "text.name=t5",
        "text.path=t5",
        "text.length=20",
        "text.gated_time=true",
        "train.init=pixart",
        "train.gate_steps=4",
        "train.lr=0.05",
        "train.ema_decay=0",
    ]


def test_a_run_from_pixart_becomes_a_pipeline_when_its_gate_is_open(latte, words, tmp_path):
    from diffusers import LattePipeline, LatteTransformer3DModel

    ungated = latte(
        "train", "shapes-text", *words, "text.gated_time=false", "train.steps=1", "--out", "other"
    )
    assert (ungated.code, len(ungated.errors)) == (2, 1)
    assert "set text.gated_time=true" in ungated.errors[0]
    assert latte("train", "shapes-text", *words, "train.steps=3", "--out", "run").code == 0
    for target in ("diffusers", "pipeline"):
        early = latte("convert", "run", "early", "--to", target)
        assert (early.code, len(early.errors)) == (2, 1)
        assert (
            "time_gate is 0.75, but diffusers has no gate, as if it were 1; resume training up to step"
            in early.errors[0]
        )
        assert not (tmp_path / "early").exists()
    assert latte("train", "run", "train.steps=4").code == 0
    assert latte("convert", "run", "transformer", "--to", "diffusers").code == 0
    assert latte("convert", "run", "pipe", "--to", "pipeline").code == 0
    model, z, text = (
        VideoPipeline.from_pretrained("run", device="cpu").model,
        noise(2, 3, 4, 4, 4),
        noise(2, 7, 12),
    )
    with torch.no_grad():
        ours = model(z, T, text)
        assert model.config.gated_time
        for external in (
            LatteTransformer3DModel.from_pretrained("transformer"),
            LattePipeline.from_pretrained("pipe").transformer,
        ):
            found = external(z.transpose(1, 2), T, text, enable_temporal_attentions=True).sample.transpose(
                1, 2
            )
            assert float((found - ours).abs().max()) <= 1e-5 * float(ours.abs().max())
        model.open_gate(0.0)
        assert float((model(z, T, text) - ours).abs().max()) > 1e-2 * float(ours.abs().max()), (
            "the table has no say"
        )
        assert float((model(z, T, text, temporal=False) - model(z, T, text)).abs().max()) > 1e-3 * float(
            ours.abs().max()
        ), "nor has time"
