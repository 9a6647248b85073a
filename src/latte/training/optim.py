# SPDX-License-Identifier: Apache-2.0
"""Optimizers, gradient clipping, EMA of the weights, and the checks that keep NaN/Inf out of checkpoints.

The paper trains with AdamW at a constant learning rate of 1e-4 without weight decay and samples from EMA
weights (Latte, Sec. 4.1). The released code clips gradients to norm 0.1 after a start step; before it, the
norm is only measured.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from latte.checkpoint.ema import decay_at, group_name
from latte.checkpoint.split import Rows
from latte.checks import InputError, RunError, choose
from latte.distributed import Group
from latte.tensors import tensors_sha256
from latte.training.config import OPTIMIZERS as OPTIMIZERS
from latte.training.muon import MuonWithAdamW, is_block_matrix, is_branch_matrix
from latte.training.parallel import local_part, on_meta, split_like, whole

Parameters = Mapping[str, nn.Parameter]
"""Trainable parameters by name, in the model's order."""

FUSED_DEVICES = ("cpu", "cuda", "mps")
FLOAT32 = 4  # bytes
STEP_BYTES = FLOAT32  # the step counter that torch's optimizers keep for each parameter


class OptimizerKind(NamedTuple):
    """An entry of ``OPTIMIZERS``: how to build it over named parameters, and the bytes of state that it
    keeps for a parameter of a name and shape.
    """

    build: Callable[[Parameters, float, float], Optimizer]  # (parameters, lr, weight_decay)
    state_bytes: Callable[[str, torch.Size], int]
    elementwise: bool = False  # each weight's step depends on its own gradients alone: weights may be split


def build_adamw(parameters: Parameters, lr: float, weight_decay: float) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019), as one fused kernel where the device has one."""
    fused = has_fused(parameters)
    return torch.optim.AdamW(list(parameters.values()), lr=lr, weight_decay=weight_decay, fused=fused)


def has_fused(parameters: Parameters) -> bool:
    """Return whether AdamW is one kernel on the device of ``parameters``."""
    return next(iter(parameters.values())).device.type in FUSED_DEVICES


def adamw_bytes(name: str, shape: torch.Size) -> int:
    """Two float32 moments per weight."""
    return 2 * FLOAT32 * shape.numel() + STEP_BYTES


def build_adafactor(parameters: Parameters, lr: float, weight_decay: float) -> Optimizer:
    """Adafactor (Shazeer and Stern 2018): steps relative to the size of the weights, factored second
    moment, no first.
    """
    return torch.optim.Adafactor(list(parameters.values()), lr=lr, weight_decay=weight_decay)


def adafactor_bytes(name: str, shape: torch.Size) -> int:
    """A row and a column of float32 per matrix; vectors keep a full second moment."""
    if len(shape) < 2:
        return FLOAT32 * shape.numel() + STEP_BYTES
    rows_and_columns = shape.numel() // shape[-1] + shape.numel() // shape[-2]
    return FLOAT32 * rows_and_columns + STEP_BYTES


def build_muon(parameters: Parameters, lr: float, weight_decay: float) -> Optimizer:
    """Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for the rest."""
    return MuonWithAdamW(parameters, lr, weight_decay, has_fused(parameters))


def muon_bytes(name: str, shape: torch.Size) -> int:
    """One float32 momentum per weight of a block's matrix; AdamW's state for the rest."""
    if is_block_matrix(name, shape):
        return FLOAT32 * shape.numel()
    return adamw_bytes(name, shape)


def build_muon_no_adaln(parameters: Parameters, lr: float, weight_decay: float) -> Optimizer:
    """Muon for the matrices of the blocks without those of their modulations, AdamW for the rest."""
    return MuonWithAdamW(parameters, lr, weight_decay, has_fused(parameters), is_branch_matrix)


def muon_no_adaln_bytes(name: str, shape: torch.Size) -> int:
    """One float32 momentum per weight of a matrix that Muon takes; AdamW's state for the rest."""
    if is_branch_matrix(name, shape):
        return FLOAT32 * shape.numel()
    return adamw_bytes(name, shape)


ADAMW = OptimizerKind(build_adamw, adamw_bytes, elementwise=True)
ADAFACTOR = OptimizerKind(build_adafactor, adafactor_bytes)
MUON = OptimizerKind(build_muon, muon_bytes)
MUON_NO_ADALN = OptimizerKind(build_muon_no_adaln, muon_no_adaln_bytes)


def build_optimizer(model: nn.Module, lr: float, weight_decay: float, name: str = "adamw") -> Optimizer:
    """Build optimizer ``name`` over the trainable parameters of ``model``; InputError for a name not in
    ``OPTIMIZERS``.
    """
    parameters = trainable_parameters(model)
    return choose("train.optimizer", name, OPTIMIZERS).build(parameters, lr, weight_decay)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of ``model`` that are trained, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients in place to a total norm of at most ``max_norm`` (None: no limit); return the norm ()
    before scaling.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as 'parameter name:state name' -> tensor, for a checkpoint."""
    return {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor | Rows]
) -> None:
    """Load what ``optimizer_tensors`` returned; learning rate and weight decay stay those of ``optimizer``.

    Entries of buffers are ignored, because old checkpoints of text models have the time gate as a parameter.
    InputError for the state of another model or optimizer.
    """
    buffers = {name for name, _ in model.named_buffers()}
    trainable = trainable_parameters(model)
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    place = {id(parameter): index for index, parameter in enumerate(ordered)}
    index_of = {name: place[id(parameter)] for name, parameter in trainable.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, state_name = key.rsplit(":", 1)
        if name in buffers:
            continue
        if name not in index_of or not could_belong(tensor, trainable[name]):
            raise InputError(
                f"the optimizer state has {key} {tuple(tensor.shape)}, which does not fit this model; "
                "use the configuration that the run was started with"
            )
        like = trainable[name] if tensor.shape == trainable[name].shape else None
        state.setdefault(index_of[name], {})[state_name] = split_like(tensor, like)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def could_belong(state: Tensor | Rows, parameter: Tensor) -> bool:
    """Is ``state`` a number, or of the parameter's shape with some axes reduced to 1 (Adafactor's rows and
    columns)?
    """
    if state.ndim == 0:
        return True
    reduced = zip(state.shape, parameter.shape, strict=False)
    return state.ndim == parameter.ndim and all(size in (1, full) for size, full in reduced)


class EMA:
    """The exponential moving average of a model's weights: ema <- decay * ema + (1 - decay) * weight after
    each step.

    ``.model`` is a second model with the EMA weights, under the same names. It starts as a copy, of which
    decay^n remains after n steps: with 0.999 still 37 % after 1000 steps. With ``warmup``, step n = 1, 2,
    ... uses min(decay, (1 + n) / (10 + n)) instead, so that the initial weights are forgotten sooner.
    Frozen parameters are shared with the original model. Buffers stay as they were copied; the training
    loop changes the time gate of text models in both. With a ``skeleton``, a copy of the model without
    weights, each process keeps the parts that it has of ``model``, and ``.model`` has weights only inside
    ``gathered()``. With a ``width``, the decay is that of ``latte.checkpoint.ema``; step 1 replaces the copy.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float,
        warmup: bool = False,
        skeleton: nn.Module | None = None,
        width: float | None = None,
    ):
        self.decay = decay
        self.width = width
        self.warmup = warmup
        self.parts: dict[str, Tensor] = {}
        if skeleton is not None:
            trainable = trainable_parameters(model)
            self.model = skeleton
            self.parts = {name: weight.detach().clone() for name, weight in trainable.items()}
            self.averages = list(self.parts.values())
            self.weights: list[nn.Parameter] = list(trainable.values())
            return
        shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        trained = [(average, weight) for average, weight in pairs if weight.requires_grad]
        self.averages: list[Tensor] = [average for average, _ in trained]
        self.weights = [weight for _, weight in trained]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the EMA weights after step 1, 2, ..."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        if self.width is not None:
            decay = decay_at(step, self.width)
        averages = [local_part(average) for average in self.averages]
        weights = [local_part(weight) for weight in self.weights]
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore

    def tensors(self) -> dict[str, Tensor]:
        """Return the EMA weights, or this process's parts of them, and the buffers."""
        return {**self.model.state_dict(), **self.parts}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor | Rows]) -> None:
        """Load whole EMA weights and buffers."""
        for name, part in self.parts.items():
            part.copy_(split_like(tensors[name], part))
        held = {name: tensor for name, tensor in self.model.state_dict().items() if name in self.parts}
        others = {name: split_like(tensor, None) for name, tensor in tensors.items() if name not in held}
        self.model.load_state_dict({**others, **held})

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Give ``.model`` all weights inside; every process must enter. Nothing to do without a skeleton."""
        if self.parts:
            full = {name: whole(part) for name, part in self.parts.items()}
            self.model.load_state_dict(full, strict=False, assign=True)
        try:
            yield
        finally:
            if self.parts:
                empty = {name: on_meta(part) for name, part in self.parts.items()}
                self.model.load_state_dict(empty, strict=False, assign=True)


class Gathered(Mapping[str, Tensor]):
    """Tensors of which each process has a part; getting one gathers it in all of them."""

    def __init__(self, parts: Mapping[str, Tensor]):
        self.parts = parts

    def __getitem__(self, name: str) -> Tensor:
        return whole(self.parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


class TrainState:
    """Everything that changes during training and that a checkpoint holds: model, EMA weights, optimizer."""

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float,
        ema_decay: float,
        ema_warmup: bool = False,
        optimizer: str = "adamw",
        skeleton: nn.Module | None = None,
        ema_widths: Sequence[float] = (),
    ):
        self.model = model
        self.ema = EMA(model, ema_decay, ema_warmup, skeleton)
        self.emas = {"ema": self.ema}  # by the groups of a checkpoint
        for width in ema_widths:
            self.emas[group_name(width)] = EMA(model, ema_decay, skeleton=skeleton, width=width)
        self.optimizer_name = optimizer
        self.optimizer = build_optimizer(model, lr, weight_decay, optimizer)
        self.parameters = list(trainable_parameters(model).values())
        self.frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        if self.frozen:  # with LoRA adapters, buffers do not change either
            self.frozen |= {name for name, _ in model.named_buffers()}
        device = self.parameters[0].device
        self.guard = FiniteGuard(device, immediate=device.type == "cpu")

    def update(self, step: int, losses: Tensor, lr: float, max_norm: float | None, group: Group) -> Tensor:
        """Apply one optimizer step to the gradients of the batch; (loss, mse, vlb) (3,) are of this process's
        share.

        Sums the losses over ``group`` (the gradients are summed already), clips to ``max_norm`` unless it
        is None, and checks for NaN/Inf.
        Returns (loss, mse, vlb, gradient norm before clipping) (4,) on the device.
        """
        bad_ranks = torch.zeros(group.size, device=losses.device)
        bad_ranks[group.rank] = ~torch.isfinite(losses).all()
        group.all_reduce([losses, bad_ranks])
        norm = clip_gradients(self.parameters, max_norm).to(losses.device)
        metrics = torch.cat([losses, norm[None]])  # (4)
        self.guard.watch(step, metrics, bad_ranks)
        for settings in self.optimizer.param_groups:
            settings["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas.values():
            ema.update(step)
        return metrics

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Return what this process has of all tensors that are not frozen, by the groups of a checkpoint:
        model, ema and those by width, optimizer.
        """
        return {
            "model": self.trained(self.model.state_dict()),
            **{group: self.trained(ema.tensors()) for group, ema in self.emas.items()},
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }

    def ema_sha256(self) -> str:
        """Return the hash of the EMA weights, gathered one after the other; every process must call it."""
        return tensors_sha256(Gathered(self.trained(self.ema.tensors())))

    def load(self, tensors: Mapping[str, Mapping[str, Tensor | Rows]]) -> None:
        """Load all that processes had in ``parts()``, or this process's rows of it, bit for bit; frozen
        tensors keep their values.
        """
        model = self.model.state_dict()
        split = {name: split_like(tensor, model.get(name)) for name, tensor in tensors["model"].items()}
        self.model.load_state_dict({**self.only_frozen(model), **split})
        for group, ema in self.emas.items():
            ema.load({**self.only_frozen(ema.model.state_dict()), **tensors[group]})
        load_optimizer_tensors(self.model, self.optimizer, tensors["optimizer"])

    def trained(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of ``tensors`` that are not frozen."""
        return {name: tensor for name, tensor in tensors.items() if name not in self.frozen}

    def only_frozen(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those of ``tensors`` that are frozen."""
        return {name: tensor for name, tensor in tensors.items() if name in self.frozen}


class FiniteGuard:
    """Remembers, on the device, the first step with a NaN/Inf loss or gradient.

    With ``immediate`` (for the CPU, where reading is free) ``watch`` raises before any weight changes.
    Otherwise ``check`` raises, which the loop calls where it waits for the device anyway and before it
    writes anything.
    """

    def __init__(self, device: torch.device, immediate: bool):
        self.first_bad_step = torch.zeros((), dtype=torch.int64, device=device)  # 0: none
        self.bad_ranks = torch.zeros(1, device=device)
        self.immediate = immediate

    def watch(self, step: int, metrics: Tensor, bad_ranks: Tensor | None = None) -> None:
        """Record whether all ``metrics`` of ``step`` are finite; ``bad_ranks`` (processes,) is 0 for those
        whose own loss was.
        """
        first = ~torch.isfinite(metrics).all() & (self.first_bad_step == 0)
        self.first_bad_step = torch.where(first, step, self.first_bad_step)
        if bad_ranks is not None:
            self.bad_ranks = torch.where(first, bad_ranks, self.bad_ranks)
        if self.immediate:
            self.check()

    def check(self) -> None:
        """RunError naming the first step with a NaN/Inf loss or gradient, if there was one."""
        if step := int(self.first_bad_step):
            raise RunError(
                f"loss or gradient of step {step} is NaN or Inf{self.place()}, and nothing of that step was "
                "saved; lower train.lr, clip earlier (train.clip_norm, train.clip_start), set "
                "train.dtype=fp32, or check the clips of that step, then run the same command again to "
                "resume from the last checkpoint"
            )

    def place(self) -> str:
        """Return the ranks of several whose loss was the first that is not finite, as text."""
        size = len(self.bad_ranks)
        ranks = ", ".join(str(rank) for rank, bad in enumerate(self.bad_ranks.tolist()) if bad)
        if size == 1:
            return ""
        if not ranks:
            return f" (the sum of the gradients; the loss of each of {size} ranks is finite)"
        return f" on rank {ranks} of {size}"
