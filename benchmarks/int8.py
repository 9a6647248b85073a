# SPDX-License-Identifier: Apache-2.0
"""What int8 costs a T5: python benchmarks/int8.py [--width 768 --layers 12] (default: about T5 v1.1 base's
encoder).

A T5 encoder with random weights encodes random tokens in float32, int8 and bfloat16; the distance of the
features from those in float32, relative to their norm, and the bytes of the weights. Random weights lack the
outliers of trained ones, which make int8 harder.
"""

import argparse
import copy
import json
from collections.abc import Sequence

import measure
import torch
from torch import Tensor

from latte.runtime import generator
from latte.text import t5


@torch.no_grad()
def features(network: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Encode tokens (b l) to float32 (b l k), one prompt at a time, as ``T5Encoder`` does."""
    return torch.cat([network(row[None]).last_hidden_state.float() for row in tokens])


def held(network: torch.nn.Module) -> int:
    """Return the bytes of all weights, the scales of int8 weights included."""
    scales = [weight.SCB for weight in network.parameters() if getattr(weight, "SCB", None) is not None]
    return sum(tensor.nbytes for tensor in [*network.parameters(), *scales])


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=20)
    options = parser.parse_args(argv)
    library, device = t5.import_transformers(), torch.device("cpu")
    card = {
        **t5.XXL,
        "d_model": options.width,
        "num_layers": options.layers,
        "num_heads": options.width // 64,
        "d_ff": 8 * options.width // 3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(generator(0, "eight bits").initial_seed())
        network = library.T5EncoderModel(library.T5Config.from_dict(card)).eval().requires_grad_(False)
    tokens = torch.randint(
        card["vocab_size"], (options.prompts, options.tokens), generator=generator(0, "tokens")
    )
    exact, found = features(network, tokens), {}
    variants = {
        "bits8": lambda: t5.hold(copy.deepcopy(network), device, 8),
        "bfloat16": lambda: copy.deepcopy(network).to(torch.bfloat16),
    }
    for name, build in variants.items():
        rough = build()
        error = float((features(rough, tokens) - exact).norm() / exact.norm())
        found[name] = {"relative_error": round(error, 5), "bytes": held(rough)}
    line = {
        "what": "T5 in int8",
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "float32_bytes": held(network),
        **found,
        "machine": measure.machine(device),
        "torch": torch.__version__,
        "commit": measure.commit(),
        "settings": vars(options),
    }
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    main()
