"""What is going on: the job under way, its progress, and what was asked of it."""

import datetime
import threading
import time
import uuid

SHOWN = (
    "skipped",
    "interrupted",
    "stopping_generation",
    "job",
    "job_count",
    "job_timestamp",
    "job_no",
    "sampling_step",
    "sampling_steps",
)


class State:
    """The state of AUTOMATIC1111 and of Forge."""

    def __init__(self):
        self.server_start = time.time()
        self.time_start = None
        self.skipped = False
        self.interrupted = False
        self.stopping_generation = False
        self.job = ""
        self.job_no = 0
        self.job_count = 0
        self.job_timestamp = "0"
        self.sampling_step = 0
        self.sampling_steps = 0
        self.textinfo = None
        self.current_latent = None  # a function that draws the picture as it stands
        self.current_image = None
        self.current_image_sampling_step = 0
        self.id_live_preview = 0
        self._server_command = None
        self._server_command_signal = threading.Event()

    def begin(self, job="(unknown)"):
        self.time_start = time.time()
        self.job_timestamp = datetime.datetime.now().strftime("%Y%m%d%H%M%S")
        self.job = job
        self.job_no = 0
        self.job_count = -1
        self.sampling_step = 0
        self.skipped = self.interrupted = self.stopping_generation = False
        self.textinfo = None
        self.current_latent = self.current_image = None
        self.current_image_sampling_step = 0
        self.id_live_preview = 0

    def end(self):
        self.job = ""
        self.job_count = 0

    def nextjob(self):
        from modules.shared import opts

        if opts.live_previews_enable and opts.show_progress_every_n_steps == -1:
            self.do_set_current_image()
        self.job_no += 1
        self.sampling_step = 0
        self.current_image_sampling_step = 0

    def skip(self):
        self.skipped = True

    def interrupt(self):
        self.interrupted = True

    def stop_generating(self):
        self.stopping_generation = True

    def dict(self):
        return {name: getattr(self, name) for name in SHOWN}

    def set_current_image(self):
        from modules.shared import opts

        every = opts.show_progress_every_n_steps
        if opts.live_previews_enable and every != -1:
            if self.sampling_step - self.current_image_sampling_step >= every:
                self.do_set_current_image()

    def do_set_current_image(self):
        if self.current_latent is not None:
            self.assign_current_image(self.current_latent())
            self.current_image_sampling_step = self.sampling_step

    def assign_current_image(self, image):
        self.current_image = image
        self.id_live_preview += 1

    @property
    def server_command(self):
        return self._server_command

    @server_command.setter
    def server_command(self, value):
        self._server_command = value
        self._server_command_signal.set()

    @property
    def need_restart(self):
        return self.server_command == "restart"

    @need_restart.setter
    def need_restart(self, value):
        if value:
            self.server_command = "restart"

    def request_restart(self):
        self.interrupt()
        self.server_command = "restart"

    def wait_for_server_command(self, timeout=None):
        if not self._server_command_signal.wait(timeout):
            return None
        self._server_command_signal.clear()
        command, self._server_command = self._server_command, None
        return command


class SDNextState(State):
    """SD.Next's: a job has an id, and nothing clears it when a generation raises."""

    def __init__(self):
        super().__init__()
        self.id = ""
        self.paused = False
        self.api = False
        self.disable_preview = False

    def begin(self, title="", task_id=0, api=None):
        super().begin(title)
        self.api = bool(api)
        self.current_image_sampling_step = -1
        self.id = task_id or uuid.uuid4().hex[:15]
        self.job_count = 1
        self.sampling_steps = 0
        return self.id

    def end(self, task_id=None, api=None):
        super().end()
        self.id = ""
        self.job_no = 0
        self.time_start = time.time()

    def nextjob(self):
        self.job_no += 1
        self.current_image_sampling_step = -1

    def set_current_image(self):
        if self.job not in ("VAE", "Upscale") and not self.api:
            self.do_set_current_image()

    def do_set_current_image(self):
        if not self.disable_preview and self.current_image_sampling_step != self.sampling_step:
            super().do_set_current_image()

    def pause(self):
        self.paused = not self.paused

    def dict(self):
        state = super().dict()
        del state["stopping_generation"]
        return state
