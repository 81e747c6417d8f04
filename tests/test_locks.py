"""Locks between processes: who may hold them, for how long one is waited for, and what a child that is forked keeps."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from inside import WrappedOs, a_job, until

from harness import MODE_FLAGS, MODES, QUICK, Page, Webui, body, fewer, open_files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs flock")

NOBODY = 65534
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
LIMIT = 2.0  # LOCK_SECONDS of the webuis
SLACK = 4.0  # what a busy machine adds

# Holds a lock as another program does that may only read it, and ends with its input.
HOLDER = """
import fcntl, os, sys

if len(sys.argv) > 2:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
lock = open(sys.argv[1], "rb")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(path: Path, *user: Any) -> Iterator[None]:
    """Another process holds a lock. Raises AssertionError if it may not."""
    command = [sys.executable, "-c", HOLDER, str(path), *map(str, user)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"held\n", holder.stderr.read().decode()
            yield
        finally:
            holder.stdin.close()
            holder.wait(30)


@contextlib.contextmanager
def umask_of(umask: int) -> Iterator[None]:
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# For how long


def test_a_lock_is_waited_for_with_a_limit(script, tmp_path):
    """Once in vain, it is asked for a moment, until it can be had."""
    script.LOCK_SECONDS, script.LOCK_MOMENT = 1.0, 0.05
    path = tmp_path / "jobs.json.lock"
    lock = script.FileLock(str(path))
    path.touch()

    def seconds_in_vain() -> float:
        began = time.monotonic()
        with pytest.raises(TimeoutError) as raised, lock:
            pass
        assert raised.value.errno == errno.ETIMEDOUT and script.StoreError.of(raised.value).temporary
        assert raised.value.strerror == "another program holds the lock jobs.json.lock"
        return time.monotonic() - began

    for _ in range(2):
        with held(path):
            assert seconds_in_vain() >= 1
            assert max(seconds_in_vain() for _ in range(3)) < 1
        with lock:
            pass
    lock.close()


def test_one_that_takes_it_all_the_time_lets_others_in(script, tmp_path):
    """Who waits only tries now and then, and is not to meet it free by chance alone."""
    greedy, patient = (script.FileLock(str(tmp_path / "lock")) for _ in range(2))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with greedy:
                time.sleep(0.03)

    thread = threading.Thread(target=work)
    thread.start()
    waited = []
    try:
        for _ in range(15):
            began = time.monotonic()
            with patient:
                waited.append(time.monotonic() - began)
            time.sleep(0.02)
    finally:
        stop.set()
        thread.join()
    assert sorted(waited)[7] < 0.3, waited
    for lock in (greedy, patient):
        lock.close()


def test_a_store_that_cannot_lock_says_so_and_goes_on_later(script, tmp_path, caplog):
    script.LOCK_SECONDS, script.JobStore.RETRY = 0.5, 0.2
    dice = random.Random(7)
    store = script.JobStore(str(tmp_path))
    jobs = [a_job(script, dice) for _ in range(4)]
    store.put(jobs[0], new=True).result()
    with held(tmp_path / "jobs.json.lock"):
        caplog.clear()
        for _ in range(3):
            with pytest.raises(script.StoreError, match="another program"):
                store.put(jobs[1], new=True).result(30)
        changed = jobs[0]._replace(status="Failed")
        with pytest.raises(script.StoreError, match="another program"):
            store.put(changed).result(30)
        assert store.get(jobs[0].id) == changed, "it is in force"
        assert store.get(jobs[1].id) is None
        time.sleep(0.5)
        (line,) = caplog.messages
        assert "jobs.json cannot be written" in line and "another program holds the lock jobs.json.lock" in line
    until(lambda: "jobs.json can be written again" in caplog.messages, what="it is tried again")
    assert b'"Failed"' in (tmp_path / "jobs.json").read_bytes()
    store.put(jobs[2], new=True).result(30)
    store.close()


def test_nobody_waits_for_a_store_at_its_start(script, tmp_path):
    """Also where the predecessor's jobs are to be taken over before anything else."""
    script.LOCK_SECONDS = 0.5
    (tmp_path / "jobs.json").write_text('[{"id": "abcdEFGH", "prompt": "", "status": "completed", "timestamp": 1}]')
    (tmp_path / "jobs.json.lock").touch()
    with held(tmp_path / "jobs.json.lock"):
        began = time.monotonic()
        predecessor = script.Predecessor(str(tmp_path), str(tmp_path))
        predecessor.merge_jobs()
        store = script.JobStore(str(tmp_path), predecessor.refuse_to_open)
        with pytest.raises(script.StoreError, match="another program"):
            store.stats()
        assert time.monotonic() - began < 1 + SLACK
    predecessor.merge_jobs()
    assert store.get("abcdEFGH").status == "Completed"
    store.close()


def test_a_pipe_where_a_lock_should_be(script, tmp_path):
    """It is an error, and nobody waits for its other end."""
    os.mkfifo(str(tmp_path / "lock"))
    with pytest.raises(OSError):
        script.FileLock(str(tmp_path / "lock")).acquire()


# Who may hold them


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o002, 0o077, 0o027], ids=oct)
@pytest.mark.parametrize(
    "mode, lock_mode",
    [
        (0o400, 0o600),
        (0o600, 0o600),
        (0o640, 0o600),
        (0o644, 0o600),
        (0o444, 0o600),
        (0o660, 0o660),
        (0o664, 0o660),
        (0o666, 0o666),
        (0o622, 0o666),
    ],
    ids=oct,
)
@pytest.mark.parametrize("before", [None, 0o644, 0o666, 0o600], ids=lambda it: it if it is None else oct(it))
def test_who_may_write_jobs_json_may_lock_it(script, tmp_path, umask, mode, lock_mode, before):
    jobs, path = tmp_path / "jobs.json", tmp_path / "jobs.json.lock"
    jobs.touch()
    jobs.chmod(mode)
    if before is not None:  # as a version before made it
        path.touch()
        path.chmod(before)
    with umask_of(umask):
        lock = script.FileLock(str(path), str(jobs))
        with lock:
            assert mode_of(path) == lock_mode
    lock.close()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o600), (0o002, 0o660), (0o000, 0o666), (0o077, 0o600)], ids=oct)
def test_a_lock_before_there_is_a_jobs_json(script, tmp_path, umask, mode):
    with umask_of(umask):
        store = script.JobStore(str(tmp_path))
        store.put(a_job(script, random.Random(7)), new=True).result()
        locks = [path for path in tmp_path.iterdir() if re.search(r"\.(lock|owner-\w+)$", path.name)]
        assert len(locks) == 2 and {mode_of(path) for path in locks} == {mode}, locks
        others = [path for path in tmp_path.iterdir() if path not in locks]  # the index has what jobs.json has
        assert {mode_of(path) for path in others} == {0o666 & ~umask}, others
        store.close()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000], ids=oct)
def test_a_lock_is_never_open_to_others(script, tmp_path, umask):
    """From its first moment: whoever has it open then can lock it later."""
    (tmp_path / "jobs.json").touch()
    (tmp_path / "jobs.json").chmod(0o644)
    seen: List[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            for path in tmp_path.glob("*.lock"):
                seen.append(mode_of(path))
            return getattr(os, name)

    script.os = Watched()
    with umask_of(umask):
        lock = script.FileLock(str(tmp_path / "jobs.json.lock"), str(tmp_path / "jobs.json"))
        lock.acquire()
    lock.close()
    assert len(seen) > 3 and not [oct(mode) for mode in seen if mode & 0o077]


def test_a_link_in_the_place_of_a_lock(script, tmp_path):
    """What it leads to keeps its mode, whether it is empty or not."""
    for number, text in enumerate(("words", "")):
        precious = tmp_path / f"precious-{number}"
        precious.write_text(text)
        precious.chmod(0o644)
        path = tmp_path / f"lock-{number}"
        path.symlink_to(precious)
        lock = script.FileLock(str(path), str(tmp_path / "jobs.json"))
        with lock:
            assert mode_of(precious) == 0o644
        lock.close()


@pytest.mark.skipif(not ROOT, reason="only root can be another user")
def test_two_users_of_a_group(script, public):
    """What one of them makes, the other can lock; nobody else can."""
    one, two, group = 54321, 54322, 54320
    jobs, path = public / "jobs.json", public / "jobs.json.lock"
    jobs.touch()
    os.chown(str(jobs), one, group)
    jobs.chmod(0o664)
    os.chown(str(public), one, group)
    public.chmod(0o777)

    def as_user(user: int, groups: List[int]) -> int:
        """0 if the lock can be had."""
        child = os.fork()
        if child == 0:
            result = 1
            with contextlib.suppress(BaseException):
                os.setgroups(groups)
                os.setgid(user)  # a group of its own, as on Debian
                os.setuid(user)
                lock = script.FileLock(str(path), str(jobs))
                result = 0 if lock.acquire(0) else 2
            os._exit(result)
        return os.WEXITSTATUS(os.waitpid(child, 0)[1])

    for first, second in ((one, two), (two, one)):
        path.unlink() if path.exists() else None
        assert as_user(first, [group]) == 0
        assert (path.stat().st_gid, mode_of(path)) == (group, 0o660)
        assert as_user(second, [group]) == 0
        assert as_user(NOBODY, []) == 1
        with pytest.raises(AssertionError, match="PermissionError"), held(path, NOBODY):
            pass


# Children


def forked(script: Any) -> int:
    """A child that only sleeps."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            time.sleep(600)
        os._exit(0)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("ends", ["closes", "is killed"])
def test_a_child_lets_go(script, tmp_path, ends):
    """The parent keeps its locks meanwhile, and at its end they are free."""
    lock, other = (script.FileLock(str(tmp_path / "lock")) for _ in range(2))
    said, says = os.pipe()
    parent = os.fork()
    if parent == 0:
        with contextlib.suppress(BaseException):
            assert lock.acquire()
            os.write(says, b"%d\n" % forked(script))
            if ends == "closes":
                until(lambda: (tmp_path / "close").exists())
                lock.close()
                (tmp_path / "closed").touch()
            time.sleep(600)
        os._exit(1)
    os.close(says)
    with open(said) as lines:
        child = int(lines.readline())
    try:
        until(lambda: str(tmp_path / "lock") not in open_files(child), 10, "the child has let go")
        assert not other.acquire(0), "the parent has it"
        if ends == "closes":
            (tmp_path / "close").touch()
            until(lambda: (tmp_path / "closed").exists(), 10, "it has closed")
        else:
            end(parent)
        assert other.acquire(0)
    finally:
        os.kill(child, signal.SIGKILL)
        if ends == "closes":
            end(parent)
        other.close()


def test_a_lock_that_is_closed_is_free_whoever_has_a_copy(script, tmp_path):
    """As a child of a library that forks by itself."""
    copies: List[int] = []

    def open_and_copy(*arguments: Any) -> int:
        file = os.open(*arguments)
        copies.append(os.dup(file))
        return file

    lock, other = (script.FileLock(str(tmp_path / "lock")) for _ in range(2))
    script.os = WrappedOs(open=open_and_copy)
    assert lock.acquire()
    (copy,) = copies
    lock.close()
    assert other.acquire(0)
    other.close()
    os.close(copy)


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


# In a webui


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
import os, signal

FOLDER = {folder!r}
pwrite = os.pwrite

def stop(file, data, position):
    written = pwrite(file, data, position)
    jobs, switch = (os.path.join(FOLDER, name) for name in (os.path.join("data", "jobs.json"), "stop"))
    if os.path.exists(switch) and os.path.samestat(os.fstat(file), os.stat(jobs)):
        os.unlink(switch)
        os.kill(os.getpid(), signal.SIGSTOP)
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
