# SPDX-License-Identifier: Apache-2.0
"""What a model that was distilled to few steps can do, and what it refuses."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from latte.checks import check, choose
from latte.diffusion.guidance import check_guidance

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
