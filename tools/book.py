# SPDX-License-Identifier: Apache-2.0
"""Build the book: ``python -m tools.book [SITE]`` writes the site (by default to build/book/site).

docs/ is copied, pages generated from the code are added (every command, every configuration key, the Python
interface), and Zensical builds the copy in strict mode: a broken link or a missing page is an error.
"""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NEEDED = ("zensical", "mkdocstrings_handlers.python")
GENERATED = ("reference/commands.md", "reference/settings.md", "reference/choices.md", "reference/python.md")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


def commands(group: Any = None, path: tuple[str, ...] = ("latte",)) -> Iterator[tuple[str, Any]]:
    """Yield (``latte data scan``, click command) of every command, in the order of the help."""
    if group is None:
        import typer

        from latte.cli.main import app

        group = typer.main.get_command(app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def parameters(command: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (name as typed, default, description) of every argument and option of a command."""
    from latte.cli.options import with_tables

    for item in command.params:
        names = ", ".join([*item.opts, *item.secondary_opts])
        if item.param_type_name == "argument":
            names = item.metavar or item.name.upper()
        elif not getattr(item, "is_flag", False):
            names += f" {item.metavar or 'VALUE'}"
        default = item.default
        shown = "" if default is None or default is False or callable(default) else str(default)
        yield names, shown, with_tables(getattr(item, "help", None) or "")


def commands_page() -> str:
    """Return the page of every command: what it does, its arguments and options."""
    parts = ["# Commands", "", "Made from the program itself; `latte COMMAND --help` prints the same."]
    for name, command in commands():
        summary = inspect.cleandoc(command.help or "")
        parts += ["", f"## {name}", "", summary, ""]
        parts += table(("argument or option", "default", "meaning"), parameters(command))
    return "\n".join(parts) + "\n"


def settings_page() -> str:
    """Return the page of every configuration key: type, default and meaning, a table for each section."""
    from latte.config.describe import describe_keys

    parts = [
        "# Configuration keys",
        "",
        "Made from the settings classes. A value comes from the last place that names it: default, recipe or",
        "YAML file, environment (`LATTE_TRAIN_LR=3e-4`), command line (`train.lr=3e-4`).",
        "`latte config show RUN` prints the values of a run, `latte config list keys` this list.",
    ]
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for key in describe_keys():
        section = key.name.rpartition(".")[0] or "file"
        default = json.dumps(key.default, ensure_ascii=False)
        rows.setdefault(section, []).append((key.name, default, f"{key.type}: {key.description}"))
    for section, found in rows.items():
        parts += ["", f"## {section}", "", *table(("key", "default", "meaning"), found)]
    return "\n".join(parts) + "\n"


def choices_page() -> str:
    """Return the page of recipes, protocols, samplers, codecs and all other names, a table for each."""
    from latte.config.describe import KINDS

    parts = [
        "# Names to choose from",
        "",
        "Made from the tables of the code; `latte config list` prints the same.",
    ]
    for kind, entry in KINDS.items():
        place = entry.where[:1].upper() + entry.where[1:]
        parts += ["", f"## {kind.replace('_', ' ')}", "", f"{place}.", ""]
        parts += table(("name", "what it is"), dict(entry.describe()).items())
    return "\n".join(parts) + "\n"


def python_page() -> str:
    """Return the page of the public names of ``latte``, to be filled by mkdocstrings."""
    import latte

    names = [name for name in latte.__all__ if name not in ("__version__", "Trained")]
    intro = "Everything here is `latte.NAME`; each name is imported at first use, so `import latte` is quick."
    parts = ["# Python", "", intro]
    for name in names:
        parts += ["", f"::: {latte._MODULES[name]}.{name}"]
    return "\n".join(parts) + "\n"


def table(head: tuple[str, ...], rows: Any) -> list[str]:
    """Return the lines of a Markdown table; the first two columns are code."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [" ".join(str(cell).split()).replace("|", "\\|") for cell in row]
        cells[:-1] = [f"`{cell}`" if cell else "" for cell in cells[:-1]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def generated() -> dict[str, str]:
    """Return path below docs/ -> text of the generated pages."""
    return dict(
        zip(GENERATED, (commands_page(), settings_page(), choices_page(), python_page()), strict=True)
    )


def within(page: Path, text: str) -> str:
    """Return a page's text with links to files outside docs/ as plain code: the site does not hold them."""

    def replace(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match[2]))
        if target.is_relative_to(DOCS):
            return match[0]
        return f"`{target.relative_to(ROOT).as_posix()}`"

    return LINK.sub(replace, text)


def stage(folder: Path) -> Path:
    """Write the book's sources to ``folder``; return the configuration file."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(DOCS, folder / "docs", ignore=shutil.ignore_patterns("zensical.toml"))
    for path in DOCS.rglob("*.md"):
        (folder / "docs" / path.relative_to(DOCS)).write_text(within(path, path.read_text("utf-8")), "utf-8")
    for name, text in generated().items():
        page = folder / "docs" / name
        page.parent.mkdir(exist_ok=True)
        page.write_text(text, "utf-8")
    config = folder / "zensical.toml"
    text = (DOCS / "zensical.toml").read_text("utf-8")
    config.write_text(text.replace('"SOURCE"', json.dumps((ROOT / "src").as_posix())), "utf-8")
    return config


def missing() -> list[str]:
    """Return the packages of the extra ``docs`` that are not installed."""
    found = []
    for name in NEEDED:
        try:
            known = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            known = None
        if known is None:
            found.append(name.partition(".")[0])
    return found


def build(site: Path, folder: Path = ROOT / "build" / "book") -> None:
    """Write the site; SystemExit with one line where the extra is missing or the build fails."""
    if lacking := missing():
        print(
            f"error: the book needs {' and '.join(lacking)}; run: python -m pip install -e '.[docs]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    config = stage(folder)
    words = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(config)]
    found = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if found.returncode:
        print(found.stdout + found.stderr, file=sys.stderr)
        print("error: Zensical did not accept the book; its warnings are above", file=sys.stderr)
        raise SystemExit(1)
    if site.resolve() != (folder / "site").resolve():
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(folder / "site", site)
    print(f"{site / 'index.html'}")


if __name__ == "__main__":
    build(Path(*sys.argv[1:2] or [ROOT / "build" / "book" / "site"]))
