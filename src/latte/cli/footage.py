# SPDX-License-Identifier: Apache-2.0
"""``latte data split`` and ``latte data caption``: from long videos to clips with captions."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from latte.checks import printable
from latte.cli.options import Debug, Device, Json, configure_logging, print_result, progress_line

SHOWN = 5  # skipped files in the summary; all are in the manifest


def split(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A video, or a folder of videos.")],
    out: Annotated[Path, typer.Option(help="The folder of clips, with split.json, which lists them.")],
    min_seconds: Annotated[float, typer.Option(metavar="S", help="Shorter pieces are dropped.")] = 1.0,
    max_seconds: Annotated[
        float | None,
        typer.Option(metavar="S", help="Longer pieces are cut into even parts.", show_default=False),
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="X", help="How large a change is a cut: below 1 finds more of them.")
    ] = 1.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut long videos at changes of scene into clips, without encoding them again where that is possible.

    Frames of dissolves and fades are left out. Run it again to continue after an interruption.
    """
    from latte.data.footage import MANIFEST, SplitConfig, split_footage

    configure_logging()
    config = SplitConfig(min_seconds, max_seconds, threshold)
    record = split_footage(source, out, config, progress_line("split", 0, 1, "videos"))
    result = split_result(record, out)
    lines = [
        f"{result['videos']} videos, {result['clips']} clips ({result['copied']} copied, "
        f"{result['encoded']} encoded), {result['dropped']} pieces shorter than {min_seconds:g} s dropped"
    ]
    rules = ", ".join(f"{count} {rule}" for rule, count in result["rules"].items())
    lines.append(f"clips begin at: {rules or 'nothing'}; the list is {printable(out / MANIFEST)}")
    lines += skipped_lines(record["skipped"])
    print_result(result, as_json, lines)
    if not result["videos"]:
        raise typer.Exit(1)


def split_result(record: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return the result of ``latte data split`` as plain data."""
    sources = record["sources"].values()
    clips = [clip for source in sources for clip in source["clips"]]
    written = Counter(clip["written"] for clip in clips)
    return {
        "out": str(out),
        "videos": len(sources),
        "clips": len(clips),
        "copied": written["copied"],
        "encoded": written["encoded"],
        "dropped": sum(len(source["dropped"]) for source in sources),
        "rules": dict(Counter(clip["rule"] for clip in clips)),
        "skipped": [{"path": key, "reason": reason} for key, reason in record["skipped"].items()],
    }


def caption(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder of videos.")],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="An image captioning model: a hub id or a folder.")
    ],
    frames: Annotated[int, typer.Option(help="Frames of each video that the model describes.")] = 1,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The words that a caption begins with.")] = "",
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longest caption in tokens.")] = 40,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace captions that are there.")] = False,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the missing captions of a folder of videos with a captioning model (extra t2v).

    The model sees the middle frame, or several frames of which the most frequent caption counts. Run it again
    to continue after an interruption.
    """
    from latte.data.captioner import Captioner, caption_folder
    from latte.data.skipped import check_folder
    from latte.runtime import resolve_device

    configure_logging()
    check_folder(folder, "DIR")
    describe = Captioner(model, resolve_device(device), max_tokens, prompt)
    num_frames = describe.frames or frames
    about = {"model": model, "frames": num_frames, "prompt": prompt, "max_tokens": max_tokens}
    result = caption_folder(
        folder, describe, about, num_frames, overwrite, progress_line("caption", 0, 1, "videos")
    )
    skipped = {bad["path"]: bad["reason"] for bad in result["skipped"]}
    counts = f"{result['clips']} videos, {result['captioned']} captions written, {result['kept']} kept"
    print_result(result, as_json, [counts, *skipped_lines(skipped)])
    if skipped and not (result["captioned"] or result["kept"]):
        raise typer.Exit(1)


def skipped_lines(skipped: dict[str, str]) -> list[str]:
    """Return the number of skipped files and the first of them with their reasons; nothing without any."""
    if not skipped:
        return []
    lines = [f"skipped: {printable(name)} ({reason})" for name, reason in list(skipped.items())[:SHOWN]]
    return [f"{len(skipped)} skipped", *lines]
