"""Requests of pages from elsewhere: nothing of ours is changed for them, and gradio's queue leads to none of it."""

from __future__ import annotations

import json
import re
import time
from typing import Any, Dict, List, Set, Tuple

import httpx
import pytest
from inside import load_script

from harness import (
    AUTH,
    CLOSE,
    MODE_FLAGS,
    MODES,
    OLD_ID,
    SDNEXT_ERROR,
    SHAPE,
    Page,
    Webui,
    body,
    config_of,
    until,
    with_old_job,
)

Headers = List[Tuple[str, str]]

OWN, FOREIGN = False, True
NAMED = "https://named.example"
EVIL = "https://evil.example"
BOX = ("Host", "box.lan:7860")

# What a browser, or somebody else, says, and whether it is to be taken for a page of another origin.
CASES: Dict[str, Tuple[Headers, bool]] = {
    # A program
    "nothing": ([], OWN),
    "a program with a forwarded host": ([BOX, ("X-Forwarded-Host", "elsewhere")], OWN),
    # Browsers that send Sec-Fetch-Site
    "same-origin": ([BOX, ("Sec-Fetch-Site", "same-origin"), ("Origin", "http://box.lan:7860")], OWN),
    "none": ([BOX, ("Sec-Fetch-Site", "none")], OWN),
    "same-origin behind a proxy that changes Host": (
        [("Host", "127.0.0.1:7860"), ("Sec-Fetch-Site", "same-origin"), ("Origin", "https://box.lan")],
        OWN,
    ),
    "same-site": ([BOX, ("Sec-Fetch-Site", "same-site"), ("Origin", "http://box.lan:8000")], FOREIGN),
    "cross-site": ([BOX, ("Sec-Fetch-Site", "cross-site"), ("Origin", EVIL)], FOREIGN),
    "cross-site without Origin": ([BOX, ("Sec-Fetch-Site", "cross-site")], FOREIGN),
    "cross-site, Origin as Host": ([BOX, ("Sec-Fetch-Site", "cross-site"), ("Origin", "http://box.lan:7860")], FOREIGN),
    "cross-site, named": ([BOX, ("Sec-Fetch-Site", "cross-site"), ("Origin", NAMED)], OWN),
    "cross-site, null": ([BOX, ("Sec-Fetch-Site", "cross-site"), ("Origin", "null")], FOREIGN),
    "a site of a later standard": ([BOX, ("Sec-Fetch-Site", "near"), ("Origin", "http://box.lan:7860")], FOREIGN),
    "two sites": ([BOX, ("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Site", "cross-site")], FOREIGN),
    "a site in capitals": ([BOX, ("Sec-Fetch-Site", "SAME-ORIGIN"), ("Origin", EVIL)], FOREIGN),
    # Those that do not
    "Origin as Host": ([BOX, ("Origin", "http://box.lan:7860")], OWN),
    "case is ignored": ([("Host", "BOX.lan:7860"), ("Origin", "HTTP://box.LAN:7860")], OWN),
    "port 80 is http's": ([("Host", "box.lan:80"), ("Origin", "http://box.lan")], OWN),
    "port 443 is https's": ([("Host", "box.lan"), ("Origin", "https://box.lan:443")], OWN),
    "an empty port": ([("Host", "box.lan:"), ("Origin", "http://box.lan")], OWN),
    "http and https": ([("Host", "box.lan:80"), ("Origin", "https://box.lan")], FOREIGN),
    "IPv6": ([("Host", "[::1]:7860"), ("Origin", "http://[::1]:7860")], OWN),
    "IPv6, another": ([("Host", "[::1]:7860"), ("Origin", "http://[::2]:7860")], FOREIGN),
    "another port": ([BOX, ("Origin", "http://box.lan:7861")], FOREIGN),
    "no port": ([BOX, ("Origin", "http://box.lan")], FOREIGN),
    "another host": ([BOX, ("Origin", EVIL)], FOREIGN),
    "a host above": ([BOX, ("Origin", "http://lan:7860")], FOREIGN),
    "a host below": ([BOX, ("Origin", "http://x.box.lan:7860")], FOREIGN),
    "the end of a host": ([BOX, ("Origin", "http://xbox.lan:7860")], FOREIGN),
    "null": ([BOX, ("Origin", "null")], FOREIGN),
    "null as Host": ([("Host", "null"), ("Origin", "null")], FOREIGN),
    "named": ([BOX, ("Origin", NAMED)], OWN),
    "named in capitals, which the webui does not take either": ([BOX, ("Origin", NAMED.upper())], FOREIGN),
    "named, and more": ([BOX, ("Origin", NAMED + ".evil.example")], FOREIGN),
    "named by the expression": ([BOX, ("Origin", "https://seven.named.example")], OWN),
    "the expression in the middle": ([BOX, ("Origin", "https://seven.named.example.evil")], FOREIGN),
    "all that is named": ([BOX, ("Origin", f"{NAMED},https://other.example")], FOREIGN),
    "another scheme": ([("Host", "box.lan"), ("Origin", "app://box.lan")], FOREIGN),
    # Proxies
    "forwarded": ([("Host", "127.0.0.1:7860"), ("Origin", "http://box.lan"), ("X-Forwarded-Host", "box.lan")], OWN),
    "forwarded twice": (
        [("Host", "127.0.0.1"), ("Origin", "https://box.lan"), ("X-Forwarded-Host", "Box.lan, inner:8080")],
        OWN,
    ),
    "forwarded in two fields": (
        [("Host", "[::1]"), ("Origin", "https://box.lan"), ("X-Forwarded-Host", "b"), ("X-Forwarded-Host", "box.lan")],
        OWN,
    ),
    "forwarded, foreign": ([("Host", "localhost"), ("Origin", EVIL), ("X-Forwarded-Host", "box.lan")], FOREIGN),
    "forwarded, says the page itself": ([BOX, ("Origin", EVIL), ("X-Forwarded-Host", EVIL.split("/")[-1])], FOREIGN),
    "forwarded to another machine": (
        [("Host", "a"), ("Origin", "http://b.lan"), ("X-Forwarded-Host", "b.lan")],
        FOREIGN,
    ),
    "forwarded to a name that begins like loopback": (
        [("Host", "127.0.0.1.evil.example"), ("Origin", EVIL), ("X-Forwarded-Host", EVIL.split("/")[-1])],
        FOREIGN,
    ),
    "forwarded, and Host as Origin": ([BOX, ("Origin", "http://box.lan:7860"), ("X-Forwarded-Host", "b")], OWN),
    # Nonsense
    "two origins": ([BOX, ("Origin", "http://box.lan:7860"), ("Origin", EVIL)], FOREIGN),
    "two origins, one named": ([BOX, ("Origin", NAMED), ("Origin", EVIL)], FOREIGN),
    "an origin without a scheme": ([BOX, ("Origin", "box.lan:7860")], FOREIGN),
    "an origin with a path": ([BOX, ("Origin", "http://box.lan:7860/")], FOREIGN),
    "an origin with a user": ([BOX, ("Origin", "http://box.lan:7860@evil.example")], FOREIGN),
    "an origin without a host": ([("Host", ""), ("Origin", "http://")], FOREIGN),
    "a port that is none": ([BOX, ("Origin", "http://box.lan:7860x")], FOREIGN),
    "a port too long": ([BOX, ("Origin", "http://box.lan:" + "0" * 500 + "7860")], FOREIGN),
    "commas": ([("Host", ","), ("Origin", "http://,"), ("X-Forwarded-Host", ",,,")], FOREIGN),
    "controls": ([BOX, ("Origin", "http://box.lan:7860\t.evil")], FOREIGN),
    "Latin-1": ([BOX, ("Origin", "http://b\xf6x.lan\x85:7860")], FOREIGN),
    "brackets": ([("Host", "[[[["), ("Origin", "http://[[[[")], FOREIGN),
    "a long origin": ([BOX, ("Origin", "http://" + "box.lan:" * 1000)], FOREIGN),
    "a long list of hosts": ([BOX, ("Origin", EVIL), ("X-Forwarded-Host", "x, " * 4000 + "y")], FOREIGN),
}
WAYS_OF_A_PAGE = [name for name, (headers, foreign) in CASES.items() if foreign and dict(headers)["Host"] == BOX[1]]
FLAGS = (
    "--cors-allow-origins",
    f"{NAMED},https://other.example",
    "--cors-allow-origins-regex",
    r"https://\w+\.named\.example",
)


def as_bytes(headers: Headers) -> List[Tuple[bytes, bytes]]:
    return [(name.encode(), value.encode("latin-1")) for name, value in headers]


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    headers, foreign = CASES[name]
    scope = {"headers": [(name.lower(), value) for name, value in as_bytes(headers)]}

    def is_named(origin: str) -> bool:
        return origin == NAMED or bool(re.fullmatch(FLAGS[-1], origin))

    assert load_script().is_foreign(scope, is_named) is foreign


def test_rule_takes_no_time():
    """Whatever is repeated in a header of the longest that a server takes."""
    is_foreign, long = load_script().is_foreign, 60_000
    for piece in (b"[", b"a", b":", b"0", b".", b",", b" ", b"a:", b"[:", b"://", b"\xe9"):
        value = piece * (long // len(piece))
        for origin in (value, b"http://" + value, b"http://a:" + value):
            began = time.monotonic()
            fields = {"origin": origin, "host": value, "x-forwarded-host": value}
            is_foreign({"headers": [(name.encode(), value) for name, value in fields.items()]}, lambda origin: False)
            assert time.monotonic() - began < 0.5, (piece, origin[:20])


# Over HTTP


def with_old_job_that_stays(webui: Webui) -> None:
    with_old_job(40)(webui)
    webui.write_config('{"enabled": true, "retention_days": null}')


@pytest.fixture(scope="module", params=MODES)
def webui(request: pytest.FixtureRequest, start_shared: Any) -> Webui:
    """Some origins are named, and there is a job."""
    webui = start_shared(*MODE_FLAGS[request.param], *FLAGS)
    assert webui.job(webui.post(body("a secret")).headers["x-job-id"], wait=30)["status"] == "Completed"
    return webui


@pytest.fixture(scope="module")
def site(start_shared: Any) -> Webui:
    """The same with its pages, and with a job that is old: a purge removes it once there is a retention."""
    webui = start_shared("--api", *FLAGS, prepare=with_old_job_that_stays)
    assert webui.job(webui.post(body("a secret")).headers["x-job-id"], wait=30)["status"] == "Completed"
    return webui


def ask(webui: Webui, method: str, path: str, headers: Headers, content: bytes = b"") -> httpx.Response:
    return webui.client.request(method, path, headers=as_bytes([*headers, *CLOSE.items()]), content=content)


def changing_routes(webui: Webui) -> Set[Tuple[str, str]]:
    """All that are ours, as the webui's own description has them."""
    paths = webui.client.get("/openapi.json").json()["paths"]
    return {
        (method.upper(), path)
        for path, methods in paths.items()
        for method, operation in methods.items()
        if "Job Tracker" in operation.get("tags", []) and method in ("post", "put", "patch", "delete")
    }


@pytest.mark.parametrize("name", CASES)
def test_routes(webui, name):
    """Each that changes something is refused to whom it may concern, whether there is such a job or not."""
    headers, foreign = CASES[name]
    routes = changing_routes(webui)
    assert {("POST", "/sdapi/v1/job/{id}/cancel"), ("DELETE", "/sdapi/v1/job/{id}")} <= routes
    before = webui.records()
    job_id = next(iter(before))
    for method, path in routes:
        for one in ("AAAAAAAA", *([job_id] if foreign else [])):
            answer = ask(webui, method, path.format(id=one), headers)
            assert (answer.status_code == 403) is foreign, (method, path, answer.text)
            if foreign:
                assert "another origin" in answer.json()["detail"]
                assert str(webui.folder) not in answer.text and "sdapi" not in answer.text
    assert webui.records() == before
    assert ask(webui, "GET", "/sdapi/v1/jobs", headers).status_code == 200, "what changes nothing is as before"


def test_foreign_page_cancels_nothing(webui):
    """Neither what runs nor what waits, until a page that is named does."""
    gate = webui.gate()
    jobs = [webui.send(body(standin={"hold": gate})).job_id() for _ in range(2)]
    webui.until_status(jobs[0], "Processing")
    for job_id in jobs:
        assert ask(webui, "POST", f"/sdapi/v1/job/{job_id}/cancel", CASES["cross-site"][0]).status_code == 403
    assert [webui.job(one)["status"] for one in jobs] == ["Processing", "Pending"]
    for job_id in jobs:
        assert ask(webui, "POST", f"/sdapi/v1/job/{job_id}/cancel", CASES["cross-site, named"][0]).status_code == 200
        assert webui.job(job_id, wait=30)["error"] == "Cancelled"
        assert ask(webui, "DELETE", f"/sdapi/v1/job/{job_id}", CASES["cross-site"][0]).status_code == 403
        assert ask(webui, "DELETE", f"/sdapi/v1/job/{job_id}", CASES["named"][0]).status_code == 204
    gate.open()


def test_every_origin_is_named(start):
    webui = start(*MODE_FLAGS[MODES[-1]], "--cors-allow-origins", "*")
    for name in ("cross-site", "null", "another host"):
        assert ask(webui, "DELETE", "/sdapi/v1/job/AAAAAAAA", CASES[name][0]).status_code == 404, name


def test_no_origin_is_named(start):
    webui = start(*MODE_FLAGS[MODES[-1]])
    for name in ("cross-site", "named", "cross-site without Origin", "named by the expression"):
        assert ask(webui, "DELETE", "/sdapi/v1/job/AAAAAAAA", CASES[name][0]).status_code == 403, name
    assert ask(webui, "DELETE", "/sdapi/v1/job/AAAAAAAA", []).status_code == 404


def test_credentials_are_checked_first(start):
    webui = start(*MODE_FLAGS[MODES[-1]], *AUTH)
    webui.client.auth = None
    for method, path in changing_routes(webui):
        foreign, own = (
            ask(webui, method, path.format(id="AAAAAAAA"), CASES[name][0]) for name in ("cross-site", "nothing")
        )
        assert (foreign.status_code, foreign.content) == (own.status_code, own.content)
        assert foreign.status_code == 401
    webui.client.auth = ("user", "secret")
    assert ask(webui, "DELETE", "/sdapi/v1/job/AAAAAAAA", CASES["cross-site"][0]).status_code == 403


def test_documented(webui):
    paths = webui.client.get("/openapi.json").json()["paths"]
    for method, path in changing_routes(webui):
        answer = paths[path][method.lower()]["responses"]["403"]["content"]["application/json"]
        assert answer["schema"]["$ref"].endswith("/Problem")
        real = ask(webui, method, path.format(id="AAAAAAAA"), CASES["cross-site"][0])
        assert answer["example"]["detail"] == real.json()["detail"]
    assert "403" not in paths["/sdapi/v1/jobs"]["get"]["responses"]


# The tab's functions


CALLS: Dict[str, List[Any]] = {
    "job_tracker_look": ["{}", True, "30 days", "All", "", "", ""],
    "job_tracker_enabled": [False],
    "job_tracker_retention": ["1 day"],
    "job_tracker_action": ["purge"],
}
SPOILT = ("two origins", "Latin-1", "controls", "a long origin", "a long list of hosts")  # no page says this


@pytest.fixture
def watched(site: Webui) -> Any:
    """That nothing happens to it: its settings are the same after the test, no job is gone, and no secret told."""
    before = config_of(site), site.records()
    yield site
    # A purge goes on beside its call, but the page says at once that it has begun.
    shown = Page(site.client).look()
    assert not [words for words in ("Purging:", "Purge at", "The purge failed") if words in shown]
    assert (config_of(site), site.records()) == before


@pytest.mark.parametrize("path", ["/run/predict", "/api/predict", "/run/predict/", "/run/another", "/api/x/"])
@pytest.mark.parametrize("name", ["cross-site", "same-site", "another host", "null"])
def test_functions(watched, path, name):
    """As a page calls them without asking the browser: a body without a Content-Type."""
    page = Page(watched.client)
    assert set(page.events) == set(CALLS)
    for function, data in CALLS.items():
        answer = ask(watched, "POST", path, CASES[name][0], page.request(function, *data))
        assert answer.status_code == 403, (function, answer.text[:300])
        assert "another origin" in answer.json()["detail"] == answer.json()["error"]
        assert "secret" not in answer.text and str(watched.folder) not in answer.text


@pytest.mark.parametrize("name", [name for name in CASES if name not in SPOILT])
def test_look(site, name):
    headers, foreign = CASES[name]
    page = Page(site.client)
    answer = ask(site, "POST", "/run/predict", headers, page.request("job_tracker_look", *CALLS["job_tracker_look"]))
    if SHAPE == "forge" and answer.status_code == 500:  # gradio 4 makes an address of some of these, and fails
        assert "secret" not in answer.text
        return
    assert answer.status_code == (403 if foreign else 200)
    assert ("a secret" in answer.text) is not foreign


def test_who_is_not_foreign_uses_them(site):
    page = Page(site.client)
    for name in ("same-origin", "named", "cross-site, named", "forwarded", "nothing"):
        for retention in ("7 days", "30 days"):
            for enabled in (False, True):
                call = page.request("job_tracker_enabled", enabled)
                assert ask(site, "POST", "/run/predict", CASES[name][0], call).status_code == 200
                assert config_of(site)["enabled"] is enabled
            call = page.request("job_tracker_retention", retention)
            assert ask(site, "POST", "/run/predict", CASES[name][0], call).status_code == 200
            assert config_of(site)["retention_days"] == int(retention.split()[0])
    assert OLD_ID in site.records()
    call = page.request("job_tracker_action", "purge")
    assert ask(site, "POST", "/run/predict", CASES["same-origin"][0], call).status_code == 200
    until(lambda: OLD_ID not in site.records(), what="the old job is purged")
    site.restart()  # the last purge is told no more


# The token


def token_of(webui: Webui, headers: Headers = ()) -> str:
    answer = ask(webui, "GET", "/job-tracker/token", list(headers))
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    assert (
        answer.headers["content-type"] == "application/json" and answer.headers["x-content-type-options"] == "nosniff"
    )
    return answer.json()


def test_token(site):
    """Who could read it is the webui's own page, whatever a proxy makes of its headers."""
    page = Page(site.client)

    def look(token: Any) -> httpx.Response:
        request = json.loads(page.request("job_tracker_look", *CALLS["job_tracker_look"]))
        request["data"][-1] = token
        return ask(site, "POST", "/run/predict", CASES["another host"][0], json.dumps(request).encode())

    token = token_of(site, CASES["same-origin"][0])
    assert len(token) > 40 and token == token_of(site)
    assert look(token).status_code == 200 and "a secret" in look(token).text
    wrong = [token[:-1], token + "x", token.lower(), "", None, 0, True, [token], {"token": token}, "\xe9", "\ud800"]
    for one in wrong:
        assert look(one).status_code == 403, one
    assert site.restart() and token_of(site) != token


@pytest.mark.parametrize("name", WAYS_OF_A_PAGE)
def test_token_is_not_for_others(site, name):
    answer = ask(site, "GET", "/job-tracker/token", CASES[name][0])
    assert answer.status_code == 403 and token_of(site) not in answer.text


def test_token_is_in_no_page(site):
    token = token_of(site)
    for path in ("/", "/config", "/info", "/openapi.json"):
        assert token not in site.client.get(path).text


def test_no_page_can_say_that_it_came_through_a_proxy(webui):
    """gradio 4 tells a browser that a page of any origin may send any header, and Forge leaves it so."""
    preflight = [
        *CASES["another host"][0],
        ("Access-Control-Request-Method", "DELETE"),
        ("Access-Control-Request-Headers", "content-type,X-Forwarded-Host"),
    ]
    for path in ("/sdapi/v1/job/AAAAAAAA", "/run/predict", "/job-tracker/token"):
        answer = ask(webui, "OPTIONS", path, preflight)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


# gradio's queue


def through_websocket(webui: Webui, name: str, headers: Dict[str, str], more: Dict[str, Any], query: str = "") -> Any:
    """gradio 3: what the queue says at the end."""
    import websocket

    call = json.loads(Page(webui.client).request(name, *CALLS[name]))
    connection = websocket.create_connection(
        f"ws://127.0.0.1:{webui.port}/queue/join{query}", header=headers, suppress_origin=True, timeout=30
    )
    try:
        while True:
            said = json.loads(connection.recv())
            if said["msg"] == "send_hash":
                connection.send(json.dumps({"session_hash": "x", "fn_index": call["fn_index"]}))
            elif said["msg"] == "send_data":
                connection.send(json.dumps({**call, **more}))
            elif said["msg"] == "process_completed":
                return said
    finally:
        connection.close()


def through_events(webui: Webui, name: str, headers: Dict[str, str], more: Dict[str, Any], query: str = "") -> Any:
    """gradio 4: the same."""
    call = {**json.loads(Page(webui.client).request(name, *CALLS[name])), **more, "session_hash": f"s{time.time()}"}
    joined = webui.client.post(f"/queue/join{query}", json=call, headers=headers)
    assert joined.status_code == 200, joined.text
    with webui.client.stream("GET", "/queue/data", params={"session_hash": call["session_hash"]}) as answer:
        for line in answer.iter_lines():
            said = json.loads(line[len("data: ") :] or "{}") if line.startswith("data: ") else {}
            if said.get("msg") == "process_completed":
                return said
    raise AssertionError("the queue did not say how it ended")


through_queue = through_events if SHAPE == "forge" else through_websocket
SAID = {
    "nothing": {},
    "the page's own": {"Sec-Fetch-Site": "same-origin"},
    "foreign": {"Origin": EVIL, "Sec-Fetch-Site": "cross-site"},
    "foreign, on a plain address": {"Origin": EVIL},
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("function", CALLS)
def test_queue(watched, function, said):
    """Refused to everybody: the tab does not use it, and with gradio 3 it does not tell who asks."""
    mark = watched.log_path.stat().st_size
    end = through_queue(watched, function, SAID[said], {})
    assert end["success"] is False and "secret" not in json.dumps(end)
    assert str(watched.folder) not in json.dumps(end)
    assert watched.log_since(mark).count("Traceback") <= 1, "which is gradio's"


@pytest.mark.parametrize("query", ["?a=b", "?" + "&" * 5000, "?%ff=%00", "?;;=;"])
def test_queue_with_a_token(watched, query):
    """Not even with the token, and whatever is in the address."""
    call = {"data": [*CALLS["job_tracker_look"], token_of(watched)]}
    end = through_queue(watched, "job_tracker_look", {}, call, query)
    assert end["success"] is False and "secret" not in json.dumps(end)


CLAIMS = {
    "headers": {"headers": {"host": BOX[1], "sec-fetch-site": "same-origin"}},
    "no headers": {"headers": {}},
    "a path": {"scope": {"path": "/run/predict", "headers": []}, "url": "/run/predict"},
    "a request": {"request": {"scope": {"path": "/run/predict", "headers": []}, "headers": {}}},
    "a session": {"session_hash": "x", "kwargs": {}},
}


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("claim", CLAIMS)
def test_no_body_can_claim_what_the_headers_say(watched, claim, batched):
    """As gradio 3 lets it, whose queue hands the headers on in this way."""
    page = Page(watched.client)
    for function, data in CALLS.items():
        request = json.loads(page.request(function, *data))
        request.update(request=[CLAIMS[claim]] if batched else CLAIMS[claim], batched=batched)
        for headers in (CASES["another host"][0], CASES["nothing"][0]):
            answer = ask(watched, "POST", "/run/predict", headers, json.dumps(request).encode())
            assert answer.status_code in (403, 422, 500), (function, answer.text[:300])
            assert "secret" not in answer.text


def test_no_name_leads_to_them(watched):
    """gradio also calls functions by names, and ours have none."""
    for name in ("look", "guarded", "set_enabled", "set_retention", "purge", "False", "None", ""):
        for way in ("/call", "/run", "/api"):
            answer = watched.client.post(f"{way}/{name}", json={"data": [False, ""]}, headers=CLOSE)
            assert answer.status_code in (404, 405, 422, 500), (way, name, answer.text[:300])


def test_with_a_login(start):
    """Who has none is not asked for his origin, and who has one is."""
    word = ("--auth", "me:word") if SHAPE == "sdnext" else ("--gradio-auth", "me:word")
    webui = start("--api", *word)
    call = json.dumps({"fn_index": 0, "data": [], "session_hash": "x"}).encode()
    for path in ("/run/predict", "/job-tracker/token"):
        method = "GET" if "token" in path else "POST"
        assert ask(webui, method, path, CASES["cross-site"][0], call).status_code == 401
    assert webui.client.post("/login", data={"username": "me", "password": "word"}).status_code == 200
    page = Page(webui.client)
    call = page.request("job_tracker_enabled", False)
    assert ask(webui, "POST", "/run/predict", CASES["cross-site"][0], call).status_code == 403
    assert config_of(webui)["enabled"] is True
    assert ask(webui, "POST", "/run/predict", CASES["same-origin"][0], call).status_code == 200
    assert config_of(webui)["enabled"] is False
    assert len(token_of(webui)) > 40


@pytest.mark.skipif(SHAPE == "sdnext", reason="SD.Next has its API always")
def test_without_the_api(start):
    """The tab is there all the same."""
    webui = start()
    page = Page(webui.client)
    for function, data in CALLS.items():
        call = page.request(function, *data)
        assert ask(webui, "POST", "/run/predict", CASES["cross-site"][0], call).status_code == 403
    assert config_of(webui) == {"enabled": True, "retention_days": 30}
    assert "the API is off" in page.look()


def test_below_a_subpath(start):
    webui = start("--api", "--subpath", "below")
    if SHAPE == "sdnext":
        webui.restart()  # it has its routes there from its second start on, and leads there from elsewhere
    webui.client.follow_redirects = True
    call = Page(webui.client).request("job_tracker_look", *CALLS["job_tracker_look"])
    for root in ["", "/below"] if SHAPE == "sdnext" else [""]:
        for name, status in (("cross-site", 403), ("same-origin", 200)):
            assert ask(webui, "POST", f"{root}/run/predict", CASES[name][0], call).status_code == status
            assert ask(webui, "GET", f"{root}/job-tracker/token", CASES[name][0]).status_code == status


# The log


def test_log(start):
    """A line for the first call, and none for each of the many after it. It cannot be forged."""
    webui = start("--api")
    page = Page(webui.client)
    forged = ("Origin", "http://x\x1b[2J\x85[Job Tracker] forged\xe9" + "y" * 1000)
    mark = webui.log_path.stat().st_size
    for _ in range(100):
        call = page.request("job_tracker_action", "purge")
        assert ask(webui, "POST", "/run/predict", [BOX, forged], call).status_code == 403
        assert ask(webui, "DELETE", "/sdapi/v1/job/AAAAAAAA", CASES["cross-site"][0]).status_code == 403
    log = webui.log_since(mark)
    lines = [line for line in log.splitlines() if not line.startswith(SDNEXT_ERROR)]
    (line,) = [line for line in lines if line.startswith("[Job Tracker] ")]
    assert line.startswith("[Job Tracker] A page of http://x\\x1b[2J\\x85[Job Tracker] forged\\xe9yyy")
    assert line.endswith(" tried to cancel, retry, delete or purge jobs, and was refused") and len(line) < 400
    assert "Traceback" not in log and len(lines) < 5, log
