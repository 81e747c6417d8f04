"""Pages of jobs neither repeat nor skip one, whatever is added and deleted between them."""

from __future__ import annotations

import json
import random
import re
from typing import Any, Dict, Iterator, List
from urllib.parse import parse_qs, urlsplit

import pytest

from harness import QUICK, Webui, body, until

pytestmark = pytest.mark.one_mode

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


@pytest.fixture(scope="module")
def cursor(webui: Webui) -> str:
    for _ in range(2):
        webui.post(body("has a cursor"))
    return cursor_of(webui.client.get("/sdapi/v1/jobs", params={"limit": 1}))


def cursor_of(response: Any) -> str:
    (cursor,) = parse_qs(urlsplit(response.links["next"]["url"]).query)["cursor"]
    return cursor


@pytest.mark.parametrize(
    "spoil",
    [
        *(
            lambda cursor, text=text: text
            for text in ("", "x", "1", "1-", "1-short", "-Old00001", "1-Old00001", "0-0-0-0")
        ),
        lambda cursor: cursor + "-",
        lambda cursor: cursor + "\n",
        lambda cursor: cursor + "0",
        lambda cursor: cursor + cursor,
        lambda cursor: cursor[:-1],
        lambda cursor: "-" + cursor,
        lambda cursor: " " + cursor,
        lambda cursor: "\u0663" + cursor,
        lambda cursor: "1" * 30 + cursor,
        lambda cursor: cursor.replace("-", "/"),
        lambda cursor: cursor.replace("-", "-" + "1" * 30, 1),
    ],
)
def test_no_cursor(webui, cursor, spoil):
    assert webui.client.get("/sdapi/v1/jobs", params={"cursor": cursor}).status_code == 200
    answer = webui.client.get("/sdapi/v1/jobs", params={"cursor": spoil(cursor)})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "cursor"]


def test_the_largest_cursor(webui, cursor):
    """Whoever makes one up finds jobs, or none, but no failure."""
    largest = re.sub(r"[0-9]+(?=-)", lambda number: "9" * len(number.group()), cursor)
    for made_up in (largest, re.sub("[0-9]+(?=-)", "0", cursor), re.sub("[A-Za-z0-9]+$", "AAAAAAAA", largest)):
        answer = webui.client.get("/sdapi/v1/jobs", params={"cursor": made_up})
        assert answer.status_code in (200, 422) and "Traceback" not in answer.text


def test_a_cursor_of_jobs_that_are_gone(archive):
    """The next page is the same, also for the next start, which knows nothing of how the jobs lay before."""
    first = archive.client.get("/sdapi/v1/jobs", params={"limit": 3})
    url = first.links["next"]["url"]
    assert len(cursor_of(first)) > 8
    for job_id in names()[:3]:
        delete(archive, job_id)
    assert [job["id"] for job in archive.client.get(url).json()] == names()[3:6]
    archive.restart()
    assert [job["id"] for job in archive.client.get(url).json()] == names()[3:6]


def test_a_cursor_of_an_index_that_is_gone(archive):
    """Then nothing but the time says where the next page begins: better some job twice than one missing."""
    first = archive.client.get("/sdapi/v1/jobs", params={"limit": 3})
    for job_id in names()[:3]:
        delete(archive, job_id)
    archive.kill()
    for path in archive.data.glob("jobs.json.index*"):
        path.unlink()
    archive.start()
    assert [job["id"] for job in archive.client.get(first.links["next"]["url"]).json()] == names()[3:6]
