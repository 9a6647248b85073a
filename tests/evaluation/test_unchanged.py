# SPDX-License-Identifier: Apache-2.0
"""Scores, plans and manifest hashes are those of version 0.1.0, and its manifest files are still read.

The stored numbers were printed by version 0.1.0 for the same clips, which are computed and not decoded, so
that they depend on no video encoder. ``manifest_0.1.0.json`` is a file that it wrote.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import tiny_detector
from latte.checks import InputError
from latte.data.procedural import draw_scene, render
from latte.evaluation import protocols
from latte.evaluation.detectors import DETECTORS
from latte.evaluation.evaluate import EvaluateConfig, check_replay, evaluate
from latte.evaluation.manifest import compare, read_report
from latte.evaluation.plan import Source
from latte.evaluation.protocols import PROTOCOLS, FrameRule
from tiny_detector import TINY, render_clip

WRITTEN = Path(__file__).with_name("manifest_0.1.0.json")
COUNT = 20


def scene(seed):
    return render(draw_scene(5, seed, 8), 8, 32, 32)


CASES = {  # protocol, clip of a seed, more options
    "tiny": (TINY, render_clip, {}),
    "tiny-frames": (
        replace(
            TINY,
            name="tiny-frames",
            frame=FrameRule(16, "crop, resize", 75),
            stride_real=2,
            ddof=0,
            metrics=("fvd", "kvd", "jedi", "precision", "recall", "is"),
            splits=2,
        ),
        render_clip,
        {},
    ),
    "tiny-fewer": (replace(TINY, clips=40), render_clip, {"allow_fewer": True}),
    "own": (replace(PROTOCOLS["builtin"], frames=8, clips=16), scene, {}),
}
STORED = {  # manifest hash, first digits of the plan's, value, floor, extrapolation
    "tiny": ("a19a1bdcb69f", "1d5c5b53c4a5ad67", 2.140752166348064, None, None),
    "tiny-frames": ("7d15826302de", "77045747e8fdc414", 1.7329076950389926, None, None),
    "tiny-fewer": (
        "2cfafba41474",
        "10c47969307efe9a",
        0.6729073086056836,
        0.6061145626708545,
        -0.07767859441874303,
    ),
    "own": ("658c7e3a5a5c", "fc2ff10e23ed3497", 55.74033177036992, 43.40484944266181, 47.78470475037126),
}


@dataclass(frozen=True)
class ArraySide:
    """Clips in memory."""

    root: str
    sources: tuple
    clips: dict
    broken: tuple = ()

    def read(self, id: str, indices) -> np.ndarray:
        return self.clips[id][list(indices)]


def array_side(name, seeds, clip_of, **facts):
    clips = {f"{seed:02d}.mp4": clip_of(seed) for seed in seeds}
    sources = [Source(id, len(clip), f"{name}-{id}", 8.0, "h264", **facts) for id, clip in clips.items()]
    return ArraySide(f"/data/{name}", tuple(sources), clips)


def run(name, out, monkeypatch, real=None, fake=None, **options):
    protocol, clip_of, more = CASES[name]
    monkeypatch.setitem(DETECTORS, "tiny", tiny_detector.SPEC)
    monkeypatch.setitem(protocols.PROTOCOLS, name, protocol)
    sides = (
        array_side("real", range(COUNT), clip_of, **(real or {})),
        array_side("fake", range(50, 50 + COUNT), clip_of, **(fake or {})),
    )
    config = EvaluateConfig(protocol=name, device="cpu", seed=3, **more, **options)
    return evaluate(*sides, config, out)


@pytest.mark.parametrize("name", CASES)
def test_hash_and_value_are_those_of_0_1_0(name, tmp_path, monkeypatch):
    found = run(name, tmp_path, monkeypatch)
    manifest_hash, plan, value, floor, infinity = STORED[name]
    assert (found["manifest_hash"], found["plan_sha256"][:16]) == (manifest_hash, plan)
    assert found["value"] == pytest.approx(value, rel=1e-6)
    assert found["floor"] == (floor if floor is None else pytest.approx(floor, rel=1e-6))
    assert found["infinity"] == (infinity if infinity is None else pytest.approx(infinity, rel=1e-4))


@pytest.mark.parametrize("note", [None, "damaged"])
def test_facts_that_0_1_0_did_not_record_leave_the_hash(note, tmp_path, monkeypatch):
    facts = {"height": 24, "width": 24, "note": note}
    found = run("tiny", tmp_path, monkeypatch, facts, facts)
    sizes = read_report(found["manifest"])["manifest"]["pixels"]["frame_size"]
    assert sizes["real"] == {"24x24": COUNT}
    assert found["manifest_hash"] == STORED["tiny"][0]


def test_a_manifest_of_0_1_0_is_read_compared_and_replayed(tmp_path, monkeypatch):
    before = read_report(WRITTEN)
    assert before["manifest_hash"] == STORED["tiny"][0]
    size = {"height": 24, "width": 24}
    run("tiny", tmp_path, monkeypatch, size, size)
    now = read_report(tmp_path / "manifest.json")
    assert check_replay(before, now) in ("exact", "close")
    assert compare(now, before, "0.1.0")["difference"] == pytest.approx(0, abs=1e-6)
    changed = json.loads(WRITTEN.read_text())
    changed["manifest"]["clips"]["stride_real"] = 2
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match="was changed after it was written"):
        read_report(tmp_path / "changed.json")
