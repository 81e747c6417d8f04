"""The tab, worked by a real browser."""

import json
import time

import pytest

import browser
from browser import MAIN, NARROW, OPEN_JOB, PHONE, TOP, WIDE, Page
from harness import SHAPE, body, config_of, fewer, hold_the_queue, submit, until

pytestmark = browser.NEEDED

SOON = 3  # seconds in which the page shows a new job
HOSTILE = {
    "script": "<script>window.hacked = 1</script>",
    "image": "<img src=x onerror='window.hacked = 2'>",
    "closing": "</td></tr></table></div><b>bold</b>",
    "entity": "&lt;b&gt; &amp;amp; &#60;",
    "attribute": '" onmouseover="window.hacked = 3" \'',
    "markdown": "![x](http://127.0.0.1:1/x.png) [y](javascript:alert(1)) **bold** $x^2$ `code`",
    "template": "{{7*7}} ${7*7} {html} %s %(x)s {0}",
    "arabic": "مرحبا بالعالم",
}


@pytest.fixture(scope="module")
def webui(start_shared):
    """One with a few jobs, for the tests that leave it as it is."""
    return start_shared("--api")


def jobs_of(count, newest=None, **fields):
    """Records of Completed jobs without images, a second apart, the newest last."""
    newest = newest or int(time.time())
    for number in range(count):
        moment = newest - (count - 1 - number)
        record = {
            "id": f"J{number:07}",
            "type": "txt2img",
            "status": "Completed",
            "timestamp": moment,
            "ip": "10.0.0.1",
            "prompt": f"prompt {number}",
            "started": moment + 0.5,
            "finished": moment + 2,
            "error": None,
            "images": [],
            "bytes": 0,
        }
        yield {**record, **{name: value(number) if callable(value) else value for name, value in fields.items()}}


def stored(records, retention_days=30):
    """For `prepare`: a webui that has these jobs already."""

    def prepare(webui):
        lines = ",\n".join(f'"{record["id"]}": {json.dumps(record)}' for record in records)
        (webui.data / "jobs.json").write_text(f"{{\n{lines}\n}}\n")
        config = {"enabled": True, "retention_days": retention_days}
        webui.write_config(json.dumps(config))

    return prepare


def test_from_the_first_click_to_the_image(start, driver):
    webui = start("--api", tracking=None)
    page = Page(driver, webui)
    assert "Tracking is off" in page.text(TOP)
    assert "No jobs yet" in page.text(MAIN)
    assert webui.post(body("before")).status_code == 200

    page.click("#job_tracker_enabled label")
    page.until(lambda: "Tracking is off" not in page.text(TOP), "tracking is on", SOON)
    assert config_of(webui) == {"enabled": True, "retention_days": 30}

    gate = webui.gate()
    request = body("a lighthouse at dawn", {"hold": gate}, steps=4, n_iter=2, negative_prompt="fog")
    job_id = webui.send(request).job_id()
    page.until(lambda: page.row(job_id), "the row appears", SOON)
    queued = webui.send(body("the next")).job_id()
    page.until(lambda: page.row(queued), "the other row appears", SOON)
    assert [row["id"] for row in page.rows()] == [queued, job_id]
    assert "Pending next" in page.row(queued)["status"]
    page.until(lambda: "Processing 38%" in page.row(job_id)["status"], "the progress is shown")
    page.open(job_id)
    page.until(lambda: "Processing 38%" in page.text(OPEN_JOB), "the progress is shown in the open job")

    gate.open()
    page.until(lambda: page.row(queued)["status"] == "Completed", "the jobs complete")
    row = page.row(job_id)
    assert (row["type"], row["images"], row["ip"]) == ("txt2img", "2", "127.0.0.1")
    assert float(row["seconds"]) >= 0
    page.until(
        lambda: page.run(f"return [...document.querySelectorAll('{OPEN_JOB} img')].map((i) => i.naturalWidth)")
        == [64, 64],
        "the images are seen",
    )
    text = page.text(OPEN_JOB)
    for expected in (
        job_id,
        "Completed",
        "txt2img",
        "a lighthouse at dawn",
        "fog",
        "7, 8",
        "Infotext of image 2",
        "127.0.0.1",
    ):
        assert expected in text
    assert "Steps: 4" in page.text(f"{OPEN_JOB} .text")
    for number, link in enumerate(page.find(f"{OPEN_JOB} figcaption a")):
        assert link.text == f"{job_id}_{number}.png"
        assert webui.client.get(link.get_attribute("href"), auth=None).content[:8] == b"\x89PNG\r\n\x1a\n"
    page.click(f"{OPEN_JOB} header button", "Close")
    page.until(lambda: not page.find(OPEN_JOB), "the job is closed")
    assert not page.errors()


def test_settings_are_kept_and_shown_on_every_page(start, driver):
    webui = start("--api", tracking=None)
    page = Page(driver, webui)
    first = driver.current_window_handle
    driver.switch_to.new_window("tab")
    try:
        Page(driver, webui)
        page.click("#job_tracker_enabled label")
        page.click("#job_tracker_retention label", "7 days")
        until(lambda: config_of(webui) == {"enabled": True, "retention_days": 7})
    finally:
        driver.close()
        driver.switch_to.window(first)
    page.until(lambda: page.enabled.is_selected() and page.retention == "7 days", "the other page agrees", SOON + 2)

    webui.restart()
    page = Page(driver, webui)
    page.until(lambda: page.enabled.is_selected() and page.retention == "7 days", "they survive a restart")
    start_values = webui.folder / "webui" / "ui-config.json"
    assert not start_values.exists() or "Tracking" not in start_values.read_text()

    webui.write_config('{"enabled": false, "retention_days": 12.5}')
    page.until(lambda: not page.enabled.is_selected(), "a change of the file is seen")
    page.until(lambda: page.retention == "12.5 days", "and offered")
    page.click("#job_tracker_retention label", "Off (keep all)")
    until(lambda: config_of(webui) == {"enabled": False, "retention_days": None})
    page.until(lambda: "12.5 days" not in page.text("#job_tracker_retention"), "what was never one of ours is gone")
    page.until(lambda: "Off\nNext purge" in page.text(TOP), "no job grows too old")


def test_a_setting_that_cannot_be_saved_stays(start, driver):
    webui = start("--api", tracking=None)
    page = Page(driver, webui)
    (webui.extension / "config.json").unlink()
    (webui.extension / "config.json").mkdir()
    page.click("#job_tracker_enabled label")
    page.until(lambda: "Not saved" in page.text("body"), "the trouble is said")
    page.until(lambda: not page.enabled.is_selected(), "the control shows what holds")


def test_settings_locked_by_variables(start, driver):
    webui = start("--api", environ={"TRACKER_ENABLED": "no", "TRACKER_RETENTION": "2.5"})
    page = Page(driver, webui)
    for selector in ("#job_tracker_enabled", "#job_tracker_retention"):
        assert all(not element.is_enabled() for element in page.find(f"{selector} input"))
    assert "Set by the variable TRACKER_ENABLED" in page.text("#job_tracker_enabled")
    assert "Set by the variable TRACKER_RETENTION" in page.text("#job_tracker_retention")
    assert not page.enabled.is_selected()
    assert page.retention == "2.5 days"
    assert "Tracking is off: TRACKER_ENABLED says so" in page.text(TOP)


@pytest.mark.skipif(SHAPE == "sdnext", reason="SD.Next has its API always")
def test_the_api_is_off(start, driver):
    page = Page(driver, start())
    assert "Generations are not tracked: the API is off. Start the webui with --api." in page.text(TOP)
    assert "No jobs yet" in page.text(MAIN)


def test_filters_and_pages(start, driver):
    records = jobs_of(
        130,
        status=lambda number: "Failed" if number % 10 == 0 else "Completed",
        ip=lambda number: "10.0.0.7" if number == 5 else "10.0.0.1",
        prompt=lambda number: "A Walled Garden" if number in (3, 4) else f"prompt {number}",
    )
    page = Page(driver, start("--api", prepare=stored(records)))

    def shows(first, last, count):
        def right():
            ids = [row["id"] for row in page.rows()]
            return len(ids) == count and (ids[0], ids[-1]) == (f"J{first:07}", f"J{last:07}")

        page.until(right, f"{count} jobs from {first} to {last} are shown")

    def turn(button):
        page.click(f"{MAIN} nav button", button)

    shows(129, 80, 50)
    assert "1 to 50 of 130" in page.text(f"{MAIN} nav")
    turn("Older")
    shows(79, 30, 50)
    turn("Oldest")
    shows(29, 0, 30)
    assert "101 to 130 of 130" in page.text(f"{MAIN} nav")
    assert not page.find(f"{MAIN} nav button[data-page='3']:not(:disabled)")
    turn("Newer")
    shows(79, 30, 50)

    page.choose_status("Failed")
    shows(120, 0, 13)
    assert {row["status"] for row in page.rows()} == {"Failed error"}
    page.choose_status("All")
    shows(129, 80, 50)
    page.type("text", "walled GARDEN")
    shows(4, 3, 2)
    page.type("ip", "10.0.0.7")
    page.until(lambda: "No job matches these filters" in page.text(MAIN), "nothing is found")
    page.type("text", "")
    shows(5, 5, 1)
    page.type("ip", "")
    shows(129, 80, 50)
    page.type("text", "prompt")
    page.until(lambda: " of " not in page.text(f"{MAIN} nav"), "nobody counts what matches")
    turn("Older")
    shows(79, 30, 50)
    turn("Older")
    shows(29, 0, 28)
    turn("Newest")
    shows(129, 80, 50)


def test_purge(start, driver):
    """It says what it will remove before it does."""
    old = list(jobs_of(7, newest=int(time.time()) - 40 * 86400))
    webui = start("--api", prepare=stored(old, retention_days=None))
    page = Page(driver, webui)
    assert len(page.rows()) == 7
    assert webui.post(body("young")).status_code == 200
    page.click("#job_tracker_retention label", "30 days")
    until(lambda: config_of(webui)["retention_days"] == 30)
    page.until(lambda: len(page.rows()) == 8, "the new one is shown")
    page.open("J0000003")
    page.click("#job_tracker_purge")
    page.until(lambda: "removes 7 jobs older than 30 days with their images" in page.text(TOP), "it is said before")
    page.run("window.heard = []; document.addEventListener('keydown', ({key}) => heard.push(key));")
    page.find("body")[0].send_keys(browser.Keys.ESCAPE)
    page.until(lambda: page.text("#job_tracker_purge") == "Purge Now", "Escape takes it back")
    assert page.run("return heard") == [], "a webui's own script for this key is left alone"
    assert len(webui.records()) == 8 and page.find(OPEN_JOB)
    page.click("#job_tracker_purge")
    page.confirm("#job_tracker_purge", "Remove 7 jobs?")
    page.until(lambda: "removed 7 jobs, 0 images" in page.text(TOP), "the purge says what it removed")
    page.until(lambda: [row["prompt"] for row in page.rows()] == ["young"], "the old ones are gone")
    assert "no longer kept" in page.text(OPEN_JOB)
    assert len(webui.records()) == 1


def test_purge_that_removes_nothing_says_why(start, driver):
    def old_file(webui, name):
        path = webui.data / "images" / "2025-01-12" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")

    old = list(jobs_of(1, newest=int(time.time()) - 2 * 86400))
    webui = start("--api", prepare=stored(old, retention_days=None))
    page = Page(driver, webui)

    def purge(why):
        page.click("#job_tracker_purge")
        page.until(lambda: f"Purge Now removes no job. {why}" in page.text(TOP), "it is said before")
        page.confirm("#job_tracker_purge", "Remove stray files?")
        page.until(lambda: f"removed nothing. {why}" in page.text(TOP), "and after")

    purge("Retention is off: all jobs are kept.")
    page.click("#job_tracker_retention label", "3 days")
    until(lambda: config_of(webui)["retention_days"] == 3)
    old_file(webui, "ORPHAN00_0.png")
    purge("No job is older than 3 days.")
    assert "younger than an hour, and are kept: 1." in page.text(TOP)


def test_hostile_prompts_are_text(webui, driver):
    for name, prompt in HOSTILE.items():
        standin = {"fail": "RuntimeError", "message": prompt} if name == "script" else None
        webui.send(body(prompt, standin, negative_prompt=prompt)).to_end()
    page = Page(driver, webui)
    page.until(lambda: set(HOSTILE.values()) <= {row["prompt"] for row in page.rows()}, "they are shown as they are")
    for prompt in HOSTILE.values():
        row = next(row for row in page.rows() if row["prompt"] == prompt)
        page.open(row["id"])
        assert prompt in page.run(f"return document.querySelector('{OPEN_JOB} .text').textContent")
    failed = next(row for row in page.rows() if row["status"] == "Failed error")
    page.open(failed["id"])
    assert HOSTILE["script"] in page.text(f"{OPEN_JOB} .note.error")
    assert not page.run("return window.hacked")
    assert not page.find(f"{MAIN} :is(td:not(.thumbnail), .text, .note) :is(script, img, a, b, strong, code)")
    assert not page.errors()


def test_odd_prompts(webui, driver):
    long = "long " + "x" * 100_000
    for prompt in (long, "null \0, bell \a, turned \u202eround\u202c and \u2067more\u2069", ""):
        webui.post(body(prompt))
    page = Page(driver, webui)
    page.until(lambda: page.rows()[0]["prompt"] == "", "an empty prompt")
    odd, cut = page.rows()[1:3]
    assert odd["prompt"] == "null \ufffd, bell \ufffd, turned \ufffdround\ufffd and \ufffdmore\ufffd"
    assert cut["prompt"] == long[:300]
    page.open(cut["id"])
    text = page.run(f"return document.querySelector('{OPEN_JOB} .text').textContent")
    assert text.startswith(long[:20_000])
    assert text.endswith("and 80,000 characters more")
    assert page.run("return document.scrollingElement.scrollWidth <= innerWidth")


def test_odd_images(webui, driver):
    """What a browser cannot show is offered as a file, and a lost file is said to be lost."""
    answer = webui.post(body("odd images", {"strings": ["<b>no image</b>"]}))
    job_id = answer.headers["x-job-id"]
    page = Page(driver, webui)
    page.until(lambda: page.row(job_id), "the row appears")
    page.open(job_id)
    link = page.find(f"{OPEN_JOB} figcaption a")[1]
    assert link.text == f"{job_id}_1.txt"
    response = webui.client.get(link.get_attribute("href"), auth=None)
    assert response.text == "<b>no image</b>"
    assert response.headers["content-type"].startswith("text/plain")
    next(path for path in webui.images() if path.name == f"{job_id}_0.png").unlink()
    page.until(lambda: "no longer on disk" in page.text(f"{OPEN_JOB} figure"), "the loss is said")


def test_nothing_is_asked_while_nobody_looks(webui, driver):
    def asked_in(seconds):
        before = page.looks()
        time.sleep(seconds)
        return page.looks() - before

    page = Page(driver, webui)
    assert asked_in(3) in (1, 2)
    assert page.run("return performance.getEntriesByType('resource').pop().transferSize") < 2000  # nothing new
    page.go_to("txt2img")
    page.hurry(3)
    time.sleep(0.5)
    assert asked_in(1) == 0
    job_id = webui.post(body("meanwhile")).headers["x-job-id"]
    page.go_to("Job Tracker")
    page.until(lambda: page.row(job_id), "what is new is there at once", 1.5)

    page.run("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    time.sleep(0.5)
    assert asked_in(1) == 0
    page.run("Object.defineProperty(document, 'hidden', {value: false, configurable: true})")
    page.until(lambda before=page.looks(): page.looks() > before, "somebody looks again", 3)


def test_a_refresh_leaves_alone_what_is_alike(webui, driver):
    """A click, a selection and the keyboard's place live on when the page learns something new."""
    page = Page(driver, webui)
    gate = webui.gate()
    job_id = webui.send(body("slow", {"hold": gate})).job_id()
    page.until(lambda: "Processing" in (page.row(job_id) or {"status": ""})["status"], "it runs")
    page.open(job_id)
    page.run(f"document.querySelector('{MAIN} .open button').focus()")
    page.click(f"{OPEN_JOB} summary")
    seconds = page.row(job_id)["seconds"]
    page.until(lambda: page.row(job_id)["seconds"] != seconds, "the page is refreshed")
    assert page.run(f"return document.querySelector('{MAIN} .open button').textContent") == job_id
    assert page.run(f"return document.querySelector('{OPEN_JOB} details').open") is False
    gate.open()
    page.until(lambda: page.row(job_id)["status"] == "Completed", "it ends")
    assert page.run(f"return document.querySelector('{OPEN_JOB} details').open") is False
    page.find("body")[0].send_keys(browser.Keys.ESCAPE)
    page.until(lambda: not page.find(OPEN_JOB), "Escape closes the job")
    page.run(f"document.querySelector('{MAIN} tr[data-job=\"{job_id}\"] button').focus()")
    driver.switch_to.active_element.send_keys(browser.Keys.ENTER)
    page.until(lambda: page.find(OPEN_JOB), "Enter opens it")


def test_cancel_and_delete(start, driver):
    webui = start("--api")
    page = Page(driver, webui)
    running = hold_the_queue(webui)
    first, second = submit(webui, "first"), submit(webui, "second")
    page.until(lambda: page.row(second), "the rows appear")
    for job_id in (first, running):
        page.open(job_id)
        assert page.text(f"{OPEN_JOB} [data-action]") == "Cancel"
        page.do("Cancel")
        page.until(lambda job_id=job_id: page.row(job_id)["status"] == "Failed cancelled", "the row says why")
        page.until(lambda: "Failed cancelled" in page.text(f"{OPEN_JOB} header"), "and so does the job")
        assert webui.job(job_id)["error"] == "Cancelled"
    assert webui.job(second, wait=30)["status"] == "Completed"
    page.open(second)
    page.until(lambda: page.text(f"{OPEN_JOB} [data-action]") == "Delete", "it can only be deleted")
    page.do("Delete", "Delete for good?")
    page.until(lambda: not page.find(OPEN_JOB), "the job closes")
    page.until(lambda: not page.row(second), "its row is gone")
    assert second not in webui.records()
    assert not page.errors()


def test_what_was_not_done_is_said(start, driver):
    """Another has done something with the job since the page looked."""
    webui = start("--api")
    page = Page(driver, webui)
    hold_the_queue(webui)
    job_id = submit(webui, "waits")
    page.until(lambda: page.row(job_id), "the row appears")
    page.open(job_id)
    page.run("window.jobTracker.act({}, 1e6)")  # it does not look
    assert webui.client.post(f"/sdapi/v1/job/{job_id}/cancel").status_code == 200
    page.do("Cancel")
    page.until(lambda: "Not done: The job is Failed" in page.text("body"), "it is said")


def test_retry(start, driver):
    webui = start("--api")
    webui.send(body("out of memory", {"fail": "RuntimeError", "message": "no"})).to_end()
    page = Page(driver, webui)
    page.until(lambda: page.rows() and page.rows()[0]["status"] == "Failed error", "it has failed")
    failed = page.rows()[0]["id"]
    page.open(failed)
    assert page.text(f"{OPEN_JOB} [data-action]") == "Retry,Delete"
    page.do("Retry")
    page.until(lambda: f"Retry of\n{failed}" in page.text(f"{OPEN_JOB} dl"), "the new job is open")
    again = page.find(OPEN_JOB)[0].get_attribute("data-key")
    page.until(lambda: page.row(again), "it has a row")
    page.click(f"{OPEN_JOB} dd button", failed)
    page.until(lambda: page.find(f'{OPEN_JOB}[data-key="{failed}"]'), "the link opens the first")
    driver.back()
    page.until(lambda: not page.find(OPEN_JOB), "Back closes")
    assert not page.errors()


def test_cancel_all_that_wait(start, driver):
    webui = start("--api")
    page = Page(driver, webui)
    button = f"{TOP} .figures [data-action]"
    assert not page.find(button), "nothing waits"
    running = hold_the_queue(webui)
    waiting = [submit(webui) for _ in range(3)]
    page.until(lambda: page.text(button) == "Cancel all that wait", "the button appears")
    page.click(button)
    page.confirm(button, "Cancel 3 jobs?")
    page.until(lambda: not page.find(button), "nothing waits any more")
    assert {webui.job(job_id, wait=30)["error"] for job_id in waiting} == {"Cancelled"}
    assert webui.job(running)["status"] == "Processing"


def test_why_jobs_failed_in_a_word(start, driver):
    errors = ["Cancelled", "The webui ended before the generation did", "RuntimeError: Cancelled", None]
    records = jobs_of(4, status="Failed", error=lambda number: errors[number])
    page = Page(driver, start("--api", prepare=stored(records)))
    words = [row["status"] for row in reversed(page.rows())]
    assert words == ["Failed cancelled", "Failed crashed", "Failed error", "Failed error"]


# How long a button asks. What takes less time than that is left alone.
SET_PATIENCE = """
const patience = arguments[0];
window.later ??= window.setTimeout;
window.setTimeout = (what, delay, ...more) => later(what, delay > 5000 ? patience : delay, ...more);
"""


def test_a_click_that_was_not_meant_deletes_nothing(start, driver):
    webui = start("--api", prepare=stored(jobs_of(2)))
    page = Page(driver, webui)
    button = f"{OPEN_JOB} [data-action]"

    def asks():
        return page.text(button) == "Delete for good?"

    def clicked_twice():
        browser.ActionChains(driver).double_click(page.find(button)[0]).perform()
        page.until(asks, "it only asks")

    page.open("J0000001")
    clicked_twice()
    page.open("J0000000")
    page.until(lambda: page.text(button) == "Delete", "that of another job does not ask")
    page.open("J0000001")
    page.run(SET_PATIENCE, 1000)
    clicked_twice()
    page.until(lambda: page.text(button) == "Delete", "it no longer asks after some seconds", SOON + 2)
    page.run("const moment = Date.now(); Date.then = Date.now; Date.now = () => moment")
    page.click(button)
    page.until(asks, "it asks")
    page.click(button)
    page.run("Date.now = Date.then; window.jobTracker.act()")
    looks = page.looks()
    page.until(lambda: page.looks() >= looks + 2, "the page has looked")
    assert page.row("J0000001"), "a second press in the same moment is none"
    page.until(lambda: page.text(button) == "Delete", "it no longer asks", SOON + 2)

    page.run(SET_PATIENCE, 1e6)
    page.run(f"document.querySelector('{button}').focus()")
    hold = {"type": "keyDown", "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
    for again in (False, True, True):
        driver.execute_cdp_cmd("Input.dispatchKeyEvent", {**hold, "autoRepeat": again})
        time.sleep(0.7)
    driver.execute_cdp_cmd("Input.dispatchKeyEvent", {**hold, "type": "keyUp"})
    page.until(asks, "a key that is held down is pressed once")
    newer = submit(webui, "news")
    page.until(lambda: page.row(newer), "the page is refreshed")
    assert asks() and driver.switch_to.active_element.text == "Delete for good?", "the focus stays"
    assert set(webui.records()) >= {"J0000000", "J0000001"}
    driver.switch_to.active_element.send_keys(browser.Keys.ENTER)
    page.until(lambda: not page.row("J0000001"), "another press deletes")
    assert page.row("J0000000")


def test_back_closes_the_open_job(start, driver):
    webui = start("--api", prepare=stored(jobs_of(3)))
    driver.get("about:blank")
    page = Page(driver, webui)

    def shows(job_id):
        wanted = [job_id] if job_id else []
        page.until(lambda: page.run(OPEN_JOBS, OPEN_JOB) == wanted, f"{job_id or 'no job'} is open")

    def close():
        page.click(f"{OPEN_JOB} header button", "Close")

    for job_id in ("J0000000", "J0000001", "J0000002"):
        page.open(job_id)
    driver.back()
    shows("")
    driver.forward()
    shows("J0000002")
    driver.refresh()
    page.go_to("Job Tracker")
    shows("J0000002")
    close()
    shows("")
    page.open("J0000001")
    close()
    shows("")
    assert page.rows(), "the page was never left"
    driver.back()
    page.until(lambda: driver.current_url == "about:blank", "what was opened and closed is not gone through again")


OPEN_JOBS = "return [...document.querySelectorAll(arguments[0])].map((element) => element.dataset.key)"
IN_SIGHT = """
const {left, top, right, bottom} = document.querySelector(arguments[0]).getBoundingClientRect();
const {offsetLeft, offsetTop, width, height} = visualViewport;
return left >= offsetLeft && right <= offsetLeft + width && top >= offsetTop && bottom <= offsetTop + height;
"""


@pytest.mark.parametrize("wider", [0, 640], ids=["", "beside something wide"])
def test_an_open_job_on_a_phone(start, driver, wider):
    """Also where something of another extension is wider than the screen, and the whole page with it."""
    webui = start("--api")
    jobs = [webui.post(body("word " * 300, n_iter=3)).headers["x-job-id"] for _ in range(12)]
    page = Page(driver, webui)
    try:
        page.resize(*PHONE, mobile=True)
        wide = "const element = new Image(); element.style = `height: 9px; min-width: ${arguments[0]}px`;"
        page.run(wide + "document.querySelector('.gradio-container .contain').prepend(element)", wider)
        page.until(lambda: page.run("return innerWidth") >= max(wider, PHONE[0]), "the page has its width")
        for how in ("Close", "Back"):
            page.run("scrollTo(300, 700)")
            page.open(jobs[6])
            page.until(lambda: page.run(f"return document.querySelector('{OPEN_JOB} img').naturalWidth"), "the image")
            close = f"{OPEN_JOB} header button"
            scrolled = page.run(f"const all = document.querySelector('{OPEN_JOB}'); return all.scrollHeight / 2")
            for script in ("0", f"document.querySelector('{OPEN_JOB}').scrollTop = 1e6", "scrollTo(300, 1e6)"):
                page.run(script)
                assert page.run(IN_SIGHT, close), script
            assert scrolled > PHONE[1] / 2, "there is something to scroll"
            page.click(close, "Close") if how == "Close" else driver.back()
            page.until(lambda: not page.find(OPEN_JOB), f"{how} closes it")
            assert page.rows()
    finally:
        page.resize(*WIDE)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_nothing_sticks_out(webui, driver, theme, size):
    job_id = webui.post(body("word " * 60, n_iter=3)).headers["x-job-id"]
    page = Page(driver, webui, theme)
    page.resize(*size)
    page.until(lambda: page.row(job_id), "the row appears")

    def sticking_out():
        return page.run(
            """
            const all = [...document.querySelectorAll("#job_tracker :not(bdi)")];
            const out = all.filter((element) => element.getBoundingClientRect().right > innerWidth + 1);
            return out.map((element) => element.outerHTML.slice(0, 200));
            """
        )

    assert sticking_out() == []
    assert page.run("return document.body.classList.contains('dark')") is (theme == "dark")
    page.open(job_id)
    page.until(lambda: page.run(f"return document.querySelector('{OPEN_JOB} img').naturalWidth"), "an image is seen")
    assert sticking_out() == []
    script = f"""
        const style = getComputedStyle(document.querySelector('{OPEN_JOB} .text'));
        const brightness = (colour) => colour.match(/\\d+/g).slice(0, 3).reduce((sum, one) => sum + Number(one), 0);
        return [brightness(style.color), brightness(style.backgroundColor)];
    """
    text, ground = page.run(script)
    assert (text > ground) is (theme == "dark")


@pytest.mark.parametrize("size, padded", [(WIDE, "td"), (NARROW, ":is(tbody tr, td)")], ids=["wide", "narrow"])
def test_a_style_for_all_tables(webui, driver, size, padded):
    """As SD.Next has one. It leaves the tab's own as it is."""
    webui.post(body("in a row"))
    page = Page(driver, webui)
    page.resize(*size)
    page.until(page.rows, "there is a row")
    paddings = f"return [...document.querySelectorAll('{MAIN} {padded}')].map((it) => getComputedStyle(it).padding)"
    before = page.run(paddings)
    page.add_style("td, tr { padding: 3px 7px !important }")
    assert before and page.run(paddings) == before


def test_the_tab_needs_no_credentials_of_the_api(start, driver):
    """And whoever may not see the pages sees no images either."""
    flags = ("--auth", "me:word") if SHAPE == "sdnext" else ("--api-auth", "user:secret", "--gradio-auth", "me:word")
    webui = start("--api", *flags)
    webui.client.auth = ("me", "word") if SHAPE == "sdnext" else webui.client.auth
    job_id = webui.post(body("behind a door")).headers["x-job-id"]
    page = Page(driver, webui, login="me:word")
    assert page.row(job_id)["prompt"] == "behind a door"
    page.open(job_id)
    page.until(lambda: page.run(f"return document.querySelector('{OPEN_JOB} img').naturalWidth") == 64, "the image")
    link = page.find(f"{OPEN_JOB} figure a")[0].get_attribute("href")
    assert webui.client.get(link, auth=None).status_code == 401
    assert webui.client.get(f"/sdapi/v1/job/{job_id}", auth=None).status_code == 401
    assert not page.errors()


@pytest.mark.skipif(SHAPE != "sdnext", reason="others rely on a proxy for it")
def test_under_a_subpath(start, driver):
    webui = start("--api", "--subpath", "below/here").restart()  # the webui has the API there from its second start on
    job_id = webui.client.post("/below/here/sdapi/v1/txt2img", json=body("below")).headers["x-job-id"]
    page = Page(driver, webui, path="/below/here/")
    page.open(job_id)
    page.until(lambda: page.run(f"return document.querySelector('{OPEN_JOB} img').naturalWidth") == 64, "the image")


def test_after_reload_ui(start, driver):
    webui = start("--api")
    before = webui.post(body("before")).headers["x-job-id"]
    page = Page(driver, webui)
    if SHAPE == "sdnext":
        webui.restart()
    else:
        webui.reload_ui()
    after = webui.post(body("after")).headers["x-job-id"]
    page = Page(driver, webui)
    page.until(lambda: [row["id"] for row in page.rows()] == [after, before], "both are shown")
    page.click("#job_tracker_retention label", "3 days")
    until(lambda: config_of(webui)["retention_days"] == 3)


def test_a_webui_that_is_away_is_asked_rarely(start, driver):
    webui = start("--api")
    page = Page(driver, webui)
    page.hurry(3)
    port = webui.port
    webui.kill()
    time.sleep(1)
    before = page.looks()
    time.sleep(2)
    assert page.looks() - before <= 1
    assert webui.port == port
    page.errors()


def test_many_jobs(start, driver):
    count = fewer(100_000)
    webui = start("--api", prepare=stored(jobs_of(count, newest=int(time.time()))))
    until(lambda: webui.client.get("/sdapi/v1/jobs?limit=1").json())  # loaded
    began = time.monotonic()
    page = Page(driver, webui)
    assert page.rows()[0]["id"] == f"J{count - 1:07}"
    opening = time.monotonic() - began
    took = []
    oldest = (count - 1) % 50
    turns = (("Older", count - 51), ("Oldest", oldest), ("Newer", oldest + 50), ("Newest", count - 1))
    for button, newest in turns:
        page.click(f"{MAIN} nav button", button)
        began = time.monotonic()
        page.until(lambda newest=newest: page.rows()[0]["id"] == f"J{newest:07}", button)
        took.append(time.monotonic() - began)
    assert opening < 10
    assert max(took) < SOON
    assert f"of {count:,}" in page.text(f"{MAIN} nav")


def test_texts_keep_their_distance(start, driver):
    """gradio 4 would have the last thing in a frame touch it, and a note what is below."""
    webui = start("--api")
    job_id = webui.post(body()).headers["X-Job-ID"]
    page = Page(driver, webui)
    page.open(job_id)
    page.click("#job_tracker_purge")
    page.until(lambda: page.seen(f"{TOP} .note"), "a note is shown")
    below = "return document.querySelector(arguments[1]).getBoundingClientRect()[arguments[2]]"
    below += " - [...document.querySelectorAll(arguments[0])].pop().getBoundingClientRect().bottom"
    assert page.run(below, f"{OPEN_JOB} > *", OPEN_JOB, "bottom") >= 8
    assert page.run(below, f"{TOP} .note", f"{TOP} .figures", "top") >= 8
