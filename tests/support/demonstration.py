"""Shows what Job Tracker does, live: starts the stand-in webui, loses a client, gets the images back.

Every line of the show is a check of what happened, and the standard library
is its client. The data stays in `.demo/`, so the next run finds the old jobs.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import MappingProxyType
from typing import Any, Iterator, Mapping

from environment import PROJECT, SHAPES

DATA = PROJECT / ".demo"
START_SECONDS = 90
REQUEST = {"prompt": "a lighthouse at dawn, oil painting", "seed": 1, "steps": 20, "batch_size": 2}
STEP_SECONDS = 0.3
GENERATION_SECONDS = REQUEST["steps"] * STEP_SECONDS
NONE: Mapping[str, str] = MappingProxyType({})


class Failed(Exception):
    """Something that Job Tracker promises was not so."""


def check(truth: bool, otherwise: str) -> None:
    if not truth:
        raise Failed(otherwise)


def run(python: str, host: str, port: int, nowebui: bool, once: bool) -> int:
    end_on_signals()
    terminal = Terminal()
    terminal.title(f"Job Tracker on a stand-in for the webui ({host}; everything is real but the model)")
    try:
        free = free_port(port)
        if free != port:
            terminal.line("Port", f"{port} is in use, taking {free}")
        with Webui(python, host, free, nowebui) as webui:
            Story(terminal, webui).tell()
            terminal.title("All of it was so.")
            if not once:
                invite(terminal, webui, nowebui)
                webui.wait()
        return 0
    except Failed as failure:
        return report(terminal, str(failure))
    except (OSError, http.client.HTTPException) as error:
        return report(terminal, f"The webui does not answer: {error!r}")
    except KeyboardInterrupt:
        terminal.end_line()
        terminal.title("The webui has ended.")
        return 130 if once else 0


def end_on_signals() -> None:
    """Whatever is to end this program does so by an exception, so that what it started is ended, too."""
    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))


def report(terminal: Terminal, failure: str, logs: Path = DATA / "webui.log") -> int:
    terminal.end_line()
    terminal.line("FAILED", failure, colour=Terminal.RED)
    terminal.line("", f"The webui's output is in {logs}")
    return 1


def invite(terminal: Terminal, webui: Webui, nowebui: bool) -> None:
    if not nowebui:
        check(webui.client.get("/")[0] == 200, "The UI does not answer.")
        terminal.line("The tab", f"{webui.url}  (the tab Job Tracker)")
    check(webui.client.get("/docs")[0] == 200, "/docs does not answer.")
    terminal.line("The API", f"{webui.url}/docs")
    # Quoted as sh and Windows' cmd both read it.
    body = r'"{\"prompt\": \"a lighthouse\"}"'
    terminal.line("Try", f"curl -i {webui.url}/sdapi/v1/txt2img -H Content-Type:application/json -d {body}")
    terminal.line("and", f"curl {webui.url}/sdapi/v1/jobs")
    terminal.line("End", "Ctrl-C")


class Story:
    def __init__(self, terminal: Terminal, webui: Webui) -> None:
        self.terminal = terminal
        self.client = webui.client
        self.webui = webui

    def tell(self) -> None:
        self.start()
        job_id = self.send_and_hang_up()
        self.follow(job_id)
        self.recover(job_id)

    def start(self) -> None:
        self.terminal.now("Start", "waiting for the webui ...")
        seconds = self.webui.wait_until_ready()
        self.terminal.line("Start", f"the webui serves at {self.webui.url} after {seconds:.1f} s")

    def send_and_hang_up(self) -> str:
        self.terminal.line("Send", f'POST /sdapi/v1/txt2img  "{REQUEST["prompt"]}"')
        connection = self.client.connect()
        sent = time.monotonic()
        connection.request("POST", "/sdapi/v1/txt2img", json.dumps(REQUEST), {"Content-Type": "application/json"})
        response = connection.getresponse()
        seconds = time.monotonic() - sent
        job_id = response.getheader("X-Job-ID") or ""
        check(response.status == 200, f"The webui answered {response.status}.")
        check(bool(job_id), "The answer has no X-Job-ID header.")
        check(bool(re.fullmatch("[A-Za-z0-9]{8}", job_id)), f"{job_id!r} is no job ID.")
        check(
            seconds < GENERATION_SECONDS / 2,
            f"The ID came after {seconds:.1f} s, not before the images were generated.",
        )
        self.terminal.line("ID", f"X-Job-ID: {job_id}  after {seconds * 1000:.0f} ms", colour=Terminal.GREEN)
        response.close()
        connection.close()
        self.terminal.line("Hang up", "the connection is cut: whoever sent this will never get an answer")
        return job_id

    def follow(self, job_id: str) -> None:
        path = f"/sdapi/v1/job/{job_id}?images=false"
        self.terminal.line("Ask", f"GET {path}")
        seen: list[str] = []
        began = time.monotonic()
        for tick in itertools.count():
            status, job = self.client.get_json(path)
            check(status == 200, f"The job cannot be read: the webui answered {status}.")
            if job["status"] not in seen:
                seen.append(job["status"])
            if job["status"] not in ("Pending", "Processing"):
                break
            check(time.monotonic() - began < START_SECONDS, f"The job is still {job['status']}.")
            self.terminal.now(job["status"], bar(job.get("progress"), tick))
            time.sleep(0.15)
        check(job["status"] == "Completed", f"The job is {job['status']}: {job.get('error')}")
        check("Processing" in seen, "The job was never seen while it was generated.")
        self.terminal.line(
            "Completed", f"{time.monotonic() - began:.1f} s later, with nobody connected", colour=Terminal.GREEN
        )

    def recover(self, job_id: str) -> None:
        status, job = self.client.get_json(f"/sdapi/v1/job/{job_id}")
        check(status == 200, f"The images cannot be read: the webui answered {status}.")
        self.terminal.line("Get back", f"GET /sdapi/v1/job/{job_id}")
        check(len(job["images"]) >= REQUEST["batch_size"], f"It has {len(job['images'])} images.")
        for number, text in enumerate(job["images"]):
            try:
                image = base64.b64decode(text, validate=True)
                width, height = read_png(image)
            except (ValueError, zlib.error) as error:
                raise Failed(f"Image {number} is no PNG: {error}") from None
            on_disk = list((DATA / "images").glob(f"*/{job_id}_{number}.png"))
            check(len(on_disk) == 1, f"There are {len(on_disk)} files for image {number} below {DATA / 'images'}.")
            check(on_disk[0].read_bytes() == image, f"{on_disk[0]} differs from what the API gave.")
            self.terminal.line(
                f"Image {number}",
                f"{width} x {height}, {len(image) / 1024:.0f} KiB, in {on_disk[0].relative_to(PROJECT)}",
                colour=Terminal.GREEN,
            )


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def get(self, path: str) -> tuple[int, bytes]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def get_json(self, path: str) -> tuple[int, dict[str, Any]]:
        status, body = self.get(path)
        try:
            return status, json.loads(body)
        except ValueError:
            raise Failed(f"{path} answers {status} with something that is not JSON.") from None


class Webui:
    """The stand-in webui as a child process. Leaving the `with` ends it, whatever happened."""

    def __init__(
        self, python: str, host: str, port: int, nowebui: bool, data: Path = DATA, environ: Mapping[str, str] = NONE
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.client = Client(port)
        self.data = data
        self.log_path = data / "webui.log"
        self.environ = environ
        self.command = [python, str(PROJECT / "tests" / "webui" / "launch.py"), "--shape", SHAPES[host]]
        self.command += ["--port", str(port), "--api", *(["--nowebui"] if nowebui else [])]
        self.command += ["--step-time", str(STEP_SECONDS)]
        self.command += ["--extension", str(PROJECT), "--data-dir", str(data / "webui")]

    def __enter__(self) -> Webui:
        self.data.mkdir(exist_ok=True, parents=True)
        env = {name: value for name, value in os.environ.items() if not name.startswith("TRACKER_")}
        env.update({"TRACKER_ENABLED": "1", "TRACKER_DATA_DIR": str(self.data), "PYTHONUNBUFFERED": "1"})
        env.update(self.environ)
        # A process group of its own: Ctrl-C comes to this program, which ends the webui.
        if os.name == "nt":
            group: dict[str, Any] = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        else:
            group = {"start_new_session": True}
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, **group
            )
        return self

    def kill(self) -> None:
        """As a crash would end it."""
        self.process.kill()
        self.process.wait()

    def __exit__(self, *_: object) -> None:
        with ctrl_c_ignored():
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def wait_until_ready(self) -> float:
        """Seconds until Job Tracker's own routes answer, and the webui has told its extensions all."""
        began = time.monotonic()
        answer = "nothing"
        while time.monotonic() - began < START_SECONDS:
            check(self.process.poll() is None, f"The webui ended while it started.{self.last_words()}")
            started = "Startup time" in self.log()
            with contextlib.suppress(OSError, http.client.HTTPException):
                status, _ = self.client.get("/sdapi/v1/jobs?limit=1")
                check(status == 200 or not started, f"The webui is up, but without Job Tracker.{self.last_words()}")
                if started:
                    return time.monotonic() - began
                answer = f"GET /sdapi/v1/jobs with {status}"
            time.sleep(0.1)
        raise Failed(f"After {START_SECONDS} s the webui answers {answer}.{self.last_words()}")

    def wait(self) -> None:
        while self.process.poll() is None:
            time.sleep(0.2)  # Windows lets Ctrl-C through to a sleep, but not to a wait
        raise Failed(f"The webui ended by itself.{self.last_words()}")

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def last_words(self) -> str:
        return "".join("\n    " + line for line in self.log().splitlines()[-12:])


class Terminal:
    """Lines of a label and a text. ASCII only: every console shows it."""

    RED, GREEN, BOLD = "31", "32", "1"

    def __init__(self) -> None:
        sys.stdout.reconfigure(errors="replace")  # a path may hold what the console lacks
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.coloured = self.live and not os.environ.get("NO_COLOR")
        if self.coloured and os.name == "nt":
            os.system("")  # switches the console's escape sequences on
        self.pending = 0
        self.label = ""

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.coloured and colour else text

    def title(self, text: str) -> None:
        print(f"\n{self.paint(text, self.BOLD)}\n", flush=True)

    def line(self, label: str, text: str, colour: str = "") -> None:
        self.clear()
        print(f"  {self.paint(f'{label:<11}', colour)} {text}", flush=True)

    def now(self, label: str, text: str) -> None:
        """A line that the next one replaces. Where that cannot be, only the first with this label is shown."""
        if self.live:
            self.clear()
            shown = f"  {label:<11} {text}"
            print(shown, end="", flush=True)
            self.pending = len(shown)
        elif label != self.label:
            self.line(label, text)
        self.label = label

    def clear(self) -> None:
        if self.pending:
            print("\r" + " " * self.pending + "\r", end="")
            self.pending = 0

    def end_line(self) -> None:
        if self.pending:
            print()
            self.pending = 0


def bar(progress: Any, tick: int) -> str:
    if not isinstance(progress, (int, float)):
        return "|/-\\"[tick % 4]
    full = int(progress * 30)
    return f"[{'#' * full}{'.' * (30 - full)}] {progress:4.0%}"


def free_port(wanted: int) -> int:
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            if os.name != "nt":  # there it would allow a port that is in use
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise Failed("There is no free port.")


def read_png(data: bytes) -> tuple[int, int]:
    """The size of an 8-bit PNG whose every chunk and row is there, or ValueError."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("it does not start as one")
    place, pixels, kind = 8, b"", b""
    while kind != b"IEND":
        if place + 12 > len(data):
            raise ValueError("it is cut off")
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        if data[place + 8 + length : place + 12 + length] != struct.pack(">I", zlib.crc32(kind + body)):
            raise ValueError("it is damaged")
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", body[:10])
        elif kind == b"IDAT":
            pixels += body
        place += 12 + length
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    if len(zlib.decompress(pixels)) != height * (1 + width * channels * depth // 8):
        raise ValueError("rows are missing")
    return width, height


@contextlib.contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
