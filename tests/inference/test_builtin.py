# SPDX-License-Identifier: Apache-2.0
"""The model inside the package: it loads offline, is small, has a card, and follows its labels."""

import json

from latte.autoencoder.builtin import WEIGHTS
from latte.checkpoint.record import read_fingerprint
from latte.data.shape_grading import DIRECTIONS, read_motion
from latte.inference.pipeline import VideoPipeline
from latte.interop.readers import BUILTIN

MOST_BYTES = 8_000_000  # model and autoencoder together
SHAPES = BUILTIN["builtin-shapes"]


def test_it_is_small_and_has_a_card():
    size = sum(path.stat().st_size for path in SHAPES.iterdir()) + WEIGHTS.stat().st_size
    assert size <= MOST_BYTES
    card = (SHAPES / "README.md").read_text(encoding="utf-8")
    config = json.loads((SHAPES / "config.json").read_text(encoding="utf-8"))
    assert "latte train shapes" in card
    assert config["weights_sha256"][:16] in card
    assert read_fingerprint(config["codec"]) in card


def test_it_follows_its_labels():
    trained = VideoPipeline.from_pretrained("builtin-shapes", device="cpu")
    assert trained.classes == list(DIRECTIONS)
    requests = trained.classes * 4
    clips = [clip for _, clip in trained.generate(range(len(requests)), requests)]
    assert clips[0].shape == (8, 64, 64, 3)
    motions = [read_motion(clip) for clip in clips]
    assert sum(motion.direction == asked for motion, asked in zip(motions, requests, strict=True)) >= 13
