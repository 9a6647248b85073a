# SPDX-License-Identifier: Apache-2.0
"""Tables whose entries are imported at first use, so that settings are checked without importing torch.

An entry is the object itself, or ``Later("module:name")``. What settings need to know about an entry that is
not imported yet are its facts: attributes of the object, written a second time beside its place. A test
compares them with the object's own.
"""

import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any, Generic, TypeVar

Name = TypeVar("Name")
Entry = TypeVar("Entry")


class Later:
    """The place of an entry, ``"module:name"``, one line about it, and the facts that are known before it is
    imported.
    """

    def __init__(self, place: str, about: str = "", **facts: Any):
        self.place = place
        self.about = about
        self.facts = facts

    def load(self) -> Any:
        """Import the module and return the entry."""
        module, _, name = self.place.partition(":")
        return getattr(import_module(module), name)


class Table(MutableMapping[Name, Entry], Generic[Name, Entry]):
    """name -> entry, as a dictionary that takes entries at run time; reading an entry imports it, its name or
    a fact does not.
    """

    def __init__(self, entries: Mapping[Name, "Entry | Later"]):
        self._entries: dict[Name, Any] = dict(entries)
        self._loaded: dict[Name, Entry] = {}

    def __getitem__(self, name: Name) -> Entry:
        entry = self._entries[name]
        if not isinstance(entry, Later):
            return entry
        if name not in self._loaded:
            self._loaded[name] = entry.load()
        return self._loaded[name]

    def __setitem__(self, name: Name, entry: Entry) -> None:
        self._loaded.pop(name, None)
        self._entries[name] = entry

    def __delitem__(self, name: Name) -> None:
        self._loaded.pop(name, None)
        del self._entries[name]

    def __iter__(self) -> Iterator[Name]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def fact(self, name: Name, fact: str) -> Any:
        """Return attribute ``fact`` of the entry ``name``, without importing the entry."""
        entry = self._entries[name]
        return entry.facts[fact] if isinstance(entry, Later) else getattr(entry, fact)

    def about(self, name: Name) -> str:
        """Return one line about the entry ``name``: that of its place, or how the docstring of an object
        begins.
        """
        entry = self._entries[name]
        if isinstance(entry, Later):
            return entry.about
        return (inspect.getdoc(entry) or "").partition("\n")[0]

    def declared(self) -> dict[Name, Later]:
        """Return the entries that are given by their place."""
        return {name: entry for name, entry in self._entries.items() if isinstance(entry, Later)}
