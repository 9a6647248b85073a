# SPDX-License-Identifier: Apache-2.0
"""The axes of an ablation: each turns a base recipe into arms, read off the package's own tables.

A line added to VARIANTS, PATCHES, CONDITIONINGS, TEMPORAL_POSITIONS, OBJECTIVES, SIZES or MAPPINGS is an arm here by itself. The arm that
changes nothing is the baseline, which all axes share.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

from latte.checks import InputError, choose, require
from latte.config.run import RunConfig
from latte.data.datasets import UNREAD
from latte.diffusion.loss import OBJECTIVES
from latte.diffusion.samplers import SAMPLERS
from latte.interop.dit import MAPPINGS
from latte.model.conditioning import CONDITIONINGS
from latte.model.latte import SIZES, ModelConfig
from latte.model.patches import PATCHES
from latte.model.positions import TEMPORAL_POSITIONS
from latte.model.variants import VARIANTS
from latte.profile.flops import Cost, count

Overrides = dict[str, object]
"""Dotted key of a run's settings -> value."""

INIT = "init.mapping"  # of MAPPINGS: the one override that is no setting of a run, because a run folder holds its own weights
BASELINE = "baseline"
SCALES = (0.5, 0.75, 1.0)
INTERVALS = (1, 2, 3)
STILLS = (0, 4)


def options(key: str, names: Iterable[object], base: RunConfig) -> dict[str, Overrides]:
    """One arm per name: ``key`` set to it."""
    return {str(name): {key: name} for name in names}


def variants(base: RunConfig) -> dict[str, Overrides]:
    """Every variant at the base's parameters: a named size does that by itself, an explicit ``model.depth`` is scaled.

    A block weighs ``Variant.weight``, so depth x weight is kept, rounded to what the variant can be dealt into.
    """
    arms, depth, mine = options("model.variant", VARIANTS, base), base.model.depth, base.model.variant_spec
    if depth is not None:
        for (name, arm), spec in zip(arms.items(), VARIANTS.values(), strict=True):
            fitting = (
                max(round(depth * mine.weight / spec.weight / spec.depth_multiple), 1) * spec.depth_multiple
            )
            arms[name] = arm | {"model.depth": depth if spec is mine else fitting}
    return arms


def objectives(base: RunConfig) -> dict[str, Overrides]:
    """Every objective, with the base's sampler where it reads the prediction, else with the first one that does."""
    arms = options("diffusion.objective", OBJECTIVES, base)
    for name, objective in OBJECTIVES.items():
        fitting = [sampler for sampler, kind in SAMPLERS.items() if objective.prediction in kind.predictions]
        if base.sample.sampler not in fitting:
            steps = str(base.sample.steps).removeprefix("ddim").split(",")
            arms[name] |= {
                "sample.sampler": fitting[0],
                "sample.steps": sum(map(int, steps)),
                "sample.eta": 0.0,
            }
        if objective.prediction == "flow":
            arms[name] |= {"diffusion.schedule": "linear"}  # the flow has a path of its own
    return arms


def intervals(base: RunConfig) -> dict[str, Overrides]:
    """Every first, second, third frame, and the base's own interval; InputError for data without one."""
    if "interval" in UNREAD[base.data.kind]:
        raise InputError(
            f"--axes interval needs videos, but data.kind is {base.data.kind!r} ({UNREAD[base.data.kind]['interval']}); "
            "leave the axis out, or give data.kind=folder and data.root"
        )
    return options("data.interval", sorted({*INTERVALS, base.data.interval}), base)


def sizes(base: RunConfig) -> dict[str, Overrides]:
    """Ascending: the sizes of Table 4, or for explicit dimensions the SCALES of their width in whole heads, all as wide as before."""
    model, (_, width, heads) = base.model, base.model.dimensions
    if model.depth is None and model.width is None and model.heads is None:
        return options("model.size", SIZES, base)
    multiple = model.variant_spec.heads_multiple
    arms: dict[str, Overrides] = {}
    for scale in SCALES:
        fitting = max(round(heads * scale / multiple), 1) * multiple
        arm: Overrides = (
            {} if scale == 1 else {"model.heads": fitting, "model.width": width // heads * fitting}
        )
        if scale == 1 or (fitting != heads and arm not in arms.values()):  # few heads: nothing between
            arms[f"x{scale:g}"] = arm
    return arms


def starts(base: RunConfig) -> dict[str, Overrides]:
    """Random weights, and DiT's by every mapping."""
    arms: dict[str, Overrides] = {f"dit-{name}": {INIT: name} for name in MAPPINGS}
    return {"scratch": {}, **arms}


AXES: dict[str, Callable[[RunConfig], dict[str, Overrides]]] = {
    "variant": variants,
    "patch": partial(options, "model.patch", PATCHES),
    "conditioning": partial(options, "model.conditioning", CONDITIONINGS),
    "temporal_position": partial(options, "model.temporal_position", TEMPORAL_POSITIONS),
    "objective": objectives,
    "joint": lambda base: options("train.num_images", sorted({*STILLS, base.train.num_images}), base),
    "interval": intervals,
    "size": sizes,
    "init": starts,
}


@dataclass(frozen=True)
class Arm:
    """One value of one axis. ``run`` names its folder, 'baseline' for the base itself; ``mapping`` is that of the DiT it starts from."""

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
    """``base`` with dotted keys replaced; the parts check themselves (InputError)."""
    parts: dict[str, Overrides] = {}
    for key, value in overrides.items():
        section, _, leaf = key.partition(".")
        parts.setdefault(section, {})[leaf] = value
    return replace(
        base, **{section: replace(getattr(base, section), **values) for section, values in parts.items()}
    )


@lru_cache(maxsize=256)
def cost_of(config: ModelConfig) -> Cost:
    """``count``, once for each model; InputError for a model that cannot be built."""
    return count(config)


def make_arm(base: RunConfig, axis: str, name: str, overrides: Overrides) -> Arm:
    """The arm with its cost; InputError when the base cannot have it (the model is tried, without storage)."""
    settings = {key: value for key, value in overrides.items() if key != INIT}
    config, mapping = apply(base, settings), overrides.get(INIT)
    same = config == base and mapping is None
    return Arm(
        axis,
        name,
        BASELINE if same else f"{axis}-{name}",
        config,
        {} if same else settings,
        None if mapping is None else str(mapping),
        cost_of(config.model),
    )


def make_arms(base: RunConfig, axes: Sequence[str]) -> tuple[list[Arm], list[LeftOut]]:
    """The arms of every axis, in order, and the values that this recipe cannot have.

    InputError for an unknown axis (with the nearest name), one given twice, and one that leaves nothing to compare.
    """
    arms: list[Arm] = []
    left: list[LeftOut] = []
    for axis in axes:
        table = choose("--axes", axis, AXES)(base)
        require(
            axes.count(axis) == 1,
            "--axes",
            ",".join(axes),
            f"{axis} is there more than once",
            "name every axis once",
        )
        mine: list[Arm] = []
        for name, overrides in table.items():
            try:
                arm = make_arm(base, axis, name, overrides)
            except InputError as error:
                left.append(LeftOut(axis, name, str(error)))
                continue
            twin = next((one for one in mine if (one.config, one.mapping) == (arm.config, arm.mapping)), None)
            if twin is None:
                mine.append(arm)
            else:
                left.append(LeftOut(axis, name, f"for this recipe it is the same as {twin.name}"))
        if len(mine) < 2:
            reasons = "; ".join(f"{one.name}: {one.reason}" for one in left if one.axis == axis)
            raise InputError(
                f"--axes {axis} leaves nothing to compare with this recipe ({reasons}); leave the axis out"
            )
        arms += mine
    return arms, left
