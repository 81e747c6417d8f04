"""The small pictures beside a job's images: of what they are made, and that they come, stay and go with the job."""

from __future__ import annotations

import asyncio
import base64
import errno
import io
import os
import random
import threading
import time
from typing import Any, Iterator, List, Optional, Tuple

import pytest
from inside import WrappedOs, a_job, make_tracker, when_ended
from PIL import Image, PngImagePlugin

METADATA = b"Steps: 20, Seed: 7"


@pytest.fixture
def images(script, tmp_path):
    return script.ImageStore(str(tmp_path / "images"))


@pytest.fixture
def keep(script, images, dice):
    """`keep(*files)` is a Completed job with these images."""

    def keep_files(*files: bytes) -> Any:
        job = a_job(script, dice, timestamp=int(time.time()), status="Completed")
        return images.save(job, script.Answer([*map(base64.b64encode, files)], b'{"images":[]}'))

    return keep_files


def picture(mode: str = "RGB", format_: str = "PNG", size: Tuple[int, int] = (300, 200), **options: Any) -> bytes:
    """A plain one, half of it transparent where there is such a thing."""
    image = Image.new("RGBA", size, (200, 30, 30, 255))
    image.paste((200, 30, 30, 0), (0, 0, size[0] // 2, size[1]))
    if mode == "P":
        palette = image.convert("P", palette=Image.ADAPTIVE)
        palette.info["transparency"] = palette.getpixel((0, 0))
        image = palette
    elif mode == "I;16":
        image = Image.frombytes("I;16", size, b"\x00\x60" * (size[0] * size[1]))
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def opened(thumbnail: Optional[bytes]) -> Any:
    assert thumbnail is not None
    image = Image.open(io.BytesIO(thumbnail), formats=["JPEG"])
    image.load()
    return image


def near(colour: Tuple[int, ...], other: Tuple[int, ...]) -> bool:
    return all(abs(one - two) <= 12 for one, two in zip(colour, other))


WHITE, RED = (255, 255, 255), (200, 30, 30)


@pytest.mark.parametrize(
    "mode, format_, left, right",
    [
        *(("RGB", format_, RED, RED) for format_ in ("PNG", "JPEG", "BMP", "TIFF")),
        *(("RGBA", format_, WHITE, RED) for format_ in ("PNG", "WEBP")),
        *(("P", format_, None, RED) for format_ in ("PNG", "GIF")),
        ("CMYK", "JPEG", RED, RED),
        ("LA", "PNG", WHITE, (81, 81, 81)),
        ("I;16", "PNG", (96, 96, 96), (96, 96, 96)),
        ("1", "PNG", None, None),
    ],
)
def test_of_every_kind_of_image(keep, images, mode, format_, left, right):
    """On white where it is transparent, and by the upper half of 16 bits."""
    thumbnail = opened(images.make_thumbnail(keep(picture(mode, format_))))
    assert (thumbnail.mode, max(thumbnail.size)) == ("RGB", 128) and thumbnail.size[1] in (85, 86)
    for colour, place in ((left, 20), (right, 110)):
        assert colour is None or near(thumbnail.getpixel((place, 40)), colour), thumbnail.getpixel((place, 40))


def test_it_has_nothing_of_the_metadata_and_is_never_enlarged(keep, images):
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", METADATA.decode())
    exif = Image.Exif()
    exif[0x9286] = METADATA
    for file in (picture(size=(64, 40), pnginfo=text), picture("RGB", "JPEG", (64, 40), exif=exif, comment=METADATA)):
        thumbnail = images.make_thumbnail(keep(file))
        assert METADATA in file and METADATA not in thumbnail
        image = opened(thumbnail)
        assert image.size == (64, 40)
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


def test_fifty_rows_take_less_than_a_megabyte(keep, images):
    """Of noise, which is the worst that there is."""
    dice = random.Random(7)

    def noise(width: int, height: int) -> bytes:
        data = bytes(dice.getrandbits(8) for _ in range(width * height * 3))
        file = io.BytesIO()
        Image.frombytes("RGB", (width, height), data).save(file, "PNG")
        return file.getvalue()

    sizes = [len(images.make_thumbnail(keep(noise(*size)))) for size in ((128, 128), (129, 129), (256, 256))]
    assert max(sizes) * 50 < 1_000_000, sizes


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


NONE = {
    "text": b"no image",
    "cut": cut(picture(size=(500, 500))),
    "cut within its head": picture()[:20],
    "not what it begins like": b"GIF89a" + picture(),
    "a format that Pillow does not know": b"\x00\x00\x00\x0cJXL \r\n\x87\n" + b"x" * 100,
    "too many pixels": picture("1", size=(8001, 8000)),
}


@pytest.mark.parametrize("name", NONE)
def test_what_has_none(script, keep, images, name, tmp_path):
    job = keep(NONE[name], picture())
    before = set(tmp_path.glob("images/*/*"))
    assert images.make_thumbnail(job) is None
    assert images.read_thumbnail(job) is None
    assert set(tmp_path.glob("images/*/*")) == before, "nothing is left"
    assert images.may_have_thumbnail(job) is (name != "text")


def test_jobs_without_images_have_none(script, keep, images, dice):
    done = keep(picture())
    assert images.may_have_thumbnail(done)
    for job in (keep(), a_job(script, dice), done._replace(status="Failed"), keep(b"text")):
        assert not images.may_have_thumbnail(job)
        assert images.make_thumbnail(job) is None


def test_it_is_made_once_and_anew_if_it_is_damaged(script, keep, images, tmp_path):
    made: List[str] = []
    original = script.thumbnail_of
    script.thumbnail_of = lambda file, ending: made.append(ending) or original(file, ending)
    job = keep(picture("RGB", "JPEG"))
    path = tmp_path / "images" / script.ImageStore.thumbnail_name(job)
    assert images.read_thumbnail(job) is None and not path.exists()
    thumbnail = images.make_thumbnail(job)
    assert images.make_thumbnail(job) == images.read_thumbnail(job) == path.read_bytes() == thumbnail
    assert made == ["jpg"]
    for damaged in (b"", cut(thumbnail), b"x" * 9):
        path.write_bytes(damaged)
        assert images.read_thumbnail(job) is None
        assert images.make_thumbnail(job) == path.read_bytes() == thumbnail
    assert len(made) == 4


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_it_is_as_private_as_the_images(script, keep, images, tmp_path):
    (tmp_path / "jobs.json").write_text("{}")
    (tmp_path / "jobs.json").chmod(0o640)
    job = keep(picture())
    images.make_thumbnail(job)
    names = (job.images[0].name, script.ImageStore.thumbnail_name(job))
    modes = [(tmp_path / "images" / name).stat().st_mode & 0o777 for name in names]
    assert modes[0] == modes[1] and not modes[1] & 0o007


@pytest.mark.parametrize("call", ["open", "pwrite", "replace"])
def test_a_disk_that_does_not_take_it_is_no_trouble(script, keep, images, tmp_path, call):
    job = keep(picture())
    before = set(tmp_path.glob("images/*/*"))

    def fail(*arguments: Any) -> Any:
        if call == "open" and not arguments[1] & os.O_CREAT:
            return os.open(*arguments)
        raise OSError(errno.ENOSPC if call == "pwrite" else errno.EROFS, "It does not take it")

    script.os = WrappedOs(**{call: fail})
    opened(images.make_thumbnail(job))
    assert set(tmp_path.glob("images/*/*")) == before, "nothing is kept, nor left"


def test_an_image_that_cannot_be_read_for_a_moment_is_not_taken_for_lost(script, keep, images):
    job = keep(picture())

    def fail(path: str, *arguments: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files", path)

    script.os = WrappedOs(open=fail)
    for look in (images.read_thumbnail, images.make_thumbnail):
        with pytest.raises(script.StoreError, match="Too many open files"):
            look(job)


# With its job


def generated(script: Any, tracker: Any, dice: random.Random) -> Any:
    """A Completed job whose thumbnail has been made."""
    job = a_job(script, dice, timestamp=int(time.time()))
    tracker.accept(job, lambda: True, b"").result()
    tracker.start(job.id)
    rest = b'{"images":[],"parameters":{},"info":"{}"}'
    tracker.finish(job.id, script.Answer([base64.b64encode(picture())] * 2, rest))
    done = when_ended(tracker, job.id)
    assert tracker.images.make_thumbnail(done)
    assert tracker.images.read_thumbnail(done)
    return done


@pytest.fixture
def tracker(script, tmp_path) -> Iterator[Any]:
    tracker = make_tracker(script, tmp_path, TRACKER_RETENTION="30")
    yield tracker
    tracker.close()


def test_it_goes_with_its_job_and_is_no_image_of_it(script, tracker, dice, tmp_path):
    first = generated(script, tracker, dice)
    assert len(first.images) == 2
    size = sum(path.stat().st_size for path in tmp_path.glob("images/*/*"))
    assert first.bytes < size
    purged = tracker.remove([first])
    assert purged == script.Purged(1, 2, size), "what was freed is said in full"
    assert not list(tmp_path.glob("images/*"))
    second = generated(script, tracker, dice)
    assert tracker.delete(second.id)
    assert not list(tmp_path.glob("images/*"))


def test_one_that_no_job_names_is_removed_by_a_purge_and_is_no_image(script, tracker, dice, tmp_path):
    done = generated(script, tracker, dice)
    thumbnail = tmp_path / "images" / script.ImageStore.thumbnail_name(done)
    strays = [thumbnail.with_name(name) for name in ("STRAY000.thumb.jpg", "STRAY000.thumb.0123abcd.part")]
    for path in strays:
        path.write_bytes(b"x" * 10)
    for path in tmp_path.glob("images/*/*"):
        os.utime(str(path), (1, 1))
    assert tracker.housekeeper.purge() == script.Purged(0, 0, 20)
    assert thumbnail.exists() and not any(path.exists() for path in strays)


def test_recovery_finds_a_job_that_has_one(script, tracker, dice):
    done = generated(script, tracker, dice)
    found = tracker.images.find(done._replace(images=(), bytes=0, prompt="a cat"))
    assert (found.images, found.bytes) == (done.images, done.bytes)


def test_one_that_takes_long_holds_up_nobody_but_those_who_need_one_made(script, tracker, dice):
    """And none is made for whoever has left."""
    made, began, go_on = [], threading.Event(), threading.Event()
    known, large, other = (generated(script, tracker, dice) for _ in range(3))
    for job in (large, other):
        tracker.images.remove([script.ImageStore.thumbnail_name(job)])
    original = script.thumbnail_of

    def make_slowly(file: Any, ending: str) -> bytes:
        made.append(file)
        began.set()
        assert go_on.wait(20)
        return original(file, ending)

    script.thumbnail_of = make_slowly

    async def ask() -> List[Optional[bytes]]:
        stays, left = threading.Event(), threading.Event()
        slow = [asyncio.ensure_future(tracker.thumbnail(large, stays)) for _ in range(10)]
        await asyncio.get_running_loop().run_in_executor(None, began.wait, 20)
        late = asyncio.ensure_future(tracker.thumbnail(other, left))
        assert await tracker.thumbnail(known, stays)
        assert (await tracker.find(other.id)).id == other.id
        left.set()
        go_on.set()
        return [await late, *(await asyncio.gather(*slow))]

    nothing, *thumbnails = asyncio.run(ask())
    assert nothing is None and len(made) == 1, "those who ask for the same one share it"
    assert len(set(thumbnails)) == 1 and thumbnails[0]


def test_a_job_that_is_deleted_meanwhile_leaves_none(script, keep, images, tmp_path):
    original, job = script.thumbnail_of, keep(picture())

    def make_late(file: Any, ending: str) -> bytes:
        made = original(file, ending)
        images.remove(images.files_of(job))
        return made

    script.thumbnail_of = make_late
    assert images.make_thumbnail(job) is None
    assert not list(tmp_path.glob("images/*"))
