# SPDX-License-Identifier: Apache-2.0
"""A fresh run that starts from given weights: a DiT, or a model like its own; its report, and what does not
fit.
"""

import json
import logging
from dataclasses import replace

import pytest
import torch
from reference.official import dit_state

from latte.build import build
from latte.checkpoint.run import latest_checkpoint, load_checkpoint
from latte.checks import InputError
from latte.config.run import load_run
from latte.interop.diffusers import save_diffusers
from latte.interop.official import save_official
from latte.model.latte import Latte
from tiny import MODEL, WORDS, tiny_text, tiny_trained
from tiny_runs import SHORT, TINY, run

LABELS = "y_embedder.embedding_table.weight"


@pytest.fixture
def dit(tmp_path):
    """A DiT of two blocks that fits TINY, and its file."""
    state = dit_state(depth=2, width=16, side=4)
    torch.save(state, tmp_path / "DiT.pt")
    return state, tmp_path / "DiT.pt"


def start(folder, path, **changes):
    """One step, too small to move a weight, of a run that starts from ``path``; its last checkpoint's
    tensors.
    """
    config = replace(SHORT, **{"steps": 1, "lr": 1e-12, "init": str(path), **changes})
    run(folder, config, model=Latte(TINY))
    return load_checkpoint(latest_checkpoint(folder)).tensors


def test_weights_and_average_start_as_the_dits(dit, tmp_path):
    state, path = dit
    tensors = start(tmp_path / "run", path)
    for group in ("model", "ema"):
        for k, attention in enumerate(("space", "time")):
            found = tensors[group][f"blocks.{k}.branches.{attention}.qkv.weight"]
            torch.testing.assert_close(found, state[f"blocks.{k}.attn.qkv.weight"], rtol=0, atol=1e-9)
        assert float(tensors[group]["label_embedding.table.weight"].abs().max()) < 1e-9


def test_the_mapping_is_followed(dit, tmp_path):
    state, path = dit
    tensors = start(tmp_path / "run", path, init_mapping="spatial")["model"]
    torch.testing.assert_close(
        tensors["blocks.0.branches.space.proj.bias"], state["blocks.0.attn.proj.bias"], rtol=0, atol=1e-9
    )
    assert not torch.allclose(
        tensors["blocks.1.branches.time.proj.bias"], state["blocks.1.attn.proj.bias"], atol=1e-3
    )


def test_log_and_file_report_every_tensor_of_dit_and_of_the_model(dit, tmp_path, caplog):
    state, path = dit
    with caplog.at_level(logging.INFO, logger="latte"):
        tensors = start(tmp_path / "run", path, init_mapping="spatial")["model"]
    report = (tmp_path / "run/init.txt").read_text()
    message = {line.split()[1]: line.split()[0] for line in report.splitlines()[1:]}
    assert {name for name in state if name not in message} == set(), "used or skipped"
    assert message[LABELS] == "dropped:"
    assert message["blocks.1.attn.qkv.weight"] == "dropped:"
    assert message["label_embedding.table.weight"] == "missing:"
    counts = list(message.values())
    assert counts.count("used:") + counts.count("missing:") == len(tensors)
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert all(line in logged for line in report.splitlines())


def test_a_run_that_goes_on_is_not_started_again_and_needs_no_dit(dit, tmp_path):
    _, path = dit
    before = start(tmp_path / "run", path)["model"]
    report = (tmp_path / "run/init.txt").read_text()
    path.unlink()
    after = start(tmp_path / "run", path, steps=2)["model"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    assert (tmp_path / "run/init.txt").read_text() == report
    with pytest.raises(InputError):
        start(tmp_path / "another", path)


def test_another_width_is_reported_with_both_and_nothing_is_written(tmp_path):
    torch.save(dit_state(depth=2, width=32, side=4), tmp_path / "DiT.pt")
    with pytest.raises(InputError, match=r"model.width is 16, but the DiT at .*DiT.pt has 32") as error:
        start(tmp_path / "run", tmp_path / "DiT.pt")
    assert "\n" not in str(error.value)
    assert not [file for file in (tmp_path / "run").rglob("*") if file.suffix]


def test_a_mapping_that_does_not_exist_is_reported_with_the_nearest():
    with pytest.raises(InputError, match=r"train.init_mapping.*did you mean 'spatial'"):
        load_run("shapes", ["train.init=DiT.pt", "train.init_mapping=spatia"])


def test_latte_train_starts_from_a_dit(tmp_path):
    torch.save(dit_state(depth=2, width=16, side=16, channels=3, patch=4), tmp_path / "DiT.pt")
    words = [
        *WORDS,
        "model.num_classes=4",
        "train.steps=1",
        f"train.init={tmp_path / 'DiT.pt'}",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert build(load_run("shapes", words)[0], "cpu").train()["step"] == 1
    assert "0 unexpected, 0 mismatched" in (tmp_path / "run/init.txt").read_text()
    assert load_run(tmp_path / "run")[0].train.init == str(tmp_path / "DiT.pt")


def job(folder, *more):
    """A run of one step, too small to move a weight, in ``folder``, and the tensors of its checkpoint."""
    words = [
        *WORDS,
        "diffusion.objective=paper",
        "train.lr=1e-12",
        "train.steps=1",
        f"run.dir={folder}",
        *more,
    ]
    build(load_run("shapes", words)[0], "cpu").train()
    return load_checkpoint(latest_checkpoint(folder)).tensors["ema"]


def equal(one, other, but=()):
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], atol=1e-9) for name in one if name not in but
    )


def test_a_run_starts_from_a_weights_folder_and_from_another_run(tmp_path):
    trained = tiny_trained()
    trained.save_pretrained(tmp_path / "weights")
    found = job(tmp_path / "one", f"train.init={tmp_path / 'weights'}")
    assert equal(found, trained.model.state_dict())
    assert equal(job(tmp_path / "two", f"train.init={tmp_path / 'one'}", "run.seed=5"), found)
    report = (tmp_path / "two/init.txt").read_text().splitlines()
    assert report[0].endswith("tensors used, 0 missing, 0 unexpected, 0 mismatched, 0 dropped")
    assert {line.split()[1] for line in report[1:]} == found.keys()


def test_other_sizes_of_clips_are_free(tmp_path):
    trained = tiny_trained()
    trained.save_pretrained(tmp_path / "weights")
    assert equal(
        job(tmp_path / "run", f"train.init={tmp_path / 'weights'}", "data.frames=5", "data.resolution=32"),
        trained.model.state_dict(),
    )


def test_a_run_starts_from_the_released_file_and_a_text_run_from_diffusers(tmp_path):
    model = Latte(replace(MODEL, latent_size=16, num_classes=4)).eval()
    save_official(model, tmp_path / "released.pt")
    assert equal(job(tmp_path / "one", f"train.init={tmp_path / 'released.pt'}"), model.state_dict())
    text = tiny_text(depth=2).model
    save_diffusers(text, tmp_path / "t2v")
    words = [
        *WORDS,
        "diffusion.objective=paper",
        "train.lr=1e-12",
        "train.steps=1",
        f"run.dir={tmp_path / 'two'}",
    ]
    build(load_run("shapes-text", [*words, f"train.init={tmp_path / 't2v'}"])[0], "cpu").train()
    assert equal(load_checkpoint(latest_checkpoint(tmp_path / "two")).tensors["ema"], text.state_dict())


def test_a_part_that_does_not_fit_is_left_out_only_when_it_is_named(tmp_path):
    tiny_trained(num_classes=7).save_pretrained(tmp_path / "weights")
    start = f"train.init={tmp_path / 'weights'}"
    with pytest.raises(
        InputError,
        match=r"train.init: .*label_embedding.table.weight has shape \(8, 16\) instead of \(5, 16\)",
    ):
        job(tmp_path / "run", start)
    found = job(tmp_path / "run", start, "train.init_gaps=label_embedding.*")
    assert equal(
        {**found, LABELS: found["label_embedding.table.weight"]},
        {**tiny_trained(num_classes=7).model.state_dict(), LABELS: 0},
        but=("label_embedding.table.weight", LABELS),
    )
    assert "mismatched: label_embedding.table.weight" in (tmp_path / "run/init.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "word", "expected"),
    [
        (
            {},
            "model.depth=4",
            r"train.init: model.depth is 4, but the weights at .* have 2; set model.depth=2",
        ),
        (
            {},
            "model.variant=2",
            r"train.init: model.variant is '?2'?, but the weights at .* have 1; make them the same",
        ),
        (
            {"temporal_position": "rotary"},
            "model.learn_sigma=true",
            r"model.temporal_position is 'absolute', but .* have rotary",
        ),
        (
            {},
            "diffusion.objective=v",
            r"prediction of diffusion.objective is 'v', but the weights at .* learned with epsilon",
        ),
        (
            {},
            "diffusion.schedule=squared_cosine",
            r"diffusion.schedule is 'squared_cosine', but .* learned with linear",
        ),
    ],
)
def test_weights_of_another_model_or_process_are_refused(changes, word, expected, tmp_path):
    tiny_trained(**changes).save_pretrained(tmp_path / "weights")
    with pytest.raises(InputError, match=expected) as error:
        job(tmp_path / "run", f"train.init={tmp_path / 'weights'}", word)
    assert "\n" not in str(error.value)
    assert not [file for file in (tmp_path / "run").rglob("*") if file.suffix]


def test_models_of_classes_and_of_captions_do_not_start_from_each_other(dit, tmp_path):
    tiny_text(depth=2).save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match=r"are a text-to-video model; set text.name"):
        job(tmp_path / "run", f"train.init={tmp_path / 'text'}")
    words = [*WORDS, "train.steps=1", f"run.dir={tmp_path / 'run'}", f"train.init={dit[1]}"]
    with pytest.raises(InputError, match="is a DiT, which reads no captions; give a PixArt-alpha"):
        build(load_run("shapes-text", words)[0], "cpu").train()


def test_another_codec_than_the_weights_learned_is_announced(tmp_path, capsys):
    tiny_trained().save_pretrained(tmp_path / "weights")
    card = json.loads((tmp_path / "weights/config.json").read_text())
    card["codec"]["fingerprint"] = "0" * 16
    (tmp_path / "weights/config.json").write_text(json.dumps(card))
    job(tmp_path / "run", f"train.init={tmp_path / 'weights'}")
    assert "notice: the weights at" in capsys.readouterr().err


def test_the_model_in_the_package_is_a_start_by_name(tmp_path):
    words = [
        f"run.dir={tmp_path / 'run'}",
        "train.init=builtin-shapes",
        "train.steps=1",
        "train.decay_steps=0",
        "train.global_batch=1",
        "train.sample_every=0",
    ]
    build(load_run("shapes", words)[0], "cpu").train()
    assert "0 missing, 0 unexpected, 0 mismatched" in (tmp_path / "run/init.txt").read_text()


def test_a_start_that_is_not_there_is_reported_before_captions_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("latte.build.read_captions", lambda *words: pytest.fail("captions can take hours"))
    with pytest.raises(InputError, match=r"train.init is 'nowhere', which does not exist"):
        build(
            load_run("shapes-text", [*WORDS, "train.init=nowhere", f"run.dir={tmp_path / 'run'}"])[0], "cpu"
        )


def test_classes_start_as_those_of_their_name(tmp_path, capsys):
    """The rows follow the names: a folder's classes come in the order of the alphabet, the weights' in
    another.
    """
    trained = tiny_trained()
    replace(trained, classes=["left", "up", "right", "down"]).save_pretrained(tmp_path / "weights")
    found = job(tmp_path / "run", f"train.init={tmp_path / 'weights'}")["label_embedding.table.weight"]
    before = trained.model.state_dict()["label_embedding.table.weight"]
    torch.testing.assert_close(
        found, before[[1, 3, 0, 2, 4]], rtol=0, atol=1e-9
    )  # up, down, left, right, none
    assert not capsys.readouterr().err.count("notice: the classes")
    replace(trained, classes=["cat", "dog", "left", "right"]).save_pretrained(tmp_path / "pets")
    found = job(tmp_path / "other", f"train.init={tmp_path / 'pets'}")["label_embedding.table.weight"]
    torch.testing.assert_close(found, before, rtol=0, atol=1e-9)
    assert (
        "are cat, dog, left, right, this run's are up, down, left, right: each starts as the one"
        in capsys.readouterr().err
    )


def test_one_checkpoint_of_a_run_is_a_start(tmp_path):
    found = job(tmp_path / "one")
    assert equal(
        job(tmp_path / "two", f"train.init={tmp_path / 'one/checkpoints/step-1'}", "run.seed=5"), found
    )


def test_a_weight_file_in_a_folder_called_checkpoints_is_no_checkpoint(tmp_path):
    model = Latte(replace(MODEL, latent_size=16, num_classes=4)).eval()
    (tmp_path / "checkpoints").mkdir()
    save_official(model, tmp_path / "checkpoints/step-1.pt")
    assert equal(
        job(tmp_path / "run", f"train.init={tmp_path / 'checkpoints/step-1.pt'}"), model.state_dict()
    )
    tiny_trained().save_pretrained(tmp_path / "repository")
    (tmp_path / "repository/checkpoints").mkdir()
    assert equal(
        job(tmp_path / "other", f"train.init={tmp_path / 'repository'}"), tiny_trained().model.state_dict()
    )
