# SPDX-License-Identifier: Apache-2.0
"""RunConfig: the parts' own configurations composed, read from layers, with every bad key reported at once.

A value comes from the last layer that names it: default < recipe or YAML file < environment
(``LATTE_TRAIN_LR``) < ``train.lr=3e-4``. What follows from data and codec need not be given twice: the
model's frames, latent size and channels are derived where no layer names them, and refused where they
contradict.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from latte.autoencoder.compression import check_images
from latte.autoencoder.config import CodecConfig, compression_at
from latte.checks import InputError, beside, check, nearest, printable
from latte.config.layers import (
    Entry,
    Layer,
    read_environment,
    read_inheriting,
    read_value,
    read_words,
    short,
    type_name,
    unusable,
)
from latte.data.bucket_settings import Grid, buckets_of
from latte.data.buckets import Buckets, check_world
from latte.data.config import DataConfig
from latte.diffusion.config import DiffusionConfig
from latte.inference.config import SampleConfig
from latte.interop.config import LoraConfig
from latte.model.config import PATCHES, ModelConfig, TextConfig
from latte.text.config import TextEncoderConfig
from latte.training.config import TrainConfig

VERSION = 1
RUN_FILE = "config.yaml"
DEFAULT = "default"
DERIVED = "derived from data and codec"


@dataclass(frozen=True)
class RunSection:
    """Where the run is stored, and the seed of its random draws."""

    dir: str | None = None  # folder of the run; runs/<name of the recipe or file> if unset
    seed: int = 0  # seed of weights, batches, timesteps and noise, in [0, 2^63)
    allow_data_change: bool = False  # resume although files of the data changed; never saved with the run

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check(self.dir != "", "run.dir is empty; give the path of a folder")
        check(0 <= self.seed < 2**63, f"run.seed must be in [0, 2^63), got {self.seed}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    version: int = VERSION  # version of the format of the file
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    run: RunSection = field(default_factory=RunSection)

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        check(
            self.version == VERSION,
            f"version is {self.version}, but this latte reads version {VERSION}; use the latte that wrote it",
        )
        problems = []
        for key, (value, reason) in derived(self.data, self.codec).items():
            given = self.model.grid_size if key == "latent_size" else getattr(self.model, key)
            if given != value:
                problems.append(
                    f"model.{key} is {getattr(self.model, key)}, but {reason}; "
                    f"leave model.{key} out, or change the other"
                )
        if self.text.name is not None:
            problems += class_keys(self.model)
        try:
            check_buckets(self)
        except InputError as error:
            problems.append(str(error))
        problems += self.data.unused_images(self.train.num_images)
        if self.lora.rank is not None and self.train.init is None:
            reason = "but adapters need trained weights; give train.init"
            problems.append(f"lora.rank is {self.lora.rank}, {reason}")
        if problems:
            raise InputError("\n".join(problems))
        compression = compression_at(self.codec.name, self.codec.path)
        check_images(self.train.num_images, compression, self.codec.name)
        if self.train.depends_on_network:  # which imports torch
            from latte.training.between_blocks import check_network

            check_network(self.train, self.network)

    @property
    def network(self) -> ModelConfig | TextConfig:
        """The model's configuration: section ``model``, or that of a text model, made of both sections."""
        if self.text.name is None:
            return self.model
        shared = {name: getattr(self.model, name) for name in TEXT_KEYS}
        text = self.text
        own = {name: getattr(text, name) for name in ("gated_time", "table_size", "pooled_caption")}
        return TextConfig(**shared, caption_channels=text.channels, **own)

    @property
    def grid(self) -> Grid:
        """What decides which shapes of clips fit: codec and patches."""
        compression = compression_at(self.codec.name, self.codec.path)
        frames_per_token = 1
        if self.text.name is None:
            frames_per_token = self.model.frames_per_token
        return Grid(self.codec.name, compression, self.model.patch_size, frames_per_token)

    @property
    def buckets(self) -> Buckets | None:
        """The buckets of ``data.buckets``; None without."""
        return buckets_of(self.data, self.grid)


TEXT_KEYS = {item.name for item in fields(ModelConfig)} & {item.name for item in fields(TextConfig)}


def class_keys(model: ModelConfig) -> list[str]:
    """Return a problem for every key that only a class model reads and that is not at its default."""
    changed = [
        item
        for item in fields(ModelConfig)
        if item.name not in TEXT_KEYS and getattr(model, item.name) != item.default
    ]
    return [
        f"model.{item.name} is {getattr(model, item.name)!r}, but a text model has no such part; "
        f"leave model.{item.name} out, or set text.name=null"
        for item in changed
    ]


def check_buckets(config: RunConfig) -> None:
    """InputError for a bucket that does not fit the codec, the model or the tokens of a step."""
    buckets = config.buckets
    if buckets is None:
        return
    check_world(config.train.global_batch, 1, buckets)
    grid = config.grid
    for bucket in buckets.shapes:
        size = grid.compression.latent_size(*bucket.size, grid.codec)
        try:
            replace(config.model, num_frames=grid.compression.latent_frames(bucket.frames), latent_size=size)
        except InputError as error:
            raise InputError(f"data.buckets: {bucket} does not fit the model: {error}") from None


def derived(data: DataConfig, codec: CodecConfig) -> dict[str, tuple[Any, str]]:
    """Return what follows for the model: key -> (value, reason).

    InputError for a frame size that the codec does not divide.
    """
    compression = compression_at(codec.name, codec.path)
    factor = compression.spatial_factor
    height, width = data.size
    for side in data.size:
        check(
            side % factor == 0,
            f"data.resolution is {side}, but codec {codec.name!r} reduces each side {factor} times; "
            f"the nearest multiple is {max(round(side / factor), 1) * factor}",
        )
    latent = (height // factor, width // factor)
    num_frames = compression.latent_frames(data.frames, "data.frames")
    reason = f"data.frames is {data.frames}"
    if num_frames != data.frames:
        reason += f", which codec {codec.name!r} encodes to {num_frames} latent frames"
    return {
        "num_frames": (num_frames, reason),
        "latent_size": (
            latent,
            f"data.resolution {height} x {width} with codec {codec.name!r} gives {latent[0]} x {latent[1]}",
        ),
        "latent_channels": (compression.channels, f"codec {codec.name!r} has {compression.channels}"),
    }


def _keys(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every value of a configuration class."""
    hints = get_type_hints(config)
    for item in fields(config):
        if is_dataclass(hints[item.name]):
            yield from _keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hints[item.name]


HINTS = dict(_keys(RunConfig))
_ADAPTER = TypeAdapter(RunConfig)
_DATA = TypeAdapter(DataConfig)
_CODEC = TypeAdapter(CodecConfig)


def recipes() -> dict[str, Path]:
    """Return name -> file of every recipe of the package."""
    return {path.stem: path for path in sorted(Path(str(resources.files("latte.recipes"))).glob("*.yaml"))}


def load_run(
    run: str | Path | None, overrides: Iterable[str] = (), environment: Mapping[str, str] | None = None
) -> tuple[RunConfig, dict[str, str]]:
    """Read a recipe's name, a YAML file, a run folder or None, and ``a.b=value`` overrides.

    Returns the RunConfig and the origin of each dotted key. Raises one InputError that lists every unknown
    key and wrong value, each with the place where it was written. ``run.dir`` is the run folder itself when
    one is given, otherwise ``runs/<name>`` unless it is set.
    """
    layers = [
        Layer(HINTS) if run is None else _read_run(run),
        read_environment(os.environ if environment is None else environment, HINTS),
        read_words(overrides, HINTS),
    ]
    entries: dict[str, Entry] = {}
    for layer in layers:
        entries |= layer.entries
    nested, problems = _typed(entries)
    config = None
    try:
        problems += _derive(nested, entries)
        config = _ADAPTER.validate_python(nested)
    except ValidationError as error:
        problems += _located(error, entries)
    problems = [problem for layer in layers for problem in layer.all_problems()] + problems
    if config is None or problems:
        raise InputError("\n".join(problems))
    return config, {key: entries[key].origin if key in entries else DEFAULT for key in HINTS}


def _read_run(run: str | Path) -> Layer:
    """Return the settings of a recipe, a run folder or a YAML file, with the place of the run among them."""
    known = recipes()
    path = known.get(str(run), Path(run))
    name = f"recipe {run}" if str(run) in known else str(path)
    is_folder = str(run) not in known and _exists(path.is_dir)
    if is_folder:
        path = path / RUN_FILE
        name = str(path)
        check(
            path.is_file(),
            f"RUN {short(str(run))} is a folder without {RUN_FILE}; give a run folder or a recipe",
        )
    elif not _exists(path.is_file):
        hint = nearest(str(run)[:100], [*known, *map(printable, beside(Path(run)))])
        raise InputError(
            f"RUN {short(str(run))} is no recipe, YAML file or run folder; recipes: {', '.join(known)}{hint}"
        )
    layer = read_inheriting(path, name, HINTS, known)
    if is_folder:
        layer.entries["run.dir"] = Entry(str(run), "the run folder")
    layer.entries.setdefault("run.dir", Entry(str(Path("runs") / printable(path.stem)), f"name of {name}"))
    return layer


def _exists(test: Callable[[], bool]) -> bool:
    """Return ``test()``, False for a name that the system refuses (too long, a NUL character)."""
    try:
        return test()
    except (OSError, ValueError):
        return False


def _typed(entries: Mapping[str, Entry]) -> tuple[dict[str, Any], list[str]]:
    """Return (values by section, problems).

    A section with a value of a wrong type is left out, so that the others are checked too.
    """
    nested: dict[str, Any] = {}
    problems = []
    bad = set()
    for key, entry in entries.items():
        section, _, leaf = key.rpartition(".")
        try:
            value = read_value(entry.raw, HINTS[key])
        except ValueError as error:
            reason = f", {error}"
            if not isinstance(error, InputError):
                reason = f" must be {type_name(HINTS[key])}, got {short(entry.raw)}"
            problems.append(f"{entry.origin}: {key}{reason}")
            bad.add(section or leaf)
            continue
        if reason := unusable(value):
            problems.append(f"{entry.origin}: {key} is {short(value)}, which {reason}; give another one")
            bad.add(section or leaf)
        values = nested.setdefault(section, {}) if section else nested
        values[leaf] = value
    if bad & {"data", "codec"}:
        bad.add("model")  # parts of it follow from these
    return {name: value for name, value in nested.items() if name not in bad}, problems


def _derive(nested: dict[str, Any], entries: dict[str, Entry]) -> list[str]:
    """Add to the model's values what follows from data and codec, if these are valid; return problems."""
    try:
        data = _DATA.validate_python(nested.get("data", {}))
        codec = _CODEC.validate_python(nested.get("codec", {}))
        found = derived(data, codec)
    except (ValidationError, InputError):
        return []
    problems = []
    if "model.num_frames" not in entries:
        problems = _tube_problems(data, codec, nested.get("model", {}))
    if problems:
        del nested["model"]  # what follows from data and codec alone is checked with the other sections
    for leaf, (value, _) in found.items():
        if f"model.{leaf}" not in entries:
            entries[f"model.{leaf}"] = Entry(value, DERIVED)
            square = leaf == "latent_size" and value[0] == value[1]
            nested.setdefault("model", {})[leaf] = value[0] if square else value
    frames = entries.get("data.frames", Entry(None, DEFAULT))
    return [f"{frames.origin}: {problem}" for problem in problems]


def _tube_problems(data: DataConfig, codec: CodecConfig, model: Mapping[str, Any]) -> list[str]:
    """Return why the patches with the values ``model`` cannot divide the latent frames of ``data``, if so."""
    patch = model.get("patch", ModelConfig.patch)
    if patch not in PATCHES:
        return []
    frames_per_token = PATCHES.fact(patch, "frames_per_token")
    tube = frames_per_token(SimpleNamespace(tube=model.get("tube", ModelConfig.tube)))
    if tube < 1:
        return []
    compression = compression_at(codec.name, codec.path)
    num_frames = compression.latent_frames(data.frames)
    if num_frames % tube == 0:
        return []
    lengths = compression.nearest_fitting(data.frames, lambda count: count % tube == 0, 4 * tube)
    valid = " and ".join(map(str, lengths))
    fix = f"the nearest valid numbers are {valid}" if valid else "no number is valid; give another model.tube"
    return [
        f"data.frames is {data.frames}, of which codec {codec.name!r} makes {num_frames} latent frames, but "
        f"compression patches need a multiple of model.tube = {tube} latent frames; {fix}"
    ]


def _located(error: ValidationError, entries: Mapping[str, Entry]) -> list[str]:
    """Return what the parts' own checks report, one line each, with the places of the values named."""
    lines = []
    for item in error.errors(include_url=False):
        section = ".".join(map(str, item["loc"]))
        for message in str(item.get("ctx", {}).get("error", item["msg"])).split("\n"):
            if f"{section}.{message.split(' ')[0]}" in HINTS:
                message = f"{section}.{message}"  # a part of a part does not know the section
            keys = dict.fromkeys(re.findall(r"[a-z]+\.[a-z_0-9]+|version", message))
            places = {key: entries[key].origin for key in keys if key in entries}
            first = next(iter(places.values()), section)
            others = [f"{key} is set by {place}" for key, place in places.items() if place != first]
            lines.append(f"{first}: {message}" + (f" ({', '.join(others)})" if others else ""))
    return lines


def schema() -> dict[str, Any]:
    """Return the JSON schema of the YAML file, for editors."""
    return _ADAPTER.json_schema()


def flat(config: RunConfig) -> dict[str, Any]:
    """Return dotted key -> value, in the order of the classes."""
    values = asdict(config)
    found = {}
    for key in HINTS:
        section, _, leaf = key.partition(".")
        found[key] = values[section][leaf] if leaf else values[section]
    return found


def as_record(config: RunConfig) -> dict[str, Any]:
    """Return the content of a run's config.yaml: all values, of the model what it stores."""
    recorded = asdict(replace(config, run=replace(config.run, allow_data_change=False)))
    return {**recorded, "data": config.data.stored(), "model": config.model.stored()}
