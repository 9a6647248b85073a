# SPDX-License-Identifier: Apache-2.0
"""The forward process z_t = signal z_0 + noise eps, the posterior q(z_t-1 | z_t, z_0), and what a model's
output means.

All tables are float64 on the CPU. They meet a model's tensors in one place, ``NoisePath.at``, which casts
them to float32. Two kinds of index: ``t`` counts the steps of this process (respaced or not); the *original*
timestep is the model's input. Ho et al. 2020 (DDPM), Nichol & Dhariwal 2021 (learned variance), Liu et al.
2023 (rectified flow).
Axes: b batch, f frames, c channels, h height, w width.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from latte.checks import check, choose
from latte.diffusion.schedules import spaced_timesteps

DenoiseFunction = Callable[[Tensor, Tensor], Tensor]
"""(z (b f c h w), original timesteps (b,) int64) -> (b f c h w), or (b f 2c h w) with a learned variance."""


class Prediction:
    """What a model's output means at z_t = signal z_0 + noise eps. Abstract."""

    straight_path: ClassVar[bool] = False
    """Whether it belongs to the straight path of rectified flow, which has no schedule and no variance."""

    @staticmethod
    def target(signal: Tensor, noise: Tensor, z0: Tensor, eps: Tensor) -> Tensor:
        """Return the training target."""
        raise NotImplementedError

    @staticmethod
    def z0(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        """Return the z_0 that ``output`` implies at z_t."""
        raise NotImplementedError

    @staticmethod
    def eps(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        """Return the eps that ``output`` implies at z_t."""
        raise NotImplementedError


class EpsilonPrediction(Prediction):
    """The output is the noise eps (DDPM; Latte, Sec. 3.1)."""

    @staticmethod
    def target(signal: Tensor, noise: Tensor, z0: Tensor, eps: Tensor) -> Tensor:
        return eps

    @staticmethod
    def z0(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        return (zt - noise * output) / signal

    @staticmethod
    def eps(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        return output


class VelocityPrediction(Prediction):
    """The output is v = signal eps - noise z_0 (Salimans & Ho 2022, appendix D)."""

    @staticmethod
    def target(signal: Tensor, noise: Tensor, z0: Tensor, eps: Tensor) -> Tensor:
        return signal * eps - noise * z0

    @staticmethod
    def z0(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        return signal * zt - noise * output

    @staticmethod
    def eps(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        return noise * zt + signal * output


class FlowPrediction(Prediction):
    """The output is dz/ds = eps - z_0, the velocity of the straight path (Liu et al. 2023, eq. 1)."""

    straight_path = True

    @staticmethod
    def target(signal: Tensor, noise: Tensor, z0: Tensor, eps: Tensor) -> Tensor:
        return eps - z0

    @staticmethod
    def z0(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        return zt - noise * output

    @staticmethod
    def eps(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        return zt + signal * output


class CleanPrediction(Prediction):
    """The output is the clean z_0 (Li & He 2025, "Back to basics", arXiv 2511.13720)."""

    @staticmethod
    def target(signal: Tensor, noise: Tensor, z0: Tensor, eps: Tensor) -> Tensor:
        return z0

    @staticmethod
    def z0(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        return output

    @staticmethod
    def eps(signal: Tensor, noise: Tensor, zt: Tensor, output: Tensor) -> Tensor:
        return (zt - signal * output) / noise


PREDICTIONS: dict[str, type[Prediction]] = {
    "epsilon": EpsilonPrediction,
    "v": VelocityPrediction,
    "flow": FlowPrediction,
    "z0": CleanPrediction,
}


class NoisePath:
    """z_t = signal z_0 + noise eps over ``num_steps`` indices. Abstract: Process and Flow.

    signal, noise: float64 (num_steps,).
    timestep_map: int64 (num_steps,), the original timestep of each index.
    prediction: key of PREDICTIONS, what the model's output means.
    """

    has_posterior: ClassVar[bool] = False
    """Whether q(z_t-1 | z_t, z_0) has a variance that a model can learn."""

    def __init__(
        self, signal: Tensor, noise: Tensor, timestep_map: Sequence[int] | Tensor | None, prediction: str
    ):
        self.signal = signal
        self.noise = noise
        self.num_steps = len(signal)
        if timestep_map is None:
            timestep_map = range(self.num_steps)
        self.timestep_map = torch.as_tensor(timestep_map, dtype=torch.int64)
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
        """Return entries t of the float64 table ``name`` on the device of ``like``: (b 1 1 1 1) for t (b,),
        (b f 1 1 1) for a timestep per frame (b f).

        The only change of precision here: the result is float32, so that everything computed from it is
        float32 even for a half-precision ``like``. A float64 ``like`` keeps float64.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        entries = self._table(name, like.device, dtype)[t.to(like.device)]  # (b) or (b f)
        return entries.view(*t.shape, *[1] * (like.ndim - t.ndim))  # (b 1|f 1 1 1)

    def original(self, t: Tensor) -> Tensor:
        """Return the original timesteps, the model's input, of indices t int64, in the shape of t."""
        return self._table("timestep_map", t.device, torch.int64)[t]

    def add_noise(self, z0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return a sample of q(z_t | z_0), (b f c h w), at t (b,) (DDPM eq. 4).

        ``z0`` and standard normal ``eps`` are (b f c h w).
        """
        return self.at("signal", t, z0) * z0 + self.at("noise", t, z0) * eps

    def target(self, z0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return what the model should output at z_t: (b f c h w)."""
        return PREDICTIONS[self.prediction].target(self.at("signal", t, z0), self.at("noise", t, z0), z0, eps)

    def split(self, output: Tensor, zt: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split output (b f c|2c h w) into prediction (b f c h w) and variance channels (b f c h w) or None.

        Both are float32, or float64 if zt is. InputError for an output of another shape.
        """
        channels = zt.shape[2]
        same_grid = output.shape[:2] == zt.shape[:2] and output.shape[3:] == zt.shape[3:]
        check(
            same_grid and output.shape[2] in (channels, 2 * channels),
            f"the model output has shape {tuple(output.shape)}, but the latent {tuple(zt.shape)} needs "
            f"{channels} channels, or {2 * channels} with a learned variance; check model.latent_channels "
            "and model.learn_sigma",
        )
        output = output.to(torch.promote_types(zt.dtype, torch.float32))
        variance = output[:, :, channels:] if output.shape[2] > channels else None  # (b f c h w)
        return output[:, :, :channels], variance

    def estimate(self, prediction: Tensor, zt: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the z_0 and eps, not clipped, of a prediction at zt, each (b f c h w), and t (b,)."""
        kind = PREDICTIONS[self.prediction]
        signal = self.at("signal", t, zt)
        noise = self.at("noise", t, zt)
        return kind.z0(signal, noise, zt, prediction), kind.eps(signal, noise, zt, prediction)


class Posterior(NamedTuple):
    """q(z_t-1 | z_t, z_0): mean (b f c h w), variance and clipped log-variance (b 1 1 1 1)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class ReverseStep(NamedTuple):
    """p(z_t-1 | z_t) of a model, with the z_0 and eps its output implies; each (b f c h w)."""

    z0: Tensor
    eps: Tensor
    mean: Tensor
    log_variance: Tensor


class Process(NoisePath):
    """The Gaussian diffusion of ``betas``: signal^2 + noise^2 = 1.

    Every attribute is a float64 table (num_steps,).
    """

    has_posterior = True

    def __init__(
        self, betas: Tensor, timestep_map: Sequence[int] | Tensor | None = None, prediction: str = "epsilon"
    ):
        """betas: (num_steps,), each inside (0, 1), cast to float64; InputError otherwise."""
        self.betas = betas = torch.as_tensor(betas, dtype=torch.float64)
        check(
            betas.ndim == 1 and len(betas) > 0 and bool(((betas > 0) & (betas < 1)).all()),
            f"betas has shape {tuple(betas.shape)}, but must be a vector of values inside (0, 1); use a "
            "schedule of latte.diffusion.schedules",
        )
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        signal = self.alphas_cumprod.sqrt()
        noise = (1 - self.alphas_cumprod).sqrt()
        super().__init__(signal, noise, timestep_map, prediction)
        # DDPM eq. 7: mean = posterior_z0 z_0 + posterior_zt z_t
        self.posterior_z0 = betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)
        self.posterior_zt = (1 - self.alphas_cumprod_prev) * (1 - betas).sqrt() / (1 - self.alphas_cumprod)
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # The variance at index 0 is 0, so its logarithm is that of index 1 (of beta when there is only one
        # step, whose random term is not used).
        first = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance = torch.cat([first, self.posterior_variance[1:]]).log()
        self.log_betas = betas.log()

    def posterior(self, z0: Tensor, zt: Tensor, t: Tensor) -> Posterior:
        """Return q(z_t-1 | z_t, z_0) at z0 and zt (b f c h w), t (b,) (DDPM eq. 6 and 7)."""
        mean = self.at("posterior_z0", t, zt) * z0 + self.at("posterior_zt", t, zt) * zt
        variance = self.at("posterior_variance", t, zt)
        return Posterior(mean, variance, self.at("posterior_log_variance", t, zt))

    def reverse_step(self, output: Tensor, zt: Tensor, t: Tensor) -> ReverseStep:
        """Return p(z_t-1 | z_t) of a model's output (b f c|2c h w) at zt (b f c h w) and t (b,).

        Variance channels v in [-1, 1] interpolate in log space between the posterior's variance and beta: log
        variance = w log beta + (1 - w) log posterior variance, w = (v + 1) / 2 (Nichol & Dhariwal, eq. 15). A
        model without variance channels gets the posterior's variance ("fixed small").
        """
        prediction, v = self.split(output, zt)
        z0, eps = self.estimate(prediction, zt, t)
        mean, _, smallest = self.posterior(z0, zt, t)
        if v is None:
            return ReverseStep(z0, eps, mean, smallest.expand_as(mean))
        w = (v + 1) / 2
        return ReverseStep(z0, eps, mean, w * self.at("log_betas", t, zt) + (1 - w) * smallest)

    def keep(self, indices: Sequence[int]) -> "Process":
        """Return the process over ``indices`` (ascending): the same marginals, with betas recomputed."""
        kept = list(indices)
        alphas_cumprod = self.alphas_cumprod[kept]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        return Process(1 - alphas_cumprod / previous, self.timestep_map[kept], self.prediction)

    def respaced(self, sections: str) -> "Process":
        """Return the process over ``spaced_timesteps``: "250", "10,15,20" or "ddim50"."""
        return self.keep(spaced_timesteps(self.num_steps, sections))


class Flow(NoisePath):
    """The straight path of rectified flow, z_s = (1 - s) z_0 + s eps.

    s runs from 1 / num_steps to 1 (pure noise).
    """

    def __init__(self, times: Tensor, timestep_map: Sequence[int] | Tensor | None = None):
        """times: s of each index, float64 (num_steps,), ascending in (0, 1]."""
        self.times = times
        super().__init__(1 - times, times, timestep_map, "flow")

    def keep(self, indices: Sequence[int]) -> "Flow":
        """Return the same path over ``indices`` (ascending) alone."""
        kept = list(indices)
        return Flow(self.times[kept], self.timestep_map[kept])
