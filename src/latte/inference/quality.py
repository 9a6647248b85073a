# SPDX-License-Identifier: Apache-2.0
"""Sampling settings by one word, ``latte sample --quality``, and those that a model or a call demands.

To add a quality: one entry in QUALITIES. Its cost and its distance to the 250 steps of the paper are measured
by ``benchmarks/sample_quality.py`` and stand in docs/sampling.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from latte.checks import InputError, choose
from latte.inference.config import SampleConfig, changed

# Settings that a quality decides, by their name here -> the option of latte sample.
DECIDED = {
    "sampler": "--sampler",
    "steps": "--steps",
    "order": "--order",
    "eta": "--eta",
    "guidance_interval": "--guidance-interval",
    "cache": "--cache",
}


@dataclass(frozen=True)
class Quality:
    """What a quality decides; batch, frame rate and guidance scale stay the model's own."""

    sampler: str
    steps: int
    guidance_interval: tuple[float, float] | None = None  # where guidance has a scale
    straight_sampler: str | None = None  # for rectified flow, None: the same


QUALITIES = {
    "fast": Quality("unipc", 10, (1.0, 200.0)),  # without guidance in heavy noise clips come out empty
    "high": Quality("unipc", 20),
    "paper": Quality("ddpm", 250, straight_sampler="flow"),  # Latte, Sec. 4.1
}


def choose_settings(
    own: SampleConfig, prediction: str, quality: str | None, changes: Mapping[str, Any]
) -> SampleConfig:
    """Return the model's ``own`` settings with ``quality``, a key of QUALITIES or None, and ``changes``.

    ``prediction`` is what the model's output means, a key of PREDICTIONS. Changes to None are left out.
    InputError for an unknown quality, and for a change of something that the quality decides.
    """
    if quality is None:
        return changed(own, **changes)
    entry = choose("quality", quality, QUALITIES)
    sampler = entry.sampler
    from latte.diffusion.process import PREDICTIONS  # torch, for the help not needed

    if PREDICTIONS[prediction].straight_path and entry.straight_sampler:
        sampler = entry.straight_sampler
    for key, option in DECIDED.items():
        if changes.get(key) is not None:
            raise InputError(
                f"--quality {quality} (quality=) is {sampler} with {entry.steps} steps, but {option} "
                f"{changes[key]} was given too; leave one of the two out"
            )
    kept = {key: value for key, value in changes.items() if key not in DECIDED and value is not None}
    guidance = kept.get("guidance", own.guidance)
    interval = None if guidance == 1 else entry.guidance_interval
    decided = {"sampler": sampler, "steps": entry.steps, "order": None, "eta": 0.0, "cache": None}
    return replace(own, **decided, guidance_interval=interval, **kept)
