# SPDX-License-Identifier: Apache-2.0
"""``latte config``: every choice and key is listed with a line about it."""

from latte.autoencoder.config import CODECS
from latte.config.describe import KINDS
from latte.config.run import recipes
from latte.diffusion.config import SAMPLERS
from latte.evaluation.protocols import PROTOCOLS


def test_config_list_has_a_line_for_every_key(latte):
    keys = latte("config", "list", "keys", "--json").json["keys"]
    assert keys["train.lr"]["default"] == 1e-4
    assert keys["train.lr"]["type"] == "a number"
    lines = latte("config", "list", "keys").out.splitlines()
    shown = latte("config", "show", "--json").json
    assert [line.split()[0] for line in lines[1:]] == list(keys) == list(shown)
    assert shown["train.lr"]["description"] == keys["train.lr"]["description"]
    assert keys["train.lr"]["description"] in latte("config", "show").out


def test_config_list_describes_every_choice_of_every_kind(latte):
    listed = latte("config", "list", "--json").json
    lines = latte("config", "list").out.splitlines()
    assert set(KINDS) | {"keys", "train.lr"} <= set(listed)
    for kind, place in KINDS.items():
        names = listed[kind]
        assert names, kind
        assert f"{kind} ({place.where})" in lines
        for name, about in names.items():
            assert len(about) > 3, (kind, name)
            assert any(line.split()[:1] == [name] and about in line for line in lines), (kind, name)
    assert latte("config", "list", "samplers", "--json").json == {"samplers": listed["samplers"]}
    assert set(listed["samplers"]) == set(SAMPLERS)
    assert set(listed["protocols"]) == {*PROTOCOLS, "external"}
    assert set(listed["recipes"]) == set(recipes())
    assert set(listed["codecs"]) == set(CODECS)


def test_config_list_of_an_unknown_kind_names_the_nearest(latte):
    found = latte("config", "list", "smplers")
    assert found.code == 2
    assert found.errors[0].endswith("; did you mean 'samplers'?")


def test_config_show_leaves_out_a_size_that_decides_nothing(latte):
    tiny = latte("config", "show", "shapes-tiny")
    assert "model.depth" in tiny.out
    assert "model.size" not in tiny.out
    assert "model.size" in latte("config", "show", "shapes-tiny", "model.heads=null").out
    assert latte("config", "show", "shapes-tiny", "--json").json["model.size"]["value"] == "XL"


def test_an_entry_that_a_user_adds_is_listed_with_the_start_of_its_docstring(monkeypatch, latte):
    class Mine:
        """An autoencoder of mine.

        More about it.
        """

    monkeypatch.setitem(CODECS, "mine", Mine)
    assert latte("config", "list", "codecs", "--json").json["codecs"]["mine"] == "An autoencoder of mine."
