# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance as a wrapper around a model that is itself a denoise function: no sampler knows
about it.

A condition is the model's own keywords, such as {"label": (b,)} or {"text": (b l k), "mask": (b l)}; it
passes through here without being looked at (Ho & Salimans 2022, eq. 6; Latte, Sec. 4.1).
Axes: b batch, f frames, c channels, h height, w width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from latte.checks import InputError, check, choose
from latte.diffusion.config import check_guidance, check_interval
from latte.diffusion.process import DenoiseFunction, NoisePath

Model = Callable[..., Tensor]
"""(z, original timesteps (b,), **condition) -> (b f c|2c h w), such as ``latte.model.denoiser.Denoiser``."""
Condition = Mapping[str, Tensor]
"""Keyword of the model -> tensor (b ...). Empty for an unconditional model."""


def conditional(model: Model, condition: Condition) -> DenoiseFunction:
    """Return ``model`` with its condition bound."""
    return lambda z, t: model(z, t, **condition)


def guided(
    model: Model, condition: Condition, null: Condition, scale: float, window: tuple[int, int] | None = None
) -> DenoiseFunction:
    """Return the denoise function u + scale (c - u): c is the model under ``condition``, u under ``null``.

    Both hold the same keywords with tensors of the same shapes: a caption and its negative prompt are padded
    to one length, with a mask. One call of the model on 2b clips, the conditional half first, combined in the
    precision of z. Only the prediction's channels are guided; variance channels are those of the conditional
    half. Scale 1 is the conditional model without guidance: one pass of b clips. ``window`` (first, last)
    guides only the original timesteps inside it, both ends included (Kynkaanniemi et al. 2024). InputError
    for a scale outside 0..MAX_GUIDANCE, a reversed window, an empty condition at any scale but 1, and
    conditions that do not match.
    """
    check_guidance(scale, window)
    plain = conditional(model, condition)
    if scale == 1:
        return plain
    if not condition:
        raise InputError(
            f"guidance is {scale}, but an unconditional model has no condition to be guided by; use guidance "
            "1, or give labels"
        )
    check_same_shapes(condition, null)
    joint = {key: torch.cat([condition[key], null[key]]) for key in condition}  # (2b ...)

    def both(z: Tensor, t: Tensor) -> Tensor:
        output = model(torch.cat([z, z]), torch.cat([t, t]), **joint).to(z.dtype)  # (2b f c|2c h w)
        with_condition, without = output.chunk(2)
        channels = z.shape[2]
        c = with_condition[:, :, :channels]
        u = without[:, :, :channels]
        return torch.cat([u + scale * (c - u), with_condition[:, :, channels:]], dim=2)  # (b f c|2c h w)

    if window is None:
        return both

    def inside_window(z: Tensor, t: Tensor) -> Tensor:
        inside = (t >= window[0]) & (t <= window[1])
        if not inside.any():
            return plain(z, t)
        if inside.all():
            return both(z, t)
        return torch.where(inside.view(-1, *[1] * (z.ndim - 1)), both(z, t), plain(z, t))

    return inside_window


def guidance_window(
    process: NoisePath, interval: Sequence[float] | None, visited: Sequence[int] | None = None
) -> tuple[int, int] | None:
    """Return the (first, last) timestep whose noise level is in ``interval``, None without one.

    The noise level is sigma = noise / signal (Karras et al. 2022), the unit of Kynkaanniemi et al. 2024. The
    pure noise of rectified flow is in no interval. InputError when no timestep is inside, or none
    of those ``visited``.
    """
    check_interval(interval)
    if interval is None:
        return None
    sigma = process.noise / process.signal
    inside = (interval[0] <= sigma) & (sigma <= interval[1])
    timesteps = torch.tensor(range(process.num_steps) if visited is None else sorted(visited))
    levels = sigma[timesteps]
    check(
        bool(inside[timesteps].any()),
        f"guidance_interval is {list(interval)}, but none of the {len(levels)} noise levels from "
        f"{levels[0]:.3g} to {levels[-1]:.3g} is inside, so nothing would be guided; widen it",
    )
    guided_timesteps = inside.nonzero().flatten().tolist()
    return guided_timesteps[0], guided_timesteps[-1]


def check_same_shapes(condition: Condition, null: Condition) -> None:
    """Raise InputError unless the null condition has the condition's keywords and shapes."""
    shapes = {key: tuple(tensor.shape) for key, tensor in condition.items()}
    null_shapes = {key: tuple(tensor.shape) for key, tensor in null.items()}
    check(
        shapes == null_shapes,
        f"the null condition has shapes {null_shapes}, but the condition has {shapes}; pad both to one "
        "length",
    )


# What the model predicts -> the sampler whose steps the student learns: z_t' = signal' z_0 + noise' eps.
STUDENT_SAMPLERS = {"v": "euler", "flow": "flow"}


class Settings(Protocol):
    """The part of a SampleConfig that a student has no choice of."""

    @property
    def sampler(self) -> str: ...
    @property
    def steps(self) -> int | str: ...
    @property
    def guidance(self) -> float: ...


@dataclass(frozen=True)
class Distilled:
    """Record of a student: it knows ``steps`` noise levels alone, and guides without a second evaluation.

    InputError on construction for a value out of range.
    """

    steps: int  # of the student, trailing timesteps
    guidance: float  # scale of the teacher's guidance that its outputs contain
    teacher: str  # hash of the teacher's weights

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check(self.steps >= 1, f"distilled.steps must be at least 1, got {self.steps}")
        check_guidance(self.guidance, field="distilled.guidance")

    def check_settings(self, prediction: str, settings: Settings) -> None:
        """Raise InputError, one line, unless ``settings`` are those that the student was trained for.

        ``prediction`` is what its output means, a key of STUDENT_SAMPLERS.
        """
        own = (choose("prediction", prediction, STUDENT_SAMPLERS), str(self.steps), 1.0)
        check(
            (settings.sampler, str(settings.steps), settings.guidance) == own,
            f"sampler {settings.sampler} with steps={settings.steps} and guidance {settings.guidance:g} was "
            f"asked for, but this model was distilled to {own[0]} with {self.steps} steps, guidance "
            f"{self.guidance:g} inside; leave quality, sampler, steps and guidance out, or sample from its "
            "teacher",
        )
