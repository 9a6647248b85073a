# SPDX-License-Identifier: Apache-2.0
"""The text section of a run's configuration, and the table of text encoders. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from latte.checks import InputError, check, check_name, choose
from latte.tables import Later, Table

if TYPE_CHECKING:
    from latte.text.encoders import TextEncoder

TEXT_ENCODERS: Table[str, type["TextEncoder"]] = Table(
    {
        "builtin": Later(
            "latte.text.encoders:BuiltinEncoder",
            "a fixed random vector per word, no weights",
            has_weights=False,
            bits_allowed=(),
            default_length=16,
        ),
        "t5": Later(
            "latte.text.t5:T5Encoder",
            "T5 v1.1 encoder (extra t2v), weights at text.path",
            has_weights=True,
            bits_allowed=(8,),
            default_length=120,
        ),
    }
)


@dataclass(frozen=True)
class TextEncoderConfig:
    """Which encoder reads the captions. Raises InputError on construction for a value out of range."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str | None = None  # encoder of captions, builtin or t5; null: the model reads no captions
    path: str | None = None  # folder or hub id of the weights, for an encoder that has any
    length: int | None = None  # maximum number of tokens of a prompt; null: the encoder's default
    bits: int | None = None  # 8: int8 weights; null: the precision that the encoder computes in
    dropout: float = 0.1  # fraction of training clips that get the empty caption, in [0, 1)
    # The next two are for a model that starts from an image model, see latte.model.text.TextConfig.
    gated_time: bool = False  # temporal blocks begin closed and open by train.gate_steps, as PixArt needs
    table_size: int | None = None  # side of the grid that positions are scaled to; null: latent_size
    pooled_caption: bool = False  # the caption's mean joins the timestep, so that temporal blocks see it too

    def __post_init__(self) -> None:
        if self.name is None:
            self._refuse(
                ("path", "length", "bits", "gated_time", "table_size", "pooled_caption"),
                "there is no text encoder",
            )
        else:
            check_name("text.name", self.name, TEXT_ENCODERS)
            bits_allowed = TEXT_ENCODERS.fact(self.name, "bits_allowed")
            reads = {"path": TEXT_ENCODERS.fact(self.name, "has_weights"), "bits": bits_allowed}
            unread = [field for field, is_read in reads.items() if not is_read]
            self._refuse(unread, f"the text encoder {self.name!r} does not read it")
            allowed = " or ".join(str(bits) for bits in bits_allowed)
            check(
                self.bits is None or self.bits in bits_allowed,
                f"text.bits must be {allowed} for the text encoder {self.name!r}, or null, got {self.bits}",
            )
        check(self.length is None or self.length >= 1, f"text.length must be at least 1, got {self.length}")
        check(0 <= self.dropout < 1, f"text.dropout must be in [0, 1), got {self.dropout}")

    def _refuse(self, keys: Sequence[str], reason: str) -> None:
        for key in keys:
            value = getattr(self, key)
            check(not value, f"text.{key} is {value!r}, but {reason}; leave it out, or set another text.name")

    @property
    def encoder(self) -> type["TextEncoder"]:
        """The entry of the table; InputError without a ``name``."""
        if self.name is None:
            raise InputError(
                "text.name is not set, but this model reads captions; set text.name=builtin or another one"
            )
        return choose("text.name", self.name, TEXT_ENCODERS)

    @property
    def channels(self) -> int:
        """Channels of the features, known without the weights."""
        return self.encoder.channels_of(self.path)

    @property
    def tokens(self) -> int:
        """Maximum number of tokens of a prompt."""
        if self.length is not None:
            return self.length
        return TEXT_ENCODERS.fact(self.name or "builtin", "default_length")
