# SPDX-License-Identifier: Apache-2.0
"""A seed is a clip, in any batch; labels and sizes that the model does not know are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import latte.inference.generate
from latte.checks import InputError
from latte.diffusion.long_video import CHAIN_STRENGTH, LONG_VIDEO_METHODS
from latte.diffusion.samplers import SAMPLERS
from latte.inference.generate import SampleConfig, changed
from tiny import tiny_trained


@pytest.fixture(scope="module")
def trained():
    return tiny_trained()


def draw(trained, seeds, labels=None, **options):
    """Seed -> clip."""
    return dict(trained.generate(seeds, labels, **options))


def far(a, b):
    """Largest difference of two uint8 clips, in levels."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "flow"])
def test_the_clip_of_a_seed_does_not_depend_on_its_batch(trained, sampler):
    seeds, labels = [3, 1, 4, 15, 9], [0, 1, 2, 3, 0]
    config = SampleConfig(sampler=sampler, steps=4, guidance=2.0)
    alone = {
        seed: draw(trained, [seed], [label], config=config)[seed]
        for seed, label in zip(seeds, labels, strict=True)
    }
    for batch in (2, 5):
        together = draw(trained, seeds, labels, config=replace(config, batch=batch))
        assert list(together) == seeds
        assert max(far(together[seed], alone[seed]) for seed in seeds) <= 1
    assert min(far(alone[3], alone[seed]) for seed in seeds[1:]) > 20, (
        "other seeds must give other clips, or the test is empty"
    )


def test_clips_are_uint8_frames_channels_last_of_the_models_size_or_the_one_asked_for(trained):
    clip = draw(trained, [0], [1])[0]
    assert (clip.shape, clip.dtype) == ((3, 16, 16, 3), np.uint8)
    assert draw(trained, [0], [1], frames=2, size=(8, 12))[0].shape == (2, 8, 12, 3)


def test_labels_change_the_clip_and_none_is_the_null_class(trained):
    by_label = [draw(trained, [0], [label])[0] for label in (0, 1, -1)]
    assert far(by_label[0], by_label[1]) > 0
    assert far(draw(trained, [0])[0], by_label[2]) == 0


def test_guidance_one_is_the_model_without_guidance_and_more_is_not(trained):
    plain = draw(trained, [0], [1], config=SampleConfig(steps=3, sampler="ddim"))
    assert (
        far(plain[0], draw(trained, [0], [1], config=SampleConfig(steps=3, sampler="ddim", guidance=1.0))[0])
        == 0
    )
    assert (
        far(plain[0], draw(trained, [0], [1], config=SampleConfig(steps=3, sampler="ddim", guidance=5.0))[0])
        > 0
    )


def test_progress_counts_all_steps_of_all_batches_once(trained):
    seen = []
    draw(trained, [0, 1, 2], [0, 0, 0], progress=lambda done, of: seen.append((done, of)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_bf16_is_close_to_fp32_and_not_the_same(trained):
    config = SampleConfig(sampler="ddim", steps=3)
    full, half = (
        draw(trained, [0], [1], config=config, dtype=dtype)[0] for dtype in (torch.float32, torch.bfloat16)
    )
    assert 0 < np.abs(full.astype(float) - half.astype(float)).mean() < 5


@pytest.mark.parametrize("label", [4, -2, 99])
def test_a_label_out_of_range_is_an_error_with_the_range(label):
    from latte.inference.generate import check_labels

    with pytest.raises(InputError, match=rf"label {label} is out of range.*0 to 3"):
        check_labels(tiny_trained().model, [label], 1)


def test_names_and_numbers_of_classes_are_labels_and_others_are_errors(trained):
    assert [trained.label(word) for word in ("left", "3", 0, "none", -1)] == [2, 3, 0, -1, -1]
    with pytest.raises(InputError, match=r"sidewise.*up, down, left, right"):
        trained.label("sidewise")
    with pytest.raises(InputError, match=r"did you mean 'right'"):
        trained.label("rigth")
    for word in ("4", -2, "99"):
        with pytest.raises(InputError, match="0 to 3"):
            trained.label(word)
    assert [trained.class_name(label) for label in (2, -1)] == ["left", "none"]


def test_an_unconditional_model_takes_no_labels_and_no_guidance():
    trained = tiny_trained(num_classes=None)
    assert draw(trained, [5])[5].shape == (3, 16, 16, 3)
    with pytest.raises(InputError, match="unconditional"):
        trained.label("up")
    with pytest.raises(InputError, match="guidance"):
        draw(trained, [0], config=SampleConfig(guidance=2.0, steps=3))


@pytest.mark.parametrize("size", [(16, 10), (0, 16), (-4, 4)])
def test_a_size_that_patches_do_not_divide_is_an_error_with_the_nearest(trained, size):
    with pytest.raises(InputError, match="nearest multiple"):
        draw(trained, [0], [0], size=size)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sampler", "ddmp"), ("steps", 0), ("guidance", -1.0), ("eta", 2.0), ("batch", 0), ("fps", 0.0)],
)
def test_impossible_settings_are_refused(key, value):
    with pytest.raises(InputError, match=f"sample.{key}"):
        SampleConfig(**{key: value})


def test_more_steps_than_the_process_has_are_refused(trained):
    with pytest.raises(InputError, match="1000"):
        draw(trained, [0], [0], config=SampleConfig(steps=1001))


def test_a_window_as_long_as_the_clip_changes_nothing_and_shorter_ones_are_not(trained):
    plain = draw(trained, [0], [1])[0]
    assert far(plain, draw(trained, [0], [1], window=3)[0]) == 0
    longer = draw(trained, [0], [1], frames=7, window=3)[0]
    assert longer.shape == (7, 16, 16, 3), (
        "and no warning about the table of positions, because the model sees three frames at a time"
    )
    assert far(plain, draw(trained, [0], [1], window=2)[0]) > 0


@pytest.mark.parametrize("longer", LONG_VIDEO_METHODS)
def test_a_longer_clip_does_not_depend_on_its_batch_and_counts_its_steps(trained, longer):
    seeds, labels, steps = [3, 1, 4], [0, 1, 2], []
    options = {
        "frames": 7,
        "window": 3,
        "overlap": 1,
        "longer": longer,
        "conditioning_frames": {0: np.full((16, 16, 3), 200, np.uint8)},
    }
    config = SampleConfig(sampler="ddim", steps=3, guidance=2.0, batch=3)
    together = draw(
        trained, seeds, labels, config=config, progress=lambda done, of: steps.append((done, of)), **options
    )
    assert {clip.shape for clip in together.values()} == {(7, 16, 16, 3)}
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]
    alone = {
        seed: draw(trained, [seed], [label], config=config, **options)[seed]
        for seed, label in zip(seeds, labels, strict=True)
    }
    assert max(far(together[seed], alone[seed]) for seed in seeds) <= 1
    assert min(far(alone[3][1:], alone[seed][1:]) for seed in seeds[1:]) > 20


def test_an_unknown_method_for_longer_clips_is_an_error_that_lists_them(trained):
    with pytest.raises(InputError, match=r"longer is 'chain', which is not one of .*did you mean 'chained'"):
        draw(trained, [0], [1], frames=7, window=3, longer="chain")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp"])
def test_conditioning_frames_are_in_the_clip_and_change_the_others(trained, sampler):
    config = SampleConfig(sampler=sampler, steps=4)
    first, last = (np.full((16, 16, 3), level, np.uint8) for level in (200, 40))
    plain = draw(trained, [0, 1], [1, 2], config=config)
    given = draw(trained, [0, 1], [1, 2], config=config, conditioning_frames={0: first, -1: last})
    for seed in (0, 1):
        assert far(given[seed][0], first) == far(given[seed][2], last) == 0, "pixels as latents: equal"
    assert max(far(given[seed][1], plain[seed][1]) for seed in (0, 1)) > 0


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_the_strength_of_conditioning_frames_is_passed_on(trained, monkeypatch, strength):
    asked = []
    monkeypatch.setattr(
        latte.inference.generate,
        "condition_on_frames",
        lambda denoise, process, known, mask, strength: asked.append(strength) or denoise,
    )
    options = {
        "frames": 5,
        "window": 3,
        "longer": "chained",
        "conditioning_frames": {0: np.zeros((16, 16, 3), np.uint8)},
    }
    draw(trained, [0], [1], conditioning_strength=strength, **options)
    assert asked == [strength, CHAIN_STRENGTH * strength], (
        "of a chain, the later windows are given many frames"
    )


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ({3: (16, 16)}, "conditioning frame 3 is out of range"),
        ({-4: (16, 16)}, "conditioning frame -4 is out of range"),
        ({0: (8, 16)}, "conditioning frame 0 has the size"),
    ],
)
def test_conditioning_frames_that_do_not_fit_are_refused(trained, frames, message):
    pictures = {frame: np.zeros((*size, 3), np.uint8) for frame, size in frames.items()}
    with pytest.raises(InputError, match=message):
        draw(trained, [0], [1], conditioning_frames=pictures)


@pytest.fixture
def rows(trained):
    """Number of clips in each call of the model."""
    found = []
    handle = trained.model.register_forward_pre_hook(lambda _, inputs: found.append(len(inputs[0])))
    yield found
    handle.remove()


def test_outside_the_guidance_interval_the_null_half_is_not_computed(trained, rows):
    config = SampleConfig(sampler="ddim", steps=10, guidance=3.0)
    everywhere = draw(trained, [0], [1], config=config)[0]
    assert rows == [2] * 10
    rows.clear()
    inside = draw(trained, [0], [1], config=replace(config, guidance_interval=(0.3, 5.0)))[0]
    assert set(rows) == {1, 2}
    assert len(rows) == 10
    assert rows == sorted(rows[:5]) + sorted(rows[5:], reverse=True), "one stretch in the middle"
    assert far(inside, everywhere) > 0
    rows.clear()
    whole = draw(trained, [0], [1], config=replace(config, guidance_interval=(0.0, 1e6)))[0]
    assert far(whole, everywhere) == 0
    assert rows == [2] * 10


def test_the_step_cache_saves_evaluations_and_logs_them(trained, rows, caplog):
    config = SampleConfig(sampler="dpmpp", steps=12, guidance=2.0, batch=2)
    plain = draw(trained, [0, 1, 2], [1, 2, 3], config=config)
    computed = sum(rows)
    rows.clear()
    with caplog.at_level("INFO", "latte"):
        cached = draw(trained, [0, 1, 2], [1, 2, 3], config=replace(config, cache=0.3))
    assert computed == 3 * 2 * 12
    assert sum(rows) < 0.9 * computed
    assert f"step cache: {sum(rows)} of {computed} evaluations" in caplog.text
    assert max(far(cached[seed], plain[seed]) for seed in cached) > 0
    alone = draw(trained, [1], [2], config=replace(config, cache=0.3))[1]
    assert far(alone, cached[1]) <= 1


def test_the_step_cache_is_refused_beside_frame_guidance(trained):
    config = SampleConfig(sampler="ddim", steps=6, cache=0.1)
    image = {0: np.zeros((16, 16, 3), np.uint8)}
    for options in ({"conditioning_frames": image}, {"frames": 5, "window": 2, "longer": "chained"}):
        with pytest.raises(InputError, match=r"cache is 0\.1, but conditioning frames guide the others"):
            draw(trained, [0], [1], config=config, **options)
        draw(trained, [0], [1], config=config, conditioning_strength=0.0, **options)
    draw(trained, [0], [1], config=config, frames=5, window=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3, "sampler": "ddim"}, "sample.order is 3, but sampler ddim has no choice"),
        ({"order": 5, "sampler": "dpmpp"}, "sample.order is 5, but sampler dpmpp has the orders 1, 2, 3"),
        ({"guidance_interval": (5.0, 0.3)}, r"sample.guidance_interval is \[5.0, 0.3\]"),
        ({"cache": 2.0}, "sample.cache is 2.0, but must be above 0 and at most 1"),
    ],
)
def test_settings_of_the_solvers_are_checked_at_once(options, message):
    with pytest.raises(InputError, match=message):
        SampleConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": 0.1, "steps": 1}, "cache needs at least 4 steps"),
        ({"guidance_interval": (900.0, 901.0), "guidance": 2.0}, "none of the 250 noise levels"),
    ],
)
def test_settings_that_do_not_fit_the_steps_are_refused_before_the_first_clip(trained, options, message):
    with pytest.raises(InputError, match=message):
        trained.generate([0], [1], config=SampleConfig(**options))


def test_an_interval_without_guidance_is_refused_and_another_sampler_has_its_own_order():
    config = SampleConfig(sampler="dpmpp", order=3)
    assert changed(config, sampler="ddim").order is None
    assert changed(config, sampler="unipc", order=1).order == 1
    with pytest.raises(InputError, match=r"guidance_interval is \[0.3, 5.0\], but guidance is 1"):
        changed(config, guidance_interval=(0.3, 5.0))
    with pytest.raises(InputError, match="but guidance is 1"):
        SampleConfig(guidance_interval=(0.3, 5.0))
    stored = SampleConfig(guidance=2.0, guidance_interval=(0.3, 5.0))
    assert changed(stored, guidance=1.0) == SampleConfig(), "without guidance there is no interval"
    assert changed(config, guidance_interval=(0.3, 5.0), guidance=2.0).guidance_interval == (0.3, 5.0)


def test_a_record_holds_optional_settings_only_when_they_are_set():
    keys = {"sampler", "steps", "guidance", "eta", "batch", "fps"}
    assert set(SampleConfig().recorded()) == keys
    chosen = SampleConfig(sampler="unipc", order=3, guidance_interval=(0.3, 5.0), cache=0.1, guidance=2.0)
    assert set(chosen.recorded()) == keys | {"order", "guidance_interval", "cache"}
