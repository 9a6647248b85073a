# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: W x + (alpha / rank) B A x with W frozen (LoRA, Hu et al. 2021, arXiv 2106.09685, Sec. 4.1), through peft.

An adapted model is the same object with the same ``forward``; its targets hold ``base_layer``, ``lora_A`` and ``lora_B`` instead of a
weight. B starts at zero, so nothing changes until training does. Adapters are saved by themselves, in peft's own layout, with the hash
of the weights that they belong to; or folded into the weights (``merged_state``) for every exporter there is.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, choose, require
from latte.files import commit_folder, reported
from latte.interop.coverage import LABELS, build, relabelled
from latte.interop.readers import read_json, read_tensors
from latte.model.denoiser import Denoiser
from latte.runtime import generator
from latte.tensors import tensors_sha256

WEIGHTS, CARD = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of every name in peft's files
BASE = "base_weights_sha256"
TOLD = "latte"
CLIPS = ("num_frames", "latent_size")  # of a model's configuration: what its weights do not tell
ADAPTER = "default"
OTHER_KINDS = (
    "use_dora",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "modules_to_save",
)  # of adapters that peft knows

TARGETS: dict[
    str, Callable[[list[str]], bool]
] = {  # a linear layer's name, split at the dots -> does it belong there?
    "qkv": lambda name: name[-1] in ("qkv", "q", "k", "v") and "cross" not in name,
    "proj": lambda name: name[-1] == "proj" and "cross" not in name,
    "cross": lambda name: "cross" in name,
    "mlp": lambda name: "mlp" in name,
}
"""Projections of a block: into self-attention and out of it, all of the attention to the caption, both layers of the MLP."""


@dataclass(frozen=True)
class LoraConfig:
    """``rank`` None: no adapters, the whole model is trained. ``alpha`` / ``rank`` scales what an adapter adds; ``targets`` are of TARGETS.

    InputError on construction for anything else.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    rank: int | None = None  # rank of the adapters; null: the whole model is trained
    alpha: float = 8.0  # alpha / rank scales what the adapters add
    targets: tuple[str, ...] = ("qkv", "proj")  # linear layers that get adapters, of TARGETS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # JSON and YAML have lists
        if self.rank is None:
            for name in ("alpha", "targets"):
                default = type(self).__dataclass_fields__[name].default
                require(
                    getattr(self, name) == default,
                    f"lora.{name}",
                    getattr(self, name),
                    "without lora.rank there are no adapters",
                    "give lora.rank, e.g. 8, or leave it out",
                )
            return
        require(
            self.rank >= 1,
            "lora.rank",
            self.rank,
            "it counts columns",
            "give 1 or more, e.g. 8, or null for none",
        )
        require(
            self.alpha > 0, "lora.alpha", self.alpha, "it is a scale", "give a number above 0, e.g. the rank"
        )
        require(
            bool(self.targets),
            "lora.targets",
            self.targets,
            "something has to be adapted",
            f"give some of {', '.join(TARGETS)}",
        )
        for target in self.targets:
            choose("lora.targets", target, TARGETS)


def load_peft() -> Any:
    """The library, or an InputError in one line."""
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"LoRA needs peft, which is not installed ({error}); pip install 'latte-video[lora]'"
        ) from error
    return peft


def target_names(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Names of the linear layers of ``model`` that ``targets`` mean; InputError for a target that it has none of."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {target: [name for name in linear if TARGETS[target](name.split("."))] for target in targets}
    for target, names in found.items():
        rule = f"{type(model).__name__} has no such projection"
        require(
            bool(names),
            "lora.targets",
            target,
            rule,
            f"give some of {', '.join(name for name in TARGETS if name != target)}",
        )
    return sorted({name for names in found.values() for name in names})


def add_lora(model: nn.Module, config: LoraConfig, seed: int = 0) -> None:
    """Put fresh adapters into ``model`` and freeze everything else. A is a function of ``seed``, B is zero: the model is as before.

    InputError for a model that has adapters already, for targets that it has not, and without a rank.
    """
    require(config.rank is not None, "lora.rank", config.rank, "adapters have one", "give 1 or more, e.g. 8")
    assert config.rank is not None
    if lora_layers(model):
        raise InputError(
            f"this {type(model).__name__} has adapters already; load the plain model, or fold them in with merged_state first"
        )
    insert(model, config.rank, config.alpha, target_names(model, config.targets))
    draw = generator(seed, "lora")
    for layer in lora_layers(model).values():
        a = layer.lora_A[ADAPTER].weight
        with torch.no_grad():
            a.copy_(nn.init.kaiming_uniform_(torch.empty(a.shape), a=sqrt(5), generator=draw))


def insert(model: nn.Module, rank: int, alpha: float, names: list[str]) -> None:
    """Adapters at ``names``; they alone are trainable afterwards."""
    peft = load_peft()
    with torch.random.fork_rng():  # peft draws A from the global stream
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), model, ADAPTER
        )


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers of ``model`` by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by name: all that training changes."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's other tensors, under the names that they have in a plain model."""
    adapters = lora_state(model)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if name not in adapters
    }


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a plain model that gives the same output: the adapters folded in, ``model`` left as it is."""
    state = base_state(model)
    for name, layer in lora_layers(model).items():
        if not layer.merged:
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + layer.get_delta_weight(ADAPTER).to(weight)
    return state


def merged(model: Denoiser) -> Denoiser:
    """A plain model, for inference, with the adapters folded into its weights: what every exporter and ``load_trained`` want."""
    with torch.device("meta"):
        plain = build(model.config)
    plain.load_state_dict(merged_state(model), assign=True)
    return plain.requires_grad_(False).eval()


def save_lora(model: Any, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write the adapters alone, as ``PeftModel.from_pretrained`` and ``load_lora`` read them; an earlier folder is replaced.

    Beside them stand the size of clips that they were trained for and, of ``facts`` (as ``checkpoint.export`` has them), the names of the
    classes and whose latents and captions they know. InputError for a model without adapters or with adapters folded in, and for a folder
    with anything else in it; RunError when the disk refuses.
    """
    folder, layers, facts = Path(folder), lora_layers(model), facts or {}
    apart = bool(layers) and not any(layer.merged for layer in layers.values())
    require(
        apart, "the model", type(model).__name__, "it has no adapters that stand apart", "call add_lora first"
    )
    others = sorted(file.name for file in folder.glob("*") if file.name not in (WEIGHTS, CARD))
    require(
        not others,
        "folder",
        str(folder),
        f"it holds other files ({', '.join(others[:3])})",
        "give a new folder",
    )
    tensors = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in lora_state(model).items()
    }
    told = {"classes": list(facts.get("classes") or ()), **{key: getattr(model.config, key) for key in CLIPS}}
    told |= {part: read_fingerprint(facts.get(part) or {}) for part in ("codec", "text")}
    metadata = {"format": "pt", BASE: tensors_sha256(base_state(model)), TOLD: json.dumps(told)}

    def write(place: Path) -> None:
        model.peft_config[ADAPTER].save_pretrained(place)
        save_file(tensors, place / WEIGHTS, metadata=metadata)

    with reported("the adapters", folder, sum(tensor.nbytes for tensor in tensors.values())):
        commit_folder(folder, write)


def load_lora(model: Any, folder: str | Path, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Put the adapters of ``folder`` into a plain ``model``, ready to train on or to sample -> what stands beside them.

    That is ``classes``, the names of the labels from here on, and as far as the file has them CLIPS, codec and text (fingerprints). The
    ``classes`` given are the names before: where the adapters know them in another order, the model gets that order. InputError for
    adapters of other weights (by their hash, where the file has one), of another layout, or cut short, and for a folder that holds none.
    """
    folder = Path(folder)
    if lora_layers(model):
        raise InputError(f"this {type(model).__name__} has adapters already; load the plain model first")
    if not (folder / CARD).is_file():
        raise InputError(
            f"{folder} holds no adapters ({CARD} is not there); give a folder that latte convert RUN FOLDER --to lora wrote"
        )
    rank, alpha, names = read_settings(folder / CARD)
    stored, metadata = read_tensors(folder / WEIGHTS)
    told = read_told(metadata.get(TOLD))
    told["classes"] = reorder(model, classes, [str(name) for name in told.get("classes") or ()])
    if BASE in metadata:
        here, rule = tensors_sha256(model.state_dict()), f"{folder} was trained on {metadata[BASE][:16]}"
        require(here == metadata[BASE], "the model's weights", here[:16], rule, "give that model")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = sorted(name for name in linear if any(name == end or name.endswith(f".{end}") for end in names))
    shapes = {f"{PREFIX}{name}.lora_A.weight": (rank, linear[name].in_features) for name in chosen}
    shapes |= {f"{PREFIX}{name}.lora_B.weight": (linear[name].out_features, rank) for name in chosen}
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    odd = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
    require(
        not odd,
        str(folder / WEIGHTS),
        odd and odd[0],
        f"this {type(model).__name__} and {CARD} do not agree on it",
        "give the adapters of this model, complete",
    )
    insert(model, rank, alpha, chosen)
    for name, tensor in lora_state(model).items():
        tensor.copy_(stored[PREFIX + name.replace(f".{ADAPTER}.", ".")])
    return told


def read_told(written: str | None) -> dict[str, Any]:
    """What stands beside the adapters; nothing in files of other programs."""
    try:
        told = json.loads(written or "{}")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


@torch.no_grad()
def reorder(model: Any, before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The names of the labels that hold from here on: ``after`` if there are as many as labels, in whose order the same names are put."""
    if len(after) != (getattr(model.config, "num_classes", None) or 0):
        return list(before)
    if sorted(before) == sorted(after) and list(before) != list(after):
        table = dict(model.named_parameters())[LABELS]
        table.copy_(relabelled(table, before, after))
    return list(after)


def read_settings(file: Path) -> tuple[int, float, list[str]]:
    """(rank, alpha, ends of the adapted layers' names) of a card of peft; InputError for anything but plain LoRA of one rank."""
    card = read_json(file)
    rank, alpha, names = card.get("r"), card.get("lora_alpha"), card.get("target_modules")
    plain = card.get("peft_type") == "LORA" and not any(card.get(key) for key in OTHER_KINDS)
    named = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if plain and named and named == names and isinstance(rank, int) and isinstance(alpha, int | float):
        return rank, alpha, named
    raise InputError(
        f"{file} is {card.get('peft_type')!r}, but it must be plain LoRA of one rank at named layers; give a folder that "
        "latte wrote"
    )
