# SPDX-License-Identifier: Apache-2.0
"""The two kinds of message we raise: a wrong choice (with the nearest name) and a wrong shape or range.

Every message holds the field, its value, the rule it breaks and a way out. ``InputError`` is the user's to mend: the command
line prints it as one line and exits with 2. ``RunError`` is a failure while running (disk full, NaN loss): one line, exit 1.
"""

import os
import unicodedata
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Wrong usage or input: what, where, why, and what to do about it, on one line."""


class RunError(RuntimeError):
    """A failure while running that is not the input's fault, on one line."""


def printable(name: str | os.PathLike) -> str:
    """Return ``name`` (a path, a class name, a prompt) safe for a terminal, a log and any encoding that holds its letters.

    Control characters, line breaks, invisible and bidirectional marks, and bytes that are not UTF-8 become escapes such as
    ``\\x1b``. Letters of every script stay as they are.
    """
    text = os.fspath(name)
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def nearest(name: object, names: Iterable[object]) -> str:
    """'; did you mean ...?' for the closest of ``names``, or nothing when none is close."""
    close = get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.5)
    if not close:
        return ""
    if unicodedata.normalize("NFC", close[0]) == unicodedata.normalize("NFC", str(name)):
        return f"; did you mean {close[0]!a} (the same letters in another Unicode form)?"
    return f"; did you mean {close[0]!r}?"


def choose(field: str, name: Any, table: Mapping[Any, T]) -> T:
    """``table[name]``, or an InputError that lists the names and proposes the nearest."""
    if name in table:
        return table[name]
    raise InputError(
        f"{field} is {name!r}, which is not one of {', '.join(str(n) for n in table)}{nearest(name, table)}"
    )


def check(condition: bool, message: str) -> None:
    """Raise ``InputError(message)`` unless ``condition``. The message names the field, its value, the rule and what to do."""
    if not condition:
        raise InputError(message)


def require(ok: bool, field: str, value: object, rule: str, way_out: str) -> None:
    """Raise an InputError naming ``field``, its ``value``, the broken ``rule`` and a ``way_out`` unless ``ok``."""
    if not ok:
        raise InputError(f"{field} is {value!r}, but {rule}; {way_out}")
