# SPDX-License-Identifier: Apache-2.0
"""Plan, extract, score with a tiny detector: the same bits however the work is shared, and never stale
features.
"""

import copy
import dataclasses
import io
import json
import logging
import os
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import torch
from PIL import Image

import tiny_detector
from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checks import InputError, RunError
from latte.data.datasets import DataConfig
from latte.data.encode import encode_dataset
from latte.data.media import read_frames, write_mp4
from latte.data.procedural import draw_scene, render
from latte.evaluation import features as feature_files
from latte.evaluation import protocols
from latte.evaluation import report as page
from latte.evaluation.detectors import DETECTORS, build_detector
from latte.evaluation.evaluate import EvaluateConfig, check_replay, evaluate
from latte.evaluation.features import apply_frame_rule, extract, plan_jobs, run_jobs_in_process
from latte.evaluation.frechet import frechet_distance
from latte.evaluation.manifest import ADDED, GROUPS, compare, manifest_hash, read_report, write_report
from latte.evaluation.plan import make_plan
from latte.evaluation.protocols import FrameRule
from latte.evaluation.scores import builtin_score, distances_from_real, score
from latte.evaluation.sources import FolderSide, open_side
from latte.runtime import generator
from tiny_detector import PIXELS, TINY, build_tiny, render_clip, write_side

CONFIG = EvaluateConfig(protocol="tiny", device="cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Eight real and eight fake videos, written once and never changed."""
    root = tmp_path_factory.mktemp("sides")
    return {"real": write_side(root / "real", range(8)), "fake": write_side(root / "fake", range(50, 58))}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The tiny protocol and its detector, known by name; small pictures on the page."""
    monkeypatch.setattr(page, "PIXELS", 16)
    monkeypatch.setitem(DETECTORS, "tiny", tiny_detector.SPEC)
    monkeypatch.setitem(protocols.PROTOCOLS, "tiny", TINY)


def opened(folders, cache):
    return {side: open_side(side, folders[side], cache) for side in ("real", "fake")}


def run(folders, out, config=CONFIG, **options):
    result = evaluate(*opened(folders, out / "probes").values(), config, out, **options)
    return result, read_report(out / "manifest.json")


def features_in(out):
    return {
        side: safetensors.torch.load_file(out / f"{side}.safetensors")["features"]
        for side in ("real", "fake")
    }


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """(folder, result, manifest file) of one evaluation. Copy before changing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DETECTORS, "tiny", tiny_detector.SPEC)
        patch.setitem(protocols.PROTOCOLS, "tiny", TINY)
        out = tmp_path_factory.mktemp("finished")
        return out, *run(folders, out)


def test_the_score_is_that_of_the_planned_clips(folders, finished):
    out, result, _ = finished
    network, features = tiny_detector.TinyNetwork(), {"real": [], "fake": []}
    for line in map(json.loads, (out / "clips.jsonl").read_text().splitlines()):
        frames = read_frames(
            folders[line["side"]] / line["id"], [line["start"] + i * line["stride"] for i in range(4)]
        )
        x = torch.nn.functional.interpolate(
            torch.from_numpy(frames).permute(0, 3, 1, 2).float(), (16, 16), mode="bilinear"
        )
        features[line["side"]].append(network((x / 127.5 - 1).transpose(0, 1)[None]).double()[0].numpy())
    real, fake = (np.stack(rows) for rows in features.values())
    assert len(real) == len(fake) == 6
    root = scipy.linalg.sqrtm(np.cov(real, rowvar=False) @ np.cov(fake, rowvar=False)).real
    expected = np.square(real.mean(0) - fake.mean(0)).sum() + np.trace(
        np.cov(real, rowvar=False) + np.cov(fake, rowvar=False) - 2 * root
    )
    assert result["value"] == pytest.approx(expected, rel=1e-4)
    assert {"protocol", "metric", "value", "interval", "floor", "manifest", "manifest_hash"} <= set(result)
    assert (result["protocol"], result["metric"]) == ("tiny", "fvd")
    assert result["interval"][0] < result["value"] < result["interval"][1]


def test_any_number_of_processes_gives_the_same_bits(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "SHARD", 2)
    done = {}
    for processes in (1, 2):
        config = replace(CONFIG, processes=processes, group=3)
        result, _ = run(folders, tmp_path / str(processes), config, build=build_tiny)
        files = {
            name: (tmp_path / str(processes) / name).read_bytes()
            for name in ("clips.jsonl", "real.safetensors", "fake.safetensors")
        }
        done[processes] = (result["value"], result["values"], files)
    assert done[1] == done[2]
    assert not list((tmp_path / "2" / "shards").iterdir())


@pytest.mark.usefixtures("quick_start")
def test_workers_that_decode_give_the_same_bits(folders, finished, tmp_path):
    out, result, report = finished
    other, again = run(folders, tmp_path, replace(CONFIG, workers=2))
    assert other["values"] == result["values"]
    for name in ("real.safetensors", "fake.safetensors"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert again["manifest_hash"] == report["manifest_hash"]
    assert "workers" not in report["replay"]["config"]


@pytest.mark.usefixtures("quick_start")
def test_a_worker_that_cannot_read_a_clip_names_it(folders, tmp_path):
    root = shutil.copytree(folders["real"], tmp_path / "real")
    sides = opened({**folders, "real": root}, tmp_path / "probes")
    clips = make_plan(TINY, {side: sides[side].sources for side in sides}).side("real")
    for file in root.iterdir():
        file.unlink()
    with pytest.raises(InputError, match="cannot be used"):
        list(feature_files.read_clips(clips, sides, TINY.frame, workers=1))


def test_bf16_features_come_with_their_error(folders, finished, tmp_path):
    _, result, report = finished
    other, again = run(folders, tmp_path, replace(CONFIG, dtype="bf16"))
    assert "precision" not in result
    found = other["precision"]
    assert (found["dtype"], found["clips"]) == ("bfloat16", 6)
    assert 1e-5 < found["relative_rms"] < 0.1
    assert other["value"] != result["value"]
    assert other["value"] == pytest.approx(result["value"], rel=0.2)
    assert any("computed in bfloat16: relative RMS error" in warning for warning in other["warnings"])
    assert again["manifest"]["detector"]["dtype"] == "bfloat16"
    assert again["manifest_hash"] != report["manifest_hash"]
    assert EvaluateConfig.of(again["replay"]["config"], "here").dtype == "bf16"
    assert EvaluateConfig.of(report["replay"]["config"], "here").dtype == "fp32"


@pytest.mark.parametrize(
    ("changes", "text"), [({"dtype": "fp16"}, "--dtype is"), ({"workers": -1}, "--workers must")]
)
def test_unknown_precision_and_negative_workers_are_refused(changes, text):
    with pytest.raises(InputError, match=text):
        replace(CONFIG, **changes)


def test_plan_and_rows_do_not_depend_on_group_or_order(folders, finished, tmp_path):
    out, result, _ = finished
    other, _ = run(folders, tmp_path, replace(CONFIG, group=4))
    assert (tmp_path / "clips.jsonl").read_bytes() == (out / "clips.jsonl").read_bytes()
    assert other["value"] == pytest.approx(result["value"], rel=1e-5)


def test_a_killed_extraction_resumes(folders, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "SHARD", 2)
    sides = opened(folders, tmp_path / "probes")
    read, counts = type(sides["real"]).read, []

    def counted(self, id, indices):
        counts.append(id)
        if len(counts) == 6:
            raise KeyboardInterrupt
        return read(self, id, indices)

    monkeypatch.setattr(type(sides["real"]), "read", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*sides.values(), CONFIG, tmp_path, until="extract")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 2
    evaluate(*sides.values(), CONFIG, tmp_path, until="extract")
    assert len(counts) == 6 + 12 - 4
    assert all(
        torch.equal(features_in(tmp_path)[side], features_in(finished[0])[side]) for side in ("real", "fake")
    )
    evaluate(*sides.values(), CONFIG, tmp_path, until="extract")
    assert len(counts) == 14, "features that are there are kept"


def rewrite(path, frames):
    """Other content under the same name, with the same size and time."""
    status = path.stat()
    write_mp4(path, frames, 8)
    size = path.stat().st_size
    assert size <= status.st_size, "choose a simpler clip"
    with open(path, "ab") as file:
        file.write(b"\0" * (status.st_size - size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


MUTATIONS = {
    "file added": lambda root: write_mp4(root / "real" / "99.mp4", render_clip(99), 8),
    "file removed": lambda root: (root / "real" / chosen_real(root)).unlink(),
    "file touched": lambda root: os.utime(root / "real" / "00.mp4"),
    "file rewritten, same size and time": lambda root: rewrite(
        root / "real" / chosen_real(root), np.repeat(render_clip(7)[:1], 12, 0)
    ),
    "stride": {"stride_real": 2},
    "number of clips": {"clips": 5},
    "detector": {"detector": "1"},
    "resizer": {"pixels": replace(PIXELS, resize="tf1")},
}
SAME = ("file touched",)  # its content is what it was


def chosen_real(root):
    return json.loads((root / "out" / "clips.jsonl").read_text().splitlines()[0])["id"]


@pytest.mark.parametrize("name", MUTATIONS)
def test_features_are_never_stale(folders, tmp_path, monkeypatch, name):
    for side in ("real", "fake"):
        shutil.copytree(folders[side], tmp_path / side)
    both = {side: tmp_path / side for side in ("real", "fake")}
    before, _ = run(both, tmp_path / "out", build=build_tiny)
    old, change, config = features_in(tmp_path / "out"), MUTATIONS[name], CONFIG
    if callable(change):
        change(tmp_path)
    elif "detector" in change:
        config = replace(config, **change)
    else:
        monkeypatch.setitem(protocols.PROTOCOLS, "tiny", replace(TINY, **change))
    after, _ = run(both, tmp_path / "out", config, build=build_tiny)
    fresh, _ = run(both, tmp_path / "fresh", config, build=build_tiny)
    assert (after["values"], after["plan_sha256"]) == (fresh["values"], fresh["plan_sha256"])
    new = features_in(tmp_path / "out")
    assert all(torch.equal(new[side], features_in(tmp_path / "fresh")[side]) for side in new)
    moved = after["plan_sha256"] != before["plan_sha256"] or not all(
        torch.equal(new[side], old[side]) for side in new
    )
    assert moved == (
        name not in SAME
        and (name != "file added" or "99.mp4" in (tmp_path / "out" / "clips.jsonl").read_text())
    )


def test_a_flipped_byte_in_features_is_noticed(folders, finished, tmp_path, caplog):
    shutil.copytree(finished[0], tmp_path / "out")
    path = tmp_path / "out" / "fake.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.INFO, "latte"):
        result, _ = run(folders, tmp_path / "out")
    assert "damaged" in caplog.text
    assert result["value"] == finished[1]["value"]


def test_the_manifest_has_sixty_fields_and_fifty_one_decide_its_hash(finished):
    """And four more since 0.1.0, which are not hashed where they are as 0.1.0 assumed."""
    manifest = finished[2]["manifest"]
    assert sum(len(fields) for fields in GROUPS.values()) == 60
    assert sum(len(fields) for fields in manifest.values()) == 64
    hashes, first = set(), manifest_hash(manifest)
    for group, fields in manifest.items():
        assert set(fields) == {*GROUPS[group], *ADDED.get(group, ())}
        for field in GROUPS[group]:
            changed = copy.deepcopy(manifest)
            changed[group][field] = "another value"
            if group == "run":
                assert manifest_hash(changed) == first, field
            else:
                hashes.add(manifest_hash(changed))
    assert len(hashes - {first}) == 51


def test_added_fields_are_hashed_where_they_differ_from_what_was_assumed(finished):
    manifest = finished[2]["manifest"]
    first = manifest_hash(manifest)
    assert manifest["pixels"]["frame_size"] == {"real": {"24x24": 8}, "fake": {"24x24": 8}}
    for group, field, same, other in (
        (
            "pixels",
            "frame_size",
            {"real": {"9x9": 1}, "fake": {"9x9": 5}},
            {"real": {"9x9": 1}, "fake": {"8x8": 1}},
        ),
        ("generation", "interval", 1, 3),
        ("generation", "other", None, {"dtype": "torch.bfloat16"}),
    ):
        for value in (None, same, other):
            changed = copy.deepcopy(manifest)
            changed[group][field] = value
            assert (manifest_hash(changed) == first) == (value is not other), (field, value)


def test_an_edited_manifest_is_refused(finished, tmp_path):
    written = copy.deepcopy(finished[2])
    written["manifest"]["clips"]["stride_real"] = 3
    write_report(tmp_path / "m.json", written)
    with pytest.raises(InputError, match="changed after it was written"):
        read_report(tmp_path / "m.json")
    (tmp_path / "m.json").write_text("[]")
    with pytest.raises(InputError, match="not a manifest"):
        read_report(tmp_path / "m.json")


@pytest.mark.parametrize(
    "changes", [{"stride_real": 2}, {"ddof": 0}, {"version": 2}, {"pixels": replace(PIXELS, resize="tf1")}]
)
def test_scores_of_different_protocols_do_not_compare(folders, finished, tmp_path, monkeypatch, changes):
    assert compare(finished[2], finished[2], "itself") == {
        "other": finished[1]["value"],
        "difference": 0.0,
        "overlap": True,
    }
    monkeypatch.setitem(
        protocols.PROTOCOLS, "tiny", replace(TINY, name="tiny2" if "pixels" in changes else "tiny", **changes)
    )
    _, other = run(folders, tmp_path)
    with pytest.raises(InputError, match="do not compare"):
        compare(finished[2], other, "other.json")


def test_a_replay_is_exact_close_or_refused(folders, finished, tmp_path):
    _, again = run(folders, tmp_path)
    assert again["manifest_hash"] == finished[2]["manifest_hash"]
    assert check_replay(finished[2], again) == "exact"
    assert check_replay(finished[2], {**again, "value": again["value"] * (1 + 5e-5)}) == "close"
    with pytest.raises(RunError, match="the replay gives"):
        check_replay(finished[2], {**again, "value": again["value"] * 1.01})
    again["manifest"]["clips"]["plan_sha256"] = "other"
    with pytest.raises(InputError, match="plan_sha256"):
        check_replay(finished[2], again)


def test_stages_end_where_requested(folders, tmp_path):
    sides = opened(folders, tmp_path / "probes")
    evaluate(*sides.values(), CONFIG, tmp_path, until="plan")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.jsonl", "dropped.jsonl", "probes"]
    evaluate(*sides.values(), CONFIG, tmp_path, until="extract")
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(InputError, match="did you mean 'score'"):
        evaluate(*sides.values(), CONFIG, tmp_path, until="scor")


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (32, 32)])
def test_frames_are_cut_and_resized_as_pillow_does(shape):
    frames = np.random.RandomState(0).randint(0, 255, (2, *shape, 3), np.uint8)
    h, w = shape
    side = min(shape)
    square = frames[:, (h - side) // 2 :][:, :side, (w - side) // 2 :][:, :, :side]
    expected = [
        np.asarray(Image.fromarray(frame).resize((16, 16), Image.Resampling.LANCZOS)) for frame in square
    ]
    np.testing.assert_array_equal(apply_frame_rule(frames, FrameRule(16)), expected)
    other = apply_frame_rule(frames, FrameRule(16, "resize, crop"))
    assert other.shape == (2, 16, 16, 3)
    assert np.array_equal(other, expected) == (h == w)
    file = io.BytesIO()
    Image.fromarray(expected[0]).save(file, "JPEG", quality=75)  # Pillow's default is 4:2:0
    np.testing.assert_array_equal(
        apply_frame_rule(frames, FrameRule(16, jpeg=75))[0], np.asarray(Image.open(file))
    )
    assert apply_frame_rule(frames, FrameRule()) is frames


def test_frame_folders_latents_and_videos_are_sides(folders, tmp_path):
    for index in range(3):
        folder = tmp_path / "frames" / f"clip{index}"
        folder.mkdir(parents=True)
        for t, frame in enumerate(render_clip(index)):
            Image.fromarray(frame).save(folder / f"{t:03d}.png")
    side = open_side("real", tmp_path / "frames", tmp_path / "probes")
    assert [(s.id, s.frames, s.codec) for s in side.sources] == [(f"clip{i}", 7, "images") for i in range(3)]
    assert len({s.sha256 for s in side.sources}) == 3
    np.testing.assert_array_equal(side.read("clip1", [2, 4]), render_clip(1)[[2, 4]])

    data = DataConfig(root=str(folders["real"]), resolution=24, frames=4, labels=False)
    encode_dataset(data, build_codec(CodecConfig("pixels")), tmp_path / "latents", dtype="float32")
    latent, video = (
        open_side("real", path, tmp_path / "probes") for path in (tmp_path / "latents", folders["real"])
    )
    assert [s.codec for s in latent.sources] == ["latents of pixels"] * 8
    for indices in ([0, 1, 2, 3], [2, 4, 6]):
        np.testing.assert_array_equal(latent.read("03.mp4", indices), video.read("03.mp4", indices))


def test_the_mosaic_of_latte_sample_is_not_a_fake(folders, tmp_path):
    shutil.copytree(folders["fake"], tmp_path / "generated")
    shutil.copy(folders["real"] / "00.mp4", tmp_path / "generated" / "clips.gif")
    assert len(open_side("fake", tmp_path / "generated", tmp_path / "p").sources) == 9
    (tmp_path / "generated" / "album.json").write_text("{}")
    assert len(open_side("fake", tmp_path / "generated", tmp_path / "p").sources) == 8


def test_the_page_is_well_formed_and_holds_its_clips(finished):
    out, result, written = finished
    text = Path(result["report"]).read_text(encoding="utf-8")
    tree = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))
    clips = list(tree.iter("video"))
    assert len(clips) == 6 + 6 + 4 + 4
    assert all(clip.get("src").startswith("data:video/mp4;base64,") for clip in clips)
    assert all(clip.get("autoplay") == "" for clip in clips)
    assert not list(out.rglob("*.png"))
    assert written["manifest_hash"] in text
    assert tiny_detector.SPEC.card in text
    assert tree.find(".//h1").text.startswith("Frechet distance of clip features (tiny): ")


def test_copies_of_training_clips_are_found_and_shown(folders, tmp_path):
    """Fakes are training clips in other files: the page shows them, their originals and held-out clips."""
    copies = tmp_path / "copies"
    write_side(copies, range(8), fps=9)
    held_out = write_side(tmp_path / "held", range(100, 106))
    sides = {"real": folders["real"], "fake": copies}
    config = replace(CONFIG, allow_mixed=True)
    unseen = open_side("held-out", held_out, tmp_path / "p")
    result, written = run(sides, tmp_path / "out", config, held_out=unseen)
    found = result["memorisation"]
    assert found["relative"]["high"] < 0.6
    assert (found["num_train"], found["num_held_out"]) == (6, 6)
    assert written["replay"]["held_out"] == str(held_out)
    text = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert found["verdict"] in text
    names = {path.name for path in (tmp_path / "out" / "nearest").iterdir()}
    assert names == {f"{n}-{kind}.mp4" for n in range(1, 5) for kind in ("generated", "training", "held-out")}
    plain, other = run(sides, tmp_path / "plain", config)
    assert "memorisation" not in plain
    assert other["manifest_hash"] == written["manifest_hash"]


def test_held_out_clips_that_were_trained_on_are_refused(folders, tmp_path):
    sides = opened(folders, tmp_path / "p")
    with pytest.raises(InputError, match=r"held-out video 00\.mp4 is also a training clip, 00\.mp4"):
        evaluate(*sides.values(), CONFIG, tmp_path / "out", held_out=sides["real"])
    write_side(tmp_path / "one", range(1))
    one = open_side("held-out", tmp_path / "one", tmp_path / "p")
    with pytest.raises(InputError, match="has 1 held-out videos of at least 4 frames; memorisation needs 2"):
        evaluate(*sides.values(), CONFIG, tmp_path / "out", held_out=one)


def test_plain_data_in_words():
    traits = {"codec": {"h264": 8, "vp9": 1}, "fps": {"25": 9}}
    assert (
        page.words({"real": traits, "fake": None})
        == "real: codec h264 (8), vp9 (1), fps 25 (9); fake: not stated"
    )
    assert page.words({"size": None, "order": "crop"}, absent="none") == "size: none; order: crop"
    assert (
        page.words({"real": [], "fake": [{"id": "a", "reason": "short"}]})
        == "real: none; fake: id (a), reason (short)"
    )
    assert page.words(("fvd", 3)) == "fvd, 3"


def test_worst_clips_lie_far_from_the_real_mean():
    draw = partial(torch.randn, generator=generator(0, "rows"), dtype=torch.float64)
    real, fake = draw(200, 5) * torch.tensor([1.0, 10, 1, 1, 1]), draw(6, 5)
    fake[2, 0] += 20
    fake[4, 1] += 20  # along the wide direction this is little
    far = distances_from_real(real, fake)
    assert int(far.argmax()) == 2
    assert far[2] > 3 * far[4]
    assert distances_from_real(torch.ones(4, 3), torch.ones(2, 3)).tolist() == [0.0, 0.0]


def test_the_floor_follows_its_law_on_white_features():
    """E20: within 5 % of D (D + 5) / (2 N); N(0, I) with 32 features."""
    draw = partial(torch.randn, generator=generator(1, "white"))
    scores = score(draw(1024, 32), draw(1024, 32), replace(TINY, metrics=("fvd",)))
    assert scores.floor.white == pytest.approx(32 * 37 / 2048)
    assert scores.floor.value == pytest.approx(scores.floor.white, rel=0.05)
    assert scores.is_noise
    assert abs(scores.infinity.value) < scores.value / 3
    far = score(
        draw(64, 4),
        draw(64, 4) + 3,
        replace(TINY, metrics=("fvd", "kvd", "jedi", "precision", "recall", "is")),
    )
    assert not far.is_noise
    assert far.values["precision"] < 0.1 < far.values["kvd"]


def test_few_rows_leave_out_interval_and_floor_with_a_warning():
    draw = partial(torch.randn, generator=generator(2, "short"))
    scores = score(draw(3, 2), draw(3, 2), TINY)
    assert (scores.interval, scores.infinity, scores.floor, scores.is_noise) == (None, None, None, False)
    assert len(scores.warnings) == 1
    assert "3 real and 3 fake rows are too few for an interval or a floor" in scores.warnings[0]
    assert score(draw(8, 2), draw(8, 2), TINY).warnings == ()


def test_the_builtin_score_of_clips_in_memory():
    real, fake = ([render(draw_scene(seed, i, 8), 8, 64, 64) for i in range(12)] for seed in (1, 2))
    detector = build_detector("builtin")
    expected = frechet_distance(detector(np.stack(real)), detector(np.stack(fake)))
    assert builtin_score(real, fake) == pytest.approx(expected, rel=1e-9)
    assert builtin_score(real, [torch.from_numpy(clip) for clip in fake]) == builtin_score(real, fake)
    assert abs(builtin_score(real, real)) < 1e-6 * expected
    assert builtin_score(real, [np.repeat(clip[:1], 8, 0) for clip in real]) > 1.5 * expected
    with pytest.raises(InputError, match=r"number of frames, got \[4, 8\]"):
        builtin_score(real, [clip[:4] for clip in fake])
    with pytest.raises(InputError, match="two clips per side"):
        builtin_score(real, fake[:1])


def test_extract_refuses_a_clip_that_vanished(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "SHARD", 2)
    for side in ("real", "fake"):
        shutil.copytree(folders[side], tmp_path / side)
    sides = opened({side: tmp_path / side for side in ("real", "fake")}, tmp_path / "probes")
    plan = make_plan(TINY, {side: sides[side].sources for side in sides})
    for path in (tmp_path / "fake").iterdir():
        path.write_bytes(b"nothing")
    make = partial(build_tiny, "tiny", "cpu", None, None, PIXELS, "pool", 1)
    with pytest.raises(InputError, match="cannot be used"):
        extract(plan, sides, make(), make, tmp_path / "out")
    jobs = [job for job in plan_jobs(plan, make(), tmp_path / "out") if job.clips[0].side == "fake"]
    assert "cannot be used" in run_jobs_in_process(jobs, sides, make, TINY.frame, torch.get_num_threads())


def test_features_with_nan_name_the_clip(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "SHARD", 2)
    sides = opened(folders, tmp_path / "probes")
    plan = make_plan(TINY, {side: sides[side].sources for side in sides})
    poisoned = plan.side("fake")[3].id
    forward = tiny_detector.TinyNetwork.forward
    reads = []

    def read(self, id, indices):
        reads.append(id)
        return original(self, id, indices)

    original = type(sides["real"]).read
    monkeypatch.setattr(type(sides["real"]), "read", read)

    def spoiled(self, x):
        found = forward(self, x)
        return found * torch.nan if reads[-1] == poisoned and len(reads) > 6 else found

    monkeypatch.setattr(tiny_detector.TinyNetwork, "forward", spoiled)
    with pytest.raises(InputError, match=rf"features of fake clip {poisoned} have NaN or Inf"):
        evaluate(*sides.values(), CONFIG, tmp_path)
    assert reads[-1] == poisoned
    assert not (tmp_path / "fake.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_decode_to_nan_name_the_video(folders, tmp_path, value):
    data = DataConfig(root=str(folders["real"]), resolution=24, frames=4, labels=False)
    encode_dataset(data, build_codec(CodecConfig("pixels")), tmp_path / "latents", dtype="float32")
    shard = next((tmp_path / "latents").rglob("*.safetensors"))
    with safetensors.safe_open(shard, "pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(shard)
    name = next(name for name in tensors if name.endswith("03.mp4"))
    tensors[name][2, 0, 1, 1] = value
    safetensors.torch.save_file(tensors, shard, metadata)
    side = open_side("real", tmp_path / "latents", tmp_path / "probes")
    assert side.read("02.mp4", [0, 1, 2]).shape == (3, 24, 24, 3)
    with pytest.raises(InputError, match=r"latents of 03\.mp4 in .* have NaN or Inf"):
        side.read("03.mp4", [0, 1, 2])


@dataclass
class WrittenClips:
    """A model of a few lines: it 'generates' the clips of some seeds."""

    interval: int | None = 1
    name: str = "written"
    seed: int = 50
    shape: tuple = (7, 24, 24)
    calls: list = dataclasses.field(default_factory=list)

    def generate(self, folder, count, fps, progress):
        self.calls.append((count, fps))
        write_side(folder, range(self.seed, self.seed + count), fps=fps)
        progress(count, count)
        return {"weights": "none"}


def test_anything_that_writes_clips_can_be_the_fake_side(folders, tmp_path):
    real = open_side("real", folders["real"], tmp_path / "probes")
    model = WrittenClips()
    found = evaluate(real, model, CONFIG, tmp_path / "model")
    assert model.calls == [(6, 8.0)]
    fake = open_side("fake", tmp_path / "model" / "samples", tmp_path / "probes")
    assert evaluate(real, fake, CONFIG, tmp_path / "folder")["value"] == found["value"]
    written = read_report(found["manifest"])
    assert (written["replay"]["model"], written["replay"]["sample_seed"]) == ("written", 50)
    assert written["manifest"]["generation"]["interval"] == 1
    with pytest.raises(InputError, match="trained on every 3rd frame"):
        evaluate(real, WrittenClips(interval=3), CONFIG, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_settings_of_generated_clips_are_recorded_completely(folders, tmp_path):
    shutil.copytree(folders["fake"], tmp_path / "fake")
    usual = {"sampler": "ddim", "steps": 20, "guidance": 2.0, "weights": "w", "codec": "c", "fps": 8.0}
    usual |= {"eta": 0.0, "dtype": "torch.float32", "frames": None, "size": None}
    unusual = {"eta": 0.5, "dtype": "torch.bfloat16", "frames": 32}
    found = {}
    for name, facts in (("usual", usual), ("unusual", usual | unusual)):
        (tmp_path / "fake" / "album.json").write_text(json.dumps({"facts": facts}))
        _, found[name] = run({"real": folders["real"], "fake": tmp_path / "fake"}, tmp_path / name)
    generation = {name: report["manifest"]["generation"] for name, report in found.items()}
    assert generation["usual"]["other"] is None
    assert generation["unusual"]["other"] == unusual
    assert (generation["usual"]["sampler"], generation["usual"]["steps"]) == ("ddim", 20)
    assert found["usual"]["manifest_hash"] != found["unusual"]["manifest_hash"]


def test_files_of_features_have_the_mode_of_other_files(finished):
    out = finished[0]
    modes = {
        name: (out / name).stat().st_mode for name in ("real.safetensors", "manifest.json", "report.html")
    }
    assert len(set(modes.values())) == 1, modes


class Reads:
    """Counts the clips of a folder that are decoded, from here on or since ``clear``."""

    def __init__(self, monkeypatch):
        self.roots = []
        read = FolderSide.read

        def counted(side, id, indices):
            self.roots.append(side.root)
            return read(side, id, indices)

        monkeypatch.setattr(FolderSide, "read", counted)

    def of(self, root) -> int:
        count = self.roots.count(str(root))
        self.roots.clear()
        return count


def extracted(folders, out, kept, config=CONFIG, **options):
    """Evaluate up to the features and return them."""
    sides = opened(folders, out / "probes")
    evaluate(*sides.values(), config, out, until="extract", kept=kept, **options)
    return features_in(out)


def test_a_second_score_does_not_decode_the_real_side(folders, tmp_path, monkeypatch):
    reads = Reads(monkeypatch)
    plain = extracted(folders, tmp_path / "plain", None)
    assert reads.of(folders["real"]) == 6
    first = extracted(folders, tmp_path / "first", tmp_path / "kept")
    assert reads.of(folders["real"]) == 6
    other = tmp_path / "other"
    shutil.copytree(folders["fake"], other)
    sorted(other.glob("*.mp4"))[0].unlink()
    extracted({**folders, "fake": other}, tmp_path / "other-fake", tmp_path / "kept")
    assert reads.roots.count(str(other)) > 0
    assert reads.of(folders["real"]) == 0
    second = extracted(folders, tmp_path / "second", tmp_path / "kept")
    assert reads.roots == [], "the same clips on both sides"
    for found in (first, second):
        assert all(torch.equal(found[side], plain[side]) for side in plain)


def test_kept_features_are_never_those_of_other_clips_settings_or_code(folders, tmp_path, monkeypatch):
    reads = Reads(monkeypatch)
    root = tmp_path / "real"
    shutil.copytree(folders["real"], root)
    sides = {"real": root, "fake": folders["fake"]}
    kept = tmp_path / "kept"
    extracted(sides, tmp_path / "first", kept)
    video = sorted(root.glob("*.mp4"))[0]
    before = video.stat()
    content = bytearray(video.read_bytes())
    content[-1] ^= 1  # in place, with size and date of before
    video.write_bytes(content)
    os.utime(video, ns=(before.st_atime_ns, before.st_mtime_ns))
    reads.of(root)
    extracted(sides, tmp_path / "changed", kept)
    assert reads.of(root) == 6, "one file has changed"
    extracted(sides, tmp_path / "again", kept)
    assert reads.of(root) == 0
    extracted(sides, tmp_path / "seed", kept, replace(CONFIG, seed=1))
    assert reads.of(root) > 0, "another choice of clips"
    extracted(sides, tmp_path / "group", kept, replace(CONFIG, group=2))
    assert reads.of(root) == 6, "another rounding"
    monkeypatch.setattr(feature_files, "source_sha256", lambda: "another version")
    extracted(sides, tmp_path / "code", kept)
    assert reads.of(root) == 6, "another program"


def test_damaged_and_unwritable_kept_features_cost_time_alone(folders, tmp_path, monkeypatch, caplog):
    reads = Reads(monkeypatch)
    kept = tmp_path / "kept"
    first = extracted(folders, tmp_path / "first", kept)
    (file,) = kept.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    reads.of(folders["real"])
    second = extracted(folders, tmp_path / "second", kept)
    assert reads.of(folders["real"]) == 6
    assert torch.equal(first["real"], second["real"])
    (tmp_path / "occupied").write_text("")
    caplog.set_level("INFO", "latte")
    third = extracted(folders, tmp_path / "third", tmp_path / "occupied" / "kept")
    assert torch.equal(first["real"], third["real"])
    assert "the features are not kept for later scores: could not write" in caplog.text


def test_only_the_newest_kept_features_stay(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "KEPT", 2)
    for seed in range(4):
        extracted(folders, tmp_path / str(seed), tmp_path / "kept", replace(CONFIG, seed=seed))
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2
    assert len(list((tmp_path / "kept" / "fake").glob("*.safetensors"))) == 2
