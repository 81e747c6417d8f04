"""Scripts of other extensions, for webuis in which tests need something rare to happen."""

from __future__ import annotations

import threading
from typing import Optional

from harness import Gate, Webui, until

# Threads take turns as often as can be.
HURRY = "import sys\n\nsys.setswitchinterval(1e-6)\n"

# A generation as the UI starts it. It holds the bare lock, and comes back with its pixels.
UI = """
import base64

from modules import call_queue, script_callbacks, ui
from modules.standin import StandIn


def generate(hold: str = ""):
    def txt2img(*args):
        ui.StandIn = lambda: StandIn({"hold": hold})
        return ui.txt2img(*args)

    call = call_queue.wrap_gradio_gpu_call(txt2img, [None, ""])
    pictures, *_ = call("task(ui)", "of the UI", "", "Euler", 2, 64, 64, 1, 1, 7, 7)
    return base64.b64encode(pictures[0].tobytes()).decode()


script_callbacks.on_app_started(lambda _, app: app.add_api_route("/ui/generate", generate, methods=["POST"]))
"""

# Holds a request at a place of the webui, as `held_at` asks for it.
HOLDS = """
import os
import time

from modules.api import generation


def hold(name, request_of):
    function = getattr(generation, name)

    def held(*args):
        place, _, gate = str(request_of(args)).partition(":")
        if place == name:
            with open(gate + ".reached", "a") as file:
                file.write("x")
            while not os.path.exists(gate):
                time.sleep(0.005)
        return function(*args)

    setattr(generation, name, held)


hold("always_on", lambda args: args[0].infotext)
hold("prepare", lambda args: (getattr(args[0], "comments", None) or {}).get("hold"))
hold("encode", lambda args: args[0].standin.message)
"""


def held_at(place: str, gate: Gate) -> dict:
    """Fields of a request that waits for the gate at a place: "always_on", before the webui has accepted it,
    "prepare", with the lock held and before generation begins, or "encode", with the lock released."""
    mark = f"{place}:{gate.path}"
    if place == "always_on":
        return {"infotext": mark}
    return {"comments": {"hold": mark}} if place == "prepare" else {"standin": {"message": mark}}


def reached(gate: Gate) -> int:
    """How many requests have come to the place of `held_at`."""
    path = gate.path.with_name(gate.path.name + ".reached")
    return path.stat().st_size if path.exists() else 0


class FromUi(threading.Thread):
    """A generation of the UI, in a webui with the script."""

    def __init__(self, webui: Webui, gate: Optional[Gate] = None):
        super().__init__(daemon=True)
        self.webui, self.gate, self.pixels = webui, gate, ""
        self.start()

    def run(self) -> None:
        params = {"hold": str(self.gate.path) if self.gate else ""}
        self.pixels = self.webui.client.post("/ui/generate", params=params).json()

    def until_it_runs(self) -> None:
        def runs() -> bool:
            state = self.webui.client.get("/sdapi/v1/progress?skip_current_image=true").json()["state"]
            return state["job"] == "task(ui)" and state["sampling_step"] >= 1

        until(runs, what="the UI generates")

    def result(self) -> str:
        self.join(60)
        return self.pixels
