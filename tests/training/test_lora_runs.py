# SPDX-License-Identifier: Apache-2.0
"""A run of adapters from configuration to clips: what it keeps, how it goes on, and that its exports draw
its clips.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latte.build import build
from latte.checkpoint.run import load_latest
from latte.checks import InputError
from latte.config.run import load_run
from latte.inference.pipeline import VideoPipeline
from latte.inference.run_folder import run_facts
from latte.interop.export import export
from latte.interop.lora import lora_layers, lora_state
from latte.tensors import tensors_sha256
from tiny import WORDS, tiny_text, tiny_trained

pytest.importorskip("peft", reason="needs the extra lora")

KINDS = {
    "shapes": (tiny_trained, ["left", "up"], "qkv,mlp"),
    "shapes-text": (lambda: tiny_text(depth=2), None, "cross,proj"),
}
PROMPTS = ["a red circle moves up", "a blue square moves left"]


def words(recipe: str, folder, *more: str) -> list[str]:
    """The smallest run of adapters on the base in ``folder``/base, in ``folder``/run unless reported otherwise."""
    diffusion = [
        "diffusion.objective=paper",
        "train.lr=0.01",
        "train.ema_decay=0.5",
        "sample.sampler=ddim",
        "sample.guidance=1",
    ]
    text = ["text.length=16"] if recipe == "shapes-text" else []
    adapters = ["lora.rank=2", f"lora.targets={KINDS[recipe][2]}", f"train.init={folder / 'base'}"]
    return [
        *WORDS,
        *diffusion,
        *text,
        *adapters,
        "train.steps=6",
        "train.log_every=1",
        f"run.dir={folder / 'run'}",
        *more,
    ]


def train(recipe: str, folder, *more: str, until: int | None = None) -> dict:
    """Train, or go on."""
    return build(load_run(recipe, words(recipe, folder, *more))[0], "cpu").train(until)


def clips(trained, recipe: str) -> list[np.ndarray]:
    """Two clips."""
    reported = {"labels": KINDS[recipe][1]} if KINDS[recipe][1] else {"prompts": PROMPTS}
    return [clip for _, clip in trained.generate([3, 4], **reported)]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all((a == b).all() for a, b in zip(one, other, strict=True))


def close(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    """Folding rounds in another order than adding up: a grey level at most."""
    return all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory):
    """(recipe, folder with the base's weights in base, and a finished run in run, its result)."""
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param][0]().save_pretrained(folder / "base")
    return request.param, folder, train(request.param, folder)


def test_checkpoints_hold_adapters_alone_and_the_base_is_what_it_was(run):
    recipe, folder, result = run
    state = load_latest(folder / "run").tensors
    assert state.keys() == {"model", "ema", "optimizer"}
    assert state["ema"].keys() == state["model"].keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in state["ema"])
    assert any(float(tensor.abs().max()) > 0 for name, tensor in state["ema"].items() if "lora_B" in name)
    assert result["weights_sha256"] == tensors_sha256(state["ema"])
    base = load_file(folder / "base/model.safetensors")
    plain = VideoPipeline.from_pretrained(folder / "base", device="cpu").model.state_dict()
    tuned = VideoPipeline.from_pretrained(
        folder / "run", device="cpu", prompts=PROMPTS if recipe == "shapes-text" else ()
    ).model.state_dict()
    changed = {name for name in base if not torch.equal(tuned[name], plain[name])}
    assert changed == {name.split(".lora_")[0] + ".weight" for name in state["ema"]}, "only what was adapted"


def test_a_stopped_run_is_the_run_that_was_never_stopped(run, tmp_path):
    recipe, folder, result = run
    shutil.copytree(folder / "base", tmp_path / "base")
    assert train(recipe, tmp_path, until=3)["step"] == 3
    assert train(recipe, tmp_path)["weights_sha256"] == result["weights_sha256"]


def test_run_folded_folder_and_separate_adapters_generate_the_same_clips(run, tmp_path):
    recipe, folder, _ = run
    trained = VideoPipeline.from_pretrained(folder / "run", device="cpu")
    drawn = clips(trained, recipe)
    assert not same(drawn, clips(VideoPipeline.from_pretrained(folder / "base", device="cpu"), recipe))
    model, report, facts = run_facts(folder / "run")
    assert len(report.used) == 2 * len(lora_layers(model))
    export(model, tmp_path / "adapters", "lora", facts)
    assert sorted(file.name for file in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    beside = VideoPipeline.from_pretrained(folder / "base", device="cpu", lora=tmp_path / "adapters")
    assert beside.weights == trained.weights
    assert not lora_layers(beside.model)
    assert same(clips(beside, recipe), drawn)
    trained.save_pretrained(tmp_path / "folded")
    again = VideoPipeline.from_pretrained(tmp_path / "folded", device="cpu")
    assert same(clips(again, recipe), drawn)
    assert trained.weights == again.weights, "one hash for the same weights, whichever way they came"
    card = json.loads((tmp_path / "folded/config.json").read_text())
    assert card["about"]["source"] == "EMA LoRA adapters of rank 2 of a run, started from base"
    model.requires_grad_(False).eval()
    unfolded = type(trained)(**{**trained.__dict__, "model": model})
    assert close(clips(unfolded, recipe), drawn)


def test_another_base_and_other_adapters_are_refused(run, tmp_path):
    recipe, folder, _ = run
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"lora.rank: the run has 2, you gave 3"):
        train(recipe, tmp_path, "lora.rank=3")
    file, config = (
        tmp_path / "base/model.safetensors",
        (tmp_path / "run/config.yaml").read_text().replace(str(folder), str(tmp_path)),
    )
    (tmp_path / "run/config.yaml").write_text(config)
    tensors = load_file(file)
    save_file({**tensors, "patch.proj.bias": tensors["patch.proj.bias"] + 1}, file)
    with pytest.raises(
        InputError, match=r"train.init: weights .* have another hash than weights_sha256 in config.json"
    ):
        train(recipe, tmp_path, "train.steps=7")
    card = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(
        json.dumps({key: value for key, value in card.items() if key != "weights_sha256"})
    )
    with pytest.raises(InputError, match=r"lora.base: the run has .*, you gave"):
        train(recipe, tmp_path, "train.steps=7")
    with pytest.raises(
        InputError, match=r"the weights at train.init are '.*', but the adapters of .*step-6 belong to"
    ):
        VideoPipeline.from_pretrained(tmp_path / "run", device="cpu")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match=r"train.init is .* which does not exist"):
        VideoPipeline.from_pretrained(tmp_path / "run", device="cpu")
    (tmp_path / "run/config.yaml").write_text(
        config.replace("rank: 2", "rank: null")
        .replace("- cross\n  - proj", "- qkv\n  - proj")
        .replace("- qkv\n  - mlp", "- qkv\n  - proj")
    )
    with pytest.raises(InputError, match=r"lora.rank is None, but .* was trained with 2"):
        VideoPipeline.from_pretrained(tmp_path / "run", device="cpu")


def test_a_run_cannot_start_from_a_run_of_adapters(run, tmp_path):
    recipe, folder, _ = run
    with pytest.raises(InputError, match=r"is a run of adapters alone; merge them first: latte convert"):
        train(recipe, folder, f"train.init={folder / 'run'}", f"run.dir={tmp_path / 'new'}")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_adapters_without_a_base_are_refused_before_anything_is_built(tmp_path):
    with pytest.raises(
        InputError, match=r"command line: lora.rank is 2, but adapters need trained weights; give train.init"
    ):
        load_run("shapes", [*WORDS, "lora.rank=2"])
    with pytest.raises(InputError, match=r"without lora.rank there are no adapters"):
        load_run("shapes", [*WORDS, "lora.targets=mlp", "train.init=builtin-shapes"])


def test_fresh_adapters_on_a_base_of_half_precision(tmp_path):
    """The built-in model is stored in float16: base and hash are those of what is computed with."""
    tiny_trained().save_pretrained(tmp_path / "base", half=True)
    train("shapes", tmp_path)
    assert (
        lora_state(run_facts(tmp_path / "run")[0]).keys()
        == load_latest(tmp_path / "run").tensors["ema"].keys()
    )


def test_adapters_bring_the_order_of_their_classes_along(tmp_path):
    """Trained where the same classes come in another order, they fit the base none the less, and words mean
    what they meant.
    """
    replace(tiny_trained(), classes=["left", "up", "right", "down"]).save_pretrained(tmp_path / "base")
    train("shapes", tmp_path)
    trained = VideoPipeline.from_pretrained(tmp_path / "run", device="cpu")
    model, _, facts = run_facts(tmp_path / "run")
    export(model, tmp_path / "adapters", "lora", facts)
    beside = VideoPipeline.from_pretrained(tmp_path / "base", device="cpu", lora=tmp_path / "adapters")
    assert beside.classes == trained.classes == ["up", "down", "left", "right"]
    assert same(clips(beside, "shapes"), clips(trained, "shapes"))


def test_adapters_of_another_strength_are_other_weights(run, tmp_path):
    """What a clip is a function of has a hash that changes with it: the outputs keep what is there."""
    _, folder, _ = run
    model, _, facts = run_facts(folder / "run")
    export(model, tmp_path / "adapters", "lora", facts)
    one = VideoPipeline.from_pretrained(folder / "base", device="cpu", lora=tmp_path / "adapters")
    card = tmp_path / "adapters/adapter_config.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "lora_alpha": 800.0}))
    assert (
        VideoPipeline.from_pretrained(folder / "base", device="cpu", lora=tmp_path / "adapters").weights
        != one.weights
    )


def test_adapters_bring_the_size_of_their_clips_and_refuse_another_codec(tmp_path):
    tiny_trained().save_pretrained(tmp_path / "base")
    train("shapes", tmp_path, "data.frames=5")
    model, _, facts = run_facts(tmp_path / "run")
    export(model, tmp_path / "adapters", "lora", facts)
    assert [
        len(clip)
        for clip in clips(
            VideoPipeline.from_pretrained(tmp_path / "base", device="cpu", lora=tmp_path / "adapters"),
            "shapes",
        )
    ] == [5, 5]
    export(
        model, tmp_path / "others", "lora", {**facts, "codec": {**facts["codec"], "fingerprint": "0" * 16}}
    )
    with pytest.raises(
        InputError, match=r"the codec of .*base is .*, but the adapters in .*others were trained with 0000"
    ):
        VideoPipeline.from_pretrained(tmp_path / "base", device="cpu", lora=tmp_path / "others")


@pytest.mark.parametrize("before", [["a", "b", "c", "d"], []])
def test_adapters_name_the_classes_that_they_were_trained_on(tmp_path, before):
    """Other names, or none, on the base: its rows stand for the new ones now."""
    replace(tiny_trained(), classes=before).save_pretrained(tmp_path / "base")
    train("shapes", tmp_path)
    model, _, facts = run_facts(tmp_path / "run")
    export(model, tmp_path / "adapters", "lora", facts)
    beside = VideoPipeline.from_pretrained(tmp_path / "base", device="cpu", lora=tmp_path / "adapters")
    assert beside.classes == ["up", "down", "left", "right"]
    assert same(
        clips(beside, "shapes"),
        clips(VideoPipeline.from_pretrained(tmp_path / "run", device="cpu"), "shapes"),
    )


def test_adapters_on_parts_that_are_random_are_refused(tmp_path):
    tiny_trained(num_classes=7).save_pretrained(tmp_path / "base")
    with pytest.raises(
        InputError, match=r"has nothing for label_embedding.table.weight, which adapters would leave random"
    ):
        train("shapes", tmp_path, "train.init_gaps=label_embedding.*")
    assert not list((tmp_path / "run").rglob("*.safetensors"))
