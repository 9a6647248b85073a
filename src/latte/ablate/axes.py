# SPDX-License-Identifier: Apache-2.0
"""The axes of an ablation: each turns a base recipe into settings, read from the package's own tables.

An entry added to VARIANTS, PATCHES, CONDITIONINGS, TEMPORAL_POSITIONS, OBJECTIVES, OPTIMIZERS, SIZES or
MAPPINGS is a setting by itself. The setting that changes nothing is the baseline, which all axes share.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from latte.checks import InputError, check, choose
from latte.config.layers import BASE, read_value, read_yaml, short, type_name
from latte.config.run import HINTS, RunConfig
from latte.data.datasets import UNREAD
from latte.diffusion.loss import OBJECTIVES, TIMES
from latte.diffusion.samplers import SAMPLERS
from latte.interop.dit import MAPPINGS
from latte.model.conditioning import CONDITIONINGS
from latte.model.config import MLPS
from latte.model.latte import SIZES, ModelConfig
from latte.model.patches import PATCHES
from latte.model.positions import TEMPORAL_POSITIONS
from latte.model.variants import VARIANTS
from latte.profile.flops import Cost, count
from latte.training.optim import OPTIMIZERS

Overrides = dict[str, object]
"""Dotted key of a run's config -> value."""

INIT = "init.mapping"  # of MAPPINGS; the only override that is no key of the config
BASELINE = "baseline"
SCALES = (0.5, 0.75, 1.0)
INTERVALS = (1, 2, 3)
NUM_IMAGES = (0, 4)


def one_each(key: str, names: Iterable[object], base: RunConfig) -> dict[str, Overrides]:
    """Return one setting per name: ``key`` set to it."""
    return {str(name): {key: name} for name in names}


def with_and_without(key: str, value: object, base: RunConfig) -> dict[str, Overrides]:
    """Return two settings: ``key`` at its default, and at ``value``, or at the base's own value."""
    section, _, leaf = key.partition(".")
    part = getattr(base, section)
    off = type(part).__dataclass_fields__[leaf].default
    own = getattr(part, leaf)
    on = value if own == off else own
    return {"off": {key: off}, str(on): {key: on}}


def variants(base: RunConfig) -> dict[str, Overrides]:
    """Return every variant at the number of parameters of the base.

    A named size has it by itself. An explicit ``model.depth`` is scaled by the parameters per block
    (``Variant.weight``) and rounded to a depth that the variant allows.
    """
    found = one_each("model.variant", VARIANTS, base)
    depth = base.model.depth
    spec = base.model.variant_spec
    if depth is None:
        return found
    for (name, overrides), other in zip(found.items(), VARIANTS.values(), strict=True):
        fitting = depth
        if other is not spec:
            multiples = round(depth * spec.weight / other.weight / other.depth_multiple)
            fitting = max(multiples, 1) * other.depth_multiple
        found[name] = overrides | {"model.depth": fitting}
    return found


def objectives(base: RunConfig) -> dict[str, Overrides]:
    """Return every objective, with the base's sampler if it fits the prediction, else the first that does."""
    found = one_each("diffusion.objective", OBJECTIVES, base)
    for name, objective in OBJECTIVES.items():
        fitting = [sampler for sampler, kind in SAMPLERS.items() if objective.prediction in kind.predictions]
        if base.sample.sampler not in fitting:
            steps = str(base.sample.steps).removeprefix("ddim").split(",")
            found[name] |= {
                "sample.sampler": fitting[0],
                "sample.steps": sum(map(int, steps)),
                "sample.eta": 0.0,
            }
        if objective.straight_path:
            found[name] |= {"diffusion.schedule": "linear"}  # its own path replaces the schedule
    return found


def intervals(base: RunConfig) -> dict[str, Overrides]:
    """Return every first, second, third frame, and the base's own interval; InputError without videos."""
    unread = UNREAD[base.data.kind]
    if "interval" in unread:
        raise InputError(
            f"--axes interval needs videos, but data.kind is {base.data.kind!r} ({unread['interval']}); "
            "leave the axis out, or give data.kind=folder and data.root"
        )
    return one_each("data.interval", sorted({*INTERVALS, base.data.interval}), base)


def sizes(base: RunConfig) -> dict[str, Overrides]:
    """Return ascending sizes: those of Table 4, or SCALES of the base's number of heads."""
    model = base.model
    _, width, heads = model.dimensions
    if model.depth is None and model.width is None and model.heads is None:
        return one_each("model.size", SIZES, base)
    multiple = model.variant_spec.heads_multiple
    found: dict[str, Overrides] = {}
    for scale in SCALES:
        fitting = max(round(heads * scale / multiple), 1) * multiple
        overrides: Overrides = {"model.heads": fitting, "model.width": width // heads * fitting}
        if scale == 1:
            found["x1"] = {}
        elif fitting != heads and overrides not in found.values():  # a model of few heads has no size between
            found[f"x{scale:g}"] = overrides
    return found


def starts(base: RunConfig) -> dict[str, Overrides]:
    """Return random weights, and those of a DiT by every mapping."""
    found: dict[str, Overrides] = {"scratch": {}}
    for name in MAPPINGS:
        found[f"dit-{name}"] = {INIT: name}
    return found


def image_counts(base: RunConfig) -> dict[str, Overrides]:
    """Return training without and with images behind every clip, and the base's own number."""
    return one_each("train.num_images", sorted({*NUM_IMAGES, base.train.num_images}), base)


AXES: dict[str, Callable[[RunConfig], dict[str, Overrides]]] = {
    "variant": variants,
    "patch": partial(one_each, "model.patch", PATCHES),
    "conditioning": partial(one_each, "model.conditioning", CONDITIONINGS),
    "temporal_position": partial(one_each, "model.temporal_position", TEMPORAL_POSITIONS),
    "mlp": partial(one_each, "model.mlp", MLPS),
    "qk_norm": partial(with_and_without, "model.qk_norm", True),
    "value_residual": partial(with_and_without, "model.value_residual", True),
    "objective": objectives,
    "optimizer": partial(one_each, "train.optimizer", OPTIMIZERS),
    "timesteps": partial(one_each, "train.timesteps", TIMES),
    "frame_noise": partial(with_and_without, "train.frame_noise", 0.5),
    "layer_sync": partial(with_and_without, "train.layer_sync", 0.2),
    "codec_align": partial(with_and_without, "train.codec_align", 0.5),
    "route": partial(with_and_without, "train.route", 0.5),
    "joint": image_counts,
    "interval": intervals,
    "size": sizes,
    "init": starts,
}


def from_file(path: Path, base: RunConfig) -> dict[str, Overrides]:
    """Return two settings: the base, and the base with the settings of a YAML file (its ``base`` and ``run``
    are not read).

    InputError for a file that cannot be read or has unknown keys.
    """
    check(
        path.is_file(), f"--axes {path} is no file; give a YAML file of settings, or one of {', '.join(AXES)}"
    )
    layer = read_yaml(path, str(path), {**HINTS, BASE: str})
    problems = layer.all_problems()
    changes: Overrides = {}
    for key, entry in layer.entries.items():
        if key in (BASE, "version") or key.startswith("run."):
            continue
        try:
            changes[key] = read_value(entry.raw, HINTS[key])
        except ValueError:
            problems.append(f"{entry.origin}: {key} must be {type_name(HINTS[key])}, got {short(entry.raw)}")
    if problems:
        raise InputError("\n".join(problems))
    return {"off": {}, "on": changes}


@dataclass(frozen=True)
class Setting:
    """One value of one axis. ``run`` names its folder, 'baseline' for the base itself.

    ``mapping`` is the mapping of the DiT weights that it starts from, None for random weights.
    """

    axis: str
    name: str
    run: str
    config: RunConfig
    overrides: Overrides
    mapping: str | None
    cost: Cost


@dataclass(frozen=True)
class LeftOut:
    """A value that this recipe cannot have, and why."""

    axis: str
    name: str
    reason: str


def apply(base: RunConfig, overrides: Overrides) -> RunConfig:
    """Return ``base`` with dotted keys replaced; InputError from the parts' own checks."""
    parts: dict[str, Overrides] = {}
    for key, value in overrides.items():
        section, _, leaf = key.partition(".")
        parts.setdefault(section, {})[leaf] = value
    changed = {section: replace(getattr(base, section), **values) for section, values in parts.items()}
    return replace(base, **changed)


@lru_cache(maxsize=256)
def cost_of(config: ModelConfig) -> Cost:
    """Return ``count(config)``, computed once per model; InputError for a model that cannot be built."""
    return count(config)


def make_setting(base: RunConfig, axis: str, name: str, overrides: Overrides) -> Setting:
    """Return the setting with its cost; InputError when the base cannot have it (its model is built)."""
    changes = {key: value for key, value in overrides.items() if key != INIT}
    config = apply(base, changes)
    cost = cost_of(config.model)
    if config == base and INIT not in overrides:
        return Setting(axis, name, BASELINE, config, {}, None, cost)
    mapping = str(overrides[INIT]) if INIT in overrides else None
    return Setting(axis, name, f"{axis}-{name}", config, changes, mapping, cost)


def make_settings(base: RunConfig, axes: Sequence[str]) -> tuple[list[Setting], list[LeftOut]]:
    """Return the settings of every axis, in order, and the values that this recipe cannot have.

    InputError for an unknown axis (with the nearest name), a repeated one, and one that leaves nothing to
    compare.
    """
    settings: list[Setting] = []
    left: list[LeftOut] = []
    for axis in axes:
        check(axes.count(axis) == 1, f"--axes names {axis} more than once; name every axis once")
        found, skipped = settings_of(base, axis)
        if len(found) < 2:
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in skipped)
            raise InputError(
                f"--axes {axis} leaves nothing to compare with this recipe ({reasons}); leave the axis out"
            )
        settings += found
        left += skipped
    return settings, left


def settings_of(base: RunConfig, axis: str) -> tuple[list[Setting], list[LeftOut]]:
    """Return the different settings of one axis, and the values that are left out."""
    found: list[Setting] = []
    left: list[LeftOut] = []
    if axis.endswith((".yaml", ".yml")):
        values = from_file(Path(axis), base)
        axis = Path(axis).stem
    else:
        values = choose("--axes", axis, AXES)(base)
    for name, overrides in values.items():
        try:
            setting = make_setting(base, axis, name, overrides)
        except InputError as error:
            left.append(LeftOut(axis, name, str(error)))
            continue
        same = [one for one in found if (one.config, one.mapping) == (setting.config, setting.mapping)]
        if same:
            left.append(LeftOut(axis, name, f"for this recipe it is the same as {same[0].name}"))
        else:
            found.append(setting)
    return found, left
