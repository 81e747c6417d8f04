"""GET /sdapi/v1/job/{id}/images/{n}: an image as a file, and what becomes of it when its job is deleted."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Set

import httpx
import pytest
from PIL import Image

from harness import MODES, QUICK, Sent, Webui, body, connect, new_client, open_files, submit, until

pytestmark = pytest.mark.one_mode


def ended_job(webui: Webui, **fields: Any) -> Dict[str, Any]:
    job_id = submit(webui, **fields)
    return webui.job(job_id, wait=30)


def vary(answer: httpx.Response) -> Set[str]:
    """Some webui's own gzip says it once more."""
    return set(answer.headers["vary"].split(", "))


def image_of(webui: Webui, job: Dict[str, Any], n: Any = 0, method: str = "GET", **headers: str) -> httpx.Response:
    return webui.client.request(method, f"/sdapi/v1/job/{job['id']}/images/{n}", headers=headers)


def file_of(webui: Webui, job: Dict[str, Any], n: int = 0) -> bytes:
    return base64.b64decode(job["images"][n])


@pytest.fixture(scope="module")
def job(webui: Webui) -> Dict[str, Any]:
    """One with three images. Its tests leave it as it is."""
    job = ended_job(webui, batch_size=2, save_images=True)
    assert len(job["images"]) == 3  # the grid comes first
    return job


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_each_image(webui, job, coding):
    for n in range(3):
        answer = image_of(webui, job, n, **{"Accept-Encoding": coding})
        assert answer.status_code == 200
        assert answer.content == file_of(webui, job, n)
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers.get("content-encoding", "identity") == coding
        assert vary(answer) == {"Accept-Encoding"}
        assert answer.headers["cache-control"].startswith("private")
        assert answer.headers["content-disposition"] == f'inline; filename="{job["id"]}_{n}.png"'
        assert answer.headers["x-content-type-options"] == "nosniff"
        if coding == "identity":
            assert int(answer.headers["content-length"]) == len(answer.content)
        assert "access-control-allow-origin" not in answer.headers


def test_true_type(start):
    webui = start(*QUICK)
    for samples_format, kind in (("jpg", "jpeg"), ("webp", "webp"), ("png", "png")):
        webui.client.post("/sdapi/v1/options", json={"samples_format": samples_format})
        answer = image_of(webui, ended_job(webui))
        assert answer.headers["content-type"] == f"image/{kind}"
        assert Image.open(io.BytesIO(answer.content)).format == kind.upper()


TEXTS = {
    "text": ("Grüße, no image", "text/plain; charset=utf-8", "Grüße, no image".encode()),
    "page": ("<script>alert(1)</script>", "text/plain; charset=utf-8", b"<script>alert(1)</script>"),
    "page in base64": (base64.b64encode(b"<html>!").decode() + "", "application/octet-stream", b"<html>!"),
    "drawing with a script": (base64.b64encode(b"<svg onload=x>").decode(), "application/octet-stream", None),
    "gif": (base64.b64encode(b"GIF89a" + bytes(30)).decode(), "image/gif", b"GIF89a" + bytes(30)),
    "nothing": ("", "text/plain; charset=utf-8", b""),
}


def test_what_is_no_picture(webui):
    """It is given in a form in which no browser runs anything of it."""
    job = ended_job(webui, standin={"no_images": True, "strings": [text for text, _, _ in TEXTS.values()]})
    assert job["images"] == [text for text, _, _ in TEXTS.values()]
    for n, (text, kind, content) in enumerate(TEXTS.values()):
        answer = image_of(webui, job, n)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == kind, text
        assert content is None or answer.content == content
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert re.fullmatch(r'inline; filename="[A-Za-z0-9]{8}_\d+\.[a-z]+"', answer.headers["content-disposition"])


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_etag(webui, job, coding):
    first = image_of(webui, job, **{"Accept-Encoding": coding})
    tag = first.headers["etag"]
    assert re.fullmatch(r'"[!#-~]+"', tag)
    for known in (tag, f"W/{tag}", f'"other", {tag}', f'"other",{tag} , W/"more"', "*"):
        again = image_of(webui, job, **{"Accept-Encoding": coding, "If-None-Match": known})
        assert again.status_code == 304 and again.content == b"", known
        for name in ("etag", "cache-control"):
            assert again.headers[name] == first.headers[name]
        assert vary(again) == vary(first)
        assert "content-type" not in again.headers
    for unknown in ('"other"', tag.strip('"'), tag[:-2] + '"', ""):
        again = image_of(webui, job, **{"Accept-Encoding": coding, "If-None-Match": unknown})
        assert again.status_code == 200 and again.content == first.content, unknown
    assert image_of(webui, job, 1, **{"Accept-Encoding": coding}).headers["etag"] != tag


def test_a_coding_is_another_tag(webui, job):
    """A strong tag says that the bytes on the line are the same."""
    tags = {image_of(webui, job, **{"Accept-Encoding": coding}).headers["etag"] for coding in ("identity", "gzip")}
    assert len(tags) == 2


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_head(webui, job, coding):
    get = image_of(webui, job, **{"Accept-Encoding": coding})
    head = image_of(webui, job, method="HEAD", **{"Accept-Encoding": coding})
    assert head.status_code == 200 and head.content == b""
    volatile = {"date", "x-process-time", "vary", "transfer-encoding"}
    assert {name: value for name, value in head.headers.items() if name not in volatile} == {
        name: value for name, value in get.headers.items() if name not in volatile
    }
    tag = head.headers["etag"]
    again = image_of(webui, job, method="HEAD", **{"Accept-Encoding": coding, "If-None-Match": tag})
    assert again.status_code == 304
    assert image_of(webui, job, 99, method="HEAD").status_code == 404


@pytest.mark.parametrize(
    "n, status",
    [
        ("3", 404),
        ("999999", 404),
        ("-1", 422),
        ("1000000", 422),
        ("9" * 400, 422),
        ("one", 422),
        ("0x0", 422),
        ("1.5", 422),
        ("%00", 422),
        ("", 404),
        ("0/0", 404),
        ("..%2f..%2fconfig.json", 404),
    ],
)
def test_no_such_image(webui, job, n, status):
    answer = image_of(webui, job, n)
    assert answer.status_code in (status, 404 if status == 422 and "%" in n else status)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["detail"]


@pytest.mark.parametrize("job_id", ["AAAAAAAA", "x", "..", "%2e%2e", "äöüßäöüß"])
def test_no_such_job(webui, job_id):
    assert image_of(webui, {"id": job_id}).status_code == 404


def test_a_job_without_images(webui):
    gate = webui.gate()
    job_id = submit(webui, standin={"hold": gate})
    answer = image_of(webui, {"id": job_id})
    assert answer.status_code == 404
    assert answer.json()["detail"] in ("The job is still Pending", "The job is still Processing")
    assert answer.headers["cache-control"] == "no-store", "it is no longer so in a moment"
    gate.open()
    webui.job(job_id, wait=30)
    assert image_of(webui, {"id": job_id}).status_code == 200


def test_the_image_of_an_answer_that_has_just_come(webui):
    """Who has the answer has the ID of a job whose images can be asked for."""
    for _ in range(15):
        answer = webui.post(body(batch_size=2, width=256, height=256), headers={"Accept-Encoding": "identity"})
        image = image_of(webui, {"id": answer.headers["x-job-id"]})
        assert image.status_code == 200
        assert base64.b64encode(image.content).decode() == answer.json()["images"][0]


def test_a_file_that_is_gone(webui):
    job = ended_job(webui)
    name = f"{job['id']}_0.png"
    path = next(path for path in webui.images() if path.name == name)
    tag = image_of(webui, job).headers["etag"]
    path.unlink()
    for method in ("GET", "HEAD"):
        assert image_of(webui, job, method=method).status_code == 404
        assert image_of(webui, job, method=method, **{"If-None-Match": tag}).status_code == 404
    shown = webui.job(job["id"])
    assert shown["images"] == [None] and "no longer on disk" in shown["error"]
    path.symlink_to("/etc/passwd")
    assert image_of(webui, job).status_code == 404
    path.unlink()
    path.mkdir()
    assert image_of(webui, job).status_code == 404
    path.rmdir()
    assert webui.client.delete(f"/sdapi/v1/job/{job['id']}").status_code == 204


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_needs_credentials(pool, method):
    webui = pool.get("tracked", MODES[-1], auth=True)
    job = ended_job(webui)
    path = f"/sdapi/v1/job/{job['id']}/images/0"
    for auth in (("user", "wrong"), None):
        with new_client(webui.url, auth=auth) as client:
            answer = client.request(method, path)
            assert answer.status_code == 401 and "etag" not in answer.headers
    assert image_of(webui, job, method=method).status_code == 200


def test_many_at_once(webui):
    """Large ones, to slow readers, keep nobody waiting and leave no file open."""
    job = ended_job(webui, standin={"image_bytes": 20_000_000})
    request = f"GET /sdapi/v1/job/{job['id']}/images/0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    readers = [Sent(webui.port, request.encode()) for _ in range(20)]
    for reader in readers:
        assert reader.head()[0] == 200
    began = time.monotonic()
    assert webui.job(job["id"], images=False)["status"] == "Completed"
    assert time.monotonic() - began < 2
    for reader in readers[1:]:
        reader.leave(reset=True)
    assert readers[0].content() == file_of(webui, job)
    if sys.platform == "linux":  # which alone tells what is open
        until(lambda: not any(job["id"] in name for name in open_files(webui.pid)), what="all files are closed")


# Deleting


def delete(webui: Webui, job_id: str) -> httpx.Response:
    return webui.client.delete(f"/sdapi/v1/job/{job_id}")


@pytest.mark.parametrize("status", ["Completed", "Failed"])
def test_delete(webui, status):
    prompt = f"of {uuid.uuid4()}"
    gate = webui.gate()
    standin = {"hold": gate, **({"fail": "RuntimeError"} if status == "Failed" else {})}
    job_id = submit(webui, prompt, batch_size=2, standin=standin)
    gate.open()
    job = webui.job(job_id, wait=30)
    assert job["status"] == status
    mine = [path for path in webui.images() if path.name.startswith(job_id)]
    assert any(path.name.endswith(f"{job_id}.json") for path in mine) == (status == "Completed")
    answer = delete(webui, job_id)
    assert answer.status_code == 204 and answer.content == b""
    assert "content-length" not in answer.headers and "content-type" not in answer.headers
    assert job_id not in webui.records()
    assert not any(path.exists() for path in mine)
    for method, path in [
        ("GET", ""),
        ("GET", "?wait=30"),
        ("GET", "/images/0"),
        ("HEAD", "/images/0"),
        ("POST", "/cancel"),
        ("DELETE", ""),
    ]:
        assert webui.client.request(method, f"/sdapi/v1/job/{job_id}{path}").status_code == 404
    assert webui.jobs(q=prompt) == []


def test_delete_survives_a_restart(start):
    webui = start(*QUICK)
    jobs = [ended_job(webui) for _ in range(3)]
    assert delete(webui, jobs[1]["id"]).status_code == 204
    webui.restart()
    assert [job["id"] for job in webui.jobs()] == [jobs[2]["id"], jobs[0]["id"]]
    assert delete(webui, jobs[1]["id"]).status_code == 404
    assert len(webui.images()) == 4


def test_delete_while_it_waits_or_runs(webui):
    gate = webui.gate()
    running, waiting = (submit(webui, standin={"hold": gate}) for _ in range(2))
    webui.until_status(running, "Processing")
    for job_id, status in ((running, "Processing"), (waiting, "Pending")):
        answer = delete(webui, job_id)
        assert answer.status_code == 409 and status in answer.json()["detail"]
    gate.open()
    for job_id in (running, waiting):
        job = webui.job(job_id, wait=30)
        assert job["status"] == "Completed" and job["images"][0]
        assert delete(webui, job_id).status_code == 204


@pytest.mark.parametrize("job_id", ["AAAAAAAA", "short", "%00", "äöüßäöüß", "..", "jobs"])
def test_delete_of_no_job(webui, job_id):
    assert delete(webui, job_id).status_code == 404


def test_delete_at_once_by_many(webui):
    jobs = [ended_job(webui)["id"] for _ in range(5)]
    with ThreadPoolExecutor(10) as executor:
        statuses = [answer.status_code for answer in executor.map(lambda job_id: delete(webui, job_id), jobs * 4)]
    assert set(statuses) <= {204, 404} and statuses.count(204) >= 5
    assert not set(jobs) & set(webui.records())


def test_delete_while_it_is_read(webui):
    """Who began to read an image gets all of it."""
    job = ended_job(webui, standin={"image_bytes": 20_000_000})
    request = f"GET /sdapi/v1/job/{job['id']}/images/0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    reader = Sent(webui.port, request.encode())
    assert reader.head()[0] == 200
    assert delete(webui, job["id"]).status_code == 204
    assert reader.content() == file_of(webui, job)


def test_delete_needs_credentials(pool):
    webui = pool.get("tracked", MODES[-1], auth=True)
    job_id = ended_job(webui)["id"]
    for auth in (("user", "wrong"), None):
        with new_client(webui.url, auth=auth) as client:
            assert client.delete(f"/sdapi/v1/job/{job_id}").status_code == 401
    assert webui.job(job_id)["images"]
    assert delete(webui, job_id).status_code == 204


def test_delete_of_a_job_of_another_process(pair):
    one, two = pair
    ended = ended_job(one)["id"]
    gate = one.gate()
    running = connect(one, standin={"hold": gate})
    one.until_status(running, "Processing")
    assert delete(two, running).status_code == 409
    assert delete(two, ended).status_code == 204
    assert one.client.get(f"/sdapi/v1/job/{ended}").status_code == 404
    gate.open()
    assert two.job(running, wait=30)["status"] == "Completed"
    assert json.dumps(one.job(running)) == json.dumps(two.job(running))
