# SPDX-License-Identifier: Apache-2.0
"""``latte config``: the keys of a run, where its values come from, all choices by name, and the schema of the
YAML file.
"""

import json
import shutil
import sys
from typing import Annotated, Any

import typer

from latte.checks import check_name
from latte.cli.options import OVERRIDABLE, Command, Debug, Group, Json, Overrides, print_result, table

MaybeRun = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A recipe, a YAML file or a run folder; the defaults without it."),
]
MaybeKind = Annotated[
    str | None, typer.Argument(metavar="[KIND]", help="One of {kinds}; all without it.", show_default=False)
]

app = typer.Typer(
    cls=Group,
    help="Settings of a run, all choices by name, and the schema of the YAML file.",
    no_args_is_help=True,
)


@app.command("show", cls=Command, context_settings=OVERRIDABLE)
def show_config(
    run: MaybeRun = None, overrides: Overrides = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Print every setting of a run: its value, where it comes from, and what it is.

    model.size is left out where depth, width and heads are all given, so that nothing follows from it.
    """
    from latte.config.describe import describe_keys
    from latte.config.run import flat, load_run

    config, origins = load_run(run, overrides or [])
    about = {key.name: key.description for key in describe_keys()}
    values = flat(config)
    result = {
        key: {"value": value, "origin": origins[key], "description": about[key]}
        for key, value in values.items()
    }
    overridden = all(values[f"model.{key}"] is not None for key in ("depth", "width", "heads"))
    shown = [key for key in values if not (overridden and key == "model.size")]
    rows = [(key, json.dumps(values[key]), f"({origins[key]})", about[key]) for key in shown]
    print_result(result, as_json, fitted(table(rows)))


def fitted(lines: list[str]) -> list[str]:
    """Return ``lines``, cut to the width of a terminal if stdout is one."""
    if not sys.stdout.isatty():
        return lines
    width = shutil.get_terminal_size().columns
    return [line if len(line) <= width else f"{line[: width - 1]}…" for line in lines]


@app.command("list", cls=Command)
def list_choices(kind: MaybeKind = None, as_json: Json = False, debug: Debug = False) -> None:
    """List recipes, protocols, samplers, codecs and all other choices, or every key, a line about each."""
    from latte.config.describe import KINDS

    if kind is not None:
        check_name("KIND", kind, (*KINDS, "keys"))
    result: dict[str, Any] = {}
    lines: list[str] = []
    for name, entry in KINDS.items():
        if kind in (None, name):
            result[name] = dict(entry.describe())
            lines += ["", f"{name} ({entry.where})", *(f"  {row}" for row in table([*result[name].items()]))]
    keys, rows = described_keys()
    if kind == "keys":
        result = {"keys": keys}
        lines = ["", "keys (KEY=VALUE behind a RUN)", *(f"  {row}" for row in table(rows))]
    if kind is None:
        result |= {"keys": keys, **keys}  # beside the kinds as in 0.1.0, for one version
        lines += ["", f"keys: {len(keys)}, listed by latte config list keys"]
    print_result(result, as_json, fitted(lines[1:]))


def described_keys() -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Return every key with type, default and description as plain data, and as rows for people."""
    from latte.config.describe import describe_keys

    keys = describe_keys()
    plain = {
        key.name: {"type": key.type, "default": key.default, "description": key.description} for key in keys
    }
    return plain, [(key.name, json.dumps(key.default), key.description) for key in keys]


@app.command("schema", cls=Command)
def schema(as_json: Json = False, debug: Debug = False) -> None:
    """Print the JSON schema of the YAML file, for editors; with --json on one line."""
    from latte.config.run import schema as schema_of

    print(json.dumps(schema_of(), indent=None if as_json else 2))
