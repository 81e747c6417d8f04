"""A real browser's EventSource: the example's page that shows a job live, and what a browser does at the end."""

from __future__ import annotations

from typing import Any, List

import pytest
from readme import ADDRESS, example
from selenium.webdriver.common.by import By

import browser
from harness import MODES, QUICK, SHAPE, Webui, connect, until

pytestmark = [browser.NEEDED, pytest.mark.skipif("nowebui" not in MODES, reason="no page of another origin is let in")]

# What the page asks for is held at its last step until there is a file.
HOLD = """
from modules import processing

sample = processing._sample

def hold_and_sample(p, index):
    p.standin.hold = {gate!r}
    return sample(p, index)

processing._sample = hold_and_sample
"""


@pytest.fixture
def webui(start: Any, tmp_path: Any) -> Webui:
    webui = start(
        *QUICK, "--cors-allow-origins", "*", scripts={"hold": HOLD.format(gate=str(tmp_path / "gate"))}, step_time=0.05
    )
    if SHAPE != "sdnext":
        webui.client.post("/sdapi/v1/options", json={"show_progress_every_n_steps": 1})
    return webui


def sources(driver: Any) -> List[str]:
    """The images that are shown at one moment: each preview replaces the element of the one before."""
    return driver.execute_script("return [...document.querySelectorAll('#pictures img')].map((image) => image.src)")


def test_page_of_the_examples(driver, webui, tmp_path):
    page = example("live.html")
    assert page.count(ADDRESS) == 1
    with browser.served(page.replace(ADDRESS, webui.url)) as port:
        driver.get(f"http://127.0.0.1:{port}/")
        status, bar = driver.find_element(By.ID, "status"), driver.find_element(By.TAG_NAME, "progress")
        driver.find_element(By.TAG_NAME, "button").click()
        until(lambda: status.text == "Processing", what="the page shows the status")
        until(lambda: float(bar.get_attribute("value")) == 0.95, what="the bar is at the last step")
        (preview,) = until(lambda: sources(driver), what="there is a preview")
        assert preview.startswith("data:image/png;base64,")
        (tmp_path / "gate").touch()
        until(lambda: status.text == "Completed", what="the page shows the end")
        (job,) = webui.jobs()
        assert (job["prompt"], job["image_count"]) == ("a lighthouse", 1)
        assert sources(driver) == [webui.url + url for url in job["image_urls"]]
        script = "return document.querySelector('#pictures img').naturalWidth"
        assert until(lambda: driver.execute_script(script), what="the image is loaded") == 512
        assert float(bar.get_attribute("value")) == 1


EVENTS = """
const [url, tell] = arguments, seen = [];
const events = new EventSource(url);
events.onopen = () => seen.push("open");
events.addEventListener("status", ({ data }) => seen.push(JSON.parse(data).status));
events.onerror = () => {
    seen.push("error");
    if (events.readyState === EventSource.CLOSED) tell(seen);
};
"""


def test_stops_after_the_end(driver, webui, tmp_path):
    """A browser connects again after each end, unless it is told not to."""
    (tmp_path / "gate").touch()
    job_id = connect(webui)
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    driver.get(webui.url + "/docs")
    seen = driver.execute_async_script(EVENTS, f"/sdapi/v1/job/{job_id}/events")
    assert seen == ["open", "Completed", "error", "error"]
