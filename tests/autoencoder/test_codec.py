# SPDX-License-Identifier: Apache-2.0
"""What holds for every codec: shapes, chunks, fingerprint, refusals."""

import pytest
import torch
from safetensors.torch import save_file
from support import noise
from torch import Tensor, nn

from latte.autoencoder.base import Codec, Compression, FrameCodec, PixelCodec
from latte.autoencoder.builtin import BuiltinAutoencoder, BuiltinCodec
from latte.autoencoder.codec import CODECS, CodecConfig, build_codec
from latte.autoencoder.taef2 import Taef2Codec, build_decoder, build_encoder
from latte.checks import InputError
from latte.runtime import generator


class Noisy(FrameCodec):
    """A stochastic codec whose mean is the pixels; counts the frames of each call."""

    name, stochastic = "noisy", True
    compression = Compression(channels=3, spatial_factor=1)

    @classmethod
    def load(cls, path, chunk, device):
        return cls(nn.Identity(), chunk, device)

    @classmethod
    def skeleton(cls, path):
        return nn.Identity()

    def encode_frames(self, frames: Tensor, noise: Tensor | None) -> Tensor:
        self.calls = [*getattr(self, "calls", []), len(frames)]
        return frames if noise is None else frames + noise

    def decode_frames(self, latent: Tensor) -> Tensor:
        return latent * 2


def made(name: str, chunk: int = 16) -> Codec:
    if name == "taef2":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Taef2Codec(nn.ModuleDict({"encoder": build_encoder(), "decoder": build_decoder()}), chunk)
    if name == "noisy":
        return Noisy.load(None, chunk, "cpu")
    return build_codec(CodecConfig(name, chunk=chunk))


SMALL = ("pixels", "builtin", "taef2", "noisy")


def frames(b: int = 2, f: int = 3, height: int = 16, width: int = 24) -> Tensor:
    return noise(b, f, 3, height, width).clamp(-1, 1)


@pytest.mark.parametrize("name", SMALL)
def test_shapes_range_and_type(name):
    codec = made(name)
    latent = codec.encode(frames().requires_grad_())
    assert latent.shape == (2, 3, *codec.latent_shape(16, 24))
    assert codec.latent_shape(16, 24) == (
        codec.channels,
        16 // codec.spatial_factor,
        24 // codec.spatial_factor,
    )
    decoded = codec.decode(10 * latent)
    assert decoded.shape == (2, 3, 3, 16, 24)
    assert decoded.abs().max() <= 1
    for tensor in (latent, decoded):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


@pytest.mark.parametrize("name", SMALL)
def test_the_chunk_changes_nothing(name):
    whole, piecewise = made(name, 16), made(name, 4)
    a, b = (codec.encode(frames(), generator(7)) for codec in (whole, piecewise))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.decode(a), piecewise.decode(a), rtol=1e-5, atol=1e-5)


def test_no_more_frames_than_the_chunk_at_a_time():
    codec = made("noisy", 4)
    codec.encode(frames(2, 5))
    assert codec.calls == [4, 4, 2]


def test_a_stochastic_codec_samples_with_a_generator_and_takes_the_mean_without():
    codec, clip = made("noisy"), frames()
    assert torch.equal(codec.encode(clip), clip)
    assert torch.equal(codec.encode(clip, generator(1)), codec.encode(clip, generator(1)))
    drawn = codec.encode(clip, generator(1)) - codec.encode(clip, generator(2))
    assert 1 < drawn.std() < 2  # the difference of two unit normals


def test_a_deterministic_codec_draws_nothing():
    stream = generator(3)
    before = stream.get_state()
    made("builtin").encode(frames(), stream)
    assert torch.equal(before, stream.get_state())


def test_pixels_are_themselves():
    codec, clip = made("pixels"), frames()
    assert torch.equal(codec.encode(clip), clip)
    assert torch.equal(codec.decode(clip), clip)


def test_the_networks_are_frozen():
    for name in SMALL:
        network = made(name).network
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_identity_is_of_the_numbers_not_of_the_file(tmp_path):
    network = BuiltinAutoencoder()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.half().float())
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    save_file(
        {name: tensor.half() for name, tensor in network.state_dict().items()}, tmp_path / "half.safetensors"
    )
    torch.save(dict(reversed(network.state_dict().items())), tmp_path / "b.pth")
    loaded = [
        BuiltinCodec.load(str(tmp_path / name), 16, "cpu").fingerprint
        for name in ("a.safetensors", "half.safetensors", "b.pth")
    ]
    assert len(set(loaded)) == 1
    assert len(loaded[0]) == 16
    assert int(loaded[0], 16) >= 0
    network.encoder[1].weight.data[0, 0, 0, 0] += 1e-3
    assert BuiltinCodec(network).fingerprint != loaded[0]


def test_identity_knows_name_and_scale():
    class Renamed(PixelCodec):
        name = "renamed"

    class Scaled(PixelCodec):
        scale = 2.0

    fingerprints = {kind(nn.Identity()).fingerprint for kind in (PixelCodec, Renamed, Scaled)}
    assert len(fingerprints) == 3


@pytest.mark.parametrize("size", [(20, 24), (16, 12), (0, 8)])
def test_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(
        InputError, match=r"frame (height|width) is \d+, but codec 'builtin' needs a multiple of 8"
    ):
        made("builtin").encode(torch.zeros(1, 1, 3, *size))


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 2, 4, 16, 16), (1, 2, 16, 16, 3)])
def test_wrong_frames_are_refused(shape):
    with pytest.raises(InputError, match="frames have shape"):
        made("pixels").encode(torch.zeros(shape))


def test_wrong_latents_are_refused():
    with pytest.raises(
        InputError, match=r"latent has shape \(1, 2, 3, 8, 8\), but codec 'builtin' decodes .*4"
    ):
        made("builtin").decode(torch.zeros(1, 2, 3, 8, 8))


def test_the_table_holds_what_is_documented():
    assert {
        name: (kind.compression.channels, kind.compression.spatial_factor, kind.compression.temporal_factor)
        for name, kind in CODECS.items()
        if name != "diffusers"  # which has the compression of the class that it finds
    } == {
        "kl": (4, 8, 1),
        "kl_temporal": (4, 8, 1),
        "taef2": (32, 8, 1),
        "pixels": (3, 1, 1),
        "builtin": (4, 8, 1),
        "builtin_temporal": (16, 8, 4),
        "builtin_clip": (16, 8, 8),
        "ltx": (128, 32, 8),
        "wan": (16, 8, 4),
        "cogvideox": (16, 8, 4),
        "hunyuan": (16, 8, 4),
        "dc": (32, 32, 1),
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "buitlin"}, "codec.name is 'buitlin'.*did you mean 'builtin'"),
        ({"name": "pixels", "chunk": 0}, "codec.chunk must be .* got 0"),
        ({"name": "wan", "tile": 0}, "codec.tile must be null or a side in pixels, at least 1, got 0"),
        (
            {"name": "pixels", "tile": 64},
            "codec.tile is 64, but codec 'pixels' has no tiles; .* kl, ltx, wan",
        ),
    ],
)
def test_a_wrong_configuration_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        CodecConfig(**given)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CodecConfig("pixels", "somewhere"), "codec.path is 'somewhere', but codec 'pixels' has no weights"),
        (CodecConfig("taef2"), "codec.path is missing: codec 'taef2' needs"),
        (CodecConfig("kl"), "codec.path is missing, but codec 'kl' needs"),
        (CodecConfig("diffusers"), "codec.path is missing, but codec 'diffusers' needs"),
        (CodecConfig("builtin", "nowhere.safetensors"), "nowhere.safetensors .* does not exist"),
    ],
)
def test_a_missing_or_needless_path_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        build_codec(config)


def damaged(kind: str, tmp_path) -> str:
    """A weight file for the built-in network with one fault."""
    tensors = BuiltinAutoencoder().state_dict()
    path = tmp_path / "weights.safetensors"
    if kind == "lacks":
        del tensors["decoder.0.bias"]
    elif kind == "unknown tensor":
        tensors["extra"] = torch.zeros(1)
    elif kind == "of shape":
        tensors["decoder.0.bias"] = torch.zeros(5)
    elif kind == "non-finite":
        tensors["decoder.0.bias"][3] = torch.nan
    elif kind == "quantized":
        tensors["decoder.0.bias"] = tensors["decoder.0.bias"].to(torch.int8)
    save_file(tensors, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "pickle":
        path = path.with_suffix(".pth")
        torch.save({"encoder": Noisy}, path)
    elif kind == "other than named":
        path = path.with_suffix(".pth")
        torch.save([torch.zeros(1)], path)
    return str(path)


@pytest.mark.parametrize(
    "kind",
    [
        "lacks",
        "unknown tensor",
        "of shape",
        "non-finite",
        "quantized",
        "truncated",
        "pickle",
        "other than named",
    ],
)
def test_damaged_weights_are_refused_in_one_line(kind, tmp_path):
    with pytest.raises(InputError, match="truncated or holds" if kind == "pickle" else kind) as caught:
        BuiltinCodec.load(damaged(kind, tmp_path), 16, "cpu")
    assert "\n" not in str(caught.value)
    assert "codec.path" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("kl", "vae"),
        ("kl", "weights/vae"),
        ("kl_temporal", "weights/vae"),
        ("taef2", "taef2"),
        ("builtin", "b.safetensors"),
    ],
)
def test_a_relative_path_that_does_not_exist_is_refused_with_the_place_that_was_looked_at(
    name, path, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        build_codec(CodecConfig(name, path))
    assert str(tmp_path / path) in str(caught.value)
    assert "codec.path" in str(caught.value)


def test_a_codec_registered_at_run_time_is_configured_and_built(monkeypatch):
    monkeypatch.setitem(CODECS, "noisy", Noisy)
    codec = build_codec(CodecConfig("noisy", chunk=3))
    assert type(codec) is Noisy
    assert codec.decode(codec.encode(frames())).shape == (2, 3, 3, 16, 24)
