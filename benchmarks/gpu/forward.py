# SPDX-License-Identifier: Apache-2.0
"""G1: forward pass of XL/2 in bf16 and FP8: python benchmarks/gpu/forward.py [--smoke].

In turns in one process: a model organised as the released code is, ours with weights in bf16, its blocks
compiled, the whole as CUDA graphs, ours as sampling calls it (float32 weights under autocast), FP8.
"""

import copy
from collections.abc import Sequence

from goals import BF16_RMS, Run, measure, torch
from plain import PlainLatte

from latte.inference.generate import autocast
from latte.profile.flops import count

FP8_RMS = 1e-2  # the goal; FP8 that is further off than this is reported, five times as far is an error


def main(argv: Sequence[str] | None = None) -> None:
    """Measure batch 1 and 8."""
    run = Run(__doc__.splitlines()[0], argv)
    config = run.config()
    model = run.model(config)
    half = copy.deepcopy(model).to(torch.bfloat16)
    calls = {
        "plain": autocast(PlainLatte(model), run.device, torch.bfloat16),
        "bf16": half,
        "blocks": run.compiled(half),
        "sampling": autocast(model, run.device, torch.bfloat16),
    }
    if not run.smoke:
        calls["graphs"] = torch.compile(copy.deepcopy(half), mode="reduce-overhead")
    if run.has_fp8:
        calls["fp8"] = autocast(model, run.device, torch.float8_e4m3fn)
    for batch in (1, 8):
        one_batch(run, calls, model, batch)


@torch.inference_mode()
def one_batch(run: Run, calls: dict, model: torch.nn.Module, batch: int) -> None:
    """Check every way against float32, then time all of them."""
    config = model.config
    shape = (batch, config.num_frames, config.latent_channels, *config.grid_size)
    z = torch.randn(shape, device=run.device)
    t = torch.linspace(10, 990, batch, device=run.device).long()
    label = torch.arange(batch, device=run.device)
    exact = model(z, t, label=label)
    tasks, errors = [], {}
    for name, call in calls.items():
        own = z.bfloat16() if name in ("bf16", "blocks", "graphs") else z
        most = 5 * FP8_RMS if name == "fp8" else BF16_RMS
        errors[name] = run.close(f"{name}, batch {batch}", call(own, t, label=label), exact, most)
        work = float(count(config).operations * batch)
        tasks.append(measure.Task(name, lambda call=call, own=own: call(own, t, label=label), work))
    times = run.times(tasks)
    by_name = {task.name: task for task in tasks}
    ways = {
        name: {
            "seconds_per_clip": round(times.median(name) / batch, 7),
            "share_of_matmul": run.share(times, task),
            "plain_over": round(times.ratio("plain", name), 3),
            "relative_rms": errors[name],
        }
        for name, task in by_name.items()
    }
    own = [name for name in ways if name not in ("plain", "fp8")]
    fastest = min(own, key=lambda name: ways[name]["seconds_per_clip"])
    run.save(f"G1 forward, batch {batch}", way=fastest, **ways[fastest], ways=ways)
    if "fp8" in ways:
        run.save(f"G1 forward, batch {batch}, fp8", **ways["fp8"])


if __name__ == "__main__":
    main()
