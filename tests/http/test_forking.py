"""A webui that is a fork is what one is that was started by itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from typing import Any, Dict

import forking
import pytest

from harness import QUICK, TESTS, Webui, until

pytestmark = pytest.mark.skipif(not forking.IS_POSSIBLE, reason="webuis are forked on Linux only")

# An extension that tells what its process is like.
TELLS = """
import __main__, json, os, resource, signal, sys, tempfile, threading
from modules import script_callbacks

LIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_")]
SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}

def tell():
    umask = os.umask(0)
    os.umask(umask)
    return {
        "program": [__main__.__name__, __main__.__file__, sys.executable, sys.argv, sys.path],
        "environment": dict(os.environ),
        "folders": [os.getcwd(), tempfile.gettempdir()],
        "files": [os.readlink(f"/proc/self/fd/{number}") for number in range(3)],
        "groups": [os.getpgid(0), os.getsid(0), os.getuid(), os.getgid(), os.getgroups()],
        "limits": [resource.getrlimit(getattr(resource, name)) for name in LIMITS],
        "signals": [repr(signal.getsignal(number)).split(" at 0x")[0] for number in sorted(SIGNALS)],
        "threads": threading.main_thread().name,
        "umask": umask,
    }

script_callbacks.on_app_started(lambda _, app: app.add_api_route("/tell", tell))
"""


def told(webui: Webui) -> Dict[str, Any]:
    text = webui.client.get("/tell").text
    for one, name in ((str(webui.folder), "FOLDER"), (str(webui.port), "PORT")):
        text = text.replace(one, name)
    return json.loads(text)


def test_it_is_the_same_process(start, monkeypatch):
    monkeypatch.setenv("SET_AFTER_THE_SERVER_STARTED", "1")
    forked, cold = (start(*QUICK, scripts={"tells": TELLS}, cold=cold) for cold in (False, True))
    assert isinstance(forked.process, forking.ForkedProcess) and isinstance(cold.process, subprocess.Popen)
    assert told(forked) == told(cold)
    assert told(forked)["environment"]["SET_AFTER_THE_SERVER_STARTED"] == "1"


def test_how_it_ends(start):
    exits = {"exits": "import os\n\nos._exit(3)"}
    assert start(scripts=exits, wait=False).process.wait(60) == 3
    webui = start(*QUICK)
    with pytest.raises(subprocess.TimeoutExpired):
        webui.process.wait(0.01)
    assert webui.process.poll() is None
    os.kill(webui.pid, signal.SIGSEGV)
    assert webui.process.wait(60) == -signal.SIGSEGV == webui.process.poll()
    webui.process.kill()  # does nothing


STARTS = """
import sys, tempfile, pathlib, time
sys.path.insert(0, sys.argv[1])
import harness
print(harness.Webui(pathlib.Path(tempfile.mkdtemp(dir=sys.argv[2]))).start().port, flush=True)
time.sleep(600)
"""


def test_it_ends_with_whoever_started_it(tmp_path):
    """However that one ended."""
    command = [sys.executable, "-c", STARTS, str(TESTS / "support"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tests:
        port = int(tests.stdout.readline())
        assert serves(port)
        tests.kill()
    until(lambda: not serves(port), what="the webui has ended")


def serves(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
