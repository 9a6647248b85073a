# SPDX-License-Identifier: Apache-2.0
"""G6 and G7: an FVD of 2048 clips of XL/2, and the decoder: python benchmarks/gpu/score.py [--smoke].

Sampling (20 guided steps) and decoding are measured on two batches and multiplied; features and statistics
of 2048 clips are measured whole. Weights are random, I3D's too: the distance means nothing, its checks do.
"""

from collections.abc import Callable, Sequence

import torch
from clip import Loop, Way, decoder
from goals import Run, wall

from latte.data.clips import to_uint8
from latte.evaluation.detectors import build_detector
from latte.evaluation.frechet import frechet_distance
from latte.inference.generate import autocast

CLIPS = 2048
BATCH = 32
GROUP = 16  # clips that pass the detector at once
FEATURE_RMS = 1e-3  # of features on the GPU, relative to the CPU's
MEMORY_GROWTH = 1.1  # of decoding four times as many frames in slices


def features(run: Run) -> float:
    """Check the detector against the CPU, then time features and statistics of all clips; return seconds."""
    clips, batch, side = (18, 6, 32) if run.smoke else (CLIPS, 256, 256)
    draw = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (batch, 16, side, side, 3), generator=draw, dtype=torch.uint8)
    name = "builtin" if run.smoke else "random-i3d"
    on_cpu = build_detector(name, "cpu")
    detector = build_detector(name, run.device, group=2 if run.smoke else GROUP)
    error = run.close("I3D features", detector(frames[:2]), on_cpu(frames[:2]), FEATURE_RMS)

    def score() -> float:
        real, fake = (
            torch.cat([detector(frames) + 0.01 * index for index in range(clips // batch)]) for _ in range(2)
        )
        return frechet_distance(real, fake + 1.0)

    expected = float(detector.dim)  # equal scatter, means apart by 1 in each of k features
    found = score()
    run.require(abs(found - expected) < 1e-3 * expected, f"the distance is {found}, expected {expected}")
    seconds = wall(score, run.device, 1)
    run.save("G6 features and statistics", features_s=round(seconds, 3), clips=clips, feature_rms=error)
    return seconds


@torch.inference_mode()
def whole_score(run: Run, features_s: float) -> None:
    """Time batches of sampling and decoding, and add up."""
    batch = 2 if run.smoke else BATCH
    model = run.model(run.config())
    ours = autocast(run.compiled(model), run.device, torch.bfloat16)
    label = torch.zeros(batch, dtype=torch.long, device=run.device)
    loop = Loop(run, model, {"label": label}, {"label": label - 1}, 7.0, batch)
    way = Way("dpmpp", 3 if run.smoke else 20)
    decode = decoder(run)

    def clips() -> None:
        z = loop.latent(ours, way)
        for part in z.split(4):
            to_uint8(decode(part).float())

    seconds = wall(clips, run.device, 2) / batch
    minutes = (CLIPS * seconds + features_s) / 60
    run.save("G6 score of 2048 clips", minutes=round(minutes, 3), clip_s=round(seconds, 5), batch=batch)


@torch.inference_mode()
def decoding(run: Run) -> None:
    """G7: 16 frames of 256 and 512, and the peak memory of slices."""
    decode = decoder(run)
    frames, scale = (1, 8) if run.smoke else (16, 1)
    for side in (256, 512):
        z = torch.randn(1, frames, 4, side // 8 // scale, side // 8 // scale, device=run.device)
        run.require(bool(decode(z).isfinite().all()), "a decoded frame holds NaN/Inf")
        frame_bytes = 2 * 3 * side**2  # bf16
        working = []
        for times in (1, 4):
            longer = z.repeat(1, times, 1, 1, 1)
            held = 2 * times * frames * frame_bytes  # slices, and the clip made of them
            working.append(peak(run, lambda longer=longer: decode(longer)) - held)
        seconds = wall(lambda z=z: decode(z), run.device, 5)
        run.save(
            f"G7 decode 16 frames of {side}",
            decode_s=round(seconds, 5),
            working_gib=[round(found / 2**30, 3) for found in working],
            flat_memory=working[1] <= MEMORY_GROWTH * working[0] or run.smoke,
        )


def peak(run: Run, work: Callable[[], object]) -> int:
    """Return the peak bytes on the GPU during ``work()``; 0 elsewhere."""
    if run.device.type != "cuda":
        work()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both."""
    run = Run(__doc__.splitlines()[0], argv)
    whole_score(run, features(run))
    decoding(run)


if __name__ == "__main__":
    main()
