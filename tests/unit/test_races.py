"""What several clients do at the same moment comes out as if one had come after the other."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import sys
import threading
import time
import tracemalloc
from typing import Any

from inside import WrappedOs, a_job, an_answer

from harness import until


def test_what_was_deleted_as_soon_as_it_ended_stays_so(script, tracker):
    """Whichever thread stores its end, and whenever that is."""
    dice = random.Random(1)
    jobs = [a_job(script, dice, timestamp=int(time.time())) for _ in range(100)]
    often, before = 1e-6, sys.getswitchinterval()
    sys.setswitchinterval(often)  # threads take turns as often as can be
    try:
        for job in jobs:
            tracker.accept(job, lambda: True, b"").result()
            tracker.start(job.id)
            ending = threading.Thread(target=tracker.finish, args=(job.id, an_answer(script, job.id, 1)))
            ending.start()
            until(lambda job=job: tracker.get(job.id).ended)
            assert tracker.delete(job.id)
            ending.join()
    finally:
        sys.setswitchinterval(before)
    assert tracker.store.idle()
    assert [job.id for job in jobs if tracker.get(job.id) is not None] == []
    assert not list(tracker.images.older_than(time.time() + 60))


def test_who_waits_for_a_job_that_comes_to_nothing(script, tracker):
    """It was listed while it was being written, and the disk is full."""
    go = threading.Event()

    def full(*_: Any) -> None:
        go.wait(10)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    tracker.store.get("AAAAAAAA")  # all is loaded
    script.os = WrappedOs(pwrite=full)
    job = a_job(script, random.Random(1))
    written = tracker.accept(job, lambda: True, b"")

    async def wait() -> float:
        began = time.monotonic()
        waiting = asyncio.ensure_future(tracker.wait(job.id, 30))
        await asyncio.sleep(0.05)
        go.set()
        await waiting
        return time.monotonic() - began

    assert asyncio.run(wait()) < 15
    assert isinstance(written.exception(), script.StoreError)
    assert tracker.get(job.id) is None


def test_who_has_waited_leaves_nothing(script, tracker):
    """A job may wait for hours, and be asked for again and again."""
    job = a_job(script, random.Random(1), timestamp=int(time.time()))
    tracker.accept(job, lambda: True, b"").result()

    async def wait(times: int) -> None:
        for _ in range(times):
            await tracker.wait(job.id, 0.0001)

    asyncio.run(wait(100))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        asyncio.run(wait(1000))
        assert tracemalloc.get_traced_memory()[0] - before < 100_000, "a hundred bytes each, of all threads there are"
    finally:
        tracemalloc.stop()
    tracker.fail(job.id, "")


def test_a_key_that_is_freed_and_reserved_at_once(tracker):
    """Who repeats a request that came to nothing just as that frees its key has the key."""
    first, _ = tracker.reserve_key("key", "digest")
    first.outcome.set_result(None)
    repeats = []

    class Reservations(dict):
        def get(self, key: str) -> Any:
            found = super().get(key)
            if threading.current_thread() is threading.main_thread() and not repeats:
                repeats.append(tracker.key_readers.submit(tracker._reserve_key, "key", "digest"))
                time.sleep(0.3)
            return found

    tracker._reservations = Reservations(tracker._reservations)
    tracker.free_key("key", first)
    reservation, is_own = repeats[0].result(20)
    assert is_own and dict.get(tracker._reservations, "key") is reservation
