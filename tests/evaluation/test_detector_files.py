# SPDX-License-Identifier: Apache-2.0
"""From a published file to converted weights: hashes, names, shapes, the cache folder, the offline switch.
Nothing here opens a socket.
"""

import io
import urllib.request
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
from reference.c3d import PlainC3D
from support import noise
from torch import nn

from latte.checks import InputError, RunError
from latte.evaluation import detector_files
from latte.evaluation.detector_files import (
    PublicFile,
    cache_dir,
    file_sha256,
    find_weights,
    import_weights,
    is_offline,
    load_converted,
    rename,
)
from latte.evaluation.networks import c3d
from latte.evaluation.networks.layers import Network, Scheme, fold_norms
from latte.tensors import tensors_sha256

NETWORK = Network(lambda: c3d.C3D(5, 2, 16), c3d.SCHEMES, c3d.NORM_EPS)


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """An own cache folder, no offline switch, and a network that fails the test."""
    monkeypatch.setenv("LATTE_DETECTOR_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("LATTE_OFFLINE", raising=False)

    def no_network(*_, **__):
        raise AssertionError("a socket was about to be opened")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)


@pytest.fixture
def plain():
    torch.manual_seed(0)
    network = PlainC3D(5, 2, 16)
    network.mean.copy_(noise(3, 16, 112, 112))
    return network


@pytest.fixture
def published(plain, tmp_path, monkeypatch):
    """A small C3D file that the table knows as the file of detector 'c3d'."""
    path = tmp_path / "c3d_small.pt"
    torch.save(plain.state_dict(), path)
    file = PublicFile(
        "c3d_small.pt", "c3d", file_sha256(path), path.stat().st_size, ("https://example.org/c3d_small.pt",)
    )
    other = PublicFile("other.pt", None, "0" * 64, note="a file that no detector reads")
    monkeypatch.setattr(detector_files, "FILES", (file, other))
    return path


def test_a_published_file_becomes_safetensors_once(published, plain):
    converted = import_weights("c3d", NETWORK, published)
    assert converted == cache_dir() / f"c3d-{file_sha256(published)[:8]}.safetensors"
    assert [path.name for path in cache_dir().iterdir()] == [
        converted.name
    ]  # nothing half-written stays behind
    weights = load_converted(converted, NETWORK)
    assert (weights.sha256, weights.source, weights.size) == (
        file_sha256(published),
        "c3d_small.pt",
        published.stat().st_size,
    )
    expected = plain.state_dict()
    assert weights.tensors_sha256 == tensors_sha256(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in weights.network.parameters())
    assert find_weights("c3d", NETWORK) == converted  # without a path, without a download


def test_an_original_in_the_cache_folder_is_enough(published):
    cache_dir().mkdir()
    published.rename(cache_dir() / published.name)
    assert find_weights("c3d", NETWORK).suffix == ".safetensors"


def test_unknown_files_need_their_hash_said(published, plain, tmp_path):
    plain.fc8.bias.data += 1
    path = tmp_path / "mine.pt"
    torch.save(plain.state_dict(), path)
    digest = file_sha256(path)
    with pytest.raises(InputError, match=f"SHA-256 {digest}, which no file"):
        import_weights("c3d", NETWORK, path)
    with pytest.raises(InputError, match="expected "):
        import_weights("c3d", NETWORK, published, sha256=digest)
    converted = import_weights("c3d", NETWORK, path, sha256=digest)
    assert find_weights("c3d", NETWORK, sha256=digest) == converted
    with pytest.raises(InputError, match="does not exist"):
        import_weights("c3d", NETWORK, tmp_path / "absent.pt")


def test_files_known_for_something_else_are_named(published, monkeypatch):
    with pytest.raises(InputError, match="the file of detector 'c3d', not a file of detector 'i3d'"):
        import_weights("i3d", NETWORK, published)
    file = PublicFile("c3d_small.pt", None, file_sha256(published), note="no FVD was computed with it")
    monkeypatch.setattr(detector_files, "FILES", (file,))
    with pytest.raises(InputError, match="no FVD was computed with it"):
        import_weights("c3d", NETWORK, published)


def test_tensors_of_another_network_are_refused(published, plain, tmp_path):
    state = plain.state_dict()
    for name, changed, reason in (
        ("lacking", {k: v for k, v in state.items() if k != "fc8.bias"}, r"\['fc8.bias'\] are missing"),
        ("extra", state | {"fc9.bias": torch.zeros(1)}, r"\['fc9.bias'\] unexpected"),
        ("wide", state | {"fc8.bias": torch.zeros(6)}, r"fc8.bias is \(6,\) instead of \(5,\)"),
    ):
        torch.save(changed, tmp_path / f"{name}.pt")
        with pytest.raises(InputError, match=reason):
            import_weights(
                "c3d", NETWORK, tmp_path / f"{name}.pt", sha256=file_sha256(tmp_path / f"{name}.pt")
            )
    assert not list(cache_dir().glob("*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_weights_are_refused_by_tensor(published, plain, tmp_path, value):
    plain.fc7.weight.data[3, 2] = value
    torch.save(plain.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(InputError, match=r"tensor 'fc7\.weight' holds 1 non-finite"):
        import_weights("c3d", NETWORK, tmp_path / "nan.pt", sha256=file_sha256(tmp_path / "nan.pt"))
    assert not list(cache_dir().glob("*"))


def test_converted_weights_have_the_mode_of_other_files(published, tmp_path):
    (tmp_path / "other").write_text("x")
    mode = import_weights("c3d", NETWORK, published).stat().st_mode
    assert mode == (tmp_path / "other").stat().st_mode


def test_numpy_weights_take_the_mean_clip_beside_them(plain, tmp_path, published):
    names = {ours: public for public, ours in c3d.SCHEMES["chainer"].names.items()}
    path = tmp_path / "conv3d_deepnetA_ucf.npz"
    np.savez(path, **{names[k]: v.detach().numpy() for k, v in plain.state_dict().items() if k != "mean"})
    with pytest.raises(InputError, match="mean"):
        import_weights("c3d", NETWORK, path, sha256=file_sha256(path))
    whole = noise(3, 16, 128, 171)
    np.savez(tmp_path / "mean2.npz", mean=whole.numpy())
    weights = load_converted(import_weights("c3d", NETWORK, path, sha256=file_sha256(path)), NETWORK)
    assert torch.equal(weights.network.mean, whole[:, :, 8:120, 8:120])
    assert torch.equal(weights.network.fc6.weight, plain.fc6.weight)


@pytest.mark.parametrize("part", ["header", "tensors", "end"])
def test_damaged_converted_weights_are_refused(part, published):
    converted = import_weights("c3d", NETWORK, published)
    data = bytearray(converted.read_bytes())
    place = {"header": 20, "tensors": len(data) // 2, "end": len(data) - 1}[part]
    data[place] ^= 4
    converted.write_bytes(data)
    with pytest.raises(InputError, match="delete it and import"):
        load_converted(converted, NETWORK)


def answering(data, monkeypatch):
    """Make every download give ``data``; returns the list of addresses asked for."""
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO(data)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_missing_weights_are_downloaded_once_and_checked(published, monkeypatch):
    asked = answering(published.read_bytes(), monkeypatch)
    converted = find_weights("c3d", NETWORK)
    assert find_weights("c3d", NETWORK) == converted
    assert asked == ["https://example.org/c3d_small.pt"]
    assert [path.name for path in cache_dir().iterdir()] == [converted.name]


def test_downloads_with_another_hash_are_refused(published, monkeypatch):
    data = bytearray(published.read_bytes())
    data[-1] ^= 1
    answering(bytes(data), monkeypatch)
    with pytest.raises(RunError, match="it was deleted"):
        find_weights("c3d", NETWORK)
    assert not list(cache_dir().iterdir())


def test_downloads_that_never_end_or_fail_are_given_up(published, monkeypatch):
    asked = answering(published.read_bytes() * 2, monkeypatch)
    with pytest.raises(RunError, match="received more than"):
        find_weights("c3d", NETWORK)
    assert asked
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda url, timeout: (_ for _ in ()).throw(OSError("no route"))
    )
    with pytest.raises(RunError, match="no route"):
        find_weights("c3d", NETWORK)


def test_hub_addresses_name_repository_file_and_revision(published, monkeypatch):
    asked = []

    def hf_hub_download(*place, revision):
        asked.append((*place, revision))
        return str(published)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    file = replace(detector_files.FILES[0], urls=("hf://someone/some-repo/c3d_small.pt@abc",))
    monkeypatch.setattr(detector_files, "FILES", (file,))
    assert find_weights("c3d", NETWORK).is_file()
    assert asked == [("someone/some-repo", "c3d_small.pt", "abc")]


@pytest.mark.parametrize("switch", ["LATTE_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_offline_switch_holds_whenever_it_is_set(switch, published, monkeypatch):
    assert not is_offline()
    monkeypatch.setenv(switch, "1")
    assert is_offline()
    with pytest.raises(
        InputError,
        match=r"needs c3d_small.pt, .*offline; download it \(https://example.org/c3d_small.pt; [0-9,]+ bytes"
        r"; sha256 [0-9a-f]{64}\)",
    ):
        find_weights("c3d", NETWORK)


def test_files_without_hash_or_address_are_never_fetched(monkeypatch):
    for file in (
        PublicFile("a.pt", "c3d", None, urls=("https://example.org/a.pt",)),
        PublicFile("a.pt", "c3d", "1" * 64, note="ask around"),
    ):
        monkeypatch.setattr(detector_files, "FILES", (file,))
        with pytest.raises(InputError, match="cannot be downloaded automatically"):
            find_weights("c3d", NETWORK)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("LATTE_DETECTOR_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "latte" / "detectors"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "latte" / "detectors"


def test_a_common_prefix_and_absent_counters_do_not_matter():
    scheme = Scheme({"a.conv.weight": "a.weight", "a.bn.count": None, "b.bias": "b.bias"})
    network = Network(nn.Identity, {"only": scheme}, 0.0)
    tensors = {"net.a.conv.weight": noise(2, 2), "net.b.bias": noise(2)}
    assert set(rename(tensors, network, "x")) == {"a.weight", "b.bias"}
    with pytest.raises(InputError, match="another network"):
        rename(tensors | {"loose": noise(1)}, network, "x")


def test_folding_is_the_norm_behind_the_convolution():
    conv, norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-3).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(noise(4))
        norm.running_var.copy_(noise(4).abs() / 100)
    tensors = {
        "c.weight": conv.weight,
        "c.gain": norm.weight,
        "c.shift": norm.bias,
        "c.mean": norm.running_mean,
        "c.var": norm.running_var,
    }
    x = noise(1, 3, 8, 8)
    folded = fold_norms(tensors, 1e-3)
    torch.testing.assert_close(
        nn.functional.conv2d(x, folded["c.weight"], folded["c.bias"]), norm(conv(x)), rtol=1e-4, atol=1e-4
    )
    without_gain = fold_norms({k: v for k, v in tensors.items() if k != "c.gain"}, 1e-3)
    torch.testing.assert_close(
        without_gain["c.weight"] * norm.weight.reshape(-1, 1, 1, 1), folded["c.weight"]
    )


def test_the_hash_of_tensors_covers_names_shapes_and_bits():
    a = {"x": noise(2, 3), "y": torch.tensor(3)}
    assert tensors_sha256(a) == tensors_sha256(dict(reversed(a.items())))
    assert tensors_sha256(a) == tensors_sha256(
        a | {"x": a["x"].t().contiguous().t()}
    )  # storage order is no matter
    others = [
        {"x": a["x"]},
        a | {"x": a["x"].reshape(3, 2)},
        a | {"x": a["x"].double()},
        a | {"x": a["x"] + 1e-6},
        {"z": a["x"], "y": a["y"]},
    ]
    assert len({tensors_sha256(other) for other in [a, *others]}) == 6
