# SPDX-License-Identifier: Apache-2.0
"""How many changes of scene ``latte data split`` finds in a film whose changes are known:
``python benchmarks/scene_changes.py FOLDER [FOLDER ...]``.

The film is clips of the folders, one after the other, joined by cuts, dissolves of 8 to 24 frames and fades
through black, and encoded as H.264. A change counts as found within two frames. What the clips themselves
change within counts as false, so look at those places before you blame the detector.
"""

import argparse
import itertools
import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import commit
from PIL import Image

from latte.data.media import decode_frames, probe
from latte.data.pieces import Footage
from latte.data.shots import find_shots
from latte.data.skipped import candidates
from latte.data.writers import write_mp4

HEIGHT, WIDTH = 90, 160
LONGEST = 60  # frames of one clip
SHORTEST = 40  # clips shorter than this have no room for a dissolve
NEAR = 2  # frames


def read(path: str) -> np.ndarray:
    """Return the first LONGEST frames, uint8 (t HEIGHT WIDTH 3)."""
    info = probe(path)
    frames, _ = decode_frames(info, range(min(info.frames, LONGEST)))
    return np.stack([np.asarray(Image.fromarray(frame).resize((WIDTH, HEIGHT))) for frame in frames])


def join(first: np.ndarray, last: np.ndarray, kind: str, choice: random.Random) -> list[np.ndarray]:
    """Return what is left of both clips and what is between them: [first, between, last]."""
    if kind == "cut":
        return [first, first[:0], last]
    if kind == "dissolve":
        t = min(choice.choice([8, 12, 16, 24]), len(first) - 4)
        share = (np.arange(t) + 1)[:, None, None, None] / (t + 1)
        mixed = (1 - share) * first[-t:] + share * last[:t]
        return [first[:-t], mixed.round().astype(np.uint8), last[t:]]
    t = choice.choice([6, 10, 15])
    ramp = np.linspace(1, 0, t)[:, None, None, None]
    black = np.zeros((choice.choice([0, 3, 8]), HEIGHT, WIDTH, 3))
    between = np.concatenate([ramp * first[-t:], black, ramp[::-1] * last[:t]])
    return [first[:-t], between.round().astype(np.uint8), last[t:]]


def film(paths: list[str], kinds: list[str], choice: random.Random) -> tuple[np.ndarray, list[tuple]]:
    """Return the frames of the film and its changes (kind, first frame, end)."""
    parts = []
    changes = []
    position = 0
    current = read(paths[0])
    for path in paths[1:]:
        kind = choice.choice(kinds)
        first, between, current = join(current, read(path), kind, choice)
        position += len(first)
        changes.append((kind, position, position + len(between)))
        position += len(between)
        parts += [first, between]
    return np.concatenate([*parts, current]), changes


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description="Changes of scene found in a film of known changes.")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="cut,dissolve,fade")
    parser.add_argument("--threshold", type=float, default=1.0)
    options = parser.parse_args(argv)
    choice = random.Random(options.seed)
    paths = sorted(path for folder in options.folders for path in candidates(str(folder), Counter()))
    paths = [path for path in choice.sample(paths, len(paths)) if probe(path).frames >= SHORTEST]
    frames, changes = film(paths[: options.clips], options.kinds.split(","), choice)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_mp4(path, frames, 25)
        shots = find_shots(Footage.read(str(path)).thumbnails, options.threshold)
    found = [(before.end, after.start) for before, after in itertools.pairwise(shots)]
    hits: Counter[str] = Counter()
    for kind, start, end in changes:
        match = next((one for one in found if one[0] <= end + NEAR and one[1] >= start - NEAR), None)
        if match:
            found.remove(match)
            hits[kind] += 1
    total = Counter(kind for kind, _, _ in changes)
    result = {
        "what": "changes of scene found",
        "clips": len(changes) + 1,
        "frames": len(frames),
        "seed": options.seed,
        "found": {kind: [hits[kind], total[kind]] for kind in sorted(total)},
        "false": found,
        "commit": commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
