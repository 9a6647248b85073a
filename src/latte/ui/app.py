# SPDX-License-Identifier: Apache-2.0
"""The server of the page: one desk, one shelf, gradio's application behind the guard, a socket of our own."""

import logging
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from latte.checks import InputError
from latte.ui.clips import MAX_IMAGE_BYTES
from latte.ui.guard import Guard
from latte.ui.shelf import UiConfig

if TYPE_CHECKING:
    from latte.ui.tabs import Page

MAX_EVENTS = 200  # of gradio's own queue: looks at the state, not generations
INSTALL = "latte ui needs gradio 6.20 or newer; install it with: pip install 'latte-video[ui]'"


def check_gradio() -> None:
    """Raise InputError, with the command that installs it, unless gradio is there and new enough."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = tuple(int(part) for part in version("gradio").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        raise InputError(INSTALL) from None
    if found < (6, 20):
        raise InputError(f"gradio {version('gradio')} has known holes; {INSTALL}")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on ``host`` and ``port``; InputError where that is impossible."""
    families = {True: socket.AF_INET6, False: socket.AF_INET}
    server = socket.socket(families[":" in host], socket.SOCK_STREAM)
    if os.name != "nt":  # there it would share the port
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen(128)
    except OSError as error:
        server.close()
        raise InputError(
            f"--port {port} of --host {host} cannot be used ({error.strerror or error}); another program may "
            f"have it: give another --port, or 0 for any free one"
        ) from None
    return server


def prepare(uploads: Path) -> None:
    """Set what gradio reads from the environment when it is imported: no analytics, uploads in our folder."""
    for name in ("GRADIO_SHARE", "GRADIO_ALLOWED_PATHS", "GRADIO_MCP_SERVER", "GRADIO_NODE_SERVER_NAME"):
        os.environ.pop(name, None)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def application(page: "Page", uploads: Path) -> Guard:
    """Return the whole application: gradio's page behind the guard, with nothing that leaves this machine."""
    import fastapi
    import gradio

    from latte.ui.watch import build, look

    blocks = build(page)
    blocks.queue(max_size=MAX_EVENTS, default_concurrency_limit=16, api_open=False)
    inner = fastapi.FastAPI(openapi_url=None)
    gradio.mount_gradio_app(
        inner,
        blocks,
        "/",
        server_name=page.config.host,
        server_port=page.config.port,
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_IMAGE_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        **look(),
    )
    return Guard(inner, blocks.fns, uploads, page.config.host, page.config.auth)


def serve(config: UiConfig, opened: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; ``opened`` gets its address as soon as it answers. InputError before that
    for a missing gradio and a busy port.
    """
    check_gradio()
    with bind(config.host, config.port) as server, tempfile.TemporaryDirectory(prefix="latte-ui-") as uploads:
        prepare(Path(uploads))
        import uvicorn

        from latte.ui.tabs import Page

        page = Page(config)
        try:
            warm_up(page)
            app = application(page, Path(uploads))
            name = config.host.join("[]") if ":" in config.host else config.host
            opened(f"http://{name}:{server.getsockname()[1]}")
            logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
            settings = uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=2
            )
            uvicorn.Server(settings).run(sockets=[server])
        finally:
            page.desk.close()


def warm_up(page: "Page") -> None:
    """Load the first model while the page starts."""
    name = next(iter(page.shelf.models()))
    page.desk.submit(lambda job: page.studio.describe(job, name))
