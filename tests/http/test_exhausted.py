"""What runs out while somebody wants much of it: descriptors, threads, and the time of searches."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import List

import pytest
from inside import a_job, a_prompt, completed, load_script

from harness import QUICK, Page, Webui, body, connect, until

# An extension that lets the webui have few descriptors.
FEW_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such limit")
def test_descriptors_that_idle_connections_take(start):
    """Without any credentials. A job that ends meanwhile is kept, and is stored when there are descriptors again."""
    webui = start(*QUICK, "--api-auth", "user:secret", scripts={"few-files": FEW_FILES.format(limit=120)})
    gate = webui.gate()
    accepted = webui.post(body("kept", {"hold": gate}), headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202
    job_id = accepted.headers["x-job-id"]
    webui.until_status(job_id, "Processing")
    idle: List[socket.socket] = []
    files = Path(f"/proc/{webui.pid}/fd")
    try:
        while len(os.listdir(str(files))) < 120:
            idle.append(socket.create_connection(("127.0.0.1", webui.port), 5))
            if len(idle) % 20 == 0:
                time.sleep(0.1)
            assert len(idle) < 500
        gate.open()
        until(lambda: "Too many open files" in "".join(webui.our_log()), what="the job could not be stored")
    finally:
        for one in idle:
            one.close()
    job = webui.job(job_id, wait=60)
    assert (job["status"], job["error"], len(job["images"])) == ("Completed", None, 1)


def test_more_generations_than_the_webui_has_threads(start):
    """Its own pages go on, and who comes too late is told so. Refusals and repeats are as ever."""
    few = 5
    webui = start(*QUICK, "--api-auth", "user:secret", constants={"SPARE_THREADS": few})
    gate = webui.gate()
    prefer = {"Prefer": "respond-async"}
    first = webui.send(body("first", {"hold": gate}), headers={"Idempotency-Key": "one"}).job_id()
    for number in range(few - 1):
        connect(webui, f"number {number}")

    late = [webui.post(body("late"), headers=headers) for headers in ({}, {"Idempotency-Key": "two"})]
    for one in late:
        assert (one.status_code, one.headers["retry-after"]) == (429, "30"), one.text
        assert "x-job-id" not in one.headers and "generations wait" in one.json()["detail"]
        assert one.headers["access-control-expose-headers"] == "Retry-After"
    assert webui.client.post("/sdapi/v1/txt2img", json=body(), auth=("user", "wrong")).status_code == 401
    repeat = webui.post(body("first", {"hold": gate}), headers={**prefer, "Idempotency-Key": "one"})
    assert (repeat.status_code, repeat.headers["x-job-id"]) == (202, first)
    assert webui.post(body("parked"), headers=prefer).status_code == 202  # it holds no thread
    assert webui.client.get("/sdapi/v1/progress?skip_current_image=true").status_code == 200
    assert len(webui.jobs()) == few + 1

    gate.open()
    until(webui.is_idle)
    assert {record["status"] for record in webui.records().values()} == {"Completed"}
    again = webui.post(body("late"), headers={"Idempotency-Key": "two"})
    assert again.status_code == 200 and "x-job-id" in again.headers


LONG_PROMPTS = 8_000


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with many jobs of long prompts."""
    folder = tmp_path_factory.mktemp("archive")
    script, dice = load_script(), random.Random(7)
    jobs = (completed(a_job(script, dice, prompt=a_prompt(dice, 5000))) for _ in range(LONG_PROMPTS))
    lines = b",".join(b'\n"%s": %s' % (job.id.encode(), script.record_of(job)) for job in jobs)
    (folder / "jobs.json").write_bytes(b"{" + lines + b"\n}\n")
    return folder


def cpu_seconds(webui: Webui) -> float:
    fields = Path(f"/proc/{webui.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="the time that a process has used is read as on Linux")
@pytest.mark.parametrize("mode", ["api", "tab"])
def test_searches_that_nobody_waits_for(start, archive, mode):
    """They end when their client leaves, and meanwhile keep back no poll and no answer."""
    flags = ("--api",) if mode == "tab" else QUICK
    webui = start(*flags, environ={"TRACKER_DATA_DIR": str(archive), "TRACKER_RETENTION": "off"})
    path = "/sdapi/v1/jobs?q=nobody+wrote+this"
    began = time.monotonic()
    assert webui.client.get(path).json() == []
    began, used = time.monotonic(), cpu_seconds(webui)
    assert webui.client.get(path).json() == []
    one_search, one_cpu = time.monotonic() - began, cpu_seconds(webui) - used
    (known,) = webui.jobs(limit=1)

    searches = 120  # more than may wait
    position = len(webui.log)
    if mode == "api":
        sent = [webui.send_get(path) for _ in range(searches)]
    else:
        page = Page(webui.client)
        view = json.dumps({"page": 0, "job": ""})
        request = page.request("job_tracker_look", view, True, "", "All", "", "nobody wrote this", "")
        fields = {"Host": "localhost", "Content-Type": "application/json", "Content-Length": str(len(request))}
        head = "POST /run/predict HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        sent = []
        for _ in range(searches):
            sent.append(socket.create_connection(("127.0.0.1", webui.port)))
            sent[-1].sendall(head.encode() + b"\r\n" + request)
    time.sleep(0.2)
    polls = []
    for _ in range(5):
        began = time.monotonic()
        webui.job(known["id"], images=False)
        polls.append(time.monotonic() - began)
    began = time.monotonic()
    assert len(webui.post(body()).json()["images"]) == 1
    answer = time.monotonic() - began
    assert statistics.median(polls) < one_search + 1, (polls, one_search)
    assert answer < 5 * one_search + 5, (answer, one_search)

    used = cpu_seconds(webui)
    if mode == "api":
        assert re.search(r"\b503\b", webui.log[position:]), "of those that were more than may wait"
    for one in sent:
        one.socket.close() if mode == "api" else one.close()
    if mode == "tab":
        return  # gradio does not tell that the client has left
    assert until(lambda: webui.client.get(path).status_code == 200)
    spent = cpu_seconds(webui) - used
    assert spent < searches / 4 * one_cpu, (spent, one_cpu)
