"""What is removed by itself, and what never is, whatever the clock says."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from inside import WrappedOs, an_answer, ids, set_constants

from harness import until

DAY = 86400


def old(path, content=b"x" * 10, hours=2.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    moment = time.time() - hours * 3600
    os.utime(str(path), (moment, moment))
    return path


@pytest.fixture
def tracker(script, new_tracker):
    """`tracker(...)` is one without a webui, whose housekeeping looks often."""
    set_constants(script, LOOK_EVERY=0.05)
    return new_tracker


@pytest.fixture
def add(script):
    """Puts a job of some age into a tracker's store, with an image of 100 bytes and an answer of 20."""

    def put(tracker, job_id, days, status="Completed"):
        job = script.Job(
            job_id, "txt2img", status, int(time.time() - days * DAY), "127.0.0.1", "a cat", owner="00000000"
        )
        if status == "Completed":
            job = tracker.images.save(job, script.Answer([b"A" * 136], b'{"images":[] ,"a":1}'))
        elif status in ("Pending", "Processing"):
            job = job._replace(owner=tracker.store.owner)
        tracker.store.put(job, new=True).result()
        return job

    return put


@pytest.mark.every_store
def test_purge(script, tracker, add):
    one = tracker(TRACKER_RETENTION="off")
    until(lambda: one.housekeeper.next_purge)
    add(one, "OLDER000", 31)
    add(one, "FAILED00", 31, "Failed")
    add(one, "PENDING0", 400, "Pending")
    add(one, "PROCESS0", 400, "Processing")
    young = add(one, "YOUNGER0", 29)
    assert one.housekeeper.purge() == script.Purged(0, 0, 0)
    one.settings.retention_days = 30.0
    assert one.housekeeper.purge() == script.Purged(2, 1, 122)
    assert set(ids(script, one)) == {"PENDING0", "PROCESS0", "YOUNGER0"}
    assert one.images.size(young.images[0].name) == 102
    one.settings.retention_days = 0.5
    assert one.housekeeper.purge() == script.Purged(1, 1, 122)
    assert one.housekeeper.purge() == script.Purged(0, 0, 0)
    assert os.listdir(one.images.folder) == []


@pytest.mark.every_store
def test_outlook(script, tracker, add):
    """What a purge would remove is told, and nothing removed."""
    one = tracker(TRACKER_RETENTION="off")
    until(lambda: one.housekeeper.next_purge)
    outlook = one.housekeeper.outlook
    add(one, "YOUNGER0", 29)
    assert outlook() == script.Outlook(None)
    one.settings.retention_days = 30.0
    assert outlook() == script.Outlook(30.0, 0, False)
    add(one, "PENDING0", 400, "Pending")
    assert outlook() == script.Outlook(30.0, 0, True)
    add(one, "OLDER000", 31)
    add(one, "FAILED00", 31, "Failed")
    assert outlook() == script.Outlook(30.0, 2, True)
    assert len(ids(script, one)) == 4
    assert one.housekeeper.purge().jobs == 2


def test_why_a_purge_removes_no_job(script, monkeypatch):
    def why(*outlook):
        return script.why_no_job(script.Outlook(*outlook), script.JobStore.now())

    assert why(None) == "Retention is off: all jobs are kept."
    assert why(7.0) == "No job is older than 7 days."
    assert why(1.0) == "No job is older than 1 day."
    assert why(0.5, 0, True) == "The jobs older than 0.5 days still wait or run."
    monkeypatch.setattr(script.time, "time", lambda: 86400.0)
    assert why(7.0) == "The webui's clock says 1970-01-02, so no job is old."


def test_orphans(script, tracker, add, tmp_path):
    one = tracker(TRACKER_RETENTION="off")
    until(lambda: one.housekeeper.next_purge)
    job = add(one, "KEPT0000", 0)
    day = tmp_path / "images" / "2025-01-12"
    gone = [
        old(day / "ORPHAN00_0.png"),
        old(day / "ORPHAN00.json"),
        old(day / "ORPHAN00_1.0a1b2c3d.part"),
        old(tmp_path / "images" / one.images.day_of(job) / "KEPT0000_7.png"),
    ]
    kept = [
        old(day / "YOUNG000_0.png", hours=0.9),
        old(day / "notes of the user.txt"),
        *(old(day / name) for name in ("vacation.jpg", "12345678.png", "notes001.txt", "backup01.zip")),
        old(tmp_path / "images" / "holiday" / "ORPHAN00_0.png"),
    ]
    for image in job.images:
        old(tmp_path / "images" / image.name, b"x" * 100)
    assert one.housekeeper.purge() == script.Purged(0, 2, 40)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in kept)
    assert one.housekeeper.kept_orphans() == (1, 0)  # a young one
    assert one.images.size(job.images[0].name) == 100


def test_many_images_that_jobs_json_does_not_know_are_kept(script, tracker, add, tmp_path, caplog):
    """No crash leaves so many: jobs.json was lost, or images/ was restored before it."""
    lost = [old(tmp_path / "images" / "2025-01-12" / f"LOST{number:04}_0.png") for number in range(101)]
    one = tracker(TRACKER_RETENTION="off")
    until(lambda: one.housekeeper.next_purge)
    assert all(path.exists() for path in lost)
    assert "101 jobs in images/ are not in jobs.json" in caplog.text
    job = add(one, "KEPT0000", 0)
    old(tmp_path / "images" / one.images.day_of(job) / "KEPT0000_7.png")
    assert one.housekeeper.purge() == script.Purged(0, 1, 10)
    assert one.housekeeper.kept_orphans() == (0, 101)
    lost[0].unlink()
    assert one.housekeeper.purge() == script.Purged(0, 100, 1000)


def test_folders_that_cannot_be_searched(script, tracker, tmp_path, caplog):
    """As lost+found, where images/ is a drive of its own: what cannot be searched keeps nothing else."""
    failures = {"lost+found": PermissionError, "2025-01-10": PermissionError, "2025-01-11": FileNotFoundError}

    def listdir(path):
        if os.path.basename(path) in failures:
            raise failures[os.path.basename(path)](errno.EACCES, "Permission denied", path)
        return os.listdir(path)

    for name in failures:
        (tmp_path / "images" / name).mkdir(parents=True)
    script.os = WrappedOs(listdir=listdir)
    orphan = old(tmp_path / "images" / "2025-01-12" / "ORPHAN00_0.png")
    one = tracker(TRACKER_RETENTION="off")
    until(lambda: one.housekeeper.next_purge)
    assert not orphan.exists()
    assert "2025-01-10 cannot be searched" in caplog.text
    assert "lost+found" not in caplog.text and "2025-01-11" not in caplog.text


def test_what_was_set_aside_cannot_be_read(script, tracker, tmp_path):
    """Nobody can tell whose images it has, so they are kept, and the purge ends."""
    aside = tmp_path / "jobs.json.damaged-20250112-100000"
    aside.write_text("")

    def open_by_rights(path, *arguments, **options):
        if path == str(aside):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open(path, *arguments, **options)

    script.open = open_by_rights
    image = old(tmp_path / "images" / "2025-01-12" / "LOSTJOB0_0.png")
    one = tracker(TRACKER_RETENTION="off")
    until(lambda: one.housekeeper.next_purge)
    assert image.exists()


def test_images_are_kept_while_a_damaged_jobs_json_is_there(tracker, tmp_path, script):
    one = tracker()
    until(lambda: one.housekeeper.next_purge)
    image = old(tmp_path / "images" / "2025-01-12" / "LOSTJOB0_0.png")
    aside = tmp_path / "jobs.json.damaged-20250112-100000"
    aside.write_text("{")
    assert one.housekeeper.purge() == script.Purged(0, 0, 0)
    aside.unlink()
    assert one.housekeeper.purge() == script.Purged(0, 1, 10)
    assert not image.exists()


def test_a_purge_during_the_start_keeps_images_of_a_damaged_record(script, tracker, tmp_path):
    """It sees what is set aside though the file is read late."""

    def pread(*arguments):
        time.sleep(0.1)
        return os.pread(*arguments)

    script.os = WrappedOs(pread=pread)
    image = old(tmp_path / "images" / "2025-01-12" / "LOSTJOB0_0.png")
    (tmp_path / "jobs.json").write_text('{\n"LOSTJOB0": {"id": "LOSTJOB0", "type"\n}\n')
    one = tracker(TRACKER_RETENTION="off")
    assert one.housekeeper.purge() == script.Purged(0, 0, 0)
    assert list(tmp_path.glob("jobs.json.damaged-*"))
    assert image.exists()


def test_no_link_is_followed(script, tracker, tmp_path):
    one = tracker()
    until(lambda: one.housekeeper.next_purge)
    outside = old(tmp_path / "elsewhere" / "OUTSIDE0_0.png")
    (tmp_path / "images").mkdir(exist_ok=True)
    try:
        (tmp_path / "images" / "2025-01-12").symlink_to(outside.parent, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    assert one.housekeeper.purge() == script.Purged(0, 0, 0)
    assert outside.exists()


@pytest.mark.every_store
def test_at_start_and_by_the_clock(script, tracker, add, monkeypatch):
    first = tracker(TRACKER_RETENTION="off")
    add(first, "OLDER000", 8)
    add(first, "YOUNGER0", 6)
    first.close()
    monkeypatch.setattr(script.Housekeeper, "PURGE_EVERY", 0.3)
    second = tracker(TRACKER_RETENTION="7")
    until(lambda: set(ids(script, second)) == {"YOUNGER0"}, what="the purge at the start")
    add(second, "OLDER001", 8)
    until(lambda: set(ids(script, second)) == {"YOUNGER0"}, what="the next purge")
    assert until(lambda: 0 < second.housekeeper.next_purge - time.monotonic() < 1, what="it is told")


@pytest.mark.every_store
def test_one_purge_of_many(script, tracker, add):
    one = tracker(TRACKER_RETENTION="off")
    until(lambda: one.housekeeper.next_purge)
    jobs = [
        script.Job(f"J{number:07}", "txt2img", "Failed", int(time.time() - 40 * DAY), None, "")
        for number in range(1234)
    ]
    for job in jobs[:-1]:
        one.store.put(job, new=True)
    one.store.put(jobs[-1], new=True).result()
    one.settings.retention_days = 30.0
    assert one.housekeeper.purge() == script.Purged(1234, 0, 0)
    assert set(ids(script, one)) == set()


def test_retention_that_is_turned_off_during_a_purge(script, tracker, add):
    one = tracker(TRACKER_RETENTION="")
    until(lambda: one.housekeeper.next_purge)
    for number in range(300):
        one.store.put(script.Job(f"J{number:07}", "txt2img", "Failed", int(time.time() - 40 * DAY), None, ""), new=True)
    add(one, "YOUNGER0", 1)

    def pwrite(*arguments):
        if not changed:  # the first jobs are being removed
            changed.append(True)
            one.settings.save(retention_days=None)
        return os.pwrite(*arguments)

    changed = []
    script.os = WrappedOs(pwrite=pwrite)
    assert one.housekeeper.purge().jobs == one.REMOVED_AT_ONCE, "the rest is spared"


@pytest.mark.parametrize("text", ['{"enabled": true, "retention_days": 365,}', "", None])
def test_nothing_goes_while_config_json_cannot_be_read(script, tracker, add, tmp_path, text):
    """It may say that the jobs are to be kept. What was known of it is shown meanwhile, and Purge Now goes by it."""
    one = tracker(TRACKER_RETENTION="")
    until(lambda: one.housekeeper.next_purge)
    add(one, "OLDER000", 40)
    add(one, "YOUNGER0", 1)
    path = tmp_path / "config.json"
    path.unlink() if text is None else path.write_text(text)
    one.settings.refresh()
    assert one.settings.retention_days == 30
    assert one.housekeeper.purge(asked_for=False).jobs == 0
    assert one.housekeeper.purge().jobs == 1


# By clocks that are wrong


@pytest.fixture
def tracker_for(new_tracker: Callable[..., Any]) -> Callable[..., Any]:
    def make(retention: str = "30") -> Any:
        made = new_tracker(TRACKER_RETENTION=retention)
        until(lambda: made.housekeeper.next_purge, what="the purge at the start")
        return made

    return make


def purge(script: Any, tracker: Any, ahead: float = 0.0, running: float = 0.0) -> Any:
    """A purge that nobody asked for, by a clock that is ahead by so many days, and after so many days of running."""

    class Time:
        def __getattr__(self, name: str) -> Any:
            return getattr(time, name)

        def time(self) -> float:
            return time.time() + ahead * DAY

        def monotonic(self) -> float:
            return time.monotonic() + running * DAY

    script.time = Time()
    try:
        return tracker.housekeeper.purge(asked_for=False)
    finally:
        script.time = time


def test_a_clock_that_was_never_set(script, tracker_for, add, caplog):
    one = tracker_for()
    add(one, "OLDER000", 40)
    add(one, "YOUNGER0", 1)
    orphan = one.images.save(script.Job("ORPHAN00", "txt2img", "Failed", 0, None, ""), an_answer(script, "ORPHAN00", 1))
    now = time.time() / DAY
    for day in (0.5, 18261):  # 1970, and the last of 2019
        assert purge(script, one, day - now) == script.Purged()
    assert "nothing is purged" in caplog.text
    assert set(ids(script, one)) == {"OLDER000", "YOUNGER0"} and one.images.size(orphan.images[0].name)
    assert purge(script, one).jobs == 1
    assert set(ids(script, one)) == {"YOUNGER0"}


def test_all_are_too_old_at_the_start(script, tracker_for, add, tmp_path):
    """Either the clock is ahead, or nobody has generated for so long. Only a younger one tells."""
    first = tracker_for("off")
    add(first, "OLDER000", 50)
    add(first, "OLDER001", 40)
    first.close()
    second = tracker_for()
    assert set(ids(script, second)) == {"OLDER000", "OLDER001"} and second.housekeeper.kept_for_clock == 2
    add(second, "YOUNGER0", 0)
    assert purge(script, second) == script.Purged(), "the young one may be of the same wrong clock"
    assert purge(script, second, 40).jobs == 0, "so it is when the clock jumps"
    second.close().result(60)
    time.sleep(1.1)  # the times of jobs are whole seconds
    third = tracker_for()
    assert set(ids(script, third)) == {"YOUNGER0"}, "a start that finds a younger one believes the clock"
    assert third.housekeeper.kept_for_clock == 0


def test_a_webui_that_is_started_now_and_then(script, tracker_for, add):
    """Its pauses are longer than its retention. What was too old by the time of the last job goes all the same."""
    for number in range(4):
        one = tracker_for("1")
        kept = set(ids(script, one))
        assert kept == ({f"J{number - 1:07}"} if number else set())
        one.close().result(60)
        age(one, 2)  # as if two days had passed
        one = tracker_for("off")
        add(one, f"J{number:07}", 2)
        one.close().result(60)


def age(tracker: Any, days: float) -> None:
    """Makes all jobs older."""
    path = Path(tracker.settings.data_folder) / "jobs.json"
    records = json.loads(path.read_text())
    for record in records.values():
        if record:
            record["timestamp"] -= int(days * DAY)
    path.write_text(json.dumps(records))


def test_what_grows_too_old_while_the_webui_runs(script, tracker_for, add):
    """All of them may go: time has passed by a clock that nobody sets."""
    one = tracker_for()
    add(one, "OLDER000", 29.9)
    assert purge(script, one, ahead=1, running=2).jobs == 1
    assert set(ids(script, one)) == set()


@pytest.mark.every_store
def test_asked_for_all_that_is_old_goes(script, tracker_for, add):
    first = tracker_for("off")
    add(first, "OLDER000", 40)
    first.settings.retention_days = 30.0
    assert purge(script, first).jobs == 0
    assert first.housekeeper.purge().jobs == 1


def test_times_on_disk(script, tracker_for, tmp_path):
    one = tracker_for("off")
    job = script.Job(one.store.reserve_id(), "txt2img", script.PENDING, int(time.time()), None, "")
    one.accept(job, lambda: True, b"").result()
    one.start(job.id)
    one.fail(job.id, "no")
    until(lambda: one.get(job.id).ended)
    record = json.loads((tmp_path / "jobs.json").read_text())[job.id]
    assert record["timestamp"] <= record["started"] <= record["finished"] <= time.time() + 1


# What goes by TRACKER_MAX_GB: three jobs of `add` have 366 bytes

TWO = "3e-7"  # GB


@pytest.fixture
def limited(script, tracker):
    """`limited(...)` is a tracker that has looked around once, and looks again and again."""

    def make(limit: str = TWO, **environ: str) -> Any:
        made = tracker(TRACKER_MAX_GB=limit, **environ)
        until(lambda: made.housekeeper.next_purge)
        return made

    return make


def test_the_oldest_go(script, limited, add, caplog):
    """By the order in which they were accepted, whatever their times; also those without files."""
    caplog.set_level("INFO", "job_tracker")
    one = limited()
    add(one, "FAILED00", 1, "Failed")
    for number, days in enumerate((1, 3)):
        add(one, f"J{number:07}", days)
    time.sleep(0.3)
    assert ids(script, one) == ["J0000001", "J0000000", "FAILED00"], "it is not more than the limit"
    assert "TRACKER_MAX_GB" not in caplog.text
    gone = one.get("J0000000")
    add(one, "J0000002", 2)
    until(lambda: len(ids(script, one)) < 4)
    assert ids(script, one) == ["J0000002", "J0000001"]
    until(lambda: one.images.size(gone.images[0].name) is None, what="its files are gone")
    assert "TRACKER_MAX_GB is 3e-07" in until(lambda: caplog.text)
    assert until(lambda: "had 366 bytes. Removed the oldest: 2 jobs, 1 image, 122 bytes" in caplog.text)
    assert one.store.ended_bytes() == 244


@pytest.mark.every_store
def test_the_newest_stays_whatever_its_size(script, limited, add, caplog):
    one = limited("1e-9")
    for number in range(3):
        add(one, f"J{number:07}", 3 - number)
    until(lambda: ids(script, one) == ["J0000002"])
    time.sleep(0.3)
    assert ids(script, one) == ["J0000002"] and one.images.size(one.get("J0000002").images[0].name) == 102


@pytest.mark.every_store
def test_what_has_not_ended_neither_counts_nor_goes(script, limited, add):
    one = limited()
    jobs = [add(one, name, 9, status) for name, status in (("PENDING0", "Pending"), ("PROCESS0", "Processing"))]
    for job in jobs:
        one.store.put(job._replace(bytes=10**6)).result()
    for number in range(2):
        add(one, f"J{number:07}", 1)
    time.sleep(0.3)
    assert len(ids(script, one)) == 4
    one.store.put(one.get("PENDING0")._replace(status="Failed")).result()
    until(lambda: set(ids(script, one)) == {"PROCESS0", "J0000000", "J0000001"})


def test_one_whose_end_is_not_written_yet_is_the_oldest_all_the_same(script, limited, add):
    """No younger one goes in its place, nor one that is already on its way."""
    one = limited("off")
    for name, status in (("REMOVED0", "Completed"), ("OLDER000", "Pending")):
        add(one, name, 1, status)
    for number in range(3):
        add(one, f"J{number:07}", 1)
    waits = threading.Event()
    script.os = WrappedOs(pwrite=lambda *arguments: waits.wait(30) and os.pwrite(*arguments))
    try:
        removed = one.store.remove(["REMOVED0"])
        written = one.store.put(one.get("OLDER000")._replace(status="Failed", bytes=50))
        for size, found in (
            (1, ["OLDER000"]),
            (51, ["OLDER000", "J0000000"]),
            (10**6, ["OLDER000", "J0000000", "J0000001"]),
        ):
            assert [job.id for job in one.store.oldest_ended(size, 100)] == found
        assert one.store.ended_bytes() == 50 + 3 * 122
    finally:
        waits.set()
    removed.result()
    written.result()
    assert [job.id for job in one.store.oldest_ended(51, 100)] == ["OLDER000", "J0000000"]
    assert [job.id for job in one.store.oldest_ended(51, 1)] == ["OLDER000"]


@pytest.mark.every_store
def test_at_a_start_many_go(script, tracker, limited, add, caplog):
    """In steps, with one line in the log, and none that is younger than one that stays."""
    caplog.set_level("INFO", "job_tracker")
    first = tracker()
    for number in range(1234):
        job = script.Job(f"J{number:07}", "txt2img", "Failed", int(time.time()), None, "", bytes=10)
        written = first.store.put(job, new=True)
    written.result()
    first.close().result(60)
    caplog.clear()
    second = limited("1e-6")
    until(lambda: "Removed the oldest" in caplog.text)
    assert set(ids(script, second)) == {f"J{number:07}" for number in range(1134, 1234)}
    assert "Removed the oldest: 1134 jobs, 0 images, 0 bytes" in caplog.text
    assert caplog.text.count("TRACKER_MAX_GB") == 1


def test_it_looks_no_further_than_it_must(script, limited, add, monkeypatch):
    """Without a limit it asks for nothing; below the limit it asks for the sum alone."""
    asked, ended = [], script.IndexView.ended

    def noted(view):
        for row in ended(view):
            asked.append(row)
            yield row

    monkeypatch.setattr(script.IndexView, "ended", noted)
    one = limited("off")
    for number in range(20):
        add(one, f"J{number:07}", 1)
    with monkeypatch.context() as patch:
        patch.setattr(one.store, "totals", lambda: asked.append("totals") or {})
        one.housekeeper.keep_below_limit()
        time.sleep(0.2)
    assert asked == []
    one.settings.max_gb = 20 * 122e-9
    time.sleep(0.2)
    assert asked == [] and len(ids(script, one)) == 20
    one.settings.max_gb = 18 * 122e-9
    until(lambda: len(ids(script, one)) == 18)
    assert [job_id for _, job_id, _ in asked] == ["J0000000", "J0000001", "J0000002"]


def test_a_disk_that_fails_for_a_while(script, limited, add, caplog):
    """What was chosen to go is gone in the end with its files, and nothing goes in its place."""
    one = limited("off")
    jobs = [add(one, f"J{number:07}", 1) for number in range(4)]
    failing = [True]

    def pwrite(*arguments):
        if failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(*arguments)

    set_constants(script, RETRY=0.1)
    script.os = WrappedOs(pwrite=pwrite)
    one.settings.max_gb = float(TWO)
    until(lambda: "Housekeeping will be tried again" in caplog.text)
    time.sleep(0.3)
    assert all(one.images.size(job.images[0].name) for job in jobs), "no files without their records"
    failing.clear()
    until(lambda: [one.images.size(job.images[0].name) for job in jobs] == [None, None, 102, 102])
    assert ids(script, one) == ["J0000003", "J0000002"]
    assert caplog.text.count("Housekeeping will be tried again") == 1


def test_two_webuis_on_one_folder_remove_no_more_than_one(script, limited, add):
    trackers = [limited(), limited()]
    for number in range(150):
        add(trackers[number % 2], f"J{number:07}", 1)
    for one in trackers:
        until(lambda one=one: one.store.ended_bytes() <= 300)
        assert ids(script, one) == ["J0000149", "J0000148"]
    kept = [trackers[0].get(job_id).images[0].name for job_id in ("J0000148", "J0000149")]
    images = Path(trackers[0].images.folder)
    until(lambda: sorted(path.relative_to(images).as_posix() for path in images.glob("*/*_0.*")) == kept)


def test_a_purge_goes_first(script, limited, add, monkeypatch):
    """One at a time removes jobs."""
    one = limited("off")
    for number in range(4):
        add(one, f"J{number:07}", 1)
    begun, go_on = threading.Event(), threading.Event()

    def list_slowly(*arguments: Any) -> Any:
        begun.set()
        go_on.wait(30)
        return iter([])

    monkeypatch.setattr(one.images, "older_than", list_slowly)
    purge = threading.Thread(target=one.housekeeper.purge)
    purge.start()
    begun.wait(30)
    one.settings.max_gb = float(TWO)
    one.housekeeper.keep_below_limit()
    time.sleep(0.2)
    assert len(ids(script, one)) == 4
    go_on.set()
    purge.join()
    until(lambda: ids(script, one) == ["J0000003", "J0000002"])
