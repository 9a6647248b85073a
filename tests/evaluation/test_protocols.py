# SPDX-License-Identifier: Apache-2.0
"""Protocols are what was read of the published tools, and stay what they are."""

import hashlib
import json
from dataclasses import FrozenInstanceError, replace

import pytest

from latte.checks import InputError
from latte.evaluation import protocols
from latte.evaluation.detectors import DETECTORS
from latte.evaluation.protocols import CLEAN, PROTOCOLS, FrameRule, Protocol, find_protocol, nonstandard

# A change of any of these is another measurement: raise the protocol's version, then its hash here.
GOLDEN = {
    "styleganv-fvd2048-16f": (1, "845e0270fd9a214e"),
    "styleganv-fvd2048-128f": (1, "4d0ff2eabad08282"),
    "latte-paper": (1, "71f00121fb6e8ba7"),
    "latte-paper-taichi": (1, "01a2c13e2c3881dc"),
    "latte-paper-jpeg75": (1, "69d36ebc334998c4"),
    "tats": (1, "a3e30457d958de15"),
    "videogpt": (1, "73006448c34dcd73"),
    "cdfvd-i3d": (1, "07ce3b6e6ae3ac91"),
    "clean": (1, "8177036367845485"),
    "clean-128f": (1, "a5314a060fa0c753"),
    "clean-fid": (1, "f0f5f3e00c7aec16"),
    "clean-is": (1, "c00a1582ed41312e"),
    "styleganv-isv2048-ucf": (1, "5808f8ba6e68e4c5"),
    "random-i3d": (1, "c060377e4b9d39d1"),
    "builtin": (2, "514218ba2e5cd234"),  # 2: other weights and 48 features
}
PUBLISHED = {  # clips, stride real, stride fake, ddof, order, shortest, detector, crop before the network
    "styleganv-fvd2048-16f": (2048, 1, 1, 0, "path", 16, "i3d", "none"),
    "latte-paper": (2048, 3, 1, 0, "hash", 48, "i3d", "none"),
    "latte-paper-taichi": (2048, 6, 1, 0, "hash", 96, "i3d", "none"),
    "tats": (2048, 1, 1, 1, "hash", 16, "i3d400", "none"),
    "videogpt": (256, 1, 1, 1, "hash", 16, "i3d400", "centre"),
    "cdfvd-i3d": (2048, 1, 1, 0, "hash", 16, "i3d400", "none"),
    "clean": (2048, 1, 1, 1, "hash", 16, "i3d", "none"),
}


def digest(protocol: Protocol) -> str:
    """Hash of every choice; the note describes the origin and may be reworded."""
    choices = {key: value for key, value in protocol.describe().items() if key != "note"}
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_protocol_never_changes_without_its_version(name):
    assert (PROTOCOLS[name].version, digest(PROTOCOLS[name])) == GOLDEN[name]


def test_every_protocol_has_a_golden_hash():
    assert set(PROTOCOLS) == set(GOLDEN)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_protocols_are_what_was_read(name):
    p = PROTOCOLS[name]
    found = (
        p.clips,
        p.stride_real,
        p.stride_fake,
        p.ddof,
        p.order,
        p.needed("real"),
        p.detector,
        p.pixels.crop,
    )
    assert found == PUBLISHED[name]
    assert p.frames == 16


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_its_detector_has_the_layer_and_can_read_its_clips(protocol):
    spec = DETECTORS[protocol.detector]
    assert protocol.layer in spec.layers
    assert spec.min_frames <= protocol.frames <= (spec.max_frames or protocol.frames) or spec.unit == "frame"


@pytest.mark.parametrize("stride", [1, 2, 3, 6])
@pytest.mark.parametrize("shortest", ["span", "frames x stride"])
def test_starts_are_counted_as_by_trying_them_all(stride, shortest):
    protocol = Protocol(
        "x", "i3d", "logits", CLEAN.pixels, "", frames=4, stride_real=stride, shortest=shortest
    )
    for frames in range(40):
        fits = [start for start in range(frames) if start + 3 * stride < frames]
        if shortest == "frames x stride" and frames < 4 * stride:
            fits = []
        assert protocol.starts("real", frames) == len(fits)


def test_any_change_changes_the_name():
    changed = nonstandard(CLEAN, clips=100)
    assert (changed.name, changed.clips, changed.standard, CLEAN.standard) == (
        "clean-nonstandard",
        100,
        False,
        True,
    )
    assert nonstandard(CLEAN, clips=2048) is CLEAN
    assert nonstandard(changed, clips=50).name == "clean-nonstandard"


def test_a_protocol_is_frozen():
    with pytest.raises(FrozenInstanceError):
        CLEAN.clips = 3


def test_unknown_names_and_missing_detectors_are_refused(monkeypatch):
    with pytest.raises(InputError, match="did you mean 'latte-paper'"):
        find_protocol("late-paper")
    monkeypatch.delitem(protocols.DETECTORS, "i3d400")
    with pytest.raises(InputError, match="i3d400"):
        find_protocol("tats")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start_real": "middle"}, "start_real"),
        ({"order": "random"}, "order"),
        ({"metrics": ("fdv",)}, "did you mean 'fvd'"),
        ({"stride_fake": 0}, "strides"),
        ({"clips": 1}, "clips must be at least 2"),
        ({"shortest": "long"}, "shortest"),
    ],
)
def test_impossible_protocols_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        replace(CLEAN, **changes)
    with pytest.raises(InputError, match=r"frame\.order"):
        FrameRule(256, "resize")


def test_only_published_protocols_give_an_fvd():
    assert PROTOCOLS["latte-paper"].title("fvd") == "FVD (latte-paper)"
    assert PROTOCOLS["styleganv-isv2048-ucf"].title("is") == "Inception Score (styleganv-isv2048-ucf)"
    assert PROTOCOLS["clean"].title("fvd") == "Frechet distance of clip features (clean)"
    changed = nonstandard(PROTOCOLS["latte-paper"], clips=64)
    assert changed.title("fvd") == "Frechet distance of clip features (latte-paper-nonstandard)"
    assert set(protocols.PUBLISHED) <= set(PROTOCOLS)
