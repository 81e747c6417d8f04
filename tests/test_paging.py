"""Pages of jobs neither repeat nor skip one, whatever is added and deleted between them."""

from __future__ import annotations

import json
import random
from typing import Any, Dict, Iterator, List

import pytest
from conftest import Pool

from harness import MODES, QUICK, Webui, body, until

NOON = 1736683200  # 2025-01-12 12:00:00 UTC
COUNT = 1300


def write_jobs(webui: Webui, dead: int = 0) -> None:
    """Jobs that share one second, oldest first. Some lines are there twice, as after a change of the job."""
    jobs = [
        {
            "id": f"Old{number:05d}",
            "type": "txt2img",
            "status": "Completed",
            "timestamp": NOON,
            "ip": None,
            "prompt": "a crowd",
            "images": [],
        }
        for number in range(COUNT)
    ]
    lines = [f'"{job["id"]}": {json.dumps(job)}' for job in (jobs * 3)[: COUNT + dead]]
    (webui.data / "jobs.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def names() -> List[str]:
    return [f"Old{number:05d}" for number in reversed(range(COUNT))]


@pytest.fixture(scope="session")
def webui(pool: Pool) -> Webui:
    return pool.get("tracked", MODES[-1])


@pytest.fixture
def archive(start) -> Webui:
    return start(
        *QUICK,
        environ={"TRACKER_RETENTION": "off"},
        prepare=lambda webui: write_jobs(webui, dead=COUNT + 1000 - 40),  # a few more, and it is rewritten
    )


def pages(webui: Webui, **params: Any) -> Iterator[List[str]]:
    response = webui.client.get("/sdapi/v1/jobs", params={"q": "crowd", **params})
    while True:
        assert response.status_code == 200, response.text
        yield [job["id"] for job in response.json()]
        if "next" not in response.links:
            return
        response = webui.client.get(response.links["next"]["url"])


def delete(webui: Webui, job_id: str) -> None:
    assert webui.client.delete(f"/sdapi/v1/job/{job_id}").status_code == 204


def test_deleted_between_the_pages(archive):
    """Among them the last ones of a page, by which the next one is found, and so many that jobs.json is rewritten."""
    chance = random.Random(7)
    file = (archive.data / "jobs.json").stat().st_ino
    shown: List[str] = []
    deleted = set()
    for number, page in enumerate(pages(archive, limit=100)):
        shown += page
        if number < 4:
            rest = [name for name in names() if name not in shown and name not in deleted]
            gone = page[-number - 1 :] + chance.sample(rest, 10)
            for job_id in gone:
                delete(archive, job_id)
            deleted |= set(gone)
            archive.post(body("a crowd, later"))
        if number == 1:
            until(lambda: (archive.data / "jobs.json").stat().st_ino != file, what="jobs.json is rewritten")
    kept = [name for name in names() if name in shown or name not in deleted]
    assert shown == kept
    assert len(shown) == COUNT - len(deleted - set(shown))


def test_all_of_the_last_page_deleted(archive):
    """Then nothing says where the next page begins but the time: better some job twice than one missing."""
    through = pages(archive, limit=12)
    first = next(through)
    for job_id in first:
        delete(archive, job_id)
    file = (archive.data / "jobs.json").stat().st_ino
    for job_id in names()[-20:]:
        delete(archive, job_id)
    until(lambda: (archive.data / "jobs.json").stat().st_ino != file, what="jobs.json is rewritten")
    rest = [job_id for page in through for job_id in page]
    assert rest == names()[12:-20]


def test_pages_of_another_start(archive):
    """A link is good for as long as somebody wants to follow it."""
    response = archive.client.get("/sdapi/v1/jobs", params={"limit": 100})
    archive.restart()
    archive.post(body("a new one"))
    following = archive.client.get(response.links["next"]["url"])
    assert [job["id"] for job in following.json()] == names()[100:200]


def test_filters_stay(webui):
    """The link has all of the question in it."""
    question: Dict[str, Any] = {"q": "A cröwd & more = 100%", "limit": 5}
    for number in range(7):
        webui.post(body(f"a cröwd & more = 100% {number}"))
    until(webui.is_idle)
    first = webui.client.get("/sdapi/v1/jobs", params={**question, "status": "completed"})
    link = first.headers["link"]
    assert link.startswith("</sdapi/v1/jobs?") and link.endswith('>; rel="next"')
    second = webui.client.get(first.links["next"]["url"])
    prompts = [job["prompt"][-1] for job in first.json() + second.json()]
    assert prompts == list("6543210")
    assert "link" not in second.headers


@pytest.mark.parametrize(
    "cursor",
    ["", "x", "1", "1-", "1-short", "-Old00001", "1-Old00001-", "٣-Old00001", "1-Old00001\n", "1" * 13 + "-Old00001"]
    + ["1" + "-Old00001" * 11],
)
def test_no_cursor(webui, cursor):
    answer = webui.client.get("/sdapi/v1/jobs", params={"cursor": cursor})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "cursor"]


@pytest.mark.parametrize("time, shown", [(0, []), (NOON - 1, []), (NOON, names()[:3])])
def test_a_cursor_of_jobs_that_are_gone(archive, time, shown):
    """Those that are not newer than the time in it."""
    answer = archive.client.get("/sdapi/v1/jobs", params={"cursor": f"{time}-AAAAAAAA-BBBBBBBB", "limit": 3})
    assert answer.status_code == 200 and [job["id"] for job in answer.json()] == shown
