"""Locks between processes: who may hold them, for how long one is waited for, and what a child that is forked keeps."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Any, Iterator, List

import pytest
from disks import NOBODY, ROOT, held
from inside import WrappedOs, a_job, load_script, until

from harness import open_files

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs flock")
SLACK = 4.0  # what a busy machine adds


@contextlib.contextmanager
def umask_of(umask: int) -> Iterator[None]:
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# One at a time


def test_locks(script, tmp_path):
    """One at a time, also within the process; whoever does not wait is told."""
    path = str(tmp_path / "lock")
    one, two = script.FileLock(path), script.FileLock(path)
    with one:
        assert not two.try_acquire()
    assert two.try_acquire()
    taken = []
    thread = threading.Thread(target=lambda: taken.append(one.try_acquire(5)))
    thread.start()
    time.sleep(0.05)
    assert not taken
    two.close()
    thread.join(10)
    assert taken == [True]
    one.close()


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed")
def test_a_lock_that_was_tidied_away_still_locks(script, tmp_path):
    path = tmp_path / "lock"
    one, two = script.FileLock(str(path)), script.FileLock(str(path))
    assert one.try_acquire()
    one.release()
    path.unlink()
    assert two.try_acquire()
    assert not one.try_acquire()
    two.close()
    assert one.try_acquire()
    one.close()


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
def test_a_lock_before_there_is_a_jobs_json(tmp_path, umask, mode):
    with umask_of(umask):
        script = load_script()
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
                result = 0 if lock.try_acquire() else 2
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
            assert lock.try_acquire()
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
        assert not other.try_acquire(), "the parent has it"
        if ends == "closes":
            (tmp_path / "close").touch()
            until(lambda: (tmp_path / "closed").exists(), 10, "it has closed")
        else:
            end(parent)
        assert other.try_acquire()
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
    assert lock.try_acquire()
    (copy,) = copies
    lock.close()
    assert other.try_acquire()
    other.close()
    os.close(copy)
