"""A job that one webui generates, looked at through another: its progress, its place in the queue, its preview."""

from __future__ import annotations

import json
from typing import Any, Dict, List

import pytest
from httpx_sse import connect_sse

from harness import SHAPE, Webui, connect, hold_the_queue, until

pytestmark = pytest.mark.skipif(SHAPE == "sdnext", reason="it has no such settings")


@pytest.fixture
def two(start_fleet) -> List[Webui]:
    fleet = start_fleet(2, images=False)
    for webui in fleet:
        webui.client.post("/sdapi/v1/options", json={"show_progress_every_n_steps": 1})
    return fleet


def listed(webui: Webui, job_id: str) -> Dict[str, Any]:
    return next(job for job in webui.jobs() if job["id"] == job_id)


def test_progress_place_and_preview(two):
    runs, asked = two
    running = hold_the_queue(runs)
    waiting = connect(runs)
    behind = connect(runs)
    known = until(lambda: asked.job(running)["progress"] and asked.job(running), what="its progress is told")
    assert known["status"] == "Processing" and known["server"] == "webui-0" and known["eta"] >= 0
    assert until(lambda: asked.job(behind)["queue_position"]) == 2
    assert until(lambda: listed(asked, waiting)["queue_position"]) == 1
    assert listed(asked, running)["progress"] == runs.job(running)["progress"]

    own = until(lambda: preview(runs, running), what="it has a preview")
    theirs = until(lambda: preview(asked, running), what="the other has it, too")
    if own.headers["etag"] == theirs.headers["etag"]:
        assert own.content == theirs.content and own.headers["content-type"] == theirs.headers["content-type"]
    etag = {"If-None-Match": theirs.headers["etag"]}
    assert asked.client.get(f"/sdapi/v1/job/{running}/preview", headers=etag).status_code == 304

    kinds = set()
    with connect_sse(asked.client, "GET", f"/sdapi/v1/job/{running}/events?preview=true") as source:
        for event in source.iter_sse():
            kinds.add(event.event)
            if event.event == "preview":
                assert event.data.startswith("data:image/")
                runs.gates[-1].open()
            last = event
    assert "preview" in kinds and json.loads(last.data)["status"] == "Completed"
    assert asked.client.get(f"/sdapi/v1/job/{running}/preview").status_code == 404


def preview(webui: Webui, job_id: str) -> Any:
    answer = webui.client.get(f"/sdapi/v1/job/{job_id}/preview")
    return answer if answer.status_code == 200 else None
