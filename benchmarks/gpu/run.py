# SPDX-License-Identifier: Apache-2.0
"""The GPU goals in one run: python benchmarks/gpu/run.py [--quick]. JSON lines, also in $OUT/gpu.jsonl.

XL/2 at 16 frames of 32 x 32 latents: forward in bf16 at batch 1 and 8, the training step, how many clips fit
into one step without recomputation, and Stable Diffusion's decoder. Times are the goals of one H200; on
another GPU only shares of the matrix product's rate are compared. A result that cannot be right (not finite,
faster than the matrix product, bf16 far from fp32) ends the run.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import forward
import measure
import torch
import train_step

XL = ["--size", "XL", "--dtype", "bf16", "--device", "cuda"]
BATCHES = (8, 16, 24, 32, 40, 48)
GOALS = {  # name: (field, goal, is a smaller one better, does it hold for every GPU)
    "G1 forward, batch 1": ("share_of_matmul", 0.75, False, True),
    "G1 forward, batch 8, seconds a clip": ("seconds_per_clip", 0.0056, True, False),
    "G4 training step, clips a second": ("clips_per_second", 44.0, False, False),
    "G5 clips in one step": ("largest_batch", 40, False, False),
    "G7 decode 16 frames of 256 x 256": ("median_s", 0.030, True, False),
}


def check(line: dict) -> dict:
    """The line, when its numbers are possible."""
    share = line.get("share_of_matmul", 0.5)
    if not 0 < share <= 1.05:
        sys.exit(
            f"{line['what']}: {share} of the matrix product's rate cannot be right; "
            "is something else running on this GPU?"
        )
    return line


def precision() -> dict:
    """Return the relative RMS difference of bf16 from fp32 with equal weights; exit 1 above 5 %."""
    config = measure.ModelConfig(size="XL")
    model = measure.busy_model(config, torch.device("cuda")).eval()
    z, t = torch.randn(1, 16, 4, 32, 32, device="cuda"), torch.tensor([500], device="cuda")
    with torch.inference_mode():
        exact = model(z, t)
        rough = model.to(torch.bfloat16)(z.bfloat16(), t).float()
    error = ((rough - exact).square().mean() / exact.square().mean()).sqrt().item()
    if not error < 0.05:
        sys.exit(f"bf16 differs from fp32 by {error:.3g} (relative RMS); no time of it is worth printing")
    return {"what": "bf16 against fp32", "relative_rms": round(error, 6)}


def largest_batch(compiled: str) -> dict:
    """Peak memory of a training step without recomputation for growing batches, until one does not fit."""
    peaks = {}
    for batch in BATCHES:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            parser = argparse.Namespace(batch=batch, micro_batch=None)
            model = measure.busy_model(measure.ModelConfig(size="XL"), torch.device("cuda"), compiled)
            train_step.train_step(model, parser, torch.device("cuda"), torch.bfloat16).run()
        except torch.OutOfMemoryError:
            break
        peaks[batch] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {
        "what": "memory of a training step",
        "largest_batch": max(peaks, default=0),
        "peak_gib": peaks,
        "compile": compiled,
    }


def decode(rounds: int) -> dict:
    """Stable Diffusion's decoder with random weights in bf16, 16 frames of 256 x 256."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    network = (
        AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, **blocks)
        .eval()
        .requires_grad_(False)
    )
    network = network.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    z, device = torch.randn(16, 4, 32, 32, device="cuda", dtype=torch.bfloat16), torch.device("cuda")
    task, yard = (
        measure.Task("decode", lambda: network.decode(z).sample, 16 * 622.2e9),
        measure.matmul(device, torch.bfloat16),
    )
    with torch.inference_mode():
        times = measure.interleave([task, yard], device, rounds, 0.2, 0.1)
    return measure.report(
        "decode 16 x 256 x 256", task, yard, times, device, {"dtype": "bf16", "weights": "random"}
    )


def verdicts(answers: dict[str, dict], name: str) -> list[str]:
    """One line per goal: reached, missed, or not comparable on this GPU."""
    lines = []
    for goal, (field, goal_value, smaller, everywhere) in GOALS.items():
        found = answers[goal][field]
        reached = found <= goal_value if smaller else found >= goal_value
        fair = everywhere or "H200" in name
        word = ("reached" if reached else "missed") if fair else "not comparable, the goal is for an H200"
        lines.append(f"{goal}: {found} against {goal_value}: {word}")
    return lines


def fastest(lines: list[dict], what: str, batch: int) -> dict:
    """The line of the fastest way of compiling."""
    return min(
        (x for x in lines if x["what"] == what and x["settings"]["batch"] == batch),
        key=lambda x: x["median_s"],
    )


def main() -> None:
    """Measure everything, then say which goals are reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="eager only, three rounds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; benchmarks/forward.py and train_step.py run on a CPU")
    rounds = ["--rounds", "3" if options.quick else "7"]
    lines = [precision()]
    for compiled in ("off",) if options.quick else ("off", "blocks", "graphs"):
        for batch in (1, 8):
            line = check(forward.main([*XL, *rounds, "--batch", str(batch), "--compile", compiled]))
            lines.append({**line, "seconds_per_clip": line["median_s"] / batch})
    for compiled in ("off",) if options.quick else ("off", "blocks"):
        lines.append(check(train_step.main([*XL, *rounds, "--batch", "16", "--compile", compiled])))
    lines += [largest_batch("off"), decode(int(rounds[1]))]

    chosen = [
        *(
            fastest(lines, what, batch)
            for what, batch in (("forward", 1), ("forward", 8), ("train_step", 16))
        ),
        *lines[-2:],
    ]
    if out := os.environ.get("OUT"):
        Path(out, "gpu.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
    print(json.dumps(lines[0]), json.dumps(lines[-2]), sep="\n")
    print(
        "\n".join(verdicts(dict(zip(GOALS, chosen, strict=True)), torch.cuda.get_device_name())),
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
