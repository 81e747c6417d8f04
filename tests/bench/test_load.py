"""Five hundred requests at once: everybody is served in time, everything ends right, and nothing stays behind."""

from __future__ import annotations

import json
import re
import time
from typing import Any, Dict

import pytest
from bench_requests import Load, load, percentile

from harness import AUTH, MODE_FLAGS, MODES, SHAPE, Webui, body, until

COUNT = 500
HEADS, POLLS = 2.0, 0.1  # seconds in which they are to be there, on a machine that does nothing else
CASES = [(mode, auth) for mode, auth in (("ui", ()), ("nowebui", AUTH)) if mode in MODES]


def held(webui: Webui) -> Dict[str, Any]:
    """What the process holds. Asked twice: the first lets idle threads go."""
    webui.client.get("/standin/empty")
    return webui.client.get("/standin/threads").json()


def content(answer: bytes) -> bytes:
    """Without the marks of its chunks. Fails if it has no clean end."""
    parts = re.split(rb"(?:^|\r\n)[0-9a-f]+\r\n", answer)
    assert answer.endswith(b"\r\n0\r\n\r\n")
    return b"".join(parts)


def check_times(found: Load) -> None:
    busy = found.idle_burst, percentile(found.idle_polls, 0.99)  # the machine is that busy
    assert max(found.heads) < max(HEADS, 5 * busy[0]), busy
    for path, seconds in found.polls.items():
        assert len(seconds) > 50
        assert percentile(seconds, 0.5) < max(POLLS, 5 * busy[1]), (path, busy)
        assert percentile(seconds, 0.99) < max(POLLS, 10 * busy[1]), (path, busy)
        assert max(seconds) < max(HEADS, 5 * busy[0]) + 0.5, (path, busy)


def check_answers(webui: Webui, found: Load) -> None:
    assert len({job_id.lower() for job_id in found.answers}) == COUNT
    until(webui.is_idle)
    records = webui.records()
    assert {records[job_id]["status"] for job_id in found.answers} == {"Completed"}
    prompts = {records[job_id]["prompt"] for job_id in found.answers}
    assert prompts == {"a lighthouse", *(f"number {number}" for number in range(COUNT - 1))}
    for job_id, answer in found.answers.items():
        data = json.loads(content(answer))
        assert data["parameters"]["prompt"] == records[job_id]["prompt"]
        assert data["images"] == webui.job(job_id)["images"] if job_id in found.queue[::50] else data["images"]
    assert len(found.queue) == COUNT - 1
    if SHAPE != "sdnext":  # whose lock keeps no order
        assert found.queue == sorted(found.queue, key=lambda job_id: records[job_id]["started"])


@pytest.mark.parametrize("mode, auth", CASES, ids=[mode + "-auth" * bool(auth) for mode, auth in CASES])
def test_five_hundred_at_once(start, pool, mode, auth):
    webui, idle = start(*MODE_FLAGS[mode], *auth), pool.get("alone", mode, auth=True)
    webui.post(body())
    idle.post(body())
    before = held(webui)
    found = load(webui, idle, COUNT)
    check_times(found)
    check_answers(webui, found)

    after = until(lambda: (lambda it: it if it["tasks"] <= before["tasks"] + 2 else None)(held(webui)))
    assert after["total_tokens"] == 40
    assert after["pending_tasks"] == 0
    assert after["open_files"] <= before["open_files"] + 2

    if mode != MODES[-1]:
        return
    # The threads' memory comes with the first such crowd. The next one adds nothing to it.
    load(webui, idle, COUNT // 2)
    again = until(lambda: (lambda it: it if it["tasks"] <= before["tasks"] + 2 else None)(held(webui)))
    assert again["rss_bytes"] < after["rss_bytes"] + 30e6
    time.sleep(10.1)  # until the webui lets go of idle threads
    assert until(lambda: held(webui)["threads"] <= before["threads"] + 10)
