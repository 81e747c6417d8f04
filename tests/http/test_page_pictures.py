"""/job-tracker/{id}/thumbnail and /preview: the small pictures that the tab asks for. Who may, is in test_guards."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from harness import Webui, body, done, until

UNKNOWN = "AAAAAAAA"


@pytest.fixture(scope="module")
def webui(start_shared: Any) -> Webui:
    return start_shared("--api")


def get(webui: Webui, job_id: str, what: str = "thumbnail", **headers: str) -> httpx.Response:
    return webui.client.get(f"/job-tracker/{job_id}/{what}", headers=headers)


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_a_thumbnail_is_a_small_jpeg_that_never_changes(webui, coding):
    job_id = done(webui, width=512, height=256, n_iter=2)
    answer = get(webui, job_id, **{"Accept-Encoding": coding})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "content-encoding" not in answer.headers, "nothing can be gained"
    assert Image.open(io.BytesIO(answer.content)).size == (128, 64)
    (kept,) = webui.data.glob(f"images/*/{job_id}.thumb.jpg")
    assert kept.read_bytes() == answer.content
    again = get(webui, job_id, **{"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
    assert get(webui, job_id, **{"If-None-Match": '"other"'}).content == answer.content
    assert webui.client.delete(f"/sdapi/v1/job/{job_id}").status_code == 204
    assert not list(webui.data.glob(f"images/*/{job_id}*"))
    assert get(webui, job_id).status_code == 404


def test_what_has_no_thumbnail_is_not_found(webui):
    text = done(webui, "a text", standin={"no_images": True, "strings": ["no image"]})
    gate = webui.gate()
    running = webui.send(body("runs", {"hold": gate})).job_id()
    for job_id in (text, running, UNKNOWN, "short", "..%2f..%2fconfig"):
        answer = get(webui, job_id)
        assert answer.status_code == 404, job_id
    assert get(webui, running).headers["cache-control"] == "no-store"
    gate.open()
    assert webui.job(running, wait=30)["status"] == "Completed"
    assert get(webui, running).status_code == 200, "what was not there before is there now"


def test_a_page_of_rows_at_once(webui):
    jobs = [done(webui, f"{number}") for number in range(5)]
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda number: get(webui, jobs[number % 5]), range(50)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({(answer.headers["etag"], answer.content) for answer in answers}) == 5
    assert "Traceback" not in webui.log


def test_the_preview_is_that_of_the_api(webui):
    """For whoever sees the page, and only while the job runs."""
    gate = webui.gate()
    running = webui.send(body("runs", {"hold": gate}, steps=20)).job_id()
    until(lambda: get(webui, running, "preview").status_code == 200, what="there is a preview")
    page, api = get(webui, running, "preview?n=1"), webui.client.get(f"/sdapi/v1/job/{running}/preview")
    assert page.content == api.content and page.headers["etag"] == api.headers["etag"]
    assert page.headers["content-type"].startswith("image/") and page.headers["cache-control"] == "no-store"
    gate.open()
    assert webui.job(running, wait=30)["status"] == "Completed"
    assert get(webui, running, "preview").status_code == 204, "a 404 would be an error in the browser's console"
