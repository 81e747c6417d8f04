"""Asking about jobs: one by its ID, and lists of them, whose pages neither repeat nor skip one."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import time
from typing import Any, Dict, Iterator, List
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from harness import AUTH, KINDS, MODE_FLAGS, MODES, QUICK, Webui, body, until

NOON = 1736683200  # 2025-01-12 12:00:00 UTC
PROMPTS = [
    "a lighthouse",
    "A LIGHTHOUSE at Dawn",
    "straße",
    "ÉCOLE d'été",
    "漢字",
    "",
    'quotes " and \\',
    "x" * 3000 + " end",
]
IPS = ["10.0.0.1", "10.0.0.2", "::1", None]
STATUSES = ["Completed", "Failed"]


def old_jobs() -> List[Dict[str, Any]]:
    """Many jobs in a few seconds, oldest first."""
    jobs = []
    for number in range(120):
        status = STATUSES[number % 3 == 2]
        jobs.append(
            {
                "id": f"Old{number:05d}",
                "type": KINDS[number % 5 == 4],
                "status": status,
                "timestamp": NOON + number // 10,
                "ip": IPS[number % len(IPS)],
                "prompt": PROMPTS[number % len(PROMPTS)],
                "started": NOON + number // 10 + 0.5,
                "finished": NOON + number // 10 + 1.5,
                "error": "OutOfMemoryError" if status == "Failed" else None,
                "images": [],
            }
        )
    return jobs


OLD = old_jobs()


def write_old_jobs(webui):
    lines = ",\n".join(f'"{job["id"]}": {json.dumps(job)}' for job in OLD)
    (webui.data / "jobs.json").write_text(f"{{\n{lines}\n}}\n")


@pytest.fixture(scope="module", params=[(MODES[0], True), (MODES[-1], False)], ids=str)
def archive(request, start_shared):
    """A webui with old jobs, with and without --api-auth. Its tests add no others."""
    mode, auth = request.param
    return start_shared(
        *MODE_FLAGS[mode], *(AUTH if auth else ()), prepare=write_old_jobs, environ={"TRACKER_RETENTION": "off"}
    )


def matching(ip=None, status=None, type=None, after=None, before=None, q=None):
    """The IDs that a list must have, newest first."""
    return [
        job["id"]
        for job in reversed(OLD)
        if (ip is None or job["ip"] == ip)
        and (status is None or job["status"].lower() == status.lower())
        and (type is None or job["type"] == type)
        and (after is None or job["timestamp"] > after)
        and (before is None or job["timestamp"] < before)
        and (q is None or q.casefold() in job["prompt"].casefold())
    ]


FILTERS = [
    {},
    {"ip": "10.0.0.2"},
    {"ip": "::1"},
    {"ip": "10.0.0.9"},
    {"status": "Completed"},
    {"status": "fAILED"},
    {"status": "Pending"},
    {"type": "img2img"},
    {"after": NOON + 5},
    {"after": NOON + 4.5},
    {"before": NOON + 3},
    {"after": NOON + 2, "before": NOON + 4},
    {"after": NOON + 100},
    {"q": "LightHouse"},
    {"q": "STRASSE"},
    {"q": "école"},
    {"q": "漢"},
    {"q": " END"},
    {"q": '"'},
    {"q": "\\"},
    {"q": "no such words"},
    {"q": ""},
    {"q": "dawn", "status": "completed", "type": "txt2img", "ip": "10.0.0.2", "after": NOON, "before": NOON + 11},
]


def pages(webui, **params):
    """Each page of a list, by following its links."""
    response = webui.client.get("/sdapi/v1/jobs", params=params)
    while True:
        assert response.status_code == 200, response.text
        yield response.json()
        if "next" not in response.links:
            return
        assert response.links["next"]["url"].startswith("/sdapi/v1/jobs?")
        response = webui.client.get(response.links["next"]["url"])


def ids(jobs):
    return [job["id"] for job in jobs]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters(archive, filters):
    expected = matching(**filters)
    assert ids(archive.jobs(**filters, limit=1000)) == expected
    assert ids(archive.jobs(**filters)) == expected[:50]


@pytest.mark.parametrize("limit", [1, 7, 10, 119, 120, 121])
@pytest.mark.parametrize("filters", [{}, {"status": "Failed"}, {"q": "lighthouse", "type": "txt2img"}], ids=str)
def test_pages_neither_repeat_nor_skip(archive, filters, limit):
    """Ten jobs share each second."""
    if limit == 1:
        filters = {**filters, "ip": "10.0.0.1"}
    found = list(pages(archive, **filters, limit=limit))
    assert list(itertools.chain.from_iterable(map(ids, found))) == matching(**filters)
    assert all(len(page) == limit for page in found[:-1])
    assert len(found) == 1 or found[-1], "no empty page at the end"


def test_job_in_a_list(archive):
    for job, old in zip(archive.jobs(limit=1000), reversed(OLD)):
        same = ("id", "prompt", "status", "timestamp", "type", "ip", "started", "finished")
        assert {name: job[name] for name in same} == {name: old[name] for name in same}
        assert "images" not in job
        assert job["image_count"] == 0
        assert type(job["timestamp"]) is int
        assert job["queue_position"] is job["progress"] is job["eta"] is None
        if job["status"] == "Failed":
            assert job["error"] == "OutOfMemoryError"


def test_unfinished_job_of_a_process_that_is_gone(archive):
    assert archive.jobs(status="Processing") == []


@pytest.mark.parametrize(
    "params, word",
    [
        ({"status": "done"}, "Pending, Processing, Completed, Failed"),
        ({"status": ""}, "Pending, Processing, Completed, Failed"),
        ({"type": "extras"}, "txt2img, img2img"),
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"after": "yesterday"}, "after"),
        ({"after": "nan"}, "after"),
        ({"before": "inf"}, "before"),
        ({"cursor": "x"}, "cursor"),
        ({"cursor": "../../etc/passwd"}, "cursor"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_422(archive, params, word):
    response = archive.client.get("/sdapi/v1/jobs", params=params)
    assert response.status_code == 422
    assert word in json.dumps(response.json()["detail"])


@pytest.mark.parametrize("params", [{"wait": -1}, {"wait": 301}, {"wait": "long"}, {"wait": "nan"}, {"images": "some"}])
def test_what_cannot_be_meant_of_a_job_is_422(archive, params):
    response = archive.client.get(f"/sdapi/v1/job/{OLD[0]['id']}", params=params)
    assert response.status_code == 422
    assert next(iter(params)) in json.dumps(response.json()["detail"])


@pytest.mark.parametrize(
    "job_id",
    [
        "AAAAAAAA",
        "a",
        "Old00000x",
        "old00000",
        "Old0000",
        "%00",
        "..%2f..%2fx",
        "Old00000%0a",
        "%D0%9Eld00000",
        "a" * 5000,
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("params", [{}, {"wait": "5"}])
def test_unknown_id_is_404(archive, job_id, params):
    began = time.monotonic()
    response = archive.client.get(f"/sdapi/v1/job/{job_id}", params=params)
    assert response.status_code == 404
    assert response.json()["detail"]
    assert time.monotonic() - began < 4, "there is nothing to wait for"


@pytest.mark.parametrize("path", ["/sdapi/v1/jobs", "/sdapi/v1/job/Old00000", "/sdapi/v1/job/AAAAAAAA"])
@pytest.mark.parametrize("auth", [None, ("user", "wrong"), ("nobody", "secret")])
def test_credentials_are_asked_for_as_the_webui_asks(archive, path, auth):
    ours = httpx.get(archive.url + path, auth=auth)
    own = httpx.get(archive.url + "/sdapi/v1/samplers", auth=auth)
    if archive.auth:
        assert ours.status_code == own.status_code == 401
        assert ours.json() == own.json()
    else:
        assert own.status_code == 200
        assert ours.status_code == (404 if "AAAA" in path else 200)


def test_openapi_has_the_routes_with_their_models(archive):
    api = archive.client.get("/openapi.json").json()

    def model(path):
        schema = api["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        reference = schema.get("items", schema)["$ref"]
        return set(api["components"]["schemas"][reference.rpartition("/")[2]]["properties"])

    fields = set(archive.job("Old00000"))
    assert fields == model("/sdapi/v1/job/{id}")
    assert set(archive.jobs()[0]) == model("/sdapi/v1/jobs") == fields - {"images"}
    parameters = {entry["name"] for entry in api["paths"]["/sdapi/v1/jobs"]["get"]["parameters"]}
    assert parameters >= {"ip", "status", "type", "after", "before", "q", "limit"}
    parameters = {entry["name"] for entry in api["paths"]["/sdapi/v1/job/{id}"]["get"]["parameters"]}
    assert parameters == {"id", "images", "wait"}
    assert {"/sdapi/v1/txt2img", "/sdapi/v1/samplers"} <= set(api["paths"])
    assert archive.client.get("/docs").status_code == 200


@pytest.mark.parametrize("path", ["/sdapi/v1/jobs", "/sdapi/v1/job/Old00000"])
@pytest.mark.parametrize("coding", ["gzip", "br, gzip;q=0.5", "x-gzip", "identity", "gzip;q=0", "", "deflate"])
def test_gzip(archive, path, coding):
    request = archive.client.build_request("GET", path, headers={"Accept-Encoding": coding})
    response = archive.client.send(request)
    plain = archive.client.get(path, headers={"Accept-Encoding": "identity"})
    assert response.json() == plain.json()
    assert "Content-Encoding" not in plain.headers
    packed = response.headers.get("Content-Encoding") == "gzip"
    if coding in ("gzip", "br, gzip;q=0.5", "x-gzip"):
        assert packed
    elif coding in ("identity", "", "deflate"):
        assert not packed


# These add jobs, so they use another webui


def test_job_with_and_without_images(every_webui):
    answer = every_webui.post(body(batch_size=2))
    job_id = answer.headers["X-Job-ID"]
    job = every_webui.job(job_id, wait=30)
    assert job["images"] == answer.json()["images"]
    assert job["parameters"] == answer.json()["parameters"]
    assert job["info"] == answer.json()["info"]
    assert job["image_count"] == 2
    assert job["ip"] == "127.0.0.1"
    assert job["error"] is None
    listed = every_webui.jobs(limit=1)[0]
    without = every_webui.job(job_id, images=False)
    assert without == listed == {name: value for name, value in job.items() if name != "images"}
    assert re.fullmatch("[A-Za-z0-9]{8}", job_id) and job["id"] == job_id


def test_filter_by_the_address_of_the_client(webui):
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(transport=transport, base_url=webui.url) as client:
        job_id = client.post("/sdapi/v1/txt2img", json=body()).headers["X-Job-ID"]
    until(webui.is_idle)
    assert ids(webui.jobs(ip="127.0.0.2"))[:1] == [job_id]
    assert job_id not in ids(webui.jobs(ip="127.0.0.1", limit=1000))


def test_forwarded_address_is_believed_of_a_proxy_on_the_same_machine_only(webui):
    """Anybody can send it."""
    for local, expected in (("127.0.0.1", "10.9.9.9"), ("127.0.0.2", "127.0.0.2")):
        transport = httpx.HTTPTransport(local_address=local)
        with httpx.Client(transport=transport, base_url=webui.url) as client:
            answer = client.post("/sdapi/v1/txt2img", json=body(), headers={"X-Forwarded-For": "10.9.9.9"})
        assert webui.job(answer.headers["X-Job-ID"], images=False)["ip"] == expected


def test_unfinished_jobs_in_lists(webui):
    """Newest first, with what is known of each at that moment."""
    gate = webui.gate()
    first = webui.send(body(standin={"hold": gate})).job_id()
    webui.until_status(first, "Processing")
    second = webui.send(body("waits")).job_id()
    third = webui.send(body("waits, too")).job_id()
    jobs = webui.jobs(limit=3)
    assert ids(jobs) == [third, second, first]
    assert [job["queue_position"] for job in jobs] == [2, 1, None]
    assert [job["progress"] is None for job in jobs] == [True, True, False]
    assert ids(webui.jobs(status="pending")) == [third, second]
    assert ids(webui.jobs(status="PROCESSING")) == [first]
    assert not {first, second, third} & set(ids(webui.jobs(status="Completed", limit=1000)))
    gate.open()
    for job_id in (first, second, third):
        webui.job(job_id, wait=30)
    assert ids(webui.jobs(status="Completed", limit=3)) == [third, second, first]
    assert webui.jobs(status="Pending") == webui.jobs(status="Processing") == []


def test_pages_while_jobs_are_added(webui):
    """What comes in between the pages moves nothing."""
    for _ in range(3):
        webui.post(body())
    until(webui.is_idle)
    expected = ids(webui.jobs(limit=1000))
    found = []
    for page in pages(webui, limit=max(2, len(expected) // 5)):
        found += ids(page)
        webui.post(body())
    assert found == expected


def test_wait_answers_when_the_job_has_ended(every_webui):
    webui, gate = every_webui, every_webui.gate()
    job_id = webui.send(body(standin={"hold": gate})).job_id()
    webui.until_status(job_id, "Processing")
    began = time.monotonic()
    assert webui.job(job_id, wait=0.3)["status"] == "Processing"
    assert 0.3 <= time.monotonic() - began < 3

    async def wait():
        async with httpx.AsyncClient(base_url=webui.url, auth=webui.auth, timeout=60) as client:
            asking = asyncio.ensure_future(client.get(f"/sdapi/v1/job/{job_id}", params={"wait": 30}))
            await asyncio.wait({asking}, timeout=0.3)
            assert not asking.done()
            gate.open()
            began = time.monotonic()
            return (await asking).json(), time.monotonic() - began

    job, seconds = asyncio.run(wait())
    assert (job["status"], len(job["images"])) == ("Completed", 1)
    assert seconds < 3
    began = time.monotonic()
    assert webui.job(job_id, wait=30) == job
    assert time.monotonic() - began < 3, "it has ended already"


def test_many_may_wait(webui):
    """They hold no thread, so everybody else is served meanwhile."""
    gate = webui.gate()
    job_id = webui.send(body(standin={"hold": gate})).job_id()
    webui.until_status(job_id, "Processing")

    async def wait():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=webui.url, timeout=60, limits=limits) as client:
            path = f"/sdapi/v1/job/{job_id}?wait=60"
            asking = [asyncio.ensure_future(client.get(path)) for _ in range(100)]
            await asyncio.wait(asking, timeout=0.5)
            began = time.monotonic()
            assert (await client.get("/sdapi/v1/samplers")).status_code == 200
            assert (await client.get(f"/sdapi/v1/job/{job_id}")).json()["status"] == "Processing"
            assert time.monotonic() - began < 3
            asking.pop().cancel()  # one of them leaves
            gate.open()
            return [answer.json()["status"] for answer in await asyncio.gather(*asking)]

    assert asyncio.run(wait()) == ["Completed"] * 99


# Pages, whatever is added and deleted between them

COUNT = 1300


def write_crowd(webui: Webui, dead: int = 0) -> None:
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


def crowd() -> List[str]:
    """Their IDs, newest first."""
    return [f"Old{number:05d}" for number in reversed(range(COUNT))]


@pytest.fixture
def crowded(start) -> Webui:
    return start(
        *QUICK,
        environ={"TRACKER_RETENTION": "off"},
        prepare=lambda webui: write_crowd(webui, dead=COUNT + 1000 - 40),  # a few more, and it is rewritten
    )


def pages_of_crowd(webui: Webui, **params: Any) -> Iterator[List[str]]:
    return map(ids, pages(webui, q="crowd", **params))


def delete(webui: Webui, job_id: str) -> None:
    assert webui.client.delete(f"/sdapi/v1/job/{job_id}").status_code == 204


def test_deleted_between_the_pages(crowded):
    """Among them the last ones of a page, by which the next one is found, and so many that jobs.json is rewritten."""
    chance = random.Random(7)
    file = (crowded.data / "jobs.json").stat().st_ino
    shown: List[str] = []
    deleted = set()
    for number, page in enumerate(pages_of_crowd(crowded, limit=100)):
        shown += page
        if number < 4:
            rest = [name for name in crowd() if name not in shown and name not in deleted]
            gone = page[-number - 1 :] + chance.sample(rest, 10)
            for job_id in gone:
                delete(crowded, job_id)
            deleted |= set(gone)
            crowded.post(body("a crowd, later"))
        if number == 1:
            until(lambda: (crowded.data / "jobs.json").stat().st_ino != file, what="jobs.json is rewritten")
    kept = [name for name in crowd() if name in shown or name not in deleted]
    assert shown == kept
    assert len(shown) == COUNT - len(deleted - set(shown))


def test_all_of_the_last_page_deleted(crowded):
    """Then nothing says where the next page begins but the time: better some job twice than one missing."""
    through = pages_of_crowd(crowded, limit=12)
    first = next(through)
    for job_id in first:
        delete(crowded, job_id)
    file = (crowded.data / "jobs.json").stat().st_ino
    for job_id in crowd()[-20:]:
        delete(crowded, job_id)
    until(lambda: (crowded.data / "jobs.json").stat().st_ino != file, what="jobs.json is rewritten")
    rest = [job_id for page in through for job_id in page]
    assert rest == crowd()[12:-20]


def test_pages_of_another_start(crowded):
    """A link is good for as long as somebody wants to follow it."""
    response = crowded.client.get("/sdapi/v1/jobs", params={"limit": 100})
    crowded.restart()
    crowded.post(body("a new one"))
    following = crowded.client.get(response.links["next"]["url"])
    assert [job["id"] for job in following.json()] == crowd()[100:200]


@pytest.mark.one_mode
def test_filters_stay(webui):
    """The link has all of the question in it."""
    question: Dict[str, Any] = {"q": "A cröwd & more = 100%", "limit": 5}
    for number in range(7):
        webui.post(body(f"a cröwd & more = 100% {number}"))
    until(lambda: len(webui.jobs(q=question["q"], status="Completed")) == 7)
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


@pytest.mark.one_mode
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


@pytest.mark.one_mode
def test_the_largest_cursor(webui, cursor):
    """Whoever makes one up finds jobs, or none, but no failure."""
    largest = re.sub(r"[0-9]+(?=-)", lambda number: "9" * len(number.group()), cursor)
    for made_up in (largest, re.sub("[0-9]+(?=-)", "0", cursor), re.sub("[A-Za-z0-9]+$", "AAAAAAAA", largest)):
        answer = webui.client.get("/sdapi/v1/jobs", params={"cursor": made_up})
        assert answer.status_code in (200, 422) and "Traceback" not in answer.text


def test_a_cursor_of_jobs_that_are_gone(crowded):
    """The next page is the same, also for the next start, which knows nothing of how the jobs lay before."""
    first = crowded.client.get("/sdapi/v1/jobs", params={"limit": 3})
    url = first.links["next"]["url"]
    assert len(cursor_of(first)) > 8
    for job_id in crowd()[:3]:
        delete(crowded, job_id)
    assert [job["id"] for job in crowded.client.get(url).json()] == crowd()[3:6]
    crowded.restart()
    assert [job["id"] for job in crowded.client.get(url).json()] == crowd()[3:6]


def test_a_cursor_of_an_index_that_is_gone(crowded):
    """Then nothing but the time says where the next page begins: better some job twice than one missing."""
    first = crowded.client.get("/sdapi/v1/jobs", params={"limit": 3})
    for job_id in crowd()[:3]:
        delete(crowded, job_id)
    crowded.kill()
    for path in crowded.data.glob("jobs.json.index*"):
        path.unlink()
    crowded.start()
    assert [job["id"] for job in crowded.client.get(first.links["next"]["url"]).json()] == crowd()[3:6]
