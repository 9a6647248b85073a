# SPDX-License-Identifier: Apache-2.0
"""Hash what must not change when code moves: 3 trainings, 12 samples, 4 scores, 4 converted checkpoints.

    PYTHONPATH=OLD/src python tools/check_results.py > old.json
    PYTHONPATH=NEW/src python tools/check_results.py --compare old.json

Every input is made on the spot. Clips are hashed as decoded frames (uint8), weights tensor by tensor, scores
with their manifest hash, so file formats may change. The two runs must share machine, torch and thread count:
float32 results depend on them.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

TINY = [
    "train.steps=6",
    "train.global_batch=4",
    "train.checkpoint_every=3",
    "train.dtype=fp32",
    "sample.steps=4",
    "sample.batch=2",
]
TRAININGS = {
    "class": ["shapes-tiny", "model.depth=2"],
    "joint": ["shapes-tiny", "model.depth=2", "train.num_images=3"],
    "text": [
        "shapes-text",
        "model.depth=2",
        "data.resolution=32",
        "train.sample_every=0",
        "train.decay_steps=2",
    ],
}


def latte(*arguments: object) -> dict:
    """Run a command of the package and return the JSON object that it prints last."""
    command = [sys.executable, "-W", "ignore", "-m", "latte", *map(str, arguments), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"latte {' '.join(map(str, arguments))} failed with {run.returncode}:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def sha256(array: np.ndarray) -> str:
    """Hash an array's dtype, shape and bytes; 16 hex digits."""
    text = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(text + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def tensors_sha256(file: Path) -> str:
    """Hash the names and values of the tensors in a safetensors or released .pt file."""
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    else:
        tensors = torch.load(file, weights_only=True)
        tensors = tensors.get("ema", tensors)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + sha256(tensors[name].float().numpy()).encode())
    return digest.hexdigest()[:16]


def train_all(folder: Path) -> dict[str, str]:
    """Train three tiny models, one of them stopped and resumed; return the hashes of their EMA weights."""
    found = {}
    for name, arguments in TRAININGS.items():
        run = [*arguments, *TINY, f"run.dir={folder / name}"]
        result = latte("train", *run)
        found[f"training {name}"] = str(result["weights_sha256"])[:16]
    return found


def sample_all(folder: Path) -> dict[str, str]:
    """Generate twelve clips through the Python interface; return the hashes of their frames."""
    warnings.simplefilter("ignore")
    from latte import load_trained

    cases = [
        ("builtin", "builtin-shapes", [0, 1, 2, 3], {"labels": [0, 1, 2, 3]}),
        ("class", folder / "class", [4, 5, 6], {"labels": [0, 1, -1]}),
        ("joint", folder / "joint", [7, 8], {"labels": [2, 3], "frames": 5}),
        (
            "text",
            folder / "text",
            [9, 10, 11],
            {"prompts": ["a red square moves left", "a blue circle", "up"], "negative": "down"},
        ),
    ]
    found = {}
    for name, source, seeds, options in cases:
        for seed, frames in load_trained(str(source), device="cpu").generate(seeds, **options):
            found[f"sample {name} {seed}"] = sha256(frames)
    return found


def make_frame_folders(root: Path, seed: int) -> Path:
    """Write eight clips of sixteen PNG frames: coloured gradients that move, a pure function of ``seed``."""
    random = np.random.default_rng(seed)
    for clip in range(8):
        folder = root / f"clip{clip}"
        folder.mkdir(parents=True)
        speed, phase = random.uniform(1, 4, 3), random.uniform(0, 6, 3)
        y, x = np.mgrid[0:32, 0:32] / 32
        for time in range(16):
            waves = np.sin(6 * np.stack([x, y, x + y], -1) + phase + speed * time / 4)
            Image.fromarray(np.uint8(127.5 + 127.5 * waves)).save(folder / f"{time:03d}.png")
    return root


def score_all(folder: Path) -> dict[str, str]:
    """Score two pairs of folders by two detectors; return values, intervals and manifest hashes."""
    real = make_frame_folders(folder / "real", 1)
    fakes = {name: make_frame_folders(folder / name, seed) for seed, name in ((2, "first"), (3, "second"))}
    found = {}
    for protocol in ("builtin", "random-i3d"):
        for name, fake in fakes.items():
            out = folder / f"score-{protocol}-{name}"
            result = latte(
                "evaluate", real, fake, "--protocol", protocol, "--clips", 8, "--device", "cpu", "--out", out
            )
            interval = [float(bound).hex() for bound in result.get("interval") or ()]
            found[f"score {protocol} {name}"] = (
                f"{float(result['value']).hex()} {interval} {result['manifest_hash'][:16]}"
            )
    return found


def convert_all(folder: Path) -> dict[str, str]:
    """Convert two runs to four layouts; return the hashes of their tensors."""
    found = {}
    for name, layout in (("class", "latte"), ("class", "official"), ("text", "latte"), ("text", "diffusers")):
        out = folder / f"{name}-{layout}{'.pt' if layout == 'official' else ''}"
        latte("convert", folder / name, out, "--to", layout)
        files = [out] if out.is_file() else sorted(out.rglob("*.safetensors"))
        found[f"converted {name} {layout}"] = " ".join(tensors_sha256(file) for file in files)
    return found


def main() -> None:
    """Print the hashes as JSON; with --compare also the differences, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compare", type=Path, help="JSON of an earlier run")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = train_all(folder) | sample_all(folder) | score_all(folder) | convert_all(folder)
    print(json.dumps(found, indent=1))
    if arguments.compare:
        before = json.loads(arguments.compare.read_text(encoding="utf-8"))
        differences = [key for key in before | found if before.get(key) != found.get(key)]
        print(f"{len(found)} results, {len(differences)} differ: {differences}", file=sys.stderr)
        raise SystemExit(bool(differences))


if __name__ == "__main__":
    main()
