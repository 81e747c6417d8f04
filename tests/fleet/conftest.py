"""Webuis that share their jobs by a PostgreSQL, and their images by an S3 store, both of them real."""

from __future__ import annotations

from typing import Any, Callable, Iterator, List

import pytest
import services
from services import Network

from harness import Start, Webui

StartFleet = Callable[..., List[Webui]]


@pytest.fixture
def start_fleet(start: Start, request: pytest.FixtureRequest) -> StartFleet:
    """`start_fleet(number, *flags, **options)` starts webuis as services.start_fleet does, on one database.

    They share a bucket, too, unless `images` is false.
    """
    database = request.getfixturevalue("database")

    def start_all(number: int, *flags: str, images: bool = True, **options: Any) -> List[Webui]:
        bucket = request.getfixturevalue("bucket") if images else None
        return services.start_fleet(start, number, database, bucket, *flags, **options)

    return start_all


@pytest.fixture(scope="module")
def fleet(start_shared: Start, postgresql: services.PostgreSQL, seaweedfs: services.SeaweedFS) -> Iterator[List[Webui]]:
    """Three webuis that the tests of a module share, and leave without jobs that wait or run."""
    with services.Database(postgresql) as database, services.Bucket(seaweedfs) as bucket:
        webuis = services.start_fleet(start_shared, 3, database, bucket)
        yield webuis
        for webui in webuis:
            webui.kill()


@pytest.fixture
def connect_through() -> Iterator[Callable[[Any], Network]]:
    """`connect_through(server)` is a Network to a server, that is closed after the test."""
    made: List[Network] = []

    def make(server: Any) -> Network:
        made.append(Network(server.port))
        return made[-1]

    yield make
    for one in made:
        one.close()
