"""A real browser, without a window, that works the tab: Chromium and its driver, as they are installed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.action_chains import ActionChains as ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from harness import Webui, until

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
NEEDED = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no browser: apt install chromium chromium-driver")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--lang=en-US",
    "--force-prefers-reduced-motion",
    "--host-resolver-rules=MAP *.lan 127.0.0.1",  # for names that are no loopback addresses
)
WIDE, NARROW, PHONE = (1400, 1000), (420, 900), (390, 844)

# The tab has a second, unseen copy of its HTML: the newest from the webui.
MAIN = "#job_tracker .main:not(#job_tracker_fresh *)"
TOP = "#job_tracker .top:not(#job_tracker_fresh *)"
OPEN_JOB = f"{MAIN} aside"

READ_ROWS = """
return [...document.querySelectorAll(arguments[0] + " tbody tr")].map((row) => Object.fromEntries(
    [...row.cells].map((cell) => [cell.className, cell.textContent])));
"""
COUNT_LOOKS = """
return performance.getEntriesByType("resource").filter((entry) => /run.predict/.test(entry.name)).length;
"""


@contextlib.contextmanager
def served(page: str) -> Iterator[int]:
    """A page from elsewhere, whatever is asked for: the port of its origin."""

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def opened() -> Iterator[webdriver.Chrome]:
    """A window of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tempfile.mkdtemp(prefix="browser-")
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    try:
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            yield driver
        finally:
            driver.quit()
    finally:
        shutil.rmtree(profile, ignore_errors=True)


class Page:
    """The tab Job Tracker of a webui, in one window of the browser."""

    def __init__(
        self,
        driver: webdriver.Chrome,
        webui: Webui,
        theme: str = "light",
        login: Optional[str] = None,
        path: str = "/",
        url: Optional[str] = None,
    ):
        """`url` is where the browser finds the webui, if not where it is."""
        self.driver = driver
        self.webui = webui
        self.resize(*WIDE)
        self.url = f"{url or webui.url}{path}?__theme={theme}"
        driver.get(self.url)
        if login:
            self._log_in(*login.split(":"))
        self.errors()  # of what was there before
        self.go_to("Job Tracker")
        self.until(lambda: self.seen(f"{MAIN} section"), "the tab shows the jobs")

    def _log_in(self, user: str, password: str) -> None:
        self.driver.execute_async_script(
            """
            const form = new FormData();
            form.append("username", arguments[0]);
            form.append("password", arguments[1]);
            fetch("./login", {method: "POST", body: form}).then(arguments[2]);
            """,
            user,
            password,
        )
        self.driver.get(self.url)

    # Looking

    def find(self, selector: str) -> List[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def seen(self, selector: str) -> List[WebElement]:
        return [element for element in self.find(selector) if element.is_displayed()]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str) -> str:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.innerText).join()", selector)

    def rows(self) -> List[Dict[str, str]]:
        """The table, with the name of the column to each text."""
        return self.run(READ_ROWS, MAIN)

    def row(self, job_id: str) -> Optional[Dict[str, str]]:
        return next((row for row in self.rows() if row["id"] == job_id), None)

    def looks(self) -> int:
        """How often the page has asked the webui."""
        return self.run(COUNT_LOOKS)

    def until(self, condition: Any, what: str, seconds: float = 20) -> Any:
        def holds() -> Any:
            try:
                return condition()
            except StaleElementReferenceException:
                return None

        try:
            return until(holds, seconds, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; the tab shows:\n{self.text('#job_tracker')[:2000]}") from None

    def errors(self) -> List[str]:
        """What the browser complained of since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def add_style(self, text: str) -> None:
        self.run(
            "document.head.append(Object.assign(document.createElement('style'), {textContent: arguments[0]}))", text
        )

    def picture(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))

    # Doing

    def hurry(self, times: float) -> None:
        """The page's clock goes faster from now on, until it is loaded again. It looks at it five times a second."""
        self.run(
            """
            const real = Date.now.bind(Date), began = real();
            Date.now = () => began + (real() - began) * arguments[0];
            """,
            times,
        )

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        """`mobile` is as on a phone: by touch, and what is wider than the screen makes the page wider."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile},
        )
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": mobile})

    def click(self, selector: str, text: str = "") -> None:
        def clicked() -> bool:
            for element in self.seen(selector):
                if text in element.text:
                    element.click()
                    return True
            return False

        def tried() -> bool:
            with contextlib.suppress(WebDriverException):  # something covers it for now
                return clicked()
            return False

        self.until(tried, f"{selector} {text} can be clicked")

    def go_to(self, tab: str) -> None:
        self.click("#tabs > div button", tab)

    def open(self, job_id: str) -> None:
        self.click(f'{MAIN} tr[data-job="{job_id}"] td.prompt')
        self.until(lambda: self.seen(f'{OPEN_JOB}[data-key="{job_id}"]'), f"job {job_id} is open")

    def do(self, action: str, confirm: str = "") -> None:
        """A button of the open job, which asks with a text before it does it."""
        self.click(f"{OPEN_JOB} [data-action]", action)
        if confirm:
            self.confirm(f"{OPEN_JOB} [data-action]", confirm)

    def confirm(self, selector: str, question: str) -> None:
        """Presses a button that asks, not at once: twice in a moment is one press."""
        self.until(lambda: question in self.text(selector), f"it asks: {question}")
        time.sleep(0.6)
        self.click(selector, question)

    def type(self, control: str, text: str) -> None:
        """Replaces the text of a filter."""
        box = self.find(f"#job_tracker_{control} textarea, #job_tracker_{control} input")[0]
        box.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, text)

    def choose_status(self, status: str) -> None:
        self.click("#job_tracker_status input")
        self.click("#job_tracker_status [role=option], #job_tracker_status li, .options li", status)

    # The settings

    @property
    def enabled(self) -> WebElement:
        return self.find("#job_tracker_enabled input")[0]

    @property
    def retention(self) -> str:
        """The text of the choice that holds."""
        return self.text("#job_tracker_retention label:has(:checked)").strip()
