# SPDX-License-Identifier: Apache-2.0
"""The parts of a LattePipeline with random weights, each as small as its class allows: text to video of 5
frames of 64 x 64.
"""

import torch
from support import wake

from latte.autoencoder.codec import Codec, CodecConfig, build_codec
from latte.model.text import LatteText, TextConfig

TINY = TextConfig(depth=2, width=32, heads=2, num_frames=5, latent_size=8, caption_channels=12)
VAES = {
    "AutoencoderKL": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [4, 4, 8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
    },
    "AutoencoderKLTemporalDecoder": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "block_out_channels": [32] * 4,
        "layers_per_block": 1,
    },
}
NAMES = {"AutoencoderKL": "kl", "AutoencoderKLTemporalDecoder": "kl_temporal"}
WORDS = ["a", "red", "blue", "circle", "square", "moves", "up", "down", "left", "right", ",", "."]


def seeded(build):
    """What ``build()`` makes, a function of nothing but itself, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def tiny_t5(width: int = 12):
    """(T5EncoderModel, T5Tokenizer of WORDS)."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((f"▁{word}", -1.0) for word in WORDS),
    ]
    config = T5Config(
        vocab_size=16, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, is_encoder_decoder=False
    )
    return seeded(lambda: T5EncoderModel(config)), T5Tokenizer(vocab=vocabulary, extra_ids=0)


def tiny_vae(kind: str):
    """diffusers' autoencoder of the class ``kind``, awake: its time mixers mix, too."""
    import diffusers

    return seeded(lambda: wake(getattr(diffusers, kind)(**VAES[kind])))


def tiny_codec(kind: str, folder, chunk: int = 3) -> Codec:
    """Our codec over ``tiny_vae``, which is left in ``folder``."""
    tiny_vae(kind).save_pretrained(folder)
    return build_codec(CodecConfig(NAMES[kind], str(folder), chunk))


def tiny_denoiser(**changes) -> LatteText:
    """A LatteText of TINY that does not predict the zeros of a fresh one."""
    return wake(LatteText(TextConfig(**{**TINY.__dict__, **changes})), 0.1).eval()
