"""The example of a fleet, as far as it can be tried without Docker: its compose.yaml and its load balancer."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List

import httpx
import pytest
import services
from proxies import NGINX, running
from readme import EXAMPLES

from harness import ASYNC, Webui, body, free_port, until

yaml = pytest.importorskip("yaml")


COMPOSE = yaml.safe_load((EXAMPLES / "fleet" / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: Dict[str, Any] = COMPOSE["services"]
WEBUIS = [name for name in SERVICES if name.startswith("webui-")]
NGINX_CONF = (EXAMPLES / "fleet" / "nginx.conf").read_text(encoding="utf-8")
KEYS = {  # of a service, by the Compose Specification: those that are used, and what each may be
    "image": str,
    "command": str,
    "environment": dict,
    "volumes": list,
    "ports": list,
    "healthcheck": dict,
    "gpus": str,
    "restart": str,
    "stop_grace_period": str,
}


# compose.yaml


def variables(name: str) -> Dict[str, str]:
    """A service's, with values for those that are to come from the file .env."""
    known = {"DB_PASSWORD": "geheim", "S3_SECRET": "noch-geheimer"}
    pattern = re.compile(r"\$\{(\w+):\?\}")
    return {it: pattern.sub(lambda found: known[found[1]], text) for it, text in SERVICES[name]["environment"].items()}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service(name):
    service = SERVICES[name]
    for key, value in service.items():
        assert isinstance(value, KEYS[key]), key
    for value in service.get("environment", {}).values():
        assert isinstance(value, str), "Compose takes no bare booleans"
    if name not in WEBUIS:
        assert re.search(r":\d[\w.]*$", service["image"]), "the image has a version"
    for volume in service.get("volumes", []):
        source = volume.split(":")[0]
        assert source.startswith("./") or source in COMPOSE["volumes"]
    check = service.get("healthcheck")
    assert check is None or (isinstance(check["test"], str) and re.match(r"\d+s$", check["interval"]))


def test_the_services_know_each_other(tmp_path, script):
    assert set(COMPOSE) == {"x-webui", "x-environment", "services", "volumes"}
    seen: List[Dict[str, str]] = []
    for name in WEBUIS:
        environ = variables(name)
        settings = script.Settings(str(tmp_path), environ)
        assert settings.enabled and settings.server == name
        assert settings.data_folder == SERVICES[name]["volumes"][0].split(":")[1]
        user, password, host, database = re.match(
            r"postgresql://(\w+):(\S+)@([\w-]+)/(\w+)$", settings.store_url
        ).groups()
        there = variables(host)
        assert (user, password, database) == tuple(there[f"POSTGRES_{it}"] for it in ("USER", "PASSWORD", "DB"))
        endpoint = httpx.URL(environ["AWS_ENDPOINT_URL"])
        assert f"-s3.port={endpoint.port}" in SERVICES[endpoint.host]["command"].split()
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        assert [environ[it] for it in keys] == [variables(endpoint.host)[it] for it in keys]
        assert settings.images_url.startswith("s3://")
        seen.append({it: environ[it] for it in ("TRACKER_SERVER", "CUDA_VISIBLE_DEVICES")})
    for one in seen[0]:
        assert len({it[one] for it in seen}) == len(WEBUIS) == 3
    assert len({SERVICES[name]["volumes"][0] for name in WEBUIS}) == 3
    assert re.findall(r"server ([\w-]+):7860 ", NGINX_CONF) == WEBUIS
    (port,) = SERVICES["nginx"]["ports"]
    assert f"listen {port.split(':')[1]};" in NGINX_CONF


class AsInReadme(services.SeaweedFS):
    """SeaweedFS by the README's command, on ports that are free here."""

    environ = variables("seaweedfs")

    def command(self) -> List[str]:
        words = SERVICES["seaweedfs"]["command"].split()
        places = [word for word in super().command() if re.match(r"-(dir|ip\.bind|\w+\.(port|localSocket).*)=", word)]
        return [str(services.weed_program()), *words, *places, "-master.volumeSizeLimitMB=64"]

    def serves(self) -> bool:
        words = SERVICES["seaweedfs"]["healthcheck"]["test"].split()
        assert words[:4] == ["wget", "-q", "-O", "/dev/null"]
        with contextlib.suppress(httpx.HTTPError):
            url = words[4].replace(":8333/", f":{self.port}/")
            return httpx.get(url, trust_env=False).status_code == 200
        return False


@pytest.mark.skipif(bool(services.why_missing()), reason=services.why_missing())
def test_seaweedfs_takes_our_keys_only_and_makes_the_bucket():
    import obstore
    from obstore.store import from_url

    server = AsInReadme()
    try:
        server.start()
        known = variables(WEBUIS[0])
        for secret in ("wrong", known["AWS_SECRET_ACCESS_KEY"]):
            store = from_url(
                known["TRACKER_IMAGES"],
                config={
                    "aws_endpoint": f"http://127.0.0.1:{server.port}",
                    "aws_access_key_id": known["AWS_ACCESS_KEY_ID"],
                    "aws_secret_access_key": secret,
                    "aws_region": known["AWS_REGION"],
                },
                client_options={"allow_http": True},
            )
            if secret == "wrong":
                with pytest.raises(obstore.exceptions.PermissionDeniedError):
                    obstore.put(store, "image", b"a picture")
            else:
                until(lambda store=store: is_stored(store), what="it stores what it is given")
    finally:
        server.remove()


def is_stored(store: Any) -> bool:
    import obstore

    with contextlib.suppress(obstore.exceptions.GenericError):  # it has no place for it yet
        obstore.put(store, "image", b"a picture")
        return bytes(obstore.get(store, "image").bytes()) == b"a picture"
    return False


# nginx.conf


class Swallower:
    """A webui that reads a request, and ends without a word."""

    def __init__(self) -> None:
        self.requests: List[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.requests.append(client.recv(65536))
                client.close()

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def balanced(ports: List[int], webui: Webui, folder: Path) -> Iterator[httpx.Client]:
    """The README's nginx before three webuis."""
    config = NGINX_CONF.replace("$", "$$").replace("listen 8000;", "listen 127.0.0.1:$port;")
    for name, port in zip(WEBUIS, ports):
        config = config.replace(f"{name}:7860", f"127.0.0.1:{port}")
    head, _, rest = NGINX.config.partition("  server {")
    assert rest
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(running(NGINX._replace(config=f"{head}{config}}}\n"), webui, folder))
        yield stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30))


@pytest.fixture
def two(start_fleet, tmp_path) -> List[Webui]:
    """Two webuis that share a database, and a folder with their images."""
    return start_fleet(2, images=False, environ={"TRACKER_DATA_DIR": str(tmp_path / "images")}, tracking="variable")


def test_load_balancer(two, tmp_path):
    """A third webui is gone. Nobody notices."""
    folder = tmp_path / "nginx"
    folder.mkdir()
    with balanced([two[0].port, free_port(), two[1].port], two[0], folder) as client:
        answers = [client.post("/sdapi/v1/txt2img", json=body(), headers=ASYNC) for _ in range(12)]
        assert [answer.status_code for answer in answers] == [202] * 12
        for answer in answers:
            job = client.get(f"{answer.headers['location']}?wait=60").json()
            assert job["status"] == "Completed", job
        assert {job["server"] for job in two[0].jobs()} == {"webui-0", "webui-1"}
        # The head comes before the generation has ended, and events come one by one.
        gate = two[0].gate()
        request = body(standin={"hold": str(gate.path)})
        with client.stream("POST", "/sdapi/v1/txt2img", json=request) as response:
            job_id = response.headers["x-job-id"]
            with client.stream("GET", f"/sdapi/v1/job/{job_id}/events") as events:
                lines = events.iter_lines()
                assert next(line for line in lines if line.startswith("data:"))
                gate.open()
                assert any('"Completed"' in line for line in lines)
            assert len(json.loads(response.read())["images"]) == 1


def test_load_balancer_repeats_no_generation(two, tmp_path):
    """What a webui has got, and did not answer, may have been accepted: no other gets it."""
    folder, lost = tmp_path / "nginx", Swallower()
    folder.mkdir()
    try:
        with balanced([lost.port, two[0].port, two[1].port], two[0], folder) as client:
            sent: Dict[str, int] = {}
            for number in range(6):
                answer = client.post("/sdapi/v1/txt2img", json=body(f"number {number}"), headers=ASYNC)
                sent[f"number {number}"] = answer.status_code
                assert client.get("/sdapi/v1/jobs").status_code == 200, "what changes nothing is asked of another"
        swallowed = [request for request in lost.requests if request.startswith(b"POST")]
        assert len(swallowed) >= 1 and sorted(set(sent.values())) == [202, 502]
        prompts = [job["prompt"] for job in two[0].jobs()]
        assert sorted(prompts) == [prompt for prompt, status in sorted(sent.items()) if status == 202]
    finally:
        lost.close()
