"""A change that depends on what is on disk: no other process gets between the look and the write."""

from __future__ import annotations

import itertools
import os
import threading
import time
from typing import Any, List

import pytest
from inside import WrappedOs, a_job, load_script, set_constants, until

TIMES = itertools.count(1736712000)


def parked(script: Any, dice: Any, store: Any, count: int) -> List[Any]:
    """In the order of their times, too."""
    fields = {"parked": True, "promised": True, "owner": store.owner}
    jobs = [a_job(script, dice, timestamp=next(TIMES), **fields) for _ in range(count)]
    for written in [store.put(job, new=True) for job in jobs]:
        written.result(20)
    return jobs


def claim(store: Any) -> Any:
    """What a runner does with the job that it was given."""
    return lambda job: job._replace(status="Processing", parked=False, owner=store.owner) if job.parked else None


@pytest.mark.every_store
def test_what_was_decided_is_on_disk(script, dice, opened):
    store, neighbour = opened(), opened()
    one, other = parked(script, dice, store, 2)
    assert store.change([one.id, "AAAAAAAA", other.id], lambda job: None).result(20) == []
    (changed,) = store.change([one.id, "AAAAAAAA"], claim(store)).result(20)
    assert changed == one._replace(status="Processing", parked=False)
    for each in (store, neighbour):
        assert each.get(one.id) == changed and each.get(other.id) == other
        assert each.oldest_parked() == other and each.queue_places([other.id]) == {other.id: 0}
    assert store.change([one.id], claim(store)).result(20) == []


@pytest.mark.every_store
def test_in_order_of_acceptance(script, dice, opened):
    store = opened()
    jobs = parked(script, dice, store, 20)
    # Somebody waits for that one.
    store.put(a_job(script, dice, timestamp=next(TIMES), owner=store.owner), new=True).result(20)
    assert store.queue_places(job.id for job in jobs) == {job.id: place for place, job in enumerate(jobs)}
    for job in jobs:
        assert store.oldest_parked() == job
        assert store.change([job.id], claim(store)).result(20)
    assert store.oldest_parked() is None


def test_a_list_of_places_counts_each_job_once(script, dice, opened, monkeypatch):
    store = opened()
    jobs = parked(script, dice, store, 300)
    steps = []
    make = script.IndexView.__init__

    def make_counting(view: Any, connection: Any) -> None:
        connection.set_progress_handler(lambda: steps.append(1), 10)
        make(view, connection)

    def places() -> List[int]:
        steps.clear()
        return list(store.queue_places(job.id for job in reversed(jobs)).values())

    monkeypatch.setattr(script.IndexView, "__init__", make_counting)
    assert store.queue_places([jobs[-1].id]) == {jobs[-1].id: 299}
    once = len(steps)  # for 299 jobs
    assert places() == list(range(299, -1, -1))
    assert len(steps) < 30 * once, "not as much again for each of the 300"
    assert store.change([jobs[100].id], claim(store)).result(20)
    assert places() == [*range(298, 99, -1), 100, *range(99, -1, -1)]


@pytest.mark.every_store
def test_each_is_claimed_once(script, dice, opened):
    """By four threads of two stores, which see each other only by what both share."""
    one, other = opened(), opened()
    jobs = parked(script, dice, one, 60)
    claimed: List[str] = []

    def run(store: Any) -> None:
        while True:
            job = store.oldest_parked()
            if job is None:
                return
            claimed.extend(job.id for job in store.change([job.id], claim(store)).result(20))

    threads = [threading.Thread(target=run, args=(store,)) for store in (one, other, one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(claimed) == sorted(job.id for job in jobs)
    for store in (one, other):
        assert store.stats()[0]["Processing"] == 60
        assert store.oldest_parked() is None


@pytest.mark.parametrize("broken", ["write", "fsync"])
def test_a_disk_that_fails(script, dice, opened, broken, monkeypatch):
    """Nothing has changed then, and nothing changes later, also where another process has been faster since."""
    store, other = opened(), opened(program=load_script())
    jobs = parked(script, dice, store, 3)
    assert other.oldest_parked()._asdict() == jobs[0]._asdict()
    set_constants(script, RETRY=0.3)
    failing = [True]

    def fail(function: Any) -> Any:
        def call(*args: Any) -> Any:
            if failing[0]:
                raise OSError(28, "No space left on device")
            return function(*args)

        return call

    names = ("pwrite",) if broken == "write" else ("fsync",)
    monkeypatch.setattr(script, "os", WrappedOs(**{name: fail(getattr(os, name)) for name in names}))
    with pytest.raises(script.StoreError, match="No space"):
        store.change([job.id for job in jobs[:2]], claim(store)).result(20)
    assert store.get(jobs[1].id) == jobs[1]
    (taken,) = other.change([jobs[0].id], claim(other)).result(20)
    time.sleep(0.5)
    failing[0] = False
    assert store.idle(20)
    assert store.get(jobs[0].id) == other.get(jobs[0].id) == taken  # these are tuples
    assert store.get(jobs[1].id) == jobs[1]
    assert store.change([jobs[1].id], claim(store)).result(20)


@pytest.mark.every_store
def test_a_closed_store(script, dice, opened):
    store = opened()
    (job,) = parked(script, dice, store, 1)
    store.close()
    with pytest.raises(script.StoreError):
        store.change([job.id], claim(store)).result(20)


def hear(store: Any, job_id: str, is_cancel: bool) -> None:
    """Waits until a store tells of a change of a job, and whether that is to be cancelled."""
    until(lambda: (store.follow() or {}).get(job_id) is is_cancel, 20, f"it hears of {job_id}")


@pytest.mark.every_store
def test_what_others_changed_is_heard_of(script, dice, opened):
    store, other = opened(), opened()
    for each in (store, other):
        each.stats()
        each.follow()  # from now on
    (job,) = parked(script, dice, store, 1)
    hear(other, job.id, False)
    other.change([job.id], lambda job: job._replace(cancel_wanted=True)).result(20)
    hear(store, job.id, True)
    other.remove([job.id]).result(20)
    hear(store, job.id, False)


def test_what_others_changed(script, dice, opened):
    store, other = opened(), opened()
    other.stats()
    assert other.follow() is None
    (job,) = parked(script, dice, store, 1)
    assert other.follow() == {job.id: False}
    assert other.follow() == {}
    other.change([job.id], lambda job: job._replace(cancel_wanted=True)).result(20)
    store.follow()
    store.put(job._replace(prompt='"cancel_wanted":true')).result(20)
    assert store.follow() == {job.id: False}
    store.change([job.id], lambda job: job._replace(cancel_wanted=True)).result(20)
    assert other.follow() == {job.id: True}


def test_the_file_was_replaced(script, dice, opened):
    set_constants(script, MIN_DEAD_ENTRIES=20)
    store, other = opened(), opened()
    (job,) = parked(script, dice, store, 1)
    other.stats()
    assert other.follow() is None
    for _ in range(50):
        store.put(job).result(20)
    assert store.idle(20)
    deadline = time.monotonic() + 20
    while other.follow() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert other.follow() == {}


def wanted_and_begun(script: Any, dice: Any, store: Any, other: Any) -> Any:
    """A job whose owner writes another line before it looks at a wish to cancel it."""
    job = a_job(script, dice, owner=store.owner)
    store.put(job, new=True).result(20)
    store.follow()  # from now on
    assert other.change([job.id], lambda job: job._replace(cancel_wanted=True)).result(20)
    store.put(job._replace(status="Processing")).result(20)
    return job


@pytest.mark.every_store
def test_a_wish_to_cancel_is_noticed_though_its_job_goes_on(script, dice, opened):
    store, other = opened(), opened()
    job = wanted_and_begun(script, dice, store, other)
    hear(store, job.id, True)


def test_much_that_others_wrote_is_read_in_turn(script, dice, opened):
    """Between two looks, also more than is read at once."""
    set_constants(script, LONG=20_000)
    store, other = opened(), opened()
    job = wanted_and_begun(script, dice, store, other)
    jobs = [a_job(script, dice, prompt='"}\\' * 1000) for _ in range(30)]
    for written in [other.put(one, new=True) for one in jobs]:
        written.result(20)
    found = {}
    while True:
        changed = store.follow()
        assert changed is not None
        found.update(changed)
        if not changed:
            break
    assert found == {job.id: True, **{one.id: False for one in jobs}}
