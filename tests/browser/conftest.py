"""The browser of these tests."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

import browser


@pytest.fixture(scope="session")
def window() -> Iterator[Any]:
    with browser.opened() as driver:
        driver.set_script_timeout(180)
        yield driver


@pytest.fixture
def driver(window: Any) -> Iterator[Any]:
    """The window, on an empty page. Its cookies are for all webuis, since they go by the name without the port."""
    yield window
    window.execute_cdp_cmd("Network.clearBrowserCookies", {})
    window.get("about:blank")  # the page of a webui that has ended would go on asking it
