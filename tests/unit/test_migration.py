"""The jobs of one pair of stores copied into another: all of them, each once, however often it is interrupted."""

from __future__ import annotations

import types

import pytest
from inside import a_job, an_answer, make_tracker, pixels, set_constants


class Sides:
    """Two folders, and copies from the one to the other."""

    def __init__(self, script, folder, opened):
        self.script = script
        self.source, self.target = opened(folder / "from"), opened(folder / "to")
        self.source_images, self.images = (script.ImageStore(str(folder / name / "images")) for name in ("from", "to"))

    def copy(self, store_url="other", images_url="other"):
        settings = types.SimpleNamespace(store_url=store_url, images_url=images_url)
        target = self.target if store_url else self.source
        images = self.images if images_url else self.source_images
        migration = self.script.Migration(self.source, self.source_images, target, images, settings)
        migration.run(lambda jobs: None)
        return dict(migration.counts)

    def add(self, job, images=1):
        """A job of the source. A Completed one has its files."""
        if job.status == "Completed":
            job = self.source_images.save(job, an_answer(self.script, job.id, images))._replace(status="Completed")
        if job.has_request:
            self.source_images.save_request(job, b'{"prompt": "a lighthouse"}')
        self.source.put(job, new=True).result(10)
        return job


@pytest.fixture
def sides(script, tmp_path, opened):
    return Sides(script, tmp_path, opened)


def jobs_of(script, store):
    return store.query(script.Filter(), 1000).jobs


def test_all_is_copied(script, sides, dice):
    set_constants(script, PAGE=7)
    made = []
    for number in range(30):
        status = ("Completed", "Failed")[number % 3 == 0]
        fields = {"timestamp": 1736712000 + number // 2, "label": f"label {number}", "server": "first", "owner": "dead"}
        fields.update({"error": "out of memory", "has_request": True} if status == "Failed" else {"key": f"{number}"})
        made.append(sides.add(a_job(script, dice, status=status, **fields), images=number % 2 + 1))
    assert sides.copy() == {"copied": 30}
    assert jobs_of(script, sides.target) == [job._replace(owner=None) for job in reversed(made)]
    assert jobs_of(script, sides.source) == made[::-1], "the source has changed"
    for job in made:
        for number, image in enumerate(job.images):
            assert b"".join(sides.images.read(image.name)) == pixels(job.id, number)
        if job.status == "Completed":
            assert sides.images.read_values(job, whole=True) == sides.source_images.read_values(job, whole=True)
        else:
            assert sides.images.read_request(job) == b'{"prompt": "a lighthouse"}'
    assert sides.copy() == {"there": 30, "copied": 0}


def test_what_is_there_stays(script, sides, dice):
    job = sides.add(a_job(script, dice, status="Completed"))
    changed = job._replace(label="another")
    sides.target.put(changed, new=True).result(10)
    assert sides.copy() == {"there": 1, "copied": 0}
    assert sides.target.get(job.id) == changed


@pytest.mark.parametrize("moment", ["files", "record"])
def test_interrupted(script, sides, dice, moment, monkeypatch):
    """What was copied before stays, and the next run copies the rest."""
    set_constants(script, PAGE=4)
    jobs = [sides.add(a_job(script, dice, status="Completed", timestamp=1736712000 + it)) for it in range(12)]
    calls = iter(range(100))

    def fail_later(*args, **options):
        if next(calls) == 6:
            raise script.StoreError("it is away", temporary=True)
        return original(*args, **options)

    place, name = (sides.images, "copy_from") if moment == "files" else (sides.target, "put")
    original = getattr(place, name)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail_later)
        with pytest.raises(script.StoreError, match="away"):
            sides.copy()
    assert sides.target.idle()
    before = len(jobs_of(script, sides.target))
    assert 4 <= before < 12
    for job in jobs_of(script, sides.target):
        assert sides.images.size(job.images[0].name), "a record without its image"
    assert sides.copy() == {"there": before, "copied": 12 - before}
    assert [job.id for job in jobs_of(script, sides.target)] == [job.id for job in reversed(jobs)]


def test_files_that_are_missing(script, sides, dice, caplog):
    job = sides.add(a_job(script, dice, status="Completed"), images=2)
    sides.source_images.remove([job.images[1].name])
    assert sides.copy() == {"copied": 1, "incomplete": 1}
    assert job.id in caplog.text and job.images[1].name in caplog.text
    assert sides.target.get(job.id).images == job.images
    assert sides.images.size(job.images[1].name) is None
    assert b"".join(sides.images.read(job.images[0].name)) == pixels(job.id, 0)


def waiting(script, dice, **fields):
    return a_job(script, dice, promised=True, has_request=True, **{"parked": True, **fields})


def test_what_waits_is_moved(script, sides, dice):
    """It is generated on one side only."""
    job = sides.add(waiting(script, dice))
    assert sides.copy() == {"moved": 1, "copied": 0}
    assert sides.target.oldest_parked() == job and sides.source.get(job.id) is None
    assert sides.images.read_request(job) == b'{"prompt": "a lighthouse"}'


@pytest.mark.parametrize("is_there", [False, True])
def test_a_move_that_was_interrupted(script, sides, dice, is_there):
    """A kill leaves it held at the source, which no webui starts, and maybe at the target already."""
    job = sides.add(waiting(script, dice, parked=False, owner="dead", server=script.Migration.MOVING))
    if is_there:
        sides.target.put(job._replace(parked=True, owner=None, server=None), new=True).result(10)
    assert sides.copy() == {"moved": 1, "copied": 0}
    assert sides.target.oldest_parked().id == job.id and sides.source.get(job.id) is None


def test_a_move_that_nobody_goes_on_with(script, sides, dice, tmp_path, new_tracker):
    """Then the source's next webui generates it."""
    job = sides.add(waiting(script, dice, parked=False, owner="dead", server=script.Migration.MOVING))
    sides.source.close()
    tracker = make_tracker(script, tmp_path / "from")
    tracker.recover().result(10)
    try:
        assert tracker.store.oldest_parked() == job._replace(parked=True, server=None)
    finally:
        tracker.close().result(10)


def test_what_a_webui_runs_is_left(script, sides, dice):
    for fields in ({"status": "Processing"}, {"status": "Pending"}):
        sides.add(a_job(script, dice, owner=sides.source.owner, **fields))
    assert sides.copy() == {"left": 2, "copied": 0}
    assert jobs_of(script, sides.target) == []


def test_only_jobs(script, sides, dice):
    """The images lie in a folder that all share."""
    job = sides.add(a_job(script, dice, status="Completed"))
    sides.add(waiting(script, dice))
    assert sides.copy(images_url=None) == {"copied": 1, "moved": 1}
    assert sides.target.get(job.id) == job and sides.images.is_empty()


def test_only_images(script, sides, dice):
    job, waits = sides.add(a_job(script, dice, status="Completed")), sides.add(waiting(script, dice))
    assert sides.copy(store_url=None) == {"copied": 2}
    assert b"".join(sides.images.read(job.images[0].name)) == pixels(job.id, 0)
    assert sides.images.read_request(waits) is not None and sides.source.oldest_parked() == waits


# The command


@pytest.mark.parametrize("words", [[], ["copy"], ["copy", "--to-fleet", "--to-files"], ["paste"]], ids=" ".join)
def test_a_command_that_is_invalid(script, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.run_command(words, {})
    assert "usage:" in capsys.readouterr().err


def test_a_command_without_stores(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "EXTENSION_FOLDER", str(tmp_path))
    assert script.run_command(["copy", "--to-fleet"], {}) == 2
    assert "TRACKER_STORE" in capsys.readouterr().err


def test_a_command_with_a_store_that_cannot_be_used(script, tmp_path, capsys, monkeypatch):
    """It does not go on with the other one, and say that all was copied."""
    monkeypatch.setattr(script, "EXTENSION_FOLDER", str(tmp_path))
    (tmp_path / "jobs.json").write_text("{\n}\n")
    environ = {"TRACKER_STORE": "mysql://host/database", "TRACKER_IMAGES": "s3://bucket"}
    assert script.run_command(["copy", "--to-fleet"], environ) == 2
    assert "Nothing was copied, since TRACKER_STORE cannot be used" in capsys.readouterr().err


def test_a_command_without_jobs(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "EXTENSION_FOLDER", str(tmp_path))
    environ = {"TRACKER_IMAGES": "s3://bucket", "TRACKER_DATA_DIR": str(tmp_path / "none")}
    assert script.run_command(["copy", "--to-fleet"], environ) == 2
    assert "There is no jobs.json" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
