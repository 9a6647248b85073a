# SPDX-License-Identifier: Apache-2.0
"""The commands, links and names of the Markdown pages, and a folder in which their commands can run small."""

import contextlib
import importlib.util
import io
import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import typer
from support import wake

from latte.checks import InputError

ROOT = Path(__file__).parents[1]
DATED = {"docs/results.md", "docs/LOG.md", "docs/benchmarks.md"}  # commands of the commits named beside them
PAGES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
OVERRIDABLE = ("train", "plan", "ablate", "launch", "bench", "demo", "data", "config")
PROGRAMS = ("source", "bash", "hf", "cd", "export")  # started by a page, and not ours
FENCE = re.compile(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks of these languages; '' is a block without one."""
    return [match[3] for match in FENCE.finditer(text) if match[2] in languages]


def shell_lines(text: str) -> list[str]:
    """The command lines of the sh blocks, continuation lines joined, without comments."""
    joined = "\n".join(blocks(text, "sh", "bash", "console")).replace("\\\n", " ")
    parts = [part for line in joined.splitlines() for part in line.split(" #")[0].split("&&")]
    return [part.strip() for part in parts if part.strip() and not part.strip().startswith("#")]


def inline_lines(text: str) -> list[str]:
    """Commands in running text, `latte ...`, and those of fenced blocks without a language."""
    plain = [line for block in blocks(text, "") for line in block.splitlines() if line.startswith("latte ")]
    return [line.split("  ")[0] for line in plain] + re.findall(
        r"`((?:\.venv/bin/)?latte [^`\n]*)`", FENCE.sub("", text)
    )


def words_of(line: str) -> list[str] | None:
    """The words after ``latte``, whatever starts it; None for a line that does not run it."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words and words[0].removeprefix(".venv/bin/") == "latte":
        return words[1:]
    if "-m" in words and "latte" in words[words.index("-m") :]:
        return words[words.index("latte", words.index("-m")) + 1 :]
    return None


def commands() -> Any:
    from latte.cli.main import app

    return typer.main.get_command(app)


def complaint(line: str, complete: bool = True) -> str | None:
    """What the program's own parsers refuse in a line: command, options, values, settings; None if nothing.

    A line that is not ``complete`` stands in running text: arguments may be missing.
    """
    words = words_of(line)
    if words is None:
        return other_complaint(line)
    here, path = commands(), []
    while hasattr(here, "commands"):
        if not words or words[0].startswith("-"):
            return None if words in ([], ["--help"], ["--version"]) else f"no command in {line!r}"
        if words[0] == "COMMAND":
            return None
        if words[0] not in here.commands:
            return f"no command {words[0]!r}"
        path.append(words.pop(0))
        here = here.commands[path[-1]]
    options = {option for item in here.params for option in (*item.opts, *item.secondary_opts)} | {"--help"}
    for word in words:
        name = word.split("=")[0]
        if word.startswith("--") and name not in options:
            return f"no option {name!r}"
    settings = [word for word in words if re.match(r"[a-z]\w*\.\w+=", word)]
    if path[0] in OVERRIDABLE and (found := settings_complaint(settings)):
        return found
    if path[0] in ("train", "plan", "ablate", "launch", "bench") and complete:
        return run_complaint(words[1] if path[0] == "launch" else words[0])
    return None


def settings_complaint(settings: list[str]) -> str | None:
    """What is wrong in KEY=VALUE words; values in capitals are placeholders."""
    from latte.config.layers import read_value, read_words
    from latte.config.run import HINTS

    layer = read_words(settings, HINTS)
    for problem in layer.all_problems():
        return problem
    for key, entry in layer.entries.items():
        if re.fullmatch(r"[A-Z_.]+", str(entry.raw)):
            continue
        try:
            read_value(entry.raw, HINTS[key])
        except (ValueError, InputError) as error:
            return f"{key}: {error}"
    return None


def run_complaint(run: str) -> str | None:
    """Why RUN cannot be one: neither a recipe, nor a path, nor a placeholder."""
    from latte.config.run import recipes

    if run in recipes() or "/" in run or run.endswith(".yaml") or run.isupper():
        return None
    return f"no recipe {run!r}"


def other_complaint(line: str) -> str | None:
    """The same for a line that does not run latte: pip, python files, git and the like."""
    words = shlex.split(line, comments=True)
    first = Path(words[0]).name
    if first in PROGRAMS:
        return None
    if first in ("python", "python3", "torchrun", "pip"):
        extras = {extra for word in words for extra in re.findall(r"\[([\w,]+)\]", word)}
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
        unknown = {name for extra in extras for name in extra.split(",")} - set(known)
        if unknown:
            return f"no extra {', '.join(sorted(unknown))}"
        files = [word for word in words if word.endswith(".py")]
        lost = [name for name in files if not (ROOT / name).is_file()]
        modules = [after for word, after in pairwise(words) if word == "-m"]
        lost += [
            name
            for name in modules
            if name.startswith("tools.") and not (ROOT / f"{name.replace('.', '/')}.py").is_file()
        ]
        return f"no file {lost[0]}" if lost else None
    if (ROOT / words[0]).is_file() or first in ("ruff", "pyright", "pytest"):
        return None
    return f"unknown program {words[0]!r}"


def slug(heading: str) -> str:
    """The anchor of a heading, on GitHub and on the site."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors of a page; a heading that occurs again gets -1, -2 on GitHub and _1, _2 on the site."""
    return {slug(line) for line in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)}


def links(text: str) -> Iterator[str]:
    """Targets of links and images that are not on other hosts, code excluded."""
    bare = re.sub(r"`[^`\n]*`", "`", FENCE.sub("", text))
    yield from re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", bare)


def broken(page: str, text: str) -> list[str]:
    """Links of a page whose file or anchor does not exist."""
    found = []
    for link in links(text):
        name, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        if not path.exists():
            found.append(link)
        elif anchor and path.suffix == ".md":
            content = text if not name else path.read_text("utf-8")
            if anchor not in anchors(content):
                found.append(link)
    return found


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    output: str


SMALL = {  # overrides of every command: the environment, which its own words still override
    "MODEL_DEPTH": "2",
    "MODEL_WIDTH": "384",
    "MODEL_HEADS": "6",
    "MODEL_PATCH_SIZE": "2",
    "DATA_FRAMES": "17",
    "DATA_RESOLUTION": "32",
    "DATA_INTERVAL": "1",
    "TRAIN_STEPS": "2",
    "TRAIN_GLOBAL_BATCH": "2",
    "TRAIN_WARMUP_STEPS": "0",
    "TRAIN_DECAY_STEPS": "0",
    "TRAIN_CHECKPOINT_EVERY": "2",
    "TRAIN_SAMPLE_EVERY": "0",
    "TRAIN_DTYPE": "fp32",
    "SAMPLE_STEPS": "2",
    "SAMPLE_SAMPLER": "ddim",
    "SAMPLE_BATCH": "2",
}


def write_videos(root: Path, names: list[str], frames: int = 60) -> None:
    """Write a small moving video for each name, with a caption beside it."""
    import numpy as np

    from videos import encode

    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        clip = np.zeros((frames, 48, 64, 3), np.uint8)
        row = 8 + number % 24
        for t in range(frames):
            column = (t + 3 * number) % 48
            clip[t, row : row + 16, column : column + 16] = (250, 160, 20 * (number % 12))
        encode(path, clip, rate=12)
        path.with_suffix(".txt").write_text(f"a red square moves {('left', 'right')[number % 2]}\n", "utf-8")


def prepare(folder: Path, text: str) -> None:
    """Write what the pages take for granted: videos, images, prompts, and tiny published models."""
    from PIL import Image
    from reference.official import dit_state

    from latte.diffusion.config import DiffusionConfig
    from latte.interop.official import save_official
    from latte.interop.pipeline import save_pipeline
    from latte.model.latte import Latte, ModelConfig
    from tiny_pipeline import tiny_codec, tiny_denoiser, tiny_t5

    for root, names in (
        ("my_videos", [f"{c}/{n}.mp4" for c in ("bend", "wave") for n in range(10)]),
        ("FaceForensics", [f"{n % 2}/{n}.mp4" for n in range(8)]),
    ):
        if root in text:
            write_videos(folder / root, names)
    for image in ("first.png", "last.png"):
        Image.new("RGB", (64, 64), (40, 90, 160)).save(folder / image)
    (folder / "prompts.txt").write_text("a red square moves left\na blue circle moves up\n", "utf-8")
    for block in blocks(text, "yaml"):
        (folder / "mine.yaml").write_text(block, "utf-8")
    for name in ("stabilityai/sd-vae-ft-ema", "CompVis/stable-diffusion-v1-4"):
        if name in text:
            tiny_codec("AutoencoderKL", folder / name)
    if "ffs.pt" in text:
        sizes = ModelConfig(depth=2, width=384, heads=6, num_frames=5, latent_size=4)
        save_official(wake(Latte(sizes)), folder / "ffs.pt")
        torch.save(dit_state(width=384, depth=2), folder / "DiT-XL-2-256x256.pt")
    for name in ("a", "b", "mine", "other", "ffs"):
        if f"runs/{name} " in text and not re.search(
            rf"train .*run\.dir=runs/{name}\b|train {name}\.yaml", text
        ):
            call(["train", "shapes-tiny", "--out", str(folder / "runs" / name)])
    if has_text_models() and re.search("t5-v1_1|Latte-1", text):
        encoder, tokenizer = tiny_t5()
        for part in (encoder, tokenizer):
            part.save_pretrained(folder / "google" / "t5-v1_1-xxl")
        codec = tiny_codec("AutoencoderKL", folder / "vae")
        target = folder / "maxin-cn" / "Latte-1"
        save_pipeline(tiny_denoiser(), codec, encoder, tokenizer, DiffusionConfig(), target)
        pixart(folder / "PixArt-alpha" / "PixArt-XL-2-512x512")


def has_text_models() -> bool:
    """Whether the extra t2v is installed."""
    return importlib.util.find_spec("transformers") is not None


def pixart(folder: Path) -> None:
    """Write the transformer of a tiny PixArt-alpha."""
    from diffusers import PixArtTransformer2DModel

    sizes = {"num_attention_heads": 6, "attention_head_dim": 64, "cross_attention_dim": 384, "num_layers": 2}
    sizes |= {"in_channels": 4, "out_channels": 8, "sample_size": 4, "patch_size": 2, "caption_channels": 12}
    wake(PixArtTransformer2DModel(**sizes), 0.1).save_pretrained(folder / "transformer")


def call(words: list[str]) -> Answer:
    """Run ``latte WORDS`` in this process and the current folder."""
    from latte.cli.main import app

    output = io.StringIO()
    code: Any = 0
    shown = (contextlib.redirect_stdout(output), contextlib.redirect_stderr(output))
    with shown[0], shown[1], warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            app(args=words, prog_name="latte")
        except SystemExit as left:
            code = left.code or 0
    return Answer(code, output.getvalue())
