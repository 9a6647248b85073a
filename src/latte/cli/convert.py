# SPDX-License-Identifier: Apache-2.0
"""``latte convert``: checkpoints in and out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.checks import InputError
from latte.cli.options import Debug, Json, configure_logging, print_note, print_result

if TYPE_CHECKING:
    from latte.interop.coverage import Coverage
    from latte.interop.load import Source as ResolvedSource
    from latte.model.denoiser import Denoiser

CLIP_SIDE = 256  # pixels of the clip on a model card
CLIP_FRAMES = 32
SOURCES = "A weight file, a model's folder, a hub id (OWNER/NAME or OWNER/NAME/FILE), or a run folder."
DESTINATIONS = "A new folder; with --to official a new file, with --to hub OWNER/NAME."
Source = Annotated[str, typer.Argument(metavar="SRC", help=SOURCES, show_default=False)]
Destination = Annotated[str, typer.Argument(metavar="DST", help=DESTINATIONS, show_default=False)]
To = Annotated[str, typer.Option(metavar="NAME", help="Layout to write: {targets}.")]
CodecPath = Annotated[
    str | None,
    typer.Option("--codec", metavar="PATH", help="Folder or hub id of the autoencoder, if SRC has none."),
]
TextPath = Annotated[
    str | None,
    typer.Option("--text-encoder", metavar="PATH", help="With --to pipeline: folder or hub id of the T5."),
]
Licence = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Licence of the weights, for the model card, e.g. cc-by-4.0."),
]
Data = Annotated[str | None, typer.Option(metavar="TEXT", help="Training data, for the model card.")]
Clip = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A clip of the model for the model card; of a run its newest sample."),
]
Scores = Annotated[
    list[Path] | None,
    typer.Option("--score", metavar="FILE", help="A manifest.json of latte evaluate, for the model card."),
]
Lora = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Adapters (LoRA) to merge into the weights first.")
]
Heads = Annotated[int | None, typer.Option(help="Attention heads, for widths other than those of Table 4.")]
Missing = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Tensors (our names) that may be missing, e.g. 'time_blocks.*'."),
]
Unexpected = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Tensors of the file that may be left over.")
]

Merge = Annotated[
    bool,
    typer.Option(
        "--merge", help="Only join the files that processes saved, tensor by tensor, whatever their size."
    ),
]


def convert(
    source: Source,
    destination: Destination,
    to: To = "latte",
    codec: CodecPath = None,
    text_encoder: TextPath = None,
    licence: Licence = None,
    data: Data = None,
    scores: Scores = None,
    clip: Clip = None,
    lora: Lora = None,
    heads: Heads = None,
    allow_missing: Missing = None,
    allow_unexpected: Unexpected = None,
    merge: Merge = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert weights from any known layout to another, with a report of every tensor."""
    from latte.checks import printable
    from latte.interop.export import export
    from latte.interop.load import resolve
    from latte.interop.lora import load_lora, lora_layers, merged

    configure_logging()
    check_options(destination, to, lora, text_encoder)
    about = card_facts(to, licence, data, scores or [], clip)
    found = resolve(source, "SRC")
    if merge:
        groups = merged_files(found, Path(destination))
        print_result({"out": destination, "groups": groups}, as_json, [printable(destination)])
        return
    if found.run is not None:
        model, report, facts = from_run(found)
        clip = clip or newest_sample(found.run)
    else:
        model, report, facts = from_weights(source, heads, allow_missing or [], allow_unexpected or [])
    if lora is not None:
        facts["classes"] = load_lora(model, lora, facts.get("classes") or ())["classes"]
    if to != "lora" and lora_layers(model):
        model = merged(model)
    check_distilled(facts, to)
    if codec is not None:
        facts["codec"] = {**facts["codec"], "name": codec_name(codec, facts["codec"]["name"]), "path": codec}
    if text_encoder is not None:
        facts["text"] = {"name": "t5", **(facts.get("text") or {}), "path": text_encoder}
    if about:
        facts["about"] = {**facts.get("about", {}), **about}
    if clip is not None and to in ("latte", "hub"):
        facts["clip"] = small_picture(clip)
    export(model, destination, to, facts)
    if to in ("latte", "hub"):
        for part in ("codec", "text"):
            note_left_out(facts.get(part) or {}, {"codec": "--codec-path", "text": "--text-encoder"}[part])
    lists = ("layout", "used", "missing", "unexpected", "mismatched", "dropped")
    result = {"out": destination, **{key: getattr(report, key) for key in lists}}
    print_result(result, as_json, [str(report), printable(destination)])


def check_options(destination: str, to: str, lora: Path | None, text_encoder: str | None) -> None:
    """Raise InputError for an unknown layout, a taken destination, and options without effect in this
    layout.
    """
    from latte.checks import check, choose
    from latte.interop.export import TARGETS, check_place

    choose("--to", to, TARGETS)
    check_place(destination)
    check(
        lora is None or to != "lora",
        f"--lora {lora} merges adapters, but --to lora exports them; use one of the two",
    )
    check(
        text_encoder is None or to == "pipeline",
        f"--text-encoder {text_encoder} is for --to pipeline; remove it or use --to pipeline",
    )


def merged_files(source: "ResolvedSource", destination: Path) -> list[str]:
    """Write a checkpoint of a run, the newest one of a run folder, to ``destination`` with one file per
    group; return the groups. InputError for anything else.
    """
    from latte.checkpoint.run import latest_checkpoint, merge_checkpoint
    from latte.checks import check

    check(source.run is not None, f"SRC is {source.path}, but --merge is for runs and their checkpoints")
    path = source.path
    if path.parent.name != "checkpoints":
        path = latest_checkpoint(path)
    check(path is not None, f"{source.path} has no checkpoint yet, so there is nothing to merge")
    return merge_checkpoint(path, destination)


def check_distilled(facts: dict[str, Any], to: str) -> None:
    """Raise InputError for a student in a layout that cannot record how it must be sampled."""
    from latte.checks import check

    steps = facts.get("distilled", {}).get("steps")
    check(
        steps is None or to in ("latte", "hub"),
        f"--to {to} cannot record that the model was distilled to {steps} steps; use --to latte or hub",
    )


def small_picture(clip: Path) -> bytes:
    """Return a clip (mp4 or gif) as a WebP that plays, with few and small frames; InputError for no clip."""
    import base64

    from latte.data.clips import shrink
    from latte.data.media import Unreadable, probe, read_frames
    from latte.page.html import animation

    try:
        info = probe(clip)
        step = -(-info.frames // CLIP_FRAMES)
        frames = read_frames(info, range(0, info.frames, step))  # (t h w c)
    except Unreadable as error:
        raise InputError(f"--clip {clip} cannot be read ({error.reason}); give an mp4 or gif") from None
    uri = animation(shrink(frames, CLIP_SIDE), (info.fps or 8) / step)
    return base64.b64decode(uri.partition(",")[2])


def note_left_out(part: dict[str, Any], option: str) -> None:
    """Print how the weights of a codec or text encoder are given, of which only a path of this machine is
    known.
    """
    from latte.checks import command_line
    from latte.interop.export import public

    path = part.get("path")
    if path and "path" not in public(part):
        words = command_line("sample", "FOLDER", option, path)
        print_note(f"{part.get('name')} is not part of the folder, nor is its path; sample with: {words}")


def newest_sample(run: Path) -> Path | None:
    """Return the newest clip among the samples of a run; None where it has none."""
    clips = sorted((run / "samples").glob("step-*/*.mp4"), key=lambda path: (path.stat().st_mtime, path.name))
    return clips[-1] if clips else None


def card_facts(
    to: str, licence: str | None, data: str | None, scores: list[Path], clip: Path | None
) -> dict[str, Any]:
    """Return what the options add to the model card; InputError for a layout without one."""
    from latte.checks import check
    from latte.evaluation.manifest import read_report
    from latte.interop.export import score_of

    about = {"licence": licence, "data": data, "scores": [score_of(read_report(path)) for path in scores]}
    given = {key: value for key, value in about.items() if value}
    check(
        clip is None or clip.is_file(),
        f"--clip {clip} is no file; give a clip that the model generated, e.g. an mp4 of latte sample",
    )
    check(
        not (given or clip) or to in ("latte", "hub"),
        f"--to {to} writes no model card, so --licence, --data, --score and --clip have no effect; "
        "remove them or use --to latte",
    )
    return given


def codec_name(path: str, name: str) -> str:
    """Return the name of the codec at ``path``, if ``name`` is one of Stable Diffusion's; else ``name``."""
    from latte.autoencoder.codec import kind_at

    return kind_at(path).name if name.startswith("kl") else name


def from_weights(
    source: str, heads: int | None, missing: list[str], unexpected: list[str]
) -> "tuple[Denoiser, Coverage, dict[str, Any]]":
    """Return model, report and facts of an external checkpoint or a weights folder."""
    from latte.inference.stored import open_external

    loaded, facts = open_external(source, heads, missing, unexpected)
    return loaded.model(), loaded.report, facts


def from_run(source: "ResolvedSource") -> "tuple[Denoiser, Coverage, dict[str, Any]]":
    """Return model (EMA weights, adapters not merged), report and facts of a run or of its checkpoint."""
    from latte.inference.run_folder import run_facts

    return run_facts(source.path)
