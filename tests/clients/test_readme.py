"""README.md is true: each snippet and each example runs as it is, and what the text and the tables say is so."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Set

import httpx
import pytest
from inside import load_script
from programs import need
from readme import ADDRESS, EXAMPLES, OF_TESTS, README, Snippet, example, names, snippets, table

from harness import (
    HOST,
    MODE_FLAGS,
    MODES,
    PROJECT,
    RESET,
    SHAPE,
    TESTS,
    Gate,
    Proxy,
    Webui,
    body,
    free_port,
    new_client,
    submit,
    until,
)

FAILURE = {"seconds": 5, "fail": "OutOfMemoryError", "fail_after": 0.3}


# The webui, and a connection to it that breaks


class Breaking(Proxy):
    """A proxy in front of a webui. It breaks the first `times` connections with a POST, where `at` says so:
    "head" after the response's head, "body" within its images, "request" before any of it. After each, it refuses the
    next connection altogether.
    """

    def __init__(self, webui: Webui, at: str, times: int = 1):
        self.at, self.times = at, times
        self.broken, self.refused, self._refuse = 0, 0, False
        super().__init__(webui)

    def _meet(self, client: socket.socket) -> None:
        if not self._refuse:
            super()._meet(client)
            return
        self._refuse = False
        self.refused += 1
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        client.close()

    def _serve(self, client: socket.socket) -> None:
        webui = socket.create_connection(("127.0.0.1", self.upstream))
        with contextlib.suppress(OSError), client, webui:
            request = client.recv(65536)
            webui.sendall(request)
            cut = request.startswith(b"POST") and self.broken < self.times
            self.broken += cut
            threading.Thread(target=self._pass_on, args=(client, webui), daemon=True).start()
            answer = b""
            while True:
                data = webui.recv(4096)
                if not data:
                    return
                answer += data
                if not (cut and self.at == "request"):
                    client.sendall(data)
                if cut and (len(answer) > 8000 if self.at == "body" else b"\r\n\r\n" in answer):
                    self._refuse = True
                    client.shutdown(socket.SHUT_RDWR)
                    return

    @staticmethod
    def _pass_on(client: socket.socket, webui: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = client.recv(65536)
                if not data:
                    return
                webui.sendall(data)


@pytest.fixture
def breaking(site: Webui) -> Iterator[Callable[..., Breaking]]:
    made: List[Breaking] = []

    def make(*args: Any) -> Breaking:
        made.append(Breaking(site, *args))
        return made[-1]

    yield make
    for it in made:
        it.close()


@pytest.fixture(scope="module")
def site(start_shared: Callable[..., Webui]) -> Webui:
    """The webui that the snippets talk to."""
    webui = start_shared(*MODE_FLAGS[MODES[-1]], tracking="variable", step_time=0.01)
    assert webui.client.get("/sdapi/v1/jobs").status_code == 200, webui.log
    return webui


class Run:
    """Runs snippets in a folder of their own."""

    def __init__(self, site: Webui, folder: Path):
        self.site = site
        self.folder = folder
        self.known = set(site.records())

    def new_jobs(self) -> Set[str]:
        return set(self.site.records()) - self.known

    def new_job(self) -> Dict[str, Any]:
        """The one job that came of it, when it has ended."""
        (job_id,) = self.new_jobs()
        return self.site.job(job_id, wait=30)

    def start(self, language: str, text: str, url: Optional[str] = None, **options: Any) -> subprocess.Popen[bytes]:
        """Starts a program that is to talk to `url` instead of the address in README.md."""
        text = text.replace(ADDRESS, url or self.site.url)
        if language == "bash":
            for program in ("curl", "flock", "jq", "rsync"):
                need(program if f"{program} " in text else "bash")
            command = [need("bash"), "-euo", "pipefail", "-c", text]
        elif language == "python":
            self.write("snippet.py", text)
            command = [sys.executable, "snippet.py"]
        else:
            node = need("node")
            version = subprocess.run([node, "--version"], stdout=subprocess.PIPE).stdout.decode().strip()
            if int(version[1:].split(".")[0]) < 18:
                pytest.skip(f"node {version} has no fetch")
            self.write("snippet.mjs", text)
            command = [node, "snippet.mjs"]
        environ = {**os.environ, "NO_PROXY": "*", **options.pop("env", {})}
        options = {"cwd": str(self.folder), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(command, env=environ, **options)

    def finish(self, process: subprocess.Popen[bytes], status: int = 0) -> str:
        """Waits for its end, and returns what it printed; or, where it is to fail, what it complained."""
        output, errors = process.communicate(timeout=60)
        assert process.returncode == status, (output + errors).decode()
        return (errors if status else output).decode()

    def run(self, language: str, text: str, url: Optional[str] = None, status: int = 0, **options: Any) -> str:
        return self.finish(self.start(language, text, url, **options), status)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def exists(self, name: str) -> bool:
        path = self.folder / name
        return path.exists() and path.stat().st_size > 0

    def busy(self) -> Gate:
        """Makes the queue wait until the gate that this returns is opened."""
        gate = self.site.gate()
        job_id = self.site.send(body(standin={"hold": gate})).job_id()
        self.site.until_status(job_id, "Processing")
        self.known.add(job_id)
        return gate

    def settings(self, environ: Dict[str, str]) -> Any:
        """What the extension makes of variables."""
        folder = self.folder / "settings"
        folder.mkdir(exist_ok=True)
        return load_script().Settings(str(folder), environ)


@pytest.fixture
def run(site: Webui, tmp_path: Path) -> Run:
    until(site.is_idle)
    return Run(site, tmp_path)


def decoded(job: Dict[str, Any]) -> List[bytes]:
    return [base64.b64decode(image) for image in job["images"]]


# The snippets and the examples: what each is to bring about

Check = Callable[..., None]
CHECKS: Dict[str, Check] = {}
CHECKS_OF_EXAMPLES: Dict[str, Check] = {}


def snippet_with(mark: str) -> Callable[[Check], Check]:
    """The check for the snippet that has this text. It is called with the run, the snippet and pytest's request."""

    def register(function: Check) -> Check:
        CHECKS[mark] = function
        return function

    return register


def example_in(file: str) -> Callable[[Check], Check]:
    """The check for the example in this file. It is called with the run, the file's name and pytest's request."""

    def register(function: Check) -> Check:
        CHECKS_OF_EXAMPLES[file] = function
        return function

    return register


FILES = sorted(it.relative_to(EXAMPLES).as_posix() for it in EXAMPLES.glob("**/*.*") if it.suffix != ".pyc")
RUN_ELSEWHERE = {  # and by which test
    "fleet/compose.yaml": "fleet/test_deployment.py",
    "fleet/nginx.conf": "fleet/test_deployment.py",
    "live.html": "browser/test_live.py",
    "receiver.mjs": "clients/test_receivers.py",
    "receiver.py": "clients/test_receivers.py",
}


@pytest.mark.parametrize("file", [file for file in FILES if file not in RUN_ELSEWHERE])
def test_example(file: str, request: pytest.FixtureRequest) -> None:
    CHECKS_OF_EXAMPLES[file](request.getfixturevalue("run"), file, request)


def test_each_example_is_shown_and_has_a_test() -> None:
    assert set(FILES) == {*CHECKS_OF_EXAMPLES, *RUN_ELSEWHERE}
    assert all((TESTS / test).exists() for test in RUN_ELSEWHERE.values())
    assert all(file.rpartition("/")[2] in README for file in FILES)


@pytest.mark.parametrize("snippet", snippets(), ids=lambda it: f"line{it.line}-{it.language}")
def test_snippet(snippet: Snippet, request: pytest.FixtureRequest) -> None:
    checks = [check for mark, check in CHECKS.items() if mark in snippet.text]
    assert len(checks) == 1, f"{len(checks)} checks are for the snippet in line {snippet.line}"
    checks[0](request.getfixturevalue("run"), snippet, request)


@snippet_with("python3 tests/run.py demo")
def check_commands(run, snippet, request):
    if Path(sys.prefix) != PROJECT / ".venv" / f"{HOST}-{sys.version_info[0]}.{sys.version_info[1]}":
        pytest.skip("only where run.py has made the environment, which it might make anew otherwise")
    more = {"demo": ["--once"], "test": ["--collect-only", "-q", "tests/clients/test_readme.py"]}
    for line in snippet.text.splitlines():
        program, *words = shlex.split(line)
        assert program == "python3"
        command = [sys.executable, *words, "--host", HOST, *more.pop(words[-1])]
        done = subprocess.run(command, cwd=str(PROJECT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        assert done.returncode == 0, done.stdout.decode()
    assert not more


@snippet_with("git clone")
def check_clone(run, snippet, request):
    need("git")
    if not (PROJECT / ".git").exists():
        pytest.skip("this is no clone")
    (run.folder / "stable-diffusion-webui" / "extensions").mkdir(parents=True)
    assert snippet.text.count("ADDRESS_OF_THIS_REPOSITORY") == 1
    run.run("bash", snippet.text.replace("ADDRESS_OF_THIS_REPOSITORY", shlex.quote(str(PROJECT))))
    assert run.exists("stable-diffusion-webui/extensions/job-tracker/scripts/job_tracker.py")


@snippet_with("x-job-id: A3f9K2xY ")
def check_first_screen(run, snippet, request):
    """What is typed, of which the second line has the ID that the first shows."""
    first, second = [line[2:] for line in snippet.text.splitlines() if line.startswith("$ ")]
    head = run.run("bash", first).replace("\r", "").partition("\n\n")[0]
    job = run.new_job()
    assert f"\nx-job-id: {job['id']}\n" in head
    answer = json.loads(run.run("bash", second.replace("A3f9K2xY", job["id"])))
    assert answer == job and job["status"] == "Completed" and decoded(job)[0].startswith(b"\x89PNG")


@snippet_with('write_text(response.headers["X-Job-ID"])')
def check_stored_id(run, snippet, request):
    gate = run.busy()
    process = run.start(snippet.language, snippet.text)
    until(lambda: process.poll() is not None or run.exists("job-id.txt"))
    assert run.exists("job-id.txt"), run.finish(process)
    assert run.site.job(run.read("job-id.txt").decode())["status"] == "Pending"
    gate.open()
    run.finish(process)
    job = run.new_job()
    assert run.read("job-id.txt").decode() == job["id"]
    assert [run.read("lighthouse.png")] == decoded(job)


@example_in("recover.py")
def check_recovery(run, file, request):
    program = example(file)
    breaking = request.getfixturevalue("breaking")

    def saved() -> List[bytes]:
        return [run.read(f"lighthouse-{number}.png") for number in range(2)]

    for at in ("head", "body"):
        proxy = breaking(at)
        run.known |= run.new_jobs()
        gate = run.busy()
        process = run.start("python", program, proxy.url)
        if at == "head":
            until(lambda proxy=proxy: proxy.refused, what="the program asks for its job")
        gate.open()
        run.finish(process)
        assert (proxy.broken, proxy.refused) == (1, 1)
        job = run.new_job()
        assert saved() == decoded(job) and len(job["images"]) == 2

    run.run("python", program)  # and without any trouble
    job = run.site.jobs(limit=1)[0]
    assert saved() == decoded(run.site.job(job["id"]))

    failing = program.replace('"steps": 20', f'"steps": 20, "alwayson_scripts": {wish(FAILURE)}')
    assert failing != program
    assert "RuntimeError: OutOfMemoryError" in run.run("python", failing, status=1)
    run.known |= run.new_jobs()
    proxy = breaking("request")
    assert "ConnectionError" in run.run("python", program, proxy.url, status=1)
    assert run.new_job()["status"] == "Completed", "what the client cannot know of is kept"


def wish(standin: Dict[str, Any]) -> str:
    return json.dumps({"Stand-in": {"args": [standin]}})


def check_retry_client(run, file, language, prefix, imports=""):
    """As the lines at its top show it."""
    text = example(file)
    run.write(file, text)
    use = "\n".join(line[len(prefix) :] for line in text.splitlines()[2:5])
    run.run(language, imports + use)
    assert [run.read("lighthouse.png")] == decoded(run.new_job())


@example_in("retry.py")
def check_retry_py(run, file, request):
    check_retry_client(run, file, "python", "    ", "import base64\n")


@example_in("retry.mjs")
def check_retry_mjs(run, file, request):
    check_retry_client(run, file, "javascript", "//     ", 'import fs from "node:fs";\n')


@example_in("retry.sh")
def check_retry_sh(run, file, request):
    check_retry_client(run, file, "bash", "#     ")


@snippet_with("Prefer: respond-async' -d")
def check_fire_and_forget(run, snippet, request):
    run.write("retry.sh", example("retry.sh"))
    assert run.run("bash", snippet.text).strip() == "Completed"
    image = run.read("lighthouse.png")
    assert image.startswith(b"\x89PNG") and struct.unpack(">II", image[16:24]) == (512, 512)
    until(lambda: not run.new_jobs(), what="the job is deleted")

    gate = run.busy()
    head = run.site.post(body(), headers={"Prefer": "respond-async"})
    assert head.status_code == 202 and head.json()["status"] == "Pending", "at once"
    gate.open()


@example_in("retry_failed.sh")
def check_retry(run, file, request):
    for job in run.site.jobs(status="failed", limit=1000):
        run.site.client.delete(f"/sdapi/v1/job/{job['id']}")
    gate = run.busy()
    jobs = [submit(run.site, "once more") for _ in range(52)]  # more than a list has without a limit
    assert run.site.client.post("/sdapi/v1/jobs/cancel", json={"q": "once more"}).json() == {"jobs": len(jobs)}
    gate.open()
    printed = [line.split(" repeats ") for line in run.run("bash", example(file)).splitlines()]
    assert [old for _, old in printed] == jobs, "all of them, in their order"
    assert {run.site.job(new, wait=30)["status"] for new, _ in printed} == {"Completed"}
    assert run.new_jobs() == {*jobs, *(new for new, _ in printed)}
    run.known |= run.new_jobs()


def test_docker(run):
    (line,) = re.findall(r"`(docker run .*?)`", README, re.DOTALL)
    program, command, *words = shlex.split(line)
    assert (program, command, words[-1]) == ("docker", "run", "YOUR_WEBUI_IMAGE")
    options = list(zip(words[:-1:2], words[1:-1:2]))
    check_container(run, [value for name, value in options if name == "-e"], dict(options)["-v"])


@snippet_with("export TRACKER_STORE")
def check_fleet(run, snippet, request):
    run.write("webui-user.sh", snippet.text)
    names = ("TRACKER_STORE", "TRACKER_IMAGES", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
    show = f"import json, os; print(json.dumps({{it: os.environ[it] for it in {names}}}))"
    seen = json.loads(run.run("bash", f"source ./webui-user.sh; {shlex.quote(sys.executable)} -c {shlex.quote(show)}"))
    assert all(seen.values()) and {"store_url", "images_url"} <= set(run.settings(seen).locked)


def check_container(run, variables, volume):
    settings = run.settings(dict(variable.split("=", 1) for variable in variables))
    assert settings.enabled
    assert settings.data_folder == os.path.abspath(volume.split(":")[1]), "the data is on the volume"


@example_in("read_jobs.sh")
def check_read_jobs(run, file, request):
    site = run.site
    site.post(body("a Lighthouse, for jq"))
    sent = site.send(body("to fail, for jq", standin=FAILURE))
    sent.to_end()
    until(site.is_idle)
    removed = site.post(body()).headers["x-job-id"]
    site.job(removed, wait=30)
    assert site.client.delete(f"/sdapi/v1/job/{removed}").status_code == 204
    records = site.records().values()
    failed = [f"{it['id']}  {it['error']}" for it in records if it["status"] == "Failed"]
    images = [image for it in records if "lighthouse" in it["prompt"].lower() for image in it["images"]]
    assert failed and images
    clients = [f"{count}  {ip}" for ip, count in sorted(Counter(it["ip"] for it in records).items())]
    lines = run.run("bash", example(file), cwd=str(site.data), env={"HOME": str(run.folder)}).splitlines()
    assert lines == [*failed, *clients, *images]
    assert all((site.data / "images" / image).is_file() for image in images)


@snippet_with("job-tracker-backup")
def check_backup(run, snippet, request):
    job_id = run.site.post(body("worth a backup")).headers["x-job-id"]
    job = run.site.job(job_id, wait=30)
    run.run("bash", snippet.text, cwd=str(run.site.data), env={"HOME": str(run.folder)})
    environ = {"TRACKER_DATA_DIR": str(run.folder / "job-tracker-backup")}
    webui = request.getfixturevalue("start")(*MODE_FLAGS[MODES[-1]], environ=environ)
    assert webui.job(job_id) == job and job["status"] == "Completed"
    assert not any("damaged" in line for line in webui.our_log())


def test_nginx(run):
    """With the setting that the text names, and with all defaults, also by its old protocol, HTTP/1.0."""
    nginx = need("nginx")
    (setting,) = re.findall(r"`(proxy_buffering .*?)`", README)
    locations = {
        free_port(): f"location / {{ proxy_pass {ADDRESS}; proxy_http_version 1.1; {setting} }}",
        free_port(): f"location / {{ proxy_pass {ADDRESS}; proxy_http_version 1.1; }}",
        free_port(): f"location / {{ proxy_pass {ADDRESS}; proxy_http_version 1.0; }}",
    }
    folder = run.folder
    servers = "".join(f"server {{ listen 127.0.0.1:{port}; {text} }}\n" for port, text in locations.items())
    paths = "".join(f"{it}_temp_path {folder};\n" for it in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;\n" if hasattr(os, "geteuid") and os.geteuid() == 0 else ""
    run.write(
        "nginx.conf",
        f"{user}daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; worker_processes 1;\n"
        f"events {{}}\nhttp {{ access_log off;\n{paths}{servers.replace(ADDRESS, run.site.url)}}}\n",
    )
    process = subprocess.Popen([nginx, "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL)
    try:
        for port in locations:
            until(lambda port=port: process.poll() is not None or is_open(port), what="nginx serves")
            assert process.poll() is None, (folder / "error.log").read_text()
            check_proxy(run, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(10)


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def check_proxy(run, url):
    gate = run.busy()
    with new_client(url, timeout=30) as client:
        with client.stream("POST", "/sdapi/v1/txt2img", json=body()) as response:
            job_id = response.headers["x-job-id"]
            assert run.site.job(job_id)["status"] == "Pending", "the head comes at once"
            gate.open()
            answer = json.loads(response.read())
        assert answer["images"] == run.site.job(job_id, wait=30)["images"]
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/sdapi/v1/txt2img", json=body(standin=FAILURE))


# The tables


def test_what_you_have_now(run):
    """Each line of the first table does what it is to do."""
    site, rows = run.site, [names(cell) for _, cell in table("get the images after all")]
    run.write("request.json", json.dumps(body("for the table")))
    failed = site.send(body("to fail", standin=FAILURE)).job_id()
    completed = site.post(body()).headers["x-job-id"]
    assert site.job(failed, wait=30)["status"] == "Failed"

    def call(line: str, job_id: str = "") -> str:
        line = line.replace("A3f9K2xY", job_id).replace("curl ", "curl -sSf ")
        return run.run("bash", f"API={ADDRESS}/sdapi/v1; {line}")

    recover, hand_in, key, retry, cancel, webhook, watch, see, fleet = rows
    assert json.loads(call(*recover, completed)) == site.job(completed)
    assert json.loads(call(*hand_in))["prompt"] == "for the table"
    assert len({json.loads(call(f"{hand_in[0]} {key[0]}"))["id"] for _ in range(2)}) == 1
    assert json.loads(call(*retry, failed))["retry_of"] == failed
    gate = run.busy()
    assert json.loads(call(*cancel, submit(site)))["error"] == "Cancelled"
    gate.open()
    assert webhook[0].startswith("-H 'X-Job-Webhook: https://") and webhook[1:] == ["TRACKER_WEBHOOK_URL"]
    assert "event: status" in call(*watch, completed)
    assert failed in [job["id"] for job in json.loads(call(see[0]))] and "oldest_pending" in json.loads(call(see[1]))
    assert [word.partition("=")[0] for word in fleet[0].split()] == ["TRACKER_STORE", "TRACKER_IMAGES"]


def test_endpoints(site):
    schema = site.client.get("/openapi.json").json()
    there = {
        f"{method.upper()} {path}": {it["name"] for it in operation.get("parameters", []) if it["in"] == "query"}
        for path, methods in schema["paths"].items()
        if path.startswith("/sdapi/v1/job")
        for method, operation in methods.items()
    }
    rows = {names(cell)[0]: cell + text for cell, text in table("GET /sdapi/v1/job/")}
    assert set(rows) == set(there)
    for endpoint, parameters in there.items():
        for parameter in parameters - {"cursor"}:  # comes from the header Link
            assert re.search(rf"`{parameter}\b", rows[endpoint]), (endpoint, parameter)


def test_fields_of_a_job(site):
    job_id = site.post(body()).headers["x-job-id"]
    job = site.job(job_id, wait=30)
    fields = {name: text for cell, text in table("`id`") for name in names(cell)}
    assert set(fields) == set(job)
    assert set(fields) - set(site.jobs(limit=1)[0]) == {"images"} and "Not in lists" in fields["images"]
    assert type(job["timestamp"]) is int


def test_statuses():
    assert tuple(names(cell)[0] for cell, _ in table("`Pending`")) == load_script().STATUSES


def test_variables(tmp_path):
    settings = load_script().Settings
    rows = {names(cell)[0]: names(text) for cell, text in table("TRACKER_ENABLED")}
    for variable, values in rows.items():
        for value in values if variable != "TRACKER_DATA_DIR" else []:
            read = settings(str(tmp_path), {variable: value if "://" in value else value.upper()})
            assert list(read.locked.values()) == [variable], f"{variable}={value}"
    truths = [settings(str(tmp_path), {"TRACKER_ENABLED": value}).enabled for value in rows["TRACKER_ENABLED"]]
    assert truths == [True] * 4 + [False] * 4
    assert [settings(str(tmp_path), {"TRACKER_RETENTION": it}).retention_days for it in ("0", "off")] == [None, None]
    data = settings(str(tmp_path), {"TRACKER_DATA_DIR": str(tmp_path / "data")}).data_folder
    assert data == str(tmp_path / "data")
    assert set(rows) == set(re.findall(r"TRACKER_[A-Z_]+", README))


def test_first_settings(start):
    webui = start(*MODE_FLAGS[MODES[-1]], tracking=None)
    (printed,) = re.findall(r'`(\{"enabled": .*?\})`', README)
    assert json.loads((webui.extension / "config.json").read_text()) == json.loads(printed)
    line = "[Job Tracker] Ready, tracking is off, jobs are in "
    assert line in README and any(it.startswith(line) for it in webui.our_log())


def test_files(site):
    """Nothing lies in the extension's folder that the table does not name."""
    site.post(body())
    until(site.is_idle)
    shipped = {"scripts", "install.py"}
    patterns = [name for cell, _ in table("`config.json`") for name in names(cell)]
    forms = [re.escape(it).replace(r"\*", ".+").replace("<n>_<id>", r"\w+") for it in patterns]
    forms = [re.sub(r"<\w+>", r"[\\w-]+", form) for form in forms]
    for path in site.data.glob("**/*"):
        name = path.relative_to(site.data).as_posix()
        if path.is_file() and name.split("/")[0] not in shipped:
            assert any(re.match(form + r"\Z", name) for form in forms), name
            if name == "jobs.json.lock":
                assert path.stat().st_size == 0
    if shutil.which("git") and (PROJECT / ".git").exists():
        examples = [re.sub(r"<\w+>", "1", it).replace("*", "jobs.json") for it in patterns]
        command = ["git", "check-ignore", "--no-index", *examples]
        ignored = subprocess.run(command, cwd=str(PROJECT), stdout=subprocess.PIPE).stdout.decode().split()
        assert set(ignored) == set(examples), "the webui's update leaves them alone"


# What else the text says


def test_failure_over_http_1_0(run):
    request = shlex.quote(json.dumps(body(standin=FAILURE)))
    rest = f"-sS -H 'Content-Type: application/json' -d {request} {ADDRESS}/sdapi/v1/txt2img"
    assert "reset" in run.run("bash", f"curl --http1.0 {rest}", status=56)


def test_unmodified_clients(start):
    """config.json is noticed within five seconds, and then the answer is what it was before, but for what is said."""
    webui = start(*MODE_FLAGS[MODES[-1]], tracking=None)
    before = webui.post(body())
    assert "x-job-id" not in before.headers
    webui.write_config('{"enabled": true, "retention_days": 30}')
    after = until(lambda: (lambda it: it if "x-job-id" in it.headers else None)(webui.post(body())), 5.5)
    assert (after.status_code, after.headers["content-type"]) == (before.status_code, before.headers["content-type"])
    assert "content-length" in before.headers and "content-length" not in after.headers
    old, new = before.json(), after.json()
    assert list(new) == list(old) and new["images"] == old["images"]
    changed = {name for name in old["parameters"] if old["parameters"][name] != new["parameters"][name]}
    assert changed == (set() if SHAPE == "sdnext" else {"force_task_id"})
    assert changed == set() or new["parameters"]["force_task_id"] == after.headers["x-job-id"]


def test_heartbeat_of_15_seconds():
    assert load_script().HEARTBEAT == 15 and "15 seconds" in README


def test_interrupted_by_the_webui(site):
    sent = site.send(body(standin={"seconds": 20}))
    job_id = sent.job_id()
    site.until_status(job_id, "Processing")
    until(lambda: site.client.get("/sdapi/v1/progress").json()["state"]["sampling_steps"])
    assert site.client.post("/sdapi/v1/interrupt").is_success
    assert site.job(job_id, wait=15)["status"] == "Completed"


@pytest.mark.skipif(SHAPE != "a1111", reason="only A1111 has --api-log")
@pytest.mark.parametrize("mode", MODES)
def test_what_the_webui_logs_is_about_the_head(start, mode):
    webui = start(*MODE_FLAGS[mode], "--api-log")
    times = []
    failing = {"seconds": 5, "fail": "ValueError", "fail_after": 1.5}
    for wishes, ending in (({"seconds": 1.5}, "Completed"), (failing, "Failed")):
        sent = webui.send(body(standin=wishes))
        sent.to_end()
        status, headers = sent.head()
        job = webui.job(headers["x-job-id"], wait=30)
        assert (status, job["status"]) == (200, ending)
        times.append(headers["x-process-time"])
        assert float(times[-1]) < job["finished"] - job["started"] - 0.5
    lines = [line.split() for line in webui.log.splitlines() if line.startswith("API ") and "/txt2img" in line]
    assert [(line[1], line[-1]) for line in lines] == [("200", time) for time in times]


def test_no_room_for_a_job(start, tmp_path):
    (tmp_path / "file").write_text("")
    environ = {"TRACKER_DATA_DIR": str(tmp_path / "file" / "below")}
    webui = start(*MODE_FLAGS[MODES[-1]], tracking="variable", environ=environ)
    answer = webui.post(body())
    assert answer.status_code == 200 and len(answer.json()["images"]) == 1
    assert "x-job-id" not in answer.headers
    assert any("not tracked" in line for line in webui.our_log())


def test_address_of_the_client(site):
    """As the section on security has it: uvicorn believes its own machine."""
    answer = site.post(body(), headers={"X-Forwarded-For": "203.0.113.9"})
    assert site.job(answer.headers["x-job-id"])["ip"] == "203.0.113.9"


def test_no_password_on_disk(guarded):
    guarded.post(body(), headers={"Idempotency-Key": "with credentials"})
    until(guarded.is_idle)
    files = [guarded.data / "jobs.json", *guarded.images()]
    assert len(files) >= 3
    for path in files:
        data = path.read_bytes()
        assert b"secret" not in data and base64.b64encode(b"user:secret") not in data, path


def test_another_layout_of_jobs_json(start):
    webui = start(*MODE_FLAGS[MODES[-1]])
    job_id = webui.post(body()).headers["x-job-id"]
    job = webui.job(job_id, wait=30)
    webui.kill()
    path = webui.data / "jobs.json"
    path.write_text(json.dumps(webui.records(), indent=2))
    webui.start()
    assert webui.job(job_id) == job
    assert not list(webui.data.glob("*.damaged-*"))


# The text itself


# The headings that the table of contents leaves out
UNLISTED = {"reference", "operating", "licence"} | {
    "keep-the-id-and-come-back",
    "fire-and-forget",
    "retry-without-paying-twice",
    "watch-a-job-live",
    "receive-webhooks",
}


def anchors(text: str) -> List[str]:
    """The names of its headings, as GitHub makes them for links."""
    headings = re.findall(r"^##+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("text, folder", [(README, PROJECT), (OF_TESTS, TESTS)], ids=["README.md", "tests/README.md"])
def test_links(text, folder):
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert not file or (folder / file).exists(), target
        there = (folder / file).read_text(encoding="utf-8") if file.endswith(".md") else text
        assert not anchor or anchor in anchors(there), target


def test_plain_text():
    page, receiver = "http://127.0.0.1:8000", "http://127.0.0.1:9000"  # that shows a job live, and of webhooks
    hook, s3 = "https://example.com", "https://s3.example"
    assert set(re.findall(r"https?://[\w.:-]+", README)) == {ADDRESS, page, receiver, hook, s3}
    for text in (README, OF_TESTS):
        assert text.isascii()
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        too_long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
        assert not too_long


def test_it_is_read_to_its_end():
    assert README.count("\n") <= 550
    contents = re.search(r"^\*\*Contents:\*\*.*?\n\n", README, re.MULTILINE | re.DOTALL).group()
    targets = re.findall(r"\]\(#([^)]+)\)", contents)
    assert targets == [it for it in anchors(README) if it in targets], "in their order"
    assert set(anchors(README)) - set(targets) == UNLISTED
