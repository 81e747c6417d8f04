"""What is told of jobs beside their images: labels, the paths of images, webuis by their names, and figures."""

from __future__ import annotations

import base64
import os
import signal
import socket
from typing import Any, Dict, Iterable, List
from uuid import uuid4

import pytest

from harness import ASYNC, MODE_FLAGS, MODES, QUICK, SHAPE, Webui, body, hold_the_queue, status_of, submit, until

pytestmark = pytest.mark.one_mode

JOBS, STATS = "/sdapi/v1/jobs", "/sdapi/v1/jobs/stats"

# The bytes of a header, and what they say
LABELS = {
    "plain": (b"album 7", "album 7"),
    "UTF-8": ("Ärger, 猫 🎨".encode(), "Ärger, 猫 🎨"),
    "Latin-1": (b"\xe9t\xe9", "été"),
    "the longest": (("é" * 255).encode(), "é" * 255),
    "half a character": (b"\xed\xa0\x80!", "\xed\xa0\x80!"),
    "controls": (b"a\x1b[2J\x85b", "a\x1b[2J\x85b"),
    "markup": (b'<img src=x onerror="alert(1)">\\', '<img src=x onerror="alert(1)">\\'),
    "empty": (b"", None),
    "blanks": (b" \xc2\xa0 ", None),
}


def label_of(text: str) -> Dict[str, Any]:
    return {"headers": {**ASYNC, "X-Job-Label": text}}


def labelled(webui: Webui, text: str, prompt: str = "") -> str:
    return webui.post(body(prompt), **label_of(text)).headers["x-job-id"]


def ids(jobs: Iterable[Dict[str, Any]]) -> List[str]:
    return [job["id"] for job in jobs]


@pytest.mark.parametrize("name", LABELS)
def test_label(webui, name):
    data, label = LABELS[name]
    prompt = str(uuid4())
    raw = webui.raw(body(prompt), headers=ASYNC).replace(b"\r\n", b"\r\nX-Job-Label: " + data + b"\r\n", 1)
    with socket.create_connection(("127.0.0.1", webui.port), 30) as connection:
        connection.sendall(raw)
        assert status_of(connection.recv(65536)) == 202
    (job,) = webui.jobs(q=prompt)
    assert job["label"] == webui.job(job["id"], wait=30)["label"] == label
    assert webui.records()[job["id"]].get("label") == label
    if label:
        assert ids(webui.jobs(q=prompt, label=label)) == [job["id"]]


def test_filter(webui):
    """By the whole label, with its case, and together with others."""
    mark = str(uuid4())
    spellings = [mark, mark.upper(), f"{mark} 2", mark, ""]
    jobs = [labelled(webui, spelling, mark) for spelling in spellings]
    for job_id in jobs:
        webui.job(job_id, wait=30)
    assert ids(webui.jobs(label=mark)) == [jobs[3], jobs[0]]
    assert ids(webui.jobs(label=mark.upper())) == [jobs[1]]
    assert webui.jobs(label=mark[:-1]) == webui.jobs(label=mark, status="failed") == []
    assert ids(webui.jobs(label=mark, status="completed", type="txt2img", q=mark, limit=1)) == [jobs[3]]
    assert len(webui.jobs(q=mark)) == 5
    answer = webui.client.get(JOBS, params={"label": "a" * 256})
    assert answer.status_code == 422 and answer.json()["detail"][0]["loc"] == ["query", "label"]


def test_many_jobs_by_their_label(webui):
    mark = str(uuid4())
    hold_the_queue(webui)
    waiting = [submit(webui, mark), *(labelled(webui, mark, mark) for _ in range(2))]

    def cancel(**filters: Any) -> Any:
        return webui.client.post(f"{JOBS}/cancel", json=filters)

    assert cancel(label="").status_code == cancel(label=None).status_code == cancel(label=7).status_code == 422
    invalid = webui.client.post(f"{JOBS}/cancel", content=b'{"label": "\\ud800"}')
    assert (
        invalid.json() == cancel(label=mark[1:]).json() == cancel(label=mark, status="processing").json() == {"jobs": 0}
    )
    assert cancel(label=mark).json() == {"jobs": 2}
    assert [job["error"] for job in webui.jobs(q=mark)] == ["Cancelled", "Cancelled", None]
    assert webui.client.request("DELETE", JOBS, params={"label": ""}).status_code == 422
    assert webui.client.request("DELETE", JOBS, params={"label": mark}).json() == {"jobs": 2}
    assert ids(webui.jobs(q=mark)) == waiting[:1]


URLS = ["ftp://example.org/", "example.org", "http://", "http:///x", "http://a b/", "http://u:p@example.org/"]
URLS += ["http://example.org:99999/", "http://[::1/", "http://example.org/\xe9", "http://example.org/" + "x" * 2000]
HEADERS = [("X-Job-Label", "a" * 256), ("X-Job-Label", "a" * 20_000), *(("X-Job-Webhook", url) for url in URLS)]


def test_invalid_headers(webui):
    """Nothing is generated, and what the webui refuses by itself it refuses as ever."""
    before = set(webui.records())
    for name, value in HEADERS:
        for more in ({}, ASYNC, {"Idempotency-Key": "invalid headers"}):
            headers = {name: value.encode("latin-1"), **more}
            answer = webui.post(body(), headers=headers)
            assert answer.status_code == 422, (name, value)
            assert answer.json()["detail"].startswith(name), answer.text
            assert "x-job-id" not in answer.headers
        assert isinstance(webui.post(b'{"steps": "x"}', headers=headers).json()["detail"], list)
    assert set(webui.records()) == before
    assert webui.post(body(), headers={"Idempotency-Key": "invalid headers", "X-Job-Webhook": ""}).status_code == 200


def test_invalid_headers_mean_nothing(guarded, off):
    """To who may not ask, and while tracking is off."""
    for name, value in HEADERS[::4]:
        headers = {name: value}
        assert guarded.post(body(), headers=headers, auth=("user", "wrong")).status_code == 401
        assert off.post(body(), headers=headers).status_code == 200
    assert off.client.get(STATS).json()["enabled"] is False


def test_a_label_stays(start):
    """A repeat cannot change it, and a restart and a retry keep it."""
    webui = start(*QUICK)
    hold_the_queue(webui)
    key = {"Idempotency-Key": "once"}
    first = webui.post(body("once"), headers={**ASYNC, **key, "X-Job-Label": "album"})
    again = webui.post(body("once"), headers={**ASYNC, **key, "X-Job-Label": "another"})
    assert (
        (first.json()["label"], first.json()["id"])
        == (again.json()["label"], again.json()["id"])
        == (
            "album",
            first.headers["x-job-id"],
        )
    )
    webui.kill()
    webui.start()
    job = webui.job(first.json()["id"], wait=30)
    assert (job["status"], job["label"]) == ("Completed", "album")
    hold_the_queue(webui)
    failed = labelled(webui, "album")
    assert webui.client.post(f"/sdapi/v1/job/{failed}/cancel").json()["label"] == "album"
    retry = webui.client.post(f"/sdapi/v1/job/{failed}/retry").json()
    assert (retry["retry_of"], retry["label"]) == (failed, "album")
    assert ids(webui.jobs(label="album")) == [retry["id"], failed, job["id"]]


# Images


@pytest.mark.parametrize("prefix", ["", "/below/here"])
def test_image_urls(start, webui, prefix):
    """They begin as `Location` does, with what a proxy took away, and lead to the images."""
    taken = prefix  # by the proxy, of which the webui knows
    if prefix:
        webui = start(*MODE_FLAGS[MODES[0]], "--subpath", prefix[1:])
        if SHAPE == "sdnext":  # it has its API there, too, from the second start on, and wants nothing taken away
            webui, taken = webui.restart(), ""

    def ask(method: str, path: str, **options: Any) -> Any:
        assert path.startswith(prefix)
        return webui.client.request(method, path[len(taken) :], **options)

    answer = ask("POST", f"{prefix}/sdapi/v1/txt2img", json=body(batch_size=2), headers=ASYNC)
    assert answer.json()["image_urls"] == []
    location = answer.headers["location"]
    job = ask("GET", f"{location}?wait=30").json()
    expected = [f"{location}/images/{number}" for number in range(2)]
    assert len(job["images"]) == 2 and job["image_urls"] == expected
    assert ask("GET", f"{prefix}{JOBS}?limit=1").json()[0]["image_urls"] == expected
    for url, image in zip(job["image_urls"], job["images"]):
        assert ask("GET", url).content == base64.b64decode(image)


# Webuis


@pytest.mark.parametrize("mode", MODES)
def test_server_by_default(start, mode):
    webui = start(*MODE_FLAGS[mode])
    name = f"{socket.gethostname()}:{webui.port}"
    assert webui.job(webui.post(body()).headers["x-job-id"])["server"] == name
    assert webui.client.get(STATS).json()["servers"] == [name]


def test_two_webuis_on_one_folder(start, tmp_path):
    """Each job has the name of the one that generates it, none while it waits for whichever is free first."""
    environ = {"TRACKER_DATA_DIR": str(tmp_path)}
    names = ["gpu 1", "Ärger 猫"]
    one, two = (start(*QUICK, environ={**environ, "TRACKER_SERVER": f" {name} "}) for name in names)

    def servers() -> List[str]:
        answers = [webui.client.get(STATS).json()["servers"] for webui in (one, two) if webui.process]
        assert all(answer == answers[0] for answer in answers)
        return answers[0]

    until(lambda: servers() == sorted(names), what="each knows the other")
    for webui, name in zip((one, two), names):
        job_id = hold_the_queue(webui)
        assert one.job(job_id)["server"] == two.job(job_id)["server"] == name
    job_id = submit(one)
    assert [webui.job(job_id)["server"] for webui in (one, two)] == [None, None]
    two.gates[-1].open()
    assert one.job(job_id, wait=30)["server"] == names[1]
    os.kill(two.pid, signal.SIGKILL)
    until(lambda: one.client.get(STATS).json()["servers"] == names[:1], what="the killed one is gone")
    assert {path.name for path in tmp_path.glob("jobs.json.owner-*")}, "nobody made or removed a file by asking"


# Figures


def test_stats(start):
    """They agree with the list, whatever happens to the jobs."""
    webui = start(*QUICK)

    def stats(**expected: int) -> Dict[str, Any]:
        answer = webui.client.get(STATS)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        found = answer.json()
        assert found["jobs"] == {status: len(webui.jobs(status=status)) for status in found["jobs"]}
        assert found["jobs"] == {**dict.fromkeys(found["jobs"], 0), **expected}
        assert (found["oldest_pending"] is None) == (found["jobs"]["Pending"] == 0)
        assert found["enabled"] is True and found["version"]
        return found

    assert set(stats()["jobs"]) == {"Pending", "Processing", "Completed", "Failed"}
    assert stats()["bytes"] == 0
    webui.job(webui.post(body()).headers["x-job-id"], wait=30)
    until(lambda: not any(".request" in path.name for path in webui.images()), what="the request is gone")
    size = stats(Completed=1)["bytes"]
    assert size == sum(path.stat().st_size for path in webui.images())
    hold_the_queue(webui)
    parked = [submit(webui) for _ in range(2)]
    connected = webui.send(body()).job_id()
    waited = stats(Completed=1, Processing=1, Pending=3)["oldest_pending"]
    assert 0 <= waited < 60
    until(lambda: stats(Completed=1, Processing=1, Pending=3)["oldest_pending"] > waited, what="it waits on")
    for number, job_id in enumerate([parked[0], connected, parked[1]]):
        webui.client.post(f"/sdapi/v1/job/{job_id}/cancel")
        webui.job(job_id, wait=30)
        stats(Completed=1, Processing=1, Pending=2 - number, Failed=1 + number)
    webui.kill()
    webui.start()
    stats(Completed=1, Failed=4)
    assert webui.client.request("DELETE", JOBS, params={"after": 0}).json() == {"jobs": 5}
    assert stats()["bytes"] == 0
