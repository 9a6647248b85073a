# SPDX-License-Identifier: Apache-2.0
"""The published weight files: their hashes, where they are kept, and their conversion to safetensors.

A file is accepted only if its SHA-256 is in ``FILES`` or was given by the user. Its tensors are read without
running any code in it (interop/archive.py), renamed, and written to ``<detector>-<first 8 of the
hash>.safetensors`` with their origin. Evaluation loads only that file, and verifies its digest each time,
because safetensors does not detect a flipped byte.
"""

import hashlib
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from latte.checks import InputError, RunError, printable
from latte.evaluation.networks.layers import Network, channels_last, fold_norms
from latte.files import commit_file, reported
from latte.interop.archive import BROKEN, read_tensors
from latte.tensors import check_finite, tensors_sha256, without_memory

MAX_DOWNLOAD = 512 * 2**20


@dataclass(frozen=True)
class PublicFile:
    """A published weight file."""

    name: str
    detector: str | None  # None: a known file that no detector reads, for the reason in ``note``
    sha256: str | None  # None: no checksum was published
    size: int | None = None  # bytes
    urls: tuple[str, ...] = ()
    note: str = ""


HUB_I3D = "hf://flateon/FVD-I3D-torchscript/i3d_torchscript.pt@1c2d61711c52571ad617a1063e6fa691b212e184"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FILES = (
    PublicFile(
        "i3d_torchscript.pt",
        "i3d",
        "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
        51_235_320,
        (HUB_I3D, "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1"),
    ),
    PublicFile(
        "i3d_pretrained_400.pt",
        "i3d400",
        "55095f049e706479d48e221adcdb145b2b9dc930ba28b081ed72367ffaa32343",
        note="TF-Hub weights converted by VideoGPT, TATS and cd-fvd, linked in their repositories",
    ),
    PublicFile(
        "pt_inception-2015-12-05-6726825d.pth",
        "inception",
        INCEPTION_SHA256,
        95_628_359,
        (
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
            "pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
        ),
    ),
    PublicFile(
        "c3d_ucf101.pt",
        "c3d",
        None,
        urls=("https://www.dropbox.com/s/jxpu7avzdc9n97q/c3d_ucf101.pt?dl=1",),
        note="no published checksum; conv3d_deepnetA_ucf.npz with mean2.npz (tgan2, release v1.0) works too",
    ),
    PublicFile(
        "rgb_imagenet.pt",
        None,
        "2609088c2e8c868187c9921c50bc225329a9057ed75e76120e0b4a397a2c7538",
        50_883_138,
        note="the I3D of the kinetics-i3d repository; no published FVD was computed with it",
    ),
    PublicFile(
        "inception-2015-12-05.pt",
        None,
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        95_607_719,
        note="the same network as a TorchScript program; use pt_inception-2015-12-05-6726825d.pth",
    ),
)


def cache_dir() -> Path:
    """Return the folder of converted weights: $LATTE_DETECTOR_DIR, else latte/detectors in $XDG_CACHE_HOME
    (~/.cache).
    """
    if own := os.environ.get("LATTE_DETECTOR_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latte" / "detectors"


def is_offline() -> bool:
    """Return whether LATTE_OFFLINE or HF_HUB_OFFLINE is set; both are read at each call."""
    values = (os.environ.get(name, "").lower() for name in ("LATTE_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value in ("1", "true", "yes", "on") for value in values)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rename(tensors: Mapping[str, Tensor], network: Network, where: object) -> dict[str, Tensor]:
    """Rename public tensors to ours, by the first naming of ``network`` that matches exactly.

    A prefix common to all names is dropped ('module.', 'model.'), and TensorFlow's ':0'. Counters may be
    absent. InputError names the tensors that are missing or unexpected.
    """
    plain = {name.removesuffix(":0"): tensor for name, tensor in tensors.items()}
    report = ""
    for label, scheme in network.schemes.items():
        first = next(iter(scheme.names))
        prefix = next((name.removesuffix(first) for name in plain if name.endswith(first)), "")
        found = {
            name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)
        }
        missing = [name for name, ours in scheme.names.items() if ours and name not in found]
        unexpected = [name for name in plain if name.removeprefix(prefix) not in scheme.names]
        if not missing and not unexpected:
            names = {ours: name for name, ours in scheme.names.items() if ours}
            return {ours: scheme.convert(found[name]).contiguous() for ours, name in names.items()}
        if not report or len(missing) < len(scheme.names) // 2:
            report = f"in the {label} naming, {missing[:3]} are missing and {unexpected[:3]} unexpected"
    raise InputError(
        f"{where} holds {len(tensors)} tensors of another network: {report}; give a file made for this "
        "detector"
    )


def known_file(detector: str, path: Path, sha256: str | None) -> str:
    """Return the SHA-256 of ``path`` if it is a published file of ``detector`` or equals ``sha256``; else
    InputError.
    """
    digest = file_sha256(path)
    match = next((file for file in FILES if file.sha256 == digest), None)
    if digest == sha256 or (match and match.detector == detector and sha256 is None):
        return digest
    if sha256 is not None:
        raise InputError(
            f"{path} has SHA-256 {digest}, expected {sha256}; give the right file or the right hash"
        )
    if match:
        reason = f"the file of detector {match.detector!r}" if match.detector else match.note
        raise InputError(
            f"{path} is {match.name}, {reason}, not a file of detector {detector!r}; give the right file"
        )
    raise InputError(
        f"{path} has SHA-256 {digest}, which no file of detector {detector!r} has; if you trust it, give "
        "that hash by --detector-sha256"
    )


def check_shapes(tensors: Mapping[str, Tensor], network: Network, path: Path) -> None:
    """InputError naming tensors whose shape differs from the network's after the norms are merged."""
    with without_memory():
        expected = {name: tuple(tensor.shape) for name, tensor in network.build().state_dict().items()}
    merged = {name: tuple(tensor.shape) for name, tensor in fold_norms(tensors, network.eps).items()}
    wrong = [name for name, shape in expected.items() if merged.get(name) != shape]
    if wrong:
        shapes = "; ".join(f"{name} is {merged.get(name)} instead of {expected[name]}" for name in wrong[:3])
        raise InputError(
            f"{path} has tensors of the wrong shape: {shapes}; give a file made for this detector"
        )


def import_weights(detector: str, network: Network, path: Path, sha256: str | None = None) -> Path:
    """Convert a published file into ``<detector>-<sha8>.safetensors`` in the cache folder and return that
    path.

    ``sha256`` is the hash the user vouches for when the file is not in ``FILES``. A NumPy archive without the
    mean clip takes it from mean2.npz in the same folder. InputError for unknown hashes, unexpected tensors,
    wrong shapes, NaN or Inf and malicious files.
    """
    if not path.is_file():
        raise InputError(
            f"detector file {printable(path)} does not exist; give the path of a downloaded weight file"
        )
    digest = known_file(detector, path, sha256)
    tensors = read_tensors(path)
    if "mean" not in tensors and path.suffix == ".npz" and (mean := path.with_name("mean2.npz")).is_file():
        tensors |= read_tensors(mean)
    ours = rename(tensors, network, path)
    check_shapes(ours, network, path)
    check_finite(ours, path)
    metadata = {
        "detector": detector,
        "source_name": path.name,
        "source_sha256": digest,
        "source_bytes": str(path.stat().st_size),
        "tensors_sha256": tensors_sha256(ours),
    }
    out = cache_dir() / f"{detector}-{digest[:8]}.safetensors"
    with reported("the detector's weights", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        commit_file(out, lambda temporary: safetensors.torch.save_file(ours, temporary, metadata))
    return out


def find_weights(
    detector: str, network: Network, path: Path | None = None, sha256: str | None = None
) -> Path:
    """Return the converted weights of ``detector``: those of ``path``, else the cached ones, else downloaded
    ones.
    """
    if path is not None:
        return import_weights(detector, network, path, sha256)
    file = next(file for file in FILES if file.detector == detector)
    digest = sha256 or file.sha256
    if digest and (converted := cache_dir() / f"{detector}-{digest[:8]}.safetensors").is_file():
        return converted
    if (original := cache_dir() / file.name).is_file():
        return import_weights(detector, network, original, sha256)
    if is_offline() or not (file.urls and digest):
        refuse_download(detector, file)
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        target = Path(folder) / file.name
        download(file, target)
        if (found := file_sha256(target)) != digest:
            raise RunError(
                f"the downloaded {file.name} has SHA-256 {found}, expected {digest}; it was deleted: "
                "download it elsewhere"
            )
        return import_weights(detector, network, target, sha256)


def refuse_download(detector: str, file: PublicFile) -> None:
    """InputError that says where to get ``file`` by hand."""
    reason = "this machine is offline" if is_offline() else "it cannot be downloaded automatically"
    hints = [url.removeprefix("hf://") for url in file.urls[:1]]
    if file.size:
        hints.append(f"{file.size:,} bytes")
    if file.sha256:
        hints.append(f"sha256 {file.sha256}")
    if file.note:
        hints.append(file.note)
    raise InputError(
        f"detector {detector!r} needs {file.name}, which is not in {cache_dir()}, and {reason}; download it "
        f"({'; '.join(hints)}) and give its path by --detector, or put it into that folder; --protocol "
        "builtin needs no file"
    )


def download(file: PublicFile, target: Path) -> None:
    """Download ``file`` to ``target`` from the first address that responds; RunError if none does."""
    reasons = []
    for url in file.urls:
        try:
            if url.startswith("hf://"):
                from huggingface_hub import hf_hub_download

                place, _, revision = url.removeprefix("hf://").partition("@")
                repo, _, name = place.rpartition("/")
                shutil.copyfile(hf_hub_download(repo, name, revision=revision), target)
            else:
                with urllib.request.urlopen(url, timeout=60) as source, open(target, "wb") as out:
                    limit = file.size or MAX_DOWNLOAD
                    received = 0
                    while block := source.read(2**20):
                        out.write(block)
                        received += len(block)
                        if received > limit:
                            raise OSError(f"received more than {limit} bytes")
            return
        except (OSError, ValueError, RuntimeError) as error:
            reasons.append(f"{url}: {str(error).partition(chr(10))[0]}")
    raise RunError(
        f"{file.name} could not be downloaded ({'; '.join(reasons)}); download it by hand and give its path "
        "by --detector"
    )


@dataclass(frozen=True)
class Weights:
    """A network with its weights and their origin."""

    network: nn.Module
    sha256: str  # of the published file
    source: str  # its name
    size: int  # its bytes
    tensors_sha256: str


def load_converted(path: Path, network: Network) -> Weights:
    """Read a converted file, verify its digest, merge the norms; InputError if it is damaged or not ours."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except BROKEN as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path} is damaged ({reason}); delete it and import the weights again") from error
    if metadata.get("tensors_sha256") != tensors_sha256(tensors):
        raise InputError(f"{path} was changed after it was written; delete it and import the weights again")
    check_finite(tensors, path)
    with without_memory():
        module = network.build()
    module.load_state_dict(fold_norms(tensors, network.eps), assign=True)
    return Weights(
        channels_last(module).eval(),
        metadata["source_sha256"],
        metadata["source_name"],
        int(metadata["source_bytes"]),
        metadata["tensors_sha256"],
    )
