# SPDX-License-Identifier: Apache-2.0
"""The page under load and under attack: 32 clients, 60 hostile requests, passwords, uploads, a busy port."""

import io
import json
import socket
import threading
import time

import pytest
from PIL import Image

from latte.checks import InputError
from latte.ui.app import bind
from ui.server import Visitor, fields, jobs, served

pytest.importorskip("gradio", reason="needs gradio: pip install 'latte-video[ui]'")

API = "/gradio_api"
FOLDERS = (b"/tmp/", b"/root", b"/home", b"/usr/", b"/opt/", b"site-packages", b"root:x:", b"Traceback")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(folder):
    with served(folder) as found:
        yield found


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_generation_streams_its_steps_and_ends_with_a_clip(address, folder):
    visitor = Visitor(address, "first")
    assert visitor.click("generate", fields(1000)) == 200  # a second: several looks
    text = visitor.listen()
    assert "image/webp" in text
    assert "video/mp4" in text
    assert "latte sample builtin-shapes" in text
    assert len(list((folder / "out").glob("*.mp4"))) == 1


def test_32_clients_get_one_generation_at_a_time_and_those_beyond_the_queue_are_refused(address, folder):
    before = len(jobs(folder))
    answers: dict[int, str] = {}
    codes = []

    def visit(number: int) -> None:
        visitor = Visitor(address, f"client{number}")
        codes.append(visitor.click("generate", fields(400)))
        answers[number] = visitor.listen()

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    refused = [number for number, text in answers.items() if "queue is full" in text]
    lines = jobs(folder)[before:]
    assert len(answers) == 32
    assert codes == [200] * 32
    assert lines == ["start 400", "end 400"] * (len(lines) // 2)  # never two at once
    made = len(lines) // 2
    assert 9 <= made < 32  # places become free while the others arrive
    assert len(refused) == 32 - made
    assert all("video/mp4" in text for number, text in answers.items() if number not in refused)


def test_a_full_queue_refuses_within_a_second_and_cancelled_jobs_free_their_places(address, folder):
    waiting = [Visitor(address, f"waiting{number}") for number in range(9)]
    for visitor in waiting:
        visitor.click("generate", fields(60_000))
    wait_for(lambda: jobs(folder)[-1] == "start 60000")
    late = Visitor(address, "late")
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        late.click("generate", fields(20))
        answer = late.listen()
        seconds.append(time.monotonic() - began)
        assert "queue is full" in answer
    for visitor in waiting[1:]:
        visitor.click("cancel-generate", [])
    waiting[0].click("cancel-generate", [])
    wait_for(lambda: jobs(folder)[-1] == "cancel 60000")
    late.click("generate", fields(20))
    assert "video/mp4" in late.listen()
    assert jobs(folder)[-2:] == ["start 20", "end 20"]
    assert min(seconds) < 1


def test_the_cancel_button_ends_the_visitors_own_job_only(address, folder):
    first = Visitor(address, "one")
    other = Visitor(address, "other")
    first.click("generate", fields(30_000))
    first.listen("image/webp")
    other.click("generate", fields(30))
    first.click("cancel-generate", [])
    assert "video/mp4" in other.listen()
    assert jobs(folder)[-4:] == ["start 30000", "cancel 30000", "start 30", "end 30"]


def test_a_visitor_who_leaves_frees_the_desk(address, folder):
    gone = Visitor(address, "gone")
    gone.click("generate", fields(50_000))
    gone.listen("image/webp")
    wait_for(lambda: jobs(folder)[-1] == "cancel 50000")


@pytest.mark.parametrize(
    ("values", "line"),
    [({"seed": -3}, "the seed"), ({"count": 4000}, "number of clips"), ({"label": "x" * 2000}, "")],
)
def test_fields_that_do_not_fit_are_answered_by_a_line(address, folder, values, line):
    before = jobs(folder)
    visitor = Visitor(address, "misfit")
    assert visitor.click("generate", fields(**values)) == 200
    text = visitor.listen()
    assert "process_completed" in text
    assert line in text or '"success":false' in text
    assert jobs(folder) == before


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "PNG")
    return file.getvalue()


def test_an_uploaded_picture_is_used_and_other_files_are_not(address, folder):
    visitor = Visitor(address, "upload")
    path = visitor.upload(png()).json()[0]
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}
    visitor.click("generate", fields(20, image=image))
    assert "video/mp4" in visitor.listen()
    assert len(list((folder / "out").glob("*.png"))) == 1
    other = visitor.upload(b"no picture").json()[0]
    visitor.click("generate", fields(20, image={**image, "path": other}))
    answer = visitor.listen()
    assert "not a picture" in answer
    assert str(folder) not in answer
    assert len(list((folder / "out").glob("*.png"))) == 1


HOSTS = (
    "http://169.254.169.254/latest/meta-data",
    "http://127.0.0.1:22/",
    "http://localhost:8080/",
    "http://[::1]:80/",
    "http://[::ffff:169.254.169.254]/",
    "http://0x7f000001/",
    "http://2130706433/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://metadata.google.internal/",
    "ftp://127.0.0.1/",
    "file:///etc/passwd",
)
TARGETS = (
    "/etc/passwd",
    "../../../../etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "..%252f..%252fetc%252fpasswd",
    "..%5c..%5cetc%5cpasswd",
)


def hostile() -> list[tuple[str, str, dict[str, str], bytes]]:
    """Return (method, target, headers, body) of the hostile requests."""
    found = []
    for target in TARGETS:
        for route in (f"{API}/file=", f"{API}/file/", "/static/", "/assets/"):
            found.append(("GET", route + target, {}, b""))
    for host in HOSTS:
        found.append(("GET", f"{API}/proxy={host}", {}, b""))
        found.append(("GET", f"{API}/file={host}", {}, b""))
    kind = {"Content-Type": "application/json"}
    good = {"fn_index": 0, "session_hash": "x", "data": []}
    queue = f"{API}/queue/join"
    deep = b'{"data":' + b"[" * 5000 + b"]" * 5000 + b"}"
    bodies = [
        deep,
        b"{" * 100_000,
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"data":[NaN,Infinity,1e999]}',
        json.dumps({**good, "fn_index": -1}).encode(),
        json.dumps({**good, "fn_index": 10**30}).encode(),
        json.dumps({**good, "fn_index": 999}).encode(),
        json.dumps({**good, "session_hash": "../../x"}).encode(),
        json.dumps({**good, "session_hash": {"a": 1}}).encode(),
        json.dumps(
            {**good, "data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}
        ).encode(),
        json.dumps({**good, "data": [{"path": HOSTS[0], "url": HOSTS[0]}]}).encode(),
        json.dumps({**good, "data": "x" * 300_000}).encode(),
        json.dumps({**good, "event_data": {"a": [[[[[[[[[[[[[[1]]]]]]]]]]]]]]}}).encode(),
    ]
    found += [("POST", queue, kind, body) for body in bodies]
    found += [
        ("POST", f"{API}/upload", {"Content-Length": str(1 << 34)}, b""),
        ("POST", f"{API}/upload", {"Content-Length": "-5"}, b""),
        ("POST", f"{API}/upload", {"Content-Type": "multipart/form-data"}, b"abc"),
        (
            "POST",
            f"{API}/upload?upload_id=../../x",
            {"Content-Type": "multipart/form-data; boundary=a"},
            b"--a--",
        ),
        ("POST", f"{API}/upload", {"Content-Type": "text/plain"}, b"abc"),
        ("POST", queue, {**kind, "Origin": "http://evil.example"}, json.dumps(good).encode()),
        ("POST", queue, {**kind, "Origin": "null"}, json.dumps(good).encode()),
        ("GET", "/", {"Host": "evil.example"}, b""),
        ("POST", f"{API}/component_server", kind, b"{}"),
        ("POST", f"{API}/run/predict", kind, json.dumps(good).encode()),
        ("POST", f"{API}/vibe-edit", kind, b"{}"),
        ("GET", f"{API}/dev/reload", {}, b""),
        ("GET", "/monitoring", {}, b""),
        ("GET", "/docs", {}, b""),
        ("PUT", "/", {}, b""),
        ("DELETE", f"{API}/upload", {}, b""),
        ("TRACE", "/", {}, b""),
        ("GET", f"{API}/queue/data?session_hash=unknown", {}, b""),
        ("GET", f"{API}/stream/a/b/c/playlist.m3u8", {}, b""),
        ("GET", "/" + "a" * 5000, {}, b""),
        ("GET", f"{API}/file=" + "a/" * 2000, {}, b""),
        ("GET", f"{API}/file=%00", {}, b""),
        ("POST", f"{API}/cancel", kind, b'{"session_hash":"x","fn_index":0,"event_id":["a"]}'),
        ("POST", f"{API}/cancel", kind, b"{}"),
    ]
    return found


def send(address: str, method: str, target: str, headers: dict[str, str], body: bytes) -> bytes:
    """Return the answer to a request that is sent as it is; no client tidies it."""
    host, _, port = address.removeprefix("http://").partition(":")
    lines = {"Host": f"{host}:{port}", "Content-Length": str(len(body)), "Connection": "close", **headers}
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode() + b"\r\n" + body)
        connection.settimeout(3)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
        except (TimeoutError, ConnectionError):
            pass
    return b"".join(parts)


def test_hostile_requests_get_no_500_no_path_and_a_quick_answer(address):
    requests = hostile()
    assert len(requests) >= 60
    refused = 0
    for method, target, headers, body in requests:
        began = time.monotonic()
        answer = send(address, method, target, headers, body)
        seconds = time.monotonic() - began
        name = (method, target[:90], headers, body[:60], answer[:200])
        assert answer.startswith(b"HTTP/1.1 "), name
        status = int(answer.split()[1])
        assert status < 500, name
        assert seconds < 1, (seconds, name)
        assert not [folder for folder in FOLDERS if folder in answer], name
        refused += 400 <= status < 500
    assert refused >= len(requests) - 2  # a well-formed cancel of nothing is fine
    assert send(address, "GET", "/config", {}, b"").startswith(b"HTTP/1.1 200")


def test_the_page_itself_names_no_folder_and_no_other_host(address):
    for route in ("/", "/config", f"{API}/info", "/theme.css"):
        answer = Visitor(address, "a").get(route)
        assert answer.status_code == 200
        assert not [folder for folder in FOLDERS[:6] if folder in answer.content], route
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        for host in ("googleapis", "gstatic", "cdnjs", "jsdelivr", "unpkg"):
            assert host not in answer.text, (route, host)


def test_a_busy_port_is_one_line():
    with (
        bind("127.0.0.1", 0) as taken,
        pytest.raises(InputError, match="another program may have it") as caught,
    ):
        bind("127.0.0.1", taken.getsockname()[1])
    assert "\n" not in str(caught.value)
