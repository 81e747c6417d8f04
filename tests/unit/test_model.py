"""Stores against a model: every kind of call, in any order, by up to three of them that share their jobs."""

from __future__ import annotations

import random
from typing import Any, Dict, List

import pytest
from inside import WrappedOs, a_job, completed
from journal import all_pages, every

START = 1736712000


class Model:
    """What the stores are told, and what they must know then."""

    def __init__(self, script: Any, dice: random.Random, stores: List[Any], is_by_time: bool):
        self.script, self.dice, self.stores = script, dice, stores
        self.jobs: Dict[str, Any] = {}
        self.removed: List[str] = []
        # A file has its jobs in the order in which they were accepted, and so by whatever time; a database by time.
        self.is_by_time = is_by_time
        self.time = START

    def step(self) -> None:
        """One call, of any kind."""
        store, settle = self.dice.choice(self.stores), len(self.stores) > 1 or self.dice.random() < 0.7
        steps = [(30, self.add), (25, self.set), (10, self.remove), (18, self.look), (10, self.count), (5, self.age)]
        shares, calls = zip(*steps)
        written = self.dice.choices(calls, shares)[0](store)
        if written is not None and (settle or self.is_by_time):
            if not settle:  # what is on its way to a database is shown where a job is asked for, and not yet in lists
                assert store.get_many(self.jobs) == self.jobs
                self.assert_keys(store)
            written.result(20)

    def add(self, store: Any) -> None:
        self.time += self.dice.choice([0, 0, 1, 3000])
        prompt = self.dice.choice(["", a_job(self.script, self.dice).prompt * self.dice.randrange(4)])
        times = {"timestamp": self.time} if self.is_by_time else {}
        job = a_job(self.script, self.dice, prompt=prompt, key=self.free_key(), owner=store.owner, **times)
        store.put(job, new=True).result(20)
        self.jobs[job.id] = job

    def free_key(self) -> Any:
        key = f"key {self.dice.randrange(5)}"
        is_taken = any(job.key == key and job.status != "Failed" for job in self.jobs.values())
        return None if is_taken or self.dice.random() < 0.5 else key

    def set(self, store: Any) -> Any:
        """By the store whose job it is, as it goes on and ends; by any, what may change about one that has ended."""
        if not self.jobs:
            return None
        job = self.dice.choice(list(self.jobs.values()))
        if job.ended or job.owner != store.owner:
            new = job._replace(error=str(self.dice.random()), bytes=self.dice.randrange(5000))
        else:
            job = job._replace(prompt=job.prompt or self.dice.choice(["", "castle"]))
            new = self.dice.choice(
                [job._replace(status="Processing"), completed(job, 2), job._replace(status="Failed")]
            )
        is_own = new.owner == store.owner and not self.jobs[job.id].ended
        self.jobs[job.id] = new
        if is_own:
            return store.put(new)
        (changed,) = store.change([job.id, "AAAAAAAA"], lambda found: new).result(20)
        assert changed == new
        return None

    def remove(self, store: Any) -> Any:
        if not self.jobs:
            return None
        ids = self.dice.sample(list(self.jobs), min(len(self.jobs), self.dice.randrange(1, 6)))
        self.removed += ids
        for job_id in ids:
            del self.jobs[job_id]
        return store.remove(ids)

    def look(self, store: Any) -> None:
        filter_ = self.script.Filter(
            ip=self.dice.choice([None, None, f"10.0.0.{self.dice.randrange(22)}"]),
            status=self.dice.choice([None, None, *self.script.STATUSES]),
            type=self.dice.choice([None, None, *self.script.TYPES]),
            after=self.moment(),
            before=self.moment(),
            q=self.dice.choice([None, "", "castle", "STRASSE", "ärger", "zz", "猫", "film grain"]),
        )
        fitting = self.expected(filter_)
        limit, skip = self.dice.randrange(1, 20), self.dice.randrange(10)
        page = store.query(filter_, limit, skip=skip)
        assert page.jobs == fitting[skip : skip + limit]
        assert (page.cursor is None) == (len(fitting) <= skip + limit)
        assert all_pages(store, filter_, limit) == fitting

    def moment(self) -> Any:
        if self.is_by_time:
            return self.dice.choice([None, None, START + self.dice.randrange(self.time - START + 1)])
        return self.dice.choice([None, None, START + self.dice.randrange(100000)])

    def expected(self, filter_: Any) -> List[Any]:
        def fits(job: Any) -> bool:
            return (
                filter_.ip in (None, job.ip)
                and filter_.status in (None, job.status)
                and filter_.type in (None, job.type)
                and (filter_.after is None or job.timestamp > filter_.after)
                and (filter_.before is None or job.timestamp < filter_.before)
                and (filter_.q or "").casefold() in job.prompt.casefold()
            )

        return [job for job in reversed(list(self.jobs.values())) if fits(job)]

    def count(self, store: Any) -> None:
        assert all(store.get(job.id) == job for job in self.jobs.values())
        assert store.get_many([*self.jobs, *self.removed]) == self.jobs
        assert not any(store.get(job_id) for job_id in self.removed)
        counts, size = store.stats()
        assert sum(counts.values()) == len(self.jobs)
        assert size == sum(job.bytes for job in self.jobs.values())
        self.assert_keys(store)

    def assert_keys(self, store: Any) -> None:
        for number in range(5):
            key = f"key {number}"
            job = store.with_key(key)
            holders = [job.id for job in self.jobs.values() if job.key == key and job.status != "Failed"]
            assert job is None or (job == self.jobs[job.id] and job.key == key)
            assert not holders or job.id == holders[0]

    def age(self, store: Any) -> None:
        ended = [job for job in self.jobs.values() if job.ended]
        moment = self.moment() or START
        assert store.expired(moment) == [job.id for job in ended if job.timestamp < moment]
        assert store.ended_bytes() == sum(job.bytes for job in ended)
        pending = [job for job in self.jobs.values() if job.status == "Pending"]
        assert store.oldest_pending() == (pending[0] if pending else None)


@pytest.mark.every_store
@pytest.mark.parametrize("seed", range(12))
def test_against_a_model(script, opened, store_environ, seed):
    dice = random.Random(seed)
    script.JobStore.MIN_DEAD_ENTRIES = dice.choice([3, 20, 100])
    script.JOURNAL_CHUNK = dice.choice([64, 300, 2000, 1 << 16])
    if seed % 4 == 3:  # as on Windows, which has one position in a file and replaces no open one
        script.os = WrappedOs(name="nt")
        script.hasattr = lambda thing, name: name not in ("pread", "pwrite") and hasattr(thing, name)
    stores = [opened() for _ in range(1 + seed % 3)]
    model = Model(script, dice, stores, is_by_time=bool(store_environ))
    for number in range(250):
        if number % 60 == 59:
            place = dice.randrange(len(stores))
            stores[place].close()
            stores[place] = opened()
        model.step()
    for store in stores:
        store.close()
    assert every(script, opened()) == model.jobs
