# SPDX-License-Identifier: Apache-2.0
"""taef2 against a second reading of its layout, and on real frames where they are at hand."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support import noise, shared, wake
from torch import Tensor, nn

from latte.autoencoder.config import CODECS, PUBLISHED
from latte.autoencoder.taef2 import Taef2Codec, build_decoder, build_encoder
from latte.checks import InputError
from latte.data.clips import centre_crop_resize, to_float
from latte.data.media import read_frames
from latte.evaluation.detector_files import FILES
from tiny import ROOT


def block(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    if f"{at}.pool.0.weight" in w:
        wide = F.conv2d(x, w[f"{at}.pool.0.weight"])
        wide = F.group_norm(wide, 4, w[f"{at}.pool.1.weight"], w[f"{at}.pool.1.bias"]).relu()
        x = x + F.conv2d(wide, w[f"{at}.pool.3.weight"])
    y = x
    for layer in (0, 2, 4):
        y = F.conv2d(y, w[f"{at}.conv.{layer}.weight"], w[f"{at}.conv.{layer}.bias"], padding=1)
        y = y.relu() if layer < 4 else y
    return (x + y).relu()


def reference_encoder(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = block(F.conv2d(x, w["0.weight"], w["0.bias"], padding=1), w, "1")
    for first in (2, 6, 10):
        x = F.conv2d(x, w[f"{first}.weight"], stride=2, padding=1)
        for at in range(first + 1, first + 4):
            x = block(x, w, str(at))
    return F.conv2d(x, w["14.weight"], w["14.bias"], padding=1)


def reference_decoder(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = F.conv2d(3 * torch.tanh(x / 3), w["1.weight"], w["1.bias"], padding=1).relu()
    for at in (3, 4, 5):
        x = block(x, w, str(at))
    for first, blocks in ((7, (8, 9, 10)), (12, (13, 14, 15)), (17, (18,))):
        x = F.conv2d(x.repeat_interleave(2, -1).repeat_interleave(2, -2), w[f"{first}.weight"], padding=1)
        for at in blocks:
            x = block(x, w, str(at))
    return F.conv2d(x, w["19.weight"], w["19.bias"], padding=1)


@pytest.fixture
def folder(tmp_path):
    for part, network in (("encoder", build_encoder()), ("decoder", build_decoder())):
        save_file(wake(network, 0.02).state_dict(), tmp_path / f"taef2_{part}.safetensors")
    return tmp_path


def test_equals_a_second_reading_of_the_layout(folder):
    codec = Taef2Codec.load(str(folder), 16, "cpu")
    encoder, decoder = (codec.network[part].state_dict() for part in ("encoder", "decoder"))
    frames = noise(1, 2, 3, 16, 24).clamp(-1, 1)
    latent = codec.encode(frames)
    torch.testing.assert_close(
        latent[0], 1.2 * reference_encoder((frames[0] + 1) / 2, encoder), rtol=1e-4, atol=1e-5
    )
    expected = 2 * reference_decoder(latent[0] / 1.2, decoder) - 1
    torch.testing.assert_close(codec.decode_frames(latent[0]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(codec.decode(latent)[0], expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_parameters():
    counts = [sum(p.numel() for p in network.parameters()) for network in (build_encoder(), build_decoder())]
    assert counts == [1_338_528, 1_338_499]
    pools = [
        {name.split(".")[0] for name in network.state_dict() if ".pool." in name}
        for network in (build_encoder(), build_decoder())
    ]
    assert pools == [{"11", "12", "13"}, {"3", "4", "5"}]


def test_safetensors_and_pth_are_the_same_codec(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("pth")
    codec = Taef2Codec.load(str(folder), 16, "cpu")
    for part in ("encoder", "decoder"):
        torch.save(codec.network[part].state_dict(), other / f"taef2_{part}.pth")
    assert Taef2Codec.load(str(other), 16, "cpu").fingerprint == codec.fingerprint


def test_a_missing_half_is_named(folder):
    (folder / "taef2_decoder.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"holds neither taef2_decoder\.safetensors nor taef2_decoder\.pth; its weights: "
    ):
        Taef2Codec.load(str(folder), 16, "cpu")


def test_swapped_halves_are_refused(folder):
    save_file(nn.Sequential(*build_encoder()).state_dict(), folder / "taef2_decoder.safetensors")
    with pytest.raises(InputError, match="belongs to another autoencoder"):
        Taef2Codec.load(str(folder), 16, "cpu")


def test_real_frames():
    """About 33.7 dB on time-lapse skies of 128 x 128, and latents of about unit variance."""
    codec = Taef2Codec.load(str(shared("weights", "taef2")), 16, "cpu")
    files = sorted(shared("data", "sky_timelapse").glob("*/*.mp4"))[:40:10]
    frames = torch.stack([to_float(centre_crop_resize(read_frames(file, [10]), 128, 128)) for file in files])
    latent = codec.encode(frames)
    psnr = (10 * torch.log10(4 / (codec.decode(latent) - frames).square().mean((1, 2, 3, 4)))).mean().item()
    print(
        f"taef2 on {len(files)} real frames: {psnr:.2f} dB, latents of standard deviation {latent.std():.3f}"
    )
    assert 32 < psnr < 36
    assert 0.8 < latent.std() < 1.2


def test_errors_and_docs_say_where_every_weight_file_comes_from(tmp_path):
    for path in (None, str(tmp_path)):
        with pytest.raises(InputError) as error:
            Taef2Codec.load(path, 8, "cpu")
        for link, num_bytes, sha256 in PUBLISHED["taef2"]:
            assert f"{link} ({num_bytes:,} bytes, sha256 {sha256})" in str(error.value)
    with pytest.raises(InputError, match=r"; its weights: stabilityai/sd-vae-ft-ema, https://.*1d99348"):
        CODECS["kl"].load(None, 8, "cpu")
    page = (ROOT / "docs/autoencoders.md").read_text("utf-8")
    for codec, files in PUBLISHED.items():
        for link, num_bytes, sha256 in files:
            row = next(
                line for line in page.splitlines() if link in line and line.startswith(f"| codec `{codec}`")
            )
            assert num_bytes is None or (f"{num_bytes:,}" in row and str(sha256) in row)
    for file in FILES:
        row = next((line for line in page.splitlines() if f"`{file.name}`" in line), None)
        assert (row is None) == (file.detector is None)
        assert row is None or str(file.sha256 or "not published") in row
    assert set(CODECS) - set(PUBLISHED) == {"pixels", "builtin", "builtin_temporal", "builtin_clip", "diffusers"}


def test_the_published_hashes_are_those_of_the_files():
    folder = shared("weights/taef2")
    for link, num_bytes, sha256 in PUBLISHED["taef2"]:
        content = (folder / link.rpartition("/")[2]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (num_bytes, sha256)
