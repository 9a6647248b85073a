# SPDX-License-Identifier: Apache-2.0
"""``dtype=fastest``: the precision of matrix products that is fastest on this machine for this model.

Which one that is depends on the processor, on the version of torch and on the width of the model, so two
blocks of the model are measured in every precision, in turns, and the answer is kept in the user's cache.
Among those within TIE of the best the most exact one is taken. int8 and fp8 are never measured: their error
depends on the weights, so they are chosen by name.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from latte.checks import check
from latte.files import keep_entry, kept_entries
from latte.model.config import DenoiserConfig
from latte.model.denoiser import Denoiser
from latte.runtime import DTYPES, FASTEST, generator, machine_name, resolve_dtype
from latte.tensors import without_memory

LOG = logging.getLogger(__name__)
FILE = "fastest.json"
CANDIDATES = ("fp32", "bf16")  # the most exact one first
TIE = 1.03
BUDGET = 0.2  # seconds of measuring, after a warm-up
FEWEST_ROUNDS = 2
MOST_OPERATIONS = 3e9  # of a forward pass that is measured; larger shapes are cut
FEWEST_TOKENS = 512  # but not below this: with few tokens converting the weights would decide
Time = Callable[[], float]


def dtype_for(
    dtype: str | torch.dtype, device: torch.device, config: DenoiserConfig, clips: int, training: bool
) -> torch.dtype:
    """Return ``resolve_dtype(dtype, device)``; for 'fastest' the measured one for ``clips`` clips at once,
    with the backward pass if ``training``. InputError for a dtype that ``device`` lacks.
    """
    if dtype != FASTEST:
        return resolve_dtype(dtype, device)
    return DTYPES[fastest(config, device, clips, training)]


def fastest(config: DenoiserConfig, device: torch.device, clips: int, training: bool) -> str:
    """Return the name in CANDIDATES of the fastest dtype, measured once per machine, torch and shape."""
    shape, clips = cut(config, clips)
    key = json.dumps([machine_name(device), torch.__version__, repr(shape), clips, training])
    seconds = remembered(key)
    known = seconds is not None
    if seconds is None:
        seconds = measure(products(shape, clips, device, training))
        keep_entry(FILE, key, seconds)
    name = choice(seconds)
    LOG.info("dtype: fastest is %s (%s)", name, describe(seconds) + (", measured earlier" if known else ""))
    return name


def choice(seconds: dict[str, float]) -> str:
    """Return the most exact of the dtypes whose time is within TIE of the best."""
    best = min(seconds.values())
    return next(name for name in CANDIDATES if seconds.get(name, float("inf")) <= TIE * best)


def describe(seconds: dict[str, float]) -> str:
    """Return the speeds as multiples of the first dtype's, and which dtypes this device lacks."""
    first = next(iter(seconds.values()))
    parts = [f"{name} {first / value:.2f} x" for name, value in seconds.items()]
    parts += [f"no {name} on this device" for name in CANDIDATES if name not in seconds]
    return ", ".join(parts)


def remembered(key: str) -> dict[str, float] | None:
    """Return dtype -> seconds as measured earlier under ``key``; None without, or when it is damaged."""
    found = kept_entries(FILE).get(key)
    if not isinstance(found, dict) or not found.keys() <= set(CANDIDATES) or not found:
        return None
    good = all(isinstance(value, float) and 0 < value < float("inf") for value in found.values())
    return found if good else None


def cut(config: Any, clips: int) -> tuple[Any, int]:
    """Return ``config`` with two blocks, and the shape cut until its forward pass has at most
    MOST_OPERATIONS or FEWEST_TOKENS: fewer clips, then frames, then rows and columns.
    """
    width = config.dimensions[1]
    most = max(round(MOST_OPERATIONS / (48 * width**2)), FEWEST_TOKENS)  # 24 width^2 operations a block
    shape = replace(config, depth=1 if config.reads_text else 2)
    clips = max(min(clips, most // shape.num_tokens), 1)
    tokens = shape.num_tokens // (shape.num_frames // shape.frames_per_token)
    frames = min(shape.num_frames // shape.frames_per_token, max(most // tokens, 2))
    shape = replace(shape, num_frames=frames * shape.frames_per_token)
    while shape.num_tokens > most and min(shape.grid_size) > 8 * shape.patch_size:
        rows, columns = (side // 2 // shape.patch_size * shape.patch_size for side in shape.grid_size)
        shape = replace(shape, latent_size=(rows, columns))
    return shape, clips


def products(
    config: DenoiserConfig, clips: int, device: torch.device, training: bool
) -> dict[str, Callable[[], None]]:
    """Return dtype -> a function that computes a model of ``config`` once, with random weights."""
    model = busy_model(config, device)
    z = torch.randn(
        clips, config.num_frames, config.latent_channels, *config.grid_size, generator=generator("measure")
    ).to(device)  # (b f c h w)
    t = torch.full((clips,), 500, device=device)
    condition = {name: value.to(device) for name, value in model.example_condition(clips).items()}

    def compute(dtype: torch.dtype) -> None:
        with (
            torch.set_grad_enabled(training),
            torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
        ):
            output = model(z, t, **condition)
        if training:
            output.float().square().mean().backward()
            model.zero_grad()
        output.flatten()[0].item()  # the device has finished

    return {name: lambda dtype=DTYPES[name]: compute(dtype) for name in CANDIDATES}


def busy_model(config: DenoiserConfig, device: torch.device) -> Denoiser:
    """Return a model without zero weights, whose products would be cheaper on some processors."""
    with without_memory():
        model = config.build()
    model.to_empty(device=device)
    values = torch.randn(1 << 16, generator=generator("weights")).mul_(0.02).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            parameter.copy_(values.repeat(-(-count // len(values)))[:count].view_as(parameter))
    return model.eval()


def measure(work: dict[str, Callable[[], Any]], now: Time = time.perf_counter) -> dict[str, float]:
    """Return name -> the least seconds of ``work[name]()``, all in turns for BUDGET seconds; one that this
    device lacks is left out. InputError when the first one fails.
    """
    working: dict[str, Callable[[], Any]] = {}
    for name, run in work.items():
        try:
            run()
            working[name] = run
        except (RuntimeError, NotImplementedError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            check(bool(working), f"dtype is fastest, but {name} fails on this device: {reason}")
            LOG.info("dtype: %s does not work on this device (%s)", name, reason)
    rounds: list[dict[str, float]] = []
    end = now() + BUDGET
    while now() < end or len(rounds) < FEWEST_ROUNDS:
        rounds.append({name: timed(run, now) for name, run in working.items()})
    return {name: min(row[name] for row in rounds) for name in working}


def timed(run: Callable[[], Any], now: Time) -> float:
    """Return the seconds of ``run()``."""
    start = now()
    run()
    return max(now() - start, 1e-9)
