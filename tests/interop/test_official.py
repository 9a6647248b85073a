# SPDX-License-Identifier: Apache-2.0
"""Released Latte files: against a plain evaluation of the released layout, and bit for bit out again."""

import resource
from pathlib import Path

import pytest
import torch
from reference.official import released_latte, released_state
from support import noise, wake

from latte.checks import InputError, RunError
from latte.interop.coverage import PLACEHOLDERS, translate
from latte.interop.load import load_external
from latte.interop.official import TABLE, official_state, save_official, understand
from latte.interop.readers import read_tensors
from latte.model.latte import Latte, ModelConfig
from tiny_runs import FORKS

T = torch.tensor([3, 777])


def write(path, state, wrap="ema", prefix=""):
    state = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({wrap: state} if wrap else state, path)
    return path


@pytest.mark.parametrize("classes", [None, 5])
@torch.no_grad()
def test_computes_what_the_released_code_does(classes, tmp_path):
    state = released_state(classes=classes)
    loaded = load_external(write(tmp_path / "ffs.pt", state), heads=4)
    z, label = noise(2, 4, 4, 8, 8), None if classes is None else torch.tensor([0, 5])
    expected = released_latte(state, z, T, 4, label)
    assert expected.std() > 0.1
    found = loaded.model()(
        z, T, None if classes is None else torch.tensor([0, -1])
    )  # the last row is the null class
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("classes", [None, 5])
def test_round_trip_bit_for_bit_both_ways(classes, tmp_path):
    external = released_state(classes=classes)
    loaded = load_external(write(tmp_path / "in.pt", external), heads=4)
    names = save_official(loaded.model(), tmp_path / "out.pt")
    again = torch.load(tmp_path / "out.pt", weights_only=True)["ema"]
    assert set(names) == set(again) == set(external)
    learned = [name for name in external if name not in ("pos_embed", "temp_embed")]
    assert all(torch.equal(again[name], external[name]) for name in learned)
    assert all((again[name] - external[name]).abs().max() < 1e-6 for name in ("pos_embed", "temp_embed"))

    model = wake(
        Latte(ModelConfig(depth=4, width=32, heads=4, latent_size=8, num_frames=4, num_classes=classes))
    )
    save_official(model, tmp_path / "ours.pt")
    back = load_external(tmp_path / "ours.pt", heads=4)
    assert back.config == model.config
    assert back.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(back.state_dict[name], tensor) for name, tensor in model.state_dict().items())
    assert back.report.dropped.keys() == {"pos_embed", "temp_embed"}
    assert "differs by 0" in back.report.dropped["pos_embed"]


def test_names_of_the_published_size():
    with torch.device("meta"):
        plain, classes = (
            official_state(Latte(ModelConfig())),
            official_state(Latte(ModelConfig(num_classes=101))),
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in classes.items()}
    assert (len(plain), len(classes)) == (292, 293)
    assert shapes.keys() - plain.keys() == {"y_embedder.embedding_table.weight"}
    error_text = {
        "pos_embed": (1, 256, 1152),
        "temp_embed": (1, 16, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "y_embedder.embedding_table.weight": (102, 1152),
    }
    for k in (0, 27):
        error_text |= {
            f"blocks.{k}.attn.qkv.weight": (3456, 1152),
            f"blocks.{k}.attn.proj.weight": (1152, 1152),
            f"blocks.{k}.mlp.fc1.weight": (4608, 1152),
            f"blocks.{k}.mlp.fc2.weight": (1152, 4608),
            f"blocks.{k}.adaLN_modulation.1.weight": (6912, 1152),
        }
    assert error_text.items() <= shapes.items()
    raw = {}
    for size in "SBL":
        with torch.device("meta"):
            raw[size] = (
                sum(tensor.numel() for tensor in official_state(Latte(ModelConfig(size=size))).values()) * 4
            )
    assert raw == {"S": 130_340_480, "B": 519_023_744, "L": 1_828_376_704}, (
        "bytes of the published files' tensors"
    )


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_sizes_are_read_from_the_tensors(size):
    config = ModelConfig(
        size=size, num_frames=8, latent_size=16, patch_size=4, num_classes=7, learn_sigma=False
    )
    with torch.device("meta"):
        model = Latte(config)
    assert understand(official_state(model), None, None).config == config


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        ("ema", ""),
        ("model", ""),
        (None, ""),
        ("ema", "_orig_mod."),
        ("model", "module._orig_mod."),
        (None, "module."),
    ],
)
def test_wrappers_and_prefixes(wrap, prefix, tmp_path):
    state = released_state()
    loaded = load_external(write(tmp_path / "a.pt", state, wrap, prefix), heads=4)
    assert torch.equal(loaded.state_dict["final_linear.weight"], state["final_layer.linear.weight"])


def test_of_a_training_file_the_average_is_taken(tmp_path):
    average, raw = released_state(seed=1), released_state(seed=2)
    torch.save({"model": raw, "ema": average, "train_steps": 7}, tmp_path / "0000007.pt")
    loaded = load_external(tmp_path / "0000007.pt", heads=4)
    assert torch.equal(loaded.state_dict["final_linear.weight"], average["final_layer.linear.weight"])
    assert loaded.facts == {"train_steps": "7"}


def test_the_first_files_name_of_the_temporal_table(tmp_path):
    state = released_state(frames=6)
    state["time_embed"] = state.pop("temp_embed")
    loaded = load_external(write(tmp_path / "a.pt", state), heads=4)
    assert loaded.config.num_frames == 6
    assert loaded.report.dropped.keys() == {"pos_embed", "time_embed"}


def test_half_precision_files_load_and_go_out_as_they_came(tmp_path):
    state = {name: tensor.half() for name, tensor in released_state().items()}
    loaded = load_external(write(tmp_path / "a.pt", state), heads=4)
    assert loaded.state_dict["final_linear.weight"].dtype == torch.float16
    assert loaded.model().final_linear.weight.dtype == torch.float32
    assert torch.equal(loaded.model().final_linear.weight.half(), state["final_layer.linear.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"text_embedding_projection.1.weight": torch.zeros(32, 77 * 4)}), "extras 78"),
        (lambda s: s.update({"pos_embed": s["pos_embed"].roll(1, 2)}), "pos_embed differs by"),
        (lambda s: s.update({"temp_embed": s["temp_embed"] + 0.01}), "temp_embed differs by 0.01"),
        (lambda s: s.update({"pos_embed": s["pos_embed"][:, :15]}), "released models are square"),
        (lambda s: s.update({"pos_embed": s["pos_embed"][..., :30]}), "instead of .1, 16, 32."),
        (lambda s: s.pop("temp_embed"), "temp_embed is not in the file"),
        (lambda s: s.pop("blocks.1.attn.qkv.bias"), "1 tensors missing .blocks.1.branches.time.qkv.bias."),
        (
            lambda s: s.update({"blocks.1.attn.q_norm.weight": torch.ones(8)}),
            "1 tensors unexpected .blocks.1.attn.q_norm.weight.",
        ),
        (
            lambda s: s.update({"blocks.2.mlp.fc1.weight": torch.ones(64, 32)}),
            r"blocks.2.mlp.fc1.weight has shape \(64, 32\) instead of",
        ),
        (lambda s: s.update({"x_embedder.proj.weight": torch.ones(32, 16)}), "instead of 4 axes"),
        (lambda s: s.update({"final_layer.linear.weight": torch.ones(33, 32)}), "33 rows"),
        (
            lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.3.")],
            "needs a multiple of 2",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(change, message, tmp_path):
    state = released_state()
    change(state)
    with pytest.raises(InputError, match=message) as error:
        load_external(write(tmp_path / "a.pt", state), heads=4)
    assert "\n" not in str(error.value)


def test_heads_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"width 32.*give heads="):
        load_external(write(tmp_path / "a.pt", released_state()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": 2}, "supports model.variant=1 only"),
        ({"conditioning": "all_tokens"}, "s_adaln"),
        ({"temporal_position": "rotary"}, "absolute"),
        ({"patch": "compression"}, "uniform"),
        ({"latent_size": (8, 12)}, "square"),
    ],
)
def test_what_the_released_code_cannot_hold_is_not_exported(changes, message, tmp_path):
    model = Latte(
        ModelConfig(**{"depth": 2, "width": 32, "heads": 4, "latent_size": 8, "num_frames": 4, **changes})
    )
    with pytest.raises(InputError, match=message):
        save_official(model, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_table_is_a_bijection():
    assert all(
        PLACEHOLDERS[key]
        for row in TABLE
        for side in row
        for key in side.split("{")[1:]
        for key in [key.partition("}")[0]]
    )
    with torch.device("meta"):
        ours = list(Latte(ModelConfig(num_classes=3)).state_dict())
    external = translate(ours, TABLE, "to_external")
    assert len(set(external.values())) == len(ours)
    assert {there: here for here, there in external.items()} == translate(external.values(), TABLE, "to_ours")
    with pytest.raises(InputError, match="did you mean 'to_ours'"):
        translate(ours, TABLE, "toours")


@pytest.mark.parametrize("name", ["ours", "ours.safetensors", "folder.pt"])
def test_only_a_file_with_the_ending_of_one_is_written(name, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    model = Latte(ModelConfig(depth=2, width=32, heads=4, latent_size=8, num_frames=4))
    with pytest.raises(InputError, match=rf"{name}' does not end in .pt|is a folder, not a regular file"):
        save_official(model, tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == ["folder.pt"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    model = Latte(ModelConfig(depth=2, width=32, heads=4, latent_size=8, num_frames=4))
    with pytest.raises(RunError, match="No space left"):
        save_official(model, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_reads_what_it_writes_under_dotted_names(tmp_path):
    save_official(
        Latte(ModelConfig(depth=2, width=32, heads=4, latent_size=8, num_frames=4)), tmp_path / "a.pt"
    )
    tensors, _ = read_tensors(tmp_path / "a.pt")
    assert all(name.startswith("ema.") for name in tensors)


def save_on_a_small_disk(folder: str, limits: list[int], results) -> None:
    model = Latte(ModelConfig(depth=2, width=32, heads=4, latent_size=8, num_frames=4))
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save_official(model, Path(folder) / "x.pt")
            results.put((limit, None, []))
        except Exception as error:
            results.put(
                (limit, f"{type(error).__name__}: {error}", [file.name for file in Path(folder).iterdir()])
            )
    results.put(None)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """torch reports a full disk as a RuntimeError of its own; the disk is really too small here."""
    limits = [0, 1, 100, 10_000, 100_000]
    results = FORKS.SimpleQueue()
    arguments = (str(tmp_path), [*limits, 10**7], results)
    child = FORKS.Process(target=save_on_a_small_disk, args=arguments, daemon=True)
    child.start()
    seen = list(iter(results.get, None))
    child.join(20)
    assert seen.pop() == (10**7, None, [])
    assert len(seen) == len(limits)
    for _, message, left in seen:
        assert message.startswith("RunError: could not write the released layout to ")
        assert "File too large" in message
        assert "\n" not in message
        assert left == []


def test_nonfinite_weights_are_not_exported(tmp_path):
    model = Latte(ModelConfig(depth=2, width=32, heads=4, latent_size=8, num_frames=4))
    with torch.no_grad():
        model.final_linear.bias[3] = float("nan")
    with pytest.raises(RunError, match=r"'final_layer.linear.bias' holds 1 non-finite"):
        save_official(model, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_as_readable_as_the_umask_says(tmp_path):
    model = Latte(ModelConfig(depth=2, width=32, heads=4, latent_size=8, num_frames=4))
    (tmp_path / "plain").touch()
    save_official(model, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_mode == (tmp_path / "plain").stat().st_mode
