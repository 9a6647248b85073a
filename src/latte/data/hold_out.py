# SPDX-License-Identifier: Apache-2.0
"""Clips that are kept out of training, to measure a model on what it has not seen: by video, never by clip.

``data.hold_out`` is a share such as 0.1, or the path of a text file with one video a line. A share takes the
videos of the smallest hash of their keys, whatever the seed and the order of the files, and leaves every
class and every bucket at least one video to train on. Of procedural clips, which are independent of each
other, it takes the last ones. Each set of a mix is split by itself.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from latte.checks import InputError, check, nearest, printable
from latte.data.base import Clip, Dataset
from latte.data.datasets import FolderDataset, ProceduralDataset
from latte.data.latents import LatentDataset
from latte.data.mix import MixDataset, MixedSet

MAX_LIST_BYTES = 64 << 20


class Subset:
    """The clips ``indices`` of ``dataset``, in that order, as a dataset of their own.

    ``keys`` identify them. ``facts`` are added to the description.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        keys: Sequence[str],
        facts: dict[str, Any] | None = None,
    ):
        self.dataset = dataset
        self.indices = indices
        self.classes = dataset.classes
        self.latent = dataset.latent
        self.digest = hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()
        self.facts = facts or {}
        self.buckets = getattr(dataset, "buckets", None)
        self.members = self._members()

    def _members(self) -> tuple[Sequence[int], ...]:
        """Return the positions in this subset of the clips of each bucket."""
        whole: tuple[Sequence[int], ...] = tuple(getattr(self.dataset, "members", ()))
        if self.buckets is None or not whole:
            return ()
        if isinstance(self.indices, range):  # from 0 on, of a dataset that may be unlimited
            return tuple(range(part.start, len(self.indices), part.step) for part in map(as_range, whole))
        place = {index: position for position, index in enumerate(self.indices)}
        return tuple([place[index] for index in part if index in place] for part in whole)

    @property
    def skipped(self) -> Sequence[dict[str, str]]:
        """What the whole dataset left out."""
        return self.dataset.skipped

    @property
    def captions(self) -> Sequence[str]:
        """The captions of the whole dataset."""
        return self.dataset.captions

    @property
    def files(self) -> dict[str, str]:
        """The content fingerprints of all files of the dataset."""
        return getattr(self.dataset, "files", {})

    @property
    def empty_classes(self) -> Sequence[str]:
        """The classes of which the dataset has no clip."""
        return getattr(self.dataset, "empty_classes", [])

    def check_images(self, num_images: int) -> None:
        """InputError when the dataset cannot give images behind clips."""
        if hasattr(self.dataset, "check_images"):
            self.dataset.check_images(num_images)

    def __len__(self) -> int:
        return len(self.indices)

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Return clip ``index`` of the subset."""
        return self.dataset.clip(self.indices[index], generator)

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """Return one frame of clip ``index`` of the subset."""
        return self.dataset.image(self.indices[index], generator)

    def describe(self) -> dict[str, Any]:
        """Return the whole dataset's description, and which clips of it these are."""
        return {**self.dataset.describe(), "clips": len(self), "part": self.digest, **self.facts}


def as_range(members: Sequence[int]) -> range:
    """Return the members of a bucket of procedural clips, which are a range."""
    assert isinstance(members, range)
    return members


def keys_of(dataset: Dataset) -> list[str]:
    """Return the key of every clip of a dataset of files; none for procedural clips, and for a mix with
    some.
    """
    if isinstance(dataset, MixDataset):
        return keys_of_mix(dataset)
    if isinstance(dataset, FolderDataset):
        return [clip.key for clip in dataset.clips]
    if isinstance(dataset, LatentDataset):
        return [record.key for record in dataset.videos]
    return []


def keys_of_mix(dataset: MixDataset) -> list[str]:
    """Return SET/KEY of every clip of a mix; none when a set has no keys."""
    found = [(part.name, keys_of(part.dataset)) for part in dataset.sets]
    if not all(keys for _, keys in found):
        return []
    return [f"{name}/{key}" for name, keys in found for key in keys]


def in_hash_order(keys: Sequence[str]) -> list[str]:
    """Return ``keys`` by the hash of each."""
    return sorted(keys, key=lambda key: hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())


def subset(dataset: Dataset, keys: set[str], facts: dict[str, Any] | None = None) -> Subset:
    """Return the clips of ``dataset`` with one of these ``keys``, in its order."""
    found = [(index, key) for index, key in enumerate(keys_of(dataset)) if key in keys]
    return Subset(dataset, [index for index, _ in found], [key for _, key in found], facts)


def split(dataset: Dataset, hold_out: float | str) -> tuple[Dataset, Dataset | None]:
    """Return (clips to train on, held-out clips): a share of the videos in (0, 1), or a list of them.

    0, and a whole number, which is about captions of procedural clips, hold no clip out: (dataset, None).
    InputError when either side would be empty, or a listed video is not there.
    """
    if isinstance(hold_out, int) or hold_out == 0:
        return dataset, None
    if isinstance(dataset, MixDataset):
        return split_mix(dataset, hold_out)
    if isinstance(dataset, ProceduralDataset):
        return split_procedural(dataset, hold_out)
    keys = keys_of(dataset)
    if isinstance(hold_out, str):
        held = listed_keys(Path(hold_out), keys)
        facts = {"hold_out": "a list of files"}
    else:
        held = share_of_keys(dataset, keys, hold_out)
        facts = {"hold_out": hold_out}
    check(
        len(held) < len(keys),
        f"data.hold_out holds out all {len(keys)} videos, which leaves none to train on; hold out fewer",
    )
    return subset(dataset, set(keys) - held, facts), subset(dataset, held, facts)


def split_mix(dataset: MixDataset, hold_out: float | str) -> tuple[Dataset, Dataset]:
    """Return a mix of what is left of each set, and one of what is held out of each.

    A list of files names clips as SET/KEY; sets without a listed clip are trained on whole. Sets of images
    stay whole. InputError when a set has nothing left, or a share would hold out nothing of it.
    """
    train: list[MixedSet] = []
    held: list[MixedSet] = []
    listed: set[str] = set()
    if isinstance(hold_out, str):
        keys = [f"{part.name}/{key}" for part in dataset.sets for key in keys_of(part.dataset)]
        listed = listed_keys(Path(hold_out), keys)
    for part in dataset.sets:
        own = {key.removeprefix(f"{part.name}/") for key in listed if key.startswith(f"{part.name}/")}
        kept: Dataset = part.dataset
        others: Dataset | None = None
        if own:
            keys = keys_of(part.dataset)
            facts = {"hold_out": "a list of files"}
            kept = subset(part.dataset, set(keys) - own, facts)
            others = subset(part.dataset, own, facts)
            check(
                len(kept) > 0,
                f"data.hold_out lists all {len(keys)} videos of set {printable(part.name)}, which leaves "
                "none to train on; hold out fewer",
            )
        elif not listed:
            try:
                kept, others = split(part.dataset, hold_out)
            except InputError as error:
                raise InputError(f"data.mix, set {printable(part.name)}: {error}") from error
        train.append(replace(part, dataset=kept))
        if others is not None:
            held.append(replace(part, dataset=others))
    return MixDataset(train, dataset.images), MixDataset(held)


def split_procedural(dataset: ProceduralDataset, hold_out: float | str) -> tuple[Dataset, Dataset]:
    """Return the first clips and the share of the last ones."""
    if isinstance(hold_out, str):
        raise InputError(
            f"data.hold_out is {printable(hold_out)}, but procedural clips are no files; give a share "
            "such as 0.1, or a whole number: of the captions one in so many is held out"
        )
    total = len(dataset)
    count = round(hold_out * total)
    check_sides(total, count, hold_out)
    shapes = len(dataset.buckets.shapes) if dataset.buckets else 1
    check(
        total - count >= shapes,
        f"data.hold_out={hold_out} of {total} clips leaves {total - count} to train on, but there are "
        f"{shapes} buckets; hold out fewer, or give more data.num_clips",
    )
    facts = {"hold_out": hold_out}
    train = range(total - count)
    held = range(total - count, total)
    return (
        Subset(dataset, train, [f"{train.start}:{train.stop}"], facts),
        Subset(dataset, held, [f"{held.start}:{held.stop}"], facts),
    )


def check_sides(total: int, count: int, hold_out: float) -> None:
    """InputError unless ``count`` of ``total`` clips leaves something on both sides."""
    lacking = ""
    if count < 1:
        lacking = "held out"
    if count >= total:
        lacking = "left to train on"
    if lacking:
        raise InputError(
            f"data.hold_out={hold_out} of {total} clips is {count}, so none would be {lacking}; "
            f"give a share from {0.5 / total:.2g} to {1 - 1 / max(total, 1):.2g}, or a list of files"
        )


def share_of_keys(dataset: Dataset, keys: Sequence[str], share: float) -> set[str]:
    """Return about ``share`` of ``keys`` in hash order, without the last one of a class or a bucket."""
    count = round(share * len(keys))
    check_sides(len(keys), count, share)
    groups = groups_of(dataset, keys)
    left = Counter(group for key in keys for group in groups[key])
    held: set[str] = set()
    for key in in_hash_order(keys):
        if len(held) == count:
            break
        if all(left[group] > 1 for group in groups[key]):
            held.add(key)
            left.subtract(groups[key])
    check(
        len(held) > 0,
        f"data.hold_out={share} finds no video to hold out: every one is the only one of its class or "
        "bucket; give more videos, or a list of files",
    )
    return held


def groups_of(dataset: Dataset, keys: Sequence[str]) -> dict[str, list[tuple[str, Any]]]:
    """Return the class and the bucket of each clip, as far as there are any."""
    groups: dict[str, list[tuple[str, Any]]] = {key: [] for key in keys}
    clips = dataset.clips if isinstance(dataset, FolderDataset) else getattr(dataset, "videos", [])
    for key, clip in zip(keys, clips, strict=True):
        if dataset.classes:
            groups[key].append(("class", clip.label))
    members: Sequence[Sequence[int]] = getattr(dataset, "members", ())
    for bucket, indices in enumerate(members):
        for index in indices:
            groups[keys[index]].append(("bucket", bucket))
    return groups


def listed_keys(path: Path, keys: Sequence[str]) -> set[str]:
    """Return the videos listed in a text file; InputError for a missing file, or a video that is not used."""
    name = printable(str(path))
    try:
        check(path.stat().st_size <= MAX_LIST_BYTES, f"data.hold_out {name} is larger than 64 MB")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.hold_out {name} cannot be read ({type(error).__name__}); give a share such as 0.1, or a "
            "text file with one video a line, as its path below data.root"
        ) from None
    listed = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    unknown = sorted(listed - set(keys))
    check(
        not unknown,
        f"data.hold_out {name} lists {len(unknown)} videos that are not used"
        + (f", first {printable(unknown[0])}{nearest(unknown[0], keys)}; " if unknown else "")
        + "give paths below data.root (see skipped.jsonl for videos that cannot be used)",
    )
    check(bool(listed), f"data.hold_out {name} lists no video, so none would be held out; list some")
    return listed
