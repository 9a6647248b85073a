# SPDX-License-Identifier: Apache-2.0
"""``latte sample``: clips from a run, a weights folder, the hub or the built-in model."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.checks import InputError, check
from latte.cli.options import Debug, Device, Dtype, Json, configure_logging, print_result, progress_line

if TYPE_CHECKING:
    from latte.inference.pipeline import VideoPipeline
    from latte.inference.requests import SampleRequest

Model = Annotated[
    str,
    typer.Argument(
        metavar="[MODEL or PROMPT]",
        help="A sentence, which the built-in model shows; or a model: a run folder, a weights folder, a hub "
        "id, builtin (reads text) or builtin-shapes (moving shapes, by --labels).",
        show_default=False,
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(metavar="A,B,...", help="Class names or numbers, in turn; all classes by default."),
]
Prompt = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="What a text model shall show; may be repeated.")
]
PromptFile = Annotated[
    Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts from a text file, one per line.")
]
Negative = Annotated[
    str, typer.Option(metavar="TEXT", help="Negative prompt of a text model; empty by default.")
]
Count = Annotated[
    int | None, typer.Option(help="Number of clips (4, or one per label), or clips per prompt (1).")
]
Steps = Annotated[
    str | None, typer.Option(metavar="N", help="Denoising steps: a number, or a respacing like ddim50.")
]
SamplerName = Annotated[str | None, typer.Option(metavar="NAME", help="One of {samplers}.")]
QualityName = Annotated[
    str | None,
    typer.Option("--quality", metavar="NAME", help="Sampler and steps by one word: {qualities} (250 steps)."),
]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance scale; 1 turns guidance off.")]
Order = Annotated[int | None, typer.Option(metavar="N", help="Order of dpmpp and unipc: 1 to 3, default 2.")]
Interval = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH", help="Noise levels (noise / signal) that are guided, e.g. 0.3,5; all by default."
    ),
]
Cache = Annotated[
    float | None,
    typer.Option(
        metavar="CHANGE", help="Skip evaluations while the output changes by less than this, e.g. 0.05."
    ),
]
Eta = Annotated[float | None, typer.Option(help="Noise of ddim, 0 to 1.")]
Seed = Annotated[int, typer.Option(help="Seed of the first clip; each further clip adds 1.")]
Frames = Annotated[
    int | None, typer.Option(help="Frames of video per clip; by default what the model was trained with.")
]
Window = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="For longer clips: the model sees N latent frames at a time, overlapping. With a codec that "
        "compresses time 4 times each stands for 4 frames of video, with others for one.",
    ),
]
Longer = Annotated[str | None, typer.Option(metavar="NAME", help="How windows become a clip: {long_video}.")]
Overlap = Annotated[
    int | None,
    typer.Option(metavar="N", help="Latent frames that adjacent windows share; half a window by default."),
]
First = Annotated[
    Path | None, typer.Option(metavar="FILE", help="First frame: an image, or a video's first frame.")
]
Last = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Last frame: an image, or a video's last frame; with a codec that compresses time it is held "
        "for the last latent frame.",
    ),
]
Size = Annotated[
    str | None, typer.Option(metavar="N|HxW", help="Pixels; by default what the model was trained with.")
]
Batch = Annotated[int | None, typer.Option(help="Clips generated at once.")]
Fps = Annotated[float | None, typer.Option(help="Frame rate of the files.")]
Out = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="samples/NAME-HASH by default. Clips already there are kept."),
]
CodecPath = Annotated[
    str | None, typer.Option(help="Location of the autoencoder's weights, if they have moved.")
]
TextPath = Annotated[
    str | None,
    typer.Option(
        "--text-encoder", metavar="PATH", help="Location of the text encoder's weights, if they have moved."
    ),
]
TextBits = Annotated[
    int | None, typer.Option(metavar="8", help="Hold the text encoder's weights in int8 (extra bits8).")
]
Decoder = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="Another KL autoencoder to decode with, e.g. one with a temporal decoder."
    ),
]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="CPU offload: only the active part is on the GPU; slower, less memory."),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile", help="torch.compile the model: faster after the first call, equal to rounding."
    ),
]
Shared = Annotated[
    int,
    typer.Option(
        "--sequence-parallel",
        metavar="N",
        min=1,
        help="Processes of torchrun that share the frames and tokens of each clip; equal to rounding.",
    ),
]
Ema = Annotated[
    float | None,
    typer.Option(
        metavar="WIDTH",
        help="EMA weights of a run that was trained with train.ema_widths: a stored width, or one that the "
        "stored ones combine to.",
    ),
]
LoraFolder = Annotated[
    Path | None, typer.Option("--lora", metavar="FOLDER", help="LoRA adapters to merge first.")
]


def sample(
    model: Model = "builtin",
    labels: Labels = None,
    prompt: Prompt = None,
    prompts: PromptFile = None,
    negative: Negative = "",
    count: Count = None,
    quality: QualityName = None,
    steps: Steps = None,
    sampler: SamplerName = None,
    order: Order = None,
    guidance: Guidance = None,
    guidance_interval: Interval = None,
    cache: Cache = None,
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
    ema: Ema = None,
    offload: Offload = False,
    compiled: Compile = False,
    sequence_parallel: Shared = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate clips: an mp4 each, one gif, and a contact sheet (rows: clips, columns: frames)."""
    from latte.inference.requests import read_conditioning_frames

    configure_logging()
    check_before_loading(out, window, {"--overlap": overlap, "--longer": longer})
    model, texts = read_texts(model, prompt, prompts)
    parts = {"codec_path": codec_path, "text_encoder_path": text_encoder, "compile": compiled, "ema": ema}
    parts |= {"decoder": decoder, "lora": lora, "offload": offload, "device": device, "dtype": dtype}
    pipe = load(model, texts, negative, {**parts, "text_bits": text_bits})
    unread = {"--negative": negative, "--text-encoder": text_encoder, "--text-bits": text_bits}
    requests = make_requests(pipe, texts, labels, count, seed, unread)
    chosen = {"sampler": sampler, "guidance": guidance, "eta": eta, "batch": batch, "fps": fps}
    chosen |= {"order": order, "guidance_interval": read_interval(guidance_interval), "cache": cache}
    options = {"config": pipe.settings(quality, steps=read_steps(steps), **chosen), "frames": frames}
    options |= {"size": (frame_size := read_size(size)), "dtype": pipe.dtype, "window": window}
    options |= {"overlap": overlap, "longer": longer or "freenoise", "sequence_parallel": sequence_parallel}
    options["conditioning_frames"] = read_conditioning_frames(first, last, pipe.frame_size(frame_size))
    folder, sheet, gif = write(pipe, requests, out, negative, options)
    clips = [describe(request, folder) for request in requests]
    print_clips(pipe, clips, str(sheet), str(gif), as_json)


def print_clips(
    pipe: "VideoPipeline", clips: list[dict[str, Any]], sheet: str, gif: str, as_json: bool
) -> None:
    """Print the paths of all files, or the result as JSON."""
    result = {"clips": clips, "sheet": sheet, "gif": gif, "model": pipe.name, "weights_sha256": pipe.weights}
    print_result(result, as_json, [*(clip["path"] for clip in clips), sheet, gif])


def read_texts(argument: str, prompt: list[str] | None, file: Path | None) -> tuple[str, list[str]]:
    """Return (model, prompts) of the first argument, --prompt and --prompts.

    InputError for prompts beside a first argument that is one, and for those that no model can read.
    """
    from latte.inference.requests import check_prompt, read_prompts, split_prompt
    from latte.text.encoders import shorten

    model, sentence = split_prompt(argument)
    if sentence is None:
        texts = [check_prompt(text) for text in prompt or []]
        if file is not None:
            texts += read_prompts(file)
        return model, texts
    refuse(
        {"--prompt": prompt and repr(shorten(prompt[0])), "--prompts": file},
        f"was given beside the prompt {shorten(sentence)!r}; give one of the two, or all after the model: "
        "latte sample builtin --prompt TEXT --prompt TEXT",
    )
    return model, [sentence]


def check_before_loading(out: str | None, window: int | None, windowed: dict[str, Any]) -> None:
    """Raise InputError for options that are wrong whatever the model is."""
    from latte.inference.outputs import check_output_folder

    if out is not None:
        check_output_folder(out)
    if window is None:
        refuse(windowed, "needs --window, the latent frames that the model sees at a time")


def load(model: str, texts: list[str], negative: str, parts: dict[str, Any]) -> "VideoPipeline":
    """Return the pipeline, which has encoded the prompts before the denoiser takes its memory."""
    from latte.inference.pipeline import VideoPipeline
    from latte.inference.requests import check_text

    check_text(negative, "--negative")
    prompts = texts and [*texts, negative]
    return VideoPipeline.from_pretrained(model, prompts=prompts, **parts)


def make_requests(
    pipe: "VideoPipeline",
    texts: list[str],
    labels: str | None,
    count: int | None,
    seed: int,
    unread: dict[str, Any],
) -> "list[SampleRequest]":
    """Return one request per clip; InputError for options that this kind of model does not read."""
    from latte.inference.requests import class_requests, prompt_requests

    if pipe.reader:
        refuse(
            {"--labels": labels}, f"is for class models, but {pipe.name} reads text; give a prompt instead"
        )
    pipe.check_prompts(bool(texts))
    if pipe.reader:
        return prompt_requests(texts, count, seed)
    refuse(unread, f"is for text models, but {pipe.name} reads no text; leave it out")
    return class_requests(pipe, labels, count, seed)


def write(
    pipe: "VideoPipeline",
    requests: "list[SampleRequest]",
    out: str | None,
    negative: str,
    options: dict[str, Any],
) -> tuple[Path, Path, Path]:
    """Write the clips into ``out``, or by default into samples/NAME-HASH; return (folder, sheet, gif).

    Several processes share the batches, or ``options["sequence_parallel"]`` of them each clip.
    """
    from latte.distributed import command_group
    from latte.inference.outputs import clip_facts, default_folder
    from latte.model.sequence import share_sequence

    def progress(part: int, parts: int) -> Callable[[int, int], None]:
        return progress_line("sample", part, parts, count=len(requests) / parts)

    size = options["sequence_parallel"]
    check_shared(pipe, options)
    with command_group(pipe.device) as ranks:
        options["dtype"] = ranks.run_on_rank0(lambda: options["dtype"])  # fastest: measured by each
        facts = clip_facts(pipe, options, negative)
        folder = Path(out or default_folder(pipe, facts))
        team = share_sequence(pipe.model, ranks.teams(size))
        options |= {"ranks": ranks, "team": team, "progress": progress, "facts": facts}
        del options["sequence_parallel"]
        with ranks.computation():
            return folder, *pipe.write_clips(requests, folder, negative, **options)


def check_shared(pipe: "VideoPipeline", options: dict[str, Any]) -> None:
    """InputError for clips that the processes of --sequence-parallel cannot share."""
    from latte.inference.clip_shape import clip_shape
    from latte.model.compiled import is_compiled
    from latte.model.low_bit import KINDS
    from latte.model.sequence import check_sequence

    field = "--sequence-parallel"
    size = options["sequence_parallel"]
    shape = clip_shape(pipe.model, pipe.codec, *(options[name] for name in ("frames", "size", "window")))
    window = options["window"] or shape[0]
    check_sequence(pipe.model.config, size, field, (window, *shape[2:]))
    hidden = {"--compile": is_compiled(pipe.model), "--offload": pipe.offload is not None}
    hidden["--dtype int8 and fp8"] = options["dtype"] in KINDS
    for option, given in hidden.items():
        check(
            size == 1 or not given,
            f"{field} {size} divides the tokens of each clip, which {option} does not support; "
            "leave one of them out",
        )


def describe(request: "SampleRequest", folder: Path) -> dict[str, Any]:
    """Return what --json prints of a clip."""
    values = {"path": str(folder / request.file), "seed": request.seed}
    values |= {"label": request.word, "class": request.label}
    if request.prompt is not None:
        values["prompt"] = request.prompt
    return values


def refuse(options: dict[str, Any], why: str) -> None:
    """Raise InputError for the first of these options that was given."""
    for option, value in options.items():
        check(value is None or value == "", f"{option} {value} {why}")


def read_steps(text: str | None) -> int | str | None:
    """Return '50' as 50, and 'ddim50' as it is."""
    if text is not None and re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    return text


def read_interval(text: str | None) -> tuple[float, float] | None:
    """Return '0.3,5' as (0.3, 5.0); InputError for anything but two numbers."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise InputError(
            f"--guidance-interval {text!r} must be two noise levels LOW,HIGH, such as 0.3,5"
        ) from None
    return low, high


def read_size(text: str | None) -> tuple[int, int] | None:
    """Return '64' or '64x96' (height x width) as (64, 96); InputError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if not match:
        raise InputError(f"--size {text!r} must be a number of pixels or HEIGHTxWIDTH, e.g. 64 or 64x96")
    return int(match[1]), int(match[2] or match[1])
