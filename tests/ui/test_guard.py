# SPDX-License-Identifier: Apache-2.0
"""What the guard lets through to an application that answers everything with 200, without gradio."""

import asyncio
import base64
import json

import pytest

from latte.ui.guard import API, MAX_BODY, Guard

GOOD = {"fn_index": 3, "session_hash": "abc", "data": [1, "text", None, 0.5], "event_data": None}
HOST = {"host": "127.0.0.1:7860"}


@pytest.fixture
def uploads(tmp_path):
    (tmp_path / "up" / "a1").mkdir(parents=True)
    (tmp_path / "up" / "a1" / "pic.png").write_bytes(b"x")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "up" / "link").symlink_to(tmp_path / "secret.txt")
    return tmp_path / "up"


def ask(
    guard: Guard, method: str, target: str, body: bytes = b"", headers: dict | None = None
) -> tuple[int, bytes, dict]:
    """Return (status, body, headers) of the answer to a request."""
    path, _, query = target.partition("?")
    given = {**HOST, "content-length": str(len(body)), **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(key.encode(), value.encode()) for key, value in given.items()],
    }
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], b"".join(part.get("body", b"") for part in sent[1:]), dict(sent[0]["headers"])


class Inner:
    """An application that answers with the body that it was sent, or fails."""

    def __init__(self, status: int = 200, fault: Exception | None = None):
        self.status = status
        self.fault = fault
        self.called = 0

    async def __call__(self, scope, receive, send):
        self.called += 1
        if self.fault:
            raise self.fault
        content = (await receive())["body"] or b"/root/secret"
        await send(
            {"type": "http.response.start", "status": self.status, "headers": [(b"content-length", b"99")]}
        )
        await send({"type": "http.response.body", "body": content, "more_body": False})


def guarded(uploads, inner=None, **options) -> Guard:
    return Guard(inner or Inner(), {3, 4}, uploads, options.get("host", "127.0.0.1"), options.get("auth", ""))


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/config",
        "/theme.css",
        "/assets/index-1a.js",
        "/static/fonts/a/b.woff2",
        f"{API}/queue/data?session_hash=a1",
    ],
)
def test_what_the_page_needs_passes(uploads, target):
    status, _, headers = ask(guarded(uploads), "GET", target)
    assert status == 200
    assert headers[b"content-security-policy"].startswith(b"default-src 'self'")
    assert headers[b"x-content-type-options"] == b"nosniff"


def test_an_event_of_the_page_passes_with_its_body(uploads):
    body = json.dumps(GOOD).encode()
    assert ask(guarded(uploads), "POST", f"{API}/queue/join", body)[:2] == (200, body)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"fn_index": 5}, 422),
        ({"fn_index": True}, 422),
        ({"fn_index": None}, 422),
        ({"session_hash": "../a"}, 422),
        ({"session_hash": 7}, 422),
        ({"data": [{"path": "/etc/passwd"}]}, 422),
        ({"data": [{"path": "http://169.254.169.254/"}]}, 422),
        ({"data": [{"url": "http://169.254.169.254/"}]}, 422),
        ({"data": ["a\x00b"]}, 422),
        ({"data": [10**40]}, 422),
        ({"data": [[[[[[[[[[[[[[1]]]]]]]]]]]]]]}, 422),
        ({"data": "x" * (MAX_BODY + 1)}, 413),
    ],
)
def test_an_event_that_no_page_sends_is_refused(uploads, change, status):
    inner = Inner()
    answer = ask(
        guarded(uploads, inner), "POST", f"{API}/queue/join", json.dumps({**GOOD, **change}).encode()
    )
    assert answer[0] == status
    assert inner.called == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(uploads, body):
    assert ask(guarded(uploads), "POST", f"{API}/queue/join", body)[0] in (400, 422)


def test_only_uploaded_files_are_served(uploads):
    guard = guarded(uploads)
    assert ask(guard, "GET", f"{API}/file={uploads}/a1/pic.png")[0] == 200
    for name in (
        "/etc/passwd",
        f"{uploads}/../secret.txt",
        f"{uploads}/link",
        str(uploads),
        "http://10.0.0.1/",
        "a" * 5000,
    ):
        assert ask(guard, "GET", f"{API}/file={name}")[0] == 404, name


def test_a_body_longer_than_it_says_is_cut_off(uploads):
    inner = Inner()
    answer = ask(guarded(uploads, inner), "POST", f"{API}/upload", bytes(9 << 20), {"content-length": "10"})
    assert answer[0] == 413
    for length in ("-5", "ten", "", str(1 << 40)):
        assert ask(guarded(uploads), "POST", f"{API}/upload", b"a", {"content-length": length})[0] in (
            400,
            413,
        )


def test_other_methods_and_routes_are_unknown(uploads):
    guard = guarded(uploads)
    for method, target in (
        ("PUT", "/"),
        ("OPTIONS", "/"),
        ("POST", "/"),
        ("GET", f"{API}/proxy=http://10.0.0.1/"),
        ("GET", f"{API}/queue/join"),
        ("POST", f"{API}/component_server"),
        ("POST", f"{API}/run/predict"),
        ("GET", "/assets/../../etc/passwd"),
        ("GET", "/assets/%2e%2e"),
        ("GET", "/login_check"),
    ):
        assert ask(guard, method, target)[0] == 404, (method, target)


def test_another_origin_and_another_name_are_refused(uploads):
    body = json.dumps(GOOD).encode()
    guard = guarded(uploads)
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"host": "evil.example"},
        {"host": "evil.example:7860", "origin": "http://evil.example:7860"},
        {"sec-fetch-site": "cross-site"},
    ):
        assert ask(guard, "POST", f"{API}/queue/join", body, headers)[0] == 403, headers
    for headers in ({"origin": "http://127.0.0.1:7860"}, {"host": "localhost:7860"}, {"host": "[::1]:7860"}):
        assert ask(guard, "POST", f"{API}/queue/join", body, headers)[0] == 200, headers
    other = guarded(uploads, host="0.0.0.0", auth="me:secret")
    given = {"host": "my.machine:7860", "authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
    assert ask(other, "GET", "/", headers=given)[0] == 200


def test_a_password_guards_every_route(uploads):
    inner = Inner()
    guard = guarded(uploads, inner, auth="me:secret")
    for target in ("/", "/config", "/theme.css", "/assets/a.js", f"{API}/heartbeat/a", "/nothing"):
        for given in ({}, {"authorization": "Basic bWU6d3Jvbmc="}, {"authorization": "Bearer secret"}):
            status, _, headers = ask(guard, "GET", target, headers=given)
            assert status == 401
            assert headers[b"www-authenticate"].startswith(b"Basic")
    assert inner.called == 0
    good = {"authorization": "Basic " + base64.b64encode(b"me:secret").decode()}
    assert ask(guard, "GET", "/", headers=good)[0] == 200


def test_an_error_of_the_application_carries_no_text_of_it(uploads):
    for status in (403, 404, 500):
        answer = ask(guarded(uploads, Inner(status)), "GET", "/")
        assert answer[0] == status
        assert b"secret" not in answer[1]
        assert int(answer[2][b"content-length"]) == len(answer[1])
    answer = ask(guarded(uploads, Inner(fault=OSError("/root/secret"))), "GET", "/")
    assert answer[0] == 500
    assert b"secret" not in answer[1]
