"""The tab's small pictures and what is there for some jobs only, in a real browser."""

from __future__ import annotations

from typing import Any, List

import pytest

import browser
from browser import MAIN, OPEN_JOB, PHONE, WIDE, Keys, Page
from harness import Webui, body, done, submit

pytestmark = browser.NEEDED

THUMBNAILS = f"{MAIN} td.thumbnail img"
PREVIEW = f"{OPEN_JOB} .preview img"
SOON = 3  # seconds in which the page shows something new


@pytest.fixture
def webui(start: Any) -> Webui:
    return start("--api")


def widths(page: Page) -> List[int]:
    """Of the pictures themselves, 0 where one is not there."""
    return page.run(f"return [...document.querySelectorAll('{THUMBNAILS}')].map((i) => i.complete && i.naturalWidth)")


def test_rows_begin_with_a_picture_that_stays_with_its_job(webui, driver):
    first, text = done(webui, "first"), submit(webui, "text", standin={"no_images": True})
    assert webui.job(text, wait=30)["image_count"] == 0
    last = done(webui, "last")
    page = Page(driver, webui)
    page.until(lambda: widths(page) == [64, 64], "two of three rows have a picture")
    assert [row["id"] for row in page.rows()] == [last, text, first]
    page.run(f"for (const i of document.querySelectorAll('{THUMBNAILS}')) i.mark = i.src.split('/').at(-2)")
    page.run(f"document.querySelector('{MAIN} tr[data-job=\"{first}\"] button').focus()")
    newest = done(webui, "newest")
    page.until(lambda: widths(page) == [64, 64, 64], "the new one has a picture", SOON + 5)
    marks = page.run(f"return [...document.querySelectorAll('{THUMBNAILS}')].map((i) => i.mark ?? i.src)")
    assert marks[1:] == [last, first] and newest in marks[0], "no picture was taken for another job's"
    assert driver.switch_to.active_element.text == first, "the focus stays with the job, too"
    page.click(f"{MAIN} tr[data-job='{last}'] img")
    page.until(lambda: page.find(f"{OPEN_JOB}[data-key='{last}']"), "a click on the picture opens the job")
    assert not page.errors()


def test_a_picture_that_cannot_be_made_leaves_its_place_empty(webui, driver):
    damaged, good = done(webui, "damaged"), done(webui, "good")
    (path,) = webui.data.glob(f"images/*/{damaged}_0.png")
    path.write_bytes(path.read_bytes()[:40])
    page = Page(driver, webui)

    def places() -> List[List[Any]]:
        script = "return [...document.querySelectorAll(arguments[0])].map((i) => [i.style.visibility, i.clientWidth])"
        return page.run(script, THUMBNAILS)

    page.until(lambda: places() == [["", 40], ["hidden", 40]], "there is no sign of a broken picture")
    newest = done(webui, "newest")
    page.until(lambda: page.row(newest), "the page is refreshed")
    page.until(lambda: places() == [["", 40], ["", 40], ["hidden", 40]], "nor after that")
    heights = page.run(f"return [...document.querySelectorAll('{MAIN} tbody tr')].map((row) => row.clientHeight)")
    assert len(set(heights)) == 1, "all rows are of one height"
    assert page.row(good)
    asked = "return performance.getEntriesByType('resource').filter(({name}) => name.includes(arguments[0])).length"
    assert page.run(asked, f"{damaged}/thumbnail") == 1, "it is not asked for again and again"
    assert all("404" in error for error in page.errors())


def test_the_live_preview_of_an_open_job(webui, driver):
    webui.client.post("/sdapi/v1/options", json={"show_progress_every_n_steps": 1})
    page = Page(driver, webui)
    gate = webui.gate()
    job_id = webui.send(body("slow", {"seconds": 8, "hold": gate}, steps=20)).job_id()
    page.until(lambda: page.row(job_id), "it runs")
    page.open(job_id)
    page.until(lambda: page.find(PREVIEW), "a preview is there")
    page.run(f"window.preview = document.querySelector('{PREVIEW}'); window.first = preview.src")
    page.until(lambda: page.run("return preview.src !== first && preview.naturalWidth"), "a newer one takes its place")
    assert page.run(f"return preview === document.querySelector('{PREVIEW}')"), "the element stays, and so no flicker"
    gate.open()
    page.until(lambda: page.row(job_id)["status"] == "Completed", "it ends", 30)
    page.until(lambda: not page.find(PREVIEW), "the images take its place")
    page.until(lambda: page.run(f"return document.querySelector('{OPEN_JOB} img').naturalWidth") == 64, "an image")
    assert not page.errors()


def test_columns_and_the_filter_of_labels(webui, driver):
    plain = done(webui)
    page = Page(driver, webui)
    page.until(lambda: page.row(plain), "the row is there")
    assert not {"label", "server"} & page.row(plain).keys(), "they would say nothing"
    label = "<b>night run</b> & more"
    answer = webui.client.post("/sdapi/v1/txt2img", json=body("labelled"), headers={"X-Job-Label": label})
    labelled = answer.headers["x-job-id"]
    page.until(lambda: page.row(labelled), "the new row is there")
    assert page.row(labelled)["label"] == label and page.row(plain)["label"] == ""
    page.open(labelled)
    assert label in page.text(f"{OPEN_JOB} dl")
    page.type("label", label)
    page.until(lambda: [row["id"] for row in page.rows()] == [labelled], "the filter finds it")
    page.type("label", label[:-1])
    page.until(lambda: "No job matches" in page.text(MAIN), "the whole label is meant")
    port = webui.port
    webui.kill()
    webui.environ["TRACKER_SERVER"] = "another"
    webui.start()
    page = Page(driver, webui)
    page.until(lambda: page.row(plain), "the row is there")
    assert page.row(plain)["server"].endswith(f":{port}"), "it was at a webui of another name"


CELLS = """
return [...document.querySelectorAll(arguments[0])].map((row) => [...row.cells].map((cell) => {
    const {left, top, right, bottom} = cell.getBoundingClientRect();
    return {left, top, right, bottom, name: cell.className};
}).filter(({left, right}) => right > left + 1));
"""


def test_rows_on_a_phone(webui, driver):
    """The picture stands beside what the row says, and nothing is over anything else."""
    webui.post(body("no picture", {"fail": "OutOfMemoryError"}))
    page = Page(driver, webui)
    page.until(lambda: len(page.rows()) == 1, "the row is there")
    try:
        page.resize(*PHONE, mobile=True)
        rows = page.run(CELLS, f"{MAIN} tbody tr")
        done(webui, "a word " * 40)
        headers = {"X-Job-Label": "night"}
        assert webui.client.post("/sdapi/v1/txt2img", json=body("b" * 300), headers=headers).status_code == 200
        page.until(lambda: len(page.rows()) == 3 and widths(page) == [64, 64], "all rows are there")
        rows += page.run(CELLS, f"{MAIN} tbody tr")
        page.run(f"document.querySelector('{MAIN} tbody tr:last-child button').focus()")
        driver.switch_to.active_element.send_keys(Keys.ENTER)
        page.until(lambda: page.seen(OPEN_JOB), "the keyboard opens a row, too")
    finally:
        page.resize(*WIDE)
    plain = ["time", "status", "prompt"]
    expected = [plain, ["thumbnail", *plain, "label"], ["thumbnail", *plain], ["thumbnail", *plain]]
    assert [[cell["name"] for cell in row] for row in rows] == expected
    for row in rows:
        for number, one in enumerate(row):
            for other in row[number + 1 :]:
                is_beside = one["right"] <= other["left"] + 1 or other["right"] <= one["left"] + 1
                is_above = one["bottom"] <= other["top"] + 1 or other["bottom"] <= one["top"] + 1
                assert is_beside or is_above, (one, other)
        assert len({cell["left"] for cell in row if cell["name"] in ("time", "prompt", "label")}) == 1, (
            "one below another"
        )
    assert len({row[0]["right"] for row in rows[1:]}) == 1
