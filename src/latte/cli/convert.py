# SPDX-License-Identifier: Apache-2.0
"""``latte convert``: checkpoints in and out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.cli.options import Debug, Json, configure_logging, print_result

if TYPE_CHECKING:
    from latte.interop.coverage import Coverage
    from latte.interop.export import Model

SOURCES = "A weight file, a model's folder, a hub id (OWNER/NAME or OWNER/NAME/FILE), or a run folder."
Source = Annotated[str, typer.Argument(metavar="SRC", help=SOURCES, show_default=False)]
Place = Annotated[
    Path,
    typer.Argument(
        metavar="DST",
        help="A new folder, with --to official a file, with --to hub OWNER/NAME.",
        show_default=False,
    ),
]
To = Annotated[str, typer.Option(metavar="NAME", help="Layout to write: {targets}.")]
CodecPath = Annotated[
    str | None,
    typer.Option(
        "--codec", metavar="PATH", help="The autoencoder's folder or hub id, where SRC does not say."
    ),
]
TextPath = Annotated[
    str | None,
    typer.Option("--text-encoder", metavar="PATH", help="With --to pipeline: folder or hub id of the T5."),
]
Licence = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Licence of the weights, for the model card, e.g. cc-by-4.0."),
]
Data = Annotated[str | None, typer.Option(metavar="TEXT", help="What it was trained on, for the model card.")]
Scores = Annotated[
    list[Path] | None,
    typer.Option("--score", metavar="FILE", help="A manifest.json of latte evaluate, for the card."),
]
Lora = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Adapters (LoRA) to fold into the weights first.")
]
Heads = Annotated[int | None, typer.Option(help="Attention heads, for widths other than those of Table 4.")]
Missing = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Our names that may be missing, e.g. 'time_blocks.*'."),
]
Unexpected = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="The file's names that may be left over.")
]


def convert(
    source: Source,
    place: Place,
    to: To = "latte",
    codec: CodecPath = None,
    text_encoder: TextPath = None,
    licence: Licence = None,
    data: Data = None,
    scores: Scores = None,
    lora: Lora = None,
    heads: Heads = None,
    allow_missing: Missing = None,
    allow_unexpected: Unexpected = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert weights from any known layout to another, with a report of every tensor. Nothing in a file is ever run."""
    from latte.checks import choose, require
    from latte.config.run import RUN_FILE
    from latte.evaluation.manifest import read_report
    from latte.interop.export import TARGETS, check_place, export, score_of
    from latte.interop.lora import folded, load_lora, lora_layers

    configure_logging()
    choose("--to", to, TARGETS)
    check_place(place)
    if (Path(source) / RUN_FILE).is_file():
        model, report, facts = from_run(Path(source))
    else:
        model, report, facts = from_weights(source, heads, allow_missing or [], allow_unexpected or [])
    if lora is not None:
        require(
            to != "lora",
            "--lora",
            str(lora),
            "with --to lora the adapters are what goes out",
            "leave one of the two out",
        )
        facts["classes"] = load_lora(model, lora, facts.get("classes") or ())["classes"]
    model = folded(model) if to != "lora" and lora_layers(model) else model
    if codec is not None:
        facts["codec"] = {**facts["codec"], "name": name_at(codec, facts["codec"]["name"]), "path": codec}
    if text_encoder is not None:
        require(
            to == "pipeline",
            "--text-encoder",
            text_encoder,
            "nothing but a pipeline has one in it",
            "leave it out, or give --to pipeline",
        )
        facts["text"] = {"name": "t5", **(facts.get("text") or {}), "path": text_encoder}
    told = {
        "licence": licence,
        "data": data,
        "scores": [score_of(read_report(path)) for path in scores or ()],
    }
    if any(told.values()):
        facts["about"] = {**facts.get("about", {}), **{key: value for key, value in told.items() if value}}
    carded = to in ("latte", "hub") or not any(told.values())
    require(carded, "--to", to, "a model card is written in our own layout alone", "leave them out")
    export(model, place, to, facts)
    result = {
        "out": str(place),
        "layout": report.layout,
        "used": report.used,
        "missing": report.missing,
        "unexpected": report.unexpected,
        "mismatched": report.mismatched,
        "dropped": report.dropped,
    }
    print_result(result, as_json, [str(report), str(place)])


def name_at(path: str, name: str) -> str:
    """The codec's name, by what lies at ``path`` if the name is one of Stable Diffusion's."""
    from latte.autoencoder.codec import kind_at

    return kind_at(path).name if name.startswith("kl") else name


def from_weights(
    source: str, heads: int | None, missing: list[str], unexpected: list[str]
) -> "tuple[Model, Coverage, dict[str, Any]]":
    """Foreign weights, or a folder of ours, with what our own folder says beside the model's keys."""
    from latte.inference.external import open_foreign

    loaded, facts = open_foreign(source, heads, missing, unexpected)
    return loaded.model(), loaded.report, facts


def from_run(folder: Path) -> "tuple[Model, Coverage, dict[str, Any]]":
    """The averaged weights of a run's newest checkpoint; of a run of adapters the model with these in it."""
    from dataclasses import asdict

    from latte.checkpoint.run import load_latest
    from latte.config.run import load_run
    from latte.inference.run_folder import about_run, run_model, trained_run
    from latte.interop.coverage import Coverage

    config, _ = load_run(folder)
    checkpoint = trained_run(folder, config, load_latest(folder, only={"ema"}))
    model = run_model(config, checkpoint)
    report = Coverage(str(folder), f"run, step {checkpoint.step}", list(checkpoint.tensors["ema"]), [], [])
    known = checkpoint.state["facts"]
    facts = {
        "diffusion": asdict(config.diffusion),
        "classes": known.get("classes", []),
        "sample": asdict(config.sample),
        "codec": {"name": config.codec.name, "path": config.codec.path, "fingerprint": known.get("codec")},
        "about": about_run(config, checkpoint),
    }
    if config.text.name:
        facts["text"] = {**asdict(config.text), "fingerprint": known["text"]["encoder"]}
    return model, report, facts
