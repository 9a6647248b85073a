# SPDX-License-Identifier: Apache-2.0
"""``latte data``: what is readable, what it looks like, encode it once, or draw a set.

SOURCE is a folder of videos, or whatever ``latte train`` takes, with the same overrides: then the clips are
those of the run.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latte.checks import printable
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

app = typer.Typer(cls=Group, help="List, look at, encode and draw clips.", no_args_is_help=True)

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A folder of videos, or a RUN.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Seed of the random choice.")]


def load_source(source: str, overrides: list[str] | None) -> tuple["RunConfig", dict[str, str]]:
    """A folder of videos is the default configuration with ``data.root``; anything else is a RUN."""
    from latte.config.run import RUN_FILE, load_run, recipes

    if source not in recipes() and Path(source).is_dir() and not (Path(source) / RUN_FILE).is_file():
        return load_run(None, [f"data.root={source}", *(overrides or [])])
    return load_run(source, overrides or [])


@app.command("scan", cls=Command, context_settings=OVERRIDABLE)
def scan_folder(
    source: Source,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Where the unusable files and their reasons are noted.")] = Path(
        "skipped.jsonl"
    ),
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the readable clips, and note the others with their reasons in skipped.jsonl.

    Clips too short for a run are refused when SOURCE is one, or when data.frames or data.interval are given.
    """
    from latte.config.run import DEFAULT
    from latte.data.skipped import check_folder, describe_clips, require_clips, scan, write_skipped

    configure_logging()
    config, origins = load_source(source, overrides)
    data = config.data
    ruled = any(origins[f"data.{key}"] != DEFAULT for key in ("frames", "interval", "rule", "fps"))
    found = scan(
        check_folder(data.root or ""),
        data.clip_rule if ruled else None,
        data.labels,
        progress=progress_line("scan", 0, 1),
    )
    if found.skipped:
        write_skipped(out, found.skipped)
    require_clips(found)
    names = list(found.classes)
    files = [
        {
            "path": clip.info.path,
            "frames": clip.info.frames,
            "height": clip.info.height,
            "width": clip.info.width,
            "fps": clip.info.fps,
            "class": None if clip.label is None else names[clip.label],
            "notes": list(clip.info.notes),
        }
        for clip in found.clips
    ]
    result = {"clips": len(files), "classes": names, "skipped": list(found.skipped), "files": files}
    result["ignored"] = found.ignored
    result["quarantined"] = result["skipped"]  # the key of 0.1.0, for one version
    see = [f"skipped files and their reasons: {printable(out)}"] if found.skipped else []
    print_result(result, as_json, [*describe_clips(found), *see])


@app.command("inspect", cls=Command, context_settings=OVERRIDABLE)
def inspect(
    source: Source,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, max=64, help="How many clips.")] = 8,
    out: Annotated[Path, typer.Option(help="The picture.")] = Path("clips.png"),
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a contact sheet of random clips just as training sees them: cropped, resized, maybe mirrored;
    latents are decoded.
    """
    from latte.autoencoder.codec import build_codec
    from latte.data.clips import to_uint8
    from latte.data.datasets import build_dataset
    from latte.data.loader import items_of_step
    from latte.data.media import contact_sheet
    from latte.runtime import generator, resolve_device

    configure_logging()
    config, _ = load_source(source, overrides)
    codec = build_codec(config.codec, resolve_device(device)) if config.data.kind == "latents" else None
    dataset = build_dataset(config.data, codec_fingerprint=codec.fingerprint if codec else None)
    items = items_of_step(seed, 0, min(count, len(dataset)), len(dataset))
    clips = [dataset.clip(item, generator(seed, "inspect", item)) for item in items]
    videos = [codec.decode(clip.video[None])[0] if codec else clip.video for clip in clips]
    captions = [
        clip.key
        + (f" ({dataset.classes[clip.label]})" if clip.label is not None else "")
        + (f": {clip.caption}" if clip.caption else "")
        for clip in clips
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet([to_uint8(video) for video in videos], captions=captions).save(out)
    print_result({"sheet": str(out), "clips": [clip.key for clip in clips]}, as_json, [str(out)])


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
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Pass a set through the autoencoder once; before that, its captions through the text encoder if the run
    has one.

    Train on it with data.kind=latents data.root=OUT. Run again to go on after a stop.
    """
    from latte.autoencoder.codec import build_codec
    from latte.data.encode import encode_dataset
    from latte.runtime import resolve_device
    from latte.text.encoders import build_text_encoder

    configure_logging()
    config, _ = load_source(source, overrides)
    where = resolve_device(device)
    folder = out or Path("latents") / (Path(source).stem or "data")
    text = build_text_encoder(config.text, where) if config.text.name else None
    result = encode_dataset(
        config.data,
        lambda: build_codec(config.codec, where),
        folder,
        dtype=shard_dtype,
        seed=seed,
        progress=progress_line("encode", 0, 1),
        text=text,
        caption_progress=progress_line("captions", 0, 1),
    )
    refused = len(result["skipped"])
    result["quarantined"] = result["skipped"]  # the key of 0.1.0, for one version
    lines = [
        f"{result['videos']} videos, {result['frames']} frames, {result['shards']} shards, "
        f"{result['bytes']:,} bytes; {refused} refused"
    ]
    if text:
        lines.append(
            f"{result['captions']} captions; {result['new_captions']} features are new (with that of the "
            "empty caption)"
        )
    print_result(result, as_json, [*lines, f"train on it with: data.kind=latents data.root={folder}"])


@app.command("synth", cls=Command)
def synth(
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The folder to fill: OUT/<direction>/<number>.mp4 and captions.csv."
        ),
    ],
    count: Annotated[int, typer.Option(min=1, help="How many clips.")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = 16,
    size: Annotated[int, typer.Option(min=8, help="Pixels of a side.")] = 64,
    fps: Annotated[float, typer.Option(min=1, max=240, help="Frames a second.")] = 8,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Draw moving shapes as a folder of videos by class (the direction), with captions."""
    import csv

    from latte.data.media import write_mp4
    from latte.data.procedural import DIRECTIONS, draw_scene, render

    configure_logging()
    progress, rows = progress_line("synth", 0, 1), []
    for index in range(count):
        scene = draw_scene(seed, index, frames)
        path = Path(scene.direction) / f"{index:05d}.mp4"
        write_mp4(out / path, render(scene, frames, size, size), fps)
        rows.append((path.as_posix(), scene.caption))
        progress(index + 1, count)
    with open(out / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "caption"), *rows])
    print_result(
        {"out": str(out), "clips": count, "classes": list(DIRECTIONS)}, as_json, [f"{count} clips in {out}"]
    )
