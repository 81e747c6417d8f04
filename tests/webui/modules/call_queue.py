"""One generation at a time: the lock that the API and the UI share."""

import functools
import html
import threading
import time

from modules import errors, fifo_lock, progress, shared
from modules.cmd_args import cmd_opts

queue_lock = threading.Lock() if cmd_opts.shape == "sdnext" else fifo_lock.FIFOLock()


def wrap_queued_call(func):
    @functools.wraps(func)
    def queued(*args, **kwargs):
        with queue_lock:
            return func(*args, **kwargs)

    return queued


def wrap_gradio_gpu_call(func, extra_outputs):
    """For a button of the UI that generates. The first argument names the task; the last result is HTML."""

    @functools.wraps(func)
    def call(*args):
        task = args[0] if str(args[0]).startswith("task(") else None
        began = time.perf_counter()
        if task:
            progress.add_task_to_queue(task)
        try:
            with queue_lock:
                shared.state.begin(task)
                progress.start_task(task)
                try:
                    results = list(func(*args))
                finally:
                    progress.finish_task(task)
                shared.state.end()
        except Exception as error:
            errors.report(f"Error completing request\nArguments: {args}", exc_info=True)
            message = html.escape(f"{type(error).__name__}: {error}")
            results = list(extra_outputs) + [f"<div class='error'>{message}</div>"]
        finally:
            shared.state.job = ""
            shared.state.job_count = 0
            shared.state.skipped = shared.state.interrupted = shared.state.stopping_generation = False
        results[-1] += f"<p class='time'>Time taken: {time.perf_counter() - began:.1f} sec.</p>"
        return tuple(results)

    return call
