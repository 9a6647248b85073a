# SPDX-License-Identifier: Apache-2.0
"""``latte sample``: clips from a run, a weights folder, the hub or the built-in model."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.checks import InputError, require
from latte.cli.options import Debug, Device, Dtype, Json, configure_logging, print_result, progress_line

if TYPE_CHECKING:
    from latte.inference.outputs import SampleRequest
    from latte.inference.pipeline import Trained

Model = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="A run folder, a weights folder, a hub id, or builtin.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,...", help="Class names or numbers, one after the other; all classes by default."
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="What a text model is to show; give it as often as you like."),
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts from a text file, one a line.")
]
Negative = Annotated[
    str,
    typer.Option(
        metavar="TEXT", help="What guidance leads a text model away from; nothing in particular by default."
    ),
]
Count = Annotated[
    int | None, typer.Option(help="How many clips; 4, or one per label, or one of each prompt by default.")
]
Steps = Annotated[
    str | None, typer.Option(metavar="N", help="Denoising steps: a number, or a respacing such as ddim50.")
]
SamplerName = Annotated[str | None, typer.Option(metavar="NAME", help="One of {samplers}.")]
Guidance = Annotated[
    float | None, typer.Option(help="Weight of the label or the prompt; 1 is the plain model.")
]
Eta = Annotated[float | None, typer.Option(help="Noise of ddim, 0 to 1.")]
Seed = Annotated[int, typer.Option(help="Seed of the first clip; the others count on from it.")]
Frames = Annotated[
    int | None, typer.Option(help="Frames of a clip; those the model was trained with by default.")
]
Window = Annotated[
    int | None,
    typer.Option(metavar="N", help="For longer clips: let the model see N frames at a time, overlapping."),
]
Longer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How windows become a clip: {long_video}.",
    ),
]
Overlap = Annotated[
    int | None,
    typer.Option(metavar="N", help="Frames that neighbouring windows share; half of one by default."),
]
First = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A picture to start from, or a video whose first frame is meant."),
]
Last = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A picture to end on, or a video whose last frame is meant."),
]
Size = Annotated[
    str | None, typer.Option(metavar="N|HxW", help="Pixels; those the model was trained with by default.")
]
Batch = Annotated[int | None, typer.Option(help="Clips drawn at once.")]
Fps = Annotated[float | None, typer.Option(help="Frames a second of the files.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder; samples/NAME-HASH by default. Clips that are there already are kept."),
]
CodecPath = Annotated[
    str | None, typer.Option(help="Where the autoencoder's weights are, if they have moved.")
]
TextPath = Annotated[
    str | None,
    typer.Option(
        "--text-encoder", metavar="PATH", help="Where the text encoder's weights are, if they have moved."
    ),
]
TextBits = Annotated[
    int | None,
    typer.Option(metavar="8", help="Hold the text encoder's weights as eight-bit numbers (extra bits8)."),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="A KL autoencoder that draws the frames instead, e.g. one with a temporal decoder.",
    ),
]
Offload = Annotated[
    bool,
    typer.Option(
        "--offload", help="Keep on the GPU only the part at work; slower, less memory (latte plan)."
    ),
]
LoraFolder = Annotated[
    Path | None,
    typer.Option("--lora", metavar="FOLDER", help="Adapters (LoRA) of this model, folded in first."),
]


def sample(
    model: Model = "builtin",
    labels: Labels = None,
    prompt: Prompt = None,
    prompts: PromptFile = None,
    negative: Negative = "",
    count: Count = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    guidance: Guidance = None,
    eta: Eta = None,
    seed: Seed = 0,
    frames: Frames = None,
    size: Size = None,
    window: Window = None,
    longer: Longer = None,
    overlap: Overlap = None,
    first: First = None,
    last: Last = None,
    batch: Batch = None,
    fps: Fps = None,
    out: Out = None,
    codec_path: CodecPath = None,
    text_encoder: TextPath = None,
    text_bits: TextBits = None,
    decoder: Decoder = None,
    lora: LoraFolder = None,
    offload: Offload = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw clips: an mp4 each, one gif, and a contact sheet (rows clips, columns frames)."""
    from dataclasses import replace

    from latte.diffusion.long_video import LONG_VIDEO_METHODS
    from latte.inference.outputs import write_album
    from latte.inference.pipeline import load_trained
    from latte.runtime import resolve_device, resolve_dtype

    configure_logging()
    chosen = {
        "steps": read_steps(steps),
        "sampler": sampler,
        "guidance": guidance,
        "eta": eta,
        "batch": batch,
        "fps": fps,
    }
    texts = [*(check_prompt(text) for text in prompt or []), *(read_lines(prompts) if prompts else [])]
    read = [*texts, negative] if texts else []
    trained = load_trained(model, device, codec_path, text_encoder, read, lora, decoder, text_bits, offload)
    config = replace(trained.sample, **{key: value for key, value in chosen.items() if value is not None})
    trained.check_prompts(bool(texts))
    requests = wish_texts(texts, count, seed) if texts else wish(trained, labels, count, seed)
    kind, idle = (
        ("text", {"--labels": labels})
        if trained.reader
        else ("no text", {"--negative": negative, "--text-encoder": text_encoder, "--text-bits": text_bits})
    )
    refuse(idle, f"{trained.name} reads {kind}", "leave it out")
    if window is None:
        refuse(
            {"--overlap": overlap, "--longer": longer},
            "without --window there are no windows",
            "give --window",
        )
    precision = resolve_dtype(dtype, resolve_device(device))
    given = read_given(first, last, trained.frame_size(read_size(size)))
    options = {
        "config": config,
        "frames": frames,
        "size": read_size(size),
        "dtype": precision,
        "window": window,
        "given": given,
    }
    options |= {"longer": longer or next(iter(LONG_VIDEO_METHODS)), "overlap": overlap}
    facts = facts_of(trained, options, negative)
    folder = (
        out
        or Path("samples")
        / f"{Path(trained.name).name}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]}"
    )
    batches = -(-len(requests) // config.batch)

    def draw(number: int, part: Sequence["SampleRequest"]) -> Iterator[tuple[int, Any]]:
        labels_of = [one.label for one in part if one.label is not None] or None
        prompts_of = [one.prompt for one in part if one.prompt is not None] or None
        told = {"labels": labels_of, "prompts": prompts_of, "negative": negative}
        return trained.generate(
            [one.seed for one in part], progress=progress_line("sample", number, batches), **told, **options
        )

    sheet, gif = write_album(folder, requests, draw, facts, config.batch, config.fps)
    clips = [
        {
            "path": str(folder / one.file),
            "seed": one.seed,
            "label": one.word,
            "class": one.label,
            **({} if one.prompt is None else {"prompt": one.prompt}),
        }
        for one in requests
    ]
    result = {
        "clips": clips,
        "sheet": str(sheet),
        "gif": str(gif),
        "model": trained.name,
        "weights_sha256": trained.weights,
    }
    print_result(result, as_json, [*(clip["path"] for clip in clips), str(sheet), str(gif)])


def refuse(options: dict[str, Any], rule: str, way_out: str) -> None:
    """InputError for the first of these options that was given."""
    for option, value in options.items():
        require(value is None or value == "", option, value, rule, way_out)


def facts_of(trained: "Trained", options: dict[str, Any], negative: str) -> dict[str, Any]:
    """Everything but seed, label and prompt that decides the pixels of a clip, as plain data; pictures by their hash."""
    from dataclasses import asdict

    from latte.diffusion.frame_conditioning import DEFAULT_STRENGTH

    given, window = options["given"], options["window"]
    return {
        **{key: value for key, value in asdict(options["config"]).items() if key != "batch"},
        **{"weights": trained.weights, "codec": trained.codec.fingerprint},
        **{"frames": options["frames"], "size": options["size"], "dtype": str(options["dtype"])},
        **({"window": window, "longer": options["longer"], "overlap": options["overlap"]} if window else {}),
        **(
            {
                "given": {
                    str(frame): hashlib.sha256(picture.tobytes()).hexdigest()
                    for frame, picture in given.items()
                }
            }
            if given
            else {}
        ),
        **({"given_strength": DEFAULT_STRENGTH} if given else {}),
        **({"decoder": trained.decoder.fingerprint} if trained.decoder else {}),
        **({"text_encoder": trained.reader.used, "negative": negative} if trained.reader else {}),
    }


def wish(trained: "Trained", labels: str | None, count: int | None, seed: int) -> list["SampleRequest"]:
    """One wish per clip: seeds count on from ``seed``, labels go round."""
    from latte.inference.outputs import SampleRequest

    words = [word.strip() for word in labels.split(",") if word.strip()] if labels is not None else []
    if labels is not None and not words:
        raise InputError(
            f"--labels is {labels!r}, which names no class; give names or numbers with commas between them"
        )
    numbers = [trained.label(word) for word in words]
    num_classes = trained.model.config.num_classes
    if not numbers and num_classes is not None:
        numbers = list(range(num_classes))
    count = max(4, len(words)) if count is None else count
    check_counts(count, seed)
    found = []
    for index in range(count):
        number = numbers[index % len(numbers)] if numbers else None
        name = None if number is None else trained.word(number)
        found.append(SampleRequest(seed + index, number, name))
    return found


def wish_texts(texts: Sequence[str], count: int | None, seed: int) -> list["SampleRequest"]:
    """``count`` requests per prompt, one after the other: seeds count on from ``seed``."""
    from latte.inference.outputs import SampleRequest

    count = 1 if count is None else count
    check_counts(count, seed)
    return [SampleRequest(seed + index, prompt=texts[index // count]) for index in range(count * len(texts))]


def check_counts(count: int, seed: int) -> None:
    """InputError for a number of clips or a seed that is none."""
    require(count >= 1, "--count", count, "it counts clips", "give 1 or more")
    require(seed >= 0, "--seed", seed, "seeds count from 0", "give 0 or more")


def check_prompt(text: str) -> str:
    """``text``; InputError when it says nothing, which a slip of the shell makes more often than a wish."""
    require(
        bool(text.strip()),
        "--prompt",
        text,
        "it says nothing",
        "give a text, e.g. --prompt 'a red square moves left'",
    )
    return text


def read_lines(path: Path) -> list[str]:
    """The prompts of a text file, one a line, empty lines left out; InputError when there are none."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = f"it cannot be read ({error.__class__.__name__})"
        raise InputError(
            f"--prompts is {str(path)!r}, but {why}; give a text file in UTF-8 with a prompt a line"
        ) from None
    found = [line for line in lines if line]
    require(
        bool(found),
        "--prompts",
        str(path),
        "no line of it holds a prompt",
        "give a text file with a prompt a line",
    )
    return found


def read_given(first: Path | None, last: Path | None, size: tuple[int, int]) -> dict[int, Any]:
    """{0: the first frame, -1: the last}, as far as they are given, uint8 (h w c), cropped and resized to ``size``."""
    from latte.data.clips import centre_crop_resize
    from latte.data.frame_folder import IMAGE_SUFFIXES, read_image
    from latte.data.media import probe, read_frames

    found = {}
    for frame, path in ((0, first), (-1, last)):
        if path is None:
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            picture = read_image(str(path))[None]
        else:
            info = probe(path)
            picture = read_frames(info, [frame % info.frames])
        found[frame] = centre_crop_resize(picture, *size)[0]
    return found


def read_steps(text: str | None) -> int | str | None:
    """'50' -> 50, 'ddim50' as it is."""
    return int(text) if text is not None and text.isdecimal() else text


def read_size(text: str | None) -> tuple[int, int] | None:
    """'64' or '64x96' (height x width) -> (64, 96); InputError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match:
        raise InputError(
            f"--size is {text!r}, but it must be a number of pixels or HEIGHTxWIDTH; give e.g. 64 or 64x96"
        )
    return int(match[1]), int(match[2] or match[1])
