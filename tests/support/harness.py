"""Starts the stand-in webui with Job Tracker in it, as a process of its own, and talks to it over HTTP.

    def test_something(start):                     # `start` and `start_shared` come from conftest.py
        webui = start("--nowebui", "--api-auth", "user:secret", tracking="config")
        gate = webui.gate()                        # a generation with hold=gate waits until gate.open()
        sent = webui.send(body(standin={"hold": gate}))
        status, headers = sent.head()              # the head arrives before the generation ends
        assert webui.records()[headers["x-job-id"]]["status"] == "Pending"
        gate.open()
        assert webui.job(headers["x-job-id"], wait=30)["status"] == "Completed"

`webui.client` is an httpx.Client with the URL and the credentials in it. `webui.kill()`, `webui.terminate()` and
`webui.start()` end and start the process on the same folders. Each start takes a free port.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import forking
import httpx

import environment

TESTS = Path(__file__).resolve().parents[1]
PROJECT = TESTS.parent
HOST = os.environ.get("WEBUI_HOST", "a1111")
SHAPE = environment.SHAPES[HOST]
SERVER = os.environ.get("WEBUI_SERVER", "h11")  # what uvicorn speaks HTTP by: this or httptools
MODES = ("ui",) if SHAPE == "sdnext" else ("ui", "nowebui")  # SD.Next has no mode without the UI
MODE_FLAGS: Dict[str, Tuple[str, ...]] = {"ui": ("--api",), "nowebui": ("--nowebui",)}
QUICK = MODE_FLAGS[MODES[-1]]  # for what is the same in both
AUTH = ("--api-auth", "user:secret")
ORIGIN = "http://example.org"  # which the webuis that tests share let in
ASYNC = {"Prefer": "respond-async"}
KINDS = ("txt2img", "img2img")
# What each webui refuses before it asks for its queue lock, and how.
UNKNOWN, UNKNOWN_STATUS = (
    ({"sampler_name": "None such"}, 404) if SHAPE == "sdnext" else ({"script_name": "None such"}, 422)
)
SDNEXT_ERROR = "ERROR API error: "  # begins its own line in the log for each request that was refused
CLOSE = {"Connection": "close"}  # Forge ends the connection after an error, and a client may reuse it just then
SECONDS = 60.0  # the longest that anything here is waited for
ONCE = "EACH_PROMISE_ONCE"  # set by conftest.py for the short run, and in the environment, so that all processes know

# A red square of 8x8.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAEklEQVR4nGP8z4AdMOEQH6QSAM1BAQ/oQeJvAAAAAElFTkSuQmCC"


def until(condition: Callable[[], Any], seconds: float = SECONDS, what: str = "") -> Any:
    """Waits until a condition holds, and returns what it gave."""
    began = time.monotonic()
    while True:
        result = condition()
        if result:
            return result
        waited = time.monotonic() - began
        if waited > seconds:
            raise AssertionError(f"not within {seconds:g} s: {what or condition}")
        # Who waits for long looks less often: most looks are requests, and take the time of what is waited for.
        time.sleep(min(0.02, 0.005 + waited / 20))


def fewer(times: int) -> int:
    """A third in the short run, of what is tried again and again and is another thing each time."""
    return max(1, times // 3) if os.environ.get(ONCE) else times


def body(
    prompt: str = "a lighthouse", standin: Optional[Dict[str, Any]] = None, kind: str = "txt2img", **fields: Any
) -> Dict[str, Any]:
    """The body of a quick generation request. What `standin` can be is in webui/modules/standin.py."""
    request = {"prompt": prompt, "seed": 7, "subseed": 8, "steps": 2, "width": 64, "height": 64}
    if kind == "img2img":
        request["init_images"] = [PNG]
    request.update(fields)
    if standin is not None:
        request["alwayson_scripts"] = {"Stand-in": {"args": [standin]}}
    return request


def as_bytes(data: Any) -> bytes:
    return data if isinstance(data, bytes) else json.dumps(data, default=os.fspath).encode()


def without_time(answer: bytes) -> bytes:
    """An answer of the webui without the one thing that differs between two generations with the same seed."""
    return re.sub(rb'(job_timestamp\\": )\\"\d*\\"', rb"\1null", answer)


def free_port() -> int:
    """A port below those that systems give to connections, so that none of these takes it before the webui does."""
    while True:
        port = random.SystemRandom().randrange(10240, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def open_files(process: int) -> List[str]:
    """What the descriptors of a process are of. Needs Linux's /proc."""
    folder, files = f"/proc/{process}/fd", []
    for number in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # it was closed just now
            files.append(os.readlink(f"{folder}/{number}"))
    return files


RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close drops what is unsent and resets


def new_client(url: str, **options: Any) -> httpx.Client:
    """One that sends at once. httpx sends head and content apart, and some versions of it let the system hold back the
    content until the head is acknowledged, for which Linux takes 40 ms. There is no TLS: to read the certificates of
    all authorities takes 25 ms a client."""

    def tell(event: str, info: Dict[str, Any]) -> None:
        if event.endswith("connect_tcp.complete"):
            info["return_value"].get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    client = httpx.Client(base_url=url, trust_env=False, verify=False, **{"timeout": SECONDS, **options})
    client.event_hooks["request"].append(lambda request: request.extensions.update(trace=tell))
    return client


# An extension that is loaded before ours and gives constants of ours other values, wherever in the script they stand.
CONSTANTS = """
import builtins, os
from modules import script_callbacks, script_loading

VALUES = {values!r}
found = set()

def change(names, put):
    for name in VALUES.keys() & names.keys():
        put(name, VALUES[name])
        found.add(name)

build = builtins.__build_class__

def build_and_change(body, *arguments, **options):
    is_ours = body.__code__.co_filename.endswith("job_tracker.py")
    if is_ours:  # those of the script, before a class takes them for its defaults
        change(body.__globals__, body.__globals__.__setitem__)
    made = build(body, *arguments, **options)
    if is_ours:
        change(vars(made), lambda *item: setattr(made, *item))
    return made

builtins.__build_class__ = build_and_change

def change_modules(*_):
    for path, module in script_loading.loaded_scripts.items():
        if path.endswith("job_tracker.py"):
            change(vars(module), lambda *item: setattr(module, *item))
    if found != VALUES.keys():
        print("Job Tracker has no constant", *(VALUES.keys() - found), flush=True)
        os._exit(1)

script_callbacks.on_app_started(change_modules)
"""

OLD_ID = "OLDOLDOL"


def with_old_job(days: int, prompt: str = "") -> Callable[[Webui], None]:
    """Prepares a webui that has a Failed job of so many days ago, by the ID `OLD_ID`."""

    def prepare(webui: Webui) -> None:
        job = {
            "id": OLD_ID,
            "type": "txt2img",
            "status": "Failed",
            "timestamp": int(time.time()) - days * 86400,
            "ip": None,
            "prompt": prompt,
            "started": None,
            "finished": None,
            "error": "no",
            "images": [],
            "bytes": 0,
        }
        (webui.data / "jobs.json").write_text(f'{{\n"{OLD_ID}": {json.dumps(job)}\n}}\n')

    return prepare


class Proxy:
    """A proxy in front of a webui. What it does with a connection is in `_serve`, which runs in a thread."""

    def __init__(self, webui: Webui):
        self.upstream = webui.port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._meet(client)

    def _meet(self, client: socket.socket) -> None:
        threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self._listener.close()


class Gate(os.PathLike):
    """Holds the generations that were given it as `hold`, until it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)

    def open(self) -> None:
        self.path.touch()


class Sent:
    """A request over a socket of its own, for a client that reads as little as it likes."""

    def __init__(self, port: int, data: bytes):
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS)
        self.socket.sendall(data)
        self.received = b""

    def read_until(self, end: bytes) -> None:
        while end not in self.received:
            data = self.socket.recv(65536)
            if not data:
                raise ConnectionError(f"the connection ended after {self.received[-300:]!r}")
            self.received += data

    def head(self) -> Tuple[int, Dict[str, str]]:
        """Status and headers, their names in small letters."""
        self.read_until(b"\r\n\r\n")
        first, *lines = self.received.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return int(first.split()[1]), {name.lower(): value for name, value in headers.items()}

    def job_id(self) -> str:
        status, headers = self.head()
        assert status == 200 and "x-job-id" in headers, self.received
        return headers["x-job-id"]

    def to_end(self) -> bytes:
        """Everything that came until the server closed the connection, as it came."""
        with contextlib.suppress(ConnectionError):
            while True:
                data = self.socket.recv(65536)
                if not data:
                    break
                self.received += data
        self.socket.close()
        return self.received

    def content(self) -> bytes:
        """The content of the response. Raises ConnectionError if it has no clean end."""
        self.to_end()
        head, _, rest = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        if length:
            if len(rest) != int(length.group(1)):
                raise ConnectionError("the content is cut")
            return rest
        content = b""
        while True:
            size, _, rest = rest.partition(b"\r\n")
            if not size or len(rest) < int(size, 16) + 2:
                raise ConnectionError("the content is cut")
            if int(size, 16) == 0:
                return content
            content += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]

    def leave(self, reset: bool = False) -> None:
        """Goes away, by FIN or by RST."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.socket.close()


class Webui:
    """One stand-in with its folders. They stay the same from start to start.

    `tracking` is "config" (config.json says on), "variable" (TRACKER_ENABLED does), or None (off, as shipped).
    `copies` is how many times Job Tracker is installed. `scripts` maps names of further extensions to the source of
    their script; they are loaded in the order of their names. `constants` are those of Job Tracker that have another
    value. `prepare` is called with this object before the start. `cold` starts a new Python, for tests that are about
    the start itself, or of the process's own umask or limits: else, where it can be, it is a fork of one that has
    imported the packages (forking.py).
    """

    alive: List[Webui] = []

    def __init__(
        self,
        folder: Path,
        *flags: str,
        tracking: Optional[str] = "config",
        environ: Optional[Dict[str, str]] = None,
        copies: int = 1,
        scripts: Optional[Dict[str, str]] = None,
        constants: Optional[Dict[str, float]] = None,
        step_time: float = 0.002,
        shape: str = SHAPE,
        cold: bool = False,
    ):
        self.flags = [*flags, "--shape", shape, "--step-time", str(step_time), "--data-dir", str(folder / "webui")]
        if shape == "sdnext":
            self.flags.append("--no-rate-limit")
        if SERVER == "httptools":
            self.flags.append("--httptools")
        self.environ = dict(environ or {})
        # Other variables than these may be for Python or a package at its import.
        is_ours = all(name.startswith(("TRACKER_", "AWS_")) or name == "HOME" for name in self.environ)
        self._is_forked = forking.IS_POSSIBLE and is_ours and not cold
        if tracking == "variable":
            self.environ["TRACKER_ENABLED"] = "1"
        self.folder = folder
        self.extension = folder / "webui" / "extensions" / "job-tracker"
        self.data = Path(self.environ.get("TRACKER_DATA_DIR", self.extension))
        self.log_path = folder / "webui.log"
        self.process: Union[subprocess.Popen[bytes], forking.ForkedProcess, None] = None
        self.port = 0
        self.client = new_client("http://127.0.0.1")
        self._log_start = 0
        self.gates: List[Gate] = []
        for number in range(copies):
            target = self.extension.with_name("job-tracker" + (f"-{number + 1}" if number else ""))
            self._install(target, tracking == "config")
        scripts = dict(scripts or {})
        if constants:
            scripts["a-constants"] = CONSTANTS.format(values=constants)
        for name, source in scripts.items():
            path = self.extension.with_name(name) / "scripts" / "script.py"
            path.parent.mkdir(parents=True)
            path.write_text(source, encoding="utf-8")

    @staticmethod
    def _install(target: Path, enabled: bool) -> None:
        # With what Python has made of it, which saves each first start as long as it takes to compile it.
        shutil.copytree(str(PROJECT / "scripts"), str(target / "scripts"))
        shutil.copy(str(PROJECT / "install.py"), str(target))
        if enabled:
            (target / "config.json").write_text('{"enabled": true, "retention_days": 30}')

    # The process

    def start(self) -> Webui:
        """Starts the process and waits until it serves and the extensions have been told that it does."""
        return self.launch().wait()

    def launch(self) -> Webui:
        """Starts the process without waiting, so that two can start side by side."""
        self.port = free_port()
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("TRACKER_", "AWS_"))}
        environ.update(self.environ)
        arguments = ["--port", str(self.port), *self.flags]
        with self.log_path.open("ab") as log:
            if self._is_forked:
                self.process = forking.fork_server.start(arguments, environ, self.log_path)
            else:
                self.process = subprocess.Popen(
                    [sys.executable, str(TESTS / "webui" / "launch.py"), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environ,
                )
        self.alive.append(self)
        self.client.close()
        self.client = new_client(self.url, auth=self.auth)
        return self

    def wait(self, times: int = 1) -> Webui:
        def serves() -> bool:
            assert self.process.poll() is None, "the webui ended:\n" + self.log
            return min(self.log.count("Running on local URL"), self.log.count("Startup time: ")) >= times

        until(serves, what="the webui serves")
        return self

    def kill(self) -> None:
        """Ends the process at once, as a crash would. Does nothing if it has ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._ended()

    def terminate(self, seconds: float = SECONDS) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(seconds)
        self._ended()
        return status

    def _ended(self) -> None:
        if self in self.alive:
            self.alive.remove(self)

    def restart(self) -> Webui:
        self.kill()
        return self.start()

    def reload_ui(self) -> None:
        """Reload UI, as the button of the webui does it; returns when it serves again."""
        times = self.log.count("Startup time: ")
        self.client.post("/standin/reload")
        self.wait(times + 1)

    @property
    def mode(self) -> str:
        return "nowebui" if "--nowebui" in self.flags else "ui"

    @property
    def pid(self) -> int:
        return self.process.pid

    # What it says and keeps

    @property
    def log(self) -> str:
        """What the process has said since its last start."""
        return self.log_since(self._log_start)

    def log_since(self, position: int) -> str:
        with self.log_path.open("rb") as file:
            file.seek(position)
            return file.read().decode("utf-8", "replace")

    def our_log(self) -> List[str]:
        """The lines of Job Tracker."""
        return [line for line in self.log.splitlines() if line.startswith("[Job Tracker] ")]

    def write_config(self, text: str) -> None:
        """Writes config.json at once, as an editor does: a webui that looks just then sees no half of it."""
        part = self.extension / "config.json.part"
        part.write_text(text)
        os.replace(str(part), str(self.extension / "config.json"))

    def records(self) -> Dict[str, Dict[str, Any]]:
        """jobs.json as everybody reads it, without those that were removed. One that meets a write reads again."""
        for _ in range(5):
            with contextlib.suppress(ValueError):
                return self._read_records()
        return self._read_records()

    def _read_records(self) -> Dict[str, Dict[str, Any]]:
        with (self.data / "jobs.json").open(encoding="utf-8") as file:
            return {job_id: record for job_id, record in json.load(file).items() if record is not None}

    def images(self) -> List[Path]:
        """All files below images/. Gives the webui a moment to remove the requests of jobs that are Completed."""

        def are_requests_gone() -> bool:
            left = [path.name[:8] for path in (self.data / "images").glob("*/*.request.json")]
            records = self.records() if left else {}
            return all(records.get(job_id, {}).get("status") != "Completed" for job_id in left)

        with contextlib.suppress(AssertionError, OSError, ValueError):  # they stay, or jobs.json cannot be read
            until(are_requests_gone, 3)
        return sorted(path for path in (self.data / "images").glob("**/*") if path.is_file())

    def is_idle(self) -> bool:
        """Whether no job waits or runs, by jobs.json."""
        return all(record["status"] in ("Completed", "Failed") for record in self.records().values())

    # Talking to it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def auth(self) -> Optional[Tuple[str, str]]:
        if "--api-auth" not in self.flags:
            return None
        user, password = self.flags[self.flags.index("--api-auth") + 1].split(",")[0].split(":")
        return user, password

    def gate(self) -> Gate:
        """It is opened at the end of the test, if not before."""
        self.gates.append(Gate(self.folder / f"gate-{os.urandom(4).hex()}"))
        return self.gates[-1]

    def post(self, data: Any, kind: str = "txt2img", **options: Any) -> httpx.Response:
        """A generation, from its request to the end of its answer."""
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return self.client.post(f"/sdapi/v1/{kind}", content=as_bytes(data), headers=headers, **options)

    def raw(self, data: Any, kind: str = "txt2img", headers: Optional[Dict[str, str]] = None) -> bytes:
        """The bytes of a generation request."""
        content = as_bytes(data)
        request = httpx.Request(
            "POST",
            f"{self.url}/sdapi/v1/{kind}",
            content=content,
            headers={"Content-Type": "application/json", "Connection": "close", **(headers or {})},
        )
        if self.auth and "authorization" not in request.headers:
            request = next(httpx.BasicAuth(*self.auth).auth_flow(request))
        lines = [f"POST /sdapi/v1/{kind} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + content

    def send(self, data: Any, kind: str = "txt2img", headers: Optional[Dict[str, str]] = None) -> Sent:
        """A generation request over a raw socket; reads nothing."""
        return Sent(self.port, self.raw(data, kind, headers))

    def send_get(self, path: str, headers: Optional[Dict[str, str]] = None) -> Sent:
        """A GET request over a raw socket; reads nothing."""
        fields = {"Host": "localhost", "Connection": "close", **(headers or {})}
        if self.auth:
            fields["Authorization"] = next(
                httpx.BasicAuth(*self.auth).auth_flow(httpx.Request("GET", self.url))
            ).headers["Authorization"]
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return Sent(self.port, "\r\n".join([*lines, "", ""]).encode())

    def job(self, job_id: str, wait: Optional[float] = None, images: bool = True) -> Dict[str, Any]:
        params = {"images": str(images).lower()}
        if wait is not None:
            params["wait"] = str(wait)
        response = self.client.get(f"/sdapi/v1/job/{job_id}", params=params)
        assert response.status_code == 200, response.text
        return response.json()

    def jobs(self, **filters: Any) -> List[Dict[str, Any]]:
        response = self.client.get("/sdapi/v1/jobs", params=filters)
        assert response.status_code == 200, response.text
        return response.json()

    def until_status(self, job_id: str, status: str) -> Dict[str, Any]:
        """Waits until a job has a status, and returns the job without its images."""

        def reached() -> Optional[Dict[str, Any]]:
            job = self.job(job_id, images=False)
            return job if job["status"] == status else None

        return until(reached, what=f"job {job_id} is {status}")


Start = Callable[..., Webui]


def submit(webui: Webui, *prompt: str, **fields: Any) -> str:
    """A request that does not wait for its job, which any webui on the folder may run. Gives the ID."""
    answer = webui.post(body(*prompt, **fields), headers=ASYNC)
    assert answer.status_code == 202, answer.text
    return answer.headers["x-job-id"]


def connect(webui: Webui, *prompt: str, **fields: Any) -> str:
    """A request that waits for its job at this webui, until its client leaves, which it does now. Gives the ID."""
    return webui.send(body(*prompt, **fields)).job_id()


def done(webui: Webui, *prompt: str, **fields: Any) -> str:
    """A Completed job."""
    job_id = submit(webui, *prompt, **fields)
    assert webui.job(job_id, wait=30)["status"] == "Completed"
    return job_id


def assert_cancelled(answer: httpx.Response) -> None:
    """An answer to a cancel: 200 with the end of the job, or 202 while another webui that has it does not notice."""
    told = (answer.status_code, answer.json()["status"])
    assert told in ((200, "Failed"), (202, "Processing"), (202, "Pending")), answer.text


def hold_the_queue(webui: Webui, **standin: Any) -> str:
    """A job that this webui runs until the latest gate is opened."""
    job_id = connect(webui, standin={"hold": webui.gate(), **standin})
    webui.until_status(job_id, "Processing")
    return job_id


def config_of(webui: Webui) -> Any:
    return json.loads((webui.extension / "config.json").read_text())


def strictly(text: Any) -> Any:
    """JSON that every parser takes."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def saved(webui: Webui) -> List[str]:
    """The images that the webui itself has kept, whatever we say."""
    return sorted(path.name for path in (webui.folder / "webui").glob("output*/**/*.png"))


def is_cut(sent: Sent) -> bool:
    try:
        sent.content()
    except ConnectionError:
        return True
    return False


def assert_tracks(webui: Webui) -> None:
    """It does all that it should."""
    response = webui.post(body())
    job = webui.job(response.headers["X-Job-ID"], wait=30)
    assert (job["status"], job["images"]) == ("Completed", response.json()["images"])
    until(webui.is_idle)
    assert job["id"] in webui.records()


def status_of(answer: bytes) -> int:
    """That of a response as it came."""
    return int(answer.split()[1])


class Page:
    """The tab's own way to the extension, without a browser."""

    def __init__(self, client: httpx.Client):
        self.client = client
        self.read()

    def read(self) -> None:
        """Which of the page's events are Job Tracker's, by the control that fires them. A Reload UI numbers anew."""
        config = self.client.get("/config").json()
        names = {one["id"]: one["props"].get("elem_id") or "" for one in config["components"]}
        self.events: Dict[str, int] = {}
        for number, event in enumerate(config["dependencies"]):
            target = (event["targets"] or [None])[0]
            name = names.get(target[0] if isinstance(target, list) else target, "")
            if name.startswith("job_tracker") and event["backend_fn"]:
                self.events[name] = event.get("id", number)

    def request(self, name: str, *data: Any) -> bytes:
        # The last input is the token, which a program does not need.
        data = [*data, ""]
        return json.dumps({"fn_index": self.events[name], "data": data, "session_hash": "x"}).encode()

    def call(self, name: str, *data: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return self.client.post("/run/predict", content=self.request(name, *data), headers=headers)

    def look(self, page: int = 0, job: str = "") -> str:
        """What the page shows, as HTML."""
        view = json.dumps({"page": page, "job": job})
        response = self.call("job_tracker_look", view, True, "", "All", "", "", "")
        assert response.status_code == 200, f"the tab answered {response.status_code}: {response.text[:200]}"
        return response.json()["data"][3]


@contextlib.contextmanager
def started(make_folder: Callable[[], Path]) -> Iterator[Callable[..., Webui]]:
    """Gives a function that starts a Webui, and ends all that it started."""
    mine: List[Webui] = []

    def start(
        *flags: str, prepare: Optional[Callable[[Webui], Any]] = None, wait: bool = True, **options: Any
    ) -> Webui:
        webui = Webui(make_folder(), *flags, **options)
        mine.append(webui)
        if prepare:
            prepare(webui)
        webui.launch()
        return webui.wait() if wait else webui

    try:
        yield start
    finally:
        for webui in mine:
            webui.kill()
            webui.client.close()


@atexit.register
def _kill_all() -> None:
    for webui in list(Webui.alive):
        webui.kill()
