# SPDX-License-Identifier: Apache-2.0
"""Features of captions: each encoded once, padded to one length, stored in parts, and asked for by the
caption itself.
"""

import json
import logging
import re
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from encoded import SHAPES, Drawn, contents, folder_config, latents_of, make_videos, pixels
from latte.checks import InputError, RunError
from latte.data import captions as under_test
from latte.data.captions import (
    AT_ONCE,
    SIDES,
    CaptionFeatures,
    check_lengths,
    compact,
    encode_captions,
    list_parts,
    store_captions,
    stored_captions,
)
from latte.data.encode import encode_dataset
from latte.data.joint import JointDataset
from latte.data.latents import LatentDataset
from latte.data.loader import load_batch
from latte.data.shards import CAPTIONS, MANIFEST, PLAN, SINGLE, read_manifest
from latte.text.encoders import BuiltinEncoder


class Counting(BuiltinEncoder):
    """Remembers what it was asked."""

    def __init__(self, length=4):
        super().__init__(length)
        self.asked = []

    def encode(self, prompts):
        self.asked.append(list(prompts))
        return super().encode(prompts)


def test_every_distinct_caption_is_encoded_once_and_the_empty_one_too():
    encoder, calls = Counting(), []
    captions = [f"word{index % 40}" for index in range(100)]
    features = encode_captions(encoder, captions, lambda done, of: calls.append((done, of)))
    assert [caption for part in encoder.asked for caption in part] == ["", *captions[:40]]
    assert max(map(len, encoder.asked)) == AT_ONCE
    assert calls == [(32, 41), (41, 41)]
    assert (features.fingerprint, features.length) == (encoder.fingerprint, 4)


def test_all_lengths_are_checked_before_anything_is_encoded(tmp_path):
    encoder, captions = (
        Counting(4),
        [*(f"word{index}" for index in range(100)), "one two three four", "xx two three four five"],
    )
    assert check_lengths(encoder, captions[:100], {}) == 2 * 100 + 1
    message = (
        "the caption of b.mp4, 'xx two three four five', has 6 tokens, but text.length is 4 "
        "(2 of 102 captions are longer); give text.length=6, or shorten them"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        check_lengths(encoder, captions, {"xx two three four five": "b.mp4"})
    with pytest.raises(InputError, match=r"^a caption, 'xx two"):
        check_lengths(encoder, captions, {})
    root, codec, before = tmp_path / "videos", Drawn(), []
    codec.before = lambda: before.append("encoded")
    root.mkdir()
    make_videos(root)
    rows = {
        "a/even.mp4": "up",
        "a/uneven.mp4": "a much longer caption, and more",
        "b/pictures": "up",
        "b/short.mp4": "down",
    }
    (root / "captions.csv").write_text(
        "path,caption\n" + "".join(f'{key},"{caption}"\n' for key, caption in rows.items())
    )
    config = folder_config(root, captions="auto")
    for codec_given in (codec, lambda: before.append("built")):
        with pytest.raises(
            InputError,
            match=r"caption of a/uneven.mp4, .* has 8 tokens, but text.length is 4 .* text.length=8",
        ):
            encode_dataset(config, codec_given, tmp_path / "out", cache_dir=tmp_path, text=encoder)
    assert (encoder.asked, before, (tmp_path / "out").exists()) == ([], [], False)
    assert (
        encode_dataset(config, codec, tmp_path / "out", cache_dir=tmp_path, text=Counting(8))["new_captions"]
        == 4
    )


def test_what_comes_back_is_what_the_encoder_gives():
    captions = ["red", "", "a b c", "red"]
    text, mask = encode_captions(BuiltinEncoder(4), captions)(captions)
    expected = BuiltinEncoder(4).encode(captions)
    assert torch.equal(text, expected[0])
    assert torch.equal(mask, expected[1])


def test_a_clip_with_images_has_a_row_of_captions():
    features = encode_captions(BuiltinEncoder(4), ["red", "blue", "a b"])
    text, mask = features([["red", "blue", "a b"], ["blue", "blue", "red"]])
    assert (text.shape, mask.shape) == ((2, 3, 4, 64), (2, 3, 4))
    assert torch.equal(text[1], features(["blue", "blue", "red"])[0])
    assert torch.equal(mask[0], features(["red", "blue", "a b"])[1])


@pytest.mark.parametrize("caption", ["green", None])
def test_a_caption_without_features_is_refused(caption):
    with pytest.raises(InputError, match=r"has no features"):
        encode_captions(BuiltinEncoder(4), ["red"])([caption])


def stored(root: Path, captions, length: int) -> CaptionFeatures | None:
    """As a manifest that is up to date would have it."""
    return stored_captions(root, list_parts(root), captions, length)


def test_stored_features_are_those_of_the_encoder_and_are_made_once(tmp_path):
    encoder, captions = Counting(7), ["red", 'a blue, "one"', "\u00e9"]
    assert store_captions(tmp_path, encoder, captions, size=2) == 4
    parts = [{"file": path.name, "bytes": path.stat().st_size} for path in sorted(tmp_path.glob(CAPTIONS))]
    assert [part["file"] for part in parts] == ["captions-00000.safetensors", "captions-00001.safetensors"]
    assert list_parts(tmp_path) == {"encoder": "builtin", "identity": encoder.fingerprint, "parts": parts}
    assert [len(load_file(tmp_path / part["file"])) for part in parts] == [2, 2]
    calls, found = len(encoder.asked), stored(tmp_path, captions, 7)
    assert (found.fingerprint, found.length, len(found.features), sorted(found.features)) == (
        encoder.fingerprint,
        7,
        4,
        sorted(["", *captions]),
    )
    for stored_part, expected in zip(found(captions), BuiltinEncoder(7).encode(captions), strict=True):
        assert torch.equal(stored_part, expected)
    before, begun = contents(tmp_path), []
    assert store_captions(tmp_path, encoder, captions[:2], size=2, begin=lambda: begun.append(1)) == 0
    assert (len(encoder.asked), begun) == (calls, []), "they were there"
    assert store_captions(tmp_path, encoder, [*captions, "new"], size=2, begin=lambda: begun.append(1)) == 1
    assert (encoder.asked[calls:], begun) == ([["new"]], [1]), "and nothing else"
    after = contents(tmp_path)
    assert after.keys() - before.keys() == {"captions-00002.safetensors"}
    assert before.items() <= after.items()
    assert torch.equal(stored(tmp_path, ["new"], 4)(["new"])[0], BuiltinEncoder(4).encode(["new"])[0])


def test_a_batch_of_stored_features_does_not_depend_on_its_company(tmp_path):
    captions = [f"word{index} and more" for index in range(9)]
    store_captions(tmp_path, Counting(8), captions, size=4)
    features = stored(tmp_path, captions, 8)
    together = features(captions)[0]
    for row, caption in enumerate(captions):
        assert torch.equal(features([caption])[0][0], together[row])


def test_only_what_a_batch_asks_for_is_read(tmp_path, monkeypatch):
    captions = [f"word{index}" for index in range(20)]
    store_captions(tmp_path, Counting(4), captions, size=3)
    read, get = [], under_test.StoredFeatures.__getitem__
    monkeypatch.setattr(
        under_test.StoredFeatures,
        "__getitem__",
        lambda self, caption: read.append(caption) or get(self, caption),
    )
    features = stored(tmp_path, captions, 4)
    assert read == []
    features(["word7", "word3"])
    assert read == ["word7", "word3"]


def test_no_more_than_a_part_is_in_memory(tmp_path, monkeypatch):
    alive, most = {}, []

    def tracking(tokens):
        kept = compact(tokens)
        alive[id(kept)] = weakref.ref(kept, lambda _, name=id(kept): alive.pop(name))
        most.append(len(alive))
        return kept

    monkeypatch.setattr(under_test, "compact", tracking)
    store_captions(tmp_path, BuiltinEncoder(4), [f"word{index}" for index in range(200)], size=10)
    assert len(list(tmp_path.glob(CAPTIONS))) == 21
    assert (len(most), len(alive)) == (201, 0)
    assert max(most) <= 11, "a part, and the one at hand"


class Rounded(BuiltinEncoder):
    """Its numbers have a place in bfloat16, as those of a T5 on a GPU."""

    def encode(self, prompts):
        text, mask = super().encode(prompts)
        return text.bfloat16().float(), mask


@pytest.mark.parametrize(
    ("encoder", "kind"), [(Rounded(4), torch.bfloat16), (BuiltinEncoder(4), torch.float32)]
)
def test_numbers_are_kept_small_where_that_loses_nothing(tmp_path, encoder, kind):
    captions = ["red", "a b c"]
    store_captions(tmp_path, encoder, captions)
    assert {tensor.dtype for tensor in load_file(tmp_path / "captions-00000.safetensors").values()} == {kind}
    in_memory = encode_captions(encoder, captions)
    assert {tensor.dtype for tensor in in_memory.features.values()} == {kind}
    for features in (in_memory, stored(tmp_path, captions, 4)):
        text, _ = features(captions)
        assert text.dtype == torch.float32
        assert torch.equal(text, encoder.encode(captions)[0])


def test_numbers_beyond_float16_and_next_to_nothing_survive(tmp_path):
    for value in (1e6, 3e-8, 1 / 3):
        tokens = torch.full((2, 3), value)
        assert torch.equal(compact(tokens).float(), tokens)
    encoder = Counting(4)
    encoder.encode = lambda prompts: (
        torch.full((len(prompts), 4, 64), torch.nan),
        torch.ones(len(prompts), 4, dtype=torch.bool),
    )
    with pytest.raises(RunError, match=r"features of caption '' hold NaN or Inf"):
        store_captions(tmp_path, encoder, ["red"])
    assert not list(tmp_path.glob(CAPTIONS))


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:2]
from encoded import SHAPES, pixels
from latte.data import shards
from latte.data.encode import encode_dataset
from latte.text.encoders import BuiltinEncoder
save = shards.save_file
def dying(tensors, path, **more):
    if "captions-00002" in str(path):
        with open(path, "wb") as file:
            file.write(b"half a part")
        os.kill(os.getpid(), signal.SIGKILL)
    save(tensors, path, **more)
shards.save_file = dying
encode_dataset(SHAPES, pixels(), sys.argv[2], text=BuiltinEncoder(8), caption_part=2)
"""


def test_a_kill_in_the_middle_of_the_captions_loses_a_part_alone(tmp_path):
    whole = encode_dataset(SHAPES, pixels(), tmp_path / "whole", text=BuiltinEncoder(8), caption_part=2)
    assert (whole["new_captions"], len(list((tmp_path / "whole").glob(CAPTIONS)))) == (6, 3)
    out, support = tmp_path / "out", Path(__file__).parents[1]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(support), str(out)], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert sorted(path.name for path in out.glob("[!.]*")) == [
        "captions-00000.safetensors",
        "captions-00001.safetensors",
        MANIFEST,
    ]
    assert [path.read_bytes() for path in out.glob(".tmp-captions-*")] == [b"half a part"]
    with pytest.raises(InputError, match="not finished"):
        LatentDataset(latents_of(SHAPES, out))
    encoder = Counting(8)
    again = encode_dataset(SHAPES, pixels(), out, text=encoder, caption_part=2)
    assert (again["new_captions"], sum(map(len, encoder.asked))) == (2, 2)
    assert contents(out) == contents(tmp_path / "whole")
    (out / "captions-00001.safetensors").write_bytes(b"damaged")
    assert encode_dataset(SHAPES, pixels(), out, text=BuiltinEncoder(8), caption_part=2)["new_captions"] == 2
    assert contents(out) == contents(tmp_path / "whole"), "a damaged part is made again, in its place"


def test_a_part_that_no_caption_needs_any_more_goes(tmp_path):
    store_captions(tmp_path, BuiltinEncoder(4), ["a", "b", "c", "d", "e"], size=2)
    assert store_captions(tmp_path, BuiltinEncoder(4), ["a", "d", "f"], size=2) == 1
    assert [part["file"][9:14] for part in list_parts(tmp_path)["parts"]] == ["00000", "00001", "00002"]
    assert sorted(stored(tmp_path, ["a", "d", "f"], 4).features) == ["", "a", "d", "f"]
    with pytest.raises(InputError, match="lack the features of 'b'"):
        stored(tmp_path, ["b"], 4)


def test_features_by_another_encoder_are_left_alone(tmp_path, monkeypatch):
    store_captions(tmp_path, BuiltinEncoder(4), ["red"])
    before, other = contents(tmp_path), Counting(4)
    monkeypatch.setattr(Counting, "fingerprint", "0" * 16)
    with pytest.raises(
        InputError,
        match=r"the text encoder is builtin 0000.* was made by builtin 42fe.*; give another folder",
    ):
        store_captions(tmp_path, other, ["red", "blue"])
    assert (other.asked, contents(tmp_path)) == ([], before)


def test_features_that_do_not_fit_are_refused(tmp_path):
    assert stored(tmp_path, ["red"], 4) is None
    store_captions(tmp_path, BuiltinEncoder(4), ["red", "a blue one"])
    entry, path = list_parts(tmp_path), tmp_path / "captions-00000.safetensors"
    with pytest.raises(InputError, match="lack the features of 'green'; encode again"):
        stored_captions(tmp_path, entry, ["red", "green"], 4)
    with pytest.raises(
        InputError,
        match=r"text.length is 3, but caption 'a blue one' has 4 tokens; give text.length=4 or more",
    ):
        stored_captions(tmp_path, entry, ["a blue one"], 3)
    content = path.read_bytes()
    for damaged in (content[:50], b"", b"nothing"):
        path.write_bytes(damaged)
        with pytest.raises(
            InputError, match=r"captions-00000.safetensors has [0-9,]+ bytes, but its manifest lists"
        ):
            stored_captions(tmp_path, entry, ["red"], 4)
    path.write_bytes(b"x" * len(content))
    with pytest.raises(InputError, match="cannot be read"):
        stored_captions(tmp_path, entry, ["red"], 4)
    path.unlink()
    with pytest.raises(InputError, match=r"has 0 bytes, but its manifest lists"):
        stored_captions(tmp_path, entry, ["red"], 4)


def test_the_single_file_of_former_folders_is_still_read_and_added_to(tmp_path):
    out, encoder = tmp_path / "out", Counting(8)
    encode_dataset(SHAPES, pixels(), out)
    manifest = read_manifest(out)
    captions = sorted({video["caption"] for video in manifest["videos"]})
    former = {
        f"caption:{caption}": tokens.float()
        for caption, tokens in encode_captions(encoder, captions[1:]).features.items()
    }
    made = {PLAN: json.dumps({"identity": encoder.fingerprint, "encoder": "builtin"})}
    save_file(former, out / SINGLE, metadata=made)
    entry = {
        "file": SINGLE,
        "bytes": (out / SINGLE).stat().st_size,
        "encoder": "builtin",
        "identity": encoder.fingerprint,
    }
    (out / MANIFEST).write_text(json.dumps({**manifest, "captions": entry}))
    features = stored_captions(out, read_manifest(out)["captions"], captions[1:], 8)
    assert torch.equal(features(captions[1:])[0], BuiltinEncoder(8).encode(captions[1:])[0])
    asked, before = len(encoder.asked), (out / SINGLE).read_bytes()
    assert encode_dataset(SHAPES, pixels(), out, text=encoder)["new_captions"] == 1
    assert encoder.asked[asked:] == [captions[:1]]
    assert (out / SINGLE).read_bytes() == before
    features = stored_captions(out, read_manifest(out)["captions"], captions, 8)
    assert torch.equal(features(captions)[0], BuiltinEncoder(8).encode(captions)[0])


def test_the_text_encoder_is_gone_before_the_autoencoder_is_there(tmp_path):
    events = []

    class Text(BuiltinEncoder):
        def encode(self, prompts):
            events.append("read")
            return super().encode(prompts)

        def free(self):
            events.append("freed")

    def codec():
        events.append("built")
        made = Drawn()
        made.before = lambda: events.append("encoded")
        weakref.finalize(made, events.append, "gone")
        return made

    encode_dataset(SHAPES, codec, tmp_path / "out", text=Text(8))
    assert events == ["built", "gone", "read", "freed", "built", *["encoded"] * 6, "gone"]
    assert encode_dataset(SHAPES, codec, tmp_path / "out")["captions"] == 5
    assert events[-2:] == ["built", "gone"]
    assert len(read_manifest(tmp_path / "out")["captions"]["parts"]) == 1, (
        "they stay when a run has no text encoder"
    )


def test_words_of_sides():
    mention = [
        "moves LEFT",
        "to the right.",
        "leftwards",
        "a left-hand turn",
        "lefthanded",
        "counter-clockwise",
        "Anticlockwise",
        "leftmost",
    ]
    silent = ["leftover soup", "bright light", "upright", "copyright", "a clock", "alright", "wright"]
    assert all(SIDES.search(caption) for caption in mention)
    assert not any(SIDES.search(caption) for caption in silent)


def test_mirrored_clips_whose_captions_mention_left_or_right_are_reported(tmp_path, caplog):
    root = make_videos(Path(tmp_path, "set").mkdir() or tmp_path / "set")
    rows = {
        "a/even.mp4": "A man steps to the Right",
        "a/uneven.mp4": "up",
        "b/pictures": "up",
        "b/short.mp4": "bright",
    }
    (root / "captions.csv").write_text(
        "path,caption\n" + "".join(f"{key},{caption}\n" for key, caption in rows.items())
    )
    config = folder_config(root, captions="auto")
    with caplog.at_level(logging.WARNING):
        encode_dataset(config, pixels(), tmp_path / "mirrored", cache_dir=tmp_path)
        assert [record.message for record in caplog.records] == [
            "1 of 3 captions mention left or right ('A man steps to the Right'), "
            "but data.flip mirrors half of the clips; set data.flip=false"
        ]
        caplog.clear()
        encode_dataset(replace(config, flip=False), pixels(), tmp_path / "plain", cache_dir=tmp_path)
        encode_dataset(folder_config(root), pixels(), tmp_path / "silent", cache_dir=tmp_path)
        encode_dataset(SHAPES, pixels(), tmp_path / "shapes")
    assert not caplog.records
    assert SIDES.search(" ".join(LatentDataset(latents_of(SHAPES, tmp_path / "shapes")).captions)), (
        "or the last one is empty"
    )
    with pytest.raises(InputError, match=r"data.flip is True, but data.kind=procedural does not read it"):
        replace(SHAPES, flip=True)


def test_encoding_with_a_text_encoder_keeps_every_distinct_caption(tmp_path):
    config = replace(SHAPES, hold_out=6)
    result = encode_dataset(config, pixels(), tmp_path / "out", text=BuiltinEncoder(8))
    dataset = LatentDataset(latents_of(config, tmp_path / "out"))
    assert len(dataset.captions) == result["captions"] > 1
    assert all(dataset.clip(index, torch.Generator()).caption in dataset.captions for index in range(6))
    features = stored_captions(tmp_path / "out", dataset.manifest["captions"], dataset.captions, 8)
    assert torch.equal(features(dataset.captions)[0], BuiltinEncoder(8).encode(dataset.captions)[0])
    manifest, before = read_manifest(tmp_path / "out"), contents(tmp_path / "out")
    assert (manifest["captions"]["identity"], manifest["complete"]) == (BuiltinEncoder().fingerprint, True)
    encode_dataset(config, pixels(), tmp_path / "out", text=BuiltinEncoder(8))
    assert contents(tmp_path / "out") == before


def test_features_can_be_added_to_latents_that_are_there(tmp_path):
    encode_dataset(SHAPES, pixels(), tmp_path / "out")
    shards = {name: data for name, data in contents(tmp_path / "out").items() if name != MANIFEST}
    assert encode_dataset(SHAPES, pixels(), tmp_path / "out", text=BuiltinEncoder(8))["new_shards"] == 0
    assert shards.items() <= contents(tmp_path / "out").items()
    assert list((tmp_path / "out").glob(CAPTIONS))


def test_captions_of_a_folder_reach_the_latents_and_videos_without_any_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    root = make_videos(tmp_path / "set")
    with pytest.raises(InputError, match=r"the videos have no captions; give data.captions=auto"):
        encode_dataset(folder_config(root), pixels(), tmp_path / "out", text=BuiltinEncoder(8))
    keys = ["a/even.mp4", "a/uneven.mp4", "b/pictures", "b/short.mp4"]
    (root / "captions.csv").write_text(
        "path,caption\n" + "".join(f"{key},about {key[2:6]}\n" for key in keys)
    )
    config = folder_config(root, captions="auto", interval=1)
    encode_dataset(config, pixels(), tmp_path / "out", text=BuiltinEncoder(8))
    dataset = LatentDataset(latents_of(replace(config, captions=None), tmp_path / "out"))
    assert [record.caption for record in dataset.videos] == [
        "about even",
        "about unev",
        "about pict",
        "about shor",
    ]
    with pytest.raises(InputError, match="holds latents of other settings"):
        encode_dataset(folder_config(root), pixels(), tmp_path / "out")


def test_images_bring_their_own_captions(tmp_path):
    encode_dataset(SHAPES, pixels(), tmp_path / "out")
    dataset = LatentDataset(latents_of(SHAPES, tmp_path / "out"))
    joint = JointDataset(dataset, 3)
    batch = load_batch(joint, 0, 0, 6)
    assert all(len(row) == 4 for row in batch.captions)
    assert [row[0] for row in batch.captions] == load_batch(dataset, 0, 0, 6).captions
    assert any(row[0] != other for row in batch.captions for other in row[1:]), "or the test is empty"
    assert {caption for row in batch.captions for caption in row} <= set(joint.captions)
