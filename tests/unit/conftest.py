"""Stores that tests open, on the folder of the test."""

from __future__ import annotations

from typing import Any

import pytest
from inside import within


@pytest.fixture
def opened(script, tmp_path, store_environ):
    """`opened()` is a store on the test's folder, or on another; with the mark `every_store`, also on a database."""
    stores = []

    def open_store(folder: Any = tmp_path, program: Any = script) -> Any:
        if store_environ:
            assert folder == tmp_path, "there is one database"
            stores.append(program.open_stores(program.Settings(str(folder), store_environ))[0])
        else:
            stores.append(program.JobStore(str(folder)))
        return stores[-1]

    yield open_store
    for store in stores:
        within(20, store.close)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "jobs.json"
