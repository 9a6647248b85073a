# SPDX-License-Identifier: Apache-2.0
"""Several sets as one: the ids of a step are a function of (seed, step) alone, and each set has its share."""

from collections import Counter
from dataclasses import replace
from multiprocessing import forkserver

import pytest
import torch
from PIL import Image

from latte.checks import InputError
from latte.config.run import load_run
from latte.data import loader as loader_module
from latte.data.base import Clip
from latte.data.buckets import Bucket, Buckets
from latte.data.config import DataConfig, MixPart, whole_weights
from latte.data.datasets import build_dataset
from latte.data.hold_out import split
from latte.data.joint import JointDataset
from latte.data.loader import Loader
from latte.data.media import write_mp4
from latte.data.mix import MixDataset, MixedSet
from latte.data.order import MixOrder, Shares, first_items, order_of, permuted, random_items
from latte.runtime import generator
from tiny_runs import FORKS
from videos import numbered

SIZES = {"A": 23, "B": 5, "C": 40}
WEIGHTS = {"A": 3, "B": 0.5, "C": 1}


class Plain:
    """Clips whose key is their number and whose frame is noise of the generator."""

    classes = ("one", "two")
    latent = False
    skipped = ()
    captions = ()

    def __init__(self, count, label=0):
        self.count = count
        self.label = label

    def __len__(self):
        return self.count

    def clip(self, index, generator):
        return Clip(torch.rand(1, 1, 2, 2, generator=generator), self.label, None, str(index))

    image = clip

    def describe(self):
        return {"kind": "plain", "clips": self.count, "content": str(self.count)}


class Bucketed(Plain):
    """Clips of two shapes in turn, the second with half of the tokens."""

    buckets = Buckets(
        Bucket(2, 2, 2, (2, 2, 2), 8), (Bucket(2, 2, 2, (2, 2, 2), 8), Bucket(1, 2, 2, (1, 2, 2), 4))
    )

    def __init__(self, count):
        super().__init__(count)
        self.members = (range(0, count, 2), range(1, count, 2))


def mix(**changes) -> MixDataset:
    return MixDataset(
        [MixedSet(name, WEIGHTS[name], Plain(size)) for name, size in (SIZES | changes).items()]
    )


DATASETS = {"one": lambda: Plain(37), "mix": mix, "buckets": lambda: Bucketed(41)}
STARTS = (0, 1, 2, 5, 8, 11, 13)
STOP = 16
BATCH = 8
# (data, processes, workers) of the everyday suite; the others are nightly
OFTEN = {(name, world, 0) for name in DATASETS for world in (1, 2, 4)} | {("mix", 2, 1)}


def ids(name: str, world: int, workers: int, start: int) -> list[list[str]]:
    """The keys of every global batch from ``start`` on, loaded by ``world`` processes."""
    loaders = [Loader(DATASETS[name](), 3, BATCH, start, STOP, rank, world, workers) for rank in range(world)]
    found = [[key for part in parts for key in part.keys] for parts in zip(*loaders, strict=True)]
    for loader in loaders:
        loader.close()
    return found


@pytest.mark.parametrize(
    ("name", "world", "workers"),
    [
        pytest.param(
            name, world, workers, marks=() if (name, world, workers) in OFTEN else pytest.mark.nightly
        )
        for name in DATASETS
        for world in (1, 2, 4)
        for workers in (0, 1, 3)
    ],
)
def test_the_ids_of_a_step_do_not_depend_on_processes_workers_and_restarts(name, world, workers, monkeypatch):
    """63 combinations for each kind of data; with workers, the everyday suite restarts once."""
    forkserver.ensure_running()  # the loader blocks signals: a server that starts then would pass that on
    monkeypatch.setattr(loader_module, "START_METHOD", FORKS)
    expected = ids(name, 1, 0, 0)
    assert len(expected) == STOP
    assert len(set(map(tuple, expected))) == STOP, "no two steps are alike"
    starts = STARTS[4:5] if workers and (name, world, workers) in OFTEN else STARTS
    for start in starts:
        assert ids(name, world, workers, start) == expected[start:]


def test_every_window_has_the_exact_share_of_each_set():
    data = mix()
    order = order_of(data, 1, BATCH)
    assert isinstance(order, MixOrder)
    assert order.shares.weights == (6, 1, 2)
    items = [item for step in range(9 * 20) for item in order.items(step)]
    names = [data.located(item)[0].name for item in items]
    for start in range(0, len(names), 9):
        assert Counter(names[start : start + 9]) == {"A": 6, "B": 1, "C": 2}
    assert len({tuple(names[start : start + 9]) for start in range(0, len(names), 9)}) > 10, (
        "not in one order"
    )
    for step in (0, 1, 7, 100):
        counted = Counter(names[: step * BATCH])
        assert order.counts_before(step) == [counted[name] for name in SIZES]
    for name, size in SIZES.items():
        own = [data.located(item)[1] for item in items if data.located(item)[0].name == name]
        alone = [permuted(turn % size, size, 1, turn // size, f"set {name}") for turn in range(len(own))]
        weight = order.shares.weights[list(SIZES).index(name)]
        assert len(own) > 2 * size
        for start in range(0, len(own), weight):
            window = slice(start, start + weight)
            assert sorted(own[window]) == sorted(alone[window]), (
                "the clips of a window are the next of the set"
            )


def test_a_set_keeps_its_order_whatever_the_others_weigh():
    def order(weights):
        shares = Shares(("A", "B"), weights, (10, 7))
        return [MixOrder(0, 1, shares).item(position) for position in range(200)]

    one = [item for item in order((1, 1)) if item < 10]
    other = [item for item in order((5, 2)) if item < 10]
    for start in range(0, len(one), 5):
        assert sorted(one[start : start + 5]) == sorted(other[start : start + 5])


def test_clips_are_named_by_their_set_and_different():
    data = mix()
    assert len(data) == 68
    keys = {data.clip(index, generator(0, index)).key for index in range(68)}
    assert len(keys) == 68
    assert data.clip(23, generator(0)).key == "B/0"
    with pytest.raises(IndexError):
        data.clip(68, generator(0))
    drawn = random_items(data, 0, 68)
    assert sorted(drawn) == list(range(68)), "different clips, all of them if asked for"
    assert first_items(data, 4) == random_items(data, 0, 68)[:4]
    assert list(first_items(Plain(9), 4)) == [0, 1, 2, 3]


def test_labels_are_those_of_the_first_sets_classes():
    other = Plain(3, label=0)
    other.classes = ("two", "one")
    data = MixDataset([MixedSet("A", 1, Plain(2, label=1)), MixedSet("B", 1, other)])
    assert data.clip(0, generator(0)).label == 1
    assert data.clip(2, generator(0)).label == 1
    other.classes = ("two", "three")
    with pytest.raises(InputError, match=r"set A has 2 classes and set B has 2.*class one is not in set B"):
        MixDataset([MixedSet("A", 1, Plain(2)), MixedSet("B", 1, other)])


def test_images_come_from_the_sets_by_their_weights_or_from_sets_of_images():
    data = JointDataset(mix(), 300)

    def origins(dataset):
        seen = Counter()
        for _ in range(600):
            seen[dataset.random_image(stream).key.split("/")[0]] += 1
        return seen

    stream = generator(0, "images")
    seen = origins(data.dataset)
    assert 330 < seen["A"] < 470  # two thirds of 600
    assert 30 < seen["B"] < 110  # one ninth
    images = MixDataset(mix().sets, [MixedSet("pictures", 1, Plain(4))])
    assert set(origins(images)) == {"pictures"}
    clip = JointDataset(images, 2).clip(0, generator(0))
    assert clip.video.shape[0] == 3
    assert clip.label == [0, 0, 0]


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ((3, 1), (3, 1)),
        ((0.7, 0.3), (7, 3)),
        ((2, 4, 6), (1, 2, 3)),
        ((0.125,), (1,)),
        ((1e-3, 1), (1, 1000)),
    ],
)
def test_weights_become_whole_numbers(weights, whole):
    assert whole_weights(weights) == whole


@pytest.mark.parametrize("weights", [(0, 1), (-1, 2), (float("nan"),), (float("inf"), 1), (0.123456, 1)])
def test_weights_without_an_exact_window_are_refused(weights):
    with pytest.raises(
        InputError, match=r"data.mix: (weight must be positive|the weights .* limit is 10,000)"
    ):
        whole_weights(weights)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.mix=[{root: A, wieght: 3}]"], "entry 1: unknown key 'wieght'; did you mean 'weight'"),
        (["data.mix=[{root: A}, {root: B, weight: x}]"], "entry 2: weight must be a number, got 'x'"),
        (["data.mix=A"], r"data.mix must be a list such as \[{root: A, weight: 3}"),
        (["data.mix=[]"], "data.mix is an empty list"),
        (["data.mix=[{root: A}, {root: x/A}]"], "2 sets named A; give each a name"),
        (["data.mix=[{root: A}]", "data.root=B"], "data.root is B, but data.mix names the folders"),
        (["data.mix=[{root: A}]", "data.buckets=auto"], "data.buckets and data.mix are both given"),
        (["data.mix=[{root: A, kind: latents}]"], "kind is latents, but data.kind is folder"),
        (["data.mix=[{root: A, num_clips: 3}]"], "set A: data.num_clips is 3, but data.kind=folder does not"),
        (["data.mix=[{root: A, images: true}]"], "only sets of images"),
        (["data.mix=[{root: A}, {root: B, images: true}]"], "sets of images, but train.num_images is 0"),
        (["data.mix=[{root: A, weight: 0}]"], "weight must be positive"),
    ],
)
def test_a_mix_that_cannot_be_used_is_refused_in_one_line(words, message):
    with pytest.raises(InputError, match=message) as refused:
        load_run(None, words)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Two folders of videos in two classes, and one of pictures."""
    folder = tmp_path_factory.mktemp("mix")
    for root, count in (("A", 3), ("B", 2)):
        for name in ("cat", "dog"):
            for number in range(count):
                write_mp4(folder / root / name / f"{number}x.mp4", numbered(6, 32, 32), 8)
    for name in ("cat", "dog"):
        (folder / "P" / name).mkdir(parents=True)
        Image.new("RGB", (40, 32), (90, 60, 30)).save(folder / "P" / name / "photo.png")
    return folder


def config(roots, *parts: MixPart, **changes) -> DataConfig:
    placed = tuple(replace(part, root=str(roots / (part.root or ""))) for part in parts)
    return DataConfig(resolution=16, frames=4, mix=placed, **changes)


def test_folders_procedural_clips_and_pictures_mix(roots):
    parts = (MixPart(3, root="A"), MixPart(root="B"), MixPart(root="P", images=True))
    data = build_dataset(config(roots, *parts))
    assert (len(data), data.classes, data.empty_classes) == (10, ["cat", "dog"], [])
    assert [len(part.dataset) for part in data.images] == [2]
    assert set(data.files) == {
        *(f"A/{name}/{number}x.mp4" for name in ("cat", "dog") for number in range(3)),
        *(f"B/{name}/{number}x.mp4" for name in ("cat", "dog") for number in range(2)),
        *(f"P/{name}/photo.png" for name in ("cat", "dog")),
    }
    clip = JointDataset(data, 2).clip(0, generator(0))
    assert clip.video.shape == (6, 3, 16, 16)
    facts = data.describe()
    assert facts["order"] == ["A", "B"]
    assert facts["sets"]["A"]["weight"] == 3
    heavier = build_dataset(config(roots, replace(parts[0], weight=4), *parts[1:])).describe()
    assert heavier["sets"] != facts["sets"]
    assert heavier["content"] == facts["content"]
    with pytest.raises(InputError, match=r"data.mix, set C: data.root is .* no such folder"):
        build_dataset(config(roots, MixPart(root="A"), MixPart(root="C")))


def test_what_is_held_out_is_a_share_of_each_set_or_a_list(roots, tmp_path):
    data = build_dataset(config(roots, MixPart(3, root="A"), MixPart(root="B")))
    train, held = split(data, 0.34)
    assert [len(part.dataset) for part in train.sets] == [4, 3]
    assert [len(part.dataset) for part in held.sets] == [2, 1]
    assert train.shares.weights == (3, 1)
    used = [{part.clip(index, generator(0)).key for index in range(len(part))} for part in (train, held)]
    assert len(used[0] | used[1]) == 10
    listing = tmp_path / "held.txt"
    listing.write_text("B/dog/0x.mp4\n")
    train, held = split(data, str(listing))
    assert (len(train), len(held)) == (9, 1)
    assert held.clip(0, generator(0)).key == "B/dog/0x.mp4"
    listing.write_text("dog/0x.mp4\n")
    with pytest.raises(InputError, match=r"lists 1 videos that are not used, first dog/0x.mp4"):
        split(data, str(listing))


def test_a_billion_clips_are_permuted_without_memory():
    """Distinct, spread out, a function of the seed; nothing is allocated that grows with their number."""
    import tracemalloc

    count = 10**9
    permuted(0, count, 0, 0)
    tracemalloc.start()
    found = [permuted(position, count, 0, 0) for position in range(0, count, count // 500)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert len(set(found)) == len(found)
    assert max(found) < count
    tenths = Counter(10 * item // count for item in found)
    assert min(tenths.values()) > 25, tenths  # of 50
    assert found[:5] != [
        permuted(position, count, 1, 0) for position in range(0, 5 * count // 500, count // 500)
    ]
