# SPDX-License-Identifier: Apache-2.0
"""Features of captions: each encoded once, padded to one length, and asked for by the caption itself."""

from dataclasses import replace

import pytest
import torch

from encoded import SHAPES, contents, folder_config, latents_of, make_videos, pixels
from latte.checks import InputError
from latte.data.captions import PART, encode_captions, store_captions, stored_captions
from latte.data.encoding import encode_dataset
from latte.data.joint import JointDataset
from latte.data.latents import LatentDataset
from latte.data.sampler import load_batch
from latte.data.shards import CAPTIONS, MANIFEST, read_manifest
from latte.text_encoder import BuiltinEncoder


class Counting(BuiltinEncoder):
    """Remembers what it was asked."""

    def __init__(self, length=4):
        super().__init__(length)
        self.asked = []

    def encode(self, prompts):
        self.asked.append(list(prompts))
        return super().encode(prompts)


def test_every_distinct_caption_is_encoded_once_and_the_empty_one_too():
    encoder, said = Counting(), []
    captions = [f"word{index % 40}" for index in range(100)]
    features = encode_captions(encoder, captions, lambda done, of: said.append((done, of)))
    assert [caption for part in encoder.asked for caption in part] == ["", *captions[:40]]
    assert max(map(len, encoder.asked)) == PART
    assert said == [(32, 41), (41, 41)]
    assert (features.identity, features.length) == (encoder.identity, 4)


def test_a_caption_that_is_too_long_is_told_before_the_others_are_encoded(tmp_path):
    encoder = Counting(4)
    with pytest.raises(InputError, match="has 6 tokens"):
        store_captions(tmp_path / CAPTIONS, encoder, [*(f"word{index}" for index in range(100)), "xx two three four five"])
    assert len(encoder.asked) == 1


def test_what_comes_back_is_what_the_encoder_gives():
    captions = ["red", "", "a b c", "red"]
    text, mask = encode_captions(BuiltinEncoder(4), captions)(captions)
    expected = BuiltinEncoder(4).encode(captions)
    assert torch.equal(text, expected[0])
    assert torch.equal(mask, expected[1])


def test_a_clip_with_stills_has_a_row_of_captions():
    features = encode_captions(BuiltinEncoder(4), ["red", "blue", "a b"])
    text, mask = features([["red", "blue", "a b"], ["blue", "blue", "red"]])
    assert (text.shape, mask.shape) == ((2, 3, 4, 64), (2, 3, 4))
    assert torch.equal(text[1], features(["blue", "blue", "red"])[0])
    assert torch.equal(mask[0], features(["red", "blue", "a b"])[1])


@pytest.mark.parametrize("caption", ["green", None])
def test_a_caption_without_features_is_refused(caption):
    with pytest.raises(InputError, match=r"has no features"):
        encode_captions(BuiltinEncoder(4), ["red"])([caption])


def test_stored_features_are_those_of_the_encoder_and_are_made_once(tmp_path):
    encoder, captions = Counting(7), ["red", 'a blue, "one"', "\u00e9"]
    told = store_captions(tmp_path / CAPTIONS, encoder, captions)
    assert told == {"file": CAPTIONS, "bytes": (tmp_path / CAPTIONS).stat().st_size, "encoder": "builtin", "identity": encoder.identity}
    calls, found = len(encoder.asked), stored_captions(tmp_path, captions, 7)
    assert (found.identity, found.length, len(found.features), sorted(found.features)) == (encoder.identity, 7, 4, sorted(["", *captions]))
    for mine, theirs in zip(found(captions), BuiltinEncoder(7).encode(captions), strict=True):
        assert torch.equal(mine, theirs)
    store_captions(tmp_path / CAPTIONS, encoder, captions[:2])
    assert len(encoder.asked) == calls, "they were there"
    store_captions(tmp_path / CAPTIONS, encoder, [*captions, "new"])
    assert len(encoder.asked) > calls
    assert torch.equal(stored_captions(tmp_path, ["new"], 4)(["new"])[0], BuiltinEncoder(4).encode(["new"])[0])


def test_features_that_do_not_fit_are_refused(tmp_path):
    assert stored_captions(tmp_path, ["red"], 4) is None
    store_captions(tmp_path / CAPTIONS, BuiltinEncoder(4), ["red", "a blue one"])
    with pytest.raises(InputError, match="lacks the features of caption 'green'; encode again"):
        stored_captions(tmp_path, ["red", "green"], 4)
    with pytest.raises(InputError, match=r"text.length is 3, but caption 'a blue one' has 4 tokens; give 4 or more"):
        stored_captions(tmp_path, ["a blue one"], 3)
    content = (tmp_path / CAPTIONS).read_bytes()
    for damaged in (content[:50], b"", b"nothing"):
        (tmp_path / CAPTIONS).write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be read"):
            stored_captions(tmp_path, ["red"], 4)


def test_encoding_with_a_text_encoder_keeps_every_distinct_caption(tmp_path):
    config = replace(SHAPES, hold_out=6)
    result = encode_dataset(config, pixels(), tmp_path / "out", text=BuiltinEncoder(8))
    dataset = LatentDataset(latents_of(config, tmp_path / "out"))
    assert len(dataset.captions) == result["captions"] > 1
    assert all(dataset.clip(index, torch.Generator()).caption in dataset.captions for index in range(6))
    features = stored_captions(tmp_path / "out", dataset.captions, 8)
    assert torch.equal(features(dataset.captions)[0], BuiltinEncoder(8).encode(dataset.captions)[0])
    manifest, before = read_manifest(tmp_path / "out"), contents(tmp_path / "out")
    assert (manifest["captions"]["identity"], manifest["complete"]) == (BuiltinEncoder().identity, True)
    encode_dataset(config, pixels(), tmp_path / "out", text=BuiltinEncoder(8))
    assert contents(tmp_path / "out") == before


def test_features_can_be_added_to_latents_that_are_there(tmp_path):
    encode_dataset(SHAPES, pixels(), tmp_path / "out")
    shards = {name: data for name, data in contents(tmp_path / "out").items() if name not in (MANIFEST, CAPTIONS)}
    assert encode_dataset(SHAPES, pixels(), tmp_path / "out", text=BuiltinEncoder(8))["new_shards"] == 0
    assert shards.items() <= contents(tmp_path / "out").items()
    assert (tmp_path / "out" / CAPTIONS).is_file()


def test_captions_of_a_folder_reach_the_latents_and_videos_without_any_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    root = make_videos(tmp_path / "set")
    with pytest.raises(InputError, match=r"the videos have no captions; give data.captions=auto"):
        encode_dataset(folder_config(root), pixels(), tmp_path / "out", text=BuiltinEncoder(8))
    keys = ["a/even.mp4", "a/uneven.mp4", "b/pictures", "b/short.mp4"]
    (root / "captions.csv").write_text("path,caption\n" + "".join(f"{key},about {key[2:6]}\n" for key in keys))
    config = folder_config(root, captions="auto", interval=1)
    encode_dataset(config, pixels(), tmp_path / "out", text=BuiltinEncoder(8))
    dataset = LatentDataset(latents_of(replace(config, captions=None), tmp_path / "out"))
    assert [record.caption for record in dataset.videos] == ["about even", "about unev", "about pict", "about shor"]
    with pytest.raises(InputError, match="holds latents of other settings"):
        encode_dataset(folder_config(root), pixels(), tmp_path / "out")


def test_stills_bring_their_own_captions(tmp_path):
    encode_dataset(SHAPES, pixels(), tmp_path / "out")
    dataset = LatentDataset(latents_of(SHAPES, tmp_path / "out"))
    joint = JointDataset(dataset, 3)
    batch = load_batch(joint, 0, 0, 6)
    assert all(len(row) == 4 for row in batch.captions)
    assert [row[0] for row in batch.captions] == load_batch(dataset, 0, 0, 6).captions
    assert any(row[0] != other for row in batch.captions for other in row[1:]), "or the test is empty"
    assert {caption for row in batch.captions for caption in row} <= set(joint.captions)
