# SPDX-License-Identifier: Apache-2.0
"""Compiling: no graph breaks, few graphs, the values of the model that is not compiled."""

import copy
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from support import noise, wake
from torch._dynamo.testing import CompileCounter

from latte.model.compiled import MAX_GRAPHS, compile_blocks
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tracer, about itself
SHAPE: dict[str, Any] = {
    "depth": 2,
    "width": 16,
    "heads": 2,
    "num_frames": 4,
    "latent_size": 4,
    "latent_channels": 3,
}
CLASSES = ModelConfig(**SHAPE, num_classes=5)
MODELS = {
    "class": CLASSES,
    "variant 4, rotary": ModelConfig(**SHAPE, num_classes=5, variant=4, temporal_position="rotary"),
    "unconditional": ModelConfig(**SHAPE),
    "text": TextConfig(**SHAPE, caption_channels=6),
}


def inputs(config, clips: int, num_images: int = 0) -> dict:
    z = noise(clips, 4 + num_images, 3, 4, 4)
    condition = {}
    if config.reads_text:
        condition = {"text": noise(clips, 3, 6), "mask": torch.ones(clips, 3, dtype=torch.bool)}
    elif config.num_classes:
        condition = {"label": torch.arange(clips) % 5}
    return {"z": z, "t": torch.full((clips,), 7), **condition, "num_images": num_images}


def awake(config) -> Any:
    return wake({True: LatteText, False: Latte}[config.reads_text](config), 0.2)


@pytest.fixture(autouse=True)
def forget_graphs():
    dynamo.reset()
    yield
    dynamo.reset()


@pytest.mark.parametrize(("name", "num_images"), [*((name, 0) for name in MODELS), ("class", 2), ("text", 2)])
def test_a_whole_model_is_one_graph(name, num_images):
    found = dynamo.explain(awake(MODELS[name]))(**inputs(MODELS[name], 2, num_images))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.parametrize("name", ["class", "text"])
def test_four_batch_sizes_need_two_graphs_for_each_kind_of_block(name):
    model = awake(MODELS[name])
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True, recompile_limit=MAX_GRAPHS)
    for clips in (4, 2, 3, 6):
        model(**inputs(MODELS[name], clips)).square().mean().backward()
    kinds = 2  # spatial and temporal
    assert counter.frame_count == 2 * kinds


def test_compiled_blocks_are_the_plain_ones_to_rounding(monkeypatch):
    """Forward and gradient. The compiler stops before it writes C++, which takes a minute: that code is
    compared by ``benchmarks/forward.py --compile blocks``.
    """
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiler(*a, **{**k, "backend": "aot_eager"}))
    plain = awake(CLASSES)
    compiled = copy.deepcopy(plain)
    compile_blocks(compiled, torch.device("cpu"))
    assert compiled.blocks[0]._compiled_call_impl is not None
    assert copy.deepcopy(compiled).blocks[0]._compiled_call_impl is None, "EMA weights are not compiled"
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    gradients = []
    for model in (plain, compiled):
        out = model(**inputs(CLASSES, 2))
        out.square().mean().backward()
        gradients.append([out.detach(), *(parameter.grad for parameter in model.parameters())])
    for exact, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["class", "text"])
def test_a_wrong_condition_is_found_inside_a_graph(name):
    model = torch.compile(awake(MODELS[name]), backend="eager", fullgraph=True)
    given = inputs(MODELS[name], 2)
    model(**given)
    wrong = {"class": {"label": torch.tensor([0, 6])}, "text": {"mask": torch.zeros(2, 3).bool()}}
    with pytest.raises(RuntimeError, match=r"a label is not in|mask is False"):
        model(**{**given, **wrong[name]})
