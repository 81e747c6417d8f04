"""Databases that are not as the store in PostgreSQL makes them."""

from __future__ import annotations

import secrets
from typing import Any, Iterator

import pytest
from inside import a_job, set_constants, until


@pytest.fixture
def store(script, database) -> Iterator[Any]:
    set_constants(script, BEAT_EVERY=0.1, FOLLOW_SECONDS=0.1, MOMENT=0.3)
    store = script.PostgresJobStore(database.url)
    yield store
    store.close()


@pytest.mark.parametrize("encoding", ("SQL_ASCII", "LATIN1"))
def test_of_another_encoding(script, postgresql, dice, encoding):
    """PostgreSQL makes those of the first kind where it has no locale."""
    name = f"test_{secrets.token_hex(4)}"
    postgresql.execute(f"create database {name} encoding '{encoding}' template template0")
    store = script.PostgresJobStore(postgresql.url(name))
    job = a_job(script, dice, prompt="猫 in Köln", label="Straße")
    try:
        written = store.put(job, new=True)
        if encoding == "LATIN1":
            with pytest.raises(script.StoreError, match="the encoding LATIN1, and needs UTF8"):
                written.result(20)
            return
        written.result(20)
        assert store.get(job.id) == job
        assert store.query(script.Filter(q="KÖLN", label="Straße", status="Pending"), 1).jobs == [job]
    finally:
        store.close()
        postgresql.execute(f"drop database {name} with (force)")


def test_a_webui_that_is_older_than_the_schema_by_now_writes_no_more(script, store, database, dice):
    """Another one was updated, and started."""
    store.put(a_job(script, dice), new=True).result(20)
    database.execute("update job_tracker_schema set version = version + 1")

    def why_refused() -> str:
        try:
            store.put(a_job(script, dice), new=True).result(20)
        except script.StoreError as error:
            return str(error)
        return ""

    assert "update this one" in until(why_refused)
    with pytest.raises(script.StoreError, match="update this one"):
        store.totals()
    database.execute("update job_tracker_schema set version = version - 1")
    until(lambda: not why_refused(), what="it writes again")
