"""What is removed by itself, and what never is."""

import errno
import logging
import os
import time

import pytest
from inside import WrappedOs, set_constants
from test_clock import DAY, clock  # noqa: F401 - a fixture

from harness import body, until


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


def ids(tracker, script):
    return {job.id for job in tracker.store.query(script.Filter(), 1000).jobs}


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
    assert ids(one, script) == {"PENDING0", "PROCESS0", "YOUNGER0"}
    assert one.image_size(young, 0) == 102
    one.settings.retention_days = 0.5
    assert one.housekeeper.purge() == script.Purged(1, 1, 122)
    assert one.housekeeper.purge() == script.Purged(0, 0, 0)
    assert os.listdir(one.images.folder) == []


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
    assert one.image_size(job, 0) == 100


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


def test_at_start_and_by_the_clock(script, tracker, add, monkeypatch):
    first = tracker(TRACKER_RETENTION="off")
    add(first, "OLDER000", 8)
    add(first, "YOUNGER0", 6)
    first.close()
    monkeypatch.setattr(script.Housekeeper, "PURGE_EVERY", 0.3)
    second = tracker(TRACKER_RETENTION="7")
    until(lambda: ids(second, script) == {"YOUNGER0"}, what="the purge at the start")
    add(second, "OLDER001", 8)
    until(lambda: ids(second, script) == {"YOUNGER0"}, what="the next purge")
    assert until(lambda: 0 < second.housekeeper.next_purge - time.monotonic() < 1, what="it is told")


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
    assert ids(one, script) == set()


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
    assert one.housekeeper.purge().jobs == one.housekeeper.REMOVED_AT_ONCE, "the rest is spared"


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


def test_over_a_restart(start, clock):  # noqa: F811
    webui = start("--nowebui", scripts={"a-clock": clock.script})
    clock.set(-31 * DAY)
    done = webui.post(body()).headers["x-job-id"]
    webui.job(done, wait=30)
    clock.set(0)
    gate = webui.gate()
    sent = webui.send(body(standin={"hold": gate}))
    running = sent.head()[1]["x-job-id"]
    until(lambda: running in webui.records())
    webui.kill()
    time.sleep(1.1)  # the times of jobs are whole seconds: the running one is to be from before this start
    webui.start()
    purges = until(lambda: [line for line in webui.our_log() if "Purge: removed" in line], what="the purge")
    assert len(purges) == 1
    assert done not in webui.records()
    assert not [path for path in webui.images() if path.name.startswith(done)]
    assert webui.job(running)["status"] == "Failed"


def test_a_retention_that_is_none_removes_nothing(start, caplog):
    with caplog.at_level(logging.WARNING):
        webui = start("--nowebui", environ={"TRACKER_RETENTION": "a while"})
    assert any("TRACKER_RETENTION" in line for line in webui.our_log())
    job_id = webui.post(body()).headers["x-job-id"]
    assert webui.job(job_id, wait=30)["status"] == "Completed"


LISTER = """
import threading
from modules import script_callbacks

def add(_, app):
    app.add_api_route("/threads", lambda: [thread.name for thread in threading.enumerate()])

script_callbacks.on_app_started(add)
"""


def test_one_housekeeper_after_reloads(start):
    webui = start("--api", scripts={"lister": LISTER})
    for _ in range(3):
        webui.reload_ui()

    def ours():
        names = webui.client.get("/threads").json()
        return sorted(name for name in names if name in ("job-tracker-housekeeping", "job-tracker-store"))

    until(lambda: ours() == ["job-tracker-housekeeping", "job-tracker-store"], 15, "the old threads have ended")
