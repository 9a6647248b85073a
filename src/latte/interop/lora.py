# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: W x + (alpha / rank) B A x with W frozen (LoRA, Hu et al. 2021, arXiv 2106.09685, Sec.
4.1), through peft.

An adapted model is the same object with the same ``forward``; its targets hold ``base_layer``, ``lora_A``
and ``lora_B`` instead of a weight. B starts at zero, so the output changes only with training. Adapters are
saved alone, in peft's layout, with the hash of the weights that they belong to, or merged into the weights
(``merged_state``) for the exporters.
"""

import json
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latte.checkpoint.record import read_fingerprint
from latte.checks import InputError, RunError, check, printable
from latte.files import check_replaceable, commit_folder, reported
from latte.interop.config import TARGETS as TARGETS
from latte.interop.config import LoraConfig as LoraConfig
from latte.interop.coverage import LABELS, build, relabelled
from latte.interop.readers import read_json, read_tensors
from latte.model.denoiser import Denoiser
from latte.runtime import generator
from latte.tensors import check_finite, tensors_sha256, without_memory

WEIGHTS = "adapter_model.safetensors"
CARD = "adapter_config.json"
PREFIX = "base_model.model."  # of every name in peft's files
BASE = "base_weights_sha256"
METADATA = "latte"  # key of our own metadata in the file
CLIPS = ("num_frames", "latent_size")  # config keys that do not follow from the weights
ADAPTER = "default"
# Keys of peft's adapter_config.json with the values that mean W x + (alpha / rank) B A x; None: any value.
# Other keys must be empty (null, false, 0, "", [] or {}): newer kinds of adapters announce themselves by one.
PLAIN_SETTINGS: dict[str, tuple[Any, ...] | None] = {
    "peft_type": ("LORA",),
    "r": None,
    "lora_alpha": None,
    "target_modules": None,
    "base_model_name_or_path": None,
    "revision": None,
    "task_type": None,
    "auto_mapping": None,
    "inference_mode": None,
    "peft_version": None,
    "lora_dropout": None,  # of training only
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others, such as pissa, change the base weights
    "megatron_core": ("megatron.core",),  # without megatron_config it has no effect
    "qalora_group_size": (16,),  # without use_qalora it has no effect
}


def load_peft() -> Any:
    """Return the module peft; InputError when it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"LoRA needs peft, which is not installed ({error}); pip install 'latte-video[lora]'"
        ) from error
    return peft


def target_names(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Return the names of the linear layers of ``model`` in ``targets``; InputError for a target without
    any.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {target: [name for name in linear if TARGETS[target](name.split("."))] for target in targets}
    for target, names in found.items():
        others = ", ".join(name for name in TARGETS if name != target)
        check(
            bool(names),
            f"lora.targets has {target!r}, but {type(model).__name__} has no such projection; give some of "
            f"{others}",
        )
    return sorted({name for names in found.values() for name in names})


def add_lora(model: nn.Module, config: LoraConfig, seed: int = 0) -> None:
    """Insert fresh adapters into ``model`` and freeze everything else. A depends on ``seed`` alone, B is
    zero.

    The output of the model does not change. InputError for a model with adapters, for targets that it
    lacks, and without a rank.
    """
    check(config.rank is not None, "lora.rank is null, but adapters need a rank of at least 1, e.g. 8")
    assert config.rank is not None
    if lora_layers(model):
        raise InputError(
            f"this {type(model).__name__} has adapters already; load the model without adapters, or merge "
            "them first"
        )
    insert(model, config.rank, config.alpha, target_names(model, config.targets))
    draws = generator(seed, "lora")
    for layer in lora_layers(model).values():
        a = layer.lora_A[ADAPTER].weight
        with torch.no_grad():
            a.copy_(nn.init.kaiming_uniform_(torch.empty(a.shape), a=sqrt(5), generator=draws))


def insert(model: nn.Module, rank: int, alpha: float, names: list[str]) -> None:
    """Insert adapters at ``names``; only they are trainable afterwards."""
    peft = load_peft()
    with torch.random.fork_rng():  # peft draws A from the global stream
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), model, ADAPTER
        )


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the adapted layers of ``model`` by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the adapters by name: all that training changes."""
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if ".lora_A." in name or ".lora_B." in name
    }


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the other tensors of the model, under their names in a model without adapters."""
    adapters = lora_state(model)
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if name not in adapters
    }


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model with the same output and no adapters; ``model`` does not change."""
    state = base_state(model)
    for name, layer in lora_layers(model).items():
        if not layer.merged:
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + layer.get_delta_weight(ADAPTER).to(weight)
    return state


def merged(model: Denoiser) -> Denoiser:
    """Return a model for inference with the adapters merged into its weights, as every exporter needs it."""
    with without_memory():
        result = build(model.config)
    result.load_state_dict(merged_state(model), assign=True)
    return result.requires_grad_(False).eval()


def save_lora(model: Any, folder: str | Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write the adapters alone, as ``PeftModel.from_pretrained`` and ``load_lora`` read them; an earlier
    folder is replaced.

    The metadata holds the size of the training clips and, of ``facts`` (as for ``interop.export``), the
    class names and the fingerprints of codec and text encoder. InputError for a model without adapters or
    with merged ones, and for a folder with other files; RunError when the disk refuses, or a weight is
    NaN/Inf.
    """
    folder = Path(folder)
    layers = lora_layers(model)
    facts = facts or {}
    check(
        bool(layers) and not any(layer.merged for layer in layers.values()),
        f"this {type(model).__name__} has no separate adapters to save; call add_lora first",
    )
    check_replaceable(folder, (WEIGHTS, CARD))
    tensors = {
        PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in lora_state(model).items()
    }
    check_finite(tensors, "to be saved", RunError)
    about = {
        "classes": list(facts.get("classes") or ()),
        **{key: getattr(model.config, key) for key in CLIPS},
    }
    about |= {part: read_fingerprint(facts.get(part) or {}) for part in ("codec", "text")}
    metadata = {"format": "pt", BASE: tensors_sha256(base_state(model)), METADATA: json.dumps(about)}

    def write(place: Path) -> None:
        model.peft_config[ADAPTER].save_pretrained(place)
        save_file(tensors, place / WEIGHTS, metadata=metadata)

    with reported("the adapters", folder, sum(tensor.nbytes for tensor in tensors.values())):
        commit_folder(folder, write)


def load_lora(model: Any, folder: str | Path, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Insert the adapters of ``folder`` into ``model``, ready to train or to sample; return their metadata.

    The result has ``classes``, the names of the labels from now on, and, if the file has them, CLIPS and
    the fingerprints of codec and text. ``classes`` are the names before: if the adapters list the same
    names in another order, the label table is reordered. InputError for adapters of other weights (by their
    hash, if the file has one), of another kind or layout, truncated or non-finite, and for a folder without
    adapters.
    """
    folder = Path(folder)
    if lora_layers(model):
        raise InputError(f"this {type(model).__name__} has adapters already; load the model without adapters")
    if not (folder / CARD).is_file():
        raise InputError(
            f"folder {folder} holds no adapters ({CARD} is missing); use a folder of latte convert RUN "
            "FOLDER --to lora"
        )
    rank, alpha, names = read_settings(folder / CARD)
    stored, metadata = read_tensors(folder / WEIGHTS)
    about = read_metadata(metadata.get(METADATA))
    about["classes"] = reorder(model, classes, [str(name) for name in about.get("classes") or ()])
    if BASE in metadata:
        found, expected = tensors_sha256(model.state_dict()), metadata[BASE]
        check(
            found == expected,
            f"the model's weights have hash {found[:16]}, but {folder} was trained on {expected[:16]}; use "
            "that model",
        )
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = sorted(name for name in linear if any(name == end or name.endswith(f".{end}") for end in names))
    expected_shapes = {f"{PREFIX}{name}.lora_A.weight": (rank, linear[name].in_features) for name in chosen}
    expected_shapes |= {f"{PREFIX}{name}.lora_B.weight": (linear[name].out_features, rank) for name in chosen}
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    both = expected_shapes.keys() | shapes.keys()
    different = sorted(name for name in both if expected_shapes.get(name) != shapes.get(name))
    if different:
        name = different[0]
        raise InputError(
            f"{folder / WEIGHTS} does not match this {type(model).__name__} and {CARD}: {name} has shape "
            f"{shapes.get(name)} "
            f"instead of {expected_shapes.get(name)}; use the complete adapters of this model"
        )
    insert(model, rank, alpha, chosen)
    for name, tensor in lora_state(model).items():
        tensor.copy_(stored[PREFIX + name.replace(f".{ADAPTER}.", ".")])
    return about


def read_metadata(text: str | None) -> dict[str, Any]:
    """Return our metadata beside the adapters; an empty dict for files of other programs."""
    try:
        about = json.loads(text or "{}")
    except ValueError:
        return {}
    if not isinstance(about, dict):
        return {}
    return about


@torch.no_grad()
def reorder(model: Any, before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Return the label names from now on: ``after`` if there are as many as labels, else ``before``.

    If both hold the same names, the label table is put into the new order.
    """
    if len(after) != (getattr(model.config, "num_classes", None) or 0):
        return list(before)
    if sorted(before) == sorted(after) and list(before) != list(after):
        table = dict(model.named_parameters())[LABELS]
        table.copy_(relabelled(table, before, after))
    return list(after)


def read_settings(file: Path) -> tuple[int, float, list[str]]:
    """Return (rank, alpha, ends of the names of the adapted layers) of peft's adapter_config.json.

    InputError, naming the key, for anything but plain LoRA of one rank at named layers.
    """
    settings = read_json(file)
    for key, value in settings.items():
        allowed = PLAIN_SETTINGS.get(key, ()) if value else None
        check(
            allowed is None or value in allowed,
            f"{printable(file)}: {printable(key)} is {value!r}, which plain LoRA does not have, and other "
            "adapters are not "
            "supported; merge these adapters with the program that trained them",
        )
    check(
        settings.get("peft_type") == "LORA",
        f"{printable(file)} has no peft_type LORA; use a folder that latte or peft wrote",
    )
    rank, alpha, names = (settings.get(key) for key in ("r", "lora_alpha", "target_modules"))
    check(
        type(rank) is int and rank >= 1,
        f"{printable(file)}: r must be an integer of at least 1 in plain LoRA, got {rank!r}",
    )
    check(
        type(alpha) in (int, float),
        f"{printable(file)}: lora_alpha must be a number in plain LoRA, got {alpha!r}",
    )
    check(
        isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names),
        f"{printable(file)}: target_modules must be a list of layer names in plain LoRA, got {names!r}",
    )
    return rank, alpha, names  # type: ignore[return-value]
