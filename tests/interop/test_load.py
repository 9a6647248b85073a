# SPDX-License-Identifier: Apache-2.0
"""The checkpoint loader: layouts are recognised by names, and every load is complete or refused, with a
report.
"""

import argparse
import collections
import json
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from reference.official import released_state
from support import wake

from latte.checks import InputError
from latte.interop.coverage import Coverage
from latte.interop.load import load_external
from latte.interop.readers import read_tensors
from latte.model.latte import Latte, ModelConfig
from latte.model.text import LatteText, TextConfig


def fake_omegaconf(monkeypatch):
    """Classes that pickle as OmegaConf's do; OmegaConf itself is not installed here."""
    modules = {
        name: types.ModuleType(name)
        for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.base", "omegaconf.nodes")
    }
    classes = {}
    for module, name in (("dictconfig", "DictConfig"), ("base", "ContainerMetadata"), ("nodes", "AnyNode")):
        classes[name] = type(name, (), {"__module__": f"omegaconf.{module}"})
        setattr(modules[f"omegaconf.{module}"], name, classes[name])
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    def make(kind, **attributes):
        found = classes[kind]()
        vars(found).update(attributes)
        return found

    config = make("DictConfig", _parent=None, _flags_cache=None)
    metadata = make(
        "ContainerMetadata",
        ref_type=dict,
        object_type=dict,
        optional=True,
        resolver_cache=collections.defaultdict(dict),
    )
    leaf = make("AnyNode", _metadata=make("ContainerMetadata", key="lr"), _parent=config, _val=1e-4)
    vars(config).update(
        _metadata=metadata,
        _content={"lr": leaf, "model": make("AnyNode", _metadata=None, _parent=config, _val="XL")},
    )
    return config


def test_training_files_with_settings_objects_are_read_past_them(tmp_path, monkeypatch):
    state = released_state()
    namespace = argparse.Namespace(
        model="Latte-XL/2", global_seed=3407, where=Path("/data"), betas=(0.9, 0.999)
    )
    for name, args in (("namespace", namespace), ("omegaconf", fake_omegaconf(monkeypatch))):
        torch.save(
            {"model": {}, "ema": state, "opt": {"state": {0: {"step": 3}}}, "args": args},
            tmp_path / f"{name}.pt",
        )
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / f"{name}.pt", weights_only=True)  # so torch's own guarded reader is no help
        loaded = load_external(tmp_path / f"{name}.pt", heads=4)
        assert torch.equal(loaded.state_dict["final_linear.weight"], state["final_layer.linear.weight"])
    assert load_external(tmp_path / "namespace.pt", heads=4).facts == {
        "args.model": "Latte-XL/2",
        "args.global_seed": "3407",
    }


@pytest.mark.parametrize(
    "model",
    [
        lambda: Latte(
            ModelConfig(
                depth=2, width=32, heads=4, latent_size=(8, 12), num_frames=4, variant=4, num_classes=3
            )
        ),
        lambda: LatteText(
            TextConfig(depth=1, width=32, heads=2, latent_size=(8, 12), caption_channels=12, gated_time=True)
        ),
    ],
)
def test_our_own_folders_come_in_too(model, tmp_path):
    model = wake(model())
    model.save_pretrained(tmp_path)
    loaded = load_external(tmp_path)
    assert (loaded.layout, loaded.config) == (type(model).__name__, model.config)
    assert not loaded.report.missing
    again = loaded.model()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    card = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**card, "width": "wide"}))
    with pytest.raises(InputError, match=r"config\.json: width"):
        load_external(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json beside the file"):
        load_external(tmp_path)


def test_unknown_networks_are_named_by_their_tensors(tmp_path):
    torch.save({"conv_in.weight": torch.ones(1), "conv_out.weight": torch.ones(1)}, tmp_path / "unet.pt")
    with pytest.raises(InputError, match=r"have an unknown layout.*conv_in.weight, conv_out.weight"):
        load_external(tmp_path / "unet.pt")
    torch.save({"ema": {"module.x": torch.ones(1), "x": torch.ones(1)}}, tmp_path / "twice.pt")
    with pytest.raises(InputError, match="both called x"):
        load_external(tmp_path / "twice.pt")
    with pytest.raises(InputError, match="ends in none of"):
        read_tensors(Path(__file__))


def test_every_load_leaves_its_report(tmp_path, caplog):
    torch.save({"ema": released_state()}, tmp_path / "ffs.pt")
    with caplog.at_level("INFO", logger="latte"):
        loaded = load_external(tmp_path / "ffs.pt", heads=4)
    assert (
        "ffs.pt (released Latte): 50 tensors used, 0 missing, 0 unexpected, 0 mismatched, 2 dropped"
        in caplog.text
    )
    assert str(loaded.report) in caplog.text


def test_the_report_counts_and_refuses():
    report = Coverage(
        "x.pt",
        "DiT",
        ["a"],
        ["blocks.1.q", "blocks.2.q"],
        ["extra"],
        {"m": "has the shape (1,) instead of (2,)"},
        {"t": "why"},
    )
    assert str(report).splitlines()[1:] == [
        "  missing: blocks.1.q",
        "  missing: blocks.2.q",
        "  unexpected: extra",
        "  mismatched: m has the shape (1,) instead of (2,)",
        "  dropped: t why",
    ]
    for missing, unexpected in (
        (["blocks.*"], ["extra"]),
        (["blocks.*", "m"], []),
        (["m", "blocks.1.*"], ["*"]),
    ):
        with pytest.raises(InputError, match="does not match"):
            report.refuse(missing, unexpected)
    report.refuse(["blocks.*", "m"], ["ext*"])
