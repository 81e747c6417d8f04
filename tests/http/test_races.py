"""What several clients do at the same moment comes out as if one had come after the other."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any, Callable, List

import httpx
import pytest

from harness import QUICK, body, fewer, new_client, until

SECONDS = fewer(40) / 10


@pytest.fixture(scope="module")
def webui(start_shared):
    return start_shared(*QUICK)


def together(webui: Any, *loops: Callable[[httpx.Client], None]) -> None:
    """Runs loops, each with a client of its own, again and again."""
    end = time.monotonic() + SECONDS
    failures: List[BaseException] = []

    def run(loop: Callable[[httpx.Client], None]) -> None:
        with new_client(webui.url) as http:
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

    def both_were_seen() -> bool:
        together(webui, generate, generate, read, read, read, delete)
        return bool(codes[200] and codes[404])

    until(both_were_seen, what="both answers were seen")
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
    assert len(ids) > 1


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
    for _ in range(fewer(6)):
        request = body(standin={"image_bytes": size})
        ids = [webui.post(request, headers={"Accept-Encoding": encoding}).headers["x-job-id"] for _ in range(2)]
        assert webui.job(ids[1], images=False)["status"] == "Completed"
        ids.append(webui.post(request, headers={"Accept-Encoding": encoding}).headers["x-job-id"])
        assert webui.client.delete(f"/sdapi/v1/job/{ids[2]}").status_code == 204
        assert webui.client.get(f"/sdapi/v1/job/{ids[2]}").status_code == 404
