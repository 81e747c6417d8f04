"""The browser of these tests."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

import browser


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser.opened() as driver:
        yield driver
