"""A tracked request from its acceptance to the end of its answer, and what is left of it when tracking is off."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from harness import KINDS, ORIGIN, QUICK, SHAPE, body, until, without_time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STEPS = {"Pending": 0, "Processing": 1, "Completed": 2, "Failed": 2}

SLOW_DISK = """
import os, time

real = os.fsync

def fsync(file):
    if os.path.exists({gate!r}):
        time.sleep(0.4)
        real(file)
        print("synced", os.readlink(f"/proc/self/fd/{{file}}"), flush=True)
    else:
        real(file)

os.fsync = fsync
"""


def own_headers(response):
    """Headers that are the same each time."""
    return [pair for pair in response.headers.raw if pair[0].lower() not in (b"date", b"x-process-time")]


@pytest.mark.parametrize("kind", KINDS)
def test_head(webui, alone, kind):
    """The head says what is promised, beside what the webui's own layers say."""
    headers = {"Origin": ORIGIN, "Accept-Encoding": "identity"}
    response = webui.post(body(kind=kind), kind, headers=headers)
    own = alone(webui).post(body(kind=kind), kind, headers=headers)
    assert response.status_code == 200
    assert re.fullmatch("[A-Za-z0-9]{8}", response.headers["X-Job-ID"])
    assert response.headers["Content-Type"] == own.headers["Content-Type"] == "application/json"
    assert response.headers["Access-Control-Expose-Headers"] == "X-Job-ID"
    assert response.headers.get("Access-Control-Allow-Origin") == own.headers.get("Access-Control-Allow-Origin")
    ours = {"x-job-id", "access-control-expose-headers", "transfer-encoding", "vary", "x-accel-buffering"}
    assert set(response.headers) - ours == set(own.headers) - {"content-length", "vary"}
    vary = {word.strip() for word in response.headers["Vary"].split(",")}
    assert "Accept-Encoding" in vary
    assert vary >= {word.strip() for word in own.headers.get("Vary", "").split(",") if word}


@pytest.mark.parametrize("kind", KINDS)
def test_answer_is_the_webuis_own_after_white_space(every_webui, alone, kind):
    request = body(kind=kind, batch_size=2, prompt='ünïcode "quotes" \\ 漢字 🎨')
    response = every_webui.post(request, kind)
    own = alone(every_webui).post(request, kind)
    named = f'"force_task_id":"{response.headers["X-Job-ID"]}"'.encode()  # so the webui's own progress has a name
    answer = response.content.replace(named, b'"force_task_id":null')
    assert without_time(answer.lstrip(b" ")) == without_time(own.content)
    assert without_time(own.content) != own.content, "the time is found"


@pytest.mark.parametrize("kind", KINDS)
def test_id_is_on_disk_before_it_is_in_the_header(webui, kind):
    for _ in range(15):
        gate = webui.gate()
        sent = webui.send(body(kind=kind, standin={"hold": gate}), kind)
        job_id = sent.job_id()
        record = webui.records()[job_id]
        assert record["type"] == kind
        assert record["status"] in ("Pending", "Processing")
        gate.open()
        sent.to_end()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not tell what a descriptor is")
def test_head_waits_for_a_slow_disk(start, tmp_path):
    """The job is safe from a power cut before anybody hears of it."""
    slow = tmp_path / "slow"
    webui = start(*QUICK, scripts={"a-slow-disk": SLOW_DISK.format(gate=str(slow))})
    slow.touch()
    gate = webui.gate()
    began = time.monotonic()
    sent = webui.send(body(standin={"hold": gate}))
    job_id = sent.job_id()
    assert time.monotonic() - began >= 0.4
    assert f"synced {webui.data / 'jobs.json'}" in webui.log
    assert job_id in webui.records()
    gate.open()
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    until(webui.is_idle)
    names = [webui.data / "images" / name for name in webui.records()[job_id]["images"]]
    folder = f"synced {names[0].parent}\n"
    until(lambda: "jobs.json" in webui.log.rpartition(folder)[2], what="the record is safe after its images")
    assert names[0].exists()


def test_statuses_are_true_at_every_moment(every_webui):
    webui = every_webui
    first_gate, second_gate = webui.gate(), webui.gate()
    began = time.time()
    first = webui.send(body(standin={"hold": first_gate})).job_id()
    running = webui.until_status(first, "Processing")
    second = webui.send(body(standin={"hold": second_gate}, kind="img2img"), "img2img").job_id()
    third = webui.send(body()).job_id()

    for _ in range(3):
        jobs = [webui.job(job_id) for job_id in (first, second, third)]
        assert [job["status"] for job in jobs] == ["Processing", "Pending", "Pending"]
        assert [job["queue_position"] for job in jobs] == [None, 1, 2]
        assert [job["started"] is None for job in jobs] == [False, True, True]
        assert all(job["finished"] is None and job["error"] is None and job["images"] == [] for job in jobs)
        assert all(job["parameters"] is None and job["info"] is None for job in jobs)
        records = webui.records()
        assert [records[job["id"]]["status"] for job in jobs] == ["Processing", "Pending", "Pending"]
    assert 0 <= running["progress"] <= 1
    assert running["eta"] is None or running["eta"] >= 0
    assert jobs[1]["progress"] is jobs[1]["eta"] is None
    assert began - 1 <= jobs[0]["timestamp"] <= jobs[0]["started"] + 1

    first_gate.open()
    done = webui.job(first, wait=30)
    assert done["status"] == "Completed"
    assert webui.until_status(second, "Processing")["queue_position"] is None
    assert webui.job(third)["queue_position"] == 1
    second_gate.open()
    jobs = [webui.job(job_id, wait=30) for job_id in (first, second, third)]
    assert [job["status"] for job in jobs] == ["Completed"] * 3
    assert jobs[0]["started"] < jobs[0]["finished"] < time.time() + 1
    assert jobs[0]["started"] < jobs[1]["started"] < jobs[2]["started"], "the queue's order is kept"
    assert {webui.records()[job["id"]]["status"] for job in jobs} == {"Completed"}


def test_progress_moves(webui):
    gate = webui.gate()
    job_id = webui.send(body(steps=20, standin={"hold": gate, "seconds": 0.4})).job_id()
    seen = []
    until(lambda: seen.append(webui.job(job_id, images=False)["progress"]) or (seen[-1] or 0) >= 0.9)
    numbers = [progress for progress in seen if progress is not None]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 2
    gate.open()
    assert webui.job(job_id, wait=30)["progress"] is None


def read_between_writes(path):
    with contextlib.ExitStack() as stack:
        if fcntl:
            lock = stack.enter_context(open(f"{path}.lock", "rb"))
            fcntl.flock(lock, fcntl.LOCK_SH)
        return json.loads(path.read_text(encoding="utf-8"))


def load_with_a_reader(webui, read):
    """Thirty requests at once, while somebody reads jobs.json without a pause. Returns how often it was read."""
    stop, reads, seen = threading.Event(), itertools.count(), {}

    def watch():
        while not stop.is_set():
            records = read(webui.data / "jobs.json")
            next(reads)
            for job_id, record in records.items():
                if record is None:
                    continue
                before = seen.get(job_id, record)
                assert STEPS[record["status"]] >= STEPS[before["status"]], (before, record)
                if record["error"] != "Cancelled":  # by another test, perhaps while it waited
                    assert (record["started"] is None) == (record["status"] == "Pending"), record
                assert (record["finished"] is None) == (record["status"] in ("Pending", "Processing")), record
                if record["status"] == "Completed" and before["status"] != "Completed":
                    assert all((webui.data / "images" / name).is_file() for name in record["images"]), record
                seen[job_id] = record

    with ThreadPoolExecutor(31) as pool:
        watching = pool.submit(watch)
        try:
            answers = list(pool.map(lambda number: webui.post(body(f"load {number}")), range(30)))
        finally:
            stop.set()
        watching.result()
    ids = [answer.headers["X-Job-ID"] for answer in answers]
    assert len({job_id.lower() for job_id in ids}) == 30
    for number, (job_id, answer) in enumerate(zip(ids, answers)):
        job = webui.job(job_id, wait=30)
        assert (job["status"], job["prompt"]) == ("Completed", f"load {number}")
        assert job["images"] == answer.json()["images"]
    until(lambda: webui.client.get("/standin/threads").json()["total_tokens"] == 40, what="lent threads are back")
    return next(reads)


def test_records_are_true_after_every_write(webui):
    assert load_with_a_reader(webui, read_between_writes) > 10


def test_jobs_json_can_be_read_at_every_moment(webui):
    """Also by a program that knows nothing of our lock, if it reads again after it met a write."""
    assert load_with_a_reader(webui, lambda path: webui.records()) > 10


def test_many_waiting_jobs_hold_up_nobody(webui):
    """More jobs than the webui has worker threads, and it still answers everyone else."""
    gate = webui.gate()
    first = webui.send(body(standin={"hold": gate}))
    webui.until_status(first.job_id(), "Processing")
    waiting = [webui.send(body()) for _ in range(60)]
    ids = [one.job_id() for one in waiting]
    for job_id in (first.job_id(), ids[0], ids[-1]):
        began = time.monotonic()
        assert webui.job(job_id)["status"] in ("Pending", "Processing")
        assert webui.client.get("/sdapi/v1/samplers").status_code == 200
        assert time.monotonic() - began < 5
    positions = {job_id: webui.job(job_id)["queue_position"] for job_id in ids}
    assert sorted(positions.values()) == list(range(1, 61))
    gate.open()
    for one in waiting:
        assert one.to_end().endswith(b"0\r\n\r\n")
    started = {job_id: webui.job(job_id, wait=30)["started"] for job_id in ids}
    if SHAPE != "sdnext":  # whose lock keeps no order
        assert sorted(ids, key=started.get) == sorted(ids, key=positions.get), "who was next came next"


def test_heartbeat_keeps_a_silent_connection_busy(start):
    """White space goes out while the job waits and runs, also in gzip."""
    webui = start(*QUICK, constants={"HEARTBEAT": 0.1})
    first_gate = webui.gate()
    first = webui.send(body(standin={"hold": first_gate}), headers={"Accept-Encoding": "identity"})
    first.job_id()
    request = webui.client.stream("POST", "/sdapi/v1/txt2img", json=body(), headers={"Accept-Encoding": "gzip"})
    with request as second:
        decoder, decoded = zlib.decompressobj(31), b""
        for piece in second.iter_raw():
            decoded += decoder.decompress(piece)
            if not first_gate.path.exists():
                assert decoded == b" " * len(decoded)
                if len(decoded) >= 5:
                    first_gate.open()
    assert decoder.eof
    assert json.loads(decoded)["images"]
    assert first.to_end().count(b"1\r\n \r\n") >= 5
    assert webui.job(second.headers["X-Job-ID"], wait=30)["status"] == "Completed"


def test_http_1_0(webui):
    """As nginx asks by default."""
    data = webui.raw(body(), headers={"Accept-Encoding": "identity"}).replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n")
    with socket.create_connection(("127.0.0.1", webui.port), 30) as connection:
        connection.sendall(data)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, answer = received.partition(b"\r\n\r\n")
    job_id = re.search(rb"(?i)x-job-id: (\w+)", head).group(1).decode()
    assert json.loads(answer)["images"] == webui.job(job_id, wait=30)["images"]


def test_body_in_chunks(webui):
    data = json.dumps(body("in chunks")).encode()
    response = webui.client.post(
        "/sdapi/v1/txt2img",
        content=(data[position : position + 7] for position in range(0, len(data), 7)),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 200
    assert webui.job(response.headers["X-Job-ID"], wait=30)["prompt"] == "in chunks"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_off_is_as_if_not_there(off, alone, kind, encoding):
    """The answer is the webui's own to the byte, there is no header, and nothing is kept."""
    before = (off.data / "jobs.json").read_bytes()
    request, headers = body(kind=kind), {"Accept-Encoding": encoding, "Origin": ORIGIN}
    response, own = off.post(request, kind, headers=headers), alone(off).post(request, kind, headers=headers)
    assert response.status_code == own.status_code == 200
    assert "X-Job-ID" not in response.headers
    assert without_time(response.content) == without_time(own.content)
    if encoding == "identity":  # a time that differs is packed to another length
        assert own_headers(response) == own_headers(own)
    else:
        assert [name for name, _ in own_headers(response)] == [name for name, _ in own_headers(own)]
    assert (off.data / "jobs.json").read_bytes() == before
    assert off.images() == []


def test_off_answers_about_jobs(off):
    assert off.jobs() == []
    assert off.client.get("/sdapi/v1/job/AAAAAAAA").status_code == 404
    assert httpx.get(off.url + "/sdapi/v1/jobs").status_code == 401


def test_other_work_under_the_lock_is_no_job(webui):
    """It waits its turn, and a job that waits for it is Pending."""
    image = webui.post(body()).json()["images"][0]
    with ThreadPoolExecutor(1) as pool:
        gate = webui.gate()
        held = webui.send(body(standin={"hold": gate})).job_id()
        webui.until_status(held, "Processing")
        before = len(webui.records())
        other = pool.submit(webui.client.post, "/sdapi/v1/extra-single-image", json={"image": image})
        job_id = webui.send(body()).job_id()
        assert webui.job(job_id)["status"] == "Pending"
        gate.open()
        answer = other.result()
        assert (answer.status_code, "X-Job-ID" in answer.headers) == (200, False)
        assert webui.job(job_id, wait=30)["status"] == "Completed"
        assert len(webui.records()) == before + 1
