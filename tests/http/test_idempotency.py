"""Idempotency-Key: however often a request is sent, it is one generation."""

from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, List

import pytest
from neighbours import HOLDS, HURRY, held_at, reached

from harness import QUICK, SHAPE, UNKNOWN, UNKNOWN_STATUS, Sent, Webui, body, is_cut, new_client, until

pytestmark = pytest.mark.one_mode


@pytest.fixture
def request_body() -> Dict[str, Any]:
    """One that no other test sends, and that would give other images each time."""
    return body(f"of {uuid.uuid4()}", seed=-1)


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


def keyed(key: str, **headers: str) -> Dict[str, str]:
    return {"Idempotency-Key": key, **headers}


def settled(webui: Webui, request: Dict[str, Any]) -> None:
    """Waits until the jobs of a request are stored, which the client of each need not wait for."""
    for job in jobs_of(webui, request):
        webui.job(job["id"], wait=30, images=False)


def jobs_of(webui: Webui, request: Dict[str, Any]) -> List[Dict[str, Any]]:
    return webui.jobs(q=request["prompt"])


def png(webui: Webui) -> str:
    return webui.post(body(width=64, height=64)).json()["images"][0]


SHAPES = {
    "plain": {},
    "two images": {"batch_size": 2},
    "no images for the client": {"send_images": False, "batch_size": 2},
    "images null": {"send_images": None},
    "texts": {"alwayson_scripts": {"Stand-in": {"args": [{"strings": ["Grüße", "日本", "~"]}]}}},
    "texts with escapes": {"alwayson_scripts": {"Stand-in": {"args": [{"strings": ['say "Grüße"\n\\', "\x7f"]}]}}},
    "not Latin": {"negative_prompt": 'ein "Wort", 灯台 🗼\n'},
}
if SHAPE != "sdnext":  # which answers so where it failed
    SHAPES["no images at all"] = {"alwayson_scripts": {"Stand-in": {"args": [{"no_images": True}]}}}


@pytest.mark.parametrize("encoding", ["gzip", "identity"])
@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_a_repeat_gets_the_first_answer_to_the_byte(webui, request_body, key, fields, encoding):
    request = {**request_body, **fields}
    headers = keyed(key, **{"Accept-Encoding": encoding})
    first = webui.post(request, headers=headers)
    settled(webui, request)
    second = webui.post(request, headers=headers)
    assert first.status_code == second.status_code == 200
    assert second.headers["x-job-id"] == first.headers["x-job-id"]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers.get("content-encoding") == first.headers.get("content-encoding")
    assert second.content.lstrip() == first.content.lstrip()
    assert len(jobs_of(webui, request)) == 1


def test_img2img(webui, request_body, key):
    request = {**request_body, "init_images": [png(webui)]}
    first = webui.post(request, "img2img", headers=keyed(key))
    second = webui.post(request, "img2img", headers=keyed(key))
    assert first.json()["images"] and second.content.lstrip() == first.content.lstrip()
    assert len(jobs_of(webui, request)) == 1


@pytest.mark.parametrize("said", [False, None])
def test_who_wants_no_images_has_a_job_with_them(webui, request_body, key, said):
    request = {**request_body, "send_images": said}
    first, second = (webui.post(request, headers=keyed(key)) for _ in range(2))
    assert first.json()["images"] == second.json()["images"] == []
    assert first.json()["parameters"]["send_images"] is second.json()["parameters"]["send_images"] is said
    assert len(webui.job(first.headers["x-job-id"], wait=30)["images"]) == 1


def test_a_repeat_waits_while_the_first_runs(webui, request_body, key):
    gate = webui.gate()
    request = {**request_body, **body(standin={"hold": gate}, **request_body)}
    first = webui.send(request, headers=keyed(key))
    job_id = first.job_id()
    second = webui.send(request, headers=keyed(key))
    assert second.job_id() == job_id
    assert "idempotent-replayed" not in second.head()[1]
    gate.open()
    assert first.content().lstrip() == second.content().lstrip() != b""
    assert len(jobs_of(webui, request)) == 1


def test_fifty_at_once_are_one_generation(start):
    webui = start(*QUICK, scripts={"hurry": HURRY})

    def send(data: bytes) -> Sent:
        everyone.wait(30)
        return Sent(webui.port, data)

    with ThreadPoolExecutor(50) as executor:
        for number in range(5):
            everyone = threading.Barrier(50)
            data = webui.raw(body(f"number {number}", seed=-1), headers=keyed(f"key {number}"))
            answers = {sent.content().lstrip() for sent in executor.map(send, [data] * 50)}
            assert len(answers) == 1
            assert json.loads(answers.pop())["images"]
    assert len(webui.jobs()) == 5


def test_after_a_restart(start, request_body, key):
    webui = start(*QUICK)
    first = webui.post(request_body, headers=keyed(key))
    webui.job(first.headers["x-job-id"], wait=30)
    webui.restart()
    second = webui.post(request_body, headers=keyed(key))
    assert second.headers["idempotent-replayed"] == "true"
    assert second.headers["x-job-id"] == first.headers["x-job-id"]
    assert second.content.lstrip() == first.content.lstrip()
    assert webui.post(body("another"), headers=keyed(key)).status_code == 422

    # Killed while it runs: the job has failed, and its key is free.
    request, key = body(standin={"hold": webui.gate()}, **request_body), key + "-killed"
    lost = webui.send(request, headers=keyed(key))
    lost_id = lost.job_id()
    webui.until_status(lost_id, "Processing")
    webui.kill()
    webui.gates[-1].open()
    webui.start()
    again = webui.post(request, headers=keyed(key))
    assert again.status_code == 200 and again.json()["images"]
    assert again.headers["x-job-id"] != lost_id
    assert "idempotent-replayed" not in again.headers
    assert webui.job(lost_id)["status"] == "Failed"


@pytest.mark.parametrize("running", [True, False])
def test_another_body_is_refused(webui, request_body, key, running):
    gate = webui.gate()
    request = body(standin={"hold": gate}, **request_body)
    sent = webui.send(request, headers=keyed(key))
    job_id = sent.job_id()
    if not running:
        gate.open()
        webui.job(job_id, wait=30)
    answer = webui.post(request_body, headers=keyed(key))
    assert answer.status_code == 422
    assert "another body" in answer.json()["detail"]
    assert "x-job-id" not in answer.headers
    assert len(jobs_of(webui, request_body)) == 1
    gate.open()
    assert not is_cut(sent)


def test_another_path_is_another_generation(webui, request_body, key):
    request = {**request_body, "init_images": [png(webui)]}
    ids = {webui.post(request, kind, headers=keyed(key)).headers["x-job-id"] for kind in ("txt2img", "img2img")}
    assert len(ids) == 2


def test_another_user_is_another_generation(start, request_body, key):
    webui = start(*QUICK, "--api-auth", "user:secret,other:word")
    answers = [
        webui.post(request_body, headers=keyed(key), auth=auth)
        for auth in (("user", "secret"), ("other", "word"), ("user", "secret"))
    ]
    one, other, again = (answer.headers["x-job-id"] for answer in answers)
    assert one == again != other
    assert answers[0].json()["images"] != answers[1].json()["images"]


@pytest.mark.parametrize("auth", [("user", "wrong"), ("nobody", "secret"), None])
def test_a_wrong_password_gets_no_stored_answer(guarded, request_body, key, auth):
    first = guarded.post(request_body, headers=keyed(key))
    assert first.status_code == 200
    with new_client(guarded.url, auth=auth) as client:
        for headers in (keyed(key), keyed(key, Prefer="respond-async")):
            answer = client.post("/sdapi/v1/txt2img", json=request_body, headers=headers)
            assert answer.status_code == 401
            assert "x-job-id" not in answer.headers and "images" not in answer.text
    settled(guarded, request_body)
    assert guarded.post(request_body, headers=keyed(key)).headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize(
    "key, status",
    [
        (b"k" * 255, 200),
        (b"k" * 256, 422),
        (b"k" * 5000, 422),
        (b"", 422),
        (b"   ", 422),
        ("schlüssel".encode("latin-1"), 200),
        ("ключ 鍵 🔑".encode(), 200),
        (b'"8e03978e-40d5-43dd-bc93-6894a57f9324"', 200),
        (b"a\tb , c=d; e", 200),
        (b"../../etc/passwd %00 \x80\xff", 200),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_a_key(webui, request_body, key, status):
    head, _, rest = webui.raw(request_body).partition(b"\r\n\r\n")
    data = head + b"\r\nIdempotency-Key: " + key + b"\r\n\r\n" + rest
    ids = set()
    for _ in range(2):
        sent = Sent(webui.port, data)
        got, headers = sent.head()
        received = sent.to_end()
        assert got == status, received
        ids.add(headers.get("x-job-id"))
    if status == 200:
        assert len(ids) == 1 and len(jobs_of(webui, request_body)) == 1
    else:
        assert ids == {None} and not jobs_of(webui, request_body)
        assert "Idempotency-Key" in json.loads(received.partition(b"\r\n\r\n")[2])["detail"]


def test_two_fields_are_one_key(webui, request_body):
    head, _, rest = webui.raw(request_body).partition(b"\r\n\r\n")

    def send(*keys: str) -> str:
        fields = b"".join(b"\r\nIdempotency-Key: " + key.encode() for key in keys)
        sent = Sent(webui.port, head + fields + b"\r\n\r\n" + rest)
        job_id = sent.job_id()
        sent.to_end()
        return job_id

    both = send("one", "two")
    assert send("one", "two") == both
    assert send("one") != both


def test_a_failed_job_frees_its_key(webui, request_body, key):
    ids = set()
    for _ in range(2):
        gate = webui.gate()
        request = body(standin={"hold": gate, "fail": "OutOfMemoryError"}, **request_body)
        sent = webui.send(request, headers=keyed(key))
        ids.add(sent.job_id())
        gate.open()
        assert is_cut(sent)
    assert len(ids) == 2
    answer = webui.post(request_body, headers=keyed(key))  # another body, too
    assert answer.status_code == 200 and answer.headers["x-job-id"] not in ids
    settled(webui, request_body)
    assert webui.post(request_body, headers=keyed(key)).headers["idempotent-replayed"] == "true"


def test_a_job_that_failed_before_its_head_frees_its_key(webui, request_body, key):
    request = {**request_body, "steps": 0}
    statuses = []
    for _ in range(3):
        sent = webui.send(request, headers=keyed(key))
        sent.to_end()
        statuses.append(sent.head()[0])
    assert webui.post(request_body, headers=keyed(key)).status_code == 200
    assert len(jobs_of(webui, request_body)) == 4, statuses


def test_repeats_of_a_job_that_fails_are_cut_as_well(webui, request_body, key):
    gate = webui.gate()
    request = body(standin={"hold": gate, "fail": "RuntimeError"}, **request_body)
    clients = [webui.send(request, headers=keyed(key)) for _ in range(3)]
    assert len({client.job_id() for client in clients}) == 1
    gate.open()
    assert all(is_cut(client) for client in clients)
    assert len(jobs_of(webui, request_body)) == 1


def test_a_cancelled_job_frees_its_key_while_it_is_still_in_the_queue(webui, request_body, key):
    gate = webui.gate()
    running = webui.send(body(standin={"hold": gate}))
    running.job_id()
    waiting = webui.send(request_body, headers=keyed(key))
    first_id = waiting.job_id()
    repeat = webui.send(request_body, headers=keyed(key))
    assert repeat.job_id() == first_id
    assert webui.client.post(f"/sdapi/v1/job/{first_id}/cancel").json()["status"] == "Failed"
    assert is_cut(waiting) and is_cut(repeat)

    again = webui.send(request_body, headers=keyed(key))
    second_id = again.job_id()
    assert second_id != first_id
    assert webui.send(request_body, headers=keyed(key)).job_id() == second_id
    gate.open()
    assert not is_cut(again)
    settled(webui, request_body)
    replay = webui.post(request_body, headers=keyed(key))
    assert replay.headers["x-job-id"] == second_id and replay.headers["idempotent-replayed"] == "true"
    assert len(jobs_of(webui, request_body)) == 2


def test_a_deleted_job_frees_its_key(webui, request_body, key):
    first = webui.post(request_body, headers=keyed(key))
    first_id = first.headers["x-job-id"]
    webui.job(first_id, wait=30)
    assert webui.client.delete(f"/sdapi/v1/job/{first_id}").status_code == 204
    second = webui.post({**request_body, "steps": 3}, headers=keyed(key))
    assert second.status_code == 200
    assert second.headers["x-job-id"] != first_id
    assert "idempotent-replayed" not in second.headers


@pytest.mark.parametrize("reset", [False, True])
def test_the_first_client_may_leave(webui, request_body, key, reset):
    gate = webui.gate()
    request = body(standin={"hold": gate}, **request_body)
    first = webui.send(request, headers=keyed(key))
    job_id = first.job_id()
    first.leave(reset)
    second = webui.send(request, headers=keyed(key))
    third = webui.send(request, headers=keyed(key))
    assert second.job_id() == third.job_id() == job_id
    second.leave(reset)
    gate.open()
    assert json.loads(third.content())["images"]
    settled(webui, request)
    assert webui.post(request, headers=keyed(key)).headers["idempotent-replayed"] == "true"
    assert len(jobs_of(webui, request)) == 1


def test_a_refused_request_leaves_its_key_free(webui, request_body, key):
    for _ in range(2):
        answer = webui.post({**request_body, **UNKNOWN}, headers=keyed(key))
        assert answer.status_code == UNKNOWN_STATUS and "not found" in answer.text
    assert webui.post(b"{", headers=keyed(key)).status_code == 422
    assert webui.post({**request_body, "steps": "many"}, headers=keyed(key)).status_code == 422
    answer = webui.post(request_body, headers=keyed(key))
    assert answer.status_code == 200 and "idempotent-replayed" not in answer.headers
    assert len(jobs_of(webui, request_body)) == 1


@pytest.mark.skipif(SHAPE == "sdnext", reason="it looks at these scripts with the lock held")
def test_repeats_while_the_host_still_checks_the_first(start, request_body):
    webui = start(*QUICK, scripts={"holds": HOLDS})

    # The first is refused in the end: one of the others takes its place, and is refused as well.
    gate = webui.gate()
    request = {**request_body, **held_at("always_on", gate), "alwayson_scripts": {"no such script": {}}}
    clients = [webui.send(request, headers=keyed("refused")) for _ in range(3)]
    until(lambda: reached(gate), what="the first is checked")
    gate.open()
    assert [client.head()[0] for client in clients] == [422, 422, 422]
    assert not jobs_of(webui, request)

    # Repeats leave while the first has no ID yet: it and the others are none the worse for it.
    gate = webui.gate()
    request = {**request_body, **held_at("always_on", gate)}
    first = webui.send(request, headers=keyed("accepted"))
    until(lambda: reached(gate), what="the first is checked")
    tasks = webui.client.get("/standin/threads").json()["tasks"]
    leaving = [webui.send(request, headers=keyed("accepted")) for _ in range(3)]
    staying = webui.send(request, headers=keyed("accepted"))
    until(lambda: webui.client.get("/standin/threads").json()["tasks"] >= tasks + 4, what="the repeats are there")
    for number, client in enumerate(leaving):
        client.leave(reset=bool(number))
    webui.post(body("something else"))
    gate.open()
    assert first.job_id() == staying.job_id()
    assert first.content().lstrip() == staying.content().lstrip()
    assert reached(gate) == 1
    assert "Traceback" not in webui.log


def test_with_respond_async(webui, request_body, key):
    gate = webui.gate()
    request = body(standin={"hold": gate}, **request_body)
    asynchronous = keyed(key, Prefer="respond-async")
    first = webui.post(request, headers=asynchronous)
    assert first.status_code == 202 and "idempotent-replayed" not in first.headers
    job_id = first.headers["x-job-id"]
    again = webui.post(request, headers=asynchronous)
    assert again.status_code == 202 and again.headers["x-job-id"] == job_id
    assert again.headers["location"] == first.headers["location"]
    assert again.json()["status"] in ("Pending", "Processing")
    waiting = webui.send(request, headers=keyed(key))
    assert waiting.job_id() == job_id
    assert webui.post(request_body, headers=asynchronous).status_code == 422
    gate.open()
    answer = json.loads(waiting.content())
    job = webui.job(job_id, wait=30)
    assert answer == {name: job[name] for name in ("images", "parameters", "info")}
    late = webui.post(request, headers=asynchronous)
    assert late.status_code == 202 and late.headers["idempotent-replayed"] == "true"
    assert late.json()["status"] == "Completed" and "images" not in late.json()
    assert webui.post(request, headers=keyed(key)).json() == answer
    assert len(jobs_of(webui, request)) == 1


def test_an_image_that_is_gone_is_no_clean_answer(webui, request_body, key):
    first = webui.post(request_body, headers=keyed(key))
    job_id = first.headers["x-job-id"]
    webui.job(job_id, wait=30)
    next(path for path in webui.images() if path.name == f"{job_id}_0.png").unlink()
    repeat = webui.post(request_body, headers=keyed(key))
    assert (repeat.status_code, repeat.headers["x-job-id"]) == (503, job_id)


def test_tracking_off(off, request_body, key):
    answers = [off.post(request_body, headers=keyed(key)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["images"] != answers[1].json()["images"]
    for answer in answers:
        assert "x-job-id" not in answer.headers and "idempotent-replayed" not in answer.headers
    assert off.post(request_body, headers=keyed("k" * 256)).status_code == 200


def test_two_webuis_on_one_folder(pair, request_body, key):
    one, two = pair
    gate = one.gate()
    request = body(standin={"hold": gate}, **request_body)
    first = one.send(request, headers=keyed(key))
    job_id = first.job_id()
    second = two.send(request, headers=keyed(key))
    assert second.job_id() == job_id
    assert two.post(request_body, headers=keyed(key)).status_code == 422
    gate.open()
    assert first.content().lstrip() == second.content().lstrip()
    assert len(jobs_of(two, request)) == 1
