# SPDX-License-Identifier: Apache-2.0
"""``latte config``: the keys of a run, where its values come from, and the schema of the YAML file."""

import json
from typing import Annotated

import typer

from latte.cli.options import OVERRIDABLE, Command, Debug, Group, Json, Overrides, print_result, table

MaybeRun = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A recipe, a YAML file or a run folder; the defaults without it."),
]

app = typer.Typer(cls=Group, help="Settings of a run, and the schema of the YAML file.", no_args_is_help=True)


@app.command("show", cls=Command, context_settings=OVERRIDABLE)
def show_config(
    run: MaybeRun = None, overrides: Overrides = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Print every setting of a run, its value and its origin."""
    from latte.config.run import flat, load_run

    config, origins = load_run(run, overrides or [])
    values = flat(config)
    result = {key: {"value": value, "origin": origins[key]} for key, value in values.items()}
    rows = [(key, json.dumps(value), f"({origins[key]})") for key, value in values.items()]
    print_result(result, as_json, table(rows))


@app.command("list", cls=Command)
def list_keys(as_json: Json = False, debug: Debug = False) -> None:
    """Print every key, its default and its meaning."""
    from latte.config.describe import describe_keys

    keys = describe_keys()
    result = {
        key.name: {"type": key.type, "default": key.default, "description": key.description} for key in keys
    }
    rows = [(key.name, json.dumps(key.default), key.description) for key in keys]
    print_result(result, as_json, table(rows))


@app.command("schema", cls=Command)
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of the YAML file, for editors."""
    from latte.config.run import schema as schema_of

    print(json.dumps(schema_of(), indent=2))
