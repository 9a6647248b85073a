# SPDX-License-Identifier: Apache-2.0
"""T5 through transformers: loaded from a folder or the hub, held in the device's precision or in int8, sized
without weights.

Only safetensors are read. Axes: b prompts, l tokens, k channels.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from latte.checks import InputError, check
from latte.tensors import without_memory
from latte.text.encoders import check_num_tokens, pad_features

CONFIG = "config.json"
XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
STRUCTURE = (  # the keys of config.json that change the features
    "d_model",
    "d_kv",
    "num_layers",
    "num_heads",
    "feed_forward_proj",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
)


class T5Encoder:
    """The encoder half of a T5 (v1.1 XXL for the released Latte).

    Prompts are lower-cased and stripped, as the captions of its training were. They are encoded one by one,
    without padding, so that features do not depend on the other prompts of a batch: in bfloat16 on a GPU, in
    float32 elsewhere. ``bits`` 8 holds most of the weights in int8, see ``hold``. The weights are read with
    the first prompt.
    """

    name: ClassVar[str] = "t5"
    default_length: ClassVar[int] = 120
    has_weights: ClassVar[bool] = True
    bits_allowed: ClassVar[tuple[int, ...]] = (8,)

    def __init__(
        self,
        path: str,
        length: int = default_length,
        device: str | torch.device = "cpu",
        bits: int | None = None,
    ):
        self.path = path
        self.length = length
        self.device = torch.device(device)
        self.bits = bits
        self.channels = width_of(path)
        self.parts: tuple[Any, Any] | None = None
        self.tokenizer: Any = None
        self._fingerprint = ""

    @classmethod
    def load(cls, path: str | None, length: int, device: torch.device, bits: int | None) -> "T5Encoder":
        """Return the encoder of the folder or hub id ``path``; nothing but its config.json is read yet."""
        return cls(path or "", length, device, bits)

    @classmethod
    def channels_of(cls, path: str | None) -> int:
        """Return the width of the T5 in the folder ``path``, or that of XXL when there is no config.json."""
        return width_of(path)

    @classmethod
    def weights_bytes(cls, path: str | None, device: torch.device, bits: int | None) -> int:
        """Return the bytes of the weights on ``device``, by config.json or for XXL."""
        return held_bytes(skeleton(path), device, bits)

    @classmethod
    def meta_forward(cls, path: str | None, num_tokens: int, device: torch.device) -> Callable[[], object]:
        """Return a function that encodes one prompt of ``num_tokens`` on the meta device, in the precision of
        ``device``.
        """
        network = skeleton(path).to(precision(device))
        tokens = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
        return lambda: network(tokens)

    @property
    def fingerprint(self) -> str:
        """16 hex digits of weights (as float32), structure and vocabulary, independent of file names, shards
        and device.
        """
        if not self._fingerprint:
            self.read()
        return self._fingerprint

    @property
    def feature_bytes(self) -> int:
        """Bytes of one number of the features: 2 on a GPU, where they are computed in bfloat16, and 4
        elsewhere.
        """
        return precision(self.device).itemsize

    def read(self) -> tuple[Any, Any]:
        """Return (network, tokenizer), read from disk unless in memory.

        InputError when they cannot be read, or have another width than config.json.
        """
        if self.parts is None:
            if self.bits:
                import_bitsandbytes()  # before reading gigabytes
            network, tokenizer = load_t5(self.path)
            width = network.config.d_model
            check(
                width == self.channels,
                f"the text encoder in text.path {self.path!r} has {width} channels, but {self.channels} are "
                "expected; download it, and give its folder",
            )
            self._fingerprint = fingerprint_of(network, tokenizer, self.bits)
            self.parts = hold(network, self.device, self.bits), tokenizer
        return self.parts

    def count(self, prompt: str) -> int:
        """Return the number of tokens, the end token included; reads the tokenizer alone, or raises
        InputError.
        """
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.path)
        return len(self.tokenizer(prompt.lower().strip()).input_ids)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return features (b l k) and mask (b l) of the lower-cased and stripped prompts, see
        ``TextEncoder.encode``.
        """
        network, tokenizer = self.read()
        features = []
        for prompt in prompts:
            tokens = torch.tensor([tokenizer(prompt.lower().strip()).input_ids], device=self.device)
            check_num_tokens(prompt, tokens.shape[1], self.length)
            features.append(network(tokens).last_hidden_state[0].float().cpu())
        return pad_features(features, self.length)

    def free(self) -> None:
        """Release the memory of weights and tokenizer."""
        self.parts = self.tokenizer = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def fingerprint_of(network: Any, tokenizer: Any, bits: int | None = None) -> str:
    """Return the fingerprint of a T5EncoderModel as stored; '-8bit' follows when its weights will be held in
    int8.
    """
    structure = ["t5", None, *(getattr(network.config, key) for key in STRUCTURE)]
    digest = hashlib.sha256(json.dumps([*structure, sorted(tokenizer.get_vocab().items())]).encode())
    for name, tensor in sorted(network.named_parameters()):
        digest.update(f" {name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16] + (f"-{bits}bit" if bits else "")


def read_config(path: str | None) -> dict[str, Any]:
    """Return config.json in the folder ``path`` or in its text_encoder; the relevant keys of XXL when there
    is none.
    """
    files = [Path(path) / CONFIG, Path(path) / "text_encoder" / CONFIG] if path else []
    for file in files:
        if file.is_file():
            try:
                found = json.loads(file.read_text("utf-8"))
                return {**found, "d_model": int(found["d_model"])}
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{file} is not the configuration of a T5 ({type(error).__name__}: {error}); "
                    "give the folder of a T5"
                ) from None
    return XXL


def width_of(path: str | None) -> int:
    """Return the channels of the T5 in the folder ``path``; those of XXL when there is no config.json."""
    return read_config(path)["d_model"]


def load_t5(path: str | Path) -> tuple[Any, Any]:
    """Return (T5EncoderModel as stored, on the CPU; its tokenizer) from a folder of both, a pipeline's
    folder, or a hub id.

    Only safetensors are read. InputError when transformers or a part is missing.
    """
    library = import_transformers()
    with readable(path):
        options = {"use_safetensors": True, "output_loading_info": True}
        location = locate(path, "text_encoder")
        encoder, info = library.T5EncoderModel.from_pretrained(path, **options, **location)
        if info["missing_keys"]:  # transformers would fill them with random numbers
            raise ValueError(f"its weights lack {min(info['missing_keys'])}")
        if getattr(encoder.config, "quantization_config", None):
            raise ValueError("its weights are stored in fewer bits, without the original weights")
    return encoder.eval().requires_grad_(False), load_tokenizer(path)


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer alone, see ``load_t5``."""
    library = import_transformers()
    with readable(path):
        try:
            tokenizer = library.T5Tokenizer.from_pretrained(path, **locate(path, "tokenizer"))
        except Exception as error:
            # transformers converts a spiece.model with protobuf; without it, it asks for tiktoken, which
            # would not help
            if "tiktoken" in str(error) and not has_protobuf():
                raise ValueError(
                    "its tokenizer is a spiece.model without a tokenizer.json, which needs protobuf; "
                    "pip install 'latte-video[t2v]'"
                ) from error
            raise
        if tokenizer.get_vocab().keys() <= library.T5Tokenizer().get_vocab().keys():
            # transformers does without the file, and then every word is unknown
            raise ValueError("its tokenizer has no vocabulary")
    return tokenizer


def has_protobuf() -> bool:
    """Return whether google.protobuf can be imported."""
    try:
        return find_spec("google.protobuf") is not None
    except (ImportError, ValueError):
        return False


def locate(path: str | Path, part: str) -> dict[str, Any]:
    """Return from_pretrained's options for ``part``: in the folder ``path`` itself, in its own folder there,
    or on the hub.
    """
    local = Path(path).is_dir()
    flat = local and (Path(path) / CONFIG).is_file()
    return {"local_files_only": local, **({} if flat else {"subfolder": part})}


@contextmanager
def readable(path: str | Path) -> Iterator[None]:
    """Turn any exception inside into an InputError of one line: broken files make transformers raise almost
    anything.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"text encoder {str(path)!r} cannot be read ({reason}); give a folder with a T5 encoder and its "
            "tokenizer, or with text_encoder and tokenizer in it"
        ) from error


def import_transformers() -> Any:
    """Return transformers, whose T5 can be imported; InputError when it cannot."""
    try:
        import transformers
        from transformers import T5EncoderModel, T5Tokenizer  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"a T5 text encoder needs transformers and sentencepiece, which are not installed ({error}); "
            "pip install 'latte-video[t2v]'"
        ) from error
    return transformers


def precision(device: torch.device) -> torch.dtype:
    """Return the dtype that a T5 computes in on ``device``."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


THRESHOLD = 6.0  # larger inputs are not rounded (LLM.int8, arXiv 2208.07339, Sec. 3.2)


def hold(network: Any, device: torch.device, bits: int | None = None) -> Any:
    """Move a T5EncoderModel from the CPU to ``device`` in the precision that it computes in there; return it.

    ``bits`` 8 holds its ``quantizable_layers`` in int8 with one scale per row (bitsandbytes), and rounds
    their inputs too. InputError when bitsandbytes is missing.
    """
    pending = quantizable_layers(network) if bits else []
    while pending:  # layer by layer, each released once its int8 weights exist
        name, linear = pending.pop()
        layers = import_bitsandbytes()
        sizes = (linear.in_features, linear.out_features)
        options = {"bias": False, "has_fp16_weights": False, "threshold": THRESHOLD}
        small = layers.Linear8bitLt(*sizes, **options, device="meta")
        small.weight = layers.Int8Params(linear.weight.data, requires_grad=False).to(device)
        network.set_submodule(name, small.eval())
    return network.to(device, precision(device))


def quantizable_layers(network: Any) -> list[tuple[str, nn.Linear]]:
    """Return (name, layer) of every linear layer that can be held in int8.

    The wo layers cannot: bitsandbytes computes in float16, which overflows there (huggingface/transformers
    issue 20287).
    """
    named = network.named_modules()
    return [
        (name, layer) for name, layer in named if isinstance(layer, nn.Linear) and not name.endswith(".wo")
    ]


def import_bitsandbytes() -> Any:
    """Return bitsandbytes.nn; InputError when it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about float16 at every product
    try:
        import bitsandbytes.nn
    except ImportError as error:
        raise InputError(
            f"text.bits is 8, which needs bitsandbytes, and it is not installed ({error}); "
            "pip install 'latte-video[bits8]', or leave text.bits out"
        ) from error
    return bitsandbytes.nn


def skeleton(path: str | None) -> Any:
    """Return the T5EncoderModel of config.json at ``path`` (XXL when there is none) on the meta device; or
    InputError.
    """
    library = import_transformers()
    config = read_config(path)
    try:
        with without_memory():
            return library.T5EncoderModel(library.T5Config.from_dict(config)).eval().requires_grad_(False)
    except Exception as error:  # a broken config makes transformers raise almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"text.path is {path!r}, but its {CONFIG} is not the configuration of a T5 ({reason}); "
            "give the folder of a T5"
        ) from error


def held_bytes(network: Any, device: torch.device, bits: int | None = None) -> int:
    """Return the bytes of the weights of ``network`` once ``hold`` has moved them to ``device``."""
    itemsize = precision(device).itemsize
    total = itemsize * sum(weight.numel() for weight in network.parameters())
    if bits:
        for _, layer in quantizable_layers(network):
            total -= (itemsize - 1) * layer.weight.numel() - 4 * layer.out_features  # a float32 scale per row
    return total
