"""Fixtures that start webuis, and their logs beside the tests that fail."""

from __future__ import annotations

import contextlib
import os
import py_compile
import random
import shutil
import signal
import tempfile
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import hypothesis
import pytest
import services
from clock import Clock
from inside import load_script, make_tracker
from receivers import Receiver

import harness
from harness import AUTH, MODE_FLAGS, MODES, ONCE, ORIGIN, Start, Webui

NewTracker = Callable[..., Any]

if "CI" in os.environ:  # a change is judged by its own faults: elsewhere hypothesis looks for new ones at each run
    hypothesis.settings.register_profile("ci", derandomize=True, database=None)
    hypothesis.settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # who names a file wants all of it
        named = config.args_source == pytest.Config.ArgsSource.ARGS
        os.environ[ONCE] = "" if named or config.getoption("--all") or config.getoption("--rest") else "1"
        # The script is loaded two thousand times, which took a minute and a half of compiling it.
        with contextlib.suppress(OSError):
            py_compile.compile(str(harness.PROJECT / "scripts" / "job_tracker.py"))

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt  # ends the fixtures, and so the webuis

    signal.signal(signal.SIGTERM, end)


SLOW = ("test_cost", "test_load")
# Every client, proxy and gateway there is, and what takes minutes: what they promise is tested elsewhere, too.
ALL_ONLY = ("test_gateways", "test_proxies", "test_soak")
STORES = ("files", "postgresql")
MODE_PARAMETERS = ("mode", "webui", "guarded", "every_webui", "off")


def pytest_addoption(parser: pytest.Parser) -> None:
    text = (
        "every mode with and without credentials, every client and gateway, and the soak; without it, each promise once"
    )
    parser.addoption("--all", action="store_true", help=text)
    parser.addoption("--rest", action="store_true", help="what --all has and the tests without it have not")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(0))
    is_rest = config.getoption("--rest")
    if os.environ.get(ONCE) or is_rest:
        once = set(once_each([item for item in items if not is_for_all_only(item)]))
        config.hook.pytest_deselected(items=[item for item in items if (item in once) == is_rest])
        items[:] = [item for item in items if (item in once) != is_rest]


def is_for_all_only(item: pytest.Item) -> bool:
    return item.path.stem in ALL_ONLY or item.get_closest_marker("all_only") is not None


def once_each(items: List[pytest.Item]) -> List[pytest.Item]:
    """Of tests that differ in the webui's mode only, one: now in one mode, now in the other.

    Who starts a webui of his own is told of the mode, and looks at the tab where there is one: so it is the UI.
    """
    groups: Dict[Any, List[pytest.Item]] = {}
    for item in items:
        parameters = (getattr(item, "callspec", None) and item.callspec.params) or {}
        rest = {name: value for name, value in parameters.items() if name not in MODE_PARAMETERS}
        is_once = item.get_closest_marker("every_mode") is None and len(rest) < len(parameters)
        key = item.nodeid if not is_once else (item.path, item.originalname, repr(sorted(rest.items(), key=str)))
        groups.setdefault(key, []).append(item)
    kept = []
    for group in groups.values():
        is_own = "mode" in getattr(getattr(group[0], "callspec", None), "params", {})
        kept.append(group[0 if is_own else zlib.crc32(group[0].name.encode()) % len(group)])
    return kept


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where the mark `one_mode` says that both modes are the same, the shared webuis are of one.

    What the mark `every_store` has is promised of every kind of store: `store_environ` is that of each.
    """
    if metafunc.definition.get_closest_marker("one_mode"):
        for name in {"webui", "guarded"} & set(metafunc.fixturenames):
            metafunc.definition.add_marker(pytest.mark.parametrize(name, MODES[-1:], indirect=True))
    if metafunc.definition.get_closest_marker("every_store"):
        metafunc.parametrize("store_environ", STORES, indirect=True)


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """`start(*flags, **options)` starts a webui for one test; the arguments are those of harness.Webui."""
    with harness.started(lambda: tmp_path_factory.mktemp("webui")) as function:
        yield function


@pytest.fixture
def open_receiver() -> Iterator[Callable[..., Receiver]]:
    """`open_receiver(*answers, **options)` is a server for webhooks; the arguments are those of receivers.Receiver."""
    made: List[Receiver] = []

    def make(*answers: Any, **options: Any) -> Receiver:
        made.append(Receiver(*answers, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(scope="module")
def start_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """The same for all tests of a module."""
    with harness.started(lambda: tmp_path_factory.mktemp("webui")) as function:
        yield function


class Pool:
    """The webuis that tests share which leave them as they were. Each is started when it is first needed."""

    def __init__(self, start: Start):
        self._start = start
        self._webuis: Dict[Tuple[str, str, bool], Webui] = {}

    def get(self, what: str, mode: str, auth: bool = False) -> Webui:
        key = what, mode, auth
        if key not in self._webuis:
            flags = (*MODE_FLAGS[mode], "--cors-allow-origins", ORIGIN, *(AUTH if auth else ()))
            self._webuis[key] = self._start(*flags, **self._options(what, mode, auth))
        return self._webuis[key]

    @staticmethod
    def _options(what: str, mode: str, auth: bool) -> Dict[str, Any]:
        if what == "alone":
            return {"copies": 0}
        if what == "tracked":  # by config.json and by the variable, in each mode
            return {"tracking": "config" if (mode == "ui") == auth else "variable"}
        if mode == "ui":
            return {"tracking": "config", "environ": {"TRACKER_ENABLED": "Off"}}
        return {"tracking": None}


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with harness.started(lambda: tmp_path_factory.mktemp("webui")) as function:
        yield Pool(function)


@pytest.fixture(scope="session", params=MODES)
def webui(request: pytest.FixtureRequest, pool: Pool) -> Webui:
    """A webui that tracks, in each mode. Others use it too: leave it as it was."""
    return pool.get("tracked", request.param)


@pytest.fixture(scope="session", params=MODES)
def guarded(request: pytest.FixtureRequest, pool: Pool) -> Webui:
    """The same with --api-auth. Its client sends the credentials."""
    return pool.get("tracked", request.param, auth=True)


@pytest.fixture(
    scope="session",
    params=[(mode, auth) for mode in MODES for auth in (False, True)],
    ids=lambda it: it[0] + "-auth" * it[1],
)
def every_webui(request: pytest.FixtureRequest, pool: Pool) -> Webui:
    """Both of these."""
    return pool.get("tracked", *request.param)


@pytest.fixture(scope="session", params=MODES)
def off(request: pytest.FixtureRequest, pool: Pool) -> Webui:
    """A webui with Job Tracker, that does not track, with --api-auth."""
    return pool.get("off", request.param, auth=True)


@pytest.fixture
def dice() -> random.Random:
    """The same at each run."""
    return random.Random(7)


@pytest.fixture
def script() -> Any:
    """The extension's script, executed anew for each test, so that its constants and its `os` can be changed."""
    return load_script()


@pytest.fixture
def store_environ(request: pytest.FixtureRequest) -> Dict[str, str]:
    """The variables by which a store is chosen: none, for files, unless the mark `every_store` asks for each kind."""
    if getattr(request, "param", STORES[0]) == STORES[0]:
        return {}
    return {"TRACKER_STORE": request.getfixturevalue("database").url}


@pytest.fixture
def new_tracker(script: Any, tmp_path: Path, store_environ: Dict[str, str]) -> Iterator[NewTracker]:
    """`new_tracker(**environ)` is a tracker without a webui, on the test's folder."""
    made: List[Any] = []

    def make(**environ: str) -> Any:
        made.append(make_tracker(script, tmp_path, **{**store_environ, **environ}))
        return made[-1]

    yield make
    for one in made:
        one.close()
        if one.store.is_shared:  # its database goes now, and it would ask for that for ever
            one.store.close()


@pytest.fixture
def tracker(new_tracker: NewTracker) -> Any:
    return new_tracker()


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that other users can reach, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "data").mkdir(mode=0o755)
    try:
        yield folder / "data"
    finally:
        shutil.rmtree(str(folder))


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    """That of webuis which have its script."""
    return Clock(tmp_path)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuple[Webui, Webui]]:
    """Two webuis that track, with one folder for their jobs."""
    environ = {"TRACKER_DATA_DIR": str(tmp_path_factory.mktemp("data"))}
    with harness.started(lambda: tmp_path_factory.mktemp("webui")) as function:
        yield function(*harness.QUICK, environ=environ), function(*harness.QUICK, environ=environ)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[services.PostgreSQL]:
    """A PostgreSQL that tests share: whoever ends it starts it again, and so does `database`."""
    skip_without_services()
    with services.postgresql() as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[services.SeaweedFS]:
    """An S3 store that tests share, in the same way."""
    skip_without_services()
    with services.seaweedfs() as server:
        yield server


def skip_without_services() -> None:
    reason = services.why_missing()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def database(postgresql: services.PostgreSQL) -> Iterator[services.Database]:
    """A new database for one test."""
    with services.Database(postgresql) as one:
        yield one


@pytest.fixture
def bucket(seaweedfs: services.SeaweedFS) -> Iterator[services.Bucket]:
    """A place for images for one test."""
    with services.Bucket(seaweedfs) as one:
        yield one


@pytest.fixture(scope="session")
def alone(pool: Pool) -> Callable[[Webui], Webui]:
    """`alone(webui)` is a webui in the same mode without Job Tracker, with --api-auth."""
    return lambda webui: pool.get("alone", webui.mode, auth=True)


@pytest.fixture(autouse=True)
def no_closed_gates() -> Iterator[None]:
    """A test that fails must not hold up the others."""
    yield
    for gate in [gate for webui in Webui.alive for gate in webui.gates]:
        gate.open()
    for webui in Webui.alive:
        if webui.gates and (webui.data / "jobs.json").exists():
            harness.until(webui.is_idle, what="all jobs have ended")
        webui.gates.clear()


log_marks = pytest.StashKey[Dict[Webui, int]]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[log_marks] = {webui: webui.log_path.stat().st_size for webui in Webui.alive}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        marks = item.stash.get(log_marks, {})
        for webui in Webui.alive:
            text = webui.log_since(marks.get(webui, 0))
            if text:
                report.sections.append((f"log of the webui in {webui.folder}", text[-20000:]))
