# SPDX-License-Identifier: Apache-2.0
"""Previews: the linear map finds the colours of a codec, and a callback gets the estimate of each step."""

import numpy as np
import pytest
import torch

from latte.autoencoder.codec import CodecConfig, build_codec
from latte.checks import InputError
from latte.data.base import DataConfig
from latte.data.clips import to_float
from latte.data.procedural import ShapeScenes
from latte.inference import preview
from latte.inference.preview import fit_preview, preview_of
from tiny import tiny_trained


@pytest.mark.parametrize("name", ["builtin", "builtin_temporal", "builtin_clip"])
def test_the_preview_of_a_codec_shows_the_colours_of_its_clips(name):
    codec = build_codec(CodecConfig(name=name))
    frames = codec.frames(3)
    clip = ShapeScenes(DataConfig(kind="procedural", resolution=64, frames=frames, seed=3)).render_clip(1)
    z = codec.encode(to_float(clip)[None])
    shown = preview_of(codec)(z)[0]
    assert shown.shape == (3, 32, 32, 3)
    spans = [codec.compression.span(frame) for frame in range(3)]
    expected = np.stack([clip[list(span)].mean(0).reshape(32, 2, 32, 2, 3).mean((1, 3)) for span in spans])
    rest = np.square(shown - expected).mean()
    assert rest < 0.35 * np.square(expected - expected.mean((0, 1, 2))).mean(), "most of the variance"
    assert preview_of(codec) is preview_of(codec)


def test_of_pixels_the_preview_is_the_clip():
    codec = build_codec(CodecConfig(name="pixels"))
    z = torch.rand(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    expected = np.asarray((z.movedim(2, -1) + 1) * 127.5)
    assert np.abs(fit_preview(codec)(z) - expected).max() <= 2


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 2.0, "sampler": "dpmpp", "cache": 0.3}])
def test_the_callback_gets_a_preview_of_each_step_and_the_last_is_the_clip(settings):
    pipe = tiny_trained()
    seen = []
    call = {"class_labels": ["up", "down", "left"], "seed": 0, "num_inference_steps": 4, **settings}

    def look(_, step, timestep, shown):
        seen.append(shown["preview"])

    frames = pipe(**call, callback_on_step_end=look, preview=True, output_type="uint8").frames
    assert [len(shown) for shown in seen] == [2] * 4 + [1] * 4, "two batches"
    last = np.concatenate([seen[3], seen[7]])
    assert last.shape == frames.shape
    assert np.abs(last.astype(int) - frames).max() <= 8, "pixels are their own preview"
    assert np.array_equal(frames, pipe(**call, output_type="uint8").frames)


def test_what_a_preview_cannot_show_is_refused():
    pipe = tiny_trained()
    with pytest.raises(InputError, match="there is no callback_on_step_end"):
        pipe(class_labels="up", seed=0, preview=True)
    with pytest.raises(InputError, match="with window 2 the model sees a part"):
        pipe(
            class_labels="up",
            seed=0,
            num_frames=4,
            window=2,
            preview=True,
            callback_on_step_end=lambda *_: None,
        )


def test_the_map_is_solved_once_per_codec(monkeypatch):
    calls = []
    monkeypatch.setattr(preview, "_fitted", {})
    monkeypatch.setattr(preview, "fit_preview", lambda codec: calls.append(codec) or "map")
    codec = build_codec(CodecConfig(name="pixels"))
    assert [preview.preview_of(codec), preview.preview_of(codec)] == ["map", "map"]
    assert calls == [codec]
