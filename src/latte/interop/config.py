# SPDX-License-Identifier: Apache-2.0
"""Settings of pretrained weights and of adapters in a run's configuration. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from latte.checks import check, check_name

# (j-th of the n blocks that are filled, DiT's depth) -> DiT's block
MAPPINGS: dict[str, Callable[[int, int, int], int]] = {
    "all": lambda j, n, depth: j,
    "spatial": lambda j, n, depth: j * max(depth, n) // n,
    "spatial-first": lambda j, n, depth: j,
}

# name of a linear layer, split at the dots -> does the target include it?
TARGETS: dict[str, Callable[[list[str]], bool]] = {
    "qkv": lambda name: name[-1] in ("qkv", "q", "k", "v") and "cross" not in name,
    "proj": lambda name: name[-1] == "proj" and "cross" not in name,
    "cross": lambda name: "cross" in name,
    "mlp": lambda name: "mlp" in name,
}
"""Projections of a block: in and out of self-attention, all of cross-attention, both layers of the MLP."""


class Start(NamedTuple):
    """The pretrained weights of a fresh run."""

    source: str  # file, folder, hub id, run or one of its checkpoints, or a name in BUILTIN
    mapping: str = "all"  # for a DiT: which of our blocks its blocks initialise
    gaps: tuple[str, ...] = ()  # patterns of our names that the source may lack


@dataclass(frozen=True)
class LoraConfig:
    """Settings of adapters; InputError on construction for a bad value."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    rank: int | None = None  # of the adapters; null: no adapters, the whole model is trained
    alpha: float = 8.0  # alpha / rank scales what an adapter adds
    targets: tuple[str, ...] = ("qkv", "proj")  # layers with adapters, some of qkv, proj, cross, mlp

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON and YAML have lists
        if self.rank is None:
            for name in ("alpha", "targets"):
                value = getattr(self, name)
                check(
                    value == type(self).__dataclass_fields__[name].default,
                    f"lora.{name} is {value!r}, but without lora.rank there are no adapters; "
                    f"set lora.rank, e.g. 8, or remove lora.{name}",
                )
            return
        check(self.rank >= 1, f"lora.rank must be at least 1, or null for no adapters, got {self.rank}")
        check(self.alpha > 0, f"lora.alpha must be positive, got {self.alpha}; the rank is a good start")
        check(bool(self.targets), f"lora.targets is empty; give some of {', '.join(TARGETS)}")
        for target in self.targets:
            check_name("lora.targets", target, TARGETS)
