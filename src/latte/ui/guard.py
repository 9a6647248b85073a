# SPDX-License-Identifier: Apache-2.0
"""What reaches the page: known routes, checked bodies, its own origin, and the password if there is one.

An ASGI application around gradio's. Requests are refused here, so gradio sees only those that a page of its
own would send; answers with an error carry no text of gradio's, which may name files.
"""

import base64
import hmac
import json
import logging
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from latte.ui.clips import MAX_IMAGE_BYTES
from latte.ui.shelf import LOOPBACK

LOG = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

API = "/gradio_api"
MAX_BODY = 256 << 10
MAX_DEPTH = 12
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
NAME = r"[A-Za-z0-9_.-]{1,200}"
ASSET = rf"/(assets|static)(/(?!\.){NAME}){{1,4}}"
PAGES = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|{ASSET}"
    rf"|{API}/(info/?|app_id/?|startup-events|theme\.css|queue/data|upload_progress"
    rf"|heartbeat/[A-Za-z0-9_-]{{1,64}}|file=.+)"
)
POSTS = re.compile(rf"{API}/(queue/join/?|upload|cancel|reset/?)")
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class Refused(Exception):
    """An answer with a status of 4xx."""

    def __init__(self, status: int, headers: tuple[tuple[bytes, bytes], ...] = ()):
        super().__init__(status)
        self.status = status
        self.headers = headers


class Guard:
    """The application around ``app``, whose events have the numbers ``functions``. ``uploads`` is the folder
    of uploaded files, ``host`` what the server listens on, ``auth`` USER:PASSWORD or empty.
    """

    def __init__(self, app: App, functions: Collection[int], uploads: Path, host: str, auth: str = ""):
        self.app = app
        self.functions = frozenset(functions)
        self.uploads = uploads.resolve()
        self.host = host
        self.auth = auth

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            body = await self.check(scope, receive)
            await self.app(scope, body, tidy(answer))
        except Refused as refusal:
            if not started:
                await refuse(send, refusal)
        except Exception as error:
            LOG.error("a request failed", exc_info=error)
            if not started:
                await refuse(send, Refused(HTTPStatus.INTERNAL_SERVER_ERROR))

    async def check(self, scope: Message, receive: Receive) -> Receive:
        """Return where the request's body comes from; Refused for a request that no page of ours sends."""
        headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
        self.check_sender(scope["method"], headers)
        path = scope["path"]
        if scope["method"] == "POST":
            known = POSTS.fullmatch(path)
        else:
            known = scope["method"] in ("GET", "HEAD") and PAGES.fullmatch(path)
        raw = (scope.get("raw_path") or path.encode()).lower()
        if (
            not known
            or any(part in raw for part in (b"\\", b"%00", b"%25", b"%5c"))
            or ".." in path.split("/")
        ):
            raise Refused(HTTPStatus.NOT_FOUND)
        if path.startswith(f"{API}/file="):
            self.check_file(path.removeprefix(f"{API}/file="))
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        for name in ("session_hash", "upload_id"):
            if any(not ID.fullmatch(value) for value in query.get(name, [])):
                raise Refused(HTTPStatus.BAD_REQUEST)
        if path == f"{API}/upload":
            return limited(receive, headers, MAX_IMAGE_BYTES + MAX_BODY)
        if scope["method"] != "POST" or path.startswith(f"{API}/reset"):
            return limited(receive, headers, MAX_BODY)
        content = await whole(limited(receive, headers, MAX_BODY))
        self.check_json(content, headers)
        return replay(content, receive)

    def check_sender(self, method: str, headers: dict[bytes, str]) -> None:
        """Raise Refused for another origin, for a name that only looks like this machine, and without the
        password.
        """
        host = headers.get(b"host", "")
        origin = headers.get(b"origin")
        if self.host in LOOPBACK and (urlsplit(f"//{host}").hostname or "") not in LOOPBACK:
            raise Refused(HTTPStatus.FORBIDDEN)
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(HTTPStatus.FORBIDDEN)
        if headers.get(b"sec-fetch-site", "none") == "cross-site" and method != "GET":
            raise Refused(HTTPStatus.FORBIDDEN)
        if self.auth:
            expected = b"Basic " + base64.b64encode(self.auth.encode())
            given = headers.get(b"authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, expected):
                raise Refused(HTTPStatus.UNAUTHORIZED, ((b"www-authenticate", b'Basic realm="latte"'),))

    def check_file(self, name: str) -> None:
        """Raise Refused unless ``name`` is an uploaded file."""
        if not self.holds(unquote(name)):
            raise Refused(HTTPStatus.NOT_FOUND)

    def holds(self, name: Any) -> bool:
        """Return whether ``name`` is the path of an uploaded file."""
        if not isinstance(name, str):
            return False
        try:
            path = Path(name).resolve()
            return path.is_relative_to(self.uploads) and path.is_file()
        except (OSError, ValueError, RuntimeError):
            return False

    def check_json(self, content: bytes, headers: dict[bytes, str]) -> None:
        """Raise Refused unless the body is a JSON object as gradio's page sends it: shallow, with finite
        numbers, plain names, and files that were uploaded.
        """
        try:
            body = json.loads(content, parse_constant=float)
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST) from None
        if not isinstance(body, dict) or not self.is_sane(body, headers.get(b"host", ""), MAX_DEPTH):
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY)
        for key in ("session_hash", "event_id"):
            if body.get(key) is not None and not (isinstance(body[key], str) and ID.fullmatch(body[key])):
                raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY)
        number = body.get("fn_index")
        trigger = body.get("trigger_id")
        if type(number) is not int or number not in self.functions:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY)
        if trigger is not None and (type(trigger) is not int or trigger < 0):
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY)

    def is_sane(self, value: Any, host: str, depth: int) -> bool:
        """Return whether a JSON value is as ``check_json`` demands."""
        if isinstance(value, float):
            return abs(value) < 1e18
        if isinstance(value, int):
            return abs(value) < 2**63
        if depth == 0 and isinstance(value, dict | list):
            return False
        if isinstance(value, list):
            return all(self.is_sane(item, host, depth - 1) for item in value)
        if isinstance(value, dict):
            if "path" in value and not self.holds(value["path"]):
                return False
            url = value.get("url")
            if url is not None and (not isinstance(url, str) or urlsplit(url).netloc not in ("", host)):
                return False
            return all(self.is_sane(item, host, depth - 1) for item in value.values())
        return not isinstance(value, str) or "\x00" not in value


def limited(receive: Receive, headers: dict[bytes, str], size: int) -> Receive:
    """Return ``receive`` that raises Refused beyond ``size`` bytes of body."""
    length = headers.get(b"content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise Refused(HTTPStatus.BAD_REQUEST)
    if int(length) > size:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    got = 0

    async def next_part() -> Message:
        nonlocal got
        message = await receive()
        got += len(message.get("body", b""))
        if got > size:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        return message

    return next_part


async def whole(receive: Receive) -> bytes:
    """Return the body of a request."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return b"".join(parts)


def replay(content: bytes, receive: Receive) -> Receive:
    """Return a source of the body ``content``, then of what ``receive`` brings."""
    parts = [{"type": "http.request", "body": content, "more_body": False}]

    async def next_part() -> Message:
        if parts:
            return parts.pop()
        return await receive()

    return next_part


def tidy(send: Send) -> Send:
    """Return ``send`` that adds HEADERS and replaces the body of an error by the name of its status."""
    status = 200

    async def forward(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            dropped = set(HEADERS)
            if status >= 400:
                dropped |= {b"content-length", b"content-type"}
            headers = [(key, value) for key, value in message["headers"] if key.lower() not in dropped]
            headers += HEADERS.items()
            if status >= 400:
                body = error_body(status)
                headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            await send({**message, "headers": headers})
        elif status < 400:
            await send(message)
        elif not message.get("more_body"):
            await send({"type": "http.response.body", "body": error_body(status)})

    return forward


def error_body(status: int) -> bytes:
    """Return the body of an answer with an error."""
    return json.dumps({"detail": HTTPStatus(status).phrase}).encode()


async def refuse(send: Send, refusal: Refused) -> None:
    """Send the answer of a refusal."""
    body = error_body(refusal.status)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [*HEADERS.items(), *refusal.headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
