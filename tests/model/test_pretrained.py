# SPDX-License-Identifier: Apache-2.0
"""save_pretrained and from_pretrained: our own layout, complete, finite and unaltered, or one clear
refusal.
"""

import json

import pytest
import torch
from reference.official import released_state
from safetensors.torch import load_file, save_file
from support import wake

from latte.checks import InputError, RunError
from latte.interop.diffusers import save_diffusers
from latte.interop.load import load_external
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig

SMALL = {"depth": 2, "width": 16, "heads": 2, "num_frames": 4, "latent_size": 4}


def latte(seed: int = 0) -> Latte:
    return wake(Latte(ModelConfig(**SMALL, num_classes=2)), seed=seed)


def rewrite(file, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_a_loaded_model_is_float32_trainable_and_in_eval_mode(tmp_path):
    built = latte().half()
    built.save_pretrained(tmp_path / "w")
    found = Latte.from_pretrained(tmp_path / "w" / "model.safetensors")
    assert not found.training
    assert all(
        parameter.requires_grad and parameter.dtype == torch.float32 for parameter in found.parameters()
    )
    assert torch.equal(found.final_linear.weight, built.final_linear.weight.float())


def test_external_layouts_are_refused_with_the_call_that_works(tmp_path):
    text = wake(LatteText(TextConfig(**SMALL, caption_channels=6)))
    torch.save({"ema": released_state(classes=5)}, tmp_path / "ucf.pt")
    save_diffusers(text, tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for kind, source, options in ((Latte, "ucf.pt", {"heads": 4}), (LatteText, "pipe", {})):
        with pytest.raises(InputError, match=r"latte\.interop\.load\.load_external\('.*'\)\.model\(\)"):
            kind.from_pretrained(tmp_path / source)
        assert isinstance(load_external(tmp_path / source, **options).model(), kind)


def test_a_model_of_the_other_class_is_refused_with_its_name(tmp_path):
    latte().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds a Latte, not a LatteText; call Latte\.from_pretrained"):
        LatteText.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("final_linear.bias"), "lacks final_linear.bias"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "unknown tensor more"),
        (lambda tensors: tensors.update({"final_linear.bias": torch.ones(3)}), r"shape \(3,\) instead of"),
        (lambda tensors: tensors["final_linear.bias"].fill_(3), "does not match weights_sha256"),
        (
            lambda tensors: tensors["final_linear.bias"][0].fill_(torch.nan),
            "'final_linear.bias' holds 1 non-finite",
        ),
        (lambda tensors: tensors["final_linear.bias"].fill_(-torch.inf), "'final_linear.bias' holds"),
    ],
)
def test_incomplete_altered_and_nonfinite_weights_are_refused(change, message, tmp_path):
    latte().save_pretrained(tmp_path)
    rewrite(tmp_path / "model.safetensors", change)
    with pytest.raises(InputError, match=message):
        Latte.from_pretrained(tmp_path)


def test_nonfinite_weights_are_not_saved(tmp_path):
    built = latte()
    with torch.no_grad():
        built.final_linear.bias[0] = torch.inf
    with pytest.raises(RunError, match=r"'final_linear.bias' holds 1 non-finite"):
        built.save_pretrained(tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


def test_other_files_in_the_folder_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(notes.txt\)"):
        latte().save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", "{", json.dumps({"depth": "deep"}), json.dumps({"depth": 10**7})])
def test_a_bad_config_is_one_line_at_once(text, tmp_path):
    latte().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json") as error:
        Latte.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
