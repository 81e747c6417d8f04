"""Who is taken for dead by the store in PostgreSQL, and what the others wait for meanwhile."""

from __future__ import annotations

import threading
import time
from typing import Any, Iterator

import pytest
from inside import a_job, load_script, set_constants, until

SOON = {"DEAD_AFTER": 1.0, "BEAT_EVERY": 0.1, "GAP": 0.5, "MOMENT": 0.3, "FOLLOW_SECONDS": 0.1}
ALIVE = "bbbbbbbb"  # another webui


@pytest.fixture
def script() -> Any:
    script = load_script()
    set_constants(script, **SOON)
    return script


@pytest.fixture
def store(script, database) -> Iterator[Any]:
    """That of a webui which has seen for long enough who lives."""
    store = script.PostgresJobStore(database.url)
    until(lambda: time.monotonic() - store._steady_since > script.DEAD_AFTER)
    yield store
    store.close()


def give_sign(database: Any, late: str = "0") -> None:
    database.execute("delete from job_tracker_webuis where owner = %s", ALIVE)
    values = "(%s, 'b', '', clock_timestamp() - make_interval(secs => %s::float8))"
    database.execute(f"insert into job_tracker_webuis (owner, server, images, seen) values {values}", ALIVE, late)


def of_another(script: Any, store: Any, dice: Any, **fields: Any) -> Any:
    job = a_job(script, dice, owner=ALIVE, status="Processing", **fields)
    store.put(job, new=True).result(20)
    return job


def recovered(script: Any, store: Any, job: Any) -> bool:
    """Whether a look finds that the job was left."""
    store.recover(lambda left: script.ended_job(left, "Failed", store.now(), error=script.LEFT_BEHIND)).result(20)
    return store.get(job.id).ended


def test_nobody_has_died_of_an_outage(script, store, database, dice):
    """Whoever looks first when the database is back sees signs of life that are all as old as the outage is long."""
    job = of_another(script, store, dice)
    give_sign(database)
    assert not recovered(script, store, job)
    database.kill()
    time.sleep(script.DEAD_AFTER)
    database.start()

    def looked() -> bool:
        try:
            assert not recovered(script, store, job)
        except script.StoreError:
            return False
        return True

    until(looked)
    until(lambda: recovered(script, store, job), what="it has died after all")


def test_nobody_has_died_of_a_leap_of_the_clock(script, store, database, dice):
    job = of_another(script, store, dice)
    give_sign(database, late="60")
    with store._beating:  # no sign of life yet by which the leap is noticed
        store._clock -= 60
        assert not recovered(script, store, job)
    give_sign(database)
    until(lambda: time.monotonic() - store._steady_since < script.DEAD_AFTER, what="it was noticed")
    give_sign(database, late="60")
    assert not recovered(script, store, job)
    until(lambda: recovered(script, store, job), what="it has died after all")


def test_who_died_before_the_clock_was_set_back(script, store, database, dice):
    job = of_another(script, store, dice)
    give_sign(database, late="-3600")
    until(lambda: recovered(script, store, job))
    parked = a_job(script, dice, owner=ALIVE, parked=True)
    store.put(parked, new=True).result(20)
    hold = "update job_tracker_jobs set held_by = %s, held_until = clock_timestamp() + interval '1 hour' where id = %s"
    database.execute(hold, ALIVE, parked.id)
    assert store.oldest_parked().id == parked.id


def test_a_webui_that_stops_in_a_transaction_holds_up_nobody(script, database, dice):
    set_constants(script, STALLED_SECONDS=1)
    stops, other = (script.PostgresJobStore(database.url) for _ in range(2))
    job = a_job(script, dice, parked=True)
    stops.put(job, new=True).result(20)
    stopped, goes_on = threading.Event(), threading.Event()

    def stop(job: Any) -> Any:
        stopped.set()
        goes_on.wait(60)
        return job._replace(status="Processing", owner=stops.owner, parked=False)

    starting = stops.change([job.id], stop)
    assert stopped.wait(20)
    mine = other.change([job.id], lambda job: job._replace(status="Processing", owner=other.owner, parked=False))
    assert mine.result(5)[0].owner == other.owner
    goes_on.set()
    stopped.clear()
    # It is asked once more, by the job as it is now.
    assert starting.result(20)[0].owner == stops.owner and stopped.is_set()
    for store in (stops, other):
        store.close()
