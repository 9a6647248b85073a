# SPDX-License-Identifier: Apache-2.0
"""``latte data``: list what can be used, look at it, encode it once, or generate a procedural set.

SOURCE is a folder of videos or of latents, or whatever ``latte train`` takes, with the same overrides: then
the clips are those of the run.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.checks import printable
from latte.cli import footage
from latte.cli.options import (
    OVERRIDABLE,
    Command,
    Debug,
    Device,
    Group,
    Json,
    Overrides,
    configure_logging,
    print_result,
    progress_line,
)

if TYPE_CHECKING:
    from latte.config.run import RunConfig

SHOWN = 5  # skipped videos in the summary of ``encode``; all are in the manifest
MAX_CLIPS = 100_000  # that ``synth`` writes; training generates any number without files
MAX_CLIP_BYTES = 1 << 30  # of the frames of one clip
app = typer.Typer(cls=Group, help="List, inspect, encode and generate clips.", no_args_is_help=True)

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A folder of videos or latents, or a RUN.", show_default=False)
]
PageFile = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Write a page with previews of the clips; one file.")
]
SkippedFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE.jsonl", help="Write the list of the skipped files and the reasons."),
]
Seed = Annotated[int, typer.Option(help="Seed of the random choice.")]


def load_source(source: str, overrides: list[str] | None) -> tuple["RunConfig", dict[str, str]]:
    """Load the configuration of SOURCE.

    A folder of videos or latents is the default configuration with its ``data.root``; latents set what they
    were encoded with, too. Anything else is a RUN.
    """
    from latte.config.run import RUN_FILE, load_run, recipes
    from latte.data.shards import is_encoded, read_manifest

    folder = Path(source)
    check_source(folder, recipes())
    if source in recipes() or not folder.is_dir() or (folder / RUN_FILE).is_file():
        return load_run(source, overrides or [])
    words = [f"data.root={source}"]
    if is_encoded(folder):
        settings = read_manifest(folder)["settings"]
        height, width = settings["resolution"]
        words += [
            "data.kind=latents",
            f"data.resolution=[{height},{width}]",
            f"codec.name={settings['codec']['name']}",
        ]
        for key, value in settings.get("windows", {}).items():
            if key != "stride" and value is not None:
                words.append(f"data.{key}={value}")
    return load_run(None, [*words, *(overrides or [])])


def check_source(source: Path, recipes: Iterable[str]) -> None:
    """InputError unless SOURCE is a folder, a YAML file or one of the recipes."""
    from latte.checks import InputError, nearest

    shown = printable(source)
    if str(source) in recipes or source.is_dir():
        return
    if source.is_file():
        if source.suffix.lower() in (".yaml", ".yml"):
            return
        raise InputError(f"SOURCE is {shown}, which is a file; give the folder that holds the videos")
    beside = [path.name for path in source.parent.iterdir()] if source.parent.is_dir() else []
    raise InputError(
        f"SOURCE is {shown}, but there is no such folder, YAML file or recipe"
        f"{nearest(source.name, [*beside, *recipes])}"
    )


@app.command("scan", cls=Command, context_settings=OVERRIDABLE)
def scan_folder(
    source: Source,
    overrides: Overrides = None,
    page: PageFile = None,
    out: SkippedFile = None,
    files: Annotated[bool, typer.Option("--files", help="Print a line for each file, too.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Summarise the clips of a folder: sizes, rates, lengths, classes, captions, duplicates, what is skipped
    and why. Nothing is written unless --page or --out is given.

    Clips too short for a run are skipped when SOURCE is one, or when data.frames, data.interval or
    data.buckets are given; with buckets it also shows how many clips each has and what is cropped.
    """
    from latte.checks import check
    from latte.config.run import DEFAULT
    from latte.data.skipped import file_lines, require_clips, write_skipped
    from latte.data.summary import lines_of, page_of, scan_latent_folder, scan_result, scan_videos, summarise
    from latte.files import commit_file, reported

    configure_logging(quiet=True)  # what a scan logs stands in the summary
    check_page(page)
    config, origins = load_source(source, overrides)
    check(
        config.data.mix is None,
        "data.mix is given, but a scan is of one folder; scan each by itself (latte data scan A), and see "
        "latte plan for the clips and the share of every set",
    )
    keys = ("frames", "interval", "rule", "fps", "buckets")
    ruled = any(origins[f"data.{key}"] != DEFAULT for key in keys)
    if config.data.kind == "latents":
        found, extra, lines, captions = scan_latent_folder(config.data, ruled)
    else:
        progress = progress_line("scan", 0, 1, "files")
        global_batch = config.train.global_batch
        found, extra, lines, captions = scan_videos(
            config.data, config.buckets, global_batch, ruled, progress
        )
    if out and found.skipped:
        with reported("the list of skipped videos", out):
            write_skipped(out, found.skipped)
    require_clips(found)
    summary = summarise(found, captions)
    result = {**scan_result(found, summary), **extra}
    lines = [*(file_lines(found) if files else ()), *lines_of(found, summary), *lines]
    if result["empty_classes"]:
        lines.append(f"no usable clip in class {', '.join(result['empty_classes'])}")
    if out and found.skipped:
        lines.append(f"skipped files and their reasons: {printable(out)}")
    if page:
        with reported("the page", page):
            page.parent.mkdir(parents=True, exist_ok=True)
            commit_file(page, page_of(found, summary, f"Clips of {printable(Path(found.root).name)}"))
        result["page"] = str(page)
        lines.append(f"see: {page}")
    print_result(result, as_json, lines)


def check_page(page: Path | None) -> None:
    """InputError unless ``page`` is None or can be the file of a page."""
    from latte.checks import check

    check(
        page is None or page.suffix.lower() in (".html", ".htm"),
        f"--page is {printable(page or '')}, which is no .html file; give e.g. --page clips.html",
    )
    check(
        page is None or not page.is_dir(),
        f"--page is {printable(page or '')}, which is a folder; give a file in it, e.g. clips.html",
    )


@app.command("inspect", cls=Command, context_settings=OVERRIDABLE)
def inspect(
    source: Source,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="Number of clips.")] = 8,
    out: Annotated[Path, typer.Option(help="Image file of the contact sheet.")] = Path("clips.png"),
    decoded: Annotated[
        bool, typer.Option("--decoded", help="Encode and decode the clips first, with the run's codec.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a contact sheet of random clips as training sees them: cropped, resized, maybe flipped.

    Latents are decoded. With buckets the clips are from each in turn.
    """
    from latte.autoencoder.codec import build_codec
    from latte.data.clips import to_uint8
    from latte.data.datasets import build_dataset
    from latte.data.media import contact_sheet
    from latte.data.order import random_items
    from latte.files import commit_file, reported
    from latte.inference.sheets import data_caption, shown
    from latte.runtime import generator, resolve_device

    configure_logging()
    config, _ = load_source(source, overrides)
    check_image(out)
    codec = None
    fingerprint = None
    latents = config.data.kind == "latents"
    if latents or decoded:
        codec = build_codec(config.codec, resolve_device(device))
    if codec and latents:
        fingerprint = codec.fingerprint
    dataset = build_dataset(config.data, codec_fingerprint=fingerprint, buckets=config.buckets)
    items = random_items(dataset, seed, count)
    clips = [dataset.clip(item, generator(seed, "inspect", item)) for item in items]
    videos = [shown(clip.video, codec, latents) for clip in clips]  # (f 3 H W)
    captions = [data_caption(clip, dataset) for clip in clips]
    sheet = contact_sheet([to_uint8(video) for video in videos], captions=captions)
    with reported("the contact sheet", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        commit_file(out, lambda temporary: sheet.save(temporary, format=image_format(out)))
    result: dict[str, Any] = {"sheet": str(out), "clips": [clip.key for clip in clips]}
    lines = [str(out)]
    if latents:
        result |= {"frames": len(videos[0]), "latent_frames": len(clips[0].video)}
        lines.append(f"{len(videos[0])} frames of video per clip, {len(clips[0].video)} latent frames")
    print_result(result, as_json, lines)


def image_format(path: Path) -> str | None:
    """Return the name of the image format that the suffix of ``path`` stands for, None for an unknown one."""
    from PIL import Image

    return Image.registered_extensions().get(path.suffix.lower())


def check_image(path: Path) -> None:
    """InputError unless ``path`` can be the file of an image."""
    from latte.checks import check

    check(
        image_format(path) is not None,
        f"--out is {printable(path)}, whose suffix names no image format; give e.g. clips.png",
    )
    check(not path.is_dir(), f"--out is {printable(path)}, which is a folder; give a file, e.g. clips.png")


@app.command("encode", cls=Command, context_settings=OVERRIDABLE)
def encode(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of shards; latents/SOURCE by default.", show_default=False)
    ] = None,
    shard_dtype: Annotated[
        str, typer.Option(metavar="NAME", help="How latents are stored: {latent_dtypes}.")
    ] = "float16",
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Source frames from one window to the next, for a codec that compresses time; one window's "
            "length by default.",
        ),
    ] = None,
    crops: Annotated[int, typer.Option(help="Crops of a video; training draws one of them.")] = 1,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror images, too (data.flip=true).")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Encode a dataset once with the autoencoder, and its captions with the text encoder if the run has one.

    Train on it with data.kind=latents data.root=OUT. Run again to continue after an interruption. Every frame
    is encoded. A codec that compresses time encodes windows of data.frames frames instead, chosen by
    data.interval, data.rule and data.fps.
    """
    from latte.autoencoder.codec import build_codec
    from latte.data.encode import encode_dataset
    from latte.distributed import command_group
    from latte.runtime import resolve_device
    from latte.text.encoders import build_text_encoder

    configure_logging()
    words = [*(overrides or []), *(["data.flip=true"] if flip else [])]
    config, _ = load_source(source, words)
    where = resolve_device(device)
    folder = out or Path("latents") / (Path(source).stem or "data")
    text = build_text_encoder(config.text, where) if config.text.name else None
    options = {"dtype": shard_dtype, "seed": seed, "stride": stride, "text": text, "crops": crops}
    with command_group(where) as ranks:
        result = encode_dataset(
            config.data,
            lambda: build_codec(config.codec, where),
            folder,
            progress=progress_line("encode", 0, 1),
            caption_progress=progress_line("captions", 0, 1, "captions"),
            scan_progress=progress_line("scan", 0, 1, "files"),
            ranks=ranks,
            **options,
        )
    result["quarantined"] = result["skipped"]  # the key of 0.1.0, for one version
    lines = encode_lines(result, config.data.frames, text is not None)
    print_result(result, as_json, [*lines, f"train on it with: {train_words(folder)}"])


def encode_lines(result: dict[str, Any], frames: int, captioned: bool) -> list[str]:
    """Return what was encoded and what was not, for people; ``frames`` are those of a window."""
    counted = f"{result['frames']} frames"
    if result["windows"]:
        counted += (
            f", {result['windows']} windows of {frames} frames, {result['latent_frames']} latent frames"
        )
    lines = [
        f"{result['videos']} videos, {counted}, {result['shards']} shards, {result['bytes']:,} bytes; "
        f"{len(result['skipped'])} videos skipped"
    ]
    lines += [f"skipped: {printable(bad['path'])} ({bad['reason']})" for bad in result["skipped"][:SHOWN]]
    if captioned:
        lines.append(
            f"{result['captions']} captions; {result['new_captions']} features are new (the empty one "
            "included)"
        )
    return lines


def train_words(folder: Path) -> str:
    """Return the overrides that train on the latents in ``folder``, quoted for a shell."""
    from latte.checks import command_line

    return command_line("data.kind=latents", f"data.root={folder}").removeprefix("latte ")


@app.command("synth", cls=Command)
def synth(
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder to fill: OUT/<class>/<number>.mp4 and captions.csv."),
    ],
    count: Annotated[int, typer.Option(min=1, help="Number of clips.")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Frames per clip.")] = 16,
    size: Annotated[int, typer.Option(min=8, help="Side of the frames in pixels.")] = 64,
    fps: Annotated[float, typer.Option(min=1, max=240, help="Frames per second.")] = 8,
    scenes: Annotated[str, typer.Option(metavar="NAME", help="What the clips show: {scenes}.")] = "shapes",
    language: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Captions of --scenes world: en, zh or mixed. [default: en]"),
    ] = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write procedural clips as videos, with a folder per class and captions."""
    import csv
    import io

    from latte.checks import check
    from latte.data.base import DataConfig
    from latte.data.media import write_mp4
    from latte.files import commit_file, reported

    configure_logging()
    check(not out.is_file(), f"OUT is {printable(out)}, which is a file; give a folder")
    check(
        count <= MAX_CLIPS,
        f"--count must be at most {MAX_CLIPS:,}, got {count:,}; data.kind=procedural trains on any number "
        "without files",
    )
    clip_bytes = frames * size * size * 3
    check(
        clip_bytes <= MAX_CLIP_BYTES,
        f"{frames} frames of {size} x {size} take {clip_bytes:,} bytes, more than {MAX_CLIP_BYTES:,}; "
        "give fewer --frames or a smaller --size",
    )
    config = DataConfig(
        "procedural", resolution=size, frames=frames, seed=seed, scenes=scenes, language=language
    )
    clips = config.scene_set
    progress = progress_line("synth", 0, 1)
    table = io.StringIO(newline="")
    captions = csv.writer(table)
    captions.writerow(("path", "caption"))
    with reported("the clips", out):
        for index in range(count):
            path = Path(clips.classes[clips.label(index)]) / f"{index:05d}.mp4"
            write_mp4(out / path, clips.render_clip(index), fps)
            captions.writerow((path.as_posix(), clips.caption(index)))
            progress(index + 1, count)
        commit_file(out / "captions.csv", table.getvalue())
    result = {"out": str(out), "clips": count, "classes": list(clips.classes)}
    print_result(result, as_json, [f"{count} clips in {out}"])


app.command("split", cls=Command)(footage.split)
app.command("caption", cls=Command)(footage.caption)
