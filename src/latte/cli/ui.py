# SPDX-License-Identifier: Apache-2.0
"""``latte ui``: the web page, on this machine."""

import os
from pathlib import Path
from typing import Annotated

import typer

from latte.cli.options import Debug, Device, Dtype, configure_logging, print_note

Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL]...", help="Run folders, weights folders, hub ids, or builtin (default)."),
]
Runs = Annotated[
    list[Path] | None,
    typer.Option(metavar="FOLDER", help="A folder of runs and reports; may be repeated. runs/ if it exists."),
]
Data = Annotated[
    list[Path] | None, typer.Option(metavar="FOLDER", help="A folder of videos; may be repeated.")
]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Where generated clips go.")]
Host = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What to listen on. Anything but this machine needs LATTE_UI_AUTH=USER:PASSWORD in the "
        "environment; passwords and clips travel unencrypted, so put a TLS proxy or an SSH tunnel before it.",
    ),
]
Port = Annotated[int, typer.Option(help="Port; 0 for any free one.")]
Hours = Annotated[float, typer.Option("--keep-hours", help="Hours after which a generated clip is deleted.")]


def ui(
    models: Models = None,
    runs: Runs = None,
    data: Data = None,
    out: Out = Path("ui-clips"),
    host: Host = "127.0.0.1",
    port: Port = 7860,
    keep_hours: Hours = 24.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Open a web page: generate, compare, gallery, follow a run, data, reports. Needs the extra ui.

    The page offers the models, runs and data sets that are named here, and no other file.
    """
    from latte.ui.app import check_gradio, serve
    from latte.ui.shelf import UiConfig

    configure_logging()
    check_gradio()
    if runs is None:
        runs = [Path("runs")] if Path("runs").is_dir() else []
    config = UiConfig(
        models=tuple(models or ["builtin"]),
        runs=tuple(runs),
        data=tuple(data or ()),
        out=out,
        host=host,
        port=port,
        auth=os.environ.pop("LATTE_UI_AUTH", ""),
        keep_hours=keep_hours,
        device=device,
        dtype=dtype,
    )
    serve(config, lambda address: print_note(f"open {address} (Ctrl-C ends)"))
