"""`run.py demo --fleet` tells its whole story, and ends all that it started, also when somebody has seen enough."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from typing import List

import pytest
import services

from harness import TESTS, free_port

SECONDS = 240  # that it may take: a webui's death is known within 60

pytestmark = [
    pytest.mark.all_only,
    pytest.mark.skipif(bool(services.why_missing()), reason=services.why_missing()),
]


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.timeout(SECONDS + 60)
def test_demonstration():
    """First it is interrupted by Ctrl-C, which all processes of a terminal get. Both have one folder."""
    script = TESTS / "support" / "demonstration_fleet.py"
    command = [sys.executable, str(script), "--once", "--nowebui", "--port", str(free_port())]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        seen: List[str] = []
        while not any("Processing" in line for line in seen):
            line = process.stdout.readline()
            assert line, seen
            seen.append(line)
        ports = [int(port) for port in re.findall(r"serves at http://127\.0\.0\.1:(\d+)", "".join(seen))]
        assert len(ports) == 3 and all(map(is_open, ports))
        os.killpg(process.pid, signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == 130, rest
        assert "Traceback" not in rest and not any(map(is_open, ports))
    done = subprocess.run(command, **pipes, timeout=SECONDS)
    assert done.returncode == 0 and "All of it was so." in done.stdout, done.stdout
    ports = [int(port) for port in re.findall(r"serves at http://127\.0\.0\.1:(\d+)", done.stdout)]
    assert not any(map(is_open, ports))
