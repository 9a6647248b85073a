# SPDX-License-Identifier: Apache-2.0
"""Captions for the videos that have none, by an image captioning model through transformers.

They go where training reads captions: the folder's captions.csv or captions.jsonl, or a text file beside each
video where that is how the others are stored. captioned.jsonl lists which captions a model wrote.
"""

import csv
import io
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latte.checks import InputError, check, printable
from latte.data.caption_files import (
    CAPTION_COLUMNS,
    TABLES,
    VIDEO_COLUMNS,
    key_of,
    read_table,
    read_text,
    sidecar,
)
from latte.data.media import read_frames
from latte.data.skipped import FoundClip, check_folder, require_clips, scan
from latte.files import commit_file, reported

LOG = logging.getLogger(__name__)
RECORD = "captioned.jsonl"
SAVE_SECONDS = 5.0  # between two writes of a table
MAX_FRAMES = 16  # of one video that a model looks at

Describe = Callable[[np.ndarray], str]
"""Returns the caption of frames uint8 (t h w c)."""


class Captioner:
    """An image captioning model from a folder or the hub, such as BLIP or GIT, with its processor.

    Only safetensors are read, and no code of the repository runs. InputError when it cannot be loaded.
    """

    def __init__(self, path: str, device: torch.device, max_tokens: int = 40, prompt: str = ""):
        check(1 <= max_tokens <= 512, f"--max-tokens must be in 1...512, got {max_tokens}")
        self.max_tokens = max_tokens
        self.prompt = prompt
        self.processor, model = load_captioner(path)
        self.model = model.eval().requires_grad_(False).to(device)

    @property
    def frames(self) -> int | None:
        """Number of frames that the model takes at once; None for a model of single images."""
        return getattr(self.model.config, "num_image_with_embedding", None)

    def __call__(self, frames: np.ndarray) -> str:
        """Return the caption of uint8 frames (t h w c); of single images the one that most frames get."""
        images = [Image.fromarray(frame) for frame in frames]
        if self.frames:
            return self.describe(images)
        captions = [self.describe([image]) for image in images]
        middle = captions[len(captions) // 2]
        counts = Counter(captions)
        if counts[middle] == max(counts.values()):
            return middle
        return counts.most_common(1)[0][0]

    @torch.inference_mode()
    def describe(self, images: list[Image.Image]) -> str:
        """Return the model's text for one image, or for the frames that it takes together."""
        inputs = self.processor(images=images, return_tensors="pt")
        if self.frames:
            inputs["pixel_values"] = inputs["pixel_values"][None]  # (1 t c h w)
        if self.prompt:
            tokens = self.processor.tokenizer(self.prompt, add_special_tokens=False, return_tensors="pt")
            inputs["input_ids"] = tokens["input_ids"]
            inputs["attention_mask"] = tokens["attention_mask"]
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        found = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        text = self.processor.batch_decode(found, skip_special_tokens=True)[0]
        return " ".join(text.split())


def load_captioner(path: str) -> tuple[Any, Any]:
    """Return (processor, model) of a folder or hub id. InputError when they cannot be loaded."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"captioning needs transformers, which is not installed ({error}); pip install 'latte-video[t2v]'"
        ) from error
    options: dict[str, Any] = {"local_files_only": True} if Path(path).is_dir() else {}
    try:
        processor = transformers.AutoProcessor.from_pretrained(path, **options)
        options |= {"use_safetensors": True, "output_loading_info": True}
        loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, **options)
        model, info = loaded
        missing = sorted(info["missing_keys"])
    except Exception as error:  # broken files make transformers raise almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"--model {path!r} cannot be loaded ({reason}); give the folder or hub id of an image captioning "
            "model with safetensors, such as Salesforce/blip-image-captioning-base"
        ) from error
    check(not missing, f"--model {path!r} lacks the weights {', '.join(missing[:3])}; download it again")
    return processor, model


@dataclass
class CaptionStore:
    """The captions of a folder as they are stored, and how they are written.

    ``table`` is the file of all captions, None for a text file beside each video. ``rows`` are those of the
    table, ``place`` says in which row a video is.
    """

    root: Path
    table: Path | None
    columns: list[str] = field(default_factory=lambda: ["path", "caption"])
    rows: list[dict[str, Any]] = field(default_factory=list)
    place: dict[str, int] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path, clips: Sequence[FoundClip]) -> "CaptionStore":
        """Return the captions that ``root`` has. InputError for a broken table, or captions of two kinds."""
        tables = [root / name for name in TABLES if (root / name).is_file()]
        beside = [clip for clip in clips if (root / sidecar(clip)).is_file()]
        check(
            len(tables) + bool(beside) <= 1,
            f"{printable(root)} holds captions of several kinds ({', '.join(path.name for path in tables)}"
            f"{', text files' if beside else ''}); keep one of them",
        )
        if beside:
            captions = {clip.key: read_text(root / sidecar(clip)).strip() for clip in beside}
            return cls(root, None, captions=captions)
        store = cls(root, (tables or [root / TABLES[0]])[0])
        if tables:
            store.read({clip.key for clip in clips})
        return store

    def read(self, keys: set[str]) -> None:
        """Read the table, whose rows name videos of ``keys``; other rows stay as they are."""
        assert self.table is not None
        texts = list(read_table(self.table))  # checks it
        if self.table.suffix == ".csv":
            lines = csv.reader(io.StringIO(read_text(self.table), newline=""), skipinitialspace=True)
            self.columns, *values = [line for line in lines if line]
            self.rows = [dict(zip(self.columns, line, strict=True)) for line in values]
        else:
            self.rows = [json.loads(line) for line in read_text(self.table).split("\n") if line.strip()]
            self.columns = list(self.rows[0]) if self.rows else self.columns
        for index, (_, name, text) in enumerate(texts):
            key = key_of(self.root, self.root, name, keys)
            if key is not None:
                self.place[key] = index
                self.captions[key] = text.strip()

    def column(self, row: dict[str, Any], names: Sequence[str]) -> str:
        """Return the column of ``row``, else of the table, that is one of ``names``."""
        return next(column for column in (*row, *self.columns) if column.strip().lower() in names)

    def put(self, clip: FoundClip, caption: str) -> None:
        """Set the caption of ``clip``; the table is written by ``save``."""
        self.captions[clip.key] = caption
        if self.table is None:
            commit_file(self.root / sidecar(clip), caption + "\n")
            return
        if clip.key not in self.place:
            row = dict.fromkeys(self.columns, "")
            row[self.column(row, VIDEO_COLUMNS)] = clip.key
            self.place[clip.key] = len(self.rows)
            self.rows.append(row)
        row = self.rows[self.place[clip.key]]
        row[self.column(row, CAPTION_COLUMNS)] = caption

    def save(self) -> None:
        """Write the table, if there is one."""
        if self.table is None:
            return
        if self.table.suffix == ".csv":
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            commit_file(self.table, text.getvalue())
        else:
            lines = (json.dumps(row, ensure_ascii=False) for row in self.rows)
            commit_file(self.table, "".join(f"{line}\n" for line in lines))


def caption_folder(
    root: str | os.PathLike,
    describe: Describe,
    about: dict[str, Any],
    num_frames: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a caption for every video below ``root`` that has none, or for all with ``overwrite``.

    ``describe`` gets ``num_frames`` frames, evenly spaced around the middle. ``about`` says which model it
    is, for captioned.jsonl. Returns the counts ``clips``, ``captioned`` and ``kept``, and ``skipped``: the
    videos that could not be read or described, with the reason. Captions so far stay after an interruption.
    InputError for a folder without videos or with broken captions.
    """
    check(1 <= num_frames <= MAX_FRAMES, f"--frames must be in 1...{MAX_FRAMES}, got {num_frames}")
    found = scan(check_folder(root, "DIR"), labels=False)
    require_clips(found)
    folder = Path(found.root)
    store = CaptionStore.open(folder, found.clips)
    check(os.access(folder, os.W_OK), f"{printable(folder)} cannot be written; check its permissions")
    todo = [clip for clip in found.clips if overwrite or not store.captions.get(clip.key)]
    failed: list[dict[str, str]] = []
    written: list[dict[str, Any]] = []
    saved = time.monotonic()
    with reported("captions", store.table or folder):
        try:
            for done, clip in enumerate(todo, start=1):
                try:
                    caption = describe(read_frames(clip.info, frames_around(clip.info.frames, num_frames)))
                    check(bool(caption), "the model returned no text")
                except Exception as error:  # one clip must not end the work on all others
                    reason = str(error).partition("\n")[0] or type(error).__name__
                    failed.append({"path": clip.info.path, "reason": reason})
                    LOG.warning("%s skipped: %s", printable(clip.key), reason)
                else:
                    store.put(clip, caption)
                    written.append({"path": clip.key, "caption": caption, **about})
                if time.monotonic() - saved >= SAVE_SECONDS:
                    save(store, written)
                    saved = time.monotonic()
                if progress:
                    progress(done, len(todo))
        finally:
            save(store, written)
    return {
        "clips": len(found.clips),
        "kept": len(found.clips) - len(todo),
        "captioned": len(todo) - len(failed),
        "skipped": [*found.skipped, *failed],
    }


def save(store: CaptionStore, written: list[dict[str, Any]]) -> None:
    """Write the table of captions, and add ``written`` to the record of a model's captions; empty it."""
    if not written:
        return
    store.save()
    with open(store.root / RECORD, "a", encoding="utf-8") as file:
        file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in written))
    written.clear()


def frames_around(frames: int, count: int) -> list[int]:
    """Return the middles of ``count`` equal parts of ``frames`` frames: the middle frame for one."""
    return [min(frames - 1, int(frames * (2 * part + 1) / (2 * count))) for part in range(count)]
