"""Starts stand-ins by webui/serve.py, a process that has imported their packages and forks for each of them."""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

SERVER = Path(__file__).resolve().parents[1] / "webui" / "serve.py"
IS_POSSIBLE = sys.platform == "linux"


class ForkServer:
    """One a session, started when it is first needed. Ends with the process that it belongs to, and its forks with it.

    A fork is a child of the server, not of ours, and has the server's user, umask, limits and working folder.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Optional[subprocess.Popen[bytes]] = None

    def start(self, arguments: List[str], environ: Dict[str, str], log: Path) -> ForkedProcess:
        """launch.py with these arguments and this whole environment. What it says is appended to the log."""
        return ForkedProcess(self, self.ask(start=arguments, environ=environ, log=str(log)))

    def ask(self, **request: Any) -> Any:
        with self._lock:
            if self._process is None:
                self._connection, theirs = socket.socketpair()
                with theirs:
                    self._process = subprocess.Popen(
                        [sys.executable, str(SERVER)], stdin=theirs, stdout=subprocess.DEVNULL
                    )
                self._answers = self._connection.makefile("rb")
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            return json.loads(self._answers.readline())

    def close(self) -> None:
        if self._process is not None:
            self._connection.shutdown(socket.SHUT_RDWR)
            self._process.wait()


class ForkedProcess:
    """What harness.Webui uses of a subprocess.Popen, with the same meaning."""

    def __init__(self, server: ForkServer, pid: int):
        self._server = server
        self.pid = pid
        self.returncode: Optional[int] = None

    def poll(self) -> Optional[int]:
        if self.returncode is None:
            self.returncode = self._server.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: Optional[float] = None) -> int:
        end = time.monotonic() + timeout if timeout is not None else None
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(["launch.py"], timeout)
            time.sleep(0.002)
        return self.returncode

    def send_signal(self, number: int) -> None:
        # Until it has been polled, its ID is no other's.
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


fork_server = ForkServer()
atexit.register(fork_server.close)
