"""A database that is reached by TLS, whose certificate is checked by the driver's usual parameters."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from concurrent.futures import Future
from typing import Any, Callable, Iterator, Tuple
from urllib.parse import urlencode, urlsplit

import pytest
from inside import a_job, until
from receivers import make_certificate, server_tls


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while True:
            data = await reader.read(1 << 16)
            if not data:
                break
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.contextmanager
def tls_in_front(port: int, context: ssl.SSLContext) -> Iterator[int]:
    """The port of a server that speaks TLS, and passes on what is in it."""
    started: "Future[Tuple[int, Callable[[], Any]]]" = Future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on(reader, forth), pass_on(back, writer))

    async def run() -> None:
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        loop.set_exception_handler(lambda *_: None)  # a client that trusts another authority leaves while it greets
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        started.set_result((port, lambda: loop.call_soon_threadsafe(stopped.set)))
        await stopped.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    port_of_tls, stop = started.result(20)
    yield port_of_tls
    stop()
    thread.join(20)


def test_a_certificate_is_checked(script, database, dice, tmp_path, caplog):
    certificates = make_certificate(tmp_path, "localhost")
    context = server_tls(certificates)
    context.set_alpn_protocols(["postgresql"])  # the tests' PostgreSQL knows no TLS, but its protocol fits into it
    url = urlsplit(database.url)

    def open_store(port: int, authority: str) -> Any:
        query = {
            "sslmode": "verify-full",
            "sslrootcert": authority,
            "sslnegotiation": "direct",
            "hostaddr": "127.0.0.1",
        }
        place = f"{url.username}:{url.password}@localhost:{port}"
        return script.PostgresJobStore(url._replace(netloc=place, query=urlencode(query)).geturl())

    with tls_in_front(url.port, context) as port:
        store = open_store(port, str(certificates / "ca.pem"))
        try:
            job = a_job(script, dice, owner=store.owner, parked=True)
            store.put(job, new=True).result(20)
            assert store.get(job.id) == job
            until(lambda: job.id in (store.follow() or {}) or store.remove([job.id]).result(20), what="news comes, too")
        finally:
            store.close()
        (tmp_path / "other").mkdir()
        other = make_certificate(tmp_path / "other", "localhost")
        store = open_store(port, str(other / "ca.pem"))
        try:
            with pytest.raises(script.StoreError, match="cannot be reached") as failure:
                store.get(job.id)
            assert "certificate verify failed" in failure.value.details
        finally:
            store.close()
    assert "certificate verify failed" in caplog.text and url.password not in caplog.text + failure.value.details
