# SPDX-License-Identifier: Apache-2.0
"""The plan is a function of the videos, the protocol and the seed; what cannot be measured honestly is
refused.
"""

import hashlib
import json
from dataclasses import replace
from random import Random

import pytest

from latte.checks import InputError
from latte.evaluation.plan import Source, make_plan, traits
from latte.evaluation.protocols import FrameRule
from tiny_detector import TINY

REAL = tuple(Source(f"sky/{i:03d}.mp4", 10 + i, f"r{i}", 25.0, "h264") for i in range(20))
FAKE = tuple(Source(f"{i:03d}.mp4", 9, f"f{i}", 25.0, "h264") for i in range(20))
BOTH = {"real": REAL, "fake": FAKE}


def test_the_bytes_are_the_same_for_every_order_of_listing():
    texts = set()
    for seed in range(12):
        shuffled = {side: Random(seed).sample(sources, len(sources)) for side, sources in BOTH.items()}
        texts.add(make_plan(TINY, shuffled).text)
    assert len(texts) == 1
    assert make_plan(TINY, BOTH, seed=1).text not in texts


def test_choice_and_start_are_hashes_of_seed_and_name():
    plan = make_plan(TINY, BOTH, seed=5)

    def value(*key):
        return int(hashlib.sha256(json.dumps([5, *key]).encode()).hexdigest(), 16)

    expected = sorted((s.id for s in REAL), key=lambda id: value(id))[: TINY.clips]
    assert [clip.id for clip in plan.side("real")] == expected
    frames = {s.id: s.frames for s in REAL}
    assert [clip.start for clip in plan.side("real")] == [
        value("start", id) % (frames[id] - 3) for id in expected
    ]
    assert all(clip.indices == list(range(clip.start, clip.start + 4)) for clip in plan.clips)


def test_every_start_occurs_and_none_beyond_the_end():
    plans = [make_plan(replace(TINY, stride_real=2), BOTH, seed=seed) for seed in range(60)]
    starts = [clip.start for plan in plans for clip in plan.side("real") if clip.id == "sky/003.mp4"]
    assert set(starts) == set(range(13 - 6)), len(starts)


def test_another_video_moves_no_other_clip():
    before = {clip.id: clip.start for clip in make_plan(TINY, BOTH).clips}
    more = {**BOTH, "real": (*REAL, Source("new.mp4", 50, "new", 25.0, "h264"))}
    after = {clip.id: clip.start for clip in make_plan(TINY, more).clips}
    assert {id: start for id, start in after.items() if id in before} == {
        id: start for id, start in before.items() if id in after
    }
    assert len(set(before) ^ set(after)) <= 2


def test_by_path_takes_the_first_and_starts_at_the_first_frame_if_requested():
    plan = make_plan(replace(TINY, order="path", start_real="first"), {**BOTH, "real": REAL[::-1]})
    assert [(clip.id, clip.start) for clip in plan.side("real")] == [(s.id, 0) for s in REAL[:6]]


def test_sides_have_their_own_stride():
    plan = make_plan(replace(TINY, stride_real=3), BOTH)
    assert {clip.stride for clip in plan.side("real")} == {3}
    assert {clip.stride for clip in plan.side("fake")} == {1}


@pytest.mark.parametrize(
    ("stride", "shortest", "kept"),
    [(1, "span", 10), (2, "span", 7), (3, "span", 4), (3, "frames x stride", 2)],
)
def test_short_real_videos_are_listed_never_lost(stride, shortest, kept):
    tree = tuple(Source(f"{n:02d}", n, f"c{n}", 25.0, "h264") for n in range(1, 14))
    protocol = replace(TINY, clips=2, stride_real=stride, shortest=shortest)
    plan = make_plan(protocol, {**BOTH, "real": tree})
    needed = 4 * stride if shortest != "span" else 3 * stride + 1
    assert [bad["id"] for bad in plan.dropped] == [s.id for s in tree if s.frames < needed]
    assert len(tree) - len(plan.dropped) == kept
    assert all(f"{needed} are needed" in bad["reason"] for bad in plan.dropped)


def test_broken_real_videos_are_listed_with_their_reasons():
    broken = ({"side": "real", "id": "bad.mp4", "reason": "damaged: no frame"},)
    assert make_plan(TINY, BOTH, broken=broken).dropped == broken


REFUSALS = {
    "fewer real than asked": ({"real": REAL[:5]}, "real has 5 and fake 20"),
    "fewer fake than asked": ({"fake": FAKE[:5]}, "real has 20 and fake 5"),
    "same id twice": ({"real": (*REAL, replace(REAL[0], sha256="other"))}, "occurs twice"),
    "same real content twice": ({"real": (*REAL, replace(REAL[0], id="copy.mp4"))}, "same content"),
    "same fake content twice": ({"fake": (*FAKE, replace(FAKE[0], id="copy.mp4"))}, "same content"),
    "overlapping": ({"fake": (*FAKE, replace(REAL[3], id="mine.mp4"))}, "overlap in 1 videos"),
    "identical": ({"fake": REAL}, "overlap in 20 videos"),
    "short fake": (
        {"fake": (*FAKE, Source("s.mp4", 3, "s", 25.0, "h264"))},
        "'s.mp4' has 3 frames, 4 are needed",
    ),
    "other codec": (
        {"fake": tuple(replace(s, codec="images") for s in FAKE)},
        "codecs differ: real h264 and fake images",
    ),
    "other rate": (
        {"fake": tuple(replace(s, fps=8.0) for s in FAKE)},
        "frame rates differ: real 25 and fake 8",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_measured_is_refused_in_one_line(name):
    changes, message = REFUSALS[name]
    with pytest.raises(InputError, match=message) as refused:
        make_plan(TINY, {**BOTH, **changes})
    assert "\n" not in str(refused.value)


SIZE = {"height": 64, "width": 48}


def test_frame_sizes_must_agree_unless_they_are_unknown():
    sized = {side: tuple(replace(s, **SIZE) for s in sources) for side, sources in BOTH.items()}
    assert make_plan(TINY, sized).text == make_plan(TINY, BOTH).text
    make_plan(TINY, {**BOTH, "real": sized["real"]})  # unknown on one side
    larger = {**sized, "fake": tuple(replace(s, height=128) for s in sized["fake"])}
    with pytest.raises(InputError, match="frame sizes differ: real 48x64 and fake 48x128"):
        make_plan(TINY, larger)
    assert make_plan(TINY, larger, allow_mixed=True).text == make_plan(TINY, BOTH).text


@pytest.mark.parametrize(
    ("real", "fake", "allowed"),
    [((720, 1280), (256, 256), True), ((720, 1280), (300, 256), True), ((720, 1280), (64, 64), False)],
)
def test_a_protocol_that_resizes_accepts_sizes_that_it_does_not_upscale(real, fake, allowed):
    protocol = replace(TINY, frame=FrameRule(256))
    size = {"real": real, "fake": fake}
    sized = {
        side: tuple(replace(s, height=size[side][0], width=size[side][1]) for s in sources)
        for side, sources in BOTH.items()
    }
    if allowed:
        assert len(make_plan(protocol, sized).clips) == 12
    else:
        with pytest.raises(InputError, match="real 256x256 and fake 64x64"):
            make_plan(protocol, sized)


def test_a_model_of_another_frame_interval_is_refused_with_protocols_that_fit():
    fake = tuple(replace(s, interval=3) for s in FAKE)
    with pytest.raises(InputError, match=r"on every 3rd frame, .* with that stride \(latte-paper, "):
        make_plan(TINY, {**BOTH, "fake": fake})
    assert make_plan(TINY, {**BOTH, "fake": fake}, allow_mixed=True).text == make_plan(TINY, BOTH).text
    assert len(make_plan(replace(TINY, stride_real=3), {**BOTH, "fake": fake}).clips) == 12
    with pytest.raises(InputError, match=r"on every 5th frame, .* prepare real clips of that speed"):
        make_plan(TINY, {**BOTH, "fake": tuple(replace(s, interval=5) for s in FAKE)})


def test_a_fake_that_cannot_be_read_is_refused():
    with pytest.raises(InputError, match=r"cannot be read, first 'x\.mp4'"):
        make_plan(TINY, BOTH, broken=({"side": "fake", "id": "x.mp4", "reason": "damaged: y"},))


def test_fewer_is_allowed_under_another_name_with_equal_counts():
    plan = make_plan(TINY, {**BOTH, "fake": FAKE[:5]}, allow_fewer=True)
    assert (plan.protocol.name, len(plan.side("real")), len(plan.side("fake"))) == ("tiny-nonstandard", 5, 5)
    assert make_plan(TINY, BOTH, allow_fewer=True).protocol is TINY
    with pytest.raises(InputError, match="takes 6 clips"):
        make_plan(TINY, {**BOTH, "fake": FAKE[:1]}, allow_fewer=True)


def test_mixed_sides_can_be_allowed_and_are_reported():
    mixed = (*(replace(s, fps=8.0) for s in FAKE[:12]), *(replace(s, codec="mpeg4") for s in FAKE[12:]))
    assert make_plan(TINY, {**BOTH, "fake": mixed}, allow_mixed=True).protocol is TINY
    assert traits(mixed) == {"codec": {"h264": 12, "mpeg4": 8}, "fps": {"25": 8, "8": 12}}
