# SPDX-License-Identifier: Apache-2.0
"""Sample with your own solver: examples/custom_sampler.py [STEPS]."""

import sys

import torch

import latte
from latte.diffusion.config import SAMPLERS
from latte.diffusion.samplers import Sampler
from latte.diffusion.schedules import trailing_timesteps
from latte.diffusion.solvers import with_progress


def clipped(denoise, process, z, next_noise, eta, progress):
    """DDIM whose estimate of the clean latent stays within 4 deviations; z (b f c h w) is pure noise."""
    for i in with_progress(range(process.num_steps - 1, -1, -1), progress):
        t = torch.full((len(z),), i, device=z.device)
        step = process.reverse_step(denoise(z, process.original(t)), z, t)
        alpha = process.alphas_cumprod[i].item()
        alpha_prev = process.alphas_cumprod_prev[i].item()
        z0 = step.z0.clamp(-4, 4)
        eps = (z - alpha**0.5 * z0) / (1 - alpha) ** 0.5  # the noise that belongs to the clipped estimate
        z = alpha_prev**0.5 * z0 + (1 - alpha_prev) ** 0.5 * eps
    return z


def main(steps: int = 20) -> None:
    SAMPLERS["clipped"] = Sampler(clipped, trailing_timesteps)  # now a name like the others
    pipe = latte.VideoPipeline.from_pretrained("builtin-shapes")
    options = {"num_inference_steps": steps, "guidance_scale": 4.0, "seed": 7, "output_type": "uint8"}
    videos = {name: pipe(class_labels=["up"], sampler=name, **options).frames for name in ("ddim", "clipped")}
    for name, video in videos.items():
        latte.export_to_video(video[0], f"{name}.mp4", fps=8)
        print(f"{name}: {video.dtype} {video.shape}, see {name}.mp4")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
