# SPDX-License-Identifier: Apache-2.0
"""``latte sample "a sentence"``: what is a prompt and what a path, and a line for every odd sentence."""

import json
from pathlib import Path

import pytest

from latte.checks import InputError
from latte.data.media import probe
from latte.inference.prompts import Vocabulary
from latte.inference.requests import split_prompt
from latte.interop.readers import BUILTIN
from tiny import tiny_text

SENTENCE = "a yellow ball bounces over a blue floor"
WORLD = {"kind": "procedural", "scenes": "world", "language": "mixed"}
FAST = ("--steps", 2, "--json")


@pytest.fixture(scope="session")
def world_model(tmp_path_factory):
    """The weights folder of a random text model that records the captions of the world."""
    folder = tmp_path_factory.mktemp("model") / "world"
    pipe = tiny_text()
    pipe.about = {"data": WORLD}
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def sentence(latte, world_model, monkeypatch):
    """Call ``latte sample`` with ``world_model`` as the built-in model."""
    monkeypatch.setitem(BUILTIN, "builtin", world_model)
    return lambda *words: latte("sample", *words)


def warnings_of(found):
    return [line for line in found.err.splitlines() if line.startswith("warning: ")]


def test_a_sentence_is_a_prompt_for_the_built_in_model(sentence):
    found = sentence(SENTENCE, "--count", 2, "--seed", 3, *FAST)
    assert found.code == 0, found.err
    assert [(clip["seed"], clip["prompt"]) for clip in found.json["clips"]] == [(3, SENTENCE), (4, SENTENCE)]
    assert [probe(clip["path"]).frames for clip in found.json["clips"]] == [3, 3]
    assert found.json["model"] == "builtin"
    assert warnings_of(found) == []
    same = sentence("builtin", "--prompt", SENTENCE, "--count", 2, "--seed", 3, *FAST)
    assert same.json == found.json


@pytest.mark.parametrize(
    ("argument", "prompt"),
    [
        ("A yellow ball bounces over a blue floor.", "A yellow ball bounces over a blue floor"),
        ("  snow falls on a red house ", "snow falls on a red house"),
        ("\u4e00\u4e2a\u7ea2\u8272\u7684\u7403\u5411\u5de6\u5f39\u8df3\u3002",
         "\u4e00\u4e2a\u7ea2\u8272\u7684\u7403\u5411\u5de6\u5f39\u8df3"),
        ("red\nball", "red\nball"),
        ("a ball, 2.5 times as large", "a ball, 2.5 times as large"),
        ("ball/floor " * 500, ("ball/floor " * 500).strip()),  # no path is as long
    ],
)  # fmt: skip
def test_what_is_a_prompt(argument, prompt):
    assert split_prompt(argument) == ("builtin", prompt)


@pytest.mark.parametrize(
    "argument", ["builtin", "builtin-shapes", "runs/mine", "owner/name", "shapes", "a.pt"]
)
def test_what_is_a_model(argument):
    assert split_prompt(argument) == (argument, None)


def test_a_folder_with_spaces_is_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my best run").mkdir()
    assert split_prompt("my best run") == ("my best run", None)
    assert split_prompt("my best runs") == ("builtin", "my best runs")
    with pytest.raises(InputError, match=r"a/my best run', which does not exist"):
        split_prompt("a/my best run")
    with pytest.raises(
        InputError, match=r"does not exist; did you mean 'my best run'\?; it was read as a path"
    ):
        split_prompt("./my best ru")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "the prompt is blank"),
        (["   "], "the prompt is blank"),
        ([" . "], "the prompt is blank"),
        (["a ball " * 715], "has 1431 tokens, but text.length is 16"),
        (["my runs/best"], "MODEL is 'my runs/best', which does not exist; it was read as a path"),
        (["best model.safetensors"], "which does not exist; it was read as a path"),
        ([r"C:\my runs"], "which does not exist; it was read as a path"),
        ([SENTENCE, "--prompt", "a red ball"], "--prompt 'a red ball' was given beside the prompt 'a yellow"),
        ([SENTENCE, "--prompt", ""], "--prompt '' was given beside the prompt"),
        ([SENTENCE, "--prompts", "more.txt"], "--prompts more.txt was given beside the prompt"),
        ([SENTENCE, "--labels", "up"], "--labels up is for class models, but builtin reads text"),
        (["builtin", "--labels", "up"], "--labels up is for class models, but builtin reads text"),
        (["builtin"], "give one, e.g. --prompt 'a blue ball bounces left over a black floor'"),
        (["builtin-shapes", "--prompt", SENTENCE], "builtin-shapes reads no text"),
    ],
)  # fmt: skip
def test_wrong_sentences_are_one_line(sentence, words, message):
    found = sentence(*words)
    assert (found.code, len(found.errors)) == (2, 1), found.err
    assert message in found.errors[0]
    assert len(found.errors[0]) < 300
    assert not Path("samples").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a yelow ball jumps", ["'yelow' (nearest: yellow, blows), 'jumps';"]),
        ("a \u7d2b\u8272\u7684\u72d7", ["'\u72d7';"]),
        ("a one two three four five six balls", ["'one'", "'five' and 2 more;"]),
        ("\u0416\u0451\u043b\u0442\u044b\u0439 \u043c\u044f\u0447", ["has no word of the captions"]),
        ("\u0643\u0631\u0629 \u0635\u0641\u0631\u0627\u0621", ["has no word of the captions"]),
        ("a ball\x1b[31m\u202e bounces", ["'a ball\\x1b[31m\\u202e bounces'"]),
    ],
)  # fmt: skip
def test_unknown_words_are_one_line_and_the_clip_is_generated(sentence, text, parts):
    found = sentence(text, *FAST)
    assert found.code == 0, found.err
    (line,) = warnings_of(found)
    assert "generated all the same" in line
    assert [part for part in parts if part not in line] == [], line
    assert "\x1b" not in found.err
    assert len(found.json["clips"]) == 1


def test_every_word_of_a_caption_is_known_and_no_other():
    vocabulary = Vocabulary.of(WORLD)
    assert vocabulary is not None
    assert {"yellow", "\u7403", ",", "\uff0c"} <= vocabulary.words
    assert not {"yelow", "jump", ".", "none"} & vocabulary.words
    english = Vocabulary.of({**WORLD, "language": "en"})
    assert english is not None
    assert english.words < vocabulary.words
    assert english.warning("\u7403 ball") == Vocabulary.of({"kind": "procedural", "scenes": "world"}).warning(
        "\u7403 ball"
    )
    shapes = Vocabulary.of({"kind": "procedural"})
    assert shapes is not None
    assert shapes.warning("a red square moves left") is None
    assert "'ball'" in str(shapes.warning("a red ball moves left"))
    assert Vocabulary.of({"kind": "folder"}) is None
    assert Vocabulary.of({}) is None


def test_a_run_records_the_scenes_that_its_captions_come_from(latte, text_run_folder, world_model, tmp_path):
    found = latte("convert", text_run_folder, tmp_path / "ours", "--to", "latte")
    assert found.code == 0, found.err
    about = json.loads((tmp_path / "ours/config.json").read_text())["about"]
    assert about["data"] | {"resolution": 16} == about["data"]
    assert (about["data"]["kind"], about["data"]["hold_out"]) == ("procedural", 6)
    kept = json.loads((world_model / "config.json").read_text())["about"]
    assert kept == {"data": WORLD}
