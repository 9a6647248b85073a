# SPDX-License-Identifier: Apache-2.0
"""G2 and G3: seconds of one clip, guided, decoding included: python benchmarks/gpu/clip.py [--smoke].

G2: XL/2, 16 x 256 x 256, class-conditional. Compared are the released loop (its organisation of the model,
DDPM with 250 steps) and ours. G3: the text model, 16 x 512 x 512, prompts of 120 tokens. Weights are random,
so this is about time alone; how often the step cache evaluates depends on the weights, and is printed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from goals import BF16_RMS, Run, torch, wall
from plain import PlainLatte
from torch import Tensor

from latte.autoencoder.codec import CODECS, Codec
from latte.config.run import load_run
from latte.diffusion.caching import StepCache
from latte.diffusion.config import DiffusionConfig, build_process
from latte.diffusion.guidance import guidance_window, guided
from latte.diffusion.samplers import SAMPLERS, indices, sample
from latte.inference.generate import autocast
from latte.model.denoiser import Denoiser
from latte.profile.timing import make_busy
from latte.runtime import SampleNoise

HALF = (0.3, 4.0)  # noise levels that are guided in our default of 20 steps
CACHE = 0.1
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Way:
    """A way of sampling: ``steps`` of ``sampler``, guided inside ``interval``, with a step cache."""

    sampler: str
    steps: int
    interval: tuple[float, float] | None = None
    cache: float | None = None


class Loop:
    """Samples ``clips`` clips; ``evaluations`` are the model calls of the last time."""

    def __init__(self, run: Run, model: Denoiser, condition: dict, null: dict, scale: float, clips: int = 1):
        self.run = run
        self.scale = scale
        self.clips = clips
        self.given = condition, null
        config = model.config
        self.shape = config.num_frames, config.latent_channels, *config.grid_size
        self.process = build_process(DiffusionConfig())
        self.evaluations = 0

    @torch.inference_mode()
    def latent(self, call: Call, way: Way) -> Tensor:
        """The latents (b f c h w) of seeds from 0."""
        visited = indices(SAMPLERS[way.sampler], self.process.num_steps, way.steps)
        self.evaluations = 0

        def counted(z: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
            self.evaluations += 1
            return call(z, t, **condition)

        model: Call = counted
        if way.cache:
            model = StepCache(counted, way.cache, visited, self.clips)
        window = guidance_window(self.process, way.interval, visited)
        denoise = guided(model, *self.given, self.scale, window)
        noise = SampleNoise(range(self.clips))
        return sample(way.sampler, denoise, self.process, noise, self.shape, way.steps, 0.0, self.run.device)


def codec(run: Run) -> Codec:
    """Stable Diffusion's autoencoder with random weights."""
    kind = CODECS["kl"]
    network = kind.skeleton(None).to_empty(device=run.device)
    return kind(make_busy(network.apply(zeroed)), 16, run.device)


def decoder(run: Run) -> Call:
    """Its decoder in bf16."""
    autoencoder = codec(run)

    def decode(z: Tensor) -> Tensor:
        with torch.autocast(run.device.type, torch.bfloat16):
            return autoencoder.decode(z)

    return decode


def zeroed(module: torch.nn.Module) -> None:
    """Fill the module's own uninitialised weights with zeros."""
    for weight in module.parameters(recurse=False):
        torch.nn.init.zeros_(weight)


def measure_way(run: Run, loop: Loop, call: Call, way: Way, decode_s: float) -> dict:
    """Seconds of a clip, its evaluations and a check that it is finite and reproducible."""
    first = loop.latent(call, way)
    run.require(bool(first.isfinite().all()), f"{way}: the latent holds NaN/Inf")
    run.require(torch.equal(first, loop.latent(call, way)), f"{way}: the same seed gave another latent")
    seconds = wall(lambda: loop.latent(call, way), run.device, 2 if way.steps > 50 else 3)
    return {
        "denoise_s": round(seconds, 5),
        "decode_s": round(decode_s, 5),
        "clip_s": round(seconds + decode_s, 5),
        "evaluations": loop.evaluations,
        "sampler": way.sampler,
        "steps": way.steps,
    }


def class_clips(run: Run) -> None:
    """G2."""
    config = run.config()
    model = run.model(config)
    plain = autocast(PlainLatte(model), run.device, torch.bfloat16)
    ours = autocast(run.compiled(model), run.device, torch.bfloat16)
    label = torch.zeros(1, dtype=torch.long, device=run.device)
    loop = Loop(run, model, {"label": label}, {"label": label - 1}, 7.0)
    z = torch.randn(1, *loop.shape, device=run.device)
    decode = decoder(run)
    decode_s = wall(lambda: decode(z), run.device)
    steps = {"long": 4, "50": 3, "20": 3} if run.smoke else {"long": 250, "50": 50, "20": 20}
    few = Way("dpmpp", 3)
    error = run.close("compiled against plain", loop.latent(ours, few), loop.latent(plain, few), 4 * BF16_RMS)
    released = measure_way(run, loop, plain, Way("ddpm", steps["long"]), decode_s)
    run.save("G2 clip, released loop", **released)
    run.save("G2 clip, DDPM", **measure_way(run, loop, ours, Way("ddpm", steps["long"]), decode_s))
    run.save("G2 clip, 50 steps", **measure_way(run, loop, ours, Way("ddim", steps["50"]), decode_s))
    own = Way("dpmpp", steps["20"])
    run.save("G2 clip, 20 steps", **measure_way(run, loop, ours, own, decode_s), distance_3_steps=error)
    half = measure_way(run, loop, ours, Way("dpmpp", steps["20"], HALF), decode_s)
    ratio = round(released["clip_s"] / half["clip_s"], 2)
    run.save("G2 clip, own against released", ratio=ratio, **half)


def text_clips(run: Run) -> None:
    """G3."""
    words = ["data.root=none"]
    if run.smoke:
        words += ["model.depth=2", "model.width=32", "model.heads=2", "data.frames=2", "data.resolution=32"]
    config = load_run("t2v", words)[0].network
    model = run.model(config)
    length, channels = (5 if run.smoke else 120), config.caption_channels
    text = torch.randn(2, 1, length, channels, device=run.device)
    mask = torch.ones(1, length, dtype=torch.bool, device=run.device)
    loop = Loop(run, model, {"text": text[0], "mask": mask}, {"text": text[1], "mask": mask}, 7.5)
    z = torch.randn(1, *loop.shape, device=run.device)
    decode = decoder(run)
    decode_s = wall(lambda: decode(z), run.device)
    calls = {"bf16": autocast(run.compiled(model), run.device, torch.bfloat16)}
    if run.has_fp8:
        calls["fp8"] = autocast(model, run.device, torch.float8_e4m3fn)
    few = Way("dpmpp", 3)
    exact = loop.latent(model, few)
    for name, call in calls.items():
        run.close(f"text model, {name}", loop.latent(call, few), exact, 6 * BF16_RMS)
    fifty, twenty = (6, 3) if run.smoke else (50, 20)
    ways = {
        "50 steps": Way("ddim", fifty),
        "50 steps, cache": Way("ddim", fifty, cache=None if fifty < 10 else CACHE),
        "20 steps": Way("dpmpp", twenty),
    }
    for name, way in ways.items():
        run.save(f"G3 text clip, {name}", **measure_way(run, loop, calls["bf16"], way, decode_s))
    if "fp8" in calls:
        found = measure_way(run, loop, calls["fp8"], ways["50 steps"], decode_s)
        run.save("G3 text clip, 50 steps, fp8", **found)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both."""
    run = Run(__doc__.splitlines()[0], argv)
    class_clips(run)
    text_clips(run)


if __name__ == "__main__":
    main()
