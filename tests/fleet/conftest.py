"""Webuis that share their jobs by a PostgreSQL, and their images by an S3 store, both of them real."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import pytest
from services import Bucket, Network

from harness import QUICK, Start, Webui

StartFleet = Callable[..., List[Webui]]


@pytest.fixture
def start_fleet(start: Start, request: pytest.FixtureRequest) -> StartFleet:
    """`start_fleet(n, *flags, **options)` starts n webuis, each with a folder of its own, that share one database.

    They share the bucket, too, unless `images` is false. `through` has the Network to the database of each that is not
    to go there straight, `to_bucket` the same for the bucket. The other options are those of harness.Webui.
    """
    database = request.getfixturevalue("database")

    def start_all(
        number: int,
        *flags: str,
        images: bool = True,
        through: Sequence[Optional[Network]] = (),
        to_bucket: Sequence[Optional[Network]] = (),
        environ: Optional[Dict[str, str]] = None,
        **options: Any,
    ) -> List[Webui]:
        bucket: Optional[Bucket] = request.getfixturevalue("bucket") if images else None
        fleet = []
        for place in range(number):
            own = {"TRACKER_STORE": database.url, "TRACKER_SERVER": f"webui-{place}"}
            network = through[place] if place < len(through) else None
            if network is not None:
                own["TRACKER_STORE"] = network.through(database.url)
            if bucket is not None:
                network = to_bucket[place] if place < len(to_bucket) else None
                own.update(bucket.environ_at(network.port if network else bucket.server.port))
                own["TRACKER_IMAGES"] = bucket.url
            fleet.append(start(*(flags or QUICK), environ={**own, **(environ or {})}, wait=False, **options))
        return [webui.wait() for webui in fleet]

    return start_all


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
