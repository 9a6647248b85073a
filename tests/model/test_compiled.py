# SPDX-License-Identifier: Apache-2.0
"""torch.compile for sampling: equal to eager, recorded, and what is missing is named."""

import pytest
import torch

from latte.checks import InputError
from latte.model.compiled import check_compiler, compile_blocks, is_compiled
from latte.inference.outputs import clip_facts
from tiny import tiny_trained

CPU = torch.device("cpu")


def can_compile() -> bool:
    try:
        check_compiler(CPU)
    except InputError:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_a_compiled_model_equals_eager_to_rounding(backend):
    if backend == "inductor" and not can_compile():
        pytest.skip("needs a compiler that torch.compile works with")
    pipe = tiny_trained()
    call = {"class_labels": ["up", "left"], "seed": 3, "num_inference_steps": 2, "output_type": "pt"}
    options = {"config": pipe.sample, "conditioning_frames": None, "window": None}
    options |= {"frames": None, "size": None, "dtype": pipe.dtype}
    plain = pipe(**call).frames
    assert "compile" not in clip_facts(pipe, options)
    compile_blocks(pipe.model, CPU, backend=backend)
    assert is_compiled(pipe.model)
    assert clip_facts(pipe, options)["compile"] is True
    calls = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = pipe(**call).frames
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > calls, "it was compiled"
    assert (plain - compiled).abs().max() <= 1.01 / 255


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), r"no C\+\+ compiler \(g\+\+"),
        (RuntimeError("Cannot find a working triton installation.\nmore"), "no working Triton"),
        (RuntimeError("fatal error: Python.h: No such file"), "Python.h"),
        (ValueError("\nodd\nmore"), r"torch.compile fails here \(odd\)"),
    ],
)
def test_what_is_missing_is_named_in_one_line(monkeypatch, error, message):
    def fail(function, **settings):
        raise error

    monkeypatch.setattr(torch, "compile", fail)
    pipe = tiny_trained()
    with pytest.raises(InputError, match=message) as caught:
        compile_blocks(pipe.model, CPU)
    assert "\n" not in str(caught.value)
    assert not is_compiled(pipe.model)


def test_other_devices_are_refused():
    with pytest.raises(InputError, match="for the devices cpu and cuda, but device is mps"):
        check_compiler(torch.device("mps"))


@pytest.mark.filterwarnings("ignore")
def test_low_bit_layers_are_not_said_to_be_compiled():
    """Their model is a copy, and copies of blocks are not compiled."""
    pipe = tiny_trained()
    compile_blocks(pipe.model, CPU, backend="eager")
    pipe.to(dtype="int8")
    with pytest.raises(InputError, match="does not reach the layers of dtype int8; leave one of them out"):
        pipe(class_labels="up", num_inference_steps=2)
