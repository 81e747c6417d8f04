"""Credentials and refusals: every route of Job Tracker is guarded as the webui's own are and tells a stranger nothing.

A request that the webui refuses is no job.
"""

from __future__ import annotations

import base64
import bisect
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import httpx
import pytest

from harness import (
    CLOSE,
    KINDS,
    MODE_FLAGS,
    MODES,
    ORIGIN,
    PNG,
    SHAPE,
    TESTS,
    Page,
    Sent,
    Webui,
    body,
    new_client,
    status_of,
)

SECOND = "pa:ss:word" if SHAPE == "sdnext" else "word"  # the others do not start with a colon in a password
USERS = f'user:secret,second:{SECOND},third:pässword,fourth:"quoted"'
QUOTED = ["fourth:quoted", 'fourth:"quoted"'][:: 1 if SHAPE == "sdnext" else -1]  # right, wrong: SD.Next drops quotes
UNKNOWN, MALFORMED = "AAAAAAAA", "no-job"

ROUTES = [
    ("GET", "/sdapi/v1/job/{id}"),
    ("GET", "/sdapi/v1/job/{id}?images=false"),
    ("GET", "/sdapi/v1/job/{id}?wait=1"),
    ("GET", "/sdapi/v1/job/{id}?wait=never"),
    ("GET", "/sdapi/v1/jobs"),
    ("GET", "/sdapi/v1/jobs?q={id}"),
    ("GET", "/sdapi/v1/jobs?limit=0&status=none"),
    ("GET", "/sdapi/v1/jobs?cursor=0-0-0-{id}"),
    ("GET", "/sdapi/v1/job/{id}/images/0"),
    ("GET", "/sdapi/v1/job/{id}/images/99"),
    ("GET", "/sdapi/v1/job/{id}/images/none"),
    ("HEAD", "/sdapi/v1/job/{id}/images/0"),
    ("GET", "/sdapi/v1/job/{id}/preview"),
    ("HEAD", "/sdapi/v1/job/{id}/preview"),
    ("GET", "/sdapi/v1/job/{id}/events?preview=true"),
    ("POST", "/sdapi/v1/job/{id}/cancel"),
    ("DELETE", "/sdapi/v1/job/{id}"),
]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "get", "NONE"]
PATHS = sorted({path.partition("?")[0] for _, path in ROUTES})


def basic(text: str, encoding: str = "utf-8") -> str:
    return "Basic " + base64.b64encode(text.encode(encoding)).decode()


CREDENTIALS: Dict[str, List[str]] = {
    "none": [],
    "empty": [""],
    "no password": [basic("user:")],
    "no user": [basic(":secret")],
    "no colon": [basic("usersecret")],
    "wrong password": [basic("user:wrong")],
    "part of the password": [basic("user:secre")],
    "more than the password": [basic("user:secret ")],
    "another user's password": [basic(f"user:{SECOND}")],
    "unknown user": [basic("nobody:secret")],
    "user in capitals": [basic("USER:secret")],
    "password to its colon": [basic("second:pa")],
    "password, colon, more": [basic(f"second:{SECOND}:more")],
    "password with a colon before it": [basic(f"second::{SECOND}")],
    "user and password with a colon between": [basic("user:secret:secret")],
    "non-ASCII user": [basic("usér:secret")],
    "non-ASCII password": [basic("third:pässword")],
    "non-ASCII password in Latin-1": [basic("third:pässword", "latin-1")],
    "ASCII password of the user who has another": [basic("third:password")],
    "not base64": ["Basic ???"],
    "bytes that are no text": ["Basic //79"],
    "raw bytes": ["Basic \xe9\xff"],
    "another scheme": ["Bearer secret"],
    "no scheme": [basic("user:secret").partition(" ")[2]],
    "NUL": [basic("user:secret\0")],
    "very long": [basic("user:" + "x" * 30_000)],
    "quotes": [basic(QUOTED[1])],
    "all users at once": [basic(USERS)],
    "the flag": [basic(f"user:secret,second:{SECOND}")],
    "wrong and right": [basic("user:wrong"), basic("user:secret")],
    "wrong, right in one field": [f"{basic('user:wrong')}, {basic('user:secret')}"],
}
RIGHT: Dict[str, List[str]] = {
    "first user": [basic("user:secret")],
    "second user": [basic(f"second:{SECOND}")],
    "quoted password": [basic(QUOTED[0])],
    "scheme in small letters": [basic("user:secret").replace("Basic", "basic")],
    "right and wrong": [basic("user:secret"), basic("user:wrong")],
}


def ask(webui: Webui, method: str, path: str, headers: List[Tuple[str, str]]) -> bytes:
    """The response as it came, without what differs from one to the next."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    answer = Sent(webui.port, "\r\n".join([*lines, "", ""]).encode("latin-1")).to_end()
    return re.sub(rb"(?i)\r\n(date|x-process-time): [^\r]*", b"", answer)


def with_credentials(values: List[str]) -> List[Tuple[str, str]]:
    return [("Authorization", value) for value in values]


def trace(webui: Webui) -> Any:
    return (webui.data / "jobs.json").read_bytes(), webui.images(), (webui.extension / "config.json").read_bytes()


@pytest.fixture(scope="module", params=MODES)
def crowd(request: pytest.FixtureRequest, start_shared: Any) -> Webui:
    """A webui with several users and a job."""
    webui = start_shared(*MODE_FLAGS[request.param], "--api-auth", USERS)
    job_id = webui.post(body()).headers["x-job-id"]
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    return webui


@pytest.fixture
def job_id(crowd: Webui) -> str:
    return next(iter(crowd.records()))


@pytest.mark.parametrize("name", CREDENTIALS)
def test_every_route_is_guarded_as_the_webuis_own(crowd, job_id, name):
    """The same bytes, whether there is such a job or not."""
    before = trace(crowd)
    headers = with_credentials(CREDENTIALS[name])
    own = ask(crowd, "GET", "/sdapi/v1/samplers", headers)
    # The host itself fails where the user has a password that is not ASCII.
    assert status_of(own) == (500 if "of the user who has another" in name else 401)
    for method, path in ROUTES:
        expected = own.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if method == "HEAD" else own
        for one in (job_id, UNKNOWN, MALFORMED):
            answer = ask(crowd, method, path.format(id=one), headers)
            assert answer.replace(one.encode(), b"") == expected.replace(b"/sdapi/v1/samplers", b""), (method, path)
    assert trace(crowd) == before


@pytest.mark.parametrize("name", RIGHT)
def test_every_user_is_let_in(crowd, job_id, name):
    headers = with_credentials(RIGHT[name])
    assert status_of(ask(crowd, "GET", "/sdapi/v1/samplers", headers)) == 200
    for method, path in ROUTES:
        for one in (UNKNOWN, *([job_id] if method != "DELETE" else [])):
            assert status_of(ask(crowd, method, path.format(id=one), headers)) in (200, 404, 409, 422), (method, path)
    assert status_of(ask(crowd, "GET", f"/sdapi/v1/job/{job_id}", headers)) == 200


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", ["", "/", "//", "/.", "%20", "?x", ";x"])
def test_no_method_tells_a_stranger_whether_there_is_a_job(crowd, job_id, method, end):
    before = trace(crowd)
    for path in PATHS:
        answers = {
            ask(crowd, method, path.format(id=one) + end, []).replace(one.encode(), b"ID") for one in (job_id, UNKNOWN)
        }
        assert len(answers) == 1, (path, answers)
        assert status_of(answers.pop()) in (307, 401, 404, 405), path
    assert trace(crowd) == before


SPELLINGS = [
    *("/{path}", "/./{path}", "/x/../{path}", "{capitals}", "{path}/../{id}", "http://localhost{path}", "{path}%2f.."),
    *("/%73dapi/v1/job/{id}", "/sdapi/v1/%6Aob/{id}", "/sdapi/v1%2fjob/{id}", "/sdapi%2Fv1/jobs"),
    *(
        "/sdapi/v1/job/%256A",
        "/sdapi/v1/job/{id}/images//0",
        "/sdapi/v1/job//{id}",
        "/sdapi\\v1\\job\\{id}",
        "/sdapi/v1/job/{id}%00",
    ),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_other_spelling_leads_past_the_guard(crowd, job_id, spelling):
    before = trace(crowd)
    for one in (job_id, UNKNOWN):
        path = f"/sdapi/v1/job/{one}"
        url = spelling.format(id=one, path=path, capitals=path.upper())
        for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS"):
            assert status_of(ask(crowd, method, url, [])) in (307, 400, 401, 404, 405), (method, url)
    assert trace(crowd) == before


@pytest.mark.skipif(SHAPE != "sdnext", reason="others have each route once")
def test_the_routes_below_a_subpath_are_guarded(start):
    webui = start("--api", "--subpath", "below", "--api-auth", USERS).restart()  # has them from its second start on
    job_id = webui.client.post("/below/sdapi/v1/txt2img", json=body()).headers["x-job-id"]
    assert webui.client.get(f"/below/sdapi/v1/job/{job_id}?wait=30").json()["status"] == "Completed"
    for name, credentials in CREDENTIALS.items():
        headers = with_credentials(credentials)
        own = ask(webui, "GET", "/below/sdapi/v1/samplers", headers)
        for method, path in ROUTES:
            head = method == "HEAD"
            expected = own.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if head else own
            for one in (job_id, UNKNOWN):
                answer = ask(webui, method, "/below" + path.format(id=one), headers)
                answer, expected = (text.replace(one.encode(), b"") for text in (answer, expected))
                assert answer == expected.replace(b"/below/sdapi/v1/samplers", b""), (name, method, path)


def test_a_stranger_does_not_touch_what_runs_and_waits(crowd):
    gate = crowd.gate()
    running, waiting = (crowd.send(body(standin={"hold": gate})).job_id() for _ in range(2))
    crowd.until_status(running, "Processing")
    for method, path in ROUTES:
        answers = {
            ask(crowd, method, path.format(id=one), []).replace(one.encode(), b"ID")
            for one in (running, waiting, UNKNOWN)
        }
        assert len(answers) == 1 and status_of(answers.pop()) == 401, (method, path)
    assert [crowd.job(one)["status"] for one in (running, waiting)] == ["Processing", "Pending"]
    gate.open()
    assert [crowd.job(one, wait=30)["status"] for one in (running, waiting)] == ["Completed"] * 2


TIMES = 5  # requests of each kind
ROUNDS = 20  # of these at most, until they are alike: what costs a little each time never is, in any part of them
ALIKE = 2.0  # as a ratio; what a look at a job costs is many times as much


def test_time_tells_a_stranger_nothing(crowd):
    """Neither of a large job nor of one that runs, by no route: all take as long as what there is not."""
    gate = crowd.gate()
    large = crowd.post(body(width=1024, height=1024, batch_size=2)).headers["x-job-id"]
    assert crowd.job(large, wait=30)["status"] == "Completed"
    running = crowd.send(body(standin={"hold": gate})).job_id()
    crowd.until_status(running, "Processing")

    def are_alike(method: str, path: str, headers: List[Tuple[str, str]], rounds: int = ROUNDS) -> bool:
        taken: Dict[str, List[float]] = {large: [], running: [], UNKNOWN: []}
        for _ in range(rounds):
            for one in [*taken] * TIMES:
                began = time.perf_counter()
                ask(crowd, method, path.format(id=one), headers)
                bisect.insort(taken[one], time.perf_counter() - began)
            for same_rank in list(zip(*taken.values()))[: len(taken[large]) // 2]:
                if max(same_rank) < ALIKE * min(same_rank):
                    return True
        return False

    right = with_credentials(RIGHT["first user"])
    assert not are_alike("GET", "/sdapi/v1/job/{id}?wait=0.5", right, rounds=1), "it would be noticed here"
    for name in ("none", "wrong password", "unknown user"):
        for method, path in ROUTES:
            assert are_alike(method, path, with_credentials(CREDENTIALS[name])), (name, method, path)
    gate.open()


# The page


@pytest.fixture(scope="module")
def doors(start_shared: Any) -> Webui:
    """A webui whose API and pages have credentials, with a job."""
    both = ("--api-auth", "user:secret", "--gradio-auth", "me:word")
    webui = start_shared("--api", *(("--auth", "user:secret") if SHAPE == "sdnext" else both))
    webui.client.auth = ("user", "secret")
    job_id = webui.post(body("behind a door")).headers["x-job-id"]
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    return webui


@pytest.fixture(scope="module")
def resident(doors: Webui) -> Iterator[httpx.Client]:
    """Somebody who has logged in on the page, and has no credentials of the API."""
    name, password = ("user", "secret") if SHAPE == "sdnext" else ("me", "word")
    with new_client(doors.url) as client:
        assert client.post("/login", data={"username": name, "password": password}).status_code == 200
        yield client


STRANGERS = {
    "nothing": [],
    "credentials of the API": [("Authorization", basic("user:secret"))],
    "credentials of the page, as of the API": [("Authorization", basic("me:word"))],
    "a cookie": [("Cookie", "access-token=me; access-token-unsecure=me")],
    "an empty cookie": [("Cookie", "access-token=; access-token-unsecure=")],
    "a long cookie": [("Cookie", "access-token-unsecure=" + "x" * 30_000)],
}


@pytest.mark.parametrize("name", STRANGERS)
def test_the_pages_images_are_guarded_as_its_files(doors, name):
    job_id = next(iter(doors.records()))
    own = ask(doors, "GET", "/file=nothing", STRANGERS[name])
    assert status_of(own) == 401
    for path in (f"/job-tracker/{{id}}/{what}" for what in ("0", "99", "none", "thumbnail", "preview")):
        for one in (job_id, UNKNOWN, MALFORMED):
            assert ask(doors, "GET", path.format(id=one), STRANGERS[name]) == own
        for method in METHODS[1:]:
            answers = {ask(doors, method, path.format(id=one), STRANGERS[name]) for one in (job_id, UNKNOWN)}
            assert len(answers) == 1 and status_of(answers.pop()) == 405, (method, path)


def test_the_page_and_the_api_each_have_their_own_credentials(doors, resident):
    job_id = next(iter(doors.records()))
    image = resident.get(f"/job-tracker/{job_id}/0")
    assert image.status_code == 200 and image.content[:8] == b"\x89PNG\r\n\x1a\n"
    assert image.content == doors.client.get(f"/sdapi/v1/job/{job_id}/images/0").content
    assert resident.get(f"/job-tracker/{UNKNOWN}/0").status_code == 404
    assert resident.get(f"/job-tracker/{job_id}/99").status_code == 404
    thumbnail = resident.get(f"/job-tracker/{job_id}/thumbnail")
    assert thumbnail.status_code == 200 and thumbnail.headers["content-type"] == "image/jpeg"
    assert resident.get(f"/job-tracker/{job_id}/preview").status_code == 204, "it has ended"
    for method, path in ROUTES:
        assert resident.request(method, path.format(id=job_id)).status_code == 401, (method, path)


CALLS = {
    "job_tracker_look": ["{}", True, "30 days", "All", "", "", ""],
    "job_tracker_enabled": [False],
    "job_tracker_retention": ["1 day"],
    "job_tracker_action": ["purge"],
}


def test_nobody_uses_the_page_without_a_login(doors, resident):
    before = trace(doors)
    page = Page(resident)
    assert set(page.events) == set(CALLS)
    for name, data in CALLS.items():
        for path in ("/run/predict", "/api/predict"):
            for headers in ({}, {"Authorization": basic("user:secret")}):
                headers["Content-Type"] = "application/json"
                request = page.request(name, *data)
                answer = httpx.post(doors.url + path, content=request, headers=headers, trust_env=False)
                assert answer.status_code == 401 and "behind a door" not in answer.text
    assert trace(doors) == before
    assert "behind a door" in page.look()


# gradio's own way to files


@pytest.fixture(scope="module")
def below(start_shared: Any) -> Iterator[Tuple[Webui, Path]]:
    """A webui whose jobs lie below its own folder, which gradio 3 gives away. Its settings name it by a link."""
    with tempfile.TemporaryDirectory(dir=str(TESTS / "webui"), prefix="data-") as name:
        folder = Path(name)
        (folder / "real").mkdir()
        (folder / "link").symlink_to("real")
        (folder / "images").mkdir()
        (folder / "real" / "images").symlink_to("../images")
        (folder / "beside.txt").write_text("nothing of ours")
        webui = start_shared("--api", environ={"TRACKER_DATA_DIR": str(folder / "link")})
        webui.job(webui.post(body()).headers["x-job-id"], wait=30)
        yield webui, folder
        webui.kill()  # otherwise it may make its files anew when they are gone


def test_gradio_does_not_give_our_files_away(below):
    webui, folder = below
    records = json.loads((folder / "real" / "jobs.json").read_text())
    image = next(iter(records.values()))["images"][0]
    relative = folder.relative_to(TESTS / "webui")
    files = [f"{place}/{name}" for place in ("link", "real") for name in ("jobs.json", f"images/{image}")]
    files += [f"images/{image}", f"images/{image.partition('_')[0]}.json", "real/../link/jobs.json", "link//jobs.json"]
    for file in files:
        assert (folder / file).is_file(), file
        for start in (folder, relative, f"./{relative}", f"modules/../{relative}", f"{folder}/../{folder.name}"):
            for way in ("/file=", "/file/"):
                answer = ask(webui, "GET", f"{way}{start}/{file}".replace("..", "%2e%2e"), [])
                assert status_of(answer) in (403, 404), (way, start, file)
    if SHAPE != "forge":  # gradio 4 gives nothing of this away
        assert status_of(ask(webui, "GET", f"/file={relative}/beside.txt", [])) == 200


# A request that the webui refuses: its answer is the webui's own, to the byte, and it leaves no trace


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


def trace_of_jobs(webui):
    """Everything on disk that a job leaves."""
    status = (webui.data / "jobs.json").stat()
    return status.st_mtime_ns, (webui.data / "jobs.json").read_bytes(), webui.images()


def answer_to(webui, case, kind):
    content = case.content if isinstance(case.content, bytes) else json.dumps(case.content).encode()
    headers = {"Content-Type": "application/json", "Origin": ORIGIN, **case.headers}
    if case.auth:
        headers["Authorization"] = "Basic " + base64.b64encode(":".join(case.auth).encode()).decode()
    with new_client(webui.url) as client:
        response = client.request(case.method, case.path.format(kind), content=content, headers=headers)
    passing = (b"date", b"x-process-time")
    port = str(webui.port).encode()
    raw = [(name, value.replace(port, b"PORT")) for name, value in response.headers.raw if name.lower() not in passing]
    return response.status_code, response.reason_phrase, sorted(raw), response.content


@pytest.mark.parametrize("kind, case", CASES)
def test_refusal_is_the_webuis_own(guarded, alone, kind, case):
    before = trace_of_jobs(guarded)
    refusal = answer_to(guarded, case, kind)
    assert refusal == answer_to(alone(guarded), case, kind)
    assert case.status is None or refusal[0] == case.status
    assert trace_of_jobs(guarded) == before


@pytest.mark.parametrize("name", ["no credentials", "invalid JSON", "preflight"])
def test_refusal_when_off(off, alone, name):
    assert answer_to(off, REFUSED[name], "txt2img") == answer_to(alone(off), REFUSED[name], "txt2img")


def test_refusal_does_not_wait_behind_the_queue(guarded, alone):
    """It comes while a generation holds the lock, also when there is a better request to come."""
    gate = guarded.gate()
    guarded.until_status(guarded.send(body(standin={"hold": gate})).job_id(), "Processing")
    before = trace_of_jobs(guarded)
    case = REFUSED["no init image"]
    assert answer_to(guarded, case, "img2img") == answer_to(alone(guarded), case, "img2img")
    assert trace_of_jobs(guarded) == before
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
