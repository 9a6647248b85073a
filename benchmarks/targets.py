# SPDX-License-Identifier: Apache-2.0
"""Speed and memory against a model organised as the released code is: python benchmarks/targets.py --size S.

Forward pass, guided sampling step and training step of ``plain.py`` and of ours in every precision, with
compiled blocks and with recomputed activations, in turns in one process with the same weights, one JSON line
each. ``plain_over`` is how many times faster than ``plain.py`` a way is. Then the growth of cost with four
times the frames or tokens, against that of the operations. Activations are counted, not timed. Only on
demand, ``--parts profile`` divides the time of forward pass and training step among kinds of operators.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import measure
import torch
from plain import PlainLatte
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.guidance import guided
from latte.diffusion.loss import OBJECTIVES
from latte.distributed import Group
from latte.inference.generate import autocast
from latte.model.compiled import compile_blocks
from latte.model.latte import Latte
from latte.profile.flops import count
from latte.training.optim import TrainState

Ways = dict[str, Callable[[], object]]
PARTS = ("forward", "sampling", "step", "activations", "growth", "profile")
KINDS = {  # of operators, by names of torch's; the rest are elementwise
    "products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::_int_mm", "aten::mkldnn", "aten::linear"),
    "attention": ("aten::_scaled_dot", "aten::_softmax", "aten::softmax"),
    "norm": ("aten::native_layer_norm",),
    "gelu": ("aten::gelu", "aten::sigmoid"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::to", "aten::_to_copy", "aten::contiguous"),
    "sums and extremes": ("aten::sum", "aten::amax", "aten::amin", "aten::linalg_vector_norm"),
    "optimizer": ("aten::_fused", "aten::_foreach"),
}


def copied(model: Latte, compiled: bool = False, recompute: bool = False) -> Latte:
    """A model with the weights of ``model``, set up as asked."""
    found = copy.deepcopy(model)
    found.recompute(recompute)
    if compiled:
        compile_blocks(found, torch.device("cpu"))
    return found


def inputs(model: Latte, clips: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (b f c h w), timesteps and labels (b,)."""
    config = model.config
    z = torch.randn(clips, config.num_frames, config.latent_channels, *config.grid_size)
    return z, torch.full((clips,), 500), torch.zeros(clips, dtype=torch.long)


def callers(model: Latte, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """The denoiser of every way, as sampling calls it."""
    cpu = torch.device("cpu")
    found: dict[str, Callable[..., Tensor]] = {"plain": PlainLatte(model), "fp32": model}
    found["bf16"] = autocast(model, cpu, torch.bfloat16)
    found["int8"] = autocast(model, cpu, torch.int8)
    if compiled:
        found["fp32 compiled"] = copied(model, compiled=True)
        found["bf16 compiled"] = autocast(copied(model, compiled=True), cpu, torch.bfloat16)
    return found


def forward_ways(calls: dict[str, Callable[..., Tensor]], model: Latte) -> tuple[Ways, dict[str, float]]:
    """Forward passes of one clip, and their relative RMS distances from plain.py's."""
    z, t, label = inputs(model, 1)
    exact = calls["plain"](z, t, label=label)
    errors = {name: distance(call(z, t, label=label), exact) for name, call in calls.items()}
    return {name: lambda call=call: call(z, t, label=label) for name, call in calls.items()}, errors


def sampling_ways(calls: dict[str, Callable[..., Tensor]], model: Latte) -> tuple[Ways, dict[str, float]]:
    """Guided evaluations of one clip."""
    z, t, label = inputs(model, 1)
    steps = {name: guided(call, {"label": label}, {"label": label - 1}, 2.0) for name, call in calls.items()}
    exact = steps["plain"](z, t)
    errors = {name: distance(step(z, t), exact) for name, step in steps.items()}
    return {name: lambda step=step: step(z, t) for name, step in steps.items()}, errors


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative RMS distance."""
    error = (found.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    return float(f"{float(error):.3g}")


class Step:
    """A training step on fixed latents: loss, backward, clipping, AdamW, EMA, as the package does them."""

    def __init__(self, network: nn.Module, model: Latte, dtype: torch.dtype, clips: int):
        self.network = network
        self.dtype = dtype
        torch.manual_seed(0)
        self.state = TrainState(model, 1e-4, 0.0, 0.9999)
        self.z, self.t, self.label = inputs(model, clips)
        self.eps = torch.randn_like(self.z)
        self.process = build_process(DiffusionConfig())

    def loss(self) -> Tensor:
        """The paper's objective."""

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                return self.network(z, t, label=self.label).float()

        return OBJECTIVES["paper"](denoise, self.process, self.z, self.t, self.eps).total.mean()

    def __call__(self) -> None:
        loss = self.loss()
        loss.backward()
        self.state.update(1, loss.detach().repeat(3), 1e-4, 1.0, Group())


def step_ways(model: Latte, compiled: bool, clips: int) -> dict[str, Step]:
    """Training steps of every way."""
    half = torch.bfloat16
    own = copied(model)
    found = {"plain": Step(PlainLatte(own), own, torch.float32, clips)}
    settings: dict[str, tuple[dict[str, bool], torch.dtype]] = {
        "fp32": ({}, torch.float32),
        "fp32 recompute": ({"recompute": True}, torch.float32),
        "bf16": ({}, half),
        "bf16 recompute": ({"recompute": True}, half),
    }
    if compiled:
        settings["fp32 compiled"] = ({"compiled": True}, torch.float32)
        settings["bf16 compiled"] = ({"compiled": True}, half)
    for name, (changes, dtype) in settings.items():
        changed = copied(model, **changes)
        found[name] = Step(changed, changed, dtype, clips)
    return found


def saved_bytes(run: Callable[[], Any], weights: set[int]) -> int:
    """Bytes that ``run()`` saves for the backward pass, each storage once, without ``weights``."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def activations(model: Latte, options: argparse.Namespace) -> None:
    """Print the bytes of activations of every way as shares of plain.py's."""
    steps = step_ways(model, False, options.batch)
    for name, stages in (("bf16 checkpointed", True), ("bf16 checkpointed pairs", "pairs")):
        changed = copied(model, recompute=True)
        changed.gradient_checkpointing = stages
        steps[name] = Step(changed, changed, torch.bfloat16, options.batch)
    sizes = {}
    for name, step in steps.items():
        weights = {p.untyped_storage().data_ptr() for p in step.network.parameters()}
        sizes[name] = saved_bytes(step.loss, weights)
    shares = {name: round(size / sizes["plain"], 4) for name, size in sizes.items()}
    emit("activations", options, bytes=sizes, share_of_plain=shares)


def growth(options: argparse.Namespace) -> None:
    """Time four times the frames and four times the tokens, as multiples of the growth of operations."""
    small = replace(
        measure.model_config(options), num_frames=options.frames // 2, latent_size=options.latent // 2
    )
    larger = {
        "base": small,
        "frames": replace(small, num_frames=4 * small.num_frames),
        "tokens": replace(small, latent_size=2 * small.grid_size[0]),
    }
    tasks = []
    for name, config in larger.items():
        model = measure.busy_model(config, torch.device("cpu")).eval().requires_grad_(False)
        given = inputs(model, 1)
        work = float(count(config).operations)
        tasks.append(measure.Task(name, lambda model=model, given=given: model(*given), work))
    with torch.inference_mode():
        times = measure.timed(options, tasks, torch.device("cpu"))
    operations = {task.name: task.operations for task in tasks}
    found = {
        name: {
            "time": round(times.ratio(name, "base"), 3),
            "operations": round(operations[name] / operations["base"], 3),
            "time_over_operations": round(
                times.ratio(name, "base") * operations["base"] / operations[name], 3
            ),
        }
        for name in ("frames", "tokens")
    }
    emit("growth", options, rounds=len(times.loads), base=[small.num_frames, small.grid_size[0]], **found)


def kind_of(operator: str) -> str:
    """The key of KINDS that ``operator`` belongs to."""
    for kind, names in KINDS.items():
        if operator.startswith(names):
            return kind
    return "elementwise and the rest"


def profile(ways: Ways, options: argparse.Namespace, what: str) -> None:
    """Print the share of the time that each kind of operator takes, and the largest operators."""
    found = {}
    for name, run in ways.items():
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
            for _ in range(options.rounds):
                run()
        times = {row.key: row.self_cpu_time_total for row in record.key_averages()}
        whole = sum(times.values())
        shares = dict.fromkeys([*KINDS, "elementwise and the rest"], 0.0)
        for operator, spent in times.items():
            shares[kind_of(operator)] += spent / whole
        largest = sorted(times, key=times.__getitem__, reverse=True)[:8]
        found[name] = {
            "shares": {kind: round(share, 3) for kind, share in shares.items()},
            "largest": {operator: round(times[operator] / whole, 3) for operator in largest},
            "milliseconds": round(whole / options.rounds / 1000, 1),
        }
    emit(f"profile of the {what}", options, ways=found)


def timed(what: str, ways: Ways, work: float, options: argparse.Namespace, **more: Any) -> None:
    """Time ``ways`` in turn and print their line."""
    tasks = [measure.Task(name, run, work) for name, run in ways.items()]
    yard = measure.matmul(torch.device("cpu"), torch.float32)
    times = measure.timed(options, [*tasks, yard], torch.device("cpu"))
    found = {
        name: {
            "plain_over": round(times.ratio("plain", name), 3),
            "spread": round(times.spread(name), 3),
            "share_of_matmul": round(work / yard.operations / times.ratio(name, "matmul"), 4),
        }
        for name in ways
    }
    facts = {
        "rounds": len(times.loads),
        "rejected": times.rejected,
        "plain_s": round(times.median("plain"), 4),
    }
    emit(what, options, **facts, ways=found, **more)


def emit(what: str, options: argparse.Namespace, **line: Any) -> None:
    """Print a JSON line."""
    shared = {"machine": measure.machine(torch.device("cpu")), "threads": torch.get_num_threads()}
    shared |= {"torch": torch.__version__, "commit": measure.commit(), "settings": vars(options)}
    print(json.dumps({"what": what, **line, **shared}, default=str), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print a line per part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    measure.add_arguments(parser)
    measure.add_model_arguments(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    parser.set_defaults(classes=101, device="cpu")
    options = parser.parse_args(argv)
    measure.prepare(options)
    config = measure.model_config(options)
    model = measure.busy_model(config, torch.device("cpu"))
    compiled = options.compile == "blocks"
    work = float(count(config).operations)
    fixed = copied(model).eval().requires_grad_(False)
    if {"forward", "sampling"} & set(options.parts):
        calls = callers(fixed, compiled)
        for part, make, rows in (("forward", forward_ways, 1), ("sampling", sampling_ways, 2)):
            if part in options.parts:
                with torch.inference_mode():
                    ways, errors = make(calls, fixed)
                    timed(part, ways, rows * work, options, relative_rms=errors)
        del calls
    if "step" in options.parts:
        steps = step_ways(model, compiled, options.batch)
        losses = {name: float(f"{float(step.loss().detach()):.6g}") for name, step in steps.items()}
        timed("step", dict(steps), 3 * work * options.batch, options, losses=losses)
    if "profile" in options.parts:
        with torch.inference_mode():
            ways, _ = forward_ways(callers(fixed, False), fixed)
            profile(ways, options, "forward pass")
        profile(dict(step_ways(model, False, options.batch)), options, "training step")
    if "activations" in options.parts:
        activations(model, options)
    if "growth" in options.parts:
        growth(options)


if __name__ == "__main__":
    main()
