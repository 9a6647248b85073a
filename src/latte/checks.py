# SPDX-License-Identifier: Apache-2.0
"""The two kinds of error, the checks that raise them, and how names, commands and times are printed.

``InputError``: wrong usage or input; the command line prints it and exits with 2. ``RunError``: a failure
while running (full disk, NaN loss); exit 1. A message names the field, its value, the rule and what to do.
Each line of a message is an error of its own.
"""

import os
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Wrong usage or input: what, where, why, and what to do about it, on one line."""


class RunError(RuntimeError):
    """A failure while running that is not the input's fault, on one line."""


def printable(name: str | os.PathLike) -> str:
    """Return ``name`` (a path, a class name, a prompt) safe to print in any terminal or log.

    Control characters, line breaks, invisible and bidirectional marks, and bytes that are not UTF-8 become
    escapes such as ``\\x1b``. Letters of every script stay as they are.
    """
    return "".join(_escaped(character) for character in os.fspath(name))


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode()


def command_line(*words: object) -> str:
    """Return ``latte words...`` quoted for a shell, whatever is in the words."""
    return " ".join(["latte", *(_quoted(str(word)) for word in words)])


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(
        f"\\x{byte:02x}" if byte < 32 or byte > 126 or byte in b"'\\" else chr(byte)
        for byte in os.fsencode(word)
    )
    return f"$'{escaped}'"


def nearest(name: object, names: Iterable[object]) -> str:
    """Return '; did you mean ...?' with the closest of ``names``, or '' when none is close."""
    candidates = [str(candidate) for candidate in names]
    composed = unicodedata.normalize("NFC", str(name))
    for candidate in candidates:
        if candidate != str(name) and unicodedata.normalize("NFC", candidate) == composed:
            return f"; did you mean {candidate!a} (the same letters in another Unicode form)?"
    close = get_close_matches(str(name), candidates, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def beside(path: Path) -> list[str]:
    """Return the paths in the folder of ``path``, for ``nearest``; [] when the folder cannot be listed."""
    try:
        return sorted(str(path.parent / name) for name in os.listdir(path.parent))
    except (OSError, ValueError):
        return []


def choose(field: str, name: Any, table: Mapping[Any, T]) -> T:
    """Return ``table[name]``; InputError with every name and the nearest one if there is no such entry."""
    check_name(field, name, table)
    return table[name]


def check_name(field: str, name: Any, names: Collection[Any]) -> None:
    """Raise InputError with every name and the nearest one unless ``name`` is one of ``names``."""
    if name not in names:
        known = ", ".join(map(str, names))
        raise InputError(f"{field} is {name!r}, which is not one of {known}{nearest(name, names)}")


def check(condition: bool, message: str) -> None:
    """Raise ``InputError(message)`` unless ``condition``."""
    if not condition:
        raise InputError(message)


def duration(seconds: float) -> str:
    """Return '45 s', '3 min 05 s', '2 h 07 min' or '3 d 04 h'."""
    for unit, name, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= unit:
            return f"{int(seconds // unit)} {name} {int(seconds % unit // smaller):02d} {part}"
    return f"{seconds:.0f} s"
