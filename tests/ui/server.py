# SPDX-License-Identifier: Apache-2.0
"""The page in a process of its own, with a studio that only sleeps, and a client for it. No model, no torch.

``python server.py FOLDER [AUTH]`` serves; the seed of a clip is its time in milliseconds, and jobs.log in
FOLDER has a line for the start and the end of every generation.
"""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

CONFIGS: dict[str, dict] = {}


def serve(folder: Path, auth: str) -> None:
    """Serve until the process is killed."""
    from latte.ui import app
    from latte.ui.clips import Output, Studio, new_id
    from latte.ui.shelf import UiConfig

    log = folder / "jobs.log"

    def write(line: str) -> None:
        with open(log, "a") as file:
            file.write(line + "\n")

    def make(studio, job, settings, seed, done=0, of=1) -> Output:
        import numpy as np

        write(f"start {seed}")
        clip = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8)
        try:
            for step in range(20):
                job.report(step + 1, 20, clip)
                time.sleep(seed / 20_000)
        except BaseException:
            write(f"cancel {seed}")
            raise
        write(f"end {seed}")
        output = Output(new_id(), settings, seed, "latte sample builtin-shapes", 0.1, time.time())
        return studio.write(output, clip, 8)

    def describe(studio, job, name) -> dict:
        return {"text": False, "classes": ["up", "down"], "about": "4 frames of 16 x 16"}

    Studio.make = make
    Studio.describe = describe
    runs = tuple(path for path in [folder / "runs"] if path.is_dir())
    config = UiConfig(("builtin-shapes",), runs=runs, out=folder / "out", port=0, auth=auth)
    app.serve(config, lambda address: print(address, flush=True))


@contextmanager
def served(folder: Path, auth: str = ""):
    """Run ``serve`` in a process; yields the address."""
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "TMPDIR": str(folder)}
    command = [sys.executable, __file__, str(folder), auth]
    with (
        open(folder / "server.log", "wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://"), (folder / "server.log").read_text()
            yield address
        finally:
            process.kill()


def jobs(folder: Path) -> list[str]:
    """Return the lines of jobs.log."""
    file = folder / "jobs.log"
    return file.read_text().splitlines() if file.exists() else []


class Visitor:
    """A client with a session of its own."""

    def __init__(self, address: str, session: str):
        self.address = address
        self.session = session

    def get(self, route: str):
        """Return the answer to a GET."""
        import httpx

        return httpx.get(self.address + route, timeout=30)

    def post(self, route: str, **content):
        """Return the answer to a POST."""
        import httpx

        return httpx.post(f"{self.address}/gradio_api/{route}", timeout=30, **content)

    def click(self, element: str, data: list) -> int:
        """Click on a button; return the status of the answer."""
        config = CONFIGS.setdefault(self.address, {}) or self.get("/config").json()
        CONFIGS[self.address] = config
        target = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == element)
        function = next(item["id"] for item in config["dependencies"] if [target, "click"] in item["targets"])
        body = {"data": data, "fn_index": function, "session_hash": self.session, "event_data": None}
        return self.post("queue/join", json=body).status_code

    def listen(self, until: str = "process_completed") -> str:
        """Return the messages of the session up to the first that holds ``until``, or to its end."""
        import httpx

        found = []
        url = f"{self.address}/gradio_api/queue/data"
        with httpx.stream("GET", url, params={"session_hash": self.session}, timeout=30) as response:
            for line in response.iter_lines():
                found.append(line)
                if until in line or "close_stream" in line:
                    break
        return "\n".join(found)

    def upload(self, content: bytes):
        """Upload a file; return the answer."""
        return self.post("upload", files={"files": ("a.png", content)})


def fields(seed=0, count=1, image=None, label=None) -> list:
    """Return the values of the fields of the first tab."""
    own = "the model's own"
    return ["builtin-shapes", "", label, seed, count, image, own, own, None, None, ""]


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
