"""A webui that is not as we know it, or does not stay so, runs on: the log and the tab say what is not tracked."""

from __future__ import annotations

import json
import time

import pytest

from harness import MODE_FLAGS, MODES, QUICK, SHAPE, Page, assert_tracks, body, until


def test_ui_without_the_api(start):
    if SHAPE == "sdnext":
        pytest.skip("it always has the API")
    webui = start()
    assert [line for line in webui.our_log() if "--api" in line] == webui.our_log()[-1:]
    assert webui.client.get("/").status_code == 200
    assert webui.client.get("/sdapi/v1/jobs").status_code == 404
    assert "Traceback" not in webui.log


STRANGE = """
from modules import script_callbacks

def find(app, name):
    return next(route for route in app.routes if getattr(route, "path", "") == "/sdapi/v1/" + name)

def change(_, app):
    {change}

script_callbacks.on_app_started(change)
"""

STRANGERS = {
    "an endpoint without an object": "find(app, 'txt2img').endpoint = lambda: None",
    "an object without a lock": "find(app, 'img2img').endpoint = [].append",
    "a route that is none of FastAPI's": "del find(app, 'txt2img').dependant",
    "a host without add_api_route": (
        "import modules.shared\n"
        "    modules.shared.api = None\n"
        "    type(find(app, 'txt2img').endpoint.__self__).add_api_route = None"
    ),
    "no route of its name": "find(app, 'img2img').path = find(app, 'txt2img').path = '/other'",
}


@pytest.mark.parametrize("change", STRANGERS)
def test_unknown_webui(start, change):
    """One clear line, nothing half done, and the webui runs on."""
    webui = start(*QUICK, scripts={"a-stranger": STRANGE.format(change=STRANGERS[change])})
    lines = [line for line in webui.our_log() if "not tracked" in line]
    assert len(lines) == 1, webui.log
    assert not [line for line in webui.our_log() if "Ready" in line]
    for kind in ("txt2img", "img2img"):
        response = webui.post(body(kind=kind), kind)
        assert response.status_code == 200
        assert response.json()["images"]
        assert "X-Job-ID" not in response.headers
    assert webui.records() == {}


LATER = """
from modules import script_callbacks

PATH = "/sdapi/v1/txt2img"

def answer():
    return {{"images": []}}

def mounted(endpoint):
    import fastapi
    app = fastapi.FastAPI()
    app.add_api_route("/txt2img", endpoint, methods=["POST"])
    return app

def change(_, app):
    routes = app.router.routes
    before = list(routes)
    own = next(route for route in routes if getattr(route, "path", "") == PATH)
    app.add_api_route(PATH, answer, methods=["POST"])
    {change}

    def put_back():
        routes[:] = before

    app.add_api_route("/put-back", put_back)

script_callbacks.on_app_started(change)
"""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change",
    [
        "routes.remove(own)",
        "routes.insert(0, routes.pop())",
        "app.add_api_route('/sdapi/v1/{any:path}', answer, methods=['POST']), routes.insert(0, routes.pop())",
        "app.mount('/sdapi/v1', mounted(answer)), routes.insert(0, routes.pop())",
    ],
)
def test_route_that_is_registered_anew(start, mode, change):
    """By an extension that is loaded later. It is said within seconds, in the log and in the tab, and once."""
    scripts = {"z-later": LATER.format(change=change)}
    webui = start(*MODE_FLAGS[mode], scripts=scripts, constants={"LOOK_EVERY": 0.1})
    assert webui.post(body()).json() == {"images": []}
    until(lambda: any("not tracked any more" in line for line in webui.our_log()), what="it is said")
    assert "/sdapi/v1/txt2img was taken away" in webui.our_log()[-1]
    if mode == "ui":
        assert "was taken away" in Page(webui.client).look()
    webui.client.get("/put-back")
    until(lambda: "tracked again" in webui.our_log()[-1], what="it is said")
    assert len(webui.our_log()) == 3, webui.our_log()
    assert_tracks(webui)


def test_route_that_comes_after_ours(start):
    """It never gets a request."""
    webui = start(*QUICK, scripts={"z-later": LATER.format(change="pass")}, constants={"LOOK_EVERY": 0.1})
    assert_tracks(webui)
    time.sleep(0.5)
    assert len(webui.our_log()) == 1, webui.our_log()


def test_config_that_cannot_be_read_is_said_in_the_tab(start):
    webui = start(*MODE_FLAGS[MODES[0]])
    page = Page(webui.client)
    assert "config.json" not in page.look()
    webui.write_config('{"enabled": true, "retention_days": 7,}')
    html = page.look()
    assert "config.json cannot be read (" in html and "what was known of it holds" in html
    assert str(webui.folder) not in html
    webui.write_config('{"enabled": true, "retention_days": "7"}')
    assert "retention_days is invalid, so retention is off" in page.look()
    webui.write_config('{"enabled": true, "retention_days": 7}')
    assert "config.json" not in page.look()


@pytest.mark.every_mode
@pytest.mark.parametrize("mode", MODES)
def test_ready_and_off(start, mode):
    """It says how to turn tracking on, and when somebody did."""
    webui = start(*MODE_FLAGS[mode], tracking=None, constants={"LOOK_EVERY": 0.1})
    (line,) = webui.our_log()
    assert line.startswith(f"[Job Tracker] Ready, tracking is off, jobs are in {webui.data}. To turn it on, ")
    assert '"enabled": true' in line and "TRACKER_ENABLED=1" in line
    assert ("the tab" in line) == (mode == "ui")
    path = webui.extension / "config.json"
    for enabled, word in ((True, "on"), (False, "off")):
        path.write_text(json.dumps({"enabled": enabled}))
        until(lambda word=word: webui.our_log()[-1] == f"[Job Tracker] Tracking is {word} now")
    webui.kill()
    webui.environ["TRACKER_ENABLED"] = "off"
    webui.start()
    assert webui.our_log()[-1].endswith(f"jobs are in {webui.data}. TRACKER_ENABLED turns it off")


@pytest.mark.parametrize("mode", MODES)
def test_installed_twice(start, mode):
    webui = start(*MODE_FLAGS[mode], copies=2)
    lines = [line for line in webui.our_log() if "another copy" in line]
    assert len(lines) == 1, webui.log
    assert "Traceback" not in webui.log
    assert_tracks(webui)
    assert len(webui.records()) == 1
    second = webui.extension.with_name("job-tracker-2")
    assert (second / "jobs.json").read_text().split() == ["{", "}"]
