# SPDX-License-Identifier: Apache-2.0
"""The memory plan of sampling against the tensors that really live while the same parts sample on the CPU."""

import gc

import pytest
import torch
from support import wake

from latte.autoencoder.codec import CODECS, CodecConfig, build_codec
from latte.inference.generate import SampleConfig, condition
from latte.inference.pipeline import VideoPipeline
from latte.inference.prompts import PromptReader
from latte.model.latte import ModelConfig
from latte.model.text import LatteText, TextConfig
from latte.profile.memory import LiveBytes, storages
from latte.profile.sampling_memory import decoding, denoising, staging
from latte.text.encoders import TextEncoderConfig
from latte.text.t5 import T5Encoder
from tiny import tiny_text
from tiny_external import CASES, save_external
from tiny_pipeline import NAMES, tiny_t5, tiny_vae

CLASSES = ModelConfig(depth=4, width=64, heads=4, num_frames=6, latent_size=16, num_classes=3)
TEXT = TextConfig(depth=2, width=64, heads=4, num_frames=6, latent_size=16, caption_channels=24)
CPU = torch.device("cpu")


def real_peak(config, clips: int, tokens: int, scale: float) -> int:
    """Most bytes alive at a time in one guided call of a real model, its weights apart."""
    model = wake(config.build()).requires_grad_(False).eval()
    labels, prompts = (
        ([0] * clips, None) if isinstance(config, ModelConfig) and config.num_classes else (None, None)
    )
    if isinstance(config, TextConfig):
        from latte.inference.prompts import Prompts

        text, mask = (
            torch.randn(clips, tokens, config.caption_channels),
            torch.ones(clips, tokens, dtype=torch.bool),
        )
        prompts = Prompts(text, mask, text.clone(), mask.clone())
    denoise = condition(model, labels, prompts, clips, scale, torch.float32)(slice(0, clips))
    z, t = (
        torch.randn(clips, config.num_frames, config.latent_channels, *config.grid_size),
        torch.zeros(clips, dtype=torch.long),
    )
    with torch.no_grad():
        denoise(z, t)  # tables that are kept are made
        with LiveBytes() as live:
            denoise(z, t)
    return live.peak


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "config", [CLASSES, ModelConfig(**{**CLASSES.__dict__, "num_classes": None, "variant": 4}), TEXT]
)
def test_denoising_takes_what_the_plan_says(config, scale):
    if isinstance(config, ModelConfig) and config.num_classes is None:
        scale = 1.0
    found = denoising(config, 7, SampleConfig(batch=2, guidance=scale), torch.float32)
    assert found.weights == sum(parameter.nbytes for parameter in config.build().parameters())
    assert found.working == pytest.approx(real_peak(config, 2, 7, scale), rel=0.03)


def test_guidance_and_the_batch_double_the_work_and_low_precision_lowers_it():
    plain, guided, two = (
        denoising(TEXT, 7, SampleConfig(batch=batch, guidance=scale), torch.float32).working
        for batch, scale in ((1, 1.0), (1, 4.0), (2, 1.0))
    )
    assert 1.8 < guided / plain < 2.2
    assert 1.8 < two / plain < 2.2
    assert denoising(TEXT, 7, SampleConfig(batch=1), torch.bfloat16).working < 0.9 * plain


@pytest.mark.parametrize("chunk", [2, 16])
@pytest.mark.parametrize("name", ["builtin", "kl", "kl_temporal"])
def test_decoding_takes_what_the_plan_says(name, chunk, tmp_path):
    path = None
    if name != "builtin":
        tiny_vae({ours: external for external, ours in NAMES.items()}[name]).save_pretrained(tmp_path)
        path = str(tmp_path)
    codec = build_codec(CodecConfig(name, path, chunk))
    z = torch.randn(2, 6, 4, 16, 16)
    with torch.no_grad(), LiveBytes() as live:
        codec.decode(z)
    found = decoding(TEXT, CodecConfig(name, path, chunk), 2)
    assert found.weights == sum(parameter.nbytes for parameter in codec.network.parameters())
    assert found.working == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize("name", ["wan_22", "ltx_timestep", "cogvideox", "hunyuan", "dc"])
def test_decoding_clips_takes_what_the_plan_says(name, tmp_path):
    save_external(name, tmp_path)
    case = CASES[name]
    config = CodecConfig(case.codec, str(tmp_path))
    codec = build_codec(config)
    frames = 1 + case.step // case.time
    model = ModelConfig(depth=2, num_frames=frames, latent_size=8, latent_channels=case.channels)
    with torch.no_grad(), LiveBytes() as live:
        codec.decode(torch.randn(2, frames, case.channels, 8, 8))
    found = decoding(model, config, 2)
    assert found.weights == sum(parameter.nbytes for parameter in codec.network.parameters())
    assert found.working == pytest.approx(live.peak, rel=0.05)


def test_the_released_model_exactly():
    """LatteT2V with T5 v1.1 XXL, Stable Diffusion's autoencoder, a GPU: parameters as published, in the
    precision that they are held in.
    """
    config = TextConfig(num_frames=2, latent_size=8)
    found = staging(
        config,
        CodecConfig("kl"),
        TextEncoderConfig("t5"),
        SampleConfig(),
        torch.device("cuda"),
        torch.bfloat16,
    )
    assert found.text_encoder.weights == 2 * 4_762_310_656
    assert 10 * 2**20 < found.text_encoder.working < 100 * 2**20, "120 tokens"
    assert found.denoiser.weights == 4 * 1_057_246_880
    assert found.decoder.weights == 4 * 83_653_863
    assert found.peak == found.text_encoder.weights + found.text_encoder.working, (
        "the encoder alone is the most"
    )
    assert found.together > found.peak


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("kl", (83_653_863, 248)), ("kl_temporal", (97_742_847, 374)), ("taef2", (2_677_027, 158))],
)
def test_skeletons_are_the_published_autoencoders(name, numbers):
    found = CODECS[name].skeleton(None)
    assert (sum(parameter.numel() for parameter in found.parameters()), len(found.state_dict())) == numbers
    assert sum(parameter.nbytes for parameter in found.parameters() if not parameter.is_meta) < 1000, (
        "diffusers makes a few scalars"
    )


def test_reading_a_prompt_takes_what_the_plan_says(tmp_path):
    for part in tiny_t5(width=64):
        part.save_pretrained(tmp_path)
    config = TextEncoderConfig("t5", str(tmp_path), 12)
    encoder = T5Encoder(str(tmp_path), 12)
    network, _ = encoder.read()
    with torch.no_grad(), LiveBytes() as live:
        network(torch.zeros(1, 12, dtype=torch.long))
    found = staging(TEXT, CodecConfig("builtin"), config, SampleConfig(), CPU, torch.float32).text_encoder
    assert found.weights == sum(parameter.nbytes for parameter in network.parameters())
    assert found.working == pytest.approx(live.peak, rel=0.02)


def alive(known: set[int]) -> int:
    """Bytes of all weights that are in memory now and were not ``known``."""
    weights = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Parameter)]
    return sum(storage.nbytes() for key, storage in storages(weights).items() if key not in known)


def test_one_part_after_the_other_is_in_memory_with_a_small_t5(tmp_path, monkeypatch):
    """The plan's stages while a prompt becomes a clip: the encoder alone, then the denoiser with the
    autoencoder, the encoder gone.
    """
    for part in tiny_t5(width=32):
        part.save_pretrained(tmp_path / "t5")
    trained = tiny_text()
    text = TextEncoderConfig("t5", str(tmp_path / "t5"), 20)
    model = wake(
        LatteText(
            TextConfig(**{**trained.model.config.__dict__, "caption_channels": 32, "latent_channels": 4})
        )
    )
    reader = PromptReader(text, "cpu")
    type(trained)(
        **{
            **trained.__dict__,
            "model": model,
            "reader": reader,
            "codec_config": CodecConfig("builtin"),
            "codec": build_codec(CodecConfig("builtin")),
        }
    ).save_pretrained(tmp_path / "weights")
    plan = staging(model.config, CodecConfig("builtin"), text, trained.sample, CPU, torch.float32)
    del trained, model, reader
    gc.collect()
    known = set(
        storages([thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Parameter)])
    )
    seen: dict[str, int] = {}
    for kind, method, stage in (
        (T5Encoder, "encode", "text"),
        (LatteText, "forward", "denoiser"),
        (CODECS["builtin"], "decode", "decoder"),
    ):
        plain = getattr(kind, method)

        def watch(self, *words, plain=plain, stage=stage, **named):
            found = plain(self, *words, **named)
            seen[stage] = max(seen.get(stage, 0), alive(known))
            return found

        monkeypatch.setattr(kind, method, watch)
    again = VideoPipeline.from_pretrained(
        tmp_path / "weights",
        device="cpu",
        prompts=["a red circle moves up"],
        text_encoder_path=str(tmp_path / "t5"),  # a weights folder names no path of the machine that wrote it
    )
    list(again.generate([3], prompts=["a red circle moves up"]))
    assert seen["text"] == plan.text_encoder.weights
    assert seen["denoiser"] == seen["decoder"] == plan.denoiser.weights + plan.decoder.weights
    assert max(seen.values()) < sum((plan.text_encoder.weights, plan.denoiser.weights, plan.decoder.weights))


def test_cpu_offload_keeps_only_the_part_at_work_on_the_device(monkeypatch):
    """In a batch of two and a batch of one: the denoiser comes, works and leaves before the decoder comes."""
    trained, log = tiny_text(), []
    work = torch.device("cpu", 0)  # another name than where the parts are at home, the same memory
    for kind, name in ((LatteText, "denoiser"), (type(trained.codec), "decoder")):
        plain = kind.to
        monkeypatch.setattr(
            kind,
            "to",
            lambda self, device, name=name, plain=plain: (log.append((name, device)), plain(self, device))[1],
        )
    for kind, method in ((LatteText, "forward"), (type(trained.codec), "decode")):
        plain = getattr(kind, method)
        monkeypatch.setattr(
            kind,
            method,
            lambda *words, plain=plain, method=method, **named: (
                log.append((method, None)),
                plain(*words, **named),
            )[1],
        )
    seeds, prompts = [1, 2, 3], ["red", "a blue circle", "up"]
    plain = [clip for _, clip in trained.generate(seeds, prompts=prompts)]
    log.clear()
    staged = [clip for _, clip in trained.generate(seeds, prompts=prompts, offload=work)]
    assert all((one == other).all() for one, other in zip(plain, staged, strict=True))
    home = torch.device("cpu")
    log = [event for index, event in enumerate(log) if index == 0 or event != log[index - 1]]
    batch = [
        ("denoiser", work),
        ("forward", None),
        ("denoiser", home),
        ("decoder", work),
        ("decode", None),
        ("decoder", home),
    ]
    assert log == [*batch, *batch]


@pytest.mark.gpu
def test_the_plan_is_what_a_gpu_holds(tmp_path):
    """Peak of the allocator while clips are drawn, at once and with offload, within a tenth of the plan and a
    few MiB of workspace.
    """
    config = ModelConfig(size="B", num_frames=16, latent_size=32)
    trained = tiny_text()
    model = wake(config.build()).requires_grad_(False).eval()
    codec = build_codec(CodecConfig("builtin"), "cuda")
    sample = SampleConfig(sampler="ddim", steps=2, batch=2)
    plan = staging(
        config, CodecConfig("builtin"), TextEncoderConfig(), sample, torch.device("cuda"), torch.bfloat16
    )
    for offload in (False, True):
        where = "cpu" if offload else "cuda"
        codec.to(where)
        one = type(trained)(**{**trained.__dict__, "model": model.to(where), "codec": codec, "reader": None})
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        list(
            one.generate(
                [0, 1], config=sample, dtype=torch.bfloat16, offload=torch.device("cuda") if offload else None
            )
        )
        peak = torch.cuda.max_memory_allocated()
        assert peak == pytest.approx(plan.offloaded if offload else plan.peak, rel=0.1, abs=64 * 2**20)
