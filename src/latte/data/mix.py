# SPDX-License-Identifier: Apache-2.0
"""Several datasets as one, each with a weight: ``data.mix``.

Which set a clip comes from is decided by ``latte.data.order.MixOrder``, a function of (seed, position). The
indices of the sets follow each other, and the name of its set begins the key of every clip.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from latte.checks import InputError, check, printable
from latte.data.base import Clip, Dataset
from latte.data.config import whole_weights
from latte.data.fingerprint import combined
from latte.data.order import Shares

COUNTED = ("clips", "classes", "content", "files", "part")  # of a description; they change with the files


@dataclass(frozen=True)
class MixedSet:
    """One dataset of a mix."""

    name: str
    weight: float
    dataset: Dataset


class MixDataset:
    """The clips of ``sets``; images behind clips come from ``images``, or from the clips if there are none.

    Labels are those of the first set's classes. InputError for sets of different classes.
    """

    def __init__(self, sets: Sequence[MixedSet], images: Sequence[MixedSet] = ()):
        self.sets = tuple(sets)
        self.images = tuple(images)
        first = self.sets[0].dataset
        self.classes = list(first.classes)
        self.latent = first.latent
        check_same_classes({part.name: part.dataset.classes for part in self.all_sets})
        weights = whole_weights([part.weight for part in self.sets])
        sizes = tuple(len(part.dataset) for part in self.sets)
        self.shares = Shares(tuple(part.name for part in self.sets), weights, sizes)
        self.starts = [0, *accumulate(sizes)]

    @property
    def all_sets(self) -> tuple[MixedSet, ...]:
        """The sets of clips, then those of images."""
        return (*self.sets, *self.images)

    @property
    def captions(self) -> Sequence[str]:
        """The distinct captions of all sets, sorted."""
        return sorted({caption for part in self.all_sets for caption in part.dataset.captions})

    def check_captions(self) -> None:
        """InputError when some sets have captions and others have none."""
        without = [part.name for part in self.all_sets if not part.dataset.captions]
        check(
            not without,
            f"text.name is set, but set {printable(without[0] if without else '')} of data.mix has no "
            "captions; give it captions: auto, leave it out, or set text.name=null",
        )

    @property
    def skipped(self) -> Sequence[dict[str, str]]:
        """What the sets cannot use."""
        return [entry for part in self.all_sets for entry in part.dataset.skipped]

    @property
    def empty_classes(self) -> list[str]:
        """The classes of which no set has a usable clip."""
        empty = [getattr(part.dataset, "empty_classes", ()) for part in self.sets]
        return [name for name in self.classes if all(name in names for names in empty)]

    @property
    def files(self) -> dict[str, str]:
        """The content fingerprints of the files of all sets."""
        return {
            f"{part.name}/{key}": value
            for part in self.all_sets
            for key, value in getattr(part.dataset, "files", {}).items()
        }

    def check_images(self, num_images: int) -> None:
        """InputError when a set cannot give images behind clips."""
        for part in self.images or self.sets:
            if hasattr(part.dataset, "check_images"):
                part.dataset.check_images(num_images)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return self.starts[-1]

    def located(self, index: int) -> tuple[MixedSet, int]:
        """Return the set of clip ``index``, and its index there."""
        for part, start, stop in zip(self.sets, self.starts, self.starts[1:], strict=False):
            if start <= index < stop:
                return part, index - start
        raise IndexError(index)

    def named(self, clip: Clip, part: MixedSet) -> Clip:
        """Return ``clip`` of a set with its name before the key, and the label that its class has here."""
        label = clip.label
        if label is not None:
            label = self.classes.index(part.dataset.classes[label])
        return replace(clip, key=f"{part.name}/{clip.key}", label=label)

    def clip(self, index: int, generator: torch.Generator) -> Clip:
        """Return clip ``index``."""
        part, own = self.located(index)
        return self.named(part.dataset.clip(own, generator), part)

    def image(self, index: int, generator: torch.Generator) -> Clip:
        """Return a random frame of clip ``index``."""
        part, own = self.located(index)
        return self.named(part.dataset.image(own, generator), part)

    def random_image(self, generator: torch.Generator) -> Clip:
        """Return a random frame of a random clip; sets are drawn by their weights, clips of a set evenly."""
        parts = self.images or self.sets
        ends = list(accumulate(whole_weights([part.weight for part in parts])))
        slot = int(torch.randint(ends[-1], (), generator=generator))
        part = next(part for part, end in zip(parts, ends, strict=True) if slot < end)
        index = int(torch.randint(len(part.dataset), (), generator=generator))
        return self.named(part.dataset.image(index, generator), part)

    def describe(self) -> dict[str, Any]:
        """Return what the sets are, their weights and their order; of latents also the codec."""
        described = {part.name: part.dataset.describe() for part in self.all_sets}
        content = [[name, {key: facts.get(key) for key in COUNTED}] for name, facts in described.items()]
        sets = {}
        for part in self.all_sets:
            facts = {key: value for key, value in described[part.name].items() if key not in COUNTED}
            sets[part.name] = {"weight": part.weight, **facts}
        codec = {"codec": described[self.sets[0].name].get("codec")} if self.latent else {}
        return {
            "kind": "mix",
            **codec,
            "clips": len(self),
            "classes": self.classes,
            "content": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "files": combined(self.files),
            "order": [part.name for part in self.sets],
            "images": [part.name for part in self.images],
            "sets": sets,
        }


def check_same_classes(classes: Mapping[str, Sequence[str]]) -> None:
    """InputError unless all sets (name -> classes) have the same classes, in any order."""
    first = next(iter(classes))
    for other, names in classes.items():
        lacking = [(name, other) for name in classes[first] if name not in names]
        lacking += [(name, first) for name in names if name not in classes[first]]
        if lacking:
            name, where = map(printable, lacking[0])
            raise InputError(
                f"data.mix: set {printable(first)} has {len(classes[first])} classes and set "
                f"{printable(other)} has {len(names)}, and they must be the same: class {name} is not in set "
                f"{where}; give both the same class folders, or data.labels=false"
            )


def single_sets(dataset: Any) -> list[Dataset]:
    """Return the datasets that ``dataset`` is made of: those of a mix, or itself."""
    if isinstance(dataset, MixDataset):
        return [part.dataset for part in dataset.all_sets]
    return [dataset]
