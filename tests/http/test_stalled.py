"""A disk that does not answer: generations go on, their clients get their images, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, List

import httpx
import pytest
from system import System

from harness import KINDS, MODE_FLAGS, MODES, Page, Start, Webui, body, fewer, new_client, open_files, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which file a descriptor is of")


class Disk(System):
    """The disk with the data folder, which does not answer inside a `with`."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.data = folder / "data"
        self._waits = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._waits.enter_context(self.waits(self.data))

    def __exit__(self, *_: Any) -> None:
        self._waits.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.works()


@pytest.fixture
def start_on(start: Start, disk: Disk) -> Callable[..., Webui]:
    """`start_on(PATIENCE=…)` starts a webui on that disk, whose constants can be other ones."""

    def start_on(*flags: str, mode: str = MODES[-1], **constants: float) -> Webui:
        environ = {"TRACKER_DATA_DIR": str(disk.data)}
        webui = start(*MODE_FLAGS[mode], *flags, environ=environ, scripts=disk.scripts, constants=constants)
        job_id = webui.post(body()).headers["x-job-id"]
        assert webui.job(job_id, wait=30)["status"] == "Completed"  # and all is in place
        return webui

    return start_on


class Asked:
    """Requests on their way, whose answers can be waited for."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(64)

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return self.pool.submit(function, *args, **options)


@pytest.fixture
def ask() -> Iterator[Asked]:
    asked = Asked()
    yield asked
    asked.pool.shutdown(wait=True)


@pytest.fixture(autouse=True)
def in_order(disk, ask) -> Iterator[None]:
    """The disk comes back before the requests are waited for."""
    yield
    disk.works()


def look_at(webui: Webui, job_id: str, ask: Asked, times: int = 10) -> List[Any]:
    """Everybody who looks at jobs: polls, lists, searches, images, the tab."""
    client = new_client(webui.url, timeout=120, limits=httpx.Limits(max_connections=None))
    paths = [f"/sdapi/v1/job/{job_id}", "/sdapi/v1/jobs", "/sdapi/v1/jobs?q=light", f"/sdapi/v1/job/{job_id}/images/0"]
    looks = [ask(client.get, path) for path in paths for _ in range(times)]
    if webui.mode == "ui":
        page = Page(client)
        looks += [ask(page.look) for _ in range(times)]
    time.sleep(0.5)
    return looks


@pytest.mark.parametrize("kind, mode", dict(zip(KINDS, MODES * 2)).items())
def test_a_generation_goes_on(start_on, disk, ask, mode, kind):
    """The webui generates and its client has the images, untracked, while everybody who looks waits for the disk."""
    webui = start_on(mode=mode, PATIENCE=1)
    (before,) = webui.records()
    with disk:
        looks = look_at(webui, before, ask)
        begun = time.monotonic()
        answer = webui.post(body("during", kind=kind), kind)
        assert time.monotonic() - begun < 30
        assert answer.status_code == 200 and len(answer.json()["images"]) == 1
        assert "x-job-id" not in answer.headers
        assert [look.result().text[:200] for look in looks if look.done()] == []
    for look in looks:
        look = look.result()
        assert isinstance(look, str) or look.status_code == 200
    until(webui.is_idle)
    assert sorted(record["prompt"] for record in webui.records().values()) == ["a lighthouse", "during"]
    assert {record["status"] for record in webui.records().values()} == {"Completed"}
    assert "x-job-id" in webui.post(body()).headers


@pytest.mark.parametrize("known", [False, True], ids=["new", "repeated"])
def test_a_key_that_cannot_be_looked_up(start_on, disk, ask, known):
    """It could be a repeat, whose images would be generated twice: it is refused, and soon."""
    webui = start_on(PATIENCE=1)
    (before,) = webui.records()
    keyed = {"Idempotency-Key": "one"}
    first = webui.post(body("with a key"), headers=keyed) if known else None
    until(webui.is_idle)
    with disk:
        looks = look_at(webui, before, ask)
        begun = time.monotonic()
        refused = [ask(webui.post, body("with a key"), headers=keyed) for _ in range(5)]
        for one in refused:
            answer = one.result()
            assert (answer.status_code, "x-job-id" in answer.headers) == (503, False), answer.text
        assert time.monotonic() - begun < 30
        assert str(disk.data) not in answer.text
        assert webui.post(body("without a key")).status_code == 200, "nobody else is kept waiting by them"
        assert [look for look in looks if look.done()] == []
    [look.result() for look in looks]
    until(webui.is_idle)
    after = webui.post(body("with a key"), headers=keyed)
    assert after.status_code == 200
    if first is not None:
        assert (after.headers.get("idempotent-replayed"), after.json()) == ("true", first.json())
    assert [record["prompt"] for record in webui.records().values()].count("with a key") == 1


@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_nobody_keeps_back_an_answer(start_on, disk, ask, coding):
    """What was generated is in memory: its client gets it, however many wait for the disk."""
    webui = start_on()
    (before,) = webui.records()
    gate = webui.gate()
    sent = ask(webui.post, body("on its way", {"hold": gate}), headers={"Accept-Encoding": coding})
    (job,) = until(lambda: webui.jobs(status="processing", q="on its way"), what="it is safe on disk, and runs")
    job_id = job["id"]
    with disk:
        looks = look_at(webui, before, ask)
        assert webui.job(job_id)["status"] == "Processing", "who polls a job that runs needs no disk"
        assert webui.job(job_id, wait=0.2, images=False)["status"] == "Processing"
        gate.open()
        answer = sent.result(30)
        assert (answer.status_code, answer.headers["x-job-id"]) == (200, job_id)
        assert len(answer.json()["images"]) == 1
        assert webui.job(job_id, images=False)["status"] == "Processing", "its end is not stored"
        assert [look for look in looks if look.done()] == []
    job = webui.job(job_id, wait=60)
    assert (job["status"], job["images"]) == ("Completed", answer.json()["images"])


def test_jobs_that_wait_can_be_cancelled(start_on, disk, ask):
    webui = start_on()
    (before,) = webui.records()
    gate = webui.gate()
    running = webui.send(body("runs", {"hold": gate}))
    webui.until_status(running.job_id(), "Processing")
    waiting = webui.send(body("waits"))
    ids = [waiting.job_id(), running.job_id()]  # in this order: once the other is cancelled, the first runs, and ends
    with disk:
        look_at(webui, before, ask)
        for job_id in ids:
            cancelling = ask(webui.client.post, f"/sdapi/v1/job/{job_id}/cancel", timeout=60)
            assert cancelling.result(30).status_code == 200
        gate.open()
        with pytest.raises(ConnectionError):
            running.content()
    for job_id in ids:
        job = webui.job(job_id, wait=30)
        assert (job["status"], job["error"]) == ("Failed", "Cancelled")


SLOW_DISK = """
import os, time

pwrite = os.pwrite

def write_slowly(file, data, position):
    time.sleep(len(data) / 4e6)
    return pwrite(file, data, position)

os.pwrite = write_slowly
"""


def test_a_disk_that_is_slow(start):
    """It answers all the time: whatever waits for it is stored in the end."""
    size, count = 1 << 20, 6
    constants = {"UNSTORED_LIMIT": 2 * size}
    webui = start(*MODE_FLAGS[MODES[-1]], scripts={"z-slow-disk": SLOW_DISK}, constants=constants)
    headers = {"Prefer": "respond-async"}
    ids = [webui.post(body("large", {"image_bytes": size}), headers=headers).headers["x-job-id"] for _ in range(count)]
    jobs = [webui.job(job_id, wait=60, images=False) for job_id in ids]
    assert [(job["status"], job["error"], job["image_count"]) for job in jobs] == [("Completed", None, 1)] * count


def test_the_disk_is_waited_for_once(start_on, disk):
    """Who comes while it is known not to answer goes on at once."""
    patience, less = 2.5, 1
    webui = start_on(PATIENCE=patience)
    keyed = {"Idempotency-Key": "one"}

    def seconds(status: int, **options: Any) -> float:
        begun = time.monotonic()
        assert webui.post(body(), **options).status_code == status
        return time.monotonic() - begun

    with disk:
        assert seconds(200) >= patience > seconds(200) + less
        assert seconds(503, headers=keyed) + less < patience
    until(lambda: len(webui.records()) == 3 and webui.is_idle())
    seconds(200, headers={"Idempotency-Key": "two"})
    until(webui.is_idle)
    with disk:
        assert seconds(503, headers=keyed) >= patience
        for _ in range(4):  # more than there are threads to look for keys
            assert seconds(503, headers=keyed) + less < patience
        assert seconds(200) + less < patience
    until(lambda: len(webui.records()) == 5 and webui.is_idle())
    assert "x-job-id" in webui.post(body(), headers=keyed).headers


@pytest.mark.parametrize("path", ["/sdapi/v1/job/{}", "/sdapi/v1/job/{}/images/0"])
def test_a_client_that_leaves_between_two_pieces(start_on, disk, path):
    """The file that was read for it is closed, which waits for the disk. The webui does not wait with it."""
    webui = start_on()
    job_id = webui.post(body("large", {"image_bytes": 16 << 20})).headers["x-job-id"]
    webui.job(job_id, wait=60)
    sent = webui.send_get(path.format(job_id))
    assert sent.head()[0] == 200
    with disk:
        sent.leave(reset=True)
        time.sleep(0.5)
        for _ in range(3):
            assert webui.client.get("/sdapi/v1/progress?skip_current_image=true", timeout=20).status_code == 200
            time.sleep(0.2)
    until(lambda: not any(job_id in name for name in open_files(webui.pid)))


@pytest.mark.parametrize("hide", [False, True], ids=["images", "no images"])
@pytest.mark.parametrize("coding", ["identity", "gzip"])
def test_the_webui_changes_what_it_is_given(start_on, disk, coding, hide):
    """Its gzip layer packs an answer in place. What is stored is what the webui answered."""
    webui = start_on(PATIENCE=0.5)
    request = body("late", {"image_bytes": 50_000}, **({"send_images": False} if hide else {}))
    with disk:
        answer = webui.post(request, headers={"Accept-Encoding": coding})
        assert answer.status_code == 200 and "x-job-id" not in answer.headers
    job_id = until(lambda: next((id for id, job in webui.records().items() if job["prompt"] == "late"), None))
    job = webui.job(job_id, wait=60)
    assert (job["status"], job["error"]) == ("Completed", None)
    assert len(job["images"]) == 1 and len(job["images"][0]) > 50_000
    if not hide:
        assert job["images"] == answer.json()["images"]
    assert (job["parameters"], job["info"]) == (answer.json()["parameters"], answer.json()["info"])


def memory(webui: Webui) -> int:
    webui.client.get("/standin/empty")
    return webui.client.get("/standin/threads").json()["rss_bytes"]


def test_answers_do_not_fill_the_memory(start_on, disk):
    """Of jobs whose clients were told nothing, only the record waits for a disk that is away for long."""
    size, count = 8 << 20, fewer(20)
    webui = start_on(PATIENCE=0.1, GIVE_UP_AFTER=1)
    big = body("large", {"image_bytes": size})
    webui.post(big)
    until(webui.is_idle)
    before = memory(webui)
    with disk:
        for _ in range(count):
            assert len(webui.post(big).json()["images"][0]) > size
        until(lambda: memory(webui) < before + 4 * size, what="the answers are let go of")
        until(lambda: webui.log.count("is not stored: the disk does not answer") == count)
    given_up = until(lambda: (lambda failed: failed if len(failed) == count else None)(webui.jobs(status="Failed")))
    assert {job["error"] for job in given_up} == {"Generated, but not stored: the disk did not answer"}


def test_answers_of_jobs_that_were_told_wait_for_the_disk_up_to_a_limit(start_on, disk, ask):
    """What fits is stored when the disk is back. What does not is said in the job."""
    size = 1 << 20
    webui = start_on(UNSTORED_LIMIT=3 * size, GIVE_UP_AFTER=2)
    gates = [webui.gate() for _ in range(4)]
    sent = [ask(webui.post, body(f"number {n}", {"image_bytes": size, "hold": gate})) for n, gate in enumerate(gates)]
    until(lambda: len(webui.jobs(status="Pending")) == 3)
    with disk:
        for gate in gates:
            gate.open()
        answers = [one.result(60) for one in sent]
        until(lambda: webui.log.count("is not stored: the disk does not answer") == 2)
    until(webui.is_idle)
    jobs = [webui.job(answer.headers["x-job-id"]) for answer in answers]
    stored = [job["images"] == answer.json()["images"] for job, answer in zip(jobs, answers)]
    assert stored.count(True) == 2 and {job["status"] for job in jobs} == {"Completed", "Failed"}
    assert {job["error"] for job in jobs} == {None, "Generated, but not stored: the disk did not answer"}
