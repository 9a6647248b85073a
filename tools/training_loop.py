# SPDX-License-Identifier: Apache-2.0
"""The training loop that the built-in networks share: AdamW with warm-up and cosine decay, a log, and a state
file from which a stopped training resumes.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from latte.checks import check

KEEP_EVERY = 500  # steps between two writes of the state
LOG_EVERY = 100  # steps
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class TrainingConfig:
    """Settings that every training has; each tool sets its own defaults."""

    steps: int
    batch: int  # samples per step
    lr: float  # peak learning rate
    clips: int  # rendered once
    seed: int = 0


def fresh_network(kind: type[Network], seed: int) -> Network:
    """Return a network, channels last, whose random weights are a function of ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def schedule(config: TrainingConfig, step: int, warmup_steps: int, decay_steps: int | None = None) -> float:
    """Return the factor on the learning rate at step 0, 1, ...: linear warm-up, times a cosine that decays to
    0; or, with ``decay_steps``, times 1 that decays linearly to 0 in the last steps.
    """
    warmup = min(1.0, (step + 1) / warmup_steps)
    if decay_steps is None:
        return warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return warmup * min(1.0, (config.steps - step) / decay_steps)


def train(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: TrainingConfig,
    *,
    warmup_steps: int,
    max_norm: float,
    keep: Path | None = None,
    keep_every: int | None = None,
    decay_steps: int | None = None,
    optimizers: Sequence[Optimizer] | None = None,
) -> None:
    """Minimise ``loss_of(step)`` over the parameters of ``model``, gradients clipped to ``max_norm``.

    ``optimizers`` that share the parameters, instead of AdamW; the ``lr`` that each has at first is its peak.

    The state is written to the file ``keep`` every ``keep_every`` steps, and resumed from there; InputError
    for the state of other settings. Buffers are not part of it. With ``decay_steps`` the steps before the
    decay are the same whatever the number of steps: their state may be resumed with another number, and that
    of the last of them stays in ``keep`` with the ending .stable.
    """
    if optimizers is None:
        optimizers = [torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-3)]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    first = 0
    if keep and keep.exists():
        first = read_state(keep, model, optimizers, config, decay_steps)
    started = time.process_time()
    recent: list[float] = []
    for step in range(first, config.steps):
        factor = schedule(config, step, warmup_steps, decay_steps)
        loss = loss_of(step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
        recent = [*recent[1 - LOG_EVERY :], loss.item()]
        if (step + 1) % LOG_EVERY == 0 or step == config.steps - 1:
            mean = sum(recent) / len(recent)
            seconds = time.process_time() - started
            print(f"step {step + 1} loss {mean:.4f} {seconds:.0f} CPU seconds", flush=True)
        if keep and (step + 1) % (keep_every or KEEP_EVERY) == 0:
            write_state(keep, model, optimizers, config, step + 1)
        if keep and decay_steps is not None and step + 1 == config.steps - decay_steps:
            write_state(stable_state(keep), model, optimizers, config, step + 1)


def stable_state(keep: Path) -> Path:
    """Return where the state before the decay of the learning rate is kept."""
    return keep.with_name(f"{keep.name}.stable")


def write_state(
    path: Path, model: nn.Module, optimizers: Sequence[Optimizer], config: TrainingConfig, step: int
) -> None:
    """Save the weights and all that the optimizers keep of each after ``step`` steps of ``config``."""
    state = {}
    for name, parameter in model.named_parameters():
        state[f"weight {name}"] = parameter.detach().contiguous()
        for optimizer in optimizers:
            for kind, kept in optimizer.state.get(parameter, {}).items():
                state[f"{kind} {name}"] = kept.contiguous()
    temporary = path.with_name(f"{path.name}.part")
    save_file(state, temporary, metadata={"step": str(step), "config": json.dumps(asdict(config))})
    temporary.replace(path)


def read_state(
    path: Path,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    config: TrainingConfig,
    decay_steps: int | None = None,
) -> int:
    """Restore what ``write_state`` saved and return the number of steps done; InputError if it is of another
    training. Before the last ``decay_steps`` another number of steps is the same training.
    """
    with safe_open(path, "pt") as file:
        written = file.metadata()
    step = int(written["step"])
    settings = json.loads(written["config"])
    if decay_steps is not None and step <= min(
        settings["steps"] - settings["decay_steps"], config.steps - decay_steps
    ):
        settings |= {"steps": config.steps, "decay_steps": decay_steps}
    same = settings == asdict(config)
    check(same, f"{path} is the state of {written['config']}; delete it, or train with those settings")
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        kind, name = key.split(" ", 1)
        kept.setdefault(name, {})[kind] = tensor
    owners = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.copy_(kept[name].pop("weight"))
        owners[parameter].state[parameter] = {
            kind: tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor.clone()
            for kind, tensor in kept[name].items()
        }
    return step
