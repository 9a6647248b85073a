# SPDX-License-Identifier: Apache-2.0
"""From data to noise and one step back: z_t = signal z_0 + noise eps, the posterior q(z_t-1 | z_t, z_0), and what a model's output means.

All tables are float64 on the CPU. They meet a model's tensors in one place, ``NoisePath.at``, which casts them to float32.
Two kinds of index: ``t`` counts the steps of this path (respaced or not), the *original* timestep is what the model is told.
Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (learned range, squared cosine, respacing), Liu et al. 2023 (rectified flow).
Axes: b batch, f frames, c channels, h height, w width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from latte.checks import InputError, choose, require
from latte.diffusion.loss import OBJECTIVES


def linear(num_steps: int) -> Tensor:
    """betas (num_steps,) float64 from 1e-4 to 0.02, both ends scaled by 1000 / num_steps (DDPM; Latte's own schedule)."""
    rule = "the linear schedule ends at beta = 20 / num_steps, which must stay below 1"
    require(
        num_steps > 20,
        "diffusion.num_steps",
        num_steps,
        rule,
        "take 21 or more, or diffusion.schedule=squared_cosine",
    )
    scale = 1000 / num_steps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_steps, dtype=torch.float64)


def squared_cosine(num_steps: int) -> Tensor:
    """betas (num_steps,) float64 whose cumulated product follows cos^2, each at most 0.999 (Nichol & Dhariwal, eq. 17)."""
    u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    level = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear, "squared_cosine": squared_cosine}


@dataclass(frozen=True)
class DiffusionConfig:
    """How data is noised and what the model learns about it; InputError on construction for a process that cannot be built."""

    schedule: str = "linear"  # of SCHEDULES; rectified_flow has its own straight path and takes no other
    num_steps: int = 1000  # timesteps the model is trained on
    objective: str = "paper"  # of OBJECTIVES

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid"}

    def __post_init__(self):
        build_process(self)


@dataclass(frozen=True)
class Prediction:
    """What a model's output means: the target it learns, and z_0 and eps read back from it.

    Each takes the coefficients ``a`` (signal) and ``s`` (noise) first: target(a, s, z0, eps), z0(a, s, zt, output), eps(a, s, zt, output).
    """

    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    z0: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    eps: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


PREDICTIONS = {
    "epsilon": Prediction(
        lambda a, s, z0, eps: eps, lambda a, s, zt, out: (zt - s * out) / a, lambda a, s, zt, out: out
    ),
    # Salimans & Ho 2022, appendix D; a^2 + s^2 = 1
    "v": Prediction(
        lambda a, s, z0, eps: a * eps - s * z0,
        lambda a, s, zt, out: a * zt - s * out,
        lambda a, s, zt, out: s * zt + a * out,
    ),
    # the velocity dz/ds of the straight path; a + s = 1
    "flow": Prediction(
        lambda a, s, z0, eps: eps - z0, lambda a, s, zt, out: zt - s * out, lambda a, s, zt, out: zt + a * out
    ),
}


def spread(num_steps: int, sections: str) -> list[int]:
    """The indices of 0..num_steps-1 that a respacing keeps, ascending, exactly as the released code picks them.

    "250" or "10,15,20": equal sections (the first ones take the remainder), in each the given count at a fractional stride, rounded
    half to even. "ddim50": the smallest whole stride that gives 50. InputError for anything else or for more than there are.
    """
    digits = sections.removeprefix("ddim").split(",")
    way_out = "give a count ('250'), counts per section ('10,15,20') or a whole stride ('ddim50')"
    valid = all(part.isdecimal() and int(part) > 0 for part in digits) and not (
        sections.startswith("ddim") and len(digits) > 1
    )
    require(valid, "steps", sections, "a respacing is made of positive whole numbers", way_out)
    counts = [int(part) for part in digits]
    if sections.startswith("ddim"):
        for stride in range(1, num_steps + 1):
            if len(range(0, num_steps, stride)) == counts[0]:
                return list(range(0, num_steps, stride))
        raise InputError(
            f"steps is {sections!r}, but no whole stride over {num_steps} steps gives {counts[0]}; use '{counts[0]}'"
        )
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = num_steps // len(counts) + (i < num_steps % len(counts))
        rule = f"section {i + 1} of {len(counts)} holds {size} of {num_steps} steps"
        require(count <= size, "steps", sections, rule, f"give it at most {size}")
        stride, position = (size - 1) / max(count - 1, 1), 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def trailing(num_steps: int, count: str) -> list[int]:
    """``count`` even indices of 0..num_steps-1, ascending, the last among them: "4" of 1000 -> 249, 499, 749, 999; InputError otherwise."""
    valid = count.isdecimal() and 1 <= int(count) <= num_steps
    require(
        valid,
        "steps",
        count,
        f"this sampler takes a plain count of 1 to {num_steps}",
        "give one, or use ddpm or ddim",
    )
    return [round(num_steps * k / int(count)) - 1 for k in range(1, int(count) + 1)]


class NoisePath:
    """z_t = signal z_0 + noise eps over ``num_steps`` indices. Abstract: Process and Flow say how signal and noise run.

    signal, noise: float64 (num_steps,). timestep_map: int64 (num_steps,), the original timestep of each index.
    prediction: name in PREDICTIONS, what the model's output means.
    """

    def __init__(
        self, signal: Tensor, noise: Tensor, timestep_map: Sequence[int] | Tensor | None, prediction: str
    ):
        self.signal, self.noise = signal, noise
        self.num_steps = len(signal)
        self.timestep_map = torch.as_tensor(
            range(self.num_steps) if timestep_map is None else timestep_map, dtype=torch.int64
        )
        assert len(self.timestep_map) == self.num_steps
        choose("prediction", prediction, PREDICTIONS)
        self.prediction = prediction
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def _table(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (name, device, dtype)
        if key not in self._placed:  # cast before moving: some devices have no float64
            self._placed[key] = getattr(self, name).to(dtype).to(device)
        return self._placed[key]

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Entries t (b,) of the float64 table ``name`` as (b 1 1 1 1), on the device of ``like`` and cast to float32.

        The only change of precision here. A float64 ``like`` keeps float64; a half-precision one gets float32, so that
        everything computed from it is float32 again.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return self._table(name, like.device, dtype)[t.to(like.device)].view(-1, *[1] * (like.ndim - 1))

    def original(self, t: Tensor) -> Tensor:
        """t (b,) int64 -> the timesteps (b,) that the model is told, on the device of ``t``."""
        return self._table("timestep_map", t.device, torch.int64)[t]

    def add_noise(self, z0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """A draw of q(z_t | z_0): z0 and eps (b f c h w), t (b,) -> (b f c h w) (DDPM eq. 4, with eps standard normal)."""
        return self.at("signal", t, z0) * z0 + self.at("noise", t, z0) * eps

    def target(self, z0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the model should answer at z_t: (b f c h w)."""
        return PREDICTIONS[self.prediction].target(self.at("signal", t, z0), self.at("noise", t, z0), z0, eps)

    def split(self, output: Tensor, zt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output (b f c|2c h w) -> prediction (b f c h w) and variance channels (b f c h w) or None, both in float32 (float64 if zt is)."""
        channels = zt.shape[2]
        rule = f"the latent {tuple(zt.shape)} asks for {channels} channels, or {2 * channels} with a learned variance"
        ok = (
            output.shape[2] in (channels, 2 * channels)
            and output.shape[:2] == zt.shape[:2]
            and output.shape[3:] == zt.shape[3:]
        )
        require(
            ok, "model output", tuple(output.shape), rule, "check model.latent_channels and model.learn_sigma"
        )
        output = output.to(torch.float64 if zt.dtype == torch.float64 else torch.float32)
        return output[:, :, :channels], output[:, :, channels:] if output.shape[2] > channels else None

    def estimate(self, prediction: Tensor, zt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and zt (b f c h w), t (b,) -> the z_0 and eps it stands for; z_0 is not clipped."""
        kind, a, s = PREDICTIONS[self.prediction], self.at("signal", t, zt), self.at("noise", t, zt)
        return kind.z0(a, s, zt, prediction), kind.eps(a, s, zt, prediction)


class Posterior(NamedTuple):
    """q(z_t-1 | z_t, z_0): mean (b f c h w), variance and clipped log-variance (b 1 1 1 1)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Reading(NamedTuple):
    """A model's output read at (z_t, t), each (b f c h w): z0 and eps it stands for, and p(z_t-1 | z_t) it defines."""

    z0: Tensor
    eps: Tensor
    mean: Tensor
    log_variance: Tensor


class Process(NoisePath):
    """The Gaussian diffusion of ``betas``: signal^2 + noise^2 = 1. Every attribute is a float64 table (num_steps,)."""

    def __init__(
        self, betas: Tensor, timestep_map: Sequence[int] | Tensor | None = None, prediction: str = "epsilon"
    ):
        """betas: (num_steps,), each inside (0, 1), cast to float64; InputError otherwise."""
        self.betas = betas = torch.as_tensor(betas, dtype=torch.float64)
        valid = betas.ndim == 1 and len(betas) > 0 and bool(((betas > 0) & (betas < 1)).all())
        require(
            valid,
            "betas",
            f"{len(betas)} numbers",
            "each must lie inside (0, 1)",
            "use a schedule of SCHEDULES",
        )
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        super().__init__(
            self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt(), timestep_map, prediction
        )
        # DDPM eq. 7: mean = posterior_z0 z_0 + posterior_zt z_t
        self.posterior_z0 = betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_zt = (1 - self.alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - self.alphas_cumprod)
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # the variance at index 0 is 0: its logarithm borrows that of index 1 (of beta when there is one step, whose draw is not used)
        first = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance = torch.cat([first, self.posterior_variance[1:]]).log()
        self.log_betas = betas.log()

    def posterior(self, z0: Tensor, zt: Tensor, t: Tensor) -> Posterior:
        """q(z_t-1 | z_t, z_0) for z0 and zt (b f c h w), t (b,) (DDPM eq. 6 and 7)."""
        mean = self.at("posterior_z0", t, zt) * z0 + self.at("posterior_zt", t, zt) * zt
        return Posterior(mean, self.at("posterior_variance", t, zt), self.at("posterior_log_variance", t, zt))

    def read(self, output: Tensor, zt: Tensor, t: Tensor) -> Reading:
        """Output (b f c|2c h w) at zt (b f c h w), t (b,) -> Reading, the mean through z_0 and the posterior.

        Learned range (Nichol & Dhariwal eq. 15): with v the last c channels, log-variance = w log beta + (1 - w) log posterior
        variance, w = (v + 1) / 2. A model without them has the posterior's own variance ("fixed small").
        """
        prediction, v = self.split(output, zt)
        z0, eps = self.estimate(prediction, zt, t)
        mean, _, low = self.posterior(z0, zt, t)
        if v is None:
            return Reading(z0, eps, mean, low.expand_as(mean))
        w = (v + 1) / 2
        return Reading(z0, eps, mean, w * self.at("log_betas", t, zt) + (1 - w) * low)

    def keep(self, indices: Sequence[int]) -> "Process":
        """The process that visits only ``indices`` (ascending): same marginals there, betas recomputed between them."""
        level = self.alphas_cumprod[list(indices)]
        before = torch.cat([torch.ones(1, dtype=torch.float64), level[:-1]])
        return Process(1 - level / before, self.timestep_map[list(indices)], self.prediction)

    def respaced(self, sections: str) -> "Process":
        """The process over the indices of ``spread(num_steps, sections)``: "250", "10,15,20" or "ddim50"; InputError otherwise."""
        return self.keep(spread(self.num_steps, sections))


class Flow(NoisePath):
    """The straight path of rectified flow: z_s = (1 - s) z_0 + s eps, s from 1 / num_steps to 1 (pure noise)."""

    def __init__(self, times: Tensor, timestep_map: Sequence[int] | Tensor | None = None):
        """times: s of each index, float64 (num_steps,), ascending in (0, 1]."""
        self.times = times
        super().__init__(1 - times, times, timestep_map, "flow")

    def keep(self, indices: Sequence[int]) -> "Flow":
        """The same path seen only at ``indices`` (ascending)."""
        return Flow(self.times[list(indices)], self.timestep_map[list(indices)])


def build_process(config: DiffusionConfig) -> "Process | Flow":
    """The noising of ``config``: a Process, or a Flow for an objective that predicts the flow; InputError for what cannot be built."""
    schedule = choose("diffusion.schedule", config.schedule, SCHEDULES)
    prediction = choose("diffusion.objective", config.objective, OBJECTIVES).prediction
    whole = (
        isinstance(config.num_steps, int) and not isinstance(config.num_steps, bool) and config.num_steps > 0
    )
    require(
        whole,
        "diffusion.num_steps",
        config.num_steps,
        "it counts timesteps",
        "give a positive whole number, e.g. 1000",
    )
    if prediction != "flow":
        return Process(schedule(config.num_steps), prediction=prediction)
    rule = f"diffusion.objective={config.objective} runs on its own straight path"
    require(
        config.schedule == "linear",
        "diffusion.schedule",
        config.schedule,
        rule,
        "leave diffusion.schedule at linear",
    )
    return Flow(torch.arange(1, config.num_steps + 1, dtype=torch.float64) / config.num_steps)
