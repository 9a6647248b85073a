# SPDX-License-Identifier: Apache-2.0
"""``save_pretrained`` and ``from_pretrained`` of the models: a weights folder, model.safetensors and
config.json.

Only our own layout is read, and only completely. External checkpoints, hub ids, adapters and model cards
belong to ``latte.interop``; runs and everything that sampling needs belong to ``latte.VideoPipeline``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latte.checks import InputError, RunError
from latte.files import check_replaceable, commit_folder, known, remember, reported, stamp
from latte.tensors import check_finite, check_weights, tensors_sha256, without_memory

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
Config = TypeVar("Config")


class SavedModel:
    """Mixin of a ``torch.nn.Module`` with a ``config`` dataclass."""

    config_class: ClassVar[Any]
    config: Any

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a weights folder that ``from_pretrained`` reads; an earlier one is replaced.

        Raises InputError when ``folder`` holds other files, RunError when a weight is NaN/Inf or the disk
        refuses.
        """
        model: Any = self
        write_weights_folder(Path(folder), model.state_dict(), self.config.stored())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Return the float32 model of a weights folder (or of the weight file in it), in eval mode, on the
        CPU.

        Raises InputError for any other layout, for weights of another model, and when a tensor is missing,
        unknown, of another shape, NaN/Inf or altered.
        """
        path = Path(folder)
        if path.name == WEIGHTS:
            path = path.parent
        if not ((path / WEIGHTS).is_file() and (path / CONFIG).is_file()):
            raise InputError(
                f"{folder} is not a weights folder ({WEIGHTS} and {CONFIG}); for an external checkpoint or "
                "a hub id call "
                f"latte.interop.load.load_external({str(folder)!r}).model(), for a run "
                f"latte.VideoPipeline.from_pretrained({str(folder)!r}).model"
            )
        values = read_values(path / CONFIG)
        known = {field.name for field in fields(cls.config_class)}
        if ("caption_channels" in values) != ("caption_channels" in known):
            other = "LatteText" if "caption_channels" in values else "Latte"
            raise InputError(f"{folder} holds a {other}, not a {cls.__name__}; call {other}.from_pretrained")
        config = parse_config(cls.config_class, values, path / CONFIG)
        before = stamp(path / WEIGHTS)
        tensors = read_weights(path / WEIGHTS)
        check_depth(config, tensors)
        with without_memory():
            model: Any = cls(config)  # type: ignore[call-arg]
        check_names_and_shapes(tensors, model.state_dict(), path / WEIGHTS)
        expected = values.get("weights_sha256")
        if expected is not None and file_tensors_sha256(path / WEIGHTS, before, tensors) != expected:
            raise InputError(
                f"{path / WEIGHTS} does not match weights_sha256 in {CONFIG}; fetch the folder again"
            )
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        return model.eval()


def write_weights_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    card: Callable[[str], str] | None = None,
    others: Mapping[str, bytes | None] | None = None,
) -> None:
    """Commit model.safetensors, config.json with the hash of the weights, ``card(hash)`` as README.md, and
    the files of ``others`` (name -> content; None: no such file).
    """
    others = others or {}
    check_replaceable(folder, (WEIGHTS, CONFIG, CARD, *others))
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(stored, "to be saved", RunError)
    digest = tensors_sha256(stored)

    def write(place: Path) -> None:
        save_file(stored, place / WEIGHTS)
        text = json.dumps({**config, "weights_sha256": digest}, indent=2) + "\n"
        (place / CONFIG).write_text(text, encoding="utf-8")
        if card is not None:
            (place / CARD).write_text(card(digest), encoding="utf-8")
        for name, content in others.items():
            if content is not None:
                (place / name).write_bytes(content)

    with reported("the weights", folder, sum(tensor.nbytes for tensor in stored.values())):
        commit_folder(folder, write)


def read_values(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``; raise InputError for anything else."""
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file} cannot be read as JSON ({str(error).partition(chr(10))[0]}); fetch it again"
        ) from None
    if not isinstance(values, dict):
        raise InputError(f"{file} holds no JSON object; fetch it again")
    return values


def parse_config(kind: type[Config], values: Mapping[str, Any], file: Path) -> Config:
    """Return the configuration of ``kind`` from its keys among ``values``; raise InputError for the first
    bad one.
    """
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    keys = {name: value for name, value in values.items() if name in names}
    try:
        return TypeAdapter(kind).validate_python(keys)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ": ".join(filter(None, [str(file), ".".join(map(str, first["loc"]))]))
        raise InputError(f"{place}: {first['msg']}; use a weights folder that latte wrote") from None


def file_tensors_sha256(path: Path, before: list[int], tensors: Mapping[str, Tensor], what: str = "") -> str:
    """Return the hash of ``tensors``, which were made from the file ``path`` by the rule ``what`` after its
    stamp was ``before``; of a file that has not changed it is not computed again.
    """
    found = known(path, what)
    if found is None:
        found = tensors_sha256(tensors)
        remember(path, before, found, what)
    return found


def check_file_weights(path: Path, before: list[int], tensors: Mapping[str, Tensor]) -> None:
    """Do ``check_weights`` for the tensors of the file ``path``, once as long as it does not change."""
    if known(path, "finite") is None:
        check_weights(tensors, path)
        remember(path, before, "", "finite")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; raise InputError when it is damaged or holds NaN/Inf."""
    before = stamp(file)
    try:
        tensors = load_file(file)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"weights {file} cannot be read ({reason}); fetch the file again") from None
    check_file_weights(file, before, tensors)
    return tensors


def check_depth(config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError when ``config`` has more blocks than the file has tensors: building them could take
    minutes.
    """
    depth = config.dimensions[0]
    if depth > len(tensors):
        raise InputError(
            f"config.json has depth {depth:,}, but the weights are only {len(tensors):,} tensors; "
            "the two belong to different models"
        )


def check_names_and_shapes(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: object
) -> None:
    """Raise InputError with the first tensor that is missing, unknown or of another shape than
    ``expected``.
    """
    faults = [f"lacks {name}" for name in expected if name not in tensors]
    faults += [f"has the unknown tensor {name}" for name in tensors if name not in expected]
    faults += [
        f"has {name} of shape {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if faults:
        raise InputError(
            f"weights {source}: the file {faults[0]} ({len(faults)} faults in all); it belongs to another "
            "configuration"
        )
