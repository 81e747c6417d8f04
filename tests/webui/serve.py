"""Starts stand-ins for the tests by forks of one process that has imported their packages already.

An import of gradio takes a second and a half of processor time, and the tests start hundreds of webuis. This program
imports what launch.py will import of packages, nothing of the stand-in's and nothing of an extension, and then does
what it is told on its standard input, which is a socket:

    {"start": [arguments], "environ": {...}, "log": path}   forks, and the fork runs launch.py; answers the process's ID
    {"poll": process ID}                                    answers its exit status as `subprocess` has it, or null

It ends when the other side of the socket does, and with it all its forks. Linux only.
"""

import ctypes
import gc
import json
import os
import runpy
import signal
import socket
import sys
import tempfile

LAUNCH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launch.py")
PR_SET_PDEATHSIG = 1


def import_packages():
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", OPENBLAS_NUM_THREADS="1")
    import fastapi
    import gradio
    import numpy
    import PIL.Image
    import uvicorn

    del fastapi, gradio, numpy, PIL, uvicorn
    # A fork has only the thread that called it: what another one was about to do would never be done.
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"the packages have started {len(threads) - 1} threads"
    gc.collect()
    gc.freeze()  # the forks share these objects, and need not look through them


def serve():
    """Returns in each fork, with what it was asked to be."""
    connection = socket.socket(fileno=os.dup(0))  # the place is kept, so that a fork's own files do not get it
    requests = connection.makefile("rb")
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            answer = poll(request["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                requests.close()
                connection.close()
                return request
        connection.sendall(json.dumps(answer).encode() + b"\n")
    os._exit(0)


def poll(process):
    ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        return None
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def become(request):
    """Makes the fork look as if launch.py had been started by itself."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["environ"])
    tempfile.tempdir = None  # the packages have asked for it
    sys.argv = [LAUNCH, *request["start"]]


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the tests, which end their webuis, and then this
        signal.signal(number, signal.SIG_IGN)
    import_packages()
    become(serve())
    runpy.run_path(LAUNCH, run_name="__main__")
