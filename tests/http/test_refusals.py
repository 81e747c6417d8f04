"""A request that the webui refuses is no job: its answer is the webui's own, to the byte, and it leaves no trace."""

from __future__ import annotations

import base64
import json
from typing import Any, Dict, NamedTuple, Optional, Tuple

import httpx
import pytest

from harness import CLOSE, KINDS, ORIGIN, PNG, SHAPE, body


class Refused(NamedTuple):
    content: Any = b""
    status: Optional[int] = None  # None: whatever the webui says
    kinds: Tuple[str, ...] = KINDS
    method: str = "POST"
    headers: Dict[str, str] = {}
    auth: Optional[Tuple[str, str]] = ("user", "secret")
    path: str = "/sdapi/v1/{}"


REFUSED = {
    "no credentials": Refused(body(), 401, auth=None),
    "wrong password": Refused(body(), 401, auth=("user", "wrong")),
    "wrong user": Refused(body(), 401, auth=("usér", "secret")),
    "other credentials": Refused(body(), 401, auth=None, headers={"Authorization": "Bearer secret"}),
    "invalid JSON": Refused(b'{"prompt": ', 422),
    "invalid JSON and no credentials": Refused(b'{"prompt": ', 422, auth=None),
    "not UTF-8": Refused(b'{"prompt": "\xff\xfe"}'),
    "no body": Refused(b"", 422),
    "a list": Refused(b"[1]", 422),
    "null": Refused(b"null", 422),
    "wrong type": Refused(body(steps="many"), 422),
    "wrong content type": Refused(body(), 422, headers={"Content-Type": "text/plain"}),
    "a form": Refused(b"prompt=x", 422, headers={"Content-Type": "application/x-www-form-urlencoded"}),
    "no init image": Refused(body(), 400 if SHAPE == "sdnext" else 404, kinds=("img2img",)),
    "init images null": Refused(
        body(kind="img2img", init_images=None), 422 if SHAPE == "sdnext" else 404, kinds=("img2img",)
    ),
    "broken mask": Refused(body(kind="img2img", mask="no image"), 500, kinds=("img2img",)),
    "GET": Refused(b"", 405, method="GET"),
    "HEAD": Refused(b"", 405, method="HEAD"),
    "PUT": Refused(body(), 405, method="PUT"),
    "DELETE": Refused(b"", 405, method="DELETE"),
    "preflight": Refused(
        method="OPTIONS",
        headers={"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-A"},
    ),
    "preflight from elsewhere": Refused(
        method="OPTIONS", headers={"Origin": "http://example.com", "Access-Control-Request-Method": "POST"}
    ),
    "other path": Refused(body(), 404, path="/sdapi/v1/{}s"),
    "slash at the end": Refused(body(), path="/sdapi/v1/{}/"),
    "path in capitals": Refused(body(), path="/SDAPI/v1/{}"),
}
if SHAPE == "sdnext":
    REFUSED["unknown sampler"] = Refused(body(sampler_name="None such"), 404, kinds=("txt2img",))
    REFUSED["unknown sampler and image"] = Refused(
        body(sampler_name="None such", kind="img2img"), 404, kinds=("img2img",)
    )
else:
    for kind in KINDS:
        script = body(kind=kind, script_name="None such", script_args=[])
        always_on = body(kind=kind, alwayson_scripts={"None such": {"args": []}})
        REFUSED[f"unknown script, {kind}"] = Refused(script, 422, kinds=(kind,))
        REFUSED[f"unknown always-on script, {kind}"] = Refused(always_on, 422, kinds=(kind,))


CASES = [pytest.param(kind, case, id=f"{name}-{kind}") for name, case in REFUSED.items() for kind in case.kinds]


def trace(webui):
    """Everything on disk that a job leaves."""
    status = (webui.data / "jobs.json").stat()
    return status.st_mtime_ns, (webui.data / "jobs.json").read_bytes(), webui.images()


def ask(webui, case, kind):
    content = case.content if isinstance(case.content, bytes) else json.dumps(case.content).encode()
    headers = {"Content-Type": "application/json", "Origin": ORIGIN, **case.headers}
    if case.auth:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(case.auth).encode()).decode()
    with httpx.Client(base_url=webui.url, trust_env=False) as client:
        response = client.request(case.method, case.path.format(kind), content=content, headers=headers)
    passing = (b"date", b"x-process-time")
    port = str(webui.port).encode()
    raw = [(name, value.replace(port, b"PORT")) for name, value in response.headers.raw if name.lower() not in passing]
    return response.status_code, response.reason_phrase, sorted(raw), response.content


@pytest.mark.parametrize("kind, case", CASES)
def test_refusal_is_the_webuis_own(guarded, alone, kind, case):
    before = trace(guarded)
    refusal = ask(guarded, case, kind)
    assert refusal == ask(alone(guarded), case, kind)
    assert case.status is None or refusal[0] == case.status
    assert trace(guarded) == before


@pytest.mark.parametrize("name", ["no credentials", "invalid JSON", "preflight"])
def test_refusal_when_off(off, alone, name):
    assert ask(off, REFUSED[name], "txt2img") == ask(alone(off), REFUSED[name], "txt2img")


def test_refusal_does_not_wait_behind_the_queue(guarded, alone):
    """It comes while a generation holds the lock, also when there is a better request to come."""
    gate = guarded.gate()
    guarded.until_status(guarded.send(body(standin={"hold": gate})).job_id(), "Processing")
    before = trace(guarded)
    case = REFUSED["no init image"]
    assert ask(guarded, case, "img2img") == ask(alone(guarded), case, "img2img")
    assert trace(guarded) == before
    assert not gate.path.exists()


@pytest.mark.skipif(SHAPE == "sdnext", reason="here any sampler that is not known is refused")
def test_unknown_sampler_is_replaced_and_so_a_job(guarded):
    response = guarded.post(body(sampler_name="None such"))
    assert response.status_code == 200
    assert guarded.job(response.headers["X-Job-ID"], wait=30)["status"] == "Completed"


def test_a_sampler_by_another_name_is_a_job(guarded):
    response = guarded.post(body(sampler_name="k_euler"))
    assert response.status_code == 200
    assert guarded.job(response.headers["X-Job-ID"], wait=30)["status"] == "Completed"


@pytest.mark.parametrize("broken", [{"init_images": ["no image"]}, {"init_images": [PNG, None]}, {"steps": 0}])
def test_refusal_under_the_lock_is_no_clean_success(guarded, alone, broken):
    """The webui finds these when it holds the lock, so they are jobs, and failed ones."""
    request = body(kind="img2img", **broken)
    own = alone(guarded).post(request, "img2img")
    assert own.status_code == 500
    before = set(guarded.records())
    own_words = 0
    for _ in range(10):
        try:
            response = guarded.post(request, "img2img", headers=CLOSE)
        except httpx.RemoteProtocolError:
            continue  # the head was out already
        assert (response.status_code, response.content) == (500, own.content)
        assert "X-Job-ID" not in response.headers
        own_words += 1
    assert own_words, "a generation that fails at once keeps its own status"
    jobs = [guarded.job(job_id, wait=30) for job_id in set(guarded.records()) - before]
    assert [job["status"] for job in jobs] == ["Failed"] * 10
    assert all(job["error"] and job["images"] == [] for job in jobs)
