"""What several clients do at the same moment comes out as if one had come after the other."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import sys
import threading
import time
from collections import Counter
from typing import Any, Callable, List

import httpx
import pytest
from inside import WrappedOs, a_job, an_answer

from harness import QUICK, body, until

SECONDS = 4.0


@pytest.fixture(scope="module")
def webui(start_shared):
    return start_shared(*QUICK)


def together(webui: Any, *loops: Callable[[httpx.Client], None]) -> None:
    """Runs loops, each with a client of its own, again and again."""
    end = time.monotonic() + SECONDS
    failures: List[BaseException] = []

    def run(loop: Callable[[httpx.Client], None]) -> None:
        with httpx.Client(base_url=webui.url, timeout=60, trust_env=False) as http:
            try:
                while time.monotonic() < end and not failures:
                    loop(http)
            except BaseException as failure:
                failures.append(failure)

    threads = [threading.Thread(target=run, args=(loop,)) for loop in loops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def listed(http: httpx.Client, status: str) -> Any:
    return http.get("/sdapi/v1/jobs", params={"status": status, "limit": 3}).json()


def test_reads_beside_deletes(webui):
    """Jobs are whole or not there, in the middle of an answer, too."""
    codes: Counter = Counter()

    def generate(http: httpx.Client) -> None:
        assert http.post("/sdapi/v1/txt2img", json=body(batch_size=3)).status_code == 200

    def read(http: httpx.Client) -> None:
        for job in listed(http, "completed"):
            answer = http.get(f"/sdapi/v1/job/{job['id']}")
            codes[answer.status_code] += 1
            assert answer.status_code in (200, 404), answer.text
            assert answer.status_code == 404 or len(answer.json()["images"]) == 3

    def delete(http: httpx.Client) -> None:
        for job in listed(http, "completed"):
            assert http.delete(f"/sdapi/v1/job/{job['id']}").status_code in (204, 404)
            assert http.get(f"/sdapi/v1/job/{job['id']}").status_code == 404

    together(webui, generate, generate, read, read, read, delete)
    assert codes[200] and codes[404], codes
    assert "Traceback" not in webui.our_log()


def test_repeats_beside_deletes(webui):
    ids = set()

    def repeat(http: httpx.Client) -> None:
        headers = {"Prefer": "respond-async", "Idempotency-Key": "one of two"}
        answer = http.post("/sdapi/v1/txt2img", json=body(), headers=headers)
        assert answer.status_code == 202, answer.text
        ids.add(answer.json()["id"])

    def delete(http: httpx.Client) -> None:
        for job in listed(http, "completed"):
            assert http.delete(f"/sdapi/v1/job/{job['id']}").status_code in (204, 404)

    together(webui, *[repeat] * 5, delete, delete)
    assert len(ids) > 3


def test_lists_by_status(webui):
    def generate(http: httpx.Client) -> None:
        assert http.post("/sdapi/v1/txt2img", json=body()).status_code == 200

    def look(http: httpx.Client) -> None:
        for status in ("Pending", "Processing", "Completed"):
            assert {job["status"] for job in listed(http, status)} <= {status}

    together(webui, *[generate] * 4, look, look)


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_who_has_the_answer_sees_the_end(webui, encoding, size):
    for _ in range(5):
        request = body(standin={"image_bytes": size})
        ids = [webui.post(request, headers={"Accept-Encoding": encoding}).headers["x-job-id"] for _ in range(2)]
        assert webui.job(ids[1], images=False)["status"] == "Completed"
        ids.append(webui.post(request, headers={"Accept-Encoding": encoding}).headers["x-job-id"])
        assert webui.client.delete(f"/sdapi/v1/job/{ids[2]}").status_code == 204
        assert webui.client.get(f"/sdapi/v1/job/{ids[2]}").status_code == 404


def test_what_was_deleted_as_soon_as_it_ended_stays_so(script, tracker):
    """Whichever thread stores its end, and whenever that is."""
    dice = random.Random(1)
    jobs = [a_job(script, dice, timestamp=int(time.time())) for _ in range(100)]
    often, before = 1e-6, sys.getswitchinterval()
    sys.setswitchinterval(often)  # threads take turns as often as can be
    try:
        for job in jobs:
            tracker.accept(job, lambda: True).result()
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
    written = tracker.accept(job, lambda: True)

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
