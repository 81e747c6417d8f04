"""The live preview of a job is never another job's picture, whenever generations change, on every kind of webui."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import types
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from inside import a_job, when_ended
from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def a_picture(color: Tuple[int, int, int], mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (8, 8), color).convert(mode)


class State:
    """The state of AUTOMATIC1111 and of Forge. A latent is the color that comes of it."""

    def __init__(self, world: World):
        self.world = world
        self.job = ""
        self.time_start: Optional[float] = None
        self.job_no = self.job_count = self.sampling_step = self.id_live_preview = 0
        self.current_latent = self.current_image = None
        self.current_image_sampling_step = 0

    def beginning(self, color: Tuple[int, int, int]) -> Iterator[Callable[[], Any]]:
        """What a generation sets from its begin on, in the order in which it does."""
        for changes in (
            {"time_start": (self.time_start or 0.0) + 1},
            {"job_count": -1},
            {"job_no": 0, "sampling_step": 0, "current_latent": None},
            {"current_image": None, "current_image_sampling_step": 0, "id_live_preview": 0},
            {"job_count": 1},
            {"current_latent": color, "sampling_step": 1},
        ):
            yield lambda changes=changes: vars(self).update(changes)

    def end(self) -> None:
        self.job_count = 0

    def set_current_image(self) -> None:
        opts, shared = self.world.shared.opts, self.world.shared
        if not shared.parallel_processing_allowed or not opts.live_previews_enable:
            return
        every = opts.show_progress_every_n_steps
        if every != -1 and self.sampling_step - self.current_image_sampling_step >= every:
            self.do_set_current_image()

    def do_set_current_image(self) -> None:
        self.world.at("before the latent is read")
        latent = self.current_latent
        self.world.at("while it is decoded")
        if latent is not None:
            self.current_image = a_picture(latent, self.world.mode)
            self.world.at("before it is counted")
            self.id_live_preview += 1
            self.current_image_sampling_step = self.sampling_step
        self.world.at("after it is counted")


class SDNextState(State):
    """SD.Next's: it refuses what the API generates, and a generation that failed leaves its state as it was."""

    disable_preview = False
    api = True

    def beginning(self, color: Tuple[int, int, int]) -> Iterator[Callable[[], Any]]:
        for changes in (
            {"job_count": 0, "job_no": 0},
            {"current_image": None, "current_image_sampling_step": -1},
            {"current_latent": None, "id_live_preview": 0},
            {"job_count": 1, "sampling_step": 0},
            {"time_start": (self.time_start or 0.0) + 1},
            {"current_latent": color, "sampling_step": 1},
        ):
            yield lambda changes=changes: vars(self).update(changes)

    def end(self) -> None:
        self.time_start += 0.5

    def set_current_image(self) -> None:
        raise AssertionError("it would refuse")

    def do_set_current_image(self) -> None:
        if not self.disable_preview and self.current_image_sampling_step != self.sampling_step:
            super().do_set_current_image()


class World:
    """A webui and its tracker, where something can happen at each moment of the making of a preview."""

    def __init__(self, script: Any, tracker: Any, dice: Any, kind: Callable[[World], State] = State):
        self.script, self.tracker, self.dice = script, tracker, dice
        self.mode = "RGB"
        self.happens: Dict[str, Callable[[], Any]] = {}
        self.passed: List[str] = []  # moments
        self.shared = types.SimpleNamespace(
            opts=types.SimpleNamespace(
                live_previews_enable=True, show_progress_every_n_steps=1, live_previews_image_format="png"
            ),
            cmd_opts=types.SimpleNamespace(lowvram=False),
            parallel_processing_allowed=True,
        )
        self.shared.state = self.state = kind(self)
        tracker.host = script.Host()

    def at(self, moment: str) -> None:
        self.passed.append(moment)
        happening = self.happens.pop(moment, None)
        if happening:
            happening()

    def accept(self) -> str:
        job = a_job(self.script, self.dice)
        self.tracker.accept(job, lambda: True, b"").result(30)
        return job.id

    def begin(self, job_id: str, color: Tuple[int, int, int]) -> Iterator[Callable[[], Any]]:
        yield lambda: self.tracker.start(job_id)
        yield from self.state.beginning(color)

    def run(self, job_id: str, color: Tuple[int, int, int]) -> None:
        for step in self.begin(job_id, color):
            step()

    def change(self, job_id: str, color: Tuple[int, int, int]) -> Iterator[Callable[[], Any]]:
        """The end of the generation that runs, and the begin of another."""
        yield self.state.end
        yield self.tracker.generated
        yield from self.begin(job_id, color)

    def preview(self, job_id: str) -> Any:
        return asyncio.run(self.tracker.preview(job_id))

    def color(self, job_id: str) -> Optional[Tuple[int, int, int]]:
        """That of a job's preview."""
        preview = self.preview(job_id)
        if preview is None:
            return None
        assert preview.job_id == job_id
        return Image.open(io.BytesIO(preview.data)).convert("RGB").getpixel((0, 0))


NewWorld = Callable[..., World]


@pytest.fixture
def new_world(script: Any, tracker: Any, dice: Any, monkeypatch: pytest.MonkeyPatch) -> NewWorld:
    tracker.PREVIEW_EVERY = 0.0  # each call looks at the webui

    def make(kind: Callable[[World], State] = State) -> World:
        world = World(script, tracker, dice, kind)
        monkeypatch.setitem(sys.modules, "modules", types.SimpleNamespace(shared=world.shared))
        save = Image.Image.save

        def observed(image: Image.Image, *args: Any, **options: Any) -> None:
            world.at("while it is packed")
            save(image, *args, **options)

        monkeypatch.setattr(Image.Image, "save", observed)
        return world

    return make


def test_shared_and_only_when_asked(new_world, tracker):
    world = new_world()
    tracker.PREVIEW_EVERY = 60.0
    first, second = world.accept(), world.accept()
    assert tracker.begin_preview(first) is None and world.color(second) is None  # they wait
    world.run(first, RED)
    assert world.passed == []

    async def ask() -> List[Any]:
        return await asyncio.gather(*(tracker.preview(first) for _ in range(100)))

    assert {preview.number for preview in asyncio.run(ask())} == {1}
    assert world.passed.count("while it is decoded") == 1
    assert tracker.begin_preview(first) == 1 and tracker.begin_preview(second) is None


MOMENTS = (
    "before the latent is read",
    "while it is decoded",
    "before it is counted",
    "after it is counted",
    "while it is packed",
)


@pytest.mark.parametrize("kind", [State, SDNextState])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_change_at_each_moment(new_world, kind, moment):
    """Each change of generations, up to each of its steps, falls into each moment of the making of a preview."""
    world = new_world(kind)
    steps = len(list(world.change("none", BLUE)))
    for count in range(steps + 1):
        old, new = world.accept(), world.accept()
        world.run(old, RED)
        change = world.change(new, BLUE)

        def happen(change: Any = change, count: int = count) -> None:
            for _ in range(count):
                next(change)()

        world.happens[moment] = happen
        assert world.color(old) in (None, RED)
        assert moment not in world.happens, "it was not reached"
        assert world.state.current_image is None, "the webui's own state has a picture of ours"
        while True:
            assert world.color(old) in (None, RED)
            assert world.color(new) in (None, BLUE), f"after {count} steps"
            step = next(change, None)
            if step is None:
                break
            step()
        assert world.color(old) is None and world.color(new) == BLUE
        world.state.end()
        world.tracker.generated()
        assert world.color(new) is None


def test_a_picture_that_somebody_else_asked_for(new_world):
    """The webui puts one that was made too late into the state of the next generation."""
    world = new_world()
    old, new = world.accept(), world.accept()
    world.run(old, RED)
    world.happens["while it is decoded"] = lambda: [step() for step in world.change(new, BLUE)]
    world.state.set_current_image()
    assert world.state.current_image.getpixel((0, 0)) == RED
    assert world.color(new) == BLUE


@pytest.mark.parametrize("why", ["a card with little memory", "previews at the end of a batch only"])
def test_made_by_the_generation_itself(new_world, why):
    world = new_world()
    if why.startswith("a card"):
        world.shared.parallel_processing_allowed = False
    else:
        world.shared.opts.show_progress_every_n_steps = -1
    job_id = world.accept()
    world.run(job_id, RED)
    assert world.color(job_id) is None
    world.state.do_set_current_image()
    assert world.preview(job_id).number == 1 == world.preview(job_id).number
    world.state.do_set_current_image()
    assert world.preview(job_id).number == 2


def test_as_often_as_the_settings_want_it(new_world):
    world = new_world()
    world.shared.opts.show_progress_every_n_steps = 10
    job_id = world.accept()
    world.run(job_id, RED)
    seen = []
    for step in (9, 10, 11, 19, 20, 25, 31):
        world.state.sampling_step = step
        preview = world.preview(job_id)
        seen.append(preview and preview.number)
    assert seen == [None, 1, 1, 1, 2, 2, 3]
    world.state.job_no, world.state.sampling_step = 1, 5  # the next of its batches
    assert world.preview(job_id).number == 3
    world.state.sampling_step = 10
    assert world.preview(job_id).number == 4


def test_sdnext_where_it_would_be_unwise(new_world):
    world = new_world(SDNextState)
    job_id = world.accept()
    world.run(job_id, RED)
    world.shared.cmd_opts.lowvram = True
    assert world.color(job_id) is None
    world.shared.cmd_opts.lowvram, world.state.job = False, "VAE"
    assert world.color(job_id) is None
    world.state.job, world.state.disable_preview = "API-TXT", True
    assert world.color(job_id) is None
    world.state.disable_preview = False
    world.shared.opts = types.SimpleNamespace(show_progress_type="None")  # it would show the last generation's
    assert world.color(job_id) is None
    world.shared.opts = types.SimpleNamespace(show_progress_type="TAESD")
    assert world.preview(job_id).media_type == "image/jpeg"
    assert world.preview(job_id).number == 1  # at the same step


@pytest.mark.parametrize("format_", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_formats(new_world, format_, mode):
    world = new_world()
    world.mode, world.shared.opts.live_previews_image_format = mode, format_
    job_id = world.accept()
    world.run(job_id, RED)
    preview = world.preview(job_id)
    assert preview.media_type == f"image/{format_}"
    assert Image.open(io.BytesIO(preview.data)).format == format_.upper()


def test_one_that_hangs_or_fails(new_world, tracker, caplog):
    world = new_world()
    tracker.PREVIEW_PATIENCE = 0.1
    job_id = world.accept()
    world.run(job_id, RED)
    held = threading.Event()
    world.happens["while it is decoded"] = lambda: held.wait(30)
    assert world.color(job_id) is None and tracker.begin_preview(job_id) is None
    assert tracker.get(job_id).status == "Processing"
    held.set()
    tracker.PREVIEW_PATIENCE = 30.0
    assert world.color(job_id) == RED
    del world.state.job_no  # as in a fork that counts in another way
    assert world.preview(job_id).number == world.preview(job_id).number == 1
    # Python 3.8 says besides that the test's event loop has ended before what was waited for in it.
    said = [record.getMessage().split(":")[0] for record in caplog.records if record.name == "job_tracker"]
    assert said == [f"Job {job_id} has no preview"]
    tracker.fail(job_id, "no")
    tracker.generated()
    assert when_ended(tracker, job_id).status == "Failed"
