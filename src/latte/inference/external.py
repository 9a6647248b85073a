# SPDX-License-Identifier: Apache-2.0
"""Other people's weights together with what a model needs beside them and they do not say: diffusion, autoencoder, text encoder, sampling.

What the released models have in common is filled in (reference: the released configurations); where a LattePipeline's folder or hub id has
the parts beside its transformer, these are meant. Everything can be told otherwise by the caller.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latte.autoencoder.codec import CodecConfig, kind_at
from latte.diffusion.config import DiffusionConfig
from latte.inference.generate import SampleConfig
from latte.interop.load import Loaded, load_external
from latte.interop.pipeline import INDEX
from latte.interop.readers import fetch
from latte.text.encoders import TextEncoderConfig

RELEASED_T2V = SampleConfig(sampler="ddim", steps="ddim50", guidance=7.5, batch=1)


def open_foreign(
    source: str | Path,
    heads: int | None = None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> tuple[Loaded, dict[str, Any]]:
    """``load_external`` -> (its result, the facts beside the model's keys as our config.json has them). A folder of ours says them itself.

    The paths of autoencoder and text encoder are None where nothing tells them.
    """
    loaded = load_external(source, heads, allow_missing, allow_unexpected)
    place = str(source) if (fetch(source) / INDEX).is_file() else None
    codec = kind_at(place).name if place else CodecConfig().name
    text = loaded.config.reads_text
    facts = {
        "diffusion": asdict(DiffusionConfig()),
        "codec": {"name": codec, "path": place, "fingerprint": None},
        "classes": [],
        "sample": asdict(RELEASED_T2V if text else SampleConfig()),
    }
    if text:
        facts["text"] = {**asdict(TextEncoderConfig(name="t5", path=place)), "fingerprint": None}
    return loaded, {**facts, **{key: loaded.card[key] for key in (*facts, "about") if key in loaded.card}}
