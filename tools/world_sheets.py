# SPDX-License-Identifier: Apache-2.0
"""Contact sheets of clips without selection: python -m tools.world_sheets docs/images [--model builtin].

Three sheets of 16 clips: seeds 0 to 47, each with the English caption of scene 0 to 47 of data.seed=0. Beside
them FOLDER/world-clips.md lists every clip with what the grader reads from it, failures first visible.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latte.data.world.grading import Grade, grade
from latte.data.world.scenes import Scene, caption, sample_scene
from latte.data.writers import contact_sheet
from latte.inference.pipeline import VideoPipeline

CLIPS = 16  # of a sheet
SHEETS = 3
EVERY = 4  # frames


def sheet(clips: np.ndarray, captions: list[str]) -> Image.Image:
    """Return clips (b t h w c) as two columns of rows with every fourth frame, each below its caption."""
    half = len(clips) // 2
    columns = [
        contact_sheet(list(clips[part][:, ::EVERY]), scale=1, captions=captions[part])
        for part in (slice(half), slice(half, None))
    ]
    joined = Image.new("RGB", (sum(c.width for c in columns) + 12, max(c.height for c in columns)), "white")
    joined.paste(columns[0], (0, 0))
    joined.paste(columns[1], (columns[0].width + 12, 0))
    return joined


def verdict(scene: Scene, found: Grade) -> str:
    """Return 'right' or what is wrong with a clip, for people."""
    wrong = [
        f"{part} read as {getattr(found, part)}"
        for part in ("kind", "colour", "direction")
        if getattr(found, part) != getattr(scene, part)
    ]
    if not found.consistent:
        wrong.append("not consistent")
    return ", ".join(wrong) or "right"


def main(argv: list[str] | None = None) -> None:
    """Write the sheets and the list; print one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    count = CLIPS * SHEETS
    scenes = [sample_scene(0, index) for index in range(count)]
    prompts = [caption(scene) for scene in scenes]
    pipe = VideoPipeline.from_pretrained(options.model, device="cpu", dtype="fp32")
    clips = np.stack([clip for _, clip in pipe.generate(range(count), prompts=prompts)])
    options.folder.mkdir(parents=True, exist_ok=True)
    for number in range(SHEETS):
        part = slice(CLIPS * number, CLIPS * (number + 1))
        sheet(clips[part], prompts[part]).save(options.folder / f"world-{number + 1}.png", optimize=True)
    lines = ["| seed | sentence | read from the clip |", "|---|---|---|"]
    verdicts = [verdict(scene, found) for scene, found in zip(scenes, grade(clips), strict=True)]
    lines += [f"| {seed} | {prompts[seed]} | {verdicts[seed]} |" for seed in range(count)]
    (options.folder / "world-clips.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
    right = verdicts.count("right")
    print(json.dumps({"clips": count, "right": right, "weights_sha256": pipe.weights}))


if __name__ == "__main__":
    main()
