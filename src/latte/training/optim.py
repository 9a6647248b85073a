# SPDX-License-Identifier: Apache-2.0
"""AdamW, its learning rate, gradient clipping, and the guard against numbers that are none.

The paper's setting is AdamW at a constant 1e-4 without weight decay (Latte, Sec. 4.1), gradients clipped at norm 0.1 after a start
step before which the norm is only measured (the released code).
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from latte.checks import InputError, RunError
from latte.training.distributed import Group

FUSED_DEVICES = ("cpu", "cuda", "mps")


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of ``model``, in one fused kernel where the device has one."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters, lr=lr, weight_decay=weight_decay, fused=parameters[0].device.type in FUSED_DEVICES
    )


def learning_rate(step: int, lr: float, warmup_steps: int, decay_steps: int = 0, steps: int = 0) -> float:
    """The rate of step 1, 2, ... of ``steps``: linear up to ``lr`` over ``warmup_steps``, constant, down over the last ``decay_steps``.

    The last step's is lr / (decay_steps + 1), the next would be 0 (the "trapezoid" of Haegele et al. 2024). 0 decay steps: the paper's.
    """
    rise = step / max(warmup_steps, 1)
    fall = (steps + 1 - step) / (decay_steps + 1) if decay_steps else 1.0
    return lr * min(1.0, rise, fall)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients down to a total norm of ``max_norm`` (None: leave them); the norm () that they had before, on the device."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    )
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as 'parameter name:what' -> tensor, for a checkpoint."""
    return {
        f"{name}:{what}": value
        for name, parameter in model.named_parameters()
        for what, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Undo ``optimizer_tensors``; learning rate and decay stay those of ``optimizer``. InputError for tensors of another model.

    What is said of a buffer is left out: a text model's gate was a parameter once.
    """
    buffers = {name for name, _ in model.named_buffers()}
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    state: dict[int, dict[str, Tensor]] = {}
    places = {name: index for index, (name, _) in enumerate(trainable)}
    for key, tensor in tensors.items():
        name, what = key.rsplit(":", 1)
        if name in buffers:
            continue
        if name not in places or (what != "step" and tensor.shape != trainable[places[name]][1].shape):
            raise InputError(
                f"the optimiser's state holds {key} {tuple(tensor.shape)}, which this model does not have; "
                "give the configuration that the run was started with"
            )
        state.setdefault(places[name], {})[what] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class EMA:
    """A second model, ``.model``, whose weights follow those of ``model``: ema <- decay * ema + (1 - decay) * weight.

    It starts as a copy, of which decay^n is left after n steps: with 0.999 still 37 % after 1000. ``warmup`` lets go of it sooner: step
    n = 1, 2, ... takes the lesser of ``decay`` and (1 + n) / (10 + n), an average over the last ninth of the run so far. Only what is
    trained moves; frozen parameters are those of ``model`` itself, not copies, and buffers stay as they were copied: who changes one (the
    loop a text model's gate) does so in both. Its state is that of ``.model``, under the same names as the model's own.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        pairs = [
            (mine, theirs)
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True)
            if theirs.requires_grad
        ]
        self.averages, self.weights = [mine for mine, _ in pairs], [theirs for _, theirs in pairs]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model's weights as they are after step 1, 2, ..."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)  # pyright: ignore


class TrainState:
    """What changes while training, and so what a checkpoint holds: the model, its average, and the optimiser of both."""

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float, ema_decay: float, ema_warmup: bool = False
    ):
        self.model, self.ema = model, EMA(model, ema_decay, ema_warmup)
        self.optimizer = build_optimizer(model, lr, weight_decay)
        self.parameters = self.optimizer.param_groups[0]["params"]
        self.frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        if self.frozen:  # under adapters buffers stay as they are, too
            self.frozen |= {name for name, _ in model.named_buffers()}
        device = self.parameters[0].device
        self.guard = FiniteGuard(device, at_once=device.type == "cpu")

    def update(self, step: int, losses: Tensor, lr: float, max_norm: float | None, group: Group) -> Tensor:
        """Step ``step`` from the gradients of this process's share and its (loss, mse, vlb), (3,).

        Gradients and losses are added up over ``group``, clipped to ``max_norm`` unless None, looked at, and applied.
        Returns (loss, mse, vlb, norm of the gradient before clipping), (4,), on the device.
        """
        group.all_reduce(
            [losses, *(parameter.grad for parameter in self.parameters if parameter.grad is not None)]
        )
        numbers = torch.cat([losses, clip_gradients(self.parameters, max_norm)[None]])
        self.guard.watch(step, numbers)
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(step)
        return numbers

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that is not frozen, as the groups of a checkpoint: model, ema, optimizer."""
        return {
            "model": self.moving(self.model),
            "ema": self.moving(self.ema.model),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take everything back, bit for bit; what is frozen stays as it is."""
        for model, group in ((self.model, "model"), (self.ema.model, "ema")):
            still = {name: tensor for name, tensor in model.state_dict().items() if name in self.frozen}
            model.load_state_dict({**still, **tensors[group]})
        load_optimizer_tensors(self.model, self.optimizer, tensors["optimizer"])

    def moving(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of ``model`` (or of the average) without the frozen ones."""
        return {name: tensor for name, tensor in model.state_dict().items() if name not in self.frozen}


class FiniteGuard:
    """Remembers the first step at which a number was not finite, on the device, so that looking at it can wait.

    With ``at_once`` (for the CPU, where looking costs nothing) ``watch`` looks too, so that no weight is ever touched. Otherwise
    ``check`` is for where the host waits for the device anyway, and for before anything is kept.
    """

    def __init__(self, device: torch.device, at_once: bool):
        self.first, self.at_once = torch.zeros((), dtype=torch.int64, device=device), at_once

    def watch(self, step: int, numbers: Tensor) -> None:
        """Note whether ``numbers`` of ``step`` are all finite."""
        bad = ~torch.isfinite(numbers).all()
        self.first = torch.where(bad & (self.first == 0), step, self.first)
        if self.at_once:
            self.check()

    def check(self) -> None:
        """RunError naming the first step that went wrong, if there was one."""
        if step := int(self.first):
            raise RunError(
                f"loss or gradient of step {step} is not a finite number, and nothing of that step was kept; "
                "lower train.lr, clip earlier (train.clip_norm, train.clip_start), give train.dtype=fp32, or look at the clips "
                "of that step, then run the same command again to go on from the last checkpoint"
            )
