# SPDX-License-Identifier: Apache-2.0
"""``latte evaluate``: a score with its protocol, interval, floor and manifest; and the same score again from the manifest."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latte.checks import InputError
from latte.cli.options import Debug, Device, Json, configure_logging, print_result, progress_line, table

if TYPE_CHECKING:
    from latte.evaluation.evaluate import EvaluateConfig
    from latte.evaluation.sources import Side
    from latte.inference.outputs import SampleRequest

SAMPLES, PROBES = "samples", "probes"
Folder = "A folder of videos or of frame folders, or latent shards"
File = "or, with --protocol external, a file of features"
Model = "or a model (a run folder, builtin)"
Real = Annotated[str | None, typer.Argument(metavar="[REAL]", help=f"{Folder}, {File}.", show_default=False)]
Fake = Annotated[
    str | None, typer.Argument(metavar="[FAKE]", help=f"{Folder}, {Model}, {File}.", show_default=False)
]
Protocol = Annotated[str, typer.Option(metavar="NAME", help="How to measure: {protocols}.")]
Seed = Annotated[int, typer.Option(help="Decides clips and starts, together with each video's name.")]
Clips = Annotated[
    int | None, typer.Option(help="Clips of each side; other than the protocol's makes it non-standard.")
]
Fewer = Annotated[
    bool,
    typer.Option(
        "--allow-fewer", help="Take as many clips as both sides have; makes the protocol non-standard."
    ),
]
Mixed = Annotated[
    bool, typer.Option("--allow-mixed", help="Measure sides of different codecs or frame rates.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder; evaluations/FAKE-PROTOCOL by default. Features that are there already are kept."
    ),
]
Until = Annotated[str, typer.Option(metavar="STAGE", help="plan, extract or score: where to end.")]
Processes = Annotated[int, typer.Option(help="Processes that extract; any number gives the same bits.")]
Group = Annotated[int, typer.Option(help="Rows that go through the network at once (8 or more on a GPU).")]
Weights = Annotated[
    str | None, typer.Option("--detector", metavar="PATH", help="The detector's file of weights.")
]
Sha = Annotated[
    str | None, typer.Option("--detector-sha256", help="Vouches for a file of weights that no table knows.")
]
CodecPath = Annotated[
    str | None, typer.Option(help="The autoencoder's weights, for latent shards or when they have moved.")
]
SampleSeed = Annotated[
    int, typer.Option(help="Seed of the first clip when FAKE is a model; the others count on.")
]
Split = Annotated[str | None, typer.Option(help="Split of the data, for the manifest.")]
Version = Annotated[str | None, typer.Option("--data-version", help="Version of the data, for the manifest.")]
Compare = Annotated[Path | None, typer.Option(metavar="FILE", help="Another manifest.json, to compare with.")]
From = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Evaluate again what this manifest.json says.")
]


def evaluate(
    real: Real = None,
    fake: Fake = None,
    protocol: Protocol = "clean",
    seed: Seed = 0,
    clips: Clips = None,
    allow_fewer: Fewer = False,
    allow_mixed: Mixed = False,
    out: Out = None,
    until: Until = "score",
    processes: Processes = 1,
    group: Group = 1,
    detector: Weights = None,
    detector_sha256: Sha = None,
    codec_path: CodecPath = None,
    sample_seed: SampleSeed = 0,
    split: Split = None,
    data_version: Version = None,
    compare: Compare = None,
    from_manifest: From = None,
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score FAKE against REAL: clips.jsonl, features, manifest.json and report.html in one folder."""
    from dataclasses import replace

    from latte.evaluation.evaluate import EvaluateConfig, check_replay
    from latte.evaluation.evaluate import evaluate as run
    from latte.evaluation.external import EXTERNAL, is_bank, score_files
    from latte.evaluation.manifest import compare as compare_with
    from latte.evaluation.manifest import read_report

    configure_logging()
    if protocol == EXTERNAL.name or is_bank(real) or is_bank(fake):
        about_videos = {
            "--from-manifest": from_manifest,
            "--compare": compare,
            "--clips": clips,
            "--detector": detector,
        }
        about_videos["--until"] = until != "score"
        check_external(real, fake, protocol, [name for name, value in about_videos.items() if value])
        result = score_files(
            str(real), str(fake), out or Path("evaluations") / f"{Path(str(fake)).stem}-{EXTERNAL.name}"
        )
        return print_result(result, as_json, lines(result))
    before = read_report(from_manifest) if from_manifest else None
    other = read_report(compare) if compare else None
    if before:
        past = before["replay"]
        config = replace(EvaluateConfig.of(past["config"], from_manifest), processes=processes, device=device)
        config = replace(config, detector=detector) if detector else config
        real, fake = real or past["real"], fake or past["model"] or past["fake"]
        codec_path, sample_seed = codec_path or past["codec_path"], past["sample_seed"]
    else:
        config = EvaluateConfig(
            protocol,
            seed,
            clips,
            allow_fewer,
            allow_mixed,
            detector,
            detector_sha256,
            group,
            device,
            processes,
            split,
            data_version,
        )
    if not real or not fake:
        raise InputError(
            "REAL or FAKE is missing; give two folders (latte evaluate REAL FAKE --protocol clean), or --from-manifest FILE"
        )
    out = out or Path("evaluations") / f"{Path(fake).resolve().name}-{config.protocol}"
    sides, generation, model = open_sides(real, fake, config, out, codec_path, sample_seed)
    replay = {"model": model, "sample_seed": sample_seed, "codec_path": codec_path}
    result = run(sides, config, out, until=until, generation=generation, replay=replay)
    if "value" in result:
        now = read_report(out / "manifest.json")
        if before:
            result["replayed"] = check_replay(before, now)
        if other:
            result["comparison"] = compare_with(now, other, str(compare))
    print_result(result, as_json, lines(result))


def check_external(real: str | None, fake: str | None, protocol: str, others: list[str]) -> None:
    """InputError unless both sides are files of features, the protocol says so, and nothing else is asked for."""
    from latte.evaluation.external import EXTERNAL, SUFFIXES, is_bank

    if not (is_bank(real) and is_bank(fake)):
        kinds = ", ".join(SUFFIXES)
        raise InputError(
            f"--protocol {EXTERNAL.name} compares two files of features ({kinds}), not {real} and {fake}; give both"
        )
    if protocol != EXTERNAL.name:
        raise InputError(
            f"{real} and {fake} are files of features, and --protocol {protocol} fixes how features are made; "
            f"give --protocol {EXTERNAL.name}"
        )
    if others:
        raise InputError(
            f"{', '.join(others)} is about videos; leave it out when REAL and FAKE are files of features"
        )


def open_sides(
    real: str, fake: str, config: "EvaluateConfig", out: Path, codec_path: str | None, seed: int
) -> tuple[dict[str, "Side"], dict[str, Any], str | None]:
    """Both sides, what is known of the fakes' making, and the model that FAKE is, if it is one: then it is sampled first."""
    from latte.evaluation.sources import album_facts, open_side
    from latte.runtime import resolve_device

    device, model = str(resolve_device(config.device)), fake if is_model(fake) else None
    if is_model(real):
        raise InputError(
            f"REAL is {real!r}, which is a model; give a folder of videos, frames or latent shards"
        )
    asked = config.asked
    sides, generation = {"real": open_side("real", real, out / PROBES, codec_path, device)}, {}
    if model:
        fake = str(out / SAMPLES)
        generation = sample_fakes(
            model, out / SAMPLES, asked.clips, common_rate(sides["real"]), seed, config.device, codec_path
        )
        model = str(Path(model).absolute()) if Path(model).exists() else model  # a replay may start elsewhere
    sides["fake"] = open_side("fake", fake, out / PROBES, codec_path, device)
    return sides, {**album_facts(fake), **generation}, model


def is_model(path: str) -> bool:
    """'builtin', a run folder, one of its checkpoints or a folder of weights?"""
    folder = Path(path)
    inside = (
        (folder / "checkpoints").is_dir()
        or folder.parent.name == "checkpoints"
        or (folder / "model.safetensors").is_file()
    )
    return (path == "builtin" and not folder.exists()) or (folder.is_dir() and inside)


def common_rate(side: "Side") -> float | None:
    """The most frequent frame rate of a side, which the generated files get too; None when no video has one."""
    rates = Counter(source.fps for source in side.sources if source.fps)
    return rates.most_common(1)[0][0] if rates else None


def sample_fakes(
    model: str, folder: Path, count: int, fps: float | None, seed: int, device: str, codec_path: str | None
) -> dict[str, Any]:
    """Make ``folder`` hold ``count`` clips of ``model``, classes in turn, drawing only those that are missing -> generation fields."""
    from dataclasses import asdict, replace

    from latte.cli.sample import wish
    from latte.inference.outputs import write_album
    from latte.inference.pipeline import load_trained

    trained = load_trained(model, device, codec_path)
    config = replace(trained.sample, fps=fps or trained.sample.fps)
    requests = wish(trained, None, count, seed)
    facts = {key: value for key, value in asdict(config).items() if key != "batch"}
    facts |= {"weights": trained.weights, "codec": trained.codec.fingerprint}
    batches = -(-count // config.batch)

    def draw(number: int, part: Sequence["SampleRequest"]) -> Iterator[tuple[int, Any]]:
        labels = [one.label for one in part if one.label is not None] or None
        progress = progress_line("sample", number, batches)
        return trained.generate([one.seed for one in part], labels, config=config, progress=progress)

    write_album(folder, requests, draw, facts, config.batch, config.fps)
    rule = "none" if trained.model.config.num_classes is None else "classes in turn"
    return {"step": step_of(Path(model)), "weights": "EMA", "class_rule": rule, "sampling_seed": seed}


def step_of(model: Path) -> int | None:
    """The training step of a run's last good checkpoint, or of a checkpoint; None for other weights, which do not say."""
    from latte.checkpoint.run import latest_checkpoint

    found = latest_checkpoint(model, only={"ema"}) if (model / "checkpoints").is_dir() else model
    match = re.fullmatch(r"step-(\d+)", found.name if found else "")
    return int(match[1]) if match else None


def lines(result: dict[str, Any]) -> list[str]:
    """For people: the figure with its protocol's name and manifest's hash, and what it is worth."""
    if "value" not in result:
        return [f"{key}: {value}" for key, value in result.items()]
    by = f"({result['protocol']}, manifest {result['manifest_hash']})"
    rows = [(f"{name} {by}", f"{value:.6g}") for name, value in result["values"].items()]
    if result["interval"]:
        rows.append(("90 % interval", " to ".join(f"{bound:.4g}" for bound in result["interval"])))
    if result["floor"] is not None:
        rows.append(
            (
                "floor of a perfect model",
                f"{result['floor']:.4g}" + (": this score is noise" if result["noise"] else ""),
            )
        )
    if result["infinity"] is not None:
        rows.append(("extrapolated to endless sets", f"{result['infinity']:.6g}"))
    if result["dropped"]:
        rows.append(("videos left out", f"{result['dropped']} (see dropped.jsonl)"))
    if "replayed" in result:
        rows.append(("replay", result["replayed"]))
    if "comparison" in result:
        told = result["comparison"]
        overlap = ", intervals overlap" if told["overlap"] else ""
        rows.append(("other", f"{told['other']:.6g}, difference {told['difference']:+.6g}{overlap}"))
    return [*table(rows), result["manifest"], result["report"]]
