# SPDX-License-Identifier: Apache-2.0
"""``latte evaluate``: a score with its protocol, interval, floor and manifest; and its repetition from a
manifest.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from latte.checks import InputError, check
from latte.cli.options import Debug, Device, Json, configure_logging, print_result, table

Folder = "A folder of videos or of frame folders, or latent shards"
File = "or, with --protocol external, a file of features or of mu and sigma"
Model = "or a model (a run folder, a weights folder, builtin-shapes)"
Real = Annotated[str | None, typer.Argument(metavar="[REAL]", help=f"{Folder}, {File}.", show_default=False)]
Fake = Annotated[
    str | None, typer.Argument(metavar="[FAKE]", help=f"{Folder}, {Model}, {File}.", show_default=False)
]
ProtocolName = Annotated[str, typer.Option(metavar="NAME", help="{protocols}; external for files.")]
Seed = Annotated[int, typer.Option(help="Decides clips and starts, together with each video's name.")]
Clips = Annotated[
    int | None, typer.Option(help="Clips per side; other than the protocol's makes it non-standard.")
]
Fewer = Annotated[
    bool,
    typer.Option(
        "--allow-fewer", help="Take as many clips as both sides have; makes the protocol non-standard."
    ),
]
Mixed = Annotated[
    bool, typer.Option("--allow-mixed", help="Accept sides whose {confounders} or frame intervals differ.")
]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder; evaluations/FAKE-PROTOCOL by default. Existing features are reused."),
]
Until = Annotated[str, typer.Option(metavar="STAGE", help="Last stage: {stages}.")]
Processes = Annotated[
    int, typer.Option(help="Processes that extract features; any number gives the same bits.")
]
Group = Annotated[int, typer.Option(help="Clips that go through the detector at once (8 or more on a GPU).")]
Workers = Annotated[int, typer.Option(help="Processes that decode videos ahead; the same frames.")]
DetectorDtype = Annotated[
    str, typer.Option("--dtype", help="fp32, or bf16 with the measured error of the features in the result.")
]
Weights = Annotated[
    str | None, typer.Option("--detector", metavar="PATH", help="The weight file of the detector.")
]
Sha = Annotated[
    str | None, typer.Option("--detector-sha256", help="SHA-256 of a weight file that was not published.")
]
CodecPath = Annotated[
    str | None, typer.Option(help="The autoencoder's weights, for latent shards or if they have moved.")
]
SampleSeed = Annotated[int, typer.Option(help="Seed of a model's first clip; the others count up.")]
Split = Annotated[str | None, typer.Option(help="Split of the data, for the manifest.")]
Version = Annotated[str | None, typer.Option("--data-version", help="Version of the data, for the manifest.")]
Compare = Annotated[Path | None, typer.Option(metavar="FILE", help="Another manifest.json, to compare with.")]
From = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Repeat the evaluation of this manifest.json.")
]
HeldOut = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Clips kept out of training: measures how far FAKE repeats REAL, the clips trained on.",
    ),
]
Cache = Annotated[
    bool,
    typer.Option(help="Keep what was probed and computed of folders in the user's cache for the next score."),
]


def evaluate(
    real: Real = None,
    fake: Fake = None,
    protocol: ProtocolName = "clean",
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
    held_out: HeldOut = None,
    cache: Cache = True,
    workers: Workers = 0,
    dtype: DetectorDtype = "fp32",
    device: Device = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score FAKE against REAL: clips.jsonl, features, manifest.json and report.html in one folder."""
    from latte.evaluation.evaluate import EvaluateConfig, check_replay, replay_config
    from latte.evaluation.external import EXTERNAL, is_features
    from latte.evaluation.manifest import compare as compare_reports
    from latte.evaluation.manifest import read_report

    configure_logging()
    if protocol == EXTERNAL.name or is_features(real) or is_features(fake):
        for_videos = {"--from-manifest": from_manifest, "--compare": compare, "--clips": clips}
        for_videos |= {"--held-out": held_out, "--detector": detector, "--until": until != "score"}
        check_external(real, fake, protocol, [name for name, value in for_videos.items() if value])
        result = score_external(str(real), str(fake), out)
        return print_result(result, as_json, lines(result))
    before = read_report(from_manifest) if from_manifest else None
    other = read_report(compare) if compare else None
    if before:
        config = replay_config(before, from_manifest, detector)
        past = before["replay"]
        real, fake = real or past["real"], fake or past["model"] or past["fake"]
        codec_path, sample_seed = codec_path or past["codec_path"], past["sample_seed"]
        held_out = held_out or past.get("held_out")
    else:
        config = EvaluateConfig(protocol, seed, clips, allow_fewer, allow_mixed, detector, detector_sha256)
        config = replace(config, group=group, split=split, data_version=data_version, dtype=dtype)
    config = replace(config, device=device, processes=processes, workers=workers)
    count = before["manifest"]["data"]["found"]["fake"] if before else None
    result = run(real, fake, config, out, until, codec_path, sample_seed, count, held_out, cache)
    if "value" in result and before:
        result["replayed"] = check_replay(before, read_report(result["manifest"]))
    if "value" in result and other:
        result["comparison"] = compare_reports(read_report(result["manifest"]), other, str(compare))
    return print_result(result, as_json, lines(result))


def check_external(real: str | None, fake: str | None, protocol: str, others: list[str]) -> None:
    """InputError unless both sides are files of features, the protocol is external, and no option for videos
    is given.
    """
    from latte.evaluation.external import EXTERNAL, SUFFIXES, is_features

    kinds = ", ".join(SUFFIXES)
    check(
        is_features(real) and is_features(fake),
        f"--protocol {EXTERNAL.name} compares two files of features ({kinds}), not {real} and {fake}; give "
        "both",
    )
    check(
        protocol == EXTERNAL.name,
        f"{real} and {fake} are files of features, and --protocol {protocol} fixes how features are made; "
        f"give --protocol {EXTERNAL.name}",
    )
    check(
        not others,
        f"{', '.join(others)} is about videos; leave it out when REAL and FAKE are files of features",
    )


def score_external(real: str, fake: str, out: Path | None) -> dict[str, Any]:
    """Score two files of features; of several processes rank 0 alone does."""
    from latte.evaluation.external import EXTERNAL, score_files
    from latte.runtime import rank

    if rank():
        return {}
    return score_files(real, fake, out or Path("evaluations") / f"{Path(fake).stem}-{EXTERNAL.name}")


def run(
    real: str | None,
    fake: str | None,
    config: Any,
    out: Path | None,
    until: str,
    codec_path: str | None,
    sample_seed: int,
    num_generated: int | None,
    held_out: str | None,
    cache: bool,
) -> dict[str, Any]:
    """Open both sides and evaluate them; several processes share the work."""
    from latte.distributed import command_group
    from latte.evaluation.evaluate import PROBES
    from latte.evaluation.evaluate import evaluate as evaluate_sides
    from latte.evaluation.sources import open_side
    from latte.files import user_cache
    from latte.inference.clip_source import ModelClips, is_model
    from latte.runtime import resolve_device

    if not real or not fake:
        raise InputError(
            "REAL or FAKE is missing; give two folders (latte evaluate REAL FAKE --protocol clean), or "
            "--from-manifest FILE"
        )
    if is_model(real):
        raise InputError(
            f"REAL is {real!r}, which is a model; give a folder of videos, frames or latent shards"
        )
    out = out or Path("evaluations") / f"{Path(fake).resolve().name}-{config.protocol}"
    device = resolve_device(config.device)
    place = (codec_path, str(device))
    kept = user_cache() / "evaluation" if cache else None
    probes = kept or out / PROBES
    with command_group(device) as ranks:
        if is_model(fake):
            fake_side = ModelClips(fake, config.device, codec_path, sample_seed)
            fake_side.check_length(config.chosen_protocol.needed("fake"))
        else:
            fake_side = ranks.after_rank0(open_side, "fake", fake, probes, *place)
        real_side = ranks.after_rank0(open_side, "real", real, probes, *place)
        unseen = None
        if held_out:
            unseen = ranks.after_rank0(open_side, "held-out", held_out, probes, *place)
        return evaluate_sides(
            real_side,
            fake_side,
            config,
            out,
            until=until,
            num_generated=num_generated,
            codec_path=codec_path,
            kept=kept and kept / "features",
            held_out=unseen,
            ranks=ranks,
        )


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result for people: the value with its protocol and manifest hash, and how much it means."""
    if "value" not in result:
        return [f"{key}: {value}" for key, value in result.items() if key != "banks"]
    by = f"({result['protocol']}, manifest {result['manifest_hash']})"
    rows = [(f"{name} {by}", f"{value:.6g}") for name, value in result["values"].items()]
    if result["interval"]:
        rows.append(("90 % interval", " to ".join(f"{bound:.4g}" for bound in result["interval"])))
    if result["floor"] is not None:
        mark = ": this score is noise" if result["noise"] else ""
        rows.append(("floor of a perfect model", f"{result['floor']:.4g}{mark}"))
    if result["infinity"] is not None:
        rows.append(("extrapolated to infinitely many clips", f"{result['infinity']:.6g}"))
    if memory := result.get("memorisation"):
        relative = memory["relative"]
        low, high, value = (f"{relative[key]:.3g}" for key in ("low", "high", "value"))
        rows.append(("distance to training clips, 1 for fresh clips", f"{value} ({low} to {high})"))
    if result["dropped"]:
        rows.append(("videos left out", f"{result['dropped']} (see dropped.jsonl)"))
    if "replayed" in result:
        rows.append(("replay", result["replayed"]))
    if "comparison" in result:
        other = result["comparison"]
        overlap = ", intervals overlap" if other["overlap"] else ""
        rows.append(("other", f"{other['other']:.6g}, difference {other['difference']:+.6g}{overlap}"))
    warnings = [f"warning: {warning}" for warning in result["warnings"]]
    return [*table(rows), *warnings, result["manifest"], result["report"]]
