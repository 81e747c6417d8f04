"""The tasks under way and waiting, and the route by which the UI asks for them."""

import base64
import io
import random
import string
import time
from collections import OrderedDict
from typing import List, Optional

from pydantic import BaseModel, Field

from modules import shared

current_task = None
pending_tasks = OrderedDict()
finished_tasks = []
KEPT = 16


def create_task_id(task_type):
    name = "".join(random.choices(string.ascii_uppercase + string.digits, k=7))
    return f"task({task_type}-{name})"


def add_task_to_queue(id_job):
    pending_tasks[id_job] = time.time()


def start_task(id_task):
    global current_task
    current_task = id_task
    pending_tasks.pop(id_task, None)


def finish_task(id_task):
    global current_task
    if current_task == id_task:
        current_task = None
    finished_tasks.append(id_task)
    del finished_tasks[:-KEPT]


class PendingTasksResponse(BaseModel):
    size: int = Field(title="Pending task size")
    tasks: List[str] = Field(title="Pending task ids")


class ProgressRequest(BaseModel):
    id_task: Optional[str] = Field(default=None, title="Task ID")
    id_live_preview: int = Field(default=-1, title="Live preview image ID")
    live_preview: bool = Field(default=True, title="Include live preview")


class ProgressResponse(BaseModel):
    active: bool = Field(title="Whether the task is being worked on right now")
    queued: bool = Field(title="Whether the task is in queue")
    completed: bool = Field(title="Whether the task has already finished")
    progress: Optional[float] = Field(default=None, title="Progress")
    eta: Optional[float] = Field(default=None, title="ETA in secs")
    live_preview: Optional[str] = Field(default=None, title="Live preview image")
    id_live_preview: Optional[int] = Field(default=None, title="Live preview image ID")
    textinfo: Optional[str] = Field(default=None, title="Info text")


def get_pending_tasks():
    tasks = list(pending_tasks)
    return PendingTasksResponse(size=len(tasks), tasks=tasks)


def progressapi(req: ProgressRequest):
    state = shared.state
    answer = ProgressResponse(
        active=req.id_task == current_task,
        queued=req.id_task in pending_tasks,
        completed=req.id_task in finished_tasks,
        id_live_preview=-1,
        textinfo="Waiting...",
    )
    if not answer.active:
        if answer.queued:
            waiting = sorted(pending_tasks, key=pending_tasks.get)
            answer.textinfo = f"In queue: {waiting.index(req.id_task) + 1}/{len(waiting)}"
        return answer

    share, jobs, steps = 0.0, state.job_count, state.sampling_steps
    if jobs > 0:
        share = state.job_no / jobs
        if steps > 0:
            share += state.sampling_step / steps / jobs
    answer.progress = min(share, 1)
    elapsed = time.time() - (state.time_start or time.time())
    answer.eta = elapsed / answer.progress - elapsed if answer.progress else None
    answer.textinfo = state.textinfo
    answer.id_live_preview = req.id_live_preview
    if req.live_preview:
        state.set_current_image()
        if state.current_image is not None and state.id_live_preview != req.id_live_preview:
            written = io.BytesIO()
            state.current_image.save(written, "PNG", compress_level=1)
            answer.live_preview = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
            answer.id_live_preview = state.id_live_preview
    return answer


def setup_progress_api(add_api_route):
    add_api_route("/internal/pending-tasks", get_pending_tasks, methods=["GET"])
    add_api_route("/internal/progress", progressapi, methods=["POST"], response_model=ProgressResponse)
