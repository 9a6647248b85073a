# SPDX-License-Identifier: Apache-2.0
"""Missing captions are written where training reads them; a clip that fails is skipped, the rest goes on."""

import json

import numpy as np
import pytest
import torch

from latte.checks import InputError
from latte.data.caption_files import read_captions
from latte.data.captioner import RECORD, Captioner, caption_folder, frames_around
from latte.data.skipped import scan
from videos import encode, number_of, numbered

ABOUT = {"model": "tiny"}


def describe(frames: np.ndarray) -> str:
    return f"frame {' '.join(str(number_of(frame)) for frame in frames)}, with a comma"


@pytest.fixture
def folder(tmp_path):
    """Three videos of 9 frames."""
    for name in "abc":
        encode(tmp_path / f"{name}.mp4", numbered(9))
    return tmp_path


def captions_of(folder) -> dict[str, str]:
    return read_captions(scan(folder, labels=False), "auto")


def test_the_middle_frame_is_described_and_training_reads_the_captions(folder):
    result = caption_folder(folder, describe, ABOUT)
    assert (result["clips"], result["captioned"], result["kept"], result["skipped"]) == (3, 3, 0, [])
    assert captions_of(folder) == dict.fromkeys(("a.mp4", "b.mp4", "c.mp4"), "frame 4, with a comma")
    record = [json.loads(line) for line in (folder / RECORD).read_text("utf-8").splitlines()]
    assert record[0] == {"path": "a.mp4", "caption": "frame 4, with a comma", "model": "tiny"}
    assert len(record) == 3


def test_several_frames_are_evenly_spaced(folder):
    assert frames_around(9, 1) == [4]
    assert frames_around(9, 3) == [1, 4, 7]
    assert frames_around(1, 3) == [0, 0, 0]
    caption_folder(folder, describe, ABOUT, num_frames=3)
    assert captions_of(folder)["a.mp4"] == "frame 1 4 7, with a comma"
    with pytest.raises(InputError, match=r"--frames must be in 1\.\.\.16"):
        caption_folder(folder, describe, ABOUT, num_frames=0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", "File, Text,rating\nb.mp4,a human's words,5\n"),
        ("captions.jsonl", '{"video": "b.mp4", "text": "a human\'s words", "rating": 5}\n'),
        ("b.txt", "a human's words\n"),
    ],
)
def test_captions_that_are_there_stay_unless_asked(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    result = caption_folder(folder, describe, ABOUT)
    assert (result["captioned"], result["kept"]) == (2, 1)
    found = captions_of(folder)
    assert (found["a.mp4"], found["b.mp4"]) == ("frame 4, with a comma", "a human's words")
    if name != "b.txt":
        assert "5" in (folder / name).read_text("utf-8"), "other columns stay"
    caption_folder(folder, describe, ABOUT, overwrite=True)
    assert captions_of(folder)["b.mp4"] == "frame 4, with a comma"


def test_a_clip_that_fails_is_skipped_by_name_and_the_rest_goes_on(folder):
    (folder / "broken.mp4").write_bytes(b"no video")
    calls = []

    def fails(frames: np.ndarray) -> str:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory\nlong trace")
        return "" if len(calls) == 3 else "fine"

    result = caption_folder(folder, fails, ABOUT)
    reasons = {bad["path"].rpartition("/")[2]: bad["reason"] for bad in result["skipped"]}
    assert reasons["b.mp4"] == "out of memory"
    assert reasons["c.mp4"] == "the model returned no text"
    assert reasons["broken.mp4"].startswith("not-a-video")
    assert result["captioned"] == 1
    again = caption_folder(folder, describe, ABOUT)
    assert (again["captioned"], again["kept"]) == (2, 1)
    assert captions_of(folder)["a.mp4"] == "fine"


def test_an_interruption_keeps_what_was_written(folder):
    calls = []

    def stops(frames: np.ndarray) -> str:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return "before the stop"

    with pytest.raises(KeyboardInterrupt):
        caption_folder(folder, stops, ABOUT)
    assert len(calls) == 3, "the interruption happened"
    result = caption_folder(folder, describe, ABOUT)
    assert (result["captioned"], result["kept"]) == (1, 2)
    assert captions_of(folder) == {
        "a.mp4": "before the stop",
        "b.mp4": "before the stop",
        "c.mp4": "frame 4, with a comma",
    }


def test_captions_of_two_kinds_are_refused(folder):
    (folder / "a.txt").write_text("one", encoding="utf-8")
    (folder / "captions.csv").write_text("path,caption\nb.mp4,two\n", encoding="utf-8")
    with pytest.raises(InputError, match="captions of several kinds"):
        caption_folder(folder, describe, ABOUT)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "runs", "cat", "blue", "sky"]


def tiny_model(folder, kind: str) -> str:
    """A captioning model with random weights, of kind blip, git or git-video, with its processor."""
    import transformers as hf

    torch.manual_seed(0)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = hf.BertTokenizerFast(str(folder / "vocab.txt"))
    layers = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    image = {"image_size": 16, "patch_size": 8}
    tokens = {"vocab_size": len(WORDS), "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    size = {"height": 16, "width": 16}
    if kind == "blip":
        config = hf.BlipConfig(
            text_config={**layers, **tokens, "encoder_hidden_size": 8, "sep_token_id": 3},
            vision_config={**layers, **image},
            projection_dim=8,
        )
        model = hf.BlipForConditionalGeneration(config)
        processor = hf.BlipProcessor(hf.BlipImageProcessor(size=size), tokenizer)
    else:
        frames = 3 if kind == "git-video" else None
        vision = {**layers, **image}
        config = hf.GitConfig(vision_config=vision, **layers, **tokens, num_image_with_embedding=frames)
        model = hf.GitForCausalLM(config)
        model.output.bias.data[:5] = -100  # words, not special tokens
        images = hf.CLIPImageProcessor(size=size, crop_size=size)
        processor = hf.GitProcessor(images, tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["blip", "git", "git-video"])
@pytest.mark.filterwarnings("ignore")
def test_a_tiny_model_of_transformers_describes_videos(folder, kind, tmp_path_factory):
    model = tiny_model(tmp_path_factory.mktemp("model") / kind, kind)
    captioner = Captioner(model, torch.device("cpu"), max_tokens=6)
    assert captioner.frames == (3 if kind == "git-video" else None)
    result = caption_folder(folder, captioner, {"model": kind}, captioner.frames or 1)
    assert result["skipped"] == []
    assert result["captioned"] == 3
    for caption in captions_of(folder).values():
        words = caption.split()
        assert 1 <= len(words) <= 7
        assert set(words) <= {*WORDS, "[UNK]"}


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path):
    with pytest.raises(InputError, match="--model 'owner/nothing' cannot be loaded"):
        Captioner("owner/nothing", torch.device("cpu"))
    with pytest.raises(InputError, match=r"--model .* cannot be loaded"):
        Captioner(str(tmp_path), torch.device("cpu"))
    with pytest.raises(InputError, match=r"--max-tokens must be in 1\.\.\.512"):
        Captioner(str(tmp_path), torch.device("cpu"), max_tokens=0)
