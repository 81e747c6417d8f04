"""Servers that webhooks are sent to, of every kind that there is."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Union

from harness import until


class Delivery(NamedTuple):
    """What came."""

    path: str
    headers: Dict[str, str]  # their names in small letters
    body: bytes
    at: float  # Unix seconds

    @property
    def event(self) -> Any:
        return json.loads(self.body)

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


Answer = Union[int, Callable[[http.server.BaseHTTPRequestHandler], None]]


class Receiver:
    """Answers each request by the next of the given answers, and all further ones by the last.

    One is a status, or a function that is given the handler of the request, and answers by it.
    """

    def __init__(self, *answers: Answer, host: str = "127.0.0.1", port: int = 0, tls: Optional[ssl.SSLContext] = None):
        self.answers = list(answers or (204,))
        self.got: List[Delivery] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                receiver._answer(self)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 100
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

            def handle_error(self, *_: Any) -> None:
                pass  # a client that has left

        self.server = Server((host, port), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.name = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.url = f"http{'s' if tls else ''}://{self.name}/hook"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        size = int(handler.headers.get("content-length", 0))
        body = handler.rfile.read(size)
        if len(body) < size:  # its sender was killed
            return
        headers = {name.lower(): value for name, value in handler.headers.items()}
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        handler.delivery = Delivery(handler.path, headers, body, time.time())
        self.got.append(handler.delivery)
        if callable(answer):
            answer(handler)
        else:
            handler.send_response(answer)
            handler.end_headers()

    def wait(self, count: int = 1) -> List[Delivery]:
        """What came, once that is so many."""
        until(lambda: len(self.got) >= count, what=f"{count} webhooks, and not {len(self.got)}")
        return self.got

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def redirect_to(url: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("Location", url)
        handler.end_headers()

    return answer


def late(seconds: float, status: int = 200) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        handler.send_response(status)
        handler.end_headers()

    return answer


class WithoutEnd:
    """An answer: a head, and then the same bytes until the client leaves."""

    def __init__(self, head: bytes, block: bytes):
        self.head = head
        self.block = block
        self.size = 0  # that the system has taken

    def __call__(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        with contextlib.suppress(OSError):
            handler.connection.sendall(self.head)
            while True:
                self.size += handler.connection.send(self.block)


@contextlib.contextmanager
def hanging() -> Iterator[int]:
    """A port at every local address, where connections are taken and nobody says anything."""
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen(4096)
        yield listener.getsockname()[1]


def make_certificate(folder: Path, name: str) -> Path:
    """A new authority, which `ca.pem` is of, and in `server.pem` the key and certificate of a server it vouches for."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=str(folder), check=True, capture_output=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test CA", "-days", "2")
    openssl("req", *new_key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=server")
    (folder / "names").write_text(f"subjectAltName=DNS:{name}\n")
    signing = ("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
    openssl(*signing, "-out", "server.crt", "-days", "2", "-extfile", "names")
    whole = (folder / "server.key").read_text() + (folder / "server.crt").read_text()
    (folder / "server.pem").write_text(whole)
    return folder


def server_tls(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(folder / "server.pem"))
    return context
