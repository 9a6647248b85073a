# SPDX-License-Identifier: Apache-2.0
"""A table takes entries as a dictionary does, imports one when it is read, and its facts are the entries'."""

import sys

import pytest

from latte.autoencoder.config import CODECS, compression_at
from latte.checks import InputError, check_name, choose
from latte.data.config import PROCEDURAL
from latte.diffusion.config import LONG_VIDEO_METHODS, OBJECTIVES, SAMPLERS
from latte.model.config import CONDITIONINGS, PATCHES, TEMPORAL_POSITIONS
from latte.runtime import DTYPES
from latte.tables import Later, Table
from latte.text.config import TEXT_ENCODERS
from latte.training.config import OPTIMIZERS

TABLES = {
    "codec": CODECS,
    "scenes": PROCEDURAL,
    "objective": OBJECTIVES,
    "sampler": SAMPLERS,
    "conditioning": CONDITIONINGS,
    "patch": PATCHES,
    "position": TEMPORAL_POSITIONS,
    "dtype": DTYPES,
    "longer": LONG_VIDEO_METHODS,
    "text": TEXT_ENCODERS,
    "optimizer": OPTIMIZERS,
}
ENTRIES = [(kind, name) for kind, table in TABLES.items() for name in table.declared()]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_the_facts_of_an_entry_are_its_attributes(kind, name):
    facts = TABLES[kind].declared()[name].facts
    entry = TABLES[kind][name]
    assert {fact: getattr(entry, fact) for fact in facts} == facts


def test_codecs_of_one_compression_have_it_at_every_path():
    fixed = [name for name, later in CODECS.declared().items() if "compression" in later.facts]
    assert len(fixed) >= 6
    for name in fixed:
        assert compression_at(name, None) == CODECS[name].compression_at("some/path")


def test_codecs_name_themselves():
    assert {name: kind.name for name, kind in CODECS.items()} == {name: name for name in CODECS}


def make() -> Table[str, object]:
    return Table({"late": Later("this:d", colour="red"), "now": 3})


def test_only_reading_an_entry_imports_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    table = make()
    assert list(table) == ["late", "now"]
    assert "late" in table
    assert len(table) == 2
    assert table.fact("late", "colour") == "red"
    check_name("field", "late", table)
    with pytest.raises(
        InputError, match=r"^field is 'lat', which is not one of late, now; did you mean 'late'"
    ):
        choose("field", "lat", table)
    assert "this" not in sys.modules
    assert isinstance(table["late"], dict)
    assert "this" in sys.modules
    assert table["late"] is table["late"]


def test_an_entry_set_at_run_time_replaces_place_and_facts():
    table = make()
    _ = table["late"]
    table["late"] = 2 + 1j
    assert table["late"] == 2 + 1j
    assert table.fact("late", "imag") == 1
    assert table.declared() == {}
    del table["late"]
    assert list(table) == ["now"]
    with pytest.raises(KeyError):
        table["late"]
