# SPDX-License-Identifier: Apache-2.0
"""RunConfig: the parts' own configurations composed, read from layers, with every bad key reported at once.

A value comes from the last layer that names it: default < recipe or YAML file < environment (``LATTE_TRAIN_LR``) < ``train.lr=3e-4``.
What follows from data and codec is not asked twice: the model's frames, latent size and channels are derived where no layer names
them, and refused where they contradict.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from latte.autoencoder.codec import CODECS, CodecConfig
from latte.checks import InputError, nearest, require
from latte.config.layers import (
    Entry,
    Layer,
    in_words,
    read_environment,
    read_value,
    read_words,
    read_yaml,
    short,
)
from latte.data.datasets import DataConfig
from latte.diffusion.config import DiffusionConfig
from latte.inference.generate import SampleConfig
from latte.interop.lora import LoraConfig
from latte.model.latte import ModelConfig
from latte.model.text import TextConfig
from latte.text.encoders import TextEncoderConfig
from latte.training.config import TrainConfig

VERSION = 1
RUN_FILE = "config.yaml"
DEFAULT = "default"
DERIVED = "derived from data and codec"


@dataclass(frozen=True)
class RunSection:
    """Where the run lives, and the number that every random draw of it starts from."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    dir: str | None = None
    seed: int = 0
    allow_data_change: bool = False  # resume although files of the data changed; never saved with the run

    def __post_init__(self) -> None:
        require(self.dir != "", "run.dir", self.dir, "it names a folder", "give a path")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "seeds count from 0", "give 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run. ``version`` is that of the file's format."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    version: int = VERSION
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    run: RunSection = field(default_factory=RunSection)

    def __post_init__(self) -> None:
        require(
            self.version == VERSION,
            "version",
            self.version,
            f"this latte reads version {VERSION}",
            "use the latte that wrote it",
        )
        problems = []
        for key, (value, reason) in derived(self.data, self.codec).items():
            given = self.model.grid_size if key == "latent_size" else getattr(self.model, key)
            if given != value:
                problems.append(
                    f"model.{key} is {getattr(self.model, key)}, but {reason}; leave model.{key} out, or change the other"
                )
        if self.text.name is not None:
            problems += class_keys(self.model)
        if self.lora.rank is not None and self.train.init is None:
            problems.append(
                f"lora.rank is {self.lora.rank}, but adapters need trained weights under them; give train.init"
            )
        if problems:
            raise InputError("\n".join(problems))

    @property
    def network(self) -> ModelConfig | TextConfig:
        """The model's configuration: that of section ``model``, or with a text encoder that of the text model made from both sections."""
        if self.text.name is None:
            return self.model
        shared = {name: getattr(self.model, name) for name in TEXT_KEYS}
        text = self.text
        return TextConfig(
            **shared, caption_channels=text.channels, gated_time=text.gated_time, table_size=text.table_size
        )


TEXT_KEYS = {item.name for item in fields(ModelConfig)} & {item.name for item in fields(TextConfig)}


def class_keys(model: ModelConfig) -> list[str]:
    """A problem for every key of ``model`` that only a class model reads and that is not left at its default."""
    set_here = [
        item
        for item in fields(ModelConfig)
        if item.name not in TEXT_KEYS and getattr(model, item.name) != item.default
    ]
    return [
        f"model.{item.name} is {getattr(model, item.name)!r}, but with text.name the model reads captions and has no such part; "
        f"leave model.{item.name} out, or set text.name=null"
        for item in set_here
    ]


def derived(data: DataConfig, codec: CodecConfig) -> dict[str, tuple[Any, str]]:
    """What follows for the model: key -> (value, reason). InputError for a frame size that the codec does not divide."""
    kind, (height, width) = CODECS[codec.name], data.size
    for side in data.size:
        rule = f"codec {codec.name!r} shrinks {kind.downscale} times"
        way_out = f"the nearest multiple is {max(round(side / kind.downscale), 1) * kind.downscale}"
        require(side % kind.downscale == 0, "data.resolution", side, rule, way_out)
    latent = (height // kind.downscale, width // kind.downscale)
    return {
        "num_frames": (data.frames, f"data.frames is {data.frames}"),
        "latent_size": (
            latent,
            f"data.resolution {height} x {width} and codec {codec.name!r} make {latent[0]} x {latent[1]}",
        ),
        "latent_channels": (kind.channels, f"codec {codec.name!r} has {kind.channels}"),
    }


def _keys(config: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every value of a configuration class."""
    hints = get_type_hints(config)
    for item in fields(config):
        if is_dataclass(hints[item.name]):
            yield from _keys(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, hints[item.name]


HINTS = dict(_keys(RunConfig))
_ADAPTER, _DATA, _CODEC = TypeAdapter(RunConfig), TypeAdapter(DataConfig), TypeAdapter(CodecConfig)


def recipes() -> dict[str, Path]:
    """Name -> file of every recipe of the package."""
    folder = Path(str(resources.files("latte.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_run(run: str | Path | None, overrides: Iterable[str] = ()) -> tuple[RunConfig, dict[str, str]]:
    """A recipe's name, a YAML file, a run folder or None, and ``a.b=value`` overrides -> (RunConfig, origin of each dotted key).

    Raises one InputError that lists every unknown key and wrong value, each with where it was written, and the nearest valid key.
    ``run.dir`` is the run folder itself when one is given, otherwise ``runs/<name>`` unless it is set.
    """
    file = Layer(HINTS) if run is None else _read_run(run)
    layers = [file, read_environment(os.environ, HINTS), read_words(overrides, HINTS)]
    entries: dict[str, Entry] = {}
    for layer in layers:
        entries |= layer.entries
    nested, problems = _typed(entries)
    try:
        _derive(nested, entries)
        config = _ADAPTER.validate_python(nested)
    except ValidationError as error:
        config, problems = None, problems + _told(error, entries)
    problems = [problem for layer in layers for problem in layer.problems] + problems
    if config is None or problems:
        raise InputError("\n".join(problems))
    return config, {key: entries[key].origin if key in entries else DEFAULT for key in HINTS}


def _read_run(run: str | Path) -> Layer:
    """The settings of a recipe, a run folder or a YAML file, with the place of the run among them."""
    known, path = recipes(), Path(run)
    if str(run) in known:
        path, name = known[str(run)], f"recipe {run}"
    elif path.is_dir():
        path, name = path / RUN_FILE, str(path / RUN_FILE)
        require(
            path.is_file(),
            "RUN",
            str(run),
            f"this folder holds no {RUN_FILE}",
            "give a run folder, a recipe or a YAML file",
        )
    elif path.is_file():
        name = str(path)
    else:
        names = f"no file, no run folder and not one of the recipes {', '.join(known)}"
        raise InputError(f"RUN is {short(str(run))}, which is {names}{nearest(run, known)}")
    layer = read_yaml(path, name, HINTS)
    if Path(run).is_dir() and str(run) not in known:
        layer.entries["run.dir"] = Entry(str(run), "the run folder")
    layer.entries.setdefault("run.dir", Entry(str(Path("runs") / path.stem), f"name of {name}"))
    return layer


def _typed(entries: Mapping[str, Entry]) -> tuple[dict[str, Any], list[str]]:
    """Entries -> (values by section, problems). A section with a value of a wrong type is left out, so that the others are checked too."""
    nested: dict[str, Any] = {}
    problems, bad = [], set()
    for key, entry in entries.items():
        section, _, leaf = key.rpartition(".")
        try:
            value = read_value(entry.raw, HINTS[key])
        except ValueError:
            problems.append(
                f"{entry.origin}: {key} is {short(entry.raw)}, but it must be {in_words(HINTS[key])}"
            )
            bad.add(section or leaf)
            continue
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    if bad & {"data", "codec"}:
        bad.add("model")  # parts of it follow from these
    return {name: value for name, value in nested.items() if name not in bad}, problems


def _derive(nested: dict[str, Any], entries: dict[str, Entry]) -> None:
    """Add to the model's values what follows from data and codec, unless these are wrong themselves, which the check will tell."""
    try:
        data, codec = (
            _DATA.validate_python(nested.get("data", {})),
            _CODEC.validate_python(nested.get("codec", {})),
        )
        found = derived(data, codec)
    except (ValidationError, InputError):
        return
    for leaf, (value, _) in found.items():
        if f"model.{leaf}" not in entries:
            entries[f"model.{leaf}"] = Entry(value, DERIVED)
            nested.setdefault("model", {})[leaf] = (
                value[0] if leaf == "latent_size" and value[0] == value[1] else value
            )


def _told(error: ValidationError, entries: Mapping[str, Entry]) -> list[str]:
    """What the parts' own checks say, one line each, with the place of the first value that it names."""
    lines = []
    for item in error.errors(include_url=False):
        section = ".".join(map(str, item["loc"]))
        for message in str(item.get("ctx", {}).get("error", item["msg"])).split("\n"):
            if f"{section}.{message.split(' ')[0]}" in HINTS:
                message = f"{section}.{message}"  # a part of a part does not know the section
            named = [
                entries[key].origin
                for key in re.findall(r"[a-z]+\.[a-z_]+|version", message)
                if key in entries
            ]
            lines.append(f"{named[0] if named else section}: {message}")
    return lines


def schema() -> dict[str, Any]:
    """JSON schema of the YAML file, for editors."""
    return _ADAPTER.json_schema()


def flat(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, in the order of the classes."""
    values = asdict(config)
    return {
        key: values[section][leaf] if leaf else values[section]
        for key in HINTS
        for section, _, leaf in [key.partition(".")]
    }


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, every value written out; ``load_run`` reads it back to the same configuration."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
