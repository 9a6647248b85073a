# SPDX-License-Identifier: Apache-2.0
"""Names of files reach a terminal harmless and on one line; a name that only looks right is explained."""

import os
import shutil
import subprocess
import unicodedata
from pathlib import Path

import pytest

from latte.checks import InputError, check, choose, command_line, nearest, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name (1).mp4", "plain name (1).mp4"),
        ("\u00fcber/\u041a\u043b\u0438\u043f \u7f8e\u4e3d \u0939\u093f\u0928\u094d\u0926\u0940.mp4", None),
        ("red\x1b[31m\x07.mp4", "red\\x1b[31m\\x07.mp4"),
        ("two\nlines\r\t.mp4", "two\\nlines\\r\\t.mp4"),
        ("evil\u202egpm.mp4", "evil\\u202egpm.mp4"),
        ("zero\u200bwidth\x9b", "zero\\u200bwidth\\x9b"),
        (os.fsdecode(b"not-utf8-\xff.mp4"), "not-utf8-\\udcff.mp4"),
        (Path("a/b\x1b"), "a/b\\x1b"),
    ],
)
def test_printable_escapes_what_a_terminal_acts_on_and_keeps_letters(name, shown):
    found = printable(name)
    assert found == (shown or name)
    assert found.isprintable()
    found.encode("utf-8")


def test_a_name_in_another_unicode_form_is_explained():
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert "another Unicode form" in nearest(composed, [decomposed])
    assert "'cafe\\u0301'" in nearest(composed, [decomposed])
    with pytest.raises(InputError, match="another Unicode form"):
        choose("label", composed, {decomposed: 0})
    assert nearest("walk", ["walks"]) == "; did you mean 'walks'?"
    assert nearest("walk", ["zzz"]) == ""


@pytest.mark.parametrize(
    "word",
    [
        "shapes",
        "a b",
        "it's",
        "$(touch x)",
        "",
        "--x=;y",
        "two\nlines",
        "esc\x1b[31m",
        os.fsdecode(b"\xff'\\"),
        "\u041a'",
    ],
)
def test_a_printed_command_can_be_pasted_into_a_shell(word):
    line = command_line("sample", word)
    assert line.isprintable()
    assert line.startswith("latte sample ")
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash on this machine")
    script = "latte() { printf '%s\\0' \"$@\"; }; " + line
    found = subprocess.run([shell, "-c", script], capture_output=True, check=True)
    assert found.stdout == b"sample\0" + os.fsencode(word) + b"\0"


def test_check_raises_its_message():
    check(True, "never")
    with pytest.raises(InputError, match="must be positive"):
        check(False, "train.lr must be positive, got -1")
