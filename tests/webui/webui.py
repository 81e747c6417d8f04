"""The two modes: the UI with the API beside it, and the API alone."""

import asyncio
import contextlib
import io
import os
import signal
import sys
import threading
import time

from fastapi import FastAPI

from modules import logs, middleware, progress, script_callbacks, scripts, shared, ui
from modules.api.api import Api, credentials_of
from modules.api.endpoints import add_standin_routes
from modules.api.sdnext import Api as SDNextApi
from modules.call_queue import queue_lock
from modules.cmd_args import cmd_opts
from modules.timer import startup_timer

_Policy = getattr(asyncio, "WindowsSelectorEventLoopPolicy", asyncio.DefaultEventLoopPolicy)


class AnyThreadEventLoopPolicy(_Policy):
    """Gives every thread an event loop when it asks for one."""

    def get_event_loop(self):
        try:
            return super().get_event_loop()
        except (RuntimeError, AssertionError):
            loop = self.new_event_loop()
            self.set_event_loop(loop)
            return loop


def die_at_once(number, frame):
    print(f"Interrupted with signal {number} in {frame}")
    os._exit(0)


def root_path():
    return "/" + cmd_opts.subpath if cmd_opts.subpath else ""


def initialize():
    asyncio.set_event_loop_policy(AnyThreadEventLoopPolicy())
    signal.signal(signal.SIGINT, die_at_once)
    scripts.load_scripts()
    startup_timer.record("load scripts")


def api_only():
    handlers = {Exception: middleware.forge_exception_handler} if cmd_opts.shape == "forge" else None
    app = FastAPI(exception_handlers=handlers)
    middleware.setup_middleware(app)
    api = Api(app, queue_lock)
    add_standin_routes(app)
    script_callbacks.before_ui_callback()
    script_callbacks.app_started_callback(None, app)
    print(f"Startup time: {startup_timer.summary()}.\n", end="")  # at once, whoever else writes
    api.launch(cmd_opts.port or 7861, root_path())


def webui():
    ui.keep_pages_local()
    while True:
        script_callbacks.before_ui_callback()
        shared.demo = ui.create_ui()
        startup_timer.record("create ui")
        shared.demo.queue(64)
        app_kwargs = {"docs_url": "/docs", "redoc_url": "/redoc"}
        if cmd_opts.shape == "forge":
            app_kwargs["exception_handlers"] = {Exception: middleware.forge_exception_handler}
        app, _, _ = shared.demo.launch(
            share=False,
            server_port=cmd_opts.port,
            auth=list(credentials_of(cmd_opts.gradio_auth).items()) or None,
            inbrowser=False,
            prevent_thread_lock=True,
            allowed_paths=[],
            app_kwargs=app_kwargs,
            root_path=root_path(),
        )
        startup_timer.record("gradio launch")

        middleware.remove_gradio_cors(app)
        middleware.setup_middleware(app)
        progress.setup_progress_api(app.add_api_route)
        ui.setup_ui_api(app)
        if cmd_opts.api:
            Api(app, queue_lock)
        add_standin_routes(app)
        startup_timer.record("add APIs")
        script_callbacks.app_started_callback(shared.demo, app)
        startup_timer.record("app_started_callback")
        print(f"Startup time: {startup_timer.summary()}.\n", end="")  # at once, whoever else writes

        command = None
        while command not in ("stop", "restart"):
            command = shared.state.wait_for_server_command(timeout=5)
        if command == "stop":
            print("Stopping server...")
            shared.demo.close()
            return

        print("Restarting UI...")
        shared.demo.close()
        time.sleep(0.5)
        startup_timer.reset()
        script_callbacks.app_reload_callback()
        script_callbacks.script_unloaded_callback()
        scripts.load_scripts()
        startup_timer.record("load scripts")


def sdnext():
    """SD.Next, which has no mode without the UI, and starts anew as a process when asked to restart."""
    import gradio

    ui.keep_pages_local()
    script_callbacks.before_ui_callback()
    shared.demo = ui.create_ui()
    shared.demo.queue(concurrency_count=64)
    with contextlib.redirect_stdout(io.StringIO()):
        app, local_url, _ = shared.demo.launch(
            share=False,
            server_port=cmd_opts.port,
            auth=list(credentials_of(cmd_opts.auth).items()) or None,
            prevent_thread_lock=True,
            max_threads=64,
            show_api=False,
            quiet=True,
            app_kwargs={"title": "SD.Next", "docs_url": "/docs", "redoc_url": "/redocs"},
            _frontend=False,
        )
    print("Running on local URL: ", local_url.rstrip("/"))

    middleware.remove_gradio_cors(app)
    middleware.setup_sdnext_middleware(app)
    shared.api = SDNextApi(app, queue_lock)
    shared.api.register()
    progress.setup_progress_api(shared.api.add_api_route)
    ui.setup_ui_api(app)
    add_standin_routes(app)
    script_callbacks.app_started_callback(shared.demo, app)
    if cmd_opts.subpath:  # the API has its routes there from the next start on
        shared.opts.subpath = cmd_opts.subpath
        shared.opts.save()
        gradio.mount_gradio_app(app, shared.demo, path=cmd_opts.subpath)
    logs.take_over()
    print(f"Startup time: {startup_timer.summary()}.\n", end="")  # at once, whoever else writes

    while shared.state.wait_for_server_command(timeout=5) != "restart":
        pass
    print("Server restarting...")
    shared.demo.close()
    os.execv(sys.executable, [sys.executable] + sys.argv)


def start():
    mode = api_only if cmd_opts.nowebui else webui
    if cmd_opts.shape == "sdnext":
        mode = sdnext
    initialize()
    if cmd_opts.shape == "forge":
        threading.Thread(target=mode, daemon=True).start()
        while True:  # Forge keeps its main thread for the model
            time.sleep(0.01)
    mode()
    sys.stdout.flush()
