"""images/: what is stored is given back as it was, and nothing else is followed, kept or lost."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import PIL.Image
import pytest
from disks import mounted
from inside import WrappedOs, a_job, an_answer, files_are_whole, generate, make_tracker, pixels, when_ended, within


@pytest.fixture
def images(script, tmp_path):
    return script.ImageStore(str(tmp_path / "images"))


@pytest.fixture(params=["folder", "bucket"])
def any_images(script, tmp_path, request, monkeypatch):
    """The store of each kind. In a bucket, `keep` gives all to it, and the folder is empty then."""
    if request.param == "folder":
        return script.ImageStore(str(tmp_path / "images"))
    bucket = request.getfixturevalue("bucket")
    for name, value in bucket.environ.items():
        monkeypatch.setenv(name, value)
    return script.ObjectImageStore(str(tmp_path / "images"), bucket.url)


def keep(images: Any, job: Any, answer: Any) -> Any:
    """Stores an answer as the tracker does, and returns the job."""
    saved = images.save(job, answer)
    images.publish(saved)
    if images.is_shared:
        images.remove_local(images.counted_files_of(saved))
        assert not list(images.local_files())
    return saved


@pytest.fixture
def today(script, dice):
    return a_job(script, dice, timestamp=int(time.time()))


def test_images(script, any_images, today):
    images, content = any_images, [pixels(today.id, number) for number in range(3)]
    assert images.is_empty()
    saved = keep(images, today._replace(prompt=""), an_answer(script, today.id, 3))
    assert not images.is_empty() and saved.prompt == today.id
    assert [b"".join(images.read(image.name)) for image in saved.images] == content
    assert [image.size for image in saved.images] == [len(data) for data in content]
    assert {image.media_type for image in saved.images} == {"image/png"}
    assert saved.bytes == sum(map(images.size, images.counted_files_of(saved)))
    assert images.size(saved.images[1].name) == len(content[1])
    assert b"".join(images.read(saved.images[1].name, 10, 30)) == content[1][10:30]
    assert images.find(today._replace(prompt="")) == saved
    assert images.read_values(saved, whole=True) == ({"prompt": today.id}, "{}")
    assert json.loads(b"".join(images.replay(saved)).decode())["images"] == [
        base64.b64encode(one).decode() for one in content
    ]
    assert images.remove([saved.images[1].name]) == len(content[1])
    assert images.missing(saved) == {1} and images.find(today) is None
    assert images.image_sizes(saved) == [len(content[0]), None, len(content[2])]
    assert images.remove(images.files_of(saved)) == saved.bytes - len(content[1])
    assert images.is_empty() and images.size(saved.images[0].name) is None and images.find(today) is None
    with pytest.raises(script.StoreError) as gone:
        list(images.read(images.answer_name(saved)))
    assert not gone.value.temporary


def test_requests(any_images, today):
    connected, parked = today, today._replace(id="Parked00", promised=True, parked=True)
    for job in (connected, parked):
        assert any_images.read_request(job) is None and not any_images.share_request(job)
        any_images.save_request(job, b"{}")
        assert any_images.share_request(job) and any_images.has_request(job)
        assert any_images.read_request(job) == b"{}"
        any_images.remove_request(job)
        assert not any_images.has_request(job) and any_images.read_request(job) is None
    assert any_images.is_empty()


def test_what_is_older(script, any_images, today):
    saved = keep(any_images, today, an_answer(script, today.id, 2))
    any_images.save_request(today._replace(id="Parked00", parked=True), b"{}")
    found = set(any_images.older_than(time.time() + 9))
    assert found == {(today.id, name) for name in any_images.counted_files_of(saved)} | {
        ("Parked00", f"{any_images.day_of(today)}/Parked00.request.json")
    }
    assert not set(any_images.older_than(time.time() - 99))


def test_a_large_answer(script, any_images, today):
    """It is read in parts, in the bucket, too, and comes there in several parts."""
    image, long = os.urandom(11 << 20), "x" * (1 << 20)
    rest = json.dumps({"images": [], "parameters": {"prompt": long}, "info": long}).encode()
    saved = keep(any_images, today, script.Answer([base64.b64encode(image), b""], rest))
    assert saved.ranges and b"".join(any_images.read(saved.images[0].name)) == image
    assert b"".join(any_images.read(saved.images[0].name, 5 << 20, 9 << 20)) == image[5 << 20 : 9 << 20]
    parameters, info = any_images.read_values(saved, whole=True)
    assert (json.loads(b"".join(parameters.chunks())), json.loads(b"".join(info.chunks()))) == ({"prompt": long}, long)
    answer = json.loads(b"".join(any_images.replay(saved)).decode())
    assert answer["images"] == [base64.b64encode(image).decode(), ""]
    assert any_images.image_sizes(saved) == [len(image), 0]


def test_thumbnails(any_images, script, today):
    picture = io.BytesIO()
    PIL.Image.new("RGB", (600, 300), "red").save(picture, "PNG")
    saved = keep(any_images, today, script.Answer([base64.b64encode(picture.getvalue())], b"{}"))
    saved = saved._replace(status="Completed")
    assert any_images.read_thumbnail(saved) is None
    made = any_images.make_thumbnail(saved)
    assert PIL.Image.open(io.BytesIO(made)).size == (128, 64) and any_images.read_thumbnail(saved) == made
    any_images.remove(any_images.files_of(saved))
    assert any_images.read_thumbnail(saved) is None and any_images.make_thumbnail(saved) is None
    assert any_images.is_empty()


def test_images_in_records(script, images, today):
    """An earlier version on the same folder reads the names alone, and would set aside what else it finds there."""
    strange = [base64.b64encode(data) for data in (b"\xff\xd8\xff", b"no image", b"RIFF....WEBP")]
    saved = images.save(today, an_answer(script, today.id, 1)._replace(images=[*strange, b"no base64"]))
    record = json.loads(script.record_of(saved).decode())
    assert record["images"] == [image.name for image in saved.images]
    assert script.job_from_record(record) == saved
    assert [(image.file_name, image.size, image.media_type) for image in saved.images] == [
        (f"{today.id}_0.jpg", 3, "image/jpeg"),
        (f"{today.id}_1.bin", 8, "application/octet-stream"),
        (f"{today.id}_2.webp", 12, "image/webp"),
        (f"{today.id}_3.txt", 9, "text/plain"),
    ]
    unknown = saved._replace(images=tuple(image._replace(size=None) for image in saved.images))
    assert script.job_from_record(json.loads(script.record_of(unknown).decode())) == unknown
    for details in (None, {}, [], [[1, "image/png"]] * 5, [None] * 4, [[1]] * 4, [[-1, "a\r\nb: c"], [True, 1], "", 7]):
        assert script.job_from_record({**record, "image_details": details}) == unknown
    del record["image_details"]
    assert script.job_from_record(record) == unknown
    for names in (None, "a", [1], [None], ["../x_0.png"], ["2025-01-12/AAAAAAAA_0.png"]):
        with pytest.raises(ValueError):
            script.job_from_record({**record, "images": names})


STRINGS = [
    "",
    "A",
    "AAAA",
    "data:image/png;base64,iVBORw0KGgo=",
    "no base64 at all",
    "AAA=",
    "AAB=",
    "AA A",
    "\ud800",
    "猫" * 4,
]


@pytest.mark.parametrize("text", STRINGS, ids=ascii)
def test_strings_that_are_no_images(script, any_images, today, text):
    images = any_images
    saved = keep(images, today, script.Answer([text.encode("utf-8", "surrogatepass")], b"{}"))
    (image,) = saved.images
    given = b"".join(images.read_as_json(image.name)).decode()
    assert json.loads(given) == text.partition(",")[2] if text.startswith("data:") else json.loads(given) == text


@pytest.mark.parametrize("kind", ["a file", "a link to nothing"])
def test_images_is_no_folder(script, today, tmp_path, caplog, kind):
    place = tmp_path / "images"
    if kind == "a file":
        place.write_bytes(b"precious")
    else:
        place.symlink_to(tmp_path / "nowhere")
    images = script.ImageStore(str(place))
    saved = images.save(today, an_answer(script, today.id, 1))
    assert b"".join(images.read(saved.images[0].name)) == pixels(today.id, 0)
    (aside,) = tmp_path.glob("images.damaged-*")
    assert str(aside) in caplog.text
    assert kind != "a file" or aside.read_bytes() == b"precious"


def test_images_goes_while_it_is_used(script, images, today, tmp_path):
    script.shutil.rmtree(str(tmp_path / "images"))
    assert list(images.older_than(time.time() + 9)) == []
    saved = images.save(today, an_answer(script, today.id, 1))
    assert images.size(saved.images[0].name)


def test_images_may_be_a_link(script, today, tmp_path):
    """To another disk. Only below it no link is followed."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").symlink_to(tmp_path / "elsewhere")
    images = script.ImageStore(str(tmp_path / "images"))
    saved = images.save(today, an_answer(script, today.id, 1))
    assert (tmp_path / "elsewhere" / saved.images[0].name).exists()
    assert len(list(images.older_than(time.time() + 9))) == 2


def test_no_link_below_images_is_followed(script, images, today, tmp_path, caplog):
    outside = tmp_path / "outside"
    outside.mkdir()
    name = f"{images.day_of(today)}/{today.id}_0.png"
    (outside / f"{today.id}_0.png").write_bytes(b"secret")
    day = tmp_path / "images" / images.day_of(today)
    # A folder that is a link.
    day.symlink_to(outside)
    with pytest.raises(script.StoreError):
        list(images.read(name))
    assert images.size(name) is None
    assert images.remove([name]) == 0
    assert list(images.older_than(time.time() + 9)) == []
    saved = images.save(today, an_answer(script, today.id, 1))
    assert b"".join(images.read(name)) == pixels(today.id, 0)
    assert os.listdir(str(outside)) == [f"{today.id}_0.png"]
    assert (outside / f"{today.id}_0.png").read_bytes() == b"secret"
    assert "set aside" in caplog.text
    # An image that is a link.
    (tmp_path / "images" / name).unlink()
    (tmp_path / "images" / name).symlink_to(outside / f"{today.id}_0.png")
    with pytest.raises(script.StoreError):
        list(images.read(name))
    images.remove(images.files_of(saved))
    assert not os.path.lexists(str(tmp_path / "images" / name))
    assert (outside / f"{today.id}_0.png").exists()


@pytest.mark.parametrize("make", ["mkdir", "mkfifo"])
def test_what_is_no_file_is_no_image(images, today, tmp_path, make):
    """And nobody waits for the other end of a pipe."""
    if not hasattr(os, make):
        pytest.skip("Windows has no such pipes")
    day = tmp_path / "images" / images.day_of(today)
    day.mkdir()
    getattr(os, make)(str(day / f"{today.id}_0.png"))
    assert within(20, images.size, f"{images.day_of(today)}/{today.id}_0.png") is None


def test_images_gone_or_cut(script, tmp_path, dice):
    tracker = make_tracker(script, tmp_path, TRACKER_RETENTION="off")
    job = a_job(script, dice, timestamp=int(time.time()))
    tracker.accept(job, lambda: True, b"").result()
    tracker.start(job.id)
    tracker.finish(job.id, an_answer(script, job.id, 3))
    done = when_ended(tracker, job.id)
    (tmp_path / "images" / done.images[0].name).unlink()
    os.truncate(str(tmp_path / "images" / done.images[1].name), 50)
    shown = json.loads(b"".join(tracker.as_json(done)).decode())
    assert (shown["status"], shown["images"][0]) == ("Completed", None)
    assert shown["images"][2] == an_answer(script, job.id, 3).images[2].decode()
    assert "no longer on disk" in shown["error"]
    assert tracker.delete(job.id)
    assert not list(tmp_path.glob("images/*"))
    tracker.close()


@pytest.mark.parametrize("opened", range(3))
def test_images_that_cannot_be_read_for_a_moment(script, tmp_path, dice, opened):
    """Too many files are open: whoever asks is told so, and not that the images are lost."""
    tracker = make_tracker(script, tmp_path, TRACKER_RETENTION="off")
    job = a_job(script, dice, timestamp=int(time.time()))
    assert generate(script, tracker, job) == "Completed"
    count = [0]

    def fail_once(path: str, *arguments: Any) -> int:
        if f"{os.sep}images{os.sep}" in str(path):
            count[0] += 1
            if count[0] == opened + 1:
                raise OSError(errno.EMFILE, "Too many open files", path)
        return os.open(path, *arguments)

    def shown() -> Any:
        return json.loads(b"".join(tracker.as_json(tracker.get(job.id))))

    whole = shown()
    assert whole["images"] == [image.decode() for image in an_answer(script, job.id, 1).images]
    script.os = WrappedOs(open=fail_once)
    if opened == 1:  # between two looks at the image
        without = shown()
        assert without["error"] == "The parameters cannot be read: Too many open files"
        assert without == {**whole, "parameters": None, "info": None, "error": without["error"]}
    else:
        with pytest.raises(script.StoreError, match="Too many open files"):
            shown()
    assert shown() == whole
    script.os = os
    tracker.close()


def test_an_image_that_was_no_image_and_is_damaged(script, images, today, tmp_path):
    saved = images.save(today, script.Answer([b"no base64"], b"{}"))
    (tmp_path / "images" / saved.images[0].name).write_bytes(b"\xff\xfe")
    with pytest.raises(script.StoreError):
        list(images.read_as_json(saved.images[0].name))


def test_a_folder_that_a_purge_takes_away_just_now(script, images, today, tmp_path):
    """It removes the day's folder with its last file, while another job's first file is being made."""
    made, real = [], os.open

    def open_late(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith(".part") and not made:
            made.append(os.rmdir(os.path.dirname(path)))
        return real(path, flags, mode)

    script.os = WrappedOs(open=open_late)
    saved = images.save(today, an_answer(script, today.id, 1))
    assert made and images.size(saved.images[0].name)


def test_folders_that_come_and_go_all_the_time(script, images, dice):
    """In a fleet, each job's files leave for the bucket, and the folder goes with them while another's are made."""

    def save_and_remove(job: Any) -> None:
        for _ in range(100):
            images.remove(images.files_of(images.save(job, an_answer(script, job.id, 1))))

    with ThreadPoolExecutor(4) as threads:
        work = [threads.submit(save_and_remove, a_job(script, dice, timestamp=1736712000)) for _ in range(4)]
    assert [one.result() for one in work] == [None] * 4


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_images_that_cannot_be_stored_leave_nothing(script, images, today, tmp_path, call):
    count = [0]

    def fail_the_third(*arguments: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return getattr(os, call)(*arguments)

    script.os = WrappedOs(**{call: fail_the_third})
    with pytest.raises(script.StoreError):
        images.save(today, an_answer(script, today.id, 3))
    assert not list(tmp_path.glob("images/*/*"))


def test_images_that_are_read_only(script, tmp_path, dice):
    """The job has failed and says why; as soon as it can be written, others are stored."""
    with mounted(tmp_path / "images", "ro"):
        tracker = make_tracker(script, tmp_path, TRACKER_RETENTION="off")
        failed = a_job(script, dice, timestamp=int(time.time()))
        assert generate(script, tracker, failed) == "Failed"
        assert "Read-only file system" in tracker.get(failed.id).error
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "images")], check=True)
        done = a_job(script, dice, timestamp=int(time.time()))
        assert generate(script, tracker, done) == "Completed"
        assert files_are_whole(tracker, tracker.get(done.id))
        tracker.close().result(60)
