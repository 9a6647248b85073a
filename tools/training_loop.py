# SPDX-License-Identifier: Apache-2.0
"""The training loop that the built-in networks share: AdamW with warm-up and cosine decay, a log, and a state
file from which a stopped training resumes.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latte.checks import check

KEEP_EVERY = 500  # steps between two writes of the state
LOG_EVERY = 100  # steps
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
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


def learning_rate(config: TrainingConfig, step: int, warmup_steps: int) -> float:
    """Return the learning rate of step 0, 1, ...: linear warm-up, times a cosine that decays to 0."""
    warmup = min(1.0, (step + 1) / warmup_steps)
    return config.lr * (warmup * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


def train(
    model: nn.Module,
    loss_of: Callable[[int], Tensor],
    config: TrainingConfig,
    *,
    warmup_steps: int,
    max_norm: float,
    keep: Path | None = None,
) -> None:
    """Minimise ``loss_of(step)`` over the parameters of ``model``, gradients clipped to ``max_norm``.

    The state is written to the file ``keep`` every KEEP_EVERY steps, and resumed from there; InputError for
    the state of other settings. Buffers are not part of it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-3)
    first = 0
    if keep and keep.exists():
        first = read_state(keep, model, optimizer, config)
    started = time.process_time()
    recent: list[float] = []
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, warmup_steps)
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        recent = [*recent[1 - LOG_EVERY :], loss.item()]
        if (step + 1) % LOG_EVERY == 0 or step == config.steps - 1:
            mean = sum(recent) / len(recent)
            seconds = time.process_time() - started
            print(f"step {step + 1} loss {mean:.4f} {seconds:.0f} CPU seconds", flush=True)
        if keep and (step + 1) % KEEP_EVERY == 0:
            write_state(keep, model, optimizer, config, step + 1)


def write_state(
    path: Path, model: nn.Module, optimizer: torch.optim.AdamW, config: TrainingConfig, step: int
) -> None:
    """Save the weights and both optimizer moments of each after ``step`` steps of ``config``."""
    state = {}
    for name, parameter in model.named_parameters():
        state[f"weight {name}"] = parameter.detach().contiguous()
        for kind in MOMENTS:
            if parameter in optimizer.state:
                state[f"{kind} {name}"] = optimizer.state[parameter][kind].contiguous()
    temporary = path.with_name(f"{path.name}.part")
    save_file(state, temporary, metadata={"step": str(step), "config": json.dumps(asdict(config))})
    temporary.replace(path)


def read_state(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, config: TrainingConfig) -> int:
    """Restore what ``write_state`` saved and return the number of steps done; InputError if it is of another
    training.
    """
    with safe_open(path, "pt") as file:
        written = file.metadata()
    same = json.loads(written["config"]) == asdict(config)
    check(same, f"{path} is the state of {written['config']}; delete it, or train with those settings")
    state = load_file(path)
    step = int(written["step"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"weight {name}"])
            if f"{MOMENTS[0]} {name}" in state:
                moments = {
                    kind: state[f"{kind} {name}"].clone(memory_format=torch.preserve_format)
                    for kind in MOMENTS
                }
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step
