# SPDX-License-Identifier: Apache-2.0
"""The ablation: settings follow the tables, a sweep trains as ``latte train``, verdicts keep their rule."""

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import product
from xml.dom.minidom import parseString

import numpy as np
import pytest
import torch
from support import noise, wake

from latte.ablate import metrics, sweep
from latte.ablate.axes import AXES, BASELINE, make_settings
from latte.ablate.claims import (
    CONCLUSIONS,
    EQUAL,
    FAILS,
    HOLDS,
    ONE_SEED,
    UNMEASURED,
    WITHIN,
    Claim,
    Conclusions,
    verdict,
)
from latte.ablate.metrics import (
    METRICS,
    HeldOut,
    Metric,
    consistency,
    generate_clips,
    held_out_keys,
    heldout_loss,
    label_accuracy,
    make_held_out,
    open_ablation_data,
    other_clips,
    real_clips,
)
from latte.ablate.plan import Plan, Point, append, base_config, read_points, summary
from latte.ablate.report import judged, show
from latte.build import Job, build, build_model
from latte.checkpoint.run import load_checkpoint
from latte.checks import InputError, RunError
from latte.cli.ablate import columns
from latte.config.run import load_run
from latte.data.datasets import ProceduralDataset, build_dataset
from latte.data.hold_out import Subset
from latte.data.procedural import DIRECTIONS, draw_scene, render
from latte.data.writers import write_mp4
from latte.diffusion.config import build_process
from latte.diffusion.loss import OBJECTIVES
from latte.interop.dit import MAPPINGS
from latte.model.conditioning import CONDITIONINGS
from latte.model.latte import SIZES
from latte.model.patches import PATCHES
from latte.model.positions import TEMPORAL_POSITIONS
from latte.model.variants import VARIANTS
from latte.profile.flops import count
from latte.training.optim import OPTIMIZERS
from tiny import WORDS

CPU = torch.device("cpu")
TABLES = {
    "variant": VARIANTS,
    "patch": PATCHES,
    "conditioning": CONDITIONINGS,
    "temporal_position": TEMPORAL_POSITIONS,
    "objective": OBJECTIVES,
    "optimizer": OPTIMIZERS,
    "size": SIZES,
}


def base(*words, run="shapes"):
    return base_config(load_run(run, [*WORDS, "data.frames=4", "diffusion.objective=paper", *words])[0])


def plan_for(tmp_path, *words, axes=("temporal_position",), **changes):
    given = {"seeds": (0, 1), "points": 2, "heldout": 3, "generated": 2, **changes}
    return Plan(base("train.steps=4", *words), "shapes", (), axes, tmp_path / "sweep", **given)


def point(setting, seed, step, loss, accuracy=None, score=None):
    """A point that took one second."""
    values = {"heldout_loss": loss, "label_accuracy": accuracy, "consistency": None, "score": score}
    return Point(setting, seed, step, 1.0, values)


def run(plan, **changes):
    """Sweep -> (exit code, its lines)."""
    lines = []
    return sweep.sweep(
        plan,
        make_settings(plan.base, plan.axes)[0],
        CPU,
        lines.append,
        **{"on_run_end": lambda: None, **changes},
    ), lines


def lines_of(plan):
    """The whole lines of results.jsonl without times."""
    lines = [
        json.loads(line)
        for line in (plan.out / "results.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    return sorted(
        json.dumps({key: value for key, value in line.items() if key != "seconds"}) for line in lines
    )


@pytest.mark.parametrize("axis", TABLES)
def test_an_entry_added_to_a_table_is_a_setting(axis, monkeypatch):
    named = named_size()
    before = [setting.name for setting in make_settings(named, [axis])[0]]
    assert before == [str(name) for name in TABLES[axis]]
    monkeypatch.setitem(TABLES[axis], "novelty", replace_like(axis))
    assert [setting.name for setting in make_settings(named, [axis])[0]] == [*before, "novelty"]


def named_size():
    """A recipe with a size of Table 4, the smallest."""
    return base_config(load_run("ffs", ["model.size=S", "model.latent_size=32"])[0])


def replace_like(axis):
    """A new value for a table that differs in nothing that matters."""
    first = next(iter(TABLES[axis].values()))
    return (4, 64, 4) if axis == "size" else first  # blocks, width, heads


@pytest.mark.parametrize("axis", sorted(set(AXES) - {"interval"}))
def test_every_axis_holds_the_baseline_once_and_its_settings_differ(axis):
    recipe = base("model.depth=4")  # the least that every axis has two settings for
    settings, _ = make_settings(recipe, [axis])
    assert [setting.config for setting in settings if setting.run == BASELINE] == [recipe]
    assert (
        len({(str(setting.config), setting.mapping) for setting in settings})
        == len({setting.run for setting in settings})
        == len(settings)
    )
    assert all(setting.cost == count(setting.config.model) for setting in settings)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_an_explicit_depth_have_about_its_parameters(variant):
    settings, _ = make_settings(base("model.depth=10", f"model.variant={variant}"), ["variant"])
    weights = [setting.config.model.depth * setting.config.model.variant_spec.weight for setting in settings]
    assert len(weights) == len(VARIANTS)
    assert all(abs(weight - 10 * VARIANTS[variant].weight) <= 22 for weight in weights), (
        "a block more or less"
    )
    assert [setting.config.model.depth for setting in settings if setting.name == str(variant)] == [10]


def test_variants_of_a_named_size_keep_the_papers_depths():
    settings, _ = make_settings(named_size(), ["variant"])
    assert [setting.config.model.dimensions[0] for setting in settings] == [12, 12, 10, 10, 12]
    assert {setting.config.model.depth for setting in settings} == {None}


def test_sizes_ascend_and_scaled_ones_keep_the_width_of_a_head():
    scaled, _ = make_settings(base("model.width=32", "model.heads=4"), ["size"])
    assert [setting.name for setting in scaled] == ["x0.5", "x0.75", "x1"]
    assert {
        setting.config.model.dimensions[1] // setting.config.model.dimensions[2] for setting in scaled
    } == {8}
    for settings in (scaled, make_settings(named_size(), ["size"])[0]):
        parameters = [setting.cost.parameters for setting in settings]
        assert parameters == sorted(set(parameters))


@pytest.mark.parametrize("variant", OBJECTIVES)
def test_every_objective_gets_a_sampler_that_reads_its_prediction(variant):
    sampler = "flow" if variant == "rectified_flow" else "ddim"
    settings, _ = make_settings(
        base(f"diffusion.objective={variant}", f"sample.sampler={sampler}"), ["objective"]
    )
    for setting in settings:
        config, material = setting.config, open_ablation_data([setting.config], CPU, 1)[setting.config.data]
        assert [
            clip.dtype for clip in generate_clips(build_model(config.model, 0), config, material.codec, 1)
        ] == [np.uint8]


@pytest.mark.parametrize(
    ("words", "axes", "expected"),
    [
        ((), ["variants"], "did you mean 'variant'"),
        ((), ["patch", "patch"], "more than once"),
        ((), ["interval"], "data.kind"),
        (("model.heads=1",), ["size"], "nothing to compare"),
        (("data.frames=3",), ["patch"], "multiple of model.tube = 2"),
    ],
)
def test_what_cannot_be_swept_is_one_line(words, axes, expected):
    with pytest.raises(InputError, match=expected) as found:
        make_settings(base(*words), axes)
    assert "\n" not in str(found.value)


def test_values_that_a_recipe_cannot_have_are_left_out_with_the_reason():
    settings, left = make_settings(base("model.heads=1", "model.width=16"), ["variant"])
    assert [setting.name for setting in settings] == ["1", "2", "3", "joint"]
    assert [(one.axis, one.name) for one in left] == [("variant", "4")]
    assert "splits the heads" in left[0].reason


def test_the_paper_is_quoted_for_known_axes_and_settings_only():
    assert CONCLUSIONS.keys() <= AXES.keys()
    recipe, named = base(), named_size()
    for axis, conclusions in CONCLUSIONS.items():
        names = {
            setting.name
            for setting in make_settings(named if axis in ("interval", "size") else recipe, [axis])[0]
        }
        assert {name for claim in conclusions.claims for pair in claim.pairs for name in pair} <= names
    ascending = CONCLUSIONS["size"].claims_about(["S", "B", "L"])[0]
    assert ascending.pairs == (("B", "S"), ("L", "B"))
    assert Conclusions().claims_about(["a"]) == ()


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], HOLDS),  # always one apart
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], FAILS),
        (
            [1.0, 5.0, 9.0],
            [2.0, 6.1, 10.0],
            HOLDS,
        ),  # seeds differ by more than the settings do, but in pairs it is clear
        (
            [1.0, 1.0, 1.0],
            [1.1, 1.2, 1.5],
            WITHIN,
        ),  # differences of 0.1 to 0.5 vary by more than their median
        ([0.5, 0.0, 1.0], [0.5, 0.0, 1.0], EQUAL),
        ([1.0], [2.0], ONE_SEED),
        ([], [2.0], UNMEASURED),
    ],
)
def test_the_verdict_keeps_its_rule(first, second, expected):
    values = {"a": dict(enumerate(first)), "b": dict(enumerate(second))}
    assert verdict([("a", "b")], values, 1) == expected
    turned = {
        "a": {seed: -value for seed, value in values["a"].items()},
        "b": {seed: -value for seed, value in values["b"].items()},
    }
    assert verdict([("a", "b")], turned, -1) == expected, "higher is better: the same, turned round"
    assert verdict([("b", "a")], values, 1) == {HOLDS: FAILS, FAILS: HOLDS}.get(expected, expected)


def test_a_verdict_on_several_pairs_needs_all_of_them_and_fails_by_one():
    low, mid, high, unclear = ({0: v, 1: v + e} for v, e in ((1.0, 0.1), (2.0, 0.1), (3.0, 0.1), (1.0, 4.0)))
    values = {"low": low, "mid": mid, "high": high, "unclear": unclear}
    assert verdict([("low", "mid"), ("low", "high")], values, 1) == HOLDS
    assert verdict([("low", "mid"), ("high", "mid")], values, 1) == FAILS
    assert verdict([("low", "mid"), ("low", "unclear")], values, 1) == WITHIN
    assert verdict([], values, 1) == UNMEASURED
    assert verdict([("a", "b")], {"a": {0: 1.0, 1: 1.0}, "b": {1: 2.0, 2: 2.0}}, 1) == ONE_SEED, (
        "one seed in common"
    )


@pytest.fixture
def videos(tmp_path):
    """Eight videos of 16 x 16, of 12 frames, but the first of 6."""
    for index in range(8):
        frames = 6 if index == 0 else 12
        write_mp4(tmp_path / "videos" / f"{index}.mp4", render(draw_scene(0, index, frames), frames, 16, 16))
    return tmp_path / "videos"


def test_held_out_videos_are_never_trained_on_and_all_intervals_share_them(videos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ("data.kind=folder", f"data.root={videos}", "data.labels=false", "model.num_classes=null")
    settings, _ = make_settings(base(*words), ["interval"])
    assert [setting.name for setting in settings] == ["1", "2", "3"]
    materials = open_ablation_data([setting.config for setting in settings], CPU, 5)
    draw = torch.Generator()
    kept = [
        [part.dataset.clip(index, draw).key for index in range(len(part.dataset))]
        for part in materials.values()
    ]
    assert kept[0] == kept[1] == kept[2], "one data order for all"
    assert "0.mp4" not in kept[0], "too short for interval 3, so no setting has it"
    held = held_out_keys([f"{index}.mp4" for index in range(1, 8)])
    assert len(held) == 1
    assert sorted([*kept[0], *held]) == [f"{index}.mp4" for index in range(1, 8)], "none of them in both"
    assert {part.dataset.digest for part in materials.values()} == {
        materials[settings[0].config.data].dataset.digest
    }
    assert materials[settings[0].config.data].held_out.z0.shape == (5, 4, 3, 16, 16)
    assert [len(held_out_keys([str(k) for k in range(n)])) for n in (2, 30, 100)] == [1, 3, 10]
    with pytest.raises(InputError, match="one is held out"):
        held_out_keys(["alone"])


def test_a_subset_is_a_dataset():
    whole = build_dataset(base().data)
    part = Subset(whole, [5, 2], ["e", "b"])
    draw = torch.Generator().manual_seed(0)
    assert torch.equal(part.clip(1, draw).video, whole.clip(2, draw).video)
    assert torch.equal(
        part.image(0, torch.Generator().manual_seed(1)).video,
        whole.image(5, torch.Generator().manual_seed(1)).video,
    )
    assert (len(part), part.classes, part.latent, part.describe()["clips"]) == (
        2,
        whole.classes,
        whole.latent,
        2,
    )
    assert part.describe() != Subset(whole, [5, 2], ["e", "c"]).describe()


def test_the_held_out_data_are_the_same_for_every_setting_and_spreads_timesteps_evenly():
    config = base()
    first, second = (
        make_held_out(
            other_clips(config.data), open_ablation_data([config], CPU, 1)[config.data].codec, 1000, 8
        )
        for _ in range(2)
    )
    assert all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("z0", "label", "t", "eps")
    )
    assert first.t.sort().values.tolist() == [62, 187, 312, 437, 562, 687, 812, 937]
    trained = build_dataset(config.data).clip(0, torch.Generator()).video
    assert all(not torch.equal(trained, clip) for clip in first.z0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_heldout_loss_agrees_with_a_slow_loop(objective):
    sampler = "flow" if objective == "rectified_flow" else "ddim"
    config = base(f"diffusion.objective={objective}", f"sample.sampler={sampler}")
    model, process = wake(build_model(config.model, 0), scale=0.3).eval(), build_process(config.diffusion)
    test = HeldOut(
        noise(5, 4, 3, 16, 16, seed=1),
        torch.tensor([0, 1, 2, 3, 0]),
        torch.tensor([0, 250, 500, 750, 999]),
        noise(5, 4, 3, 16, 16, seed=2),
    )
    slow = []
    for z0, label, t, eps in zip(test.z0.double(), test.label, test.t, test.eps.double(), strict=True):
        a, s = process.signal[t].item(), process.noise[t].item()
        zt = a * z0 + s * eps
        with torch.no_grad():
            output = model(zt.float()[None], t[None], label[None])[0, :, :3].double()
        error = {
            "paper": output - eps,
            "min_snr": output - eps,
            "v": a * output + s * zt - eps,
            "v_min_snr": a * output + s * zt - eps,
            "z0": (zt - a * output) / s - eps,
            "rectified_flow": output - (eps - z0),
        }
        slow.append(error[objective].square().mean().item())
    assert heldout_loss(model, config, test) == pytest.approx(np.mean(slow), rel=1e-6)
    one_by_one = replace(config, train=replace(config.train, micro_batch=1))
    assert heldout_loss(model, one_by_one, test) == pytest.approx(np.mean(slow), rel=1e-6)


def test_label_accuracy_counts_the_clips_that_move_as_labelled():
    moving = [render(draw_scene(1, index, 4), 4, 32, 32) for index in range(8)]
    moving[3] = moving[0]  # its label is right, it moves up
    assert list(DIRECTIONS)[3] == "right"
    assert label_accuracy(moving, base().data.scene_set) == 7 / 8


def test_consistency_counts_the_clips_whose_shape_stays_the_same():
    clips = [render(draw_scene(1, index, 8), 8, 64, 64) for index in range(8)]
    clips[2] = np.concatenate(
        [clips[2][:4], clips[3][4:]]
    )  # another shape, colour or size from the middle on
    clips[5] = np.concatenate([clips[5][:4], clips[5][:4] // 2])  # half as bright
    assert consistency(clips, base().data.scene_set) == 6 / 8


def test_clips_are_generated_with_seeds_and_labels_in_turn(monkeypatch):
    seen = []

    def generate(model, process, codec, seeds, labels, *rest, **more):
        seen.append((list(seeds), labels))
        return ((seed, np.full(1, seed, np.uint8)) for seed in seeds)

    monkeypatch.setattr(metrics, "generate", generate)
    for words in ((), ("model.num_classes=null",)):
        config = base(*words)
        assert [clip.tolist() for clip in generate_clips(build_model(config.model, 0), config, None, 6)] == [
            [seed] for seed in range(6)
        ]
    assert seen == [([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1]), ([0, 1, 2, 3, 4, 5], None)]


def test_real_clips_come_from_the_training_set_each_once_before_any_twice():
    data = replace(base().data, num_clips=5)
    dataset, codec = build_dataset(data), open_ablation_data([base()], CPU, 1)[base().data].codec
    found = real_clips(dataset, codec, 8)
    all_of_them = {
        render(draw_scene(data.seed, index, data.frames), data.frames, *data.size).tobytes()
        for index in range(5)
    }
    assert {clip.tobytes() for clip in found[:5]} == all_of_them
    assert {clip.tobytes() for clip in found[5:]} < all_of_them


def test_a_sweep_trains_what_latte_train_would_and_does_nothing_twice(tmp_path, monkeypatch):
    plan = plan_for(tmp_path)
    code, lines = run(plan)
    assert code == 0
    assert len(lines) == 1 + 2 * 2 * 2
    found = read_points(plan.out)
    assert {key: sorted(steps) for key, steps in found.items()} == {
        (setting, seed): [2, 4] for setting in (BASELINE, "temporal_position-rotary") for seed in (0, 1)
    }
    words = [
        *WORDS,
        "data.frames=4",
        "diffusion.objective=paper",
        "train.steps=4",
        "model.temporal_position=rotary",
        "run.seed=1",
        f"run.dir={tmp_path / 'alone'}",
    ]
    whole = build(load_run("shapes", words)[0], "cpu").train()
    part = json.loads(
        (plan.out / "temporal_position-rotary/seed-1/checkpoints/step-4/manifest.json").read_text()
    )
    alone = json.loads((tmp_path / "alone/checkpoints/step-4/manifest.json").read_text())
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert part["files"][name] == alone["files"][name], f"{whole['weights_sha256']}: bit for bit"
    config = load_run(tmp_path / "alone")[0]
    ema, test = (
        build_model(config.model, 1),
        open_ablation_data([config], CPU, plan.heldout)[config.data].held_out,
    )
    ema.load_state_dict(load_checkpoint(tmp_path / "alone/checkpoints/step-4", only={"ema"}).tensors["ema"])
    assert found["temporal_position-rotary", 1][4].values["heldout_loss"] == heldout_loss(
        ema, config, test
    ), "the EMA weights"
    before = lines_of(plan)
    monkeypatch.setattr(Job, "train", lambda self, until: pytest.fail("trained again"))
    assert run(plan)[1] == ["2 settings, 2 seeds: 0 of 4 runs are to be trained"]
    assert lines_of(plan) == before
    assert [entry["seeds"] for entry in summary(plan, make_settings(plan.base, plan.axes)[0])] == [
        [0, 1],
        [0, 1],
    ]


@pytest.mark.parametrize(
    ("owner", "name", "call"), [(ProceduralDataset, "clip", 18), (sweep, "measure_run", 3)]
)
def test_a_signal_stops_a_sweep_that_then_ends_as_if_it_had_not(tmp_path, monkeypatch, owner, name, call):
    whole, cut = (plan_for(tmp_path / folder, seeds=(0,), generated=0) for folder in ("whole", "cut"))
    assert run(whole)[0] == 0
    true, calls = getattr(owner, name), []

    def stopping(*arguments):
        calls.append(name)
        if len(calls) == call:  # in the middle of training the first setting, or of measuring the second
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        assert run(cut)[0] == 143
    assert len(calls) >= call, "the signal was sent"
    assert 0 < len(lines_of(cut)) < len(lines_of(whole))
    assert run(cut)[0] == 0
    assert lines_of(cut) == lines_of(whole)


def test_half_a_line_of_results_is_measured_again_and_a_gap_is_reported(tmp_path):
    plan = plan_for(tmp_path, seeds=(0,), generated=0)
    run(plan)
    file, before = plan.out / "results.jsonl", lines_of(plan)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:20] + "\n")
    assert run(plan)[0] == 0
    assert lines_of(plan) == before
    file.write_text("".join(lines[1:]))
    with pytest.raises(RunError, match=r"step 2 is not in .* delete"):
        run(plan)


def test_a_run_that_fails_does_not_stop_the_others(tmp_path):
    plan = plan_for(tmp_path, seeds=(0,), generated=0)
    settings, _ = make_settings(plan.base, plan.axes)
    divergent = replace(
        settings[0], config=replace(settings[0].config, train=replace(plan.base.train, lr=1e30))
    )
    with pytest.raises(RunError, match=r"baseline seed 0: .* NaN or Inf"):
        sweep.sweep(plan, [divergent, settings[1]], CPU, lambda line: None, lambda: None)
    assert list(read_points(plan.out)) == [("temporal_position-rotary", 0)]


def test_another_recipe_in_the_same_folder_is_refused_with_every_difference(tmp_path):
    run(plan_for(tmp_path, seeds=(0,), generated=0))
    before = sorted(path.name for path in (tmp_path / "sweep").iterdir())
    with pytest.raises(InputError) as found:
        run(plan_for(tmp_path, "train.lr=0.5", "data.seed=7", seeds=(0,), generated=0, points=1))
    assert all(key in str(found.value) for key in ("train.lr", "data.seed", "--points"))
    assert before == sorted(path.name for path in (tmp_path / "sweep").iterdir())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"points": 0}, "--points"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (1, 1)}, "twice"),
        ({"heldout": 0}, "--heldout"),
    ],
)
def test_counts_that_cannot_be_are_refused(tmp_path, changes, expected):
    with pytest.raises(InputError, match=expected):
        plan_for(tmp_path, **changes)


def test_the_init_axis_needs_a_dit(tmp_path):
    plan = plan_for(tmp_path, axes=("init",))
    assert [setting.mapping for setting in make_settings(plan.base, ["init"])[0]] == [None, *MAPPINGS]
    with pytest.raises(InputError, match="--dit is missing"):
        run(plan)
    assert not plan.out.exists()


def test_the_init_settings_start_from_the_dit(tmp_path):
    from safetensors.torch import save_file

    plan = plan_for(tmp_path, "model.width=32", "model.heads=2", axes=("init",))
    plan = replace(plan, dit=str(tmp_path / "dit.safetensors"))
    width, patch = 32, 3 * 4 * 4
    shapes = {"x_embedder.proj.weight": (width, 3, 4, 4), "x_embedder.proj.bias": (width,)}
    shapes |= {
        "y_embedder.embedding_table.weight": (11, width),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
    }
    shapes |= {"t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,)}
    shapes |= {"final_layer.linear.weight": (2 * patch, width), "final_layer.linear.bias": (2 * patch,)}
    shapes |= {
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }
    for k in range(2):
        for part, out, inner in (
            ("attn.qkv", 3, 1),
            ("attn.proj", 1, 1),
            ("mlp.fc1", 4, 1),
            ("mlp.fc2", 1, 4),
            ("adaLN_modulation.1", 6, 1),
        ):
            shapes |= {
                f"blocks.{k}.{part}.weight": (out * width, inner * width),
                f"blocks.{k}.{part}.bias": (out * width,),
            }
    save_file(
        {name: noise(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}, plan.dit
    )
    settings, _ = make_settings(plan.base, ["init"])
    scratch, everywhere = (sweep.initial_model(plan, setting, 0) for setting in settings[:2])
    assert settings[1].run == "init-dit-all"
    original = noise(3 * width, width, seed=list(shapes).index("blocks.1.attn.qkv.weight"))
    assert torch.equal(everywhere.state_dict()["blocks.1.branches.time.qkv.weight"], original)
    assert not torch.equal(scratch.state_dict()["blocks.1.branches.time.qkv.weight"], original)


def test_losses_of_other_clips_and_other_noise_are_not_compared(tmp_path):
    plan = plan_for(tmp_path, axes=("objective",))
    settings, left = make_settings(plan.base, plan.axes)
    plan.out.mkdir()
    for setting, seed, step in product(settings, plan.seeds, plan.steps):
        append(plan.out / "results.jsonl", point(setting.run, seed, step, 1.0, 0.0, 5.0))
    plots = parseString(show(plan, settings, left, CPU)).getElementsByTagName("svg")
    shown = [{title.firstChild.data for title in plot.getElementsByTagName("title")} for plot in plots]
    expected = {"paper (baseline)", "v", "min_snr", "v_min_snr", "z0"}
    assert shown == [expected | {"rectified_flow"}, expected, expected | {"rectified_flow"}], (
        "an accuracy of 0 is a sentence"
    )
    faster = replace(settings[1], config=replace(settings[1].config, data=replace(plan.base.data, seed=1)))
    claim = Claim("", "", (("paper", "v"),))
    found = {
        (setting.run, seed): {4: point(setting.run, seed, 4, 1.0 + place, 0.5, 9.0 - place)}
        for place, setting in enumerate(settings)
        for seed in plan.seeds
    }
    assert judged(claim, settings, found, plan)[2:] == (HOLDS, EQUAL, UNMEASURED, FAILS)
    assert judged(claim, [settings[0], faster], found, plan)[2:] == (UNMEASURED, EQUAL, UNMEASURED, FAILS)


def test_the_page_shows_every_setting_and_judges_every_claim(tmp_path):
    plan = plan_for(tmp_path, axes=("variant", "temporal_position"), generated=0)
    settings, left = make_settings(plan.base, plan.axes)
    empty = show(plan, settings, left, CPU)
    assert UNMEASURED in empty
    parseString(empty)
    plan.out.mkdir()
    losses = {
        BASELINE: 0.1,
        "variant-2": 0.2,
        "variant-3": 0.5,
        "variant-4": 0.4,
        "variant-joint": 0.3,
        "temporal_position-rotary": 0.1,
    }
    for setting, seed, step in product(losses, plan.seeds, plan.steps):
        append(plan.out / "results.jsonl", point(setting, seed, step, losses[setting] + 0.01 * seed))
    page = show(plan, settings, left, CPU)
    rows = [
        [cell.firstChild.data for cell in row.getElementsByTagName("td")]
        for row in parseString(page).getElementsByTagName("tr")
    ]
    found = {row[1]: row[3:] for row in rows if row[:1] in (["variant"], ["temporal_position"])}
    assert found == {
        "Variant 1 is the best of the four.": [HOLDS, *[UNMEASURED] * 3],
        "Variant 4 is the worst of the four.": [FAILS, *[UNMEASURED] * 3],
        "Absolute positions are slightly better than rotary.": [EQUAL, *[UNMEASURED] * 3],
    }
    assert {"1 (baseline)", "2", "3", "4", "joint", "absolute (baseline)", "rotary"} <= {
        row[0] for row in rows if row
    }
    assert next([row[0], row[4]] for row in rows if row and row[0] == "3") == ["3", "0.505 (0.5 to 0.51)"]
    assert page.count("<svg") == 4, "held-out loss and its difference from the baseline; nothing was graded"
    assert f"latte ablate shapes --axes={','.join(plan.axes)}" in page
    assert "latte train shapes model.variant=3 model.depth=2 run.seed=0 run.dir=runs/variant-3" in page


def test_the_page_plays_clips_of_every_setting(tmp_path):
    plan = plan_for(tmp_path, seeds=(0,), points=1, generated=6)
    run(plan)
    settings, left = make_settings(plan.base, plan.axes)
    kept = {path.name for path in (plan.folder(settings[0], 0) / "clips").iterdir()}
    assert kept == {"0.mp4", "1.mp4", "2.mp4", "3.mp4"}
    page = parseString(show(plan, settings, left, CPU))
    clips = [clip.getAttribute("src") for clip in page.getElementsByTagName("video")]
    assert len(clips) == 4 * len(settings)
    assert all(source.startswith("data:video/mp4;base64,") for source in clips)


def test_a_metric_is_one_entry(tmp_path, monkeypatch):
    plan = plan_for(tmp_path, seeds=(0,), points=1)
    entry = Metric("mean brightness", lambda found: float(np.mean(found.clips[0])), "brightness_range")
    monkeypatch.setitem(METRICS, "brightness", entry)
    assert run(plan)[0] == 0
    settings, left = make_settings(plan.base, plan.axes)
    (line, _) = (json.loads(text) for text in (plan.out / "results.jsonl").read_text().splitlines())
    assert 0 <= line["brightness"] <= 255
    assert summary(plan, settings)[0]["brightness"] == line["brightness"]
    assert summary(plan, settings)[0]["brightness_range"] == [line["brightness"]] * 2
    assert "mean brightness" in show(plan, settings, left, CPU)
    assert "mean brightness" in columns()
    monkeypatch.delitem(METRICS, "brightness")
    assert run(plan)[0] == 0, "results of a metric that is gone are read"


def test_results_of_0_1_0_are_read(tmp_path):
    line = {
        "arm": "baseline",
        "seed": 1,
        "step": 2,
        "heldout_loss": 0.5,
        "label_accuracy": None,
        "seconds": 3.0,
        "score": 7,
    }
    (tmp_path / "results.jsonl").write_text(json.dumps(line) + "\n{}\n[1]\nnull\n")
    assert read_points(tmp_path) == {
        ("baseline", 1): {2: replace(point("baseline", 1, 2, 0.5, None, 7), seconds=3.0)}
    }


def test_a_folder_of_0_1_0_is_the_same_sweep(tmp_path):
    plan = plan_for(tmp_path, seeds=(0,), generated=0)
    run(plan)
    file = plan.out / "ablation.json"
    common = json.loads(file.read_text())
    common["--graded"] = common.pop("--generated")
    del common["train.timeout"]  # a key that 0.1.0 did not have
    file.write_text(json.dumps(common))
    assert run(plan)[0] == 0
    common["--graded"] = 1
    file.write_text(json.dumps(common))
    with pytest.raises(InputError, match="--generated"):
        run(plan)


def test_a_full_disk_is_reported_before_anything_is_trained(tmp_path, monkeypatch):
    plan = plan_for(tmp_path)
    parameters = sum(setting.cost.parameters for setting in make_settings(plan.base, plan.axes)[0])
    needed = 16 * parameters * len(plan.seeds)
    usage = shutil._ntuple_diskusage(2 * needed, needed, needed)
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    with pytest.raises(RunError, match=f"but {needed:,} are free; make room"):
        run(plan)
    assert asked == [tmp_path]
    assert not plan.out.exists()


UNLABELLED = ("model.num_classes=null", "data.labels=false", "sample.guidance=1")
WORLD = ("data.scenes=world", "data.resolution=32", "model.num_classes=9")


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        (UNLABELLED, {"label_accuracy": "the labels are not those of procedural clips"}),
        (WORLD, {}),
        (
            (*WORLD, "data.frames=2"),
            dict.fromkeys(
                ("label_accuracy", "consistency"),
                "clips of data.frames=2 are too short to be graded; give data.frames=4 or more",
            ),
        ),
    ],
)
def test_metrics_that_cannot_be_measured_are_named_before_training(tmp_path, words, reasons):
    plan = plan_for(tmp_path, *words, seeds=(0,), generated=1)
    lines = run(plan)[1]
    named = [line for line in lines if "is not measured" in line]
    assert [line.split("(")[1].split(")")[0] for line in named] == [*reasons, "score"]
    for line, reason in zip(named, reasons.values(), strict=False):
        assert line.endswith(reason)
    assert lines[1 : 1 + len(named)] == named, "before anything is trained"
