"""Errors go to the log; the program goes on."""

import sys
import textwrap
import traceback


def report(message, exc_info=False):
    text = "".join(f"*** {line}\n" for line in message.splitlines())
    if exc_info:
        text += textwrap.indent(traceback.format_exc(), "    ") + "\n---\n"
    sys.stderr.write(text)
    sys.stderr.flush()


def display(error, task):
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    sys.stderr.write(f"{task}: {type(error).__name__}\n{trace}")
    sys.stderr.flush()
