"""What differs on Windows and macOS works where they are stood in for. That it is in one place is in test_style.py."""

from __future__ import annotations

import contextlib
import errno
import io
import ntpath
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List

import pytest
from inside import (
    a_job,
    alive,
    an_answer,
    files_are_whole,
    ids,
    load_script,
    make_tracker,
    read_jobs,
    until,
    when_ended,
    within,
)
from journal import lines

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="stands in for Windows on Linux")
if sys.platform == "linux":
    from windows import load_on_windows

# Windows


@pytest.fixture
def script() -> Any:
    return load_on_windows()


@pytest.fixture
def tracker(script, tmp_path):
    """`tracker()` is one on the test's folder. At the end its threads end, too."""
    script.Housekeeper.LOOK_EVERY = 0.05
    made: List[Any] = []

    def make(**environ: str) -> Any:
        made.append(make_tracker(script, tmp_path / "data", **{"TRACKER_RETENTION": "off", **environ}))
        until(lambda: made[-1].housekeeper.next_purge, what="the housekeeper has looked for jobs left behind")
        return made[-1]

    yield make
    for one in made:
        end(one)


def end(tracker: Any) -> None:
    tracker.close().result(60)


def look_for_left(tracker: Any) -> None:
    """Looks for jobs left behind, as another webui does that starts on the same folder."""
    another = tracker()
    assert another.store.idle()
    end(another)


def generate(script: Any, tracker: Any, images: int = 2, age: float = 0, fails: bool = False) -> Any:
    """A job's whole way; returns the job as it ended."""
    job = script.Job(tracker.store.reserve_id(), "txt2img", script.PENDING, int(time.time() - age), None, "a cat")
    tracker.accept(job, lambda: True, b"").result()
    tracker.start(job.id)
    if fails:
        tracker.fail(job.id, "as it happens")
    else:
        tracker.finish(job.id, an_answer(script, job.id, images))
    return when_ended(tracker, job.id)


def test_it_is_stood_in_for(script, tmp_path):
    """The stand-in refuses what Windows does: else these tests would show nothing."""
    assert script.fcntl is None and script.LOCKS_OPEN_FILES and script.BINARY and not script.NO_FOLLOW
    path = str(tmp_path / "one")
    with pytest.raises(AssertionError, match="text"):
        script.os.open(path, os.O_RDWR | os.O_CREAT)
    file = script.os.open(path, os.O_RDWR | os.O_CREAT | script.BINARY)
    Path(path + "2").touch()
    for refused in (
        lambda: script.os.unlink(path),
        lambda: script.os.replace(path, path + "3"),
        lambda: script.os.replace(path + "2", path),
        lambda: script.os.open(str(tmp_path), os.O_RDONLY | script.BINARY),
    ):
        with pytest.raises(PermissionError):
            refused()
    assert script.os.path.exists(str(tmp_path / "ONE"))
    os.close(file)
    script.os.unlink(str(tmp_path / "One"))
    assert not os.path.exists(path)


def test_from_acceptance_to_the_end(script, tracker):
    one = tracker()
    jobs = [generate(script, one, images=number % 4) for number in range(8)]
    failed = generate(script, one, fails=True)
    assert {job.status for job in jobs} == {"Completed"}
    assert all(files_are_whole(one, job) for job in jobs)
    assert ids(script, one) == [job.id for job in [*jobs, failed]][::-1]
    assert ids(script, one, status="Failed", q="CAT") == [failed.id]
    assert one.delete(jobs[0].id) and one.get(jobs[0].id) is None
    end(one)
    again = tracker()
    assert ids(script, again) == [job.id for job in [*jobs[1:], failed]][::-1]
    assert all(files_are_whole(again, job) for job in jobs[1:])
    assert set(read_jobs(Path(again.store.path))) >= {job.id for job in jobs}


def test_settings(script, tmp_path):
    folder = tmp_path / "extension"
    folder.mkdir()
    settings = script.Settings(str(folder), {})
    settings.save(enabled=True, retention_days=3)
    assert script.Settings(str(folder), {}).retention_days == 3
    (folder / "config.json").write_text("{")
    settings.refresh()
    assert settings.enabled is True and settings.retention_days == 3, "what was known of it holds"
    settings.save(enabled=False)
    assert settings.enabled is False and len(list(folder.glob("config.json.damaged-*"))) == 1
    assert (folder / "config.json").exists()


def test_compaction_while_others_read(script, tracker, caplog):
    """Also of a file in which somebody has turned the lines around."""
    script.JobStore.MIN_DEAD_ENTRIES = 20
    one = tracker()
    jobs = [generate(script, one, images=1)]
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            found = set(ids(script, one))
            missing.extend(job.id for job in known if job.id not in found)

    missing: List[str] = []
    known = list(jobs)
    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    before = os.stat(one.store.path).st_ino
    try:
        for _ in range(30):
            jobs.append(generate(script, one, images=1))
            one.delete(generate(script, one, images=0).id)
        until(lambda: os.stat(one.store.path).st_ino != before, what="the compaction")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not missing
    assert sorted(ids(script, one)) == sorted(job.id for job in jobs)
    until(lambda: not list(Path(one.store.path).parent.glob("*.part")), what="a compaction that is under way")
    assert "could not be compacted" not in caplog.text


def test_one_job_of_many_is_found_before_all_are_indexed(script, tmp_path, monkeypatch, dice):
    jobs = [a_job(script, dice, status="Completed") for _ in range(500)]
    (tmp_path / "jobs.json").write_bytes(lines(script, *jobs))
    monkeypatch.setattr(script.JobStore, "LONG", 1 << 16)
    gate, pause = threading.Event(), script.JobStore._pause
    monkeypatch.setattr(script.JobStore, "_pause", lambda store: pause(store) or gate.wait(60))
    store = script.JobStore(str(tmp_path))
    try:
        assert within(20, store.get, jobs[-1].id) == jobs[-1]
    finally:
        gate.set()
        store.close()


def test_purge_and_recovery(script, tracker, tmp_path):
    one = tracker()
    old = [generate(script, one, age=3 * 86400) for _ in range(3)]
    young = generate(script, one)
    left = script.Job(one.store.reserve_id(), "txt2img", script.PENDING, int(time.time()), None, "left")
    one.store.put(left._replace(owner="00000000"), new=True).result()
    one.settings.retention_days = 1
    assert one.housekeeper.purge().jobs == len(old)
    assert sorted(ids(script, one)) == sorted([young.id, left.id])
    end(one)
    one = tracker()
    assert one.get(left.id).status == "Failed"
    day = tmp_path / "data" / "images" / one.images.day_of(young)
    assert sorted(path.name[:8] for path in day.iterdir()) == [young.id] * 3
    assert not (tmp_path / "data" / "images" / one.images.day_of(old[0])).exists(), "an empty folder"


def test_an_image_that_is_being_fetched_goes_with_a_later_purge(script, tracker):
    one = tracker()
    job = generate(script, one, images=1)
    pieces = one.images.read(job.images[0].name)
    next(pieces)
    assert one.delete(job.id)
    assert one.images.size(job.images[0].name) and one.get(job.id) is None
    pieces.close()
    script.ImageStore.ORPHAN_AGE = -1
    assert one.housekeeper.purge().images == 1
    assert one.images.size(job.images[0].name) is None


def test_two_spellings_of_an_id(script, tracker, monkeypatch):
    """They would name the same files."""
    script.JobStore.SPARE_IDS = 1
    one = tracker()
    first = generate(script, one)
    other = first.id.swapcase()
    offered = iter([other, first.id, other.lower(), "AnOther0", "AnOther1", "AnOther2", "AnOther3"])
    one.store.reserve_id()  # which was looked for ahead of time
    monkeypatch.setattr(script, "new_id", lambda: next(offered))
    one.recover().result()  # another one is looked for
    second = generate(script, one)
    assert second.id == "AnOther0"
    assert one.get(other) is None or other == first.id
    assert files_are_whole(one, first) and files_are_whole(one, second)


def test_a_program_that_holds_jobs_json_open(script, tracker, caplog):
    """It is not compacted then, and goes on as it is; nothing is lost, and the attempt leaves nothing behind."""
    script.JobStore.MIN_DEAD_ENTRIES = 5
    script.JobStore.COMPACT_RETRY = 0.2
    one = tracker()
    first, before = generate(script, one), os.stat(one.store.path).st_ino
    with open(one.store.path, "rb"):
        for _ in range(10):
            one.delete(generate(script, one, images=0).id)
        until(lambda: "could not be compacted" in caplog.text)
        second = generate(script, one)
        assert sorted(ids(script, one)) == sorted([first.id, second.id])
        until(lambda: not list(Path(one.store.path).parent.glob("*.part")))
        assert os.stat(one.store.path).st_ino == before
    until(lambda: generate(script, one, fails=True) and os.stat(one.store.path).st_size < 30_000, what="a compaction")
    time.sleep(0.3)
    jobs = {first.id, second.id} | set(ids(script, one))
    assert set(alive(Path(one.store.path))) == jobs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_on_one_folder(script, tracker, tmp_path):
    """Each sees what the other has acknowledged; a purge goes for both; what the dead one left is Failed, once."""
    script.JobStore.MIN_DEAD_ENTRIES = 10
    script.JobStore.COMPACT_RETRY = 0.1
    said, says = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            other = make_tracker(script, tmp_path / "data", TRACKER_RETENTION="off")
            for number in range(40):
                job = generate(script, other, images=1, age=3 * 86400 * (number % 4 == 0))
                assert job.status == "Completed"
                os.write(says, f"{job.id}\n".encode())
            left = script.Job(other.store.reserve_id(), "txt2img", script.PENDING, int(time.time()), None, "left")
            other.accept(left, lambda: True, b"").result()
            other.start(left.id)
            until(lambda: '"Processing"' in Path(other.store.path).read_text().split(left.id)[-1])
            os.write(says, f"left {left.id}\n".encode())
            time.sleep(600)
        os._exit(1)
    os.close(says)
    try:
        one = tracker()
        mine, theirs, left = [], [], ""
        with open(said) as lines:
            for line in lines:
                word, _, rest = line.strip().partition(" ")
                if word == "left":
                    left = rest
                    break
                assert one.get(word) is not None, f"{word} is not seen"
                theirs.append(word)
                mine.append(generate(script, one, images=1).id)
        assert one.get(left).status == "Processing"
        look_for_left(tracker)
        assert one.get(left).status == "Processing", "its process lives"
        assert sorted(ids(script, one)) == sorted([*mine, *theirs, left])
        one.settings.retention_days = 1
        assert one.housekeeper.purge().jobs == 10
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    look_for_left(tracker)
    assert one.get(left).status == "Failed"
    kept = set(ids(script, one))
    assert kept == {*mine, left} | {theirs[index] for index in range(40) if index % 4}
    assert all(files_are_whole(one, one.get(job_id)) for job_id in kept - {left})
    end(one)
    again = tracker()
    script.JobStore.MIN_DEAD_ENTRIES = 0
    assert set(ids(script, again)) == kept == set(alive(Path(again.store.path)))
    assert not list(Path(again.store.path).parent.glob("*.damaged-*"))


def test_a_drive_that_is_not_there(script):
    """It is an OSError, which the store and the tab can say, and no endless search for a folder above."""

    def refuse(path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        raise FileNotFoundError(errno.ENOENT, "the system cannot find the path", path)

    script.os.path, script.os.makedirs = ntpath, refuse
    for path in ("Z:\\job-tracker\\data", "Z:\\", "\\\\nas\\share\\job-tracker"):
        with pytest.raises(FileNotFoundError):
            script.make_folder(path)


# macOS, and disks of others


@pytest.mark.parametrize("kind, expected", [("ext4", False), ("overlay", False), ("nfs4", True), ("fuse.sshfs", True)])
def test_a_network_drive_is_known_by_its_mount(tmp_path, kind, expected):
    """Where SQLite's shared memory would not be shared with the other machines."""
    script = load_script()
    device = os.stat(str(tmp_path)).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    lines = ["1 0 0:0 / /none rw - tmpfs none rw", f"2 1 {number} /a\\040b /c rw,noatime shared:1 - {kind} host:/a rw"]
    script.open = lambda path, **_: io.StringIO("\n".join(lines)) if path == "/proc/self/mountinfo" else None
    assert script.is_on_network(str(tmp_path)) is expected
    assert script.is_on_network(str(tmp_path / "none")) is False


class Fcntl:
    """`fcntl`, as macOS has it, or one that fails."""

    LOCK_EX, LOCK_NB, LOCK_UN, F_FULLFSYNC = 2, 4, 8, 51

    def __init__(self, error: int = 0):
        self.error = error
        self.calls: List[int] = []

    def fcntl(self, file: int, command: int) -> None:
        self._answer(command)

    flock = fcntl

    def _answer(self, command: int) -> None:
        self.calls.append(command)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


class Syncs:
    """`os`, with a fsync that is counted or fails."""

    def __init__(self, error: int = 0):
        self.error = error
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, file: int) -> None:
        self.count += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


def on_macos(error: int = 0) -> Any:
    script = load_script()
    script.fcntl, script.os = Fcntl(error), Syncs()
    return script


def test_macos_empties_the_drives_own_memory(tmp_path):
    script = on_macos()
    script.replace_file(str(tmp_path / "config.json"), b"{}")
    assert script.fcntl.calls == [51, 51] and script.os.count == 0, "the file, the folder"


def test_a_disk_that_cannot(tmp_path):
    for error in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
        script = on_macos(error)
        script.replace_file(str(tmp_path / "config.json"), b"{}")
        assert script.os.count == 2, "by fsync then"
    script = on_macos(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        script.replace_file(str(tmp_path / "config.json"), b"{}")
    assert script.os.count == 0 and (tmp_path / "config.json").read_bytes() == b"{}"


def test_everything_is_synced_by_it(tmp_path):
    """A job's whole way, as macOS does it."""
    script = on_macos()
    tracker = make_tracker(script, tmp_path / "data", TRACKER_RETENTION="off")
    job = generate(script, tracker)
    assert files_are_whole(tracker, job)
    end(tracker)
    assert script.fcntl.calls.count(51) > 8 and script.os.count == 0


@pytest.mark.parametrize("error", ["ENOLCK", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"])
def test_a_mount_without_locks(tmp_path, error):
    """One webui alone is as safe as ever."""
    script = load_script()
    script.fcntl = Fcntl(getattr(errno, error))
    lock = script.FileLock(str(tmp_path / "lock"))
    assert lock.try_acquire() and lock.try_acquire()
    lock.release()
    lock.close()


@pytest.mark.parametrize("error", ["EWOULDBLOCK", "EACCES"])
def test_a_lock_that_another_holds(tmp_path, error):
    script = load_script()
    script.fcntl = Fcntl(getattr(errno, error))
    lock = script.FileLock(str(tmp_path / "lock"))
    assert lock.try_acquire() is False
    assert script.fcntl.calls == [6], "one try"
    assert lock.try_acquire(0.05) is False
    assert set(script.fcntl.calls) == {6} and len(script.fcntl.calls) > 5, "many tries, none that would hang"
    lock.close()


@pytest.mark.parametrize("seconds", [5, 0])
def test_a_lock_that_fails(tmp_path, seconds):
    script = load_script()
    script.fcntl = Fcntl(errno.EIO)
    lock = script.FileLock(str(tmp_path / "lock"))
    with pytest.raises(OSError, match="Input/output"):
        lock.try_acquire(seconds)
    lock.close()


@pytest.mark.parametrize("error, raised", [("EINVAL", False), ("ENOTSUP", False), ("EIO", True), ("ENOSPC", True)])
def test_a_folder_that_cannot_be_synced(tmp_path, error, raised):
    script = load_script()
    script.os = Syncs(getattr(errno, error))
    with pytest.raises(OSError) if raised else contextlib.nullcontext():
        script.sync_folder(str(tmp_path))
    assert script.os.count == 1


def test_half_reads_and_half_writes_of_windows(tmp_path):
    """Where a file has one position, threads do not disturb each other."""
    script = load_on_windows()
    file = script.os.open(str(tmp_path / "file"), os.O_RDWR | os.O_CREAT | script.BINARY)
    found: Dict[int, bytes] = {}

    def work(number: int) -> None:
        for turn in range(200):
            script.write_at(file, bytes([number]) * 50, number * 50)
            data = script.read_at(file, 50, number * 50)
            if data != bytes([number]) * 50:
                found[turn] = data

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(file)
    assert not found
