"""What we make belongs to whom the umask says, and what somebody has made private stays so."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import stat
import threading
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import pytest
from disks import NOBODY, ROOT, modes_of, private_jobs
from inside import WrappedOs, a_job, an_answer, completed, load_script, make_tracker, pixels, until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o660], ids=oct)
def test_jobs_that_were_made_private_stay_so(script, tmp_path, mode):
    """Through a compaction, and in what is set aside."""
    path = tmp_path / "jobs.json"
    path.write_bytes(b'{\n"secret prompt": 5\n}\n')
    path.chmod(mode)
    script.JobStore.MIN_DEAD_ENTRIES = 2
    store = script.JobStore(str(tmp_path))
    try:
        job = a_job(script, random.Random(7))
        for _ in range(20):
            store.put(job).result()
        until(lambda: path.read_bytes().count(b"\n") < 10 and b"secret" not in path.read_bytes())
        (aside,) = tmp_path.glob("jobs.json.damaged-*")
        assert "secret prompt" in aside.read_text()
        assert [stat.S_IMODE(one.stat().st_mode) for one in (path, aside)] == [mode, mode]
    finally:
        store.close()


@pytest.mark.parametrize("mode", [0o600, 0o664], ids=oct)
def test_settings_keep_their_mode(script, tmp_path, mode):
    path = tmp_path / "config.json"
    path.write_text('{"enabled": false}')
    path.chmod(mode)
    script.Settings(str(tmp_path), {}).save(enabled=True)
    assert json.loads(path.read_text())["enabled"] is True
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_folder_that_was_made_private_stays_so(script, tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for path in (data, data / "images"):
        path.chmod(0o700)
    tracker = make_tracker(script, tmp_path, TRACKER_DATA_DIR=str(data))
    try:
        tracker.store.query(script.Filter(), 1)  # all is read
        assert tracker.images.folder == str(data / "images")
        modes = modes_of(data)
        assert modes["."] == modes["images"] == 0o700
    finally:
        tracker.close()


def test_nobody_waits_with_a_link_for_a_file_of_ours(script, tmp_path):
    """Where others may write, they do not lead our next file elsewhere."""
    precious = tmp_path / "precious"
    precious.write_text("words")
    data = tmp_path / "data"
    data.mkdir()
    (data / "jobs.json").write_text('{"minified": 5}')
    store = script.JobStore(str(data))
    try:
        store.query(script.Filter(), 1)  # all is read
        assert store.idle(), "and written anew"
        part = data / f"jobs.json.{store.owner}.part"
        job = a_job(script, random.Random(7))
        script.JobStore.MIN_DEAD_ENTRIES = 2
        part.symlink_to(precious)
        for _ in range(20):
            store.put(job).result()
        assert store.idle()
        assert precious.read_text() == "words"
    finally:
        store.close()


# In every path that makes a file


class WatchedOs:
    """`os`, which looks at all files of a folder before each call, and refuses to write what it is told to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: Dict[str, int] = {}  # each name with all the bits that it ever had
        self.looking = threading.Lock()
        self.refused = -1  # the inode of a file that must not be written
        self.replaced = -1  # the inode of a file that may be open to others, and that another takes the place of

    def __getattr__(self, name: str) -> Any:
        self.look()
        return getattr(os, name)

    def look(self) -> None:
        with self.looking:
            for path in [self.folder, *self.folder.glob("**/*")]:
                with contextlib.suppress(FileNotFoundError):
                    name, found = str(path.relative_to(self.folder)), path.lstat()
                    if found.st_ino != self.replaced:
                        self.seen[name] = self.seen.get(name, 0) | stat.S_IMODE(found.st_mode)

    def open(self, path: str, flags: int, *mode: int) -> int:
        self.look()
        with contextlib.suppress(FileNotFoundError):
            if flags & (os.O_WRONLY | os.O_RDWR) and os.stat(path).st_ino == self.refused:
                raise PermissionError(errno.EACCES, "Permission denied", path)
        try:
            return os.open(path, flags, *mode)
        finally:
            self.look()


@contextlib.contextmanager
def storing(script: Any, folder: Path) -> Iterator[Any]:
    store = script.JobStore(str(folder))
    try:
        yield store
    finally:
        store.close()


def settings_are_saved(script: Any, folder: Path) -> None:
    (folder / "config.json").write_text('{"enabled": false, "retention_days": 3}')
    (folder / "config.json").chmod(0o600)
    script.Settings(str(folder), {}).save(enabled=True)


def settings_are_set_aside(script: Any, folder: Path) -> None:
    (folder / "config.json").write_text('{"password": "secret",}')
    (folder / "config.json").chmod(0o600)
    script.Settings(str(folder), {}).save(enabled=True)
    (aside,) = folder.glob("config.json.damaged-*")
    assert "secret" in aside.read_text()


def settings_are_taken_over(script: Any, folder: Path) -> None:
    (folder / "config.json").write_text('{"tracking_enabled": true, "retention_days": 3}')
    (folder / "config.json").chmod(0o600)
    script.Settings(str(folder), {})
    assert '"enabled": true' in (folder / "config.json").read_text()


def jobs_are_stored(script: Any, folder: Path) -> None:
    private_jobs(folder)
    with storing(script, folder) as store:
        store.put(a_job(script, random.Random(7)), new=True).result()
        assert {path.name[:10] for path in folder.iterdir() if path.name != "jobs.json"} == {"jobs.json."}


def jobs_are_compacted(script: Any, folder: Path) -> None:
    path = private_jobs(folder)
    script.JobStore.MIN_DEAD_ENTRIES = 2
    with storing(script, folder) as store:
        job = a_job(script, random.Random(7))
        for _ in range(20):
            store.put(job).result()
        until(lambda: path.read_bytes().count(b"\n") < 10, what="the compaction")


def damage_is_set_aside(script: Any, folder: Path) -> None:
    private_jobs(folder, '{\n"secret prompt": 5\n}\n')
    with storing(script, folder) as store:
        store.query(script.Filter(), 1)  # all is read
        (aside,) = folder.glob("jobs.json.damaged-*")
        assert "secret" in aside.read_text()


def jobs_that_must_not_be_written(script: Any, folder: Path) -> None:
    script.os.refused = private_jobs(folder, mode=0o400).stat().st_ino
    with storing(script, folder) as store:
        store.put(a_job(script, random.Random(7)), new=True).result()
        assert len(list(folder.glob("jobs.json.damaged-*"))) == 1


def images_are_stored(script: Any, folder: Path) -> None:
    private_jobs(folder)
    images = script.ImageStore(str(folder / "images"))
    job = completed(a_job(script, random.Random(7)))
    answer = an_answer(script, job.id, 2)
    long = json.loads(answer.rest.decode())
    long["parameters"]["negative_prompt"] = "secret" * 1000
    kept = images.save(job, answer._replace(images=[*answer.images, b"no base64"], rest=json.dumps(long).encode()))
    assert len(images.counted_files_of(kept)) == 5
    assert {path.name for path in folder.glob("images/*/*")} == {
        name.split("/")[1] for name in images.counted_files_of(kept)
    }


def legacy_file(folder: Path) -> Path:
    picture = folder / "picture.png"
    picture.touch(mode=0o600)
    picture.write_bytes(pixels("abcdEFGH", 0))
    job = {"id": "abcdEFGH", "prompt": "secret", "ip": None, "timestamp": 1736712000, "status": "completed"}
    return private_jobs(folder, json.dumps([{**job, "output_paths": [str(picture)]}]))


def take_over(script: Any, folder: Path) -> None:
    predecessor = script.Predecessor(str(folder), str(folder))
    predecessor.merge_jobs()
    with storing(script, folder) as store:
        predecessor.copy_images(store, script.ImageStore(str(folder / "images")), threading.Event())
        assert len(store.get("abcdEFGH").images) == 1


def predecessor_is_taken_over(script: Any, folder: Path) -> None:
    legacy_file(folder)
    take_over(script, folder)


def predecessor_is_merged(script: Any, folder: Path) -> None:
    legacy_file(folder).rename(folder / "jobs.json.predecessor")
    (folder / "jobs.json").write_text("{\n}\n")
    (folder / "jobs.json").chmod(0o644)
    with (folder / "jobs.json").open() as replaced:  # so that no other file gets its number
        script.os.replaced = os.fstat(replaced.fileno()).st_ino
        take_over(script, folder)


@pytest.mark.parametrize(
    "make",
    [
        settings_are_saved,
        settings_are_set_aside,
        settings_are_taken_over,
        jobs_are_stored,
        jobs_are_compacted,
        damage_is_set_aside,
        jobs_that_must_not_be_written,
        images_are_stored,
        predecessor_is_taken_over,
        predecessor_is_merged,
    ],
    ids=lambda it: it.__name__,
)
def test_nobody_else_can_open_it_at_any_moment(script, tmp_path, make):
    """Where the original is private. Whoever opens a file in its first moment can read what comes into it later."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    script.os = WatchedOs(folder)
    before = os.umask(0o022)
    try:
        make(script, folder)
    finally:
        os.umask(before)
    script.os.look()
    assert len(script.os.seen) > 1
    assert not {name: oct(mode) for name, mode in script.os.seen.items() if mode & 0o077}


def test_images_of_the_predecessor_that_were_private(script, tmp_path):
    """Its jobs.json was not. What stands beside an image, as its prompt, is as private as that."""
    legacy_file(tmp_path).chmod(0o644)
    before = os.umask(0o022)
    try:
        take_over(script, tmp_path)
    finally:
        os.umask(before)
    modes = modes_of(tmp_path)
    assert modes["jobs.json"] == 0o644
    assert [mode for name, mode in modes.items() if "/abcdEFGH" in name] == [0o600, 0o600]


@pytest.mark.parametrize(
    "umask, mode, expected",
    [
        (0o022, 0o600, 0o600),
        (0o022, 0o640, 0o640),
        (0o022, 0o644, 0o644),
        (0o022, 0o664, 0o644),
        (0o002, 0o664, 0o664),
        (0o002, 0o660, 0o660),
        (0o077, 0o664, 0o600),
        (0o027, 0o644, 0o640),
        (0o022, 0o400, 0o600),
        (0o022, None, 0o644),
    ],
    ids=lambda it: it if it is None else oct(it),
)
def test_images_are_for_those_who_may_read_jobs_json(tmp_path, umask, mode, expected):
    """And never for more than the umask says."""
    if mode is not None:
        private_jobs(tmp_path, mode=mode)
    before = os.umask(umask)
    try:
        script = load_script()
        images = script.ImageStore(str(tmp_path / "images"))
        job = completed(a_job(script, random.Random(7)))
        kept = images.save(job, an_answer(script, job.id, 1))
    finally:
        os.umask(before)
    modes = modes_of(tmp_path / "images")
    folders = expected | (expected & 0o444) >> 2
    assert modes == {
        ".": folders,
        images.day_of(job): folders,
        **dict.fromkeys(images.counted_files_of(kept), expected),
    }


def as_another(work: Callable[[], Any], user: int = NOBODY, group: int = NOBODY) -> None:
    """Does something in a child process as another user, or, where the test is no root's, as the same."""
    child = os.fork()
    if child == 0:
        result = 1
        try:
            os.umask(0o022)
            if ROOT:
                os.setgroups([])
                os.setgid(group)
                os.setuid(user)
            work()
            result = 0
        finally:
            os._exit(result)
    assert os.waitpid(child, 0)[1] == 0


def test_a_real_jobs_json_that_must_not_be_written(script, public):
    """It is set aside, and its copy is as private, though it can be written."""
    path = public / "jobs.json"
    job = completed(a_job(script, random.Random(7)))
    path.write_bytes(b'{\n"%s": %s\n}\n' % (job.id.encode(), script.record_of(job)))
    path.chmod(0o400)
    if ROOT:
        for one in (public, path):
            os.chown(str(one), NOBODY, NOBODY)

    def work() -> None:
        with storing(script, public) as store:
            assert store.get(job.id) == job
            store.put(job._replace(prompt="another")).result()

    as_another(work)
    (aside,) = public.glob("jobs.json.damaged-*")
    assert stat.S_IMODE(aside.stat().st_mode) == 0o400
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"another" in path.read_bytes()


@pytest.mark.skipif(not ROOT, reason="only root makes files for others")
@pytest.mark.parametrize(
    "make", [settings_are_saved, jobs_are_compacted, damage_is_set_aside, images_are_stored], ids=lambda it: it.__name__
)
def test_what_root_makes_belongs_to_the_owner(script, tmp_path, monkeypatch, make):
    """Of the file that it takes the place of, or stands beside: he starts the next webui."""
    chmod = Path.chmod

    def chmod_and_chown(path: Path, mode: int) -> None:
        chmod(path, mode)
        os.chown(str(path), 54321, 54322)

    monkeypatch.setattr(Path, "chmod", chmod_and_chown)
    make(script, tmp_path)
    monkeypatch.undo()
    owners = {str(path.relative_to(tmp_path)): path.stat() for path in tmp_path.glob("**/*")}
    if make is images_are_stored:
        del owners["images"]  # there before it was known for whom
    assert owners
    assert {(it.st_uid, it.st_gid) for it in owners.values()} == {(54321, 54322)}, owners


@pytest.mark.skipif(not ROOT, reason="only root can be another user")
def test_a_group_that_is_not_ours_to_give(script, public):
    """Our own group gets no more than everybody."""
    for path in (public / "config.json", public / "jobs.json"):
        path.write_text('{"enabled": false}' if path.name == "config.json" else "{\n}\n")
        path.chmod(0o664 if path.name == "config.json" else 0o660)
        os.chown(str(path), NOBODY, 54322)
    os.chown(str(public), NOBODY, NOBODY)

    def work() -> None:
        script.Settings(str(public), {}).save(enabled=True)
        images = script.ImageStore(str(public / "images"))
        job = completed(a_job(script, random.Random(7)))
        images.save(job, an_answer(script, job.id, 1))

    as_another(work)
    modes = modes_of(public)
    assert json.loads((public / "config.json").read_text())["enabled"] is True
    assert modes["config.json"] == 0o644
    assert {mode for name, mode in modes.items() if name.startswith("images/") and "." in name} == {0o600}


def test_jobs_that_are_made_private_during_a_compaction(script, tmp_path):
    path = tmp_path / "jobs.json"

    def open_and_make_private(name: str, *arguments: Any) -> int:
        file = os.open(name, *arguments)
        if str(name).endswith(".part"):  # which becomes the next jobs.json
            path.chmod(0o600)
            begun.set()
        return file

    begun = threading.Event()
    script.JobStore.MIN_DEAD_ENTRIES = 2
    with storing(script, tmp_path) as store:
        store.put(a_job(script, random.Random(7))).result()
        path.chmod(0o644)
        script.os = WrappedOs(open=open_and_make_private)
        job = a_job(script, random.Random(8))
        for _ in range(20):
            store.put(job).result()
        until(lambda: path.read_bytes().count(b"\n") < 10, what="the compaction")
        assert begun.is_set() and stat.S_IMODE(path.stat().st_mode) == 0o600
