# SPDX-License-Identifier: Apache-2.0
"""The published weight files: their hashes, where they are kept, and how they become safetensors once and for all.

A file is believed only if its SHA-256 is in ``FILES`` or was named by the user. Its tensors are read without running it (archive.py),
renamed to ours, and written to ``<detector>-<first 8 of the hash>.safetensors`` with their origin; evaluation loads only that, and checks
it against its own digest each time, because safetensors does not notice a flipped byte.
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
import torch
from torch import Tensor, nn

from latte.checks import InputError, RunError
from latte.evaluation.networks.layers import Network, channels_last, fold_norms
from latte.interop.archive import BROKEN, read_tensors

MAX_DOWNLOAD = 512 * 2**20


@dataclass(frozen=True)
class PublicFile:
    """One published file. ``detector`` None: known, but not a file that any detector reads, for the reason in ``note``."""

    name: str
    detector: str | None
    sha256: str | None
    size: int | None = None
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
        note="VideoGPT's, TATS's and cd-fvd's conversion of the TF-Hub weights; their repositories fetch it from a shared drive",
    ),
    PublicFile(
        "pt_inception-2015-12-05-6726825d.pth",
        "inception",
        INCEPTION_SHA256,
        95_628_359,
        (
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        ),
    ),
    PublicFile(
        "c3d_ucf101.pt",
        "c3d",
        None,
        urls=("https://www.dropbox.com/s/jxpu7avzdc9n97q/c3d_ucf101.pt?dl=1",),
        note="no checksum of it was ever published; conv3d_deepnetA_ucf.npz with mean2.npz beside it (tgan2, release v1.0) will do as well",
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
        note="the same network as a TorchScript program; take the plain tensors, pt_inception-2015-12-05-6726825d.pth",
    ),
)


def cache_dir() -> Path:
    """Where converted weights are kept: $LATTE_DETECTOR_DIR, else latte/detectors under $XDG_CACHE_HOME (~/.cache)."""
    if own := os.environ.get("LATTE_DETECTOR_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latte" / "detectors"


def is_offline() -> bool:
    """True when LATTE_OFFLINE or HF_HUB_OFFLINE says so; read at each call, so it may be set at any time."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("LATTE_OFFLINE", "HF_HUB_OFFLINE")
    )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers: the fingerprint of weights, however they are stored."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(
            tensor.flatten().view(torch.uint8).numpy().data if tensor.ndim else tensor.numpy().tobytes()
        )
    return digest.hexdigest()


def rename(tensors: Mapping[str, Tensor], network: Network, where: object) -> dict[str, Tensor]:
    """Public names -> ours, by the first naming of ``network`` that fits exactly; InputError names what is missing or left over.

    A prefix common to all names is dropped ('module.', 'model.'), and TensorFlow's ':0'. Counters may be absent.
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
            return {
                ours: scheme.convert(found[name]).contiguous() for name, ours in scheme.names.items() if ours
            }
        if not report or len(missing) < len(scheme.names) // 2:
            report = f"as {label} it lacks {missing[:3]} and has {unexpected[:3]} too many"
    raise InputError(
        f"{where} holds {len(tensors)} tensors of another network: {report}; give a file made for this detector"
    )


def known_file(detector: str, path: Path, sha256: str | None) -> str:
    """SHA-256 of ``path`` if it is a published file of ``detector`` or the hash that the user named; InputError otherwise."""
    digest = file_sha256(path)
    match = next((file for file in FILES if file.sha256 == digest), None)
    if digest == sha256 or (match and match.detector == detector and sha256 is None):
        return digest
    if sha256 is not None:
        raise InputError(
            f"{path} has SHA-256 {digest}, not {sha256} as asked; give the right file or the right hash"
        )
    if match:
        whose = f"the file of detector {match.detector!r}" if match.detector else match.note
        raise InputError(
            f"{path} is {match.name}, {whose}, not a file of detector {detector!r}; give the right file"
        )
    raise InputError(
        f"{path} has SHA-256 {digest}, which no file of detector {detector!r} has; if you trust it, name that hash too"
    )


def import_weights(detector: str, network: Network, path: Path, sha256: str | None = None) -> Path:
    """Convert a published file into ``<detector>-<sha8>.safetensors`` in the cache folder; returns that path.

    ``sha256`` is the hash the user vouches for when the file is not in ``FILES``. A NumPy archive without the mean clip takes it from
    mean2.npz beside it. InputError for unknown hashes, foreign tensors, wrong shapes and hostile files.
    """
    if not path.is_file():
        raise InputError(f"detector file {path} does not exist; give the path of a downloaded weight file")
    digest = known_file(detector, path, sha256)
    tensors = read_tensors(path)
    if "mean" not in tensors and path.suffix == ".npz" and (mean := path.with_name("mean2.npz")).is_file():
        tensors |= read_tensors(mean)
    ours = rename(tensors, network, path)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in network.build().state_dict().items()}
    folded = {name: tuple(tensor.shape) for name, tensor in fold_norms(ours, network.eps).items()}
    wrong = [
        f"{name} is {folded.get(name)} instead of {shape}"
        for name, shape in expected.items()
        if folded.get(name) != shape
    ]
    if wrong:
        raise InputError(
            f"{path} has tensors of the wrong shape: {'; '.join(wrong[:3])}; give a file made for this detector"
        )
    metadata = {
        "detector": detector,
        "source_name": path.name,
        "source_sha256": digest,
        "source_bytes": str(path.stat().st_size),
        "tensors_sha256": tensors_sha256(ours),
    }
    out = cache_dir() / f"{detector}-{digest[:8]}.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        safetensors.torch.save_file(ours, Path(folder) / out.name, metadata=metadata)
        os.replace(Path(folder) / out.name, out)
    return out


def find_weights(
    detector: str, network: Network, path: Path | None = None, sha256: str | None = None
) -> Path:
    """The converted weights of ``detector``: those of ``path``, else those in the cache folder, else downloaded there once."""
    if path is not None:
        return import_weights(detector, network, path, sha256)
    file = next(file for file in FILES if file.detector == detector)
    digest = sha256 or file.sha256
    if digest and (converted := cache_dir() / f"{detector}-{digest[:8]}.safetensors").is_file():
        return converted
    if (original := cache_dir() / file.name).is_file():
        return import_weights(detector, network, original, sha256)
    why = (
        "this machine is offline"
        if is_offline()
        else ""
        if file.urls and digest
        else "it cannot be fetched by itself"
    )
    if why:
        hints = [*(url.removeprefix("hf://") for url in file.urls[:1]), *([file.note] if file.note else [])]
        way_out = f"download it ({'; '.join(hints)}) and give its path, or put it into that folder"
        raise InputError(
            f"detector {detector!r} needs {file.name}, which is not in {cache_dir()}, and {why}; {way_out}"
        )
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        target = Path(folder) / file.name
        download(file, target)
        if (found := file_sha256(target)) != digest:
            raise RunError(
                f"the downloaded {file.name} has SHA-256 {found}, not {digest}; it was thrown away: fetch it from elsewhere"
            )
        return import_weights(detector, network, target, sha256)


def download(file: PublicFile, target: Path) -> None:
    """Fetch ``file`` to ``target`` from the first of its addresses that answers; RunError when none does."""
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
                    while block := source.read(2**20):
                        out.write(block)
                        if out.tell() > (file.size or MAX_DOWNLOAD):
                            raise OSError(f"more than {file.size or MAX_DOWNLOAD} bytes came")
            return
        except (OSError, ValueError, RuntimeError) as error:
            reasons.append(f"{url}: {str(error).partition(chr(10))[0]}")
    raise RunError(
        f"{file.name} could not be downloaded ({'; '.join(reasons)}); fetch it by hand and give its path"
    )


@dataclass(frozen=True)
class Weights:
    """A network with its weights, and where they are from."""

    network: nn.Module
    sha256: str  # of the published file
    source: str  # its name
    size: int  # its bytes
    tensors_sha256: str


def load_converted(path: Path, network: Network) -> Weights:
    """Read a converted file, check it against its digest, fold the norms; InputError when it was damaged or is another's."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except BROKEN as error:
        raise InputError(
            f"{path} is damaged ({str(error).partition(chr(10))[0]}); delete it and import the weights again"
        ) from error
    if metadata.get("tensors_sha256") != tensors_sha256(tensors):
        raise InputError(f"{path} is not what was written there; delete it and import the weights again")
    with torch.device("meta"):
        module = network.build()
    module.load_state_dict(fold_norms(tensors, network.eps), assign=True)
    size = int(metadata["source_bytes"])
    return Weights(
        channels_last(module).eval(),
        metadata["source_sha256"],
        metadata["source_name"],
        size,
        metadata["tensors_sha256"],
    )
