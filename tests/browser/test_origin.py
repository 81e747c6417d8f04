"""A page from elsewhere, in a real browser: it gets its job's ID before the images, and its images after a reload."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any, Dict, Iterator, Optional

import httpx
import pytest

import browser
from harness import AUTH, MODE_FLAGS, MODES, SHAPE, Webui, body, until

pytestmark = browser.NEEDED

PAGE = """<!doctype html><meta charset="utf-8"><title>a page from elsewhere</title><link rel="icon" href="data:,">
<script>
const { api, headers } = JSON.parse(decodeURIComponent(location.hash.slice(1)));

async function post(request) {
  return fetch(`${api}/sdapi/v1/txt2img`, { method: "POST", headers, body: JSON.stringify(request) });
}

function show(images, how) {
  for (const image of images) {
    const element = document.body.appendChild(new Image());
    element.src = `data:image/png;base64,${image}`;
    element.className = how;
  }
}

async function generate(request) {
  const response = await post(request);
  localStorage.job = response.headers.get("X-Job-ID");
  show((await response.json()).images, "answered");
}

async function recover() {
  for (;;) {
    const job = await (await fetch(`${api}/sdapi/v1/job/${localStorage.job}?wait=5`, { headers })).json();
    if (job.status === "Completed") return show(job.images, "recovered");
  }
}

addEventListener("load", () => localStorage.job && recover());
</script>
"""


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The page, at an origin of its own."""
    with browser.served(PAGE) as port:
        yield f"http://127.0.0.1:{port}"


class Page:
    def __init__(self, driver: Any, origin: str, webui: Webui):
        self.driver = driver
        headers = {"Content-Type": "application/json"}
        if webui.auth:
            headers["Authorization"] = f"Basic {base64.b64encode(':'.join(webui.auth).encode()).decode()}"
        driver.get(f"{origin}/#{json.dumps({'api': webui.url, 'headers': headers})}")

    def generate(self, request: Any) -> None:
        self.driver.execute_script("window.result = generate(arguments[0])", request)

    def generate_badly(self, request: Any) -> str:
        """What a script gets to know of a generation that fails."""
        return self.driver.execute_async_script(
            """
            const [request, tell] = arguments;
            const answer = post(request).then((response) => response.json());
            answer.then(() => tell("an answer"), (error) => tell(String(error)));
            """,
            request,
        )

    def headers_of(self, method: str, path: str, more: Optional[Dict[str, str]] = None) -> Dict[str, str]:
        """All headers of an answer that a script gets to know."""
        return self.driver.execute_async_script(
            """
            const [method, path, more, request, tell] = arguments;
            const options = { method, headers: { ...headers, ...more } };
            if (method === "POST") options.body = JSON.stringify(request);
            fetch(`${api}/sdapi/v1/${path}`, options).then(
              (response) => tell(Object.fromEntries(response.headers)), (error) => tell({ error: String(error) }),
            );
            """,
            method,
            path,
            more or {},
            body(),
        )

    @property
    def job_id(self) -> Optional[str]:
        return self.driver.execute_script("return localStorage.job")

    def widths(self, how: str) -> Any:
        script = "return [...document.images].filter((it) => it.className == arguments[0]).map((it) => it.naturalWidth)"
        return self.driver.execute_script(script, how)


@pytest.mark.parametrize(
    "mode, auth", [(MODES[0], ()), (MODES[-1], AUTH)], ids=lambda it: it if isinstance(it, str) else "auth" * bool(it)
)
def test_page_from_elsewhere(driver, start, mode, auth):
    with served() as origin:
        webui = start(*MODE_FLAGS[mode], *auth, "--cors-allow-origins", origin)
        allowed = httpx.get(webui.url + "/standin/empty", headers={"Origin": origin}).headers
        if "Access-Control-Allow-Origin" not in allowed and SHAPE == "forge":
            pytest.skip("with the UI, this webui's layer for other origins does nothing")

        page, gate = Page(driver, origin, webui), webui.gate()
        page.generate(body(standin={"hold": str(gate.path)}))
        job_id = until(lambda: page.job_id)
        assert webui.job(job_id)["status"] in ("Pending", "Processing"), "the page has the ID before the images"
        assert page.widths("answered") == []
        driver.refresh()
        gate.open()
        assert until(lambda: page.widths("recovered")) == [64]

        driver.execute_script("delete localStorage.job")
        page.generate(body(batch_size=2, width=128))
        assert until(lambda: page.widths("answered")) == [128, 128]
        assert page.job_id not in (None, job_id)

        wishes = {"seconds": 5, "fail": "ValueError", "fail_after": 0.8}
        assert page.generate_badly(body(standin=wishes)).startswith("TypeError: ")

        check_headers(page)


def check_headers(page: Page) -> None:
    """A script reads each header of ours, on every answer that carries it."""
    job_id = page.job_id
    key = {"Idempotency-Key": "of the page"}
    answers = {
        "list": page.headers_of("GET", "jobs?limit=1"),
        "image": page.headers_of("GET", f"job/{job_id}/images/0"),
        "202": page.headers_of("POST", "txt2img", {**key, "Prefer": "respond-async"}),
        "in time": page.headers_of("POST", "txt2img", {**key, "Prefer": "respond-async, wait=60"}),
        "repeat": page.headers_of("POST", "txt2img", key),
    }
    assert 'rel="next"' in answers["list"]["link"]
    assert answers["image"]["etag"] and job_id in answers["image"]["content-disposition"]
    accepted = answers["202"]
    assert accepted["location"].endswith(f"/job/{accepted['x-job-id']}")
    assert accepted["preference-applied"] == "respond-async"
    assert answers["in time"]["preference-applied"] == "wait=60"
    assert answers["repeat"]["idempotent-replayed"] == "true"
    assert {answers[name]["x-job-id"] for name in ("202", "in time", "repeat")} == {accepted["x-job-id"]}


def test_page_that_is_not_allowed(driver, start):
    with served() as origin:
        webui = start(*MODE_FLAGS[MODES[-1]], "--cors-allow-origins", "http://example.org")
        page = Page(driver, origin, webui)
        assert page.generate_badly(body()).startswith("TypeError: ")
        assert webui.records() == {}, "the browser asks before it sends"
