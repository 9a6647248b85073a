# SPDX-License-Identifier: Apache-2.0
"""Write a model of the package: python -m tools.package_model builtin RUN [--results FILE].

RUN is a run, a checkpoint or a weights folder. The weights are stored as float16. ``--results`` is a file of
JSON lines of ``benchmarks/obedience.py``; those of the same weights become the numbers of the card. Give
``--scenes``, ``--language`` and ``--hold-out`` for a run on latents, which does not record them.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from latte.checkpoint.record import read_fingerprint
from latte.checks import check
from latte.inference.pipeline import VideoPipeline
from latte.interop.readers import BUILTIN

TITLES = {
    "builtin": (
        "The built-in model: sentences to clips",
        "A text-to-video Latte that was trained on the procedural world of this project alone: nine kinds of "
        "moving scenes with captions in English and Chinese. It makes 17 frames of 64 x 64 and knows nothing "
        "of real video.",
    ),
    "builtin-shapes": (
        "The built-in model of moving shapes",
        "A class-conditional Latte that makes 8 frames of 64 x 64 in which one coloured shape moves up, "
        "down, left or right, as its label says. It knows nothing of real video.",
    ),
}
LIMITS = {
    "builtin": "It knows the words of its captions and no others: a word that no caption has is noise to it. "
    "Scenes hold one subject. Numbers are of single clips at the model's own settings.",
    "builtin-shapes": "It has no other condition than the four labels.",
}
SIDES = {
    "held_out": "combinations held out of training",
    "trained": "trained combinations",
    "labels": "labels",
}
COLUMNS = ("kind", "colour", "direction", "consistent", "all")


def percent(cell: dict[str, Any] | None) -> str:
    """Return '97.2 % (95.4 to 98.3)' of a share with its interval, '' without one."""
    if cell is None:
        return ""
    low, high = (100 * bound for bound in cell["interval"])
    return f"{100 * cell['share']:.1f} % ({low:.1f} to {high:.1f})"


def results_of(path: Path | None, weights: str) -> list[dict[str, Any]]:
    """Return the lines of ``path`` that were measured with these weights."""
    if path is None:
        return []
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    found = [line for line in lines if line["weights_sha256"] == weights]
    check(bool(found), f"{path} has no line of the weights {weights[:16]}; measure the packaged model")
    return found


def results_table(results: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of numbers, each line with the command that measured it."""
    if not results:
        return ["No numbers were measured of these weights yet.", ""]
    lines = [f"| clips | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for result in results:
        for side in filter(result.__contains__, SIDES):
            cells = " | ".join(percent(result[side].get(column)) for column in COLUMNS)
            lines.append(f"| {result['clips']}, {SIDES[side]} | {cells} |")
    first = results[0]
    command = f"python benchmarks/obedience.py {{name}} --count {first['clips']} --seed {first['seed']}"
    settings = f"{first['steps']} steps of {first['sampler']}, guidance {first['guidance']:g}"
    return [*lines, "", f"95 % intervals in brackets. `{command}`, {settings}, commit {first['commit']}.", ""]


def card(name: str, pipe: VideoPipeline, weights: str, command: str, results: list[dict[str, Any]]) -> str:
    """Return README.md of the packaged model."""
    title, description = TITLES[name]
    parameters = sum(parameter.numel() for parameter in pipe.model.parameters())
    settings = pipe.sample
    codec = f"`{pipe.codec.name}`, fingerprint {pipe.codec.fingerprint}"
    tag = "text-to-video" if pipe.reader else "class-conditional"
    rows = {
        "parameters": f"{parameters:,}, stored as float16 and computed as float32",
        "data": "procedural clips made by this project (`latte.data`): no licence attaches",
        "autoencoder": f"{codec}, trained by this project",
        "command": f"`{command}`, step {pipe.about.get('step', 'not recorded')}, EMA weights",
        "sampling": f"{settings.sampler}, {settings.steps} steps, guidance {settings.guidance:g}",
        "weights": f"sha256 {weights[:16]}",
        "licence": "Apache-2.0",
    }
    lines = [
        "---",
        "license: apache-2.0",
        "library_name: latte",
        f"tags: [video-generation, latte, {tag}]",
        "---",
    ]
    lines += ["", f"# {title}", "", description, "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in rows.items()]
    lines += ["", *(line.replace("{name}", name) for line in results_table(results)), LIMITS[name], ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Write the folder and print what it holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=list(TITLES))
    parser.add_argument("source")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--out", type=Path, help="the package's folder by default")
    parser.add_argument("--command", default="latte train builtin")
    parser.add_argument("--scenes")
    parser.add_argument("--language")
    parser.add_argument("--hold-out", type=int)
    options = parser.parse_args(argv)
    out = options.out or BUILTIN[options.name]
    pipe = VideoPipeline.from_pretrained(options.source, device="cpu", dtype=torch.float32)
    if options.scenes:
        data = {"kind": "procedural", "scenes": options.scenes, "language": options.language}
        data |= {"hold_out": options.hold_out, "resolution": pipe.frame_size()[0], "frames": pipe.num_frames}
        known = {key: value for key, value in data.items() if value is not None}
        pipe.about = {**pipe.about, "data": known, "licence": "apache-2.0"}
    pipe.save_pretrained(out, half=True)
    facts = json.loads((out / "config.json").read_text("utf-8"))
    weights = facts["weights_sha256"]
    assert read_fingerprint(facts["codec"]) == pipe.codec.fingerprint
    results = results_of(options.results, weights)
    (out / "README.md").write_text(
        card(options.name, pipe, weights, options.command, results), encoding="utf-8"
    )
    size = sum(path.stat().st_size for path in out.iterdir())
    print(json.dumps({"out": str(out), "weights_sha256": weights, "bytes": size, "numbers": len(results)}))


if __name__ == "__main__":
    main()
