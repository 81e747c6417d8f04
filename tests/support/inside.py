"""The extension's script inside a test's or tool's own process, without a webui."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import types
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional
from unittest import mock

import fastapi
import httpx
from pydantic import BaseModel

from harness import until as until

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "job_tracker.py"
JQ = shutil.which("jq")
WORDS = (
    "castle river photo lighthouse golden hour intricate portrait forest mist snow Ärger Straße 猫 film grain".split()
)


def load_script() -> Any:
    """Executes the script as a webui does, each time anew."""
    spec = importlib.util.spec_from_file_location("job_tracker.py", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_prompt(dice: random.Random, length: int = 100) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(length // 6))[:length]


def a_job(script: Any, dice: random.Random, **fields: Any) -> Any:
    """A Pending job."""
    values: Dict[str, Any] = {
        "id": "".join(dice.choice(script.ID_ALPHABET) for _ in range(8)),
        "type": dice.choice(script.TYPES),
        "status": "Pending",
        "timestamp": 1736712000 + dice.randrange(100000),
        "ip": f"10.0.0.{dice.randrange(20)}",
        "prompt": a_prompt(dice),
    }
    return script.Job(**{**values, **fields})


def completed(job: Any, images: int = 1) -> Any:
    script = type(job).ended.fget.__globals__  # the job's own
    day = script["ImageStore"].day_of(job)
    return job._replace(
        status="Completed",
        started=job.timestamp + 0.5,
        finished=job.timestamp + 3.25,
        images=tuple(script["Image"](f"{day}/{job.id}_{n}.png", 1000, "image/png") for n in range(images)),
        bytes=1000 * images,
    )


def read_jobs(path: Path) -> Dict[str, Optional[Dict[str, Any]]]:
    """jobs.json as everybody reads it. Fails unless it is valid JSON, for jq too where there is one."""
    data = path.read_bytes()
    jobs = json.loads(data.decode())
    assert isinstance(jobs, dict)
    if JQ:
        seen = subprocess.run([JQ, "-c", "."], input=data, stdout=subprocess.PIPE, check=True).stdout
        assert json.loads(seen.decode()).keys() == jobs.keys()
    return jobs


def alive(path: Path) -> Dict[str, Dict[str, Any]]:
    return {job_id: record for job_id, record in read_jobs(path).items() if record is not None}


class NoHost:
    """What a tracker asks the webui, where there is none."""

    def begun(self) -> None:
        pass

    def progress(self, begun: None) -> None:
        pass

    def counted_seconds(self, seconds: float) -> float:
        return seconds

    def is_ready(self) -> bool:
        return True

    def hides_failures(self) -> bool:
        return False

    def has_previews(self) -> bool:
        return False

    def preview(self, begun: None, last: None) -> None:
        pass

    def interrupt(self) -> None:
        pass

    def dequeue(self, task: Optional[str]) -> None:
        pass


class WrappedOs:
    """Stands for the module `os` in the script, some of whose functions are others."""

    def __init__(self, **functions: Any):
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class WrappedFcntl(WrappedOs):
    """The same for `fcntl`."""

    def __getattr__(self, name: str) -> Any:
        import fcntl  # which Windows has not

        return getattr(fcntl, name)


def set_constants(script: Any, **values: Any) -> None:
    """Gives constants of the script other values, wherever in it they stand."""
    places = [script, *(one for one in vars(script).values() if getattr(one, "__module__", "") == script.__name__)]
    for name, value in values.items():
        owners = [place for place in places if name in vars(place)]
        assert owners, f"the script has no constant {name}"
        for owner in owners:
            setattr(owner, name, value)


def make_tracker(script: Any, folder: Path, **environ: str) -> Any:
    """A tracker without a webui, and with a housekeeper."""
    settings = script.Settings(str(folder), environ)
    predecessor = script.Predecessor(settings.folder, settings.data_folder)
    predecessor.merge_jobs()
    store, images = script.open_stores(settings, predecessor.refuse_to_open)
    tracker = script.Tracker(settings, NoHost(), store, images)
    tracker.housekeeper = script.Housekeeper(tracker, predecessor)
    return tracker


class GenerationRequest(BaseModel):
    prompt: str = ""
    send_images: bool = True
    force_task_id: Optional[str] = None


class SmallWebui:
    """A webui of a few lines in the test's own process, with the extension in it, for what no stand-in does.

        with SmallWebui(script, tmp_path) as webui:
            webui.generate = lambda request: {"images": [], "parameters": {}, "info": ""}
            answer = await webui.post({"prompt": "a cat"})

    Each answer is there only when the extension has done all that it does for the request.
    """

    def __init__(self, script: Any, folder: Path, **environ: str):
        self.script = script
        self.generate: Callable[[GenerationRequest], Any] = lambda request: {"images": []}
        self.queue_lock = threading.Lock()
        self.app = fastapi.FastAPI()
        for type_ in script.TYPES:
            self.app.add_api_route(f"/sdapi/v1/{type_}", getattr(self, type_), methods=["POST"])
        environ = {"TRACKER_ENABLED": "1", "TRACKER_RETENTION": "off", **environ}
        with mock.patch.dict(os.environ, environ), mock.patch.object(script, "EXTENSION_FOLDER", str(folder)):
            self.extension = script.Extension()
        self.tracker = self.extension.tracker

    def __enter__(self) -> SmallWebui:
        package, shared = types.ModuleType("modules"), types.ModuleType("modules.shared")
        shared.state = types.SimpleNamespace(time_start=None, job_count=0, job_no=0, sampling_steps=0, interrupt=int)
        package.shared = shared
        sys.modules.update({"modules": package, "modules.shared": shared})
        self.extension.app_started(None, self.app)
        return self

    def __exit__(self, *_: Any) -> None:
        self.tracker.close().result(60)
        for name in ("modules", "modules.shared"):  # which are those of another by now, if there is one
            sys.modules.pop(name, None)

    def add_api_route(self, path: str, endpoint: Any, **options: Any) -> None:
        self.app.add_api_route(path, endpoint, **options)

    def txt2img(self, request: GenerationRequest) -> Any:
        with self.queue_lock:
            answer = self.generate(request)
        return fastapi.Response(
            answer if isinstance(answer, bytes) else json.dumps(answer), media_type="application/json"
        )

    def img2img(self, request: GenerationRequest) -> Any:
        return self.txt2img(request)

    async def post(self, data: Any, headers: Optional[Dict[str, str]] = None) -> httpx.Response:
        async with self._client() as client:
            return await client.post("/sdapi/v1/txt2img", json=data, headers=headers)

    async def get(self, path: str, method: str = "GET", **options: Any) -> httpx.Response:
        async with self._client() as client:
            return await client.request(method, f"/sdapi/v1/{path}", **options)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://webui", timeout=60)

    async def send(self, path: str, send: Callable[[Any], Any]) -> None:
        """A GET request whose client takes each message as it likes."""

        async def receive() -> Any:
            await asyncio.get_running_loop().create_future()

        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": "GET",
            "path": f"/sdapi/v1/{path}",
            "raw_path": f"/sdapi/v1/{path}".encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"webui")],
            "client": ("::1", 1),
            "server": ("::1", 80),
        }
        await self.app(scope, receive, send)

    def jobs(self, **filters: Any) -> List[Any]:
        """All jobs that match, as the store has them, newest first."""
        return self.tracker.store.query(self.script.Filter(**filters), 1000).jobs


def when_ended(tracker: Any, job_id: str) -> Any:
    """A job as everybody sees it once its end is on disk."""

    def ended() -> Any:
        job = tracker.get(job_id)
        return job if job.ended else None

    return until(ended, what=f"the end of {job_id} is on disk")


def pixels(job_id: str, number: int, size: int = 0) -> bytes:
    """The picture that a job of these tests has: always the same."""
    seed = hashlib.sha256(f"{job_id} {number}".encode()).digest()
    return b"\x89PNG\r\n\x1a\n" + seed * ((size or 100 + seed[0] * 200) // 32)


def an_answer(script: Any, job_id: str, images: int) -> Any:
    """What the host would have answered for it."""
    rest = json.dumps({"images": [], "parameters": {"prompt": job_id}, "info": "{}"}).encode()
    return script.Answer([base64.b64encode(pixels(job_id, number)) for number in range(images)], rest)


def files_are_whole(tracker: Any, job: Any) -> bool:
    """Whether a Completed job has all its files, byte for byte."""
    try:
        return all(
            b"".join(tracker.images.read(job.images[number].name)) == pixels(job.id, number)
            for number in range(len(job.images))
        ) and tracker.describe(job, whole=True)["parameters"] == {"prompt": job.id}
    except Exception:  # the StoreError of whichever script it is
        return False


def within(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns or raises, and a failure if it does neither."""
    done: Future = Future()

    def call() -> None:
        try:
            done.set_result(function(*args))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return done.result(seconds)


def generate(script: Any, tracker: Any, job: Any) -> str:
    """Takes a job from its acceptance to its end, and returns its status."""
    if tracker.accept(job, lambda: True, b"").exception() is not None:
        until(lambda: tracker.get(job.id) is None)
        return "refused"
    tracker.start(job.id)
    tracker.finish(job.id, an_answer(script, job.id, 1))
    until(lambda: tracker.get(job.id).ended or tracker.store.trouble)
    return tracker.get(job.id).status


def ids(script: Any, tracker: Any, **wanted: Any) -> List[str]:
    """Those of all jobs that match, newest first."""
    return [job.id for job in tracker.store.query(script.Filter(**wanted), 1000).jobs]
