"""A webui whose lock another holds, and one whose children outlive it, answers all that needs no lock."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from disks import NOBODY, ROOT, held
from inside import until

from harness import MODE_FLAGS, MODES, QUICK, Page, Webui, body, fewer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs flock")


LIMIT = 2.0  # LOCK_SECONDS of the webuis
SLACK = 4.0  # what a busy machine adds


FORKS = """
import multiprocessing, os, time
from modules import script_callbacks

def fork():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    raw = os.fork()
    if raw == 0:
        time.sleep(600)
        os._exit(0)
    return [child.pid, raw]

script_callbacks.on_app_started(lambda _, app: app.add_api_route("/fork", fork, methods=["POST"]))
"""


@pytest.mark.parametrize("mode", MODES)
def test_a_webui_whose_children_outlive_it(start, mode):
    """Its job has failed at once, though they live."""
    webui = start(*MODE_FLAGS[mode], scripts={"forks": FORKS})
    job_id = webui.send(body(standin={"hold": webui.gate()})).job_id()
    webui.until_status(job_id, "Processing")
    children = webui.client.post("/fork").json()
    try:
        webui.kill()
        webui.start()
        assert webui.job(job_id)["status"] == "Failed"
        assert webui.job(job_id)["error"] == "The webui ended before the generation did"
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)


def fill(webui: Webui, count: int) -> None:
    """Large answers."""
    for _ in range(count):
        answer = webui.post(body(standin={"image_bytes": 6_000_000}))
        assert len(answer.content) > 8_000_000


def memory(webui: Webui) -> int:
    return webui.client.get("/standin/threads").json()["rss_bytes"]


def check_while_locked(webui: Webui) -> None:
    """Generations go on, untracked, and whoever asks for jobs is told."""
    for number in range(4):
        began = time.monotonic()
        answer = webui.post(body())
        seconds = time.monotonic() - began
        assert answer.status_code == 200 and answer.json()["images"]
        assert "X-Job-ID" not in answer.headers
        assert seconds < (LIMIT + SLACK if number == 0 else LIMIT - 0.5), number
    began = time.monotonic()
    answer = webui.post(body(), headers={"Idempotency-Key": os.urandom(4).hex()})
    for refused in (answer, webui.client.get("/sdapi/v1/jobs")):
        assert refused.status_code == 503, refused.text
        assert refused.json()["detail"].endswith(": another program holds the lock jobs.json.lock")
    assert time.monotonic() - began < LIMIT + SLACK


def check_memory(webui: Webui) -> None:
    """Many large answers that could not be tracked leave nothing behind."""
    fill(webui, 3)
    before = memory(webui)
    count = fewer(20)
    fill(webui, count)
    assert until(lambda: memory(webui) < before + count * 3e6, 20, "the memory is let go")


def check_log(webui: Webui) -> None:
    lines = [line for line in webui.our_log() if "holds the lock jobs.json.lock" in line]
    assert 1 <= len(lines) <= 4, lines
    assert any("jobs.json cannot be" in line for line in lines)


def check_afterwards(webui: Webui) -> None:
    """The lock is free: all is well again, without a restart."""

    def tracked() -> Any:
        return webui.post(body()).headers.get("X-Job-ID")

    job_id = until(tracked, what="generations are tracked")
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    assert job_id in [job["id"] for job in webui.jobs()]
    assert any("jobs.json can be written again" in line for line in webui.our_log())


@pytest.mark.skipif(not ROOT, reason="only root can be another user")
@pytest.mark.parametrize("mode", MODES)
def test_another_user_holds_the_lock(start, public, mode):
    """He had it open before a version came that does not let him. It does not stop a start, a generation or an end."""
    lock = public / "jobs.json.lock"
    lock.touch()
    lock.chmod(0o644)
    with held(lock, NOBODY):
        began = time.monotonic()
        environ = {"TRACKER_DATA_DIR": str(public)}
        webui = start(*MODE_FLAGS[mode], environ=environ, constants={"LOCK_SECONDS": LIMIT})
        check_while_locked(webui)
        if mode == "ui":
            assert "another program holds the lock jobs.json.lock" in Page(webui.client).look()
        check_memory(webui)
        check_log(webui)
        webui.terminate(30)
        webui.start()
        check_while_locked(webui)
    check_afterwards(webui)
    assert time.monotonic() - began < 300
    with pytest.raises(AssertionError, match="PermissionError"), held(lock, NOBODY):
        pass


STOPS = """
import os, signal, threading

FOLDER = {folder!r}
pwrite = os.pwrite

def stop(file, data, position):
    written = pwrite(file, data, position)
    jobs, switch = (os.path.join(FOLDER, name) for name in (os.path.join("data", "jobs.json"), "stop"))
    if os.path.exists(switch) and os.path.samestat(os.fstat(file), os.stat(jobs)):
        os.unlink(switch)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # which this thread does not outrun
    return written

os.pwrite = stop
"""


@pytest.mark.parametrize("known", [True, False], ids=["running", "restarted"])
def test_a_neighbour_is_suspended_while_it_holds_the_lock(start, tmp_path, known):
    environ = {"TRACKER_DATA_DIR": str(tmp_path / "data")}
    webui = start(*QUICK, environ=environ, constants={"LOCK_SECONDS": LIMIT})
    neighbour = start(*QUICK, environ=environ, scripts={"z-stops": STOPS.format(folder=str(tmp_path))})
    webui.job(webui.post(body()).headers["X-Job-ID"], wait=30)
    gate = webui.gate()
    running = webui.send(body(standin={"hold": gate}))
    running_id = running.job_id()
    webui.until_status(running_id, "Processing")
    (tmp_path / "stop").touch()
    stopped = neighbour.send(body())
    try:
        until(lambda: not (tmp_path / "stop").exists(), what="the neighbour has stopped")
        if known:
            gate.open()
            assert b'"images"' in running.to_end(), "a job that was accepted before"
        else:
            webui.restart()
        check_while_locked(webui)
        check_log(webui)
    finally:
        os.kill(neighbour.pid, signal.SIGCONT)
    check_afterwards(webui)
    assert stopped.job_id() in [job["id"] for job in webui.jobs()], "what it had begun it ended"
    expected = "Completed" if known else "Failed"
    until(lambda: webui.job(running_id)["status"] == expected, what="its end was tried again")
    neighbour.terminate(30)
