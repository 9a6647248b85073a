# SPDX-License-Identifier: Apache-2.0
"""Seconds of a forward pass without gradients: python benchmarks/forward.py --size S --batch 1."""

import argparse
from collections.abc import Sequence

import measure
import torch

from latte.profile.flops import count


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure, print one JSON line, return it."""
    parser = argparse.ArgumentParser(description=__doc__)
    measure.add_arguments(parser)
    measure.add_model_arguments(parser)
    options = parser.parse_args(argv)
    device, dtype = measure.prepare(options)
    config = measure.model_config(options)
    model = measure.busy_model(config, device, options.compile).to(dtype).eval().requires_grad_(False)
    z = torch.randn(
        options.batch,
        config.num_frames,
        config.latent_channels,
        *config.grid_size,
        device=device,
        dtype=dtype,
    )
    t = torch.full((options.batch,), 500, device=device)
    label = None if config.num_classes is None else torch.zeros_like(t)

    forward = measure.Task(
        "forward", lambda: model(z, t, label), float(count(config).operations * options.batch)
    )
    yard = measure.matmul(device, dtype)
    with torch.inference_mode():
        times = measure.timed(options, [forward, yard], device)
    return measure.report("forward", forward, yard, times, device, measure.settings_of(config, options))


if __name__ == "__main__":
    main()
