# SPDX-License-Identifier: Apache-2.0
"""Tensors of external checkpoints: a file, a folder, shards with their index, or a repository of the hub.

No code in a file is ever run. safetensors hold only data; pickles are interpreted by interop/pickles.py,
which cannot import or call anything. That is stricter than torch's ``weights_only=True``, and it still
reads training files that hold an argparse.Namespace or an OmegaConf object: their plain values are kept.
Objects that are not listed below are refused by name.
"""

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from torch import Tensor

from latte.checks import InputError, beside, nearest, printable
from latte.files import stamp
from latte.interop.archive import BROKEN, MAX_PICKLE, collect, entry_bytes, read_legacy, stored
from latte.interop.pickles import Global, Machine, Refused, StorageRef, name_of
from latte.model.pretrained import check_file_weights

PACKAGE = Path(str(resources.files("latte")))
# the models in the package
BUILTIN = {"builtin": PACKAGE / "builtin", "builtin-shapes": PACKAGE / "builtin_shapes"}
SAFE = (".safetensors",)
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
DIFFUSERS = "diffusion_pytorch_model"
PREFERRED = ("model", DIFFUSERS, "pytorch_model")
INERT_OBJECTS = ("argparse.Namespace", "omegaconf.")
INERT_CALLS = {
    "collections.defaultdict",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "torch.device",
    "torch.Size",
}
ENTRIES = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+"
)
SHARD = re.compile(r".+-(\d+)-of-(\d+)\.\w+")
MAX_JSON = 8 * 2**20
MAX_HEADER = 8 * 2**20  # bytes of the header of a safetensors file; 10,000 tensors need 1.5 MB
MAX_TENSORS = 10_000  # of a model; Latte-XL has 400
MAX_FACTS = 100
MAX_VALUES = 10_000
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
HUB_FILES = [
    "config.json",
    "model_index.json",
    "model*.safetensors*",
    "diffusion_pytorch_model*",
    "transformer/*",
]
INDEX = "model_index.json"
Tensors = dict[str, Tensor]
LOG = logging.getLogger(__name__)


class Lenient(Machine):
    """Also reads inert objects of training files: each becomes a dict of its plain attributes."""

    def new(self) -> None:
        """Interpret the creation of an object: an empty dict for the listed kinds, every other is refused."""
        kind, arguments = self.take(2)
        name = name_of(kind)
        if not name.startswith(INERT_OBJECTS) or arguments != ():
            raise Refused(f"an object of {name}")
        self.push({})

    def reduce(self) -> None:
        """Interpret a call: the listed inert ones become an empty dict."""
        function = self.stack[-2]
        if type(function) is Global and function.name in INERT_CALLS:
            self.take(2)
            self.push({})
        else:
            super().reduce()


def fetch(source: str | Path) -> Path:
    """Return the local path of ``source``: a path as it is, a hub id (owner/name or owner/name/file) after
    its download.

    A name in BUILTIN is that folder of the package. Offline, only the cache of the hub is used. InputError
    when there is neither.
    """
    path = Path(source)
    name = str(source)
    if name in BUILTIN:
        return BUILTIN[name]
    try:
        if name.strip() and path.exists():
            return path
    except (OSError, ValueError) as error:  # a name that no file can have
        raise InputError(
            f"weights {name[:100]!r} cannot be a path ({type(error).__name__}); check the name"
        ) from None
    if not HUB_ID.fullmatch(name) or {".", ".."} & set(name.split("/")):
        raise InputError(
            f"weights {name!r} do not exist ({path.absolute()}), and this is no hub id (owner/name or "
            f"owner/name/file); check the path{nearest(name, map(printable, beside(path)))}"
        )
    from huggingface_hub import hf_hub_download, snapshot_download

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    repository = "/".join(path.parts[:2])
    file = "/".join(path.parts[2:])
    try:
        if file:
            return Path(hf_hub_download(repository, file, local_files_only=offline))
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=offline))
    except Exception as error:  # of the hub, of the disk, and of the HTTP client that the hub uses
        reason = str(error).partition("\n")[0] or type(error).__name__
        if offline:
            reason = "HF_HUB_OFFLINE is set and it is not in the cache"
        raise InputError(
            f"weights {name!r} are not a file or folder here, and the hub does not serve them ({reason}); "
            f"check the name{nearest(name, map(printable, beside(path)))}"
        ) from None


def read_tensors(path: str | Path, branches: tuple[str, ...] = ()) -> tuple[Tensors, dict[str, str]]:
    """Read a weight file, or the folder of one model: ({dotted name: tensor as stored}, the plain values
    beside them).

    Of a training file only the first of ``branches`` that it has is read. Raises InputError, in one line,
    for anything but plain tensors, for truncated, incomplete or mixed files, and, by tensor, for quantized
    weights and for NaN/Inf.
    """
    path = Path(path)
    file = find_weights(path)
    if not file.is_file():
        raise InputError(f"weights {file} do not exist ({file.absolute()}); use a file, a folder or a hub id")
    if file.name.endswith(".index.json"):
        return read_shards(file)
    before = stamp(file)
    try:
        tensors, facts = read_safetensors(file) if file.suffix in SAFE else read_pickled(file, branches)
        if len(tensors) > MAX_TENSORS:
            raise Refused(f"{len(tensors):,} tensors, but no model here has more than {MAX_TENSORS:,}")
    except (*BROKEN, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"weights {file} were refused, nothing in them was run: {reason}; use an unaltered, complete file"
        ) from error
    if not tensors:
        raise InputError(f"weights {file} hold no tensors; use the weight file itself")
    check_file_weights(file, before, tensors)
    return tensors, facts


def find_weights(folder: Path) -> Path:
    """Return the weight file, or the index of the shards, in a model's folder or in the ``transformer`` of
    a pipeline; a file is returned as it is.

    InputError when there is none, or more than one candidate.
    """
    if not folder.is_dir():
        return folder
    names = sorted(file.name for file in folder.iterdir())
    has_weights = any(Path(name).suffix in SAFE + PICKLED for name in names)
    if (INDEX in names or not has_weights) and (folder / "transformer").is_dir():
        folder = folder / "transformer"
        names = sorted(file.name for file in folder.iterdir())
    for suffixes in (SAFE, PICKLED):
        found = candidates(names, suffixes)
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise InputError(
                f"folder {folder} holds several weight files ({', '.join(found[:4])}); use one of them"
            )
    raise InputError(
        f"folder {folder} holds {why_no_weights(names)}; fetch it again, or use the weight file itself"
    )


def candidates(names: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """Return the files among ``names`` that hold a whole model: preferred names first, and no variant such
    as .fp16.
    """
    indices = tuple(f"{suffix}.index.json" for suffix in suffixes)
    found = [name for name in names if name.endswith(suffixes) and not SHARD.fullmatch(name)]
    found += [name for name in names if name.endswith(indices)]
    found = [name for name in found if name.split(".")[0] in PREFERRED and name.count(".") < 4] or found
    return [name for name in found if name.count(".") == (3 if name.endswith(".json") else 1)] or found


def why_no_weights(names: Sequence[str]) -> str:
    """Describe a folder without a usable weight file."""
    shards = [name for name in names if SHARD.fullmatch(name)]
    partial = [name for name in names if name.endswith(".incomplete")]
    if shards:
        return f"{shards[0]} but no index of the shards"
    if partial:
        return f"{partial[0]}, an interrupted download"
    if ".metadata" in names:
        return "a distributed checkpoint, which only its trainer can read"
    return f"none of {', '.join(SAFE + PICKLED)}"


def read_card(path: Path) -> dict[str, Any] | None:
    """Return config.json of the model at ``path`` (a folder, or a weight file of a usual name beside it),
    or None.

    InputError for a folder of diffusers without it, because heads and frames would be guesses. The weight
    file alone is read.
    """
    file = find_weights(path)
    card = file.with_name("config.json")
    if path.is_dir() and file.name.startswith(DIFFUSERS) and not card.is_file():
        raise InputError(
            f"folder {file.parent} holds {file.name} but no config.json, which has the number of heads and "
            "frames; "
            "the download is incomplete: fetch it again, or use the weight file itself"
        )
    if file.name.split(".")[0] in PREFERRED and card.is_file():
        return read_json(card)
    return None


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``; InputError for anything else."""
    try:
        if file.stat().st_size > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON} bytes")
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file} cannot be read as JSON ({str(error).partition(chr(10))[0]}); fetch it again"
        ) from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no JSON object; fetch it again")
    return found


def read_safetensors(file: Path) -> tuple[Tensors, dict[str, str]]:
    """Read a safetensors file: (tensors, metadata)."""
    refuse_pointer(file)
    with open(file, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
    if MAX_HEADER < size <= file.stat().st_size:
        raise Refused(f"a header of {size:,} bytes, but no model here needs more than {MAX_HEADER:,}")
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})


def refuse_pointer(file: Path) -> None:
    """Refuse the pointer that Git LFS leaves in place of a file."""
    with open(file, "rb") as opened:
        if opened.read(20).startswith(b"version https://git"):
            raise Refused("it is a pointer of Git LFS, whose file was never fetched (git lfs pull)")


def read_pickled(file: Path, branches: tuple[str, ...]) -> tuple[Tensors, dict[str, str]]:
    """Read a checkpoint of torch: zip, or the format before 1.6."""
    if file.suffix not in PICKLED:
        raise Refused(f"its name ends in none of {', '.join(SAFE + PICKLED)}")
    refuse_pointer(file)
    with open(file, "rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"
        opened.seek(0)
        if zipped:
            return read_zip(opened, branches)
        return read_legacy(opened), {}


def read_zip(file: BinaryIO, branches: tuple[str, ...]) -> tuple[Tensors, dict[str, str]]:
    """Read a zipped checkpoint that holds only what torch.save writes (so no TorchScript, which is a
    program).
    """
    with zipfile.ZipFile(file) as archive:
        names = [entry.filename for entry in archive.infolist()]
        root = names[0].partition("/")[0] + "/" if names else ""
        if len(set(names)) != len(names):
            raise Refused("an archive with two entries of one name")
        for name in names:
            if not name.startswith(root) or not ENTRIES.fullmatch(name.removeprefix(root)):
                raise Refused(f"an archive with the entry {name[:100]!r}, which no checkpoint has")
        if f"{root}byteorder" in names and entry_bytes(archive, f"{root}byteorder", 16) != b"little":
            raise Refused("numbers in big-endian order")
        with archive.open(stored(archive, f"{root}data.pkl", MAX_PICKLE)) as source:
            tree = Lenient().run(source)

        def load(storage: StorageRef) -> bytes:
            return entry_bytes(archive, f"{root}data/{storage.key}", storage.numel * storage.dtype.itemsize)

        facts = plain_facts(tree)
        for name in branches:
            if isinstance(tree, dict) and isinstance(tree.get(name), dict):
                tree = {name: tree[name]}
                break
        return collect(tree, load), facts


def plain_facts(tree: Any) -> dict[str, str]:
    """Return the strings and numbers at the top of a training file and one level below, such as args.model,
    as text.
    """
    facts: dict[str, str] = {}
    for name, value in islice(plain_values(tree), MAX_VALUES):
        if type(value) in (str, int, float, bool) and len(facts) < MAX_FACTS:
            facts[name] = str(value)[:200]
    return facts


def plain_values(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of the two upper levels of a dict."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if type(value) is dict:
            yield from ((f"{key}.{name}", leaf) for name, leaf in value.items())
        else:
            yield str(key), value


def read_shards(index: Path) -> tuple[Tensors, dict[str, str]]:
    """Read the shards that an index lists; InputError unless all exist and each holds exactly what the
    index lists.
    """
    listing = read_json(index)
    places = listing.get("weight_map")
    if not isinstance(places, dict) or not places or not all(type(file) is str for file in places.values()):
        raise InputError(f"{index} has no weight_map of tensors to files; fetch it again")
    if len(places) > MAX_TENSORS:
        raise InputError(
            f"{index} lists {len(places):,} tensors, but no model here has more than {MAX_TENSORS:,}; "
            "use the index of a Latte"
        )
    files = sorted(set(places.values()))
    counts = {match[2] if (match := SHARD.fullmatch(file)) else "" for file in files}
    if any(Path(file).name != file or not file.endswith(SAFE + PICKLED) for file in files):
        raise InputError(f"{index} names files outside its folder; fetch it again from a trusted source")
    if len(counts) > 1 or int("".join(counts) or len(files)) != len(files):
        raise InputError(
            f"{index} mixes the shards of several splits ({', '.join(files[:4])}); fetch all of one"
        )
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise InputError(
            f"folder {index.parent} lacks {len(absent)} of its {len(files)} shards "
            f"({', '.join(absent[:4])}); fetch it again"
        )
    tensors: Tensors = {}
    for file in files:
        found, _ = read_tensors(index.parent / file)
        different = sorted(found.keys() ^ {name for name, place in places.items() if place == file})
        if different:
            raise InputError(
                f"shard {index.parent / file} does not hold the tensors that {index.name} lists "
                f"({different[0]}); "
                "it belongs to another model, fetch it again"
            )
        tensors |= found
    compare_total_size(index, listing, tensors)
    return tensors, {}


def compare_total_size(index: Path, listing: Mapping[str, Any], tensors: Tensors) -> None:
    """Log a warning when metadata.total_size of the index is not the size of the tensors.

    Some programs write a wrong number there. Names were compared with the index, and shapes will be with
    the configuration.
    """
    metadata = listing.get("metadata")
    listed = metadata.get("total_size") if isinstance(metadata, dict) else None
    total = sum(tensor.nbytes for tensor in tensors.values())
    if listed is not None and listed != total:
        LOG.warning(
            "%s: metadata.total_size is %s, but the shards hold %d bytes of tensors; every tensor that the "
            "index lists was found",
            index,
            listed,
            total,
        )
