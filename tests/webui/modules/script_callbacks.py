"""What scripts register, and when it is called. One that raises does not stop the others."""

import sys
from collections import namedtuple

from modules import errors

ScriptCallback = namedtuple("ScriptCallback", "script callback name")

_registered = {}


def _register(category, callback, name):
    script = sys._getframe(2).f_code.co_filename
    _registered.setdefault(category, []).append(ScriptCallback(script, callback, name))


def _call(category, *args, last_first=False):
    callbacks = list(_registered.get(category, []))
    results = []
    for entry in reversed(callbacks) if last_first else callbacks:
        try:
            results.append(entry.callback(*args))
        except Exception:
            errors.report(f"Error executing callback {category} for {entry.script}", exc_info=True)
    return results


def clear_callbacks():
    _registered.clear()


def on_app_started(callback, *, name=None):
    _register("app_started", callback, name)


def on_before_reload(callback, *, name=None):
    _register("on_reload", callback, name)


def on_before_ui(callback, *, name=None):
    _register("before_ui", callback, name)


def on_ui_tabs(callback, *, name=None):
    _register("ui_tabs", callback, name)


def on_ui_settings(callback, *, name=None):
    _register("ui_settings", callback, name)


def on_script_unloaded(callback, *, name=None):
    _register("script_unloaded", callback, name)


def app_started_callback(demo, app):
    _call("app_started", demo, app)


def app_reload_callback():
    _call("on_reload")


def before_ui_callback():
    _call("before_ui", last_first=True)


def ui_settings_callback():
    _call("ui_settings")


def ui_tabs_callback():
    return [tab for tabs in _call("ui_tabs") for tab in tabs or []]


def script_unloaded_callback():
    _call("script_unloaded", last_first=True)
