# SPDX-License-Identifier: Apache-2.0
"""T5 through transformers: read from a folder or the hub, held in the device's precision or in eight bits, counted without weights.

Only safetensors are read. Axes: l tokens, k channels.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latte.checks import InputError

CARD = "config.json"
XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}


def read_card(path: str | None) -> dict[str, Any]:
    """config.json of the T5 in the folder ``path`` or in its text_encoder; what matters of XXL's where there is none to look into."""
    for card in [Path(path) / CARD, Path(path) / "text_encoder" / CARD] if path else []:
        if card.is_file():
            try:
                found = json.loads(card.read_text("utf-8"))
                return {**found, "d_model": int(found["d_model"])}
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{card} is not the card of a T5 ({type(error).__name__}: {error}); give the folder of one"
                ) from None
    return XXL


def width_of(path: str | None) -> int:
    """Channels of the T5 in the folder ``path``; those of XXL where there is none to look into."""
    return read_card(path)["d_model"]


def load_t5(path: str | Path) -> tuple[Any, Any]:
    """(T5EncoderModel, its tokenizer) of ``path``: a folder of both, a pipeline's folder, or a hub id of one. Only safetensors are read.

    As they are stored, on the CPU. InputError, in one line, when transformers or a part is missing.
    """
    library = import_transformers()
    with readable(path):
        options = {"use_safetensors": True, "output_loading_info": True}
        encoder, found = library.T5EncoderModel.from_pretrained(
            path, **options, **place(path, "text_encoder")
        )
        if found["missing_keys"]:
            raise ValueError(
                f"its weights lack {min(found['missing_keys'])}"
            )  # transformers makes do with random ones
        if getattr(encoder.config, "quantization_config", None):
            raise ValueError("its weights are stored in fewer bits, without what they were made from")
    return encoder.eval().requires_grad_(False), load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer alone, see ``load_t5``."""
    library = import_transformers()
    with readable(path):
        tokenizer = library.T5Tokenizer.from_pretrained(path, **place(path, "tokenizer"))
        if tokenizer.get_vocab().keys() <= library.T5Tokenizer().get_vocab().keys():
            raise ValueError(
                "its tokenizer has no vocabulary"
            )  # transformers makes do without the file, and every word is unknown
    return tokenizer


def place(path: str | Path, part: str) -> dict[str, Any]:
    """Where ``part`` lies: in the folder ``path`` itself, or in its own folder there, or on the hub."""
    local = Path(path).is_dir()
    return {
        "local_files_only": local,
        **({} if local and (Path(path) / CARD).is_file() else {"subfolder": part}),
    }


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """InputError, in one line, for whatever is raised inside: broken files make transformers and tokenizers raise almost anything."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"text encoder {str(path)!r} cannot be read ({reason}); give a folder with a T5 encoder and its tokenizer, or "
            "with text_encoder and tokenizer in it"
        ) from error


def import_transformers() -> Any:
    """transformers, whose T5 can be imported; InputError when it cannot."""
    try:
        import transformers
        from transformers import T5EncoderModel, T5Tokenizer
    except ImportError as error:
        raise InputError(
            f"a T5 text encoder needs transformers and sentencepiece, which are not installed ({error}); "
            "pip install 'latte-video[t2v]'"
        ) from error
    return transformers


def precision(device: torch.device) -> torch.dtype:
    """What a T5 computes in on ``device``."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


THRESHOLD = 6.0  # inputs from here on are not rounded (LLM.int8, arXiv 2208.07339, Sec. 3.2)


def hold(network: Any, device: torch.device, bits: int | None = None) -> Any:
    """``network``, a T5EncoderModel on the CPU, on ``device`` in the precision that it computes in there.

    ``bits`` 8 holds its ``linears`` as eight-bit numbers with a scale a row (bitsandbytes), which rounds what goes into them, too.
    InputError when bitsandbytes is missing.
    """
    todo = linears(network) if bits else []
    while todo:  # one after the other, each gone when its bytes are there
        (name, linear), layers = todo.pop(), eight_bit_layers()
        sizes = (linear.in_features, linear.out_features)
        small = layers.Linear8bitLt(
            *sizes, bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta"
        )
        small.weight = layers.Int8Params(linear.weight.data, requires_grad=False).to(device)
        network.set_submodule(name, small.eval())
    return network.to(device, precision(device))


def linears(network: Any) -> list[tuple[str, nn.Linear]]:
    """(name, layer) of all that can be held as eight-bit numbers.

    That is all but the wo: bitsandbytes computes in float16, which overflows there (huggingface/transformers issue 20287).
    """
    return [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and not name.endswith(".wo")
    ]


def eight_bit_layers() -> Any:
    """bitsandbytes.nn; InputError when it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of float16 with every product
    try:
        import bitsandbytes.nn
    except ImportError as error:
        raise InputError(
            f"text.bits is 8, which needs bitsandbytes, and it is not installed ({error}); "
            "pip install 'latte-video[bits8]', or leave the bits out"
        ) from error
    return bitsandbytes.nn


def skeleton(path: str | None) -> Any:
    """The T5EncoderModel that config.json at ``path`` describes, XXL where there is none, on the meta device; or InputError."""
    library, card = import_transformers(), read_card(path)
    try:
        with torch.device("meta"):
            return library.T5EncoderModel(library.T5Config.from_dict(card)).eval().requires_grad_(False)
    except Exception as error:  # a broken card makes transformers raise almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"text.path is {path!r}, but its {CARD} is not the card of a T5 ({reason}); give the folder of one"
        ) from error


def held_bytes(network: Any, device: torch.device, bits: int | None = None) -> int:
    """Bytes of the weights of ``network`` once ``hold`` has put them on ``device``."""
    each = precision(device).itemsize
    saved = (
        sum((each - 1) * layer.weight.numel() - 4 * layer.out_features for _, layer in linears(network))
        if bits
        else 0
    )
    return each * sum(weight.numel() for weight in network.parameters()) - saved  # a float32 scale a row
