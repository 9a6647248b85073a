# SPDX-License-Identifier: Apache-2.0
"""The queue of the page: one job at a time, eight that wait, the ninth refused, cancelled ones gone."""

import threading
import time

import pytest

from latte.checks import InputError, RunError
from latte.ui.desk import Desk, Job, explain


@pytest.fixture
def desk():
    made = Desk()
    yield made
    made.close()


class Blocking:
    """Work that waits until it is released, counts how many run, and looks at cancellation."""

    def __init__(self):
        self.gate = threading.Event()
        self.running = 0
        self.most = 0

    def __call__(self, job: Job) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            while not self.gate.wait(0.005):
                job.report(1, 2)
            return "done"
        finally:
            self.running -= 1


def started(job: Job) -> None:
    deadline = time.monotonic() + 5
    while job.state == "waiting":
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_one_runs_eight_wait_and_the_ninth_is_refused_at_once(desk):
    work = Blocking()
    first = desk.submit(work)
    started(first)
    waiting = [desk.submit(work) for _ in range(8)]
    began = time.monotonic()
    with pytest.raises(RunError, match="queue is full"):
        desk.submit(work)
    assert time.monotonic() - began < 1
    assert [desk.position(job) for job in waiting] == list(range(1, 9))
    work.gate.set()
    for job in (first, *waiting):
        assert job.finished.wait(5)
        assert (job.state, job.result) == ("done", "done")
    assert work.most == 1


def test_the_same_limit_holds_before_the_first_job_has_begun(desk):
    work = Blocking()
    jobs = [desk.submit(work) for _ in range(9)]
    with pytest.raises(RunError):
        desk.submit(work)
    work.gate.set()
    assert all(job.finished.wait(5) for job in jobs)


def test_a_cancelled_job_that_waits_frees_its_place_now(desk):
    work = Blocking()
    started(desk.submit(work))
    waiting = [desk.submit(work) for _ in range(8)]
    desk.cancel(waiting[3])
    assert waiting[3].finished.is_set()
    assert waiting[3].state == "cancelled"
    late = desk.submit(work)
    assert desk.position(late) == 8
    work.gate.set()
    assert late.finished.wait(5)
    assert late.state == "done"


def test_a_cancelled_job_that_runs_ends_at_its_next_step_and_the_next_one_begins(desk):
    work = Blocking()
    first = desk.submit(work, "a")
    second = desk.submit(work, "b")
    started(first)
    assert desk.cancel_all("a") == 1
    assert first.finished.wait(5)
    assert first.state == "cancelled"
    started(second)
    work.gate.set()
    assert second.finished.wait(5)
    assert second.state == "done"


def test_the_owner_is_compared_and_others_stay(desk):
    work = Blocking()
    jobs = [desk.submit(work, owner) for owner in "aba"]
    assert desk.cancel_all("a") == 2
    assert jobs[0].finished.wait(5)  # it looks at its next step, before the gate opens
    work.gate.set()
    assert all(job.finished.wait(5) for job in jobs)
    assert [job.state for job in jobs] == ["cancelled", "done", "cancelled"]


def test_a_failure_is_recorded_and_the_desk_goes_on(desk):
    def fail(job: Job) -> None:
        raise InputError("prompt is empty; give one")

    failed = desk.submit(fail)
    assert failed.finished.wait(5)
    assert (failed.state, failed.error) == ("failed", "prompt is empty; give one")
    done = desk.submit(lambda job: 7)
    assert done.finished.wait(5)
    assert done.result == 7


@pytest.mark.parametrize(
    "error",
    [
        InputError("/home/someone/secret/runs/mine/checkpoints/step-3 is damaged; restore it"),
        RunError("'/srv/data set/someone/clip.mp4' cannot be read; 1 of 2 in '/home/someone/my films' fail"),
        InputError("weights: C:\\Users\\someone\\secret\\model.safetensors is damaged"),
        FileNotFoundError(2, "No such file", "/home/someone/secret/x"),
        KeyError("/home/someone/secret"),
        MemoryError("out of memory at /home/someone/secret"),
    ],
)
def test_a_message_names_no_folder(error):
    text = explain(error)
    assert "someone" not in text
    assert "secret" not in text
    assert "/srv" not in text
    assert text


def test_a_message_keeps_what_is_no_folder():
    text = "steps must be in [1, 1000], got 0; and/or 3/4, latte sample builtin --count 1"
    assert explain(InputError(text)) == text
