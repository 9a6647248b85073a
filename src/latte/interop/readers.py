# SPDX-License-Identifier: Apache-2.0
"""Tensors from weight files of other people: a file, a folder, shards with their index, or a repository of the hub.

Nothing in a file is ever run. safetensors are data by construction; a pickle is read as a description by a machine that has no way to
import or call (evaluation/pickles.py), which is stricter than torch's ``weights_only=True`` and yet reads what that refuses: training
files with an argparse.Namespace or OmegaConf object in them. Of those objects plain values are kept, and whatever is not on the list
below is refused with its name.
"""

import json
import os
import re
import zipfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from torch import Tensor

from latte.checks import InputError
from latte.interop.archive import BROKEN, MAX_PICKLE, collect, entry_bytes, read_legacy, stored
from latte.interop.pickles import Global, Machine, Refused, StorageRef

BUILTIN = Path(str(resources.files("latte"))) / "builtin"
SAFE, PICKLED = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt")
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
MAX_JSON = 64 * 2**20
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
HUB_FILES = [
    "config.json",
    "model_index.json",
    "model*.safetensors*",
    "diffusion_pytorch_model*",
    "transformer/*",
]
Tensors = dict[str, Tensor]


class Lenient(Machine):
    """Also reads past inert objects of training files: each becomes a dict of its plain attributes."""

    def new(self) -> None:
        """What would be an object: an empty dict for the listed kinds, refused for any other."""
        kind, arguments = self.take(2)
        name = kind.name if type(kind) is Global else type(kind).__name__
        if not name.startswith(INERT_OBJECTS) or arguments != ():
            raise Refused(f"an object of {name}")
        self.push({})

    def reduce(self) -> None:
        """What would be a call: an empty dict for the listed inert ones."""
        function = self.stack[-2]
        if type(function) is Global and function.name in INERT_CALLS:
            self.take(2)
            self.push({})
        else:
            super().reduce()


def fetch(source: str | Path) -> Path:
    """A path as it is; builtin, the folder in the package; a hub id (owner/name, or owner/name/file) as the place of its download.

    Offline the hub's cache is asked. InputError when there is neither.
    """
    path, name = Path(source), str(source)
    if name == "builtin":
        return BUILTIN
    try:
        if name.strip() and path.exists():
            return path
    except (OSError, ValueError) as error:  # a name that no file can have
        raise InputError(
            f"weights {name[:100]!r} cannot be looked for ({error.__class__.__name__}); check the path"
        ) from None
    if not HUB_ID.fullmatch(name) or {".", ".."} & set(name.split("/")):
        raise InputError(
            f"weights {name!r} are neither a file, a folder nor a hub id (owner/name or owner/name/file); check the path"
        )
    from huggingface_hub import hf_hub_download, snapshot_download

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    repository, file = "/".join(path.parts[:2]), "/".join(path.parts[2:])
    try:
        if file:
            return Path(hf_hub_download(repository, file, local_files_only=offline))
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=offline))
    except (
        Exception
    ) as error:  # of the hub, of the disk, and of whichever HTTP client carries the hub's files
        said = str(error).partition("\n")[0] or type(error).__name__
        reason = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else said
        raise InputError(
            f"weights {name!r} are no file or folder here, and the hub does not give them ({reason}); check the name"
        ) from None


def read_tensors(path: str | Path, branches: tuple[str, ...] = ()) -> tuple[Tensors, dict[str, str]]:
    """A weight file, or a folder of one model -> ({dotted name: tensor as stored}, plain facts beside them, as text).

    Of a training file only the first of ``branches`` that it has is read. Raises InputError, in one line, for anything that is not
    plain tensors, is cut short, or is not all of one model.
    """
    path = Path(path)
    file = find_weights(path) if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"weights {file} do not exist; give a file, a folder or a hub id")
    if file.name.endswith(".index.json"):
        return read_shards(file)
    try:
        tensors, facts = read_safe(file) if file.suffix in SAFE else read_pickled(file, branches)
    except BROKEN as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"weights {file} were refused, nothing in them was run: {reason}; give an unaltered, complete file"
        ) from error
    if not tensors:
        raise InputError(f"weights {file} hold no tensors; give the weight file itself")
    return tensors, facts


def find_weights(folder: Path) -> Path:
    """The weight file, or the index of the shards, of a model's folder or of the ``transformer`` in a pipeline's. InputError if unclear."""
    if (folder / "model_index.json").is_file() or not any(
        file.suffix in SAFE + PICKLED for file in folder.iterdir()
    ):
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    names = sorted(file.name for file in folder.iterdir())
    for suffixes in (SAFE, PICKLED):
        whole = [name for name in names if name.endswith(suffixes) and not SHARD.fullmatch(name)]
        whole += [
            name for name in names if name.endswith(tuple(f"{suffix}.index.json" for suffix in suffixes))
        ]
        whole = [name for name in whole if name.split(".")[0] in PREFERRED and name.count(".") < 4] or whole
        plain = [
            name for name in whole if name.count(".") == (3 if name.endswith(".json") else 1)
        ] or whole  # no variant such as .fp16
        if len(plain) == 1:
            return folder / plain[0]
        if plain:
            raise InputError(
                f"folder {folder} holds several weight files ({', '.join(plain[:4])}); give one of them"
            )
    shards = [name for name in names if SHARD.fullmatch(name)]
    partly = [name for name in names if name.endswith(".incomplete")]
    why = (
        f"{shards[0]} but no index of the shards"
        if shards
        else f"{partly[0]}, an interrupted download"
        if partly
        else "a distributed checkpoint, which only its trainer can read"
        if ".metadata" in names
        else f"none of {', '.join(SAFE + PICKLED)}"
    )
    raise InputError(f"folder {folder} holds {why}; fetch it again, or give the weight file itself")


def read_card(path: Path) -> dict[str, Any] | None:
    """config.json of the model at ``path`` (a folder, or a weight file of a usual name beside it); None when there is none.

    InputError for a folder of diffusers without it: heads and frames would be guessed. The weight file itself can still be given.
    """
    file = find_weights(path) if path.is_dir() else path
    card = file.with_name("config.json")
    if path.is_dir() and file.name.startswith(DIFFUSERS) and not card.is_file():
        raise InputError(
            f"folder {file.parent} holds {file.name} but no config.json, which says what the tensors do not; it is half "
            "downloaded, fetch it again, or give the weight file itself"
        )
    return read_json(card) if file.name.split(".")[0] in PREFERRED and card.is_file() else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; InputError for anything else."""
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


def read_safe(file: Path) -> tuple[Tensors, dict[str, str]]:
    """A safetensors file."""
    refuse_pointer(file)
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})


def refuse_pointer(file: Path) -> None:
    """Refused if it is what Git LFS leaves in place of a file."""
    with open(file, "rb") as opened:
        if opened.read(20).startswith(b"version https://git"):
            raise Refused("it is a pointer of Git LFS, whose file was never fetched (git lfs pull)")


def read_pickled(file: Path, branches: tuple[str, ...]) -> tuple[Tensors, dict[str, str]]:
    """A checkpoint of torch: zip, or the format before 1.6."""
    if file.suffix not in PICKLED:
        raise Refused(f"its name ends in none of {', '.join(SAFE + PICKLED)}")
    refuse_pointer(file)
    with open(file, "rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"
        opened.seek(0)
        return read_zip(opened, branches) if zipped else (read_legacy(opened), {})


def read_zip(file: BinaryIO, branches: tuple[str, ...]) -> tuple[Tensors, dict[str, str]]:
    """A zipped checkpoint with nothing else in it than torch.save puts there (so no TorchScript, which is a program)."""
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

        branch = next(
            (name for name in branches if isinstance(tree, dict) and isinstance(tree.get(name), dict)), None
        )
        return collect(tree if branch is None else {branch: tree[branch]}, load), plain_facts(tree)


def plain_facts(tree: Any) -> dict[str, str]:
    """Texts and numbers at the top of a training file and one level below, such as args.model, as text."""
    facts: dict[str, str] = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        for name, leaf in value.items() if type(value) is dict else ((None, value),):
            if type(leaf) in (str, int, float, bool) and len(facts) < 100:
                facts[str(key) if name is None else f"{key}.{name}"] = str(leaf)[:200]
    return facts


def read_shards(index: Path) -> tuple[Tensors, dict[str, str]]:
    """The shards that an index lists, refused unless all of them are there and each holds exactly what the index says."""
    listing = read_json(index)
    places = listing.get("weight_map")
    if not isinstance(places, dict) or not places or not all(type(file) is str for file in places.values()):
        raise InputError(f"{index} has no weight_map of tensors to files; fetch it again")
    files = sorted(set(places.values()))
    counts = {match[2] if (match := SHARD.fullmatch(file)) else "" for file in files}
    if any(Path(file).name != file or not file.endswith(SAFE + PICKLED) for file in files):
        raise InputError(f"{index} names files outside its folder; fetch it again from a place you trust")
    if len(counts) > 1 or int("".join(counts) or len(files)) != len(files):
        raise InputError(
            f"{index} mixes the shards of several splits ({', '.join(files[:4])}); fetch all of one"
        )
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise InputError(
            f"folder {index.parent} lacks {len(absent)} of its {len(files)} shards ({', '.join(absent[:4])}); fetch it again"
        )
    tensors: Tensors = {}
    for file in files:
        found, _ = read_tensors(index.parent / file)
        odd = sorted(found.keys() ^ {name for name, place in places.items() if place == file})
        if odd:
            raise InputError(
                f"shard {index.parent / file} does not hold what {index.name} says ({odd[0]}); it is of another model"
            )
        tensors |= found
    check_mix(index, listing, tensors)
    return tensors, {}


def check_mix(index: Path, listing: Mapping[str, Any], tensors: Tensors) -> None:
    """InputError when the shards together are not what the index was written for: another total size."""
    said = listing["metadata"].get("total_size") if isinstance(listing.get("metadata"), dict) else None
    total = sum(tensor.nbytes for tensor in tensors.values())
    if said is not None and said != total:
        raise InputError(
            f"the shards of {index} hold {total} bytes of tensors where the index says {said}; they are mixed from two models"
        )
