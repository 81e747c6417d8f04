"""Which webhooks are due, and which job has waited longest, while changes are on their way to disk, too."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any, Iterator

import pytest
from inside import WrappedOs, a_job, completed, until, within

URL = "https://example.org/"
NOW = 1736712000.0


def told(job: Any) -> Any:
    """What becomes of a job whose webhook was delivered."""
    return job._replace(webhook=job.webhook._replace(delivered=True, due=None))


def ended(script: Any, dice: Any, due: Any, **fields: Any) -> Any:
    return completed(a_job(script, dice, **fields))._replace(webhook=script.Webhook(URL, since=NOW, due=due))


def store_all(store: Any, *jobs: Any) -> None:
    for written in [store.put(job, new=True) for job in jobs]:
        written.result(20)


@contextlib.contextmanager
def stalled(script: Any) -> Iterator[None]:
    """The disk takes nothing meanwhile."""
    gate = threading.Event()

    def fsync(file: int) -> None:
        assert gate.wait(60)
        os.fsync(file)

    before, script.os = script.os, WrappedOs(fsync=fsync)
    try:
        yield
    finally:
        gate.set()
        script.os = before


def due(store: Any, before: float = NOW, count: int = 100) -> Any:
    return [job.id for job in within(20, store.due_webhooks, before, count)]


@pytest.mark.every_store
def test_in_the_order_of_their_times(script, opened, dice):
    """Not in that of the jobs; those that are not due are not there, and those that are told neither."""
    times = [NOW - 3, None, NOW - 1, NOW + 5, 0.0, NOW - 2, 7]
    jobs = [ended(script, dice, time) for time in times]
    store = opened()
    assert (due(store), store.next_webhook()) == ([], None)
    store_all(store, *jobs, a_job(script, dice), a_job(script, dice, webhook=script.Webhook(URL)))
    expected = [jobs[number].id for number in (4, 6, 0, 5, 2)]
    assert due(store) == expected
    assert due(store, count=2) == expected[:2] and due(store, NOW - 2.5) == expected[:3]
    assert [job.id for job in store.due_webhooks(NOW, 1, after=NOW - 3)] == expected[3:4]
    assert store.next_webhook() == 0.0
    within(20, store.change([job.id for job in jobs[:1] + jobs[4:]], told).result)
    assert due(store) == [jobs[2].id] and store.next_webhook() == NOW - 1
    within(20, store.remove([jobs[2].id]).result)
    assert due(store) == [] and store.next_webhook() == NOW + 5
    assert within(20, store.get, jobs[0].id) == told(jobs[0])


def stored(script: Any, dice: Any, store: Any) -> Any:
    """Jobs whose webhooks are due, and two that wait, of a store that is closed then."""
    times = iter(range(int(NOW), int(NOW) + 7))
    jobs = [ended(script, dice, NOW - number, label="猫", timestamp=next(times)) for number in range(5)]
    waiting = [a_job(script, dice, label=label, timestamp=next(times)) for label in ("猫", None)]
    store_all(store, *jobs, *waiting)
    store.close()
    return jobs, waiting


def assert_found(script: Any, store: Any, jobs: Any, waiting: Any) -> None:
    assert due(store, NOW + 1) == [job.id for job in reversed(jobs)]
    assert store.next_webhook() == NOW - 4
    assert within(20, store.oldest_pending) == waiting[0]
    found = within(20, store.query, script.Filter(label="猫"), 100).jobs
    assert found == [waiting[0], *reversed(jobs)]


@pytest.mark.every_store
def test_after_a_restart(script, opened, dice):
    jobs, waiting = stored(script, dice, opened())
    assert_found(script, opened(), jobs, waiting)


def test_after_a_restart_without_the_index(script, opened, tmp_path, dice):
    jobs, waiting = stored(script, dice, opened())
    for path in tmp_path.glob("jobs.json.index*"):
        path.unlink()
    assert_found(script, opened(), jobs, waiting)


def test_nothing_is_due_whose_change_is_not_on_disk(script, opened, dice):
    """Neither in its old state nor in its new one, and both methods say the same: else a caller would never rest."""
    first, second, new = ended(script, dice, NOW - 2), ended(script, dice, NOW - 1), ended(script, dice, NOW - 3)
    store = opened()
    store_all(store, first, second)
    assert due(store) == [first.id, second.id]
    later = first._replace(webhook=first.webhook._replace(due=NOW + 9))
    with stalled(script):
        writing = [store.put(later), store.put(new, new=True)]
        assert due(store) == due(store, count=1) == [second.id]
        assert store.next_webhook() == NOW - 1
        assert not any(written.done() for written in writing)
    for written in writing:
        written.result(20)
    until(lambda: due(store, NOW + 10) == [new.id, second.id, first.id])
    assert store.next_webhook() == NOW - 3


def test_a_record_that_is_no_webhook(script, opened, path, dice):
    """The job is worth more, and has none then."""
    good = ended(script, dice, NOW - 1)
    path.write_bytes(b"{\n}\n")
    store = opened()
    store_all(store, good)
    store.close()
    record = path.read_bytes()
    for old, new in [
        (b'"due":1736711999.0', b'"due":"7"'),
        (b'"due":1736711999.0', b'"due":true'),
        (b'"due":1736711999.0', b'"due":1e300'),
        (b'"attempts":0', b'"attempts":-1'),
        (b'"delivered":false', b'"delivered":0'),
        (b'"delivered":false', b'"delivered":true'),  # and due
        (b"https:", b"file:"),
        (b'"url"', b'"link"'),
    ]:
        assert record.count(old) == 1
        path.write_bytes(record.replace(old, new))
        store = opened()
        assert within(20, store.get, good.id) == good._replace(webhook=None), new
        assert (due(store), store.next_webhook()) == ([], None)
        store.close()


@pytest.mark.parametrize("status", ["Pending", "Processing"])
def test_what_has_not_ended_is_not_due(script, opened, path, dice, status):
    """Whatever its record says."""
    changes = {"status": status, "owner": "12345678"}
    job, other = (ended(script, dice, due)._replace(**changes) for due in (NOW - 1, None))
    other = other._replace(webhook=other.webhook._replace(delivered=True, attempts=3))
    records = [b'"%s":%s' % (one.id.encode(), script.record_of(one)) for one in (job, other)]
    path.write_bytes(b"{\n" + b",\n".join(records) + b"\n}\n")
    store = opened()
    assert [within(20, store.get, one.id).webhook for one in (job, other)] == [script.Webhook(URL)] * 2
    assert (due(store), store.next_webhook()) == ([], None)


def some_that_wait(script: Any, dice: Any, store: Any) -> Any:
    """Of four, the first runs and the second is gone."""
    jobs = [a_job(script, dice, timestamp=int(NOW) + number, owner=store.owner) for number in range(4)]
    assert within(20, store.oldest_pending) is None
    store_all(store, *jobs)
    assert within(20, store.oldest_pending) == jobs[0]
    store.put(jobs[0]._replace(status="Processing")).result(20)
    within(20, store.remove([jobs[1].id]).result)
    assert within(20, store.oldest_pending) == jobs[2]
    return jobs


@pytest.mark.every_store
def test_the_oldest_that_waits(script, opened, dice):
    store = opened()
    jobs = some_that_wait(script, dice, store)
    store.put(jobs[2]._replace(status="Failed")).result(20)
    assert within(20, store.oldest_pending) == jobs[3]
    store.put(completed(jobs[3])).result(20)
    assert within(20, store.oldest_pending) is None


def test_the_oldest_that_waits_while_the_disk_takes_nothing(script, opened, dice):
    store = opened()
    jobs = some_that_wait(script, dice, store)
    with stalled(script):
        changes = [store.put(jobs[2]._replace(status="Failed")), store.put(jobs[0])]
        assert within(20, store.oldest_pending) == jobs[0]
        changes.append(store.put(completed(jobs[0])))
        assert within(20, store.oldest_pending) == jobs[3]
    for change in changes:
        change.result(20)
    until(lambda: store.oldest_pending() == jobs[3])
    store.put(completed(jobs[3])).result(20)
    assert within(20, store.oldest_pending) is None
