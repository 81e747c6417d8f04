"""What is done to all jobs that match some filters: as the list shows them, and never to more than was meant."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import httpx
import pytest
from inside import SmallWebui, WrappedOs, an_answer, ids, read_jobs, set_constants

from harness import until

NOON = 1736683200  # 2025-01-12 12:00:00 UTC
PROMPTS = ["a lighthouse", "A LIGHTHOUSE at Dawn", "straße", "", 'quotes " and \\', "漢字"]
FILTERS: List[Dict[str, Any]] = [
    {"ip": "10.0.0.2"},
    {"ip": "10.0.0.9"},
    {"status": "fAILED"},
    {"status": "Completed"},
    {"status": "Pending"},
    {"type": "IMG2IMG"},
    {"after": NOON + 5},
    {"after": NOON + 4.5},
    {"before": NOON + 3},
    {"after": NOON + 2, "before": NOON + 4},
    {"after": 0},
    {"after": NOON + 1000},
    {"before": -1e300},
    {"q": "LightHouse"},
    {"q": "STRASSE"},
    {"q": '"'},
    {"q": " "},
    {"q": "no such words"},
    {"q": "dawn", "status": "completed", "type": "txt2img", "ip": "10.0.0.1", "after": NOON, "before": NOON + 11},
]


def old_jobs(count: int = 240) -> List[Dict[str, Any]]:
    """Of each kind, ten in a second, oldest first."""
    return [
        {
            "id": f"Old{number:05d}",
            "type": ("txt2img", "img2img")[number % 5 == 4],
            "status": ("Completed", "Failed")[number % 3 == 2],
            "timestamp": NOON + number // 10,
            "ip": ("10.0.0.1", "10.0.0.2", "::1", None)[number % 4],
            "prompt": PROMPTS[number % len(PROMPTS)],
            "images": [],
        }
        for number in range(count)
    ]


def write_jobs(folder: Path, count: int = 240) -> None:
    jobs = old_jobs(count)
    (folder / "jobs.json").write_text("{\n" + ",\n".join(f'"{job["id"]}": {json.dumps(job)}' for job in jobs) + "\n}\n")


@pytest.fixture
def webui(script: Any, tmp_path: Path) -> Iterator[SmallWebui]:
    write_jobs(tmp_path)
    with SmallWebui(script, tmp_path) as made:
        yield made


def ask(webui: SmallWebui, method: str, path: str, **options: Any) -> httpx.Response:
    return asyncio.run(webui.get(path, method, **options))


def delete(webui: SmallWebui, filters: Any) -> httpx.Response:
    return ask(webui, "DELETE", "jobs", params=filters)


def cancel(webui: SmallWebui, filters: Any) -> httpx.Response:
    return ask(webui, "POST", "jobs/cancel", content=json.dumps(filters))


def listed(webui: SmallWebui, **filters: Any) -> List[str]:
    answer = ask(webui, "GET", "jobs", params={**filters, "limit": 1000})
    assert answer.status_code == 200
    return [job["id"] for job in answer.json()]


def accept(webui: SmallWebui, job_id: str, status: str = "Pending", **fields: Any) -> None:
    """A job of this process, which can be cancelled."""
    tracker = webui.tracker
    values = {"type": "txt2img", "timestamp": NOON, "ip": "10.0.0.2", "prompt": "a lighthouse", **fields}

    def end() -> bool:
        tracker.fail(job_id, "Cancelled")
        return True

    assert tracker.accept(webui.script.Job(id=job_id, status="Pending", **values), end, b"").exception() is None
    if status == "Processing":
        tracker.start(job_id)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_delete_takes_what_the_list_shows(webui, filters):
    before, matching = listed(webui), listed(webui, **filters)
    assert len(matching) < len(before) == 240 or filters == {"after": 0}
    answer = delete(webui, filters)
    assert (answer.status_code, answer.json()) == (200, {"jobs": len(matching)})
    assert answer.headers["cache-control"] == "no-store"
    assert listed(webui) == [job_id for job_id in before if job_id not in matching]
    assert delete(webui, filters).json() == {"jobs": 0}


@pytest.mark.parametrize("status, expected", [("Completed", 409), ("Failed", 200)])
def test_a_cancelled_job_of_another_webui_has_ended_meanwhile(webui, monkeypatch, status, expected):
    """Between the mark that it is to be cancelled and the look at it: 200 promises that it ends as Failed."""
    job_id = listed(webui, status=status)[0]
    monkeypatch.setattr(webui.tracker, "cancel", lambda _: True)
    assert ask(webui, "POST", f"job/{job_id}/cancel").status_code == expected


@pytest.mark.every_store
def test_one_filter_after_another(script, tmp_path, store_environ):
    """In any store."""
    with SmallWebui(script, tmp_path, **store_environ) as webui:
        jobs = old_jobs()
        for written in [webui.tracker.store.put(script.job_from_record(job), new=True) for job in jobs]:
            written.result(20)
        left = jobs[::-1]
        for filters in sorted(FILTERS, key=len, reverse=True):
            matching = [job for job in left if fits(job, filters)]
            assert listed(webui, **filters) == [job["id"] for job in matching]
            assert delete(webui, filters).json() == {"jobs": len(matching)}
            left = [job for job in left if job not in matching]
            assert listed(webui) == [job["id"] for job in left]
        assert left == []


def fits(job: Dict[str, Any], filters: Dict[str, Any]) -> bool:
    return (
        all(job[name].lower() == filters.get(name, job[name]).lower() for name in ("status", "type"))
        and filters.get("ip") in (None, "", job["ip"])
        and filters.get("after", -1) < job["timestamp"] < filters.get("before", 1 << 40)
        and filters.get("q", "").casefold() in job["prompt"].casefold()
    )


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_cancel_takes_what_the_list_shows(webui, filters):
    kinds = [
        {"type": type_, "ip": ip, "prompt": prompt, "timestamp": NOON + second}
        for type_ in ("txt2img", "img2img")
        for ip in ("10.0.0.1", "10.0.0.2")
        for prompt in PROMPTS
        for second in (1, 3, 6)
    ]
    for number, kind in enumerate(kinds):
        accept(webui, f"New{number:05d}", "Processing" if number % 7 == 6 else "Pending", **kind)
    before = set(listed(webui))
    open_ = {job_id for status in ("Pending", "Processing") for job_id in listed(webui, status=status)}
    matching = open_.intersection(listed(webui, **filters))
    answer = cancel(webui, filters)
    assert (answer.status_code, answer.json()) == (200, {"jobs": len(matching)})
    assert {job_id for status in ("Pending", "Processing") for job_id in listed(webui, status=status)} == (
        open_ - matching
    ), "and none is shown as it was"
    assert {job_id for job_id in map(webui.tracker.get, open_) if job_id.error == "Cancelled"} == set(
        map(webui.tracker.get, matching)
    )
    assert set(listed(webui)) == before, "cancelling removes none"
    assert delete(webui, {"after": 0}).json()["jobs"] == 240 + len(matching), "and what has not ended stays"
    for job_id in open_ - matching:
        webui.tracker.fail(job_id, "")


# What is refused


SAME: List[Any] = [
    ({"status": "done"}, "status", "it must be one of Pending, Processing, Completed, Failed"),
    ({"status": ""}, "status", "it must be one of Pending, Processing, Completed, Failed"),
    ({"type": "extras"}, "type", "it must be one of txt2img, img2img"),
    ({"q": "a" * 501}, "q", "it must have at most 500 characters"),
]
IN_A_URL = [
    *({name: text} for name in ("after", "before") for text in ("", "yesterday", "nan", "inf", "-inf", "1e999")),
    {"after": "0x10"},
    {"after": "9" * 5000},
]
IN_JSON = [
    '{"after": "1736683200"}',
    '{"after": true}',
    '{"before": null}',
    '{"before": []}',
    '{"before": {}}',
    '{"after": NaN}',
    '{"after": -Infinity}',
    '{"after": 1e999}',
    '{"before": %s}' % ("9" * 400),
]


@pytest.mark.parametrize(("filters", "name", "message"), SAME, ids=str)
def test_an_invalid_value_is_told_in_the_same_words_everywhere(webui, filters, name, message):
    for where, answer in (
        ("query", ask(webui, "GET", "jobs", params=filters)),
        ("query", delete(webui, filters)),
        ("body", cancel(webui, filters)),
    ):
        assert answer.status_code == 422
        assert answer.json()["detail"] == [{"loc": [where, name], "msg": message, "type": "value_error"}]


@pytest.mark.parametrize("filters", IN_A_URL, ids=lambda filters: str(filters)[:40])
def test_a_number_in_a_url(webui, filters):
    answers = [ask(webui, "GET", "jobs", params=filters), delete(webui, filters)]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert answers[0].json() == answers[1].json() and "a finite number" in answers[0].text
    assert len(webui.jobs()) == 240


@pytest.mark.parametrize("text", IN_JSON, ids=lambda text: text[:40])
def test_a_number_in_json(webui, text):
    accept(webui, "WAITING1")
    answer = ask(webui, "POST", "jobs/cancel", content=text)
    assert answer.status_code == 422 and "a finite number" in answer.text
    assert webui.tracker.get("WAITING1").status == "Pending"
    webui.tracker.fail("WAITING1", "")


EMPTY: List[Any] = [{"q": ""}, {"ip": ""}, {"q": "", "status": "Failed"}, {"status": "Failed", "label": ""}]
TOO_MUCH: List[Any] = [
    {"limit": 1},
    {"cursor": "x"},
    {"status": "Failed", "limit": 1},
    {"status": "Failed", "cursor": ""},
    {"state": "Failed"},
    {"Status": "Failed"},
    {"status": "Failed", "ip ": "10.0.0.1"},
    {"status": "Failed", "\ud83d": "1"},
    {"status": "Failed", "x" * 5000: "1"},
    {"status": "Failed", "": ""},
]


@pytest.mark.parametrize("filters", [{}, *EMPTY, *TOO_MUCH], ids=lambda filters: ascii(filters)[:40])
def test_no_filter_and_empty_and_unknown_ones(webui, filters):
    accept(webui, "WAITING1")
    in_url = {name.replace("\ud83d", "%ed%a0%bd"): value for name, value in filters.items()}
    answers = {"body": cancel(webui, filters), "query": delete(webui, in_url)}
    for where, answer in answers.items():
        (problem,) = answer.json()["detail"]
        assert answer.status_code == 422 and problem["loc"][0] == where
        expected = "no such filter" if filters in TOO_MUCH else "it is empty" if filters else "at least one filter"
        assert expected in problem["msg"] and len(answer.text) < 500
    assert webui.tracker.get("WAITING1").status == "Pending" and len(webui.jobs()) == 241
    webui.tracker.fail("WAITING1", "")


def test_what_is_said_twice(webui):
    """Whichever of them counted, it could be the wrong one."""
    accept(webui, "WAITING1")
    answers = [
        ask(webui, "DELETE", "jobs?status=Failed&status=Completed"),
        ask(webui, "DELETE", "jobs?status=Failed&status=Failed"),
        ask(webui, "POST", "jobs/cancel", content='{"ip": "10.0.0.9", "ip": "10.0.0.2"}'),
    ]
    assert [answer.status_code for answer in answers] == [422] * 3
    assert all("more than once" in answer.text for answer in answers)
    assert webui.tracker.get("WAITING1").status == "Pending" and len(webui.jobs()) == 241
    webui.tracker.fail("WAITING1", "")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'[["ip", "10.0.0.2"]]',
        b'"ip"',
        b"ip=10.0.0.2",
        b"7",
        b'{"ip": "10.0.0.2"} {}',
        b"\xff\xfe\xfd",
        b'{"ip": "\xff"}',
        b"[" * 60_000,
        b'{"ip":' * 9_000,
        b'{"after": ' + b"9" * 5000 + b"}",
        b'{"ip": "' + b"x" * 70_000 + b'"}',
        b" " * 1_000_000,
        b'{"ip": ["10.0.0.2"]}',
        b'{"ip": {"10.0.0.2": 1}}',
        b'{"ip": 10}',
        b'{"ip": null, "status": "Pending"}',
        b'{"q": false}',
        b'{"status": 0}',
    ],
    ids=lambda content: str(content[:30]),
)
def test_a_body_that_is_no_filter(webui, content):
    accept(webui, "WAITING1")
    answer = ask(webui, "POST", "jobs/cancel", content=content)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"][0]["loc"][0] == "body" and len(answer.text) < 500
    assert webui.tracker.get("WAITING1").status == "Pending"
    webui.tracker.fail("WAITING1", "")


@pytest.mark.parametrize("value", ["\ud800", "\0", "' OR 1=1 --", "%", "_", "\u202e", "null", "x" * 499])
def test_a_text_that_no_job_has(webui, value):
    """It is text, whatever it looks like."""
    accept(webui, "WAITING1")
    for name in ("ip", "q"):
        content = json.dumps({name: value})
        assert ask(webui, "POST", "jobs/cancel", content=content).json() == {"jobs": 0}
        if value != "\ud800":  # of which a URL knows nothing
            assert delete(webui, {name: value}).json() == {"jobs": 0}
    assert webui.tracker.get("WAITING1").status == "Pending" and len(webui.jobs()) == 241
    webui.tracker.fail("WAITING1", "")


def test_a_foreign_page_is_refused_before_anything_is_read(webui):
    accept(webui, "WAITING1")
    foreign = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    for content in (b'{"after": 0}', b"{", b""):
        assert ask(webui, "POST", "jobs/cancel", content=content, headers=foreign).status_code == 403
    for query in ("after=0", "nobody=1", ""):
        assert ask(webui, "DELETE", f"jobs?{query}", headers=foreign).status_code == 403
    assert webui.tracker.get("WAITING1").status == "Pending" and len(webui.jobs()) == 241
    webui.tracker.fail("WAITING1", "")


# Many, others meanwhile, and trouble


def test_thousands(script, tmp_path, caplog):
    """With their files, in steps of a hundred, each of which is one write."""
    caplog.set_level("INFO", "job_tracker")
    write_jobs(tmp_path, 5000)
    with SmallWebui(script, tmp_path) as webui:
        store, images, steps = webui.tracker.store, webui.tracker.images, []
        for job_id in ids(script, webui.tracker, status="Completed", ip="::1", q="a lighthouse")[:50]:
            job = store.get(job_id)
            store.put(images.save(job, an_answer(script, job_id, 2))).result()
        kept = store.get("Old00000")
        store.put(images.save(kept, an_answer(script, kept.id, 1))).result()
        remove = store.remove
        store.remove = lambda jobs: steps.append(len(jobs)) or remove(jobs)
        assert [delete(webui, {"ip": ip}).json()["jobs"] for ip in ("10.0.0.2", "::1", "::1")] == [1250, 1250, 0]
        assert max(steps) == 100 and len(steps) <= 26
        assert set(ids(script, webui.tracker, ip="10.0.0.2") + ids(script, webui.tracker, ip="::1")) == set()
        assert [path.name[:8] for path in Path(images.folder).glob("*/*")] == ["Old00000"] * 2
        assert "Removed, as a client asked for: 1250 jobs, 100 images" in caplog.text
    assert sum(record is not None for record in read_jobs(tmp_path / "jobs.json").values()) == 2500


def test_a_thousand_that_wait(webui):
    for number in range(1000):
        accept(webui, f"New{number:05d}", ip="10.0.0.7" if number % 10 else "10.0.0.8")
    assert cancel(webui, {"ip": "10.0.0.7", "status": "pending"}).json() == {"jobs": 900}
    assert len(listed(webui, status="Pending")) == 100
    assert cancel(webui, {"status": "Completed"}).json() == {"jobs": 0}
    assert cancel(webui, {"ip": "10.0.0.8"}).json() == {"jobs": 100}
    assert listed(webui, status="Pending") == []


def test_those_that_wait_come_before_those_that_run(webui):
    """The next one would begin when the one before it is interrupted."""
    order: List[str] = []
    for number in range(250):
        job_id = f"New{number:05d}"
        accept(webui, job_id, "Processing" if number == 0 else "Pending")
    cancel_one = webui.tracker.cancel
    webui.tracker.cancel = lambda job_id: order.append(job_id) or cancel_one(job_id)
    assert cancel(webui, {"ip": "10.0.0.2"}).json() == {"jobs": 250}
    assert order[-1] == "New00000" and len(order) == len(set(order)) == 250


def test_one_that_has_ended_meanwhile_is_not_counted(webui):
    for number in range(4):
        accept(webui, f"New{number:05d}")
    cancel_one = webui.tracker.cancel

    def cancel_late(job_id: str) -> bool:
        webui.tracker.fail("New00001", "it failed")
        until(lambda: webui.tracker.running("New00001") is None)
        return cancel_one(job_id)

    webui.tracker.cancel = cancel_late
    assert cancel(webui, {"status": "Pending"}).json() == {"jobs": 3}
    assert webui.tracker.get("New00001").error == "it failed"


class Held:
    """A removal that waits at its first files until it may go on."""

    def __init__(self, webui: SmallWebui):
        self.reached, self.go_on = threading.Event(), threading.Event()
        images = webui.tracker.images
        remove = images.remove

        def held(names: Any) -> int:
            self.reached.set()
            assert self.go_on.wait(60)
            return remove(names)

        images.remove = held


def test_it_holds_up_no_other_look(webui):
    """Whoever else wants to delete waits for it, and is not told of the same jobs."""
    held = Held(webui)
    with ThreadPoolExecutor(20) as executor:
        deletions = [executor.submit(delete, webui, {"ip": "::1"}) for _ in range(12)]
        assert held.reached.wait(60)
        answers = [
            executor.submit(ask, webui, "GET", path)
            for path in ("job/Old00000?images=false", "jobs?ip=10.0.0.1", "jobs?q=dawn")
        ]
        assert [answer.result(60).status_code for answer in answers] == [200] * 3
        assert ask(webui, "DELETE", "job/AAAAAAAA").status_code == 404
        assert not any(deletion.done() for deletion in deletions)
        held.go_on.set()
        counts = [deletion.result(60).json()["jobs"] for deletion in deletions]
    assert sorted(counts) == [0] * 11 + [60]


def test_a_client_that_leaves_changes_nothing(webui):
    held = Held(webui)

    async def leave() -> None:
        asking = asyncio.ensure_future(webui.get("jobs", "DELETE", params={"after": 0}))
        await asyncio.get_running_loop().run_in_executor(None, held.reached.wait, 60)
        asking.cancel()
        await asyncio.wait({asking})

    asyncio.run(leave())
    held.go_on.set()
    until(lambda: webui.jobs() == [], what="all of them go")


def test_a_disk_that_fails_half_way(script, webui, caplog):
    """503, and the log says what was done. What was left is still there."""
    writes: List[Any] = []

    def pwrite(*arguments: Any) -> int:
        writes.append(arguments)
        if len(writes) > 1:
            raise OSError(errno.EIO, "Input/output error", "/secret/path")
        return os.pwrite(*arguments)

    set_constants(script, RETRY=0.1)
    assert webui.tracker.store.idle()  # it has put its name into its lock
    script.os = WrappedOs(pwrite=pwrite)
    answer = delete(webui, {"after": 0})
    assert answer.status_code == 503
    assert "Input/output error" in answer.json()["detail"] and "secret" not in answer.text
    assert "100 jobs, 0 images, 0 bytes were removed, then this failed" in caplog.text
    script.os = os
    assert webui.tracker.store.idle()
    assert len(webui.jobs()) == 40, "what the store had accepted is written when the disk is back"


def test_a_store_that_cannot_be_read_half_way(webui, caplog):
    for number in range(150):
        accept(webui, f"New{number:05d}")
    query, store = webui.tracker.store.query, webui.tracker.store

    def fail(filter_: Any, limit: int, cursor: Optional[str] = None, **options: Any) -> Any:
        if cursor is not None:
            raise webui.script.StoreError("the disk is gone")
        return query(filter_, limit, cursor, **options)

    store.query = fail
    answer = cancel(webui, {"status": "Pending"})
    store.query = query
    assert answer.status_code == 503 and "the disk is gone" in answer.json()["detail"]
    assert "100 jobs were cancelled, then this failed: the disk is gone" in caplog.text
    until(lambda: len(listed(webui, status="Pending")) == 50)
    cancel(webui, {"status": "Pending"})


def test_a_reload_ends_it_after_a_step(script, tmp_path):
    write_jobs(tmp_path)
    with SmallWebui(script, tmp_path) as webui:
        held = Held(webui)
        with ThreadPoolExecutor(2) as executor:
            deletion = executor.submit(delete, webui, {"after": 0})
            assert held.reached.wait(60)
            closed = webui.tracker.close()
            time.sleep(0.1)
            assert not closed.done(), "the store is needed until the step has ended"
            held.go_on.set()
            assert deletion.result(60).status_code == 503
            closed.result(60)
    assert sum(record is not None for record in read_jobs(tmp_path / "jobs.json").values()) == 140
