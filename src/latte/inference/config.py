# SPDX-License-Identifier: Apache-2.0
"""The settings of sampling, section ``sample`` of a run's configuration. No torch here."""

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from latte.checks import check, check_name
from latte.diffusion.config import SAMPLERS, check_cache, check_guidance, check_interval, check_order


@dataclass(frozen=True)
class SampleConfig:
    """Settings of sampling. ``batch`` and ``fps`` do not change a clip. InputError on construction for a
    value out of range.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    sampler: str = "ddpm"  # sampler, see latte config list samplers
    steps: int | str = 250  # of denoising: a count, or a respacing such as "ddim50"
    guidance: float = 1.0  # classifier-free guidance scale; 1: without guidance
    eta: float = 0.0  # noise of ddim, from 0 (deterministic) to 1 (as ddpm)
    batch: int = 4  # clips generated at once
    fps: float = 8.0  # frame rate of the files
    order: int | None = None  # order of dpmpp and unipc, 1 to 3; null: the sampler's own, 2
    guidance_interval: tuple[float, float] | None = (
        None  # noise levels noise / signal that are guided; null: all
    )
    cache: float | None = None  # relative change of the output that the step cache skips; null: no cache

    def __post_init__(self) -> None:
        check_name("sample.sampler", self.sampler, SAMPLERS)
        check_guidance(self.guidance, field="sample.guidance")
        check(0 <= self.eta <= 1, f"sample.eta must be in [0, 1], got {self.eta}")
        check(self.batch >= 1, f"sample.batch must be at least 1 clip, got {self.batch}")
        check(0 < self.fps <= 240, f"sample.fps must be in (0, 240], got {self.fps}")
        check(
            not isinstance(self.steps, int) or self.steps >= 1,
            f"sample.steps must be at least 1, got {self.steps}",
        )
        check_order(self.sampler, self.order, "sample.order")
        check_interval(self.guidance_interval, "sample.guidance_interval")
        check(
            self.guidance != 1 or self.guidance_interval is None,
            f"guidance_interval is {list(self.guidance_interval or ())}, but guidance is 1, which is no "
            "guidance; give a scale, such as 1.5, or leave the interval out",
        )
        check_cache(self.cache, field="sample.cache")

    def recorded(self) -> dict[str, Any]:
        """Return the settings as plain data, without those that are null: records stay what they were."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def changed(config: SampleConfig, **changes: Any) -> SampleConfig:
    """Return ``config`` with those ``changes`` that are not None.

    Another sampler has its own order, and guidance 1 no interval; both are dropped unless they are given.
    """
    chosen = {key: value for key, value in changes.items() if value is not None}
    if chosen.get("sampler", config.sampler) != config.sampler:
        chosen.setdefault("order", None)
    if chosen.get("guidance", config.guidance) == 1:
        chosen.setdefault("guidance_interval", None)
    return replace(config, **chosen)
