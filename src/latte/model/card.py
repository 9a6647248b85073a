# SPDX-License-Identifier: Apache-2.0
"""The model card: README.md of a weights folder or a hub repository, out of the configuration and what is known of the training.

``facts`` are what ``checkpoint.export`` writes into config.json beside the model's keys: diffusion, codec, classes, text, sample, and
``about`` {"data", "licence", "step", "clips_seen", "source", "scores": [{"protocol", "metric", "value", "interval", "manifest_hash"}]}.
Each of them may be missing, and the card says which: nothing is guessed, a licence least of all.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, PyTorchModelHubMixin

from latte.checks import InputError

KNOWN = ("data", "licence", "step", "scores")  # what a reader asks first
PARTS = {
    "diffusion": "diffusion",
    "codec": "autoencoder",
    "text": "text encoder",
    "classes": "classes",
    "sample": "sampling",
    "weights_sha256": "weights, sha256",
}
TRAINING = {
    "data": "data",
    "licence": "licence",
    "step": "step",
    "clips_seen": "clips seen",
    "source": "from",
}


def card_text(
    name: str, tags: Sequence[str], config: Mapping[str, Any], parameters: int, facts: Mapping[str, Any]
) -> str:
    """README.md of a model of the class ``name``, with the header that the hub reads."""
    about = facts.get("about") or {}
    header = {"library_name": "latte", "tags": list(tags)} | (
        {"license": about["licence"]} if about.get("licence") else {}
    )
    unknown = [key for key in KNOWN if not about.get(key)]
    rows = [
        f"| {key} | {cell(value)} |" for key, value in {**described(config, facts), **told(about)}.items()
    ]
    rows += [score_row(score) for score in about.get("scores") or ()]
    usable = "diffusion" in facts and "codec" in facts
    ask = ', prompts=["..."] * 4' if "text" in facts else ""
    how = (
        f'load_trained("FOLDER or OWNER/NAME").generate(range(4){ask})'
        if usable
        else f'{name}.from_pretrained("FOLDER or OWNER/NAME")'
    )
    return "\n".join(
        [
            "---",
            *(f"{key}: {json.dumps(value)}" for key, value in header.items()),
            "---",
            "",
            f"# {name}, {kind(config)}",
            "",
            f"A latent diffusion transformer for video (Latte, arXiv 2401.03048) of {parameters:,} parameters.",
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            *([f"Not recorded: {', '.join(unknown)}.", ""] if unknown else []),
            "```python",
            f"from latte import {how.split('(')[0].split('.')[0]}",
            "",
            how,
            "```",
            "",
        ]
    )


def kind(config: Mapping[str, Any]) -> str:
    """What the model is told besides the timestep."""
    if "caption_channels" in config:
        return "text to video"
    return "unconditional" if config.get("num_classes") is None else f"{config['num_classes']} classes"


def public(part: Any) -> Any:
    """A part's description without a path that means something on one machine only."""
    if not isinstance(part, Mapping) or not part.get("path"):
        return part
    path = str(part["path"])
    hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).exists()
    return {key: value for key, value in part.items() if key != "path" or hub}


def described(config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of what config.json says of model, diffusion and the parts that it works with."""
    rows: dict[str, Any] = {"model": {key: value for key, value in config.items() if value is not None}}
    rows |= {label: public(facts[key]) for key, label in PARTS.items() if facts.get(key)}
    return rows


def told(about: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of what is known of the training."""
    return {label: about[key] for key, label in TRAINING.items() if about.get(key)}


def score_row(score: Mapping[str, Any]) -> str:
    """A figure with its interval, the protocol it is of and the hash of its manifest: without these it compares with nothing."""
    interval = (
        "" if not score.get("interval") else " (90 % interval {:.4g} to {:.4g})".format(*score["interval"])
    )
    by = f"protocol {cell(score['protocol'])}, manifest {cell(score['manifest_hash'])}"
    return f"| {cell(score['metric'])} | {float(score['value']):.6g}{interval}, {by} |"


def cell(value: Any) -> str:
    """A value inside a table: 'key value, key value' for several."""
    if isinstance(value, Mapping):
        return ", ".join(f"{cell(key)} {cell(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list | tuple):
        return ", ".join(cell(part) for part in value)
    return str(value).replace("|", "\\|").replace("\n", " ")


DOOR = "latte.interop.load"  # storeys above this one: looked up when somebody knocks


class Published(PyTorchModelHubMixin):
    """``save_pretrained`` and ``push_to_hub`` of the hub's mixin, with a card of ours, and ``from_pretrained`` through the one door.

    The model knows its configuration alone: ``checkpoint.export`` writes the facts, too, and gives them here through ``model_card_kwargs``.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        heads: int | None = None,
        allow_missing: Sequence[str] = (),
        allow_unexpected: Sequence[str] = (),
    ) -> Self:
        """The model in a file, a folder or a hub id, of any layout that ``checkpoint.weights.load_foreign`` knows, ready for inference.

        The mixin's own would load a part of a model without a word. Here the report of every tensor goes to the log, and InputError comes
        for a part that ``allow_missing`` and ``allow_unexpected`` do not name, and for the model of another class.
        """
        loaded = import_module(DOOR).load_foreign(source, heads, allow_missing, allow_unexpected)
        model = loaded.model().requires_grad_(True)
        if not isinstance(model, cls):
            raise InputError(
                f"{source} holds a {type(model).__name__}, not a {cls.__name__}; "
                f"call {type(model).__name__}.from_pretrained"
            )
        return model

    def generate_model_card(self, facts: Mapping[str, Any] | None = None) -> ModelCard:  # type: ignore[override]
        """The card of this model; ``facts`` as in this file's head."""
        model: Any = self
        tags = self._hub_mixin_info.model_card_data.tags or []
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return ModelCard(card_text(type(self).__name__, tags, asdict(model.config), parameters, facts or {}))
