# SPDX-License-Identifier: Apache-2.0
"""Seconds of the I3D features of a clip, ours against a plain port of the public module: python
benchmarks/i3d.py.

Both have the same random weights. Also measured: the plain port in channels-last order, ours without the
explicit call to oneDNN, ours in bf16. Ratios are medians over rounds in which all of them ran alternately.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import measure
import torch
from torch import Tensor, nn

from latte.evaluation.detector_files import rename
from latte.evaluation.networks import i3d, layers
from latte.evaluation.networks.layers import Conv, channels_last, fold_norms

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from reference.i3d import (  # the plain port lives with the tests, which compare its values
    PlainI3D,
    wake_norms,
)


def with_weights_of(plain: nn.Module) -> i3d.I3D:
    """Return our network with the weights of the plain port."""
    network = i3d.I3D()
    network.load_state_dict(
        fold_norms(rename(plain.state_dict(), i3d.NETWORK, "the plain port"), i3d.NORM_EPS)
    )
    channels_last(network)
    return network.eval()


def operations(network: nn.Module, clip: Tensor) -> float:
    """Return the operations of every convolution on ``clip``, 2 per multiply-add."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, Conv)
        total += 2 * module.weight[0].numel() * output.numel()

    hooks = [module.register_forward_hook(count) for module in network.modules() if isinstance(module, Conv)]
    network(clip)
    for hook in hooks:
        hook.remove()
    return float(total)


def through_public_calls(network: nn.Module, clip: Tensor) -> Tensor:
    """Return ``network(clip)`` with the convolution that torch chooses."""
    chosen, layers.convolve = layers.convolve, layers.public_convolve
    try:
        return network(clip)
    finally:
        layers.convolve = chosen


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    measure.add_arguments(parser)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="clips at once")
    options = parser.parse_args(argv)
    device, dtype = measure.prepare(options)
    torch.manual_seed(0)
    clip = torch.rand(options.batch, 3, options.frames, 224, 224).to(device) * 2 - 1
    plain = wake_norms(PlainI3D(), seed=0)
    ours = with_weights_of(plain)
    with torch.inference_mode():
        count = operations(ours, clip.cpu())
    ordered = wake_norms(PlainI3D(), seed=0).to(device, memory_format=torch.channels_last_3d)
    plain, ours, half = plain.to(device), ours.to(device), with_weights_of(plain).to(device, torch.bfloat16)
    clip_ordered, clip_half = clip.contiguous(memory_format=torch.channels_last_3d), clip.bfloat16()
    task = measure.Task("ours", lambda: ours(clip), count)
    yard = measure.matmul(device, dtype)
    others = {
        "plain": lambda: plain(clip),
        "plain_channels_last": lambda: ordered(clip_ordered),
        "ours_public_calls": lambda: through_public_calls(ours, clip),
        "ours_bf16": lambda: half(clip_half),
    }
    tasks = [task, yard, *(measure.Task(name, run) for name, run in others.items())]
    with torch.inference_mode():
        times = measure.timed(options, tasks, device)
        expected = plain(clip)
        errors = {
            "fp32": (ours(clip) - expected).abs().max(),
            "bf16": (half(clip_half).float() - expected).abs().max(),
        }
    worst = {name: float(error / expected.abs().max()) for name, error in errors.items()}
    ratios = {
        f"{name}_over_ours": round(times.ratio(name, "ours"), 3) for name in others if times.seconds[name]
    }
    settings = {
        "frames": options.frames,
        "batch": options.batch,
        "size": 224,
        "dtype": options.dtype,
        "max_other_load": options.max_other_load,
    }
    return measure.report("i3d", task, yard, times, device, settings, **ratios, difference=worst)


if __name__ == "__main__":
    main()
