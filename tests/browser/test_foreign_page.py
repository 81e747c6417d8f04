"""A page that somebody visits who has a webui, in a real browser: it changes nothing there, and learns nothing.

On a plain address, here `box.lan`, browsers send no `Sec-Fetch-Site`. The webui's own page goes on working there too,
and behind a proxy that changes `Host`.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Optional

import pytest
from proxies import NGINX, find, running

import browser
from browser import OPEN_JOB, TOP, Page
from harness import MODE_FLAGS, MODES, OLD_ID, SHAPE, Webui, body, until, with_old_job
from harness import Page as Calls

pytestmark = browser.NEEDED

LOOPBACK, PLAIN = "127.0.0.1", "box.lan"  # what the webui is called in the browser

FOREIGN_PAGE = """<!doctype html><meta charset="utf-8"><title>a page from elsewhere</title>
<link rel="icon" href="data:,">
<iframe name="sink"></iframe>
<script>
"use strict";
const waits = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const within = (promise) => Promise.race([promise, waits(5000).then(() => "nothing came")]);
const read = async (answer) => `${answer.status} ${await answer.text()}`;
const tried = (promise) => within(promise).catch((error) => `${error}`);

// A body without a type, of which the browser asks nobody.
const simple = (url, call, headers = {}) => fetch(url, {
    method: "POST", headers, body: new Blob([JSON.stringify(call)]), credentials: "include"});
const blind = (url, call) => fetch(url, {
    method: "POST", mode: "no-cors", body: new Blob([JSON.stringify(call)]), credentials: "include"});

const throughSocket = (url, call) => new Promise((resolve) => {
    const socket = new WebSocket(url);
    const heard = [];
    socket.onmessage = ({data}) => {
        heard.push(data);
        const {msg} = JSON.parse(data);
        if (msg === "send_hash") socket.send(JSON.stringify({session_hash: "y", fn_index: call.fn_index}));
        if (msg === "send_data") socket.send(JSON.stringify({...call, session_hash: "y"}));
    };
    socket.onclose = () => resolve(heard.join());
    socket.onerror = () => resolve(heard.join() + "an error");
});

const throughQueue = async (url, call) => {
    const session_hash = `z${Math.random()}`;
    await blind(`${url}/queue/join`, {...call, session_hash});
    const answer = await fetch(`${url}/queue/data?session_hash=${session_hash}`);
    return read(answer);
};

const submit = (url) => {
    const form = document.body.appendChild(document.createElement("form"));
    Object.assign(form, {method: "POST", action: url, target: "sink"});
    form.submit();
    return waits(500);
};

// Everything that it learns.
async function attack(url, calls, jobs) {
    const learned = {};
    for (const [name, call] of Object.entries(calls)) {
        for (const path of ["/run/predict", "/api/predict"]) {
            learned[`blind ${name} ${path}`] = await tried(blind(url + path, call).then(read));
            learned[`${name} ${path}`] = await tried(simple(url + path, call).then(read));
            const said = {"X-Forwarded-Host": location.host};
            learned[`forwarded ${name} ${path}`] = await tried(simple(url + path, call, said).then(read));
            const claim = {...call, request: {headers: {host: location.host}}};
            learned[`claimed ${name} ${path}`] = await tried(simple(url + path, claim).then(read));
        }
        learned[`socket ${name}`] = await tried(throughSocket(url.replace("http", "ws") + "/queue/join", call));
        learned[`queue ${name}`] = await tried(throughQueue(url, call));
    }
    for (const job of jobs) {
        const path = `${url}/sdapi/v1/job/${job}`;
        await submit(`${path}/cancel`);
        learned[`blind cancel ${job}`] = await tried(blind(`${path}/cancel`, {}).then(read));
        for (const [how, headers] of Object.entries({plain: {}, forwarded: {"X-Forwarded-Host": location.host}})) {
            learned[`cancel ${how} ${job}`] = await tried(simple(`${path}/cancel`, {}, headers).then(read));
            learned[`delete ${how} ${job}`] = await tried(fetch(path, {method: "DELETE", headers}).then(read));
            learned[`token ${how} ${job}`] = await tried(fetch(`${url}/job-tracker/token`, {headers}).then(read));
        }
    }
    return learned;
}

// gradio, alone while the webui starts, lets every page say every header, and browsers keep that for minutes.
async function turnOff(url, call, until) {
    const heard = new Set();
    while (Date.now() < until && !window.isEnough) {
        const headers = {"X-Forwarded-Host": location.host}, body = new Blob([JSON.stringify(call)]);
        const answer = await tried(fetch(`${url}/run/predict`, {method: "POST", headers, body}).then(read));
        heard.add(answer.slice(0, 60));
        await waits(3);
    }
    return [...heard];
}

async function use(url, jobs) {
    const said = [];
    for (const job of jobs) {
        const path = `${url}/sdapi/v1/job/${job}`;
        said.push((await fetch(`${path}/cancel`, {method: "POST"})).status);
        await fetch(`${path}?wait=30`);
        said.push((await fetch(path, {method: "DELETE"})).status);
    }
    return said;
}
</script>
"""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[int]:
    """The port at which the page is served."""
    with browser.served(FOREIGN_PAGE) as port:
        yield port


SECRET = "a secret prompt"


def settings_of(webui: Webui) -> Dict[str, Any]:
    return json.loads((webui.extension / "config.json").read_text())


def call(driver: Any, function: str, *arguments: Any) -> Any:
    return driver.execute_async_script(
        f"const tell = arguments[arguments.length - 1]; {function}(...[...arguments].slice(0, -1)).then(tell, tell)",
        *arguments,
    )


PAGES = {"on another port": LOOPBACK, "of another site": "evil.lan"}


@pytest.mark.parametrize("name", [LOOPBACK, PLAIN])
@pytest.mark.parametrize("page", PAGES)
def test_page_from_elsewhere(start, driver, elsewhere, page, name):
    webui = start("--api", prepare=with_old_job(3, SECRET))
    gate = webui.gate()
    running, waiting = (webui.send(body(SECRET, {"hold": gate})).job_id() for _ in range(2))
    webui.until_status(running, "Processing")
    before = webui.records()

    functions = Calls(webui.client)
    calls = {
        "job_tracker_look": ["{}", True, "30 days", "All", "", "", ""],
        "job_tracker_enabled": [False],
        "job_tracker_retention": ["1 day"],
        "job_tracker_action": ["purge"],
    }
    requests = {name: json.loads(functions.request(name, *data)) for name, data in calls.items()}
    driver.get(f"http://{PAGES[page]}:{elsewhere}/")
    learned = call(driver, "attack", f"http://{name}:{webui.port}", requests, [running, waiting, OLD_ID])

    assert len(learned) > 50 and "nothing came" not in learned.values(), learned
    assert settings_of(webui) == {"enabled": True, "retention_days": 30}
    assert not [what for what, answer in learned.items() if SECRET in answer or answer.startswith('200 "')], learned
    assert webui.records() == before
    assert "Purge at" not in functions.look()
    refusals = [line for line in webui.our_log() if "was refused" in line]
    assert len(refusals) == 1, "it is told once"
    gate.open()
    assert [webui.job(one, wait=30)["status"] for one in (running, waiting)] == ["Completed"] * 2


def test_page_that_asks_while_the_webui_starts(start, driver, elsewhere):
    webui = start("--api")
    off = json.loads(Calls(webui.client).request("job_tracker_enabled", False))
    driver.get(f"http://evil.lan:{elsewhere}/")
    driver.execute_script(
        "window.asked = turnOff(arguments[0], arguments[1], Date.now() + 20000)", f"http://{PLAIN}:{webui.port}", off
    )
    for _ in range(5):
        webui.reload_ui()
        time.sleep(1)
        if "was refused" in webui.log:
            break
    driver.execute_script("window.isEnough = true")
    heard = driver.execute_async_script("window.asked.then(arguments[0])")
    assert settings_of(webui) == {"enabled": True, "retention_days": 30}, heard
    assert "was refused" in webui.log, "the browser was never allowed to ask"


@pytest.mark.parametrize("name", [LOOPBACK, PLAIN])
def test_page_that_is_named(start, driver, elsewhere, name):
    origin = f"http://evil.lan:{elsewhere}"
    webui = start(*MODE_FLAGS[MODES[-1]], "--cors-allow-origins", origin)
    gate = webui.gate()
    running, waiting = (webui.send(body(standin={"hold": gate})).job_id() for _ in range(2))
    webui.until_status(running, "Processing")
    driver.get(origin)
    assert call(driver, "use", f"http://{name}:{webui.port}", [waiting, running]) == [200, 204] * 2
    assert webui.records() == {}


# The webui's own page


class Way(NamedTuple):
    """How the browser gets to the webui."""

    name: str
    nginx: Optional[str] = None  # what its configuration says besides


WAYS = {
    "directly": Way(LOOPBACK),
    "directly on a plain address": Way(PLAIN),
    "nginx": Way(LOOPBACK, ""),
    "nginx on a plain address": Way(PLAIN, ""),
    "nginx that tells the host": Way(PLAIN, "proxy_set_header X-Forwarded-Host $http_host;"),
    "nginx that keeps the host": Way(PLAIN, "proxy_set_header Host $http_host;"),
}


@pytest.fixture
def reach(tmp_path: Path) -> Iterator[Any]:
    """Gives the address of a webui in the browser."""
    with contextlib.ExitStack() as stack:

        def address(webui: Webui, way: Way) -> str:
            port = webui.port
            if way.nginx is not None:
                find(NGINX)
                port = stack.enter_context(running(NGINX, webui, tmp_path, way.nginx))
            return f"http://{way.name}:{port}"

        yield address


def use_tab(page: Page, webui: Webui) -> None:
    """Everything that the tab can do."""
    job_id = webui.post(body("of the tab")).headers["x-job-id"]
    page.until(lambda: page.row(job_id), "a new job is shown", 30)
    page.open(job_id)
    page.until(
        lambda: page.run(f"return [...document.querySelectorAll('{OPEN_JOB} img')].map((i) => i.naturalWidth)") == [64],
        "its image is shown",
    )
    page.click(f"{OPEN_JOB} header button", "Close")

    def change(selector: str, text: str, setting: str, value: Any) -> None:
        """Waits for the look that follows, too: gradio drops a click while it is busy with another."""
        looks = page.looks()
        page.click(selector, text)
        until(lambda: settings_of(webui)[setting] == value, what=f"{setting} is {value}")
        page.until(lambda: page.looks() >= looks + 2, "the page has looked")

    for enabled in (False, True):
        page.until(lambda enabled=enabled: page.enabled.is_selected() is not enabled, "the control agrees")
        change("#job_tracker_enabled label", "", "enabled", enabled)
    for days in (7, 30):
        change("#job_tracker_retention label", f"{days} days", "retention_days", days)
    page.click("#job_tracker_purge")
    page.confirm("#job_tracker_purge", "Remove stray files?")
    page.until(lambda: "Purge at" in page.text(TOP), "the purge is told")
    page.open(job_id)
    page.do("Delete", "Delete for good?")
    page.until(lambda: not page.find(OPEN_JOB) and not page.row(job_id), "it is deleted, and closed")


@pytest.mark.parametrize("how", WAYS)
def test_own_page(start, driver, reach, how):
    way = WAYS[how]
    if SHAPE == "forge" and way == Way(PLAIN, ""):
        pytest.skip("gradio 4 takes Host for its own address, which is not that of another machine")
    webui = start("--api")
    page = Page(driver, webui, url=reach(webui, way))
    page.hurry(5)  # it waits ten seconds for an answer that does not come
    use_tab(page, webui)
    assert not page.errors()
    assert not [line for line in webui.our_log() if "refused" in line]

    if way in (Way(LOOPBACK), Way(PLAIN, "")):
        webui.reload_ui()  # the page stays open, and learns the new token
        use_tab(page, webui)
