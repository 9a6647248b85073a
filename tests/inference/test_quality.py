# SPDX-License-Identifier: Apache-2.0
"""Qualities: what each decides, what stays the model's own, and which settings exclude each other."""

from dataclasses import replace

import numpy as np
import pytest

from latte.checks import InputError
from latte.diffusion.config import DiffusionConfig
from latte.diffusion.process import PREDICTIONS
from latte.diffusion.samplers import SAMPLERS
from latte.inference.generate import SampleConfig
from latte.inference.quality import DECIDED, QUALITIES, choose_settings
from tiny import tiny_trained

OWN = SampleConfig(
    "dpmpp", 30, guidance=3.0, batch=7, fps=5.0, order=3, guidance_interval=(0.2, 9.0), cache=0.2
)


def test_paper_is_the_setting_of_the_paper_and_keeps_the_guidance_of_the_model():
    found = choose_settings(OWN, "epsilon", "paper", {})
    assert found == SampleConfig("ddpm", 250, guidance=3.0, batch=7, fps=5.0)
    assert choose_settings(OWN, "flow", "paper", {}).sampler == "flow"


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", QUALITIES)
def test_every_quality_fits_every_prediction(name, prediction):
    found = choose_settings(OWN, prediction, name, {})
    assert prediction in SAMPLERS[found.sampler].predictions


def test_without_guidance_there_is_no_interval():
    guided = choose_settings(OWN, "v", "fast", {"guidance": 2.0})
    assert (guided.guidance, guided.guidance_interval) == (2.0, QUALITIES["fast"].guidance_interval)
    assert choose_settings(OWN, "v", "fast", {"guidance": 1.0}).guidance_interval is None
    assert choose_settings(replace(OWN, guidance=1, guidance_interval=None), "v", "fast", {}).guidance == 1


def test_without_a_quality_the_settings_are_the_models_with_the_changes():
    assert choose_settings(OWN, "v", None, {"steps": None}) == OWN
    assert choose_settings(OWN, "v", None, {"steps": 9}) == replace(OWN, steps=9)


@pytest.mark.parametrize(("key", "value"), [("sampler", "ddim"), ("steps", 5), ("eta", 0.0), ("cache", 0.1)])
def test_a_quality_and_what_it_decides_exclude_each_other(key, value):
    with pytest.raises(InputError) as caught:
        choose_settings(OWN, "v", "high", {key: value})
    message = str(caught.value)
    assert "--quality high" in message
    assert f"{DECIDED[key]} {value}" in message
    assert "\n" not in message


def test_an_unknown_quality_names_the_known_ones():
    with pytest.raises(InputError, match="fast, high, paper"):
        choose_settings(OWN, "v", "best", {})


def test_the_call_of_a_pipeline_takes_a_quality():
    pipe = tiny_trained()
    pipe.diffusion = DiffusionConfig(objective="v")
    counts = []
    pipe.model.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    call = {"class_labels": "up", "seed": 3, "guidance_scale": 2.0, "output_type": "uint8"}
    fast = pipe(quality="fast", **call).frames
    assert counts == [2] * 8 + [1] * 2, "18 evaluations"
    plain = pipe(sampler="unipc", num_inference_steps=10, guidance_interval=(1.0, 200.0), **call).frames
    assert np.array_equal(fast, plain)
    with pytest.raises(InputError, match=r"--quality fast .* --steps 5 was given too"):
        pipe(quality="fast", num_inference_steps=5, **call)
