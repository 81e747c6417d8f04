"""A stand-in for stable-diffusion-webui, for tests and demonstrations.

It behaves towards an extension and towards HTTP clients as the real program
does: the same loading, callbacks, modes, routes, middlewares, lock, answers
and failures, on the real gradio, fastapi and uvicorn. Only the model is
missing: the pictures are drawn by a few lines of numpy. It was written from
the observed behaviour of the real program and shares no code with it.

    python tests/webui/launch.py --api --port 7860 --extension path/to/extension

`modules/cmd_args.py` lists the flags, `modules/standin.py` what a request can
ask for to fail, wait or come out odd.
"""

import gzip
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, ROOT)

from modules import errors, extensions  # noqa: E402
from modules.cmd_args import cmd_opts  # noqa: E402

# Nothing here may reach for the network.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("NO_PROXY", "127.0.0.1,localhost")


def overlook_gzip(unraisable):
    """starlette before 0.28 leaves gzip files behind in a way of which Python 3.13 complains, in any webui."""
    if not (isinstance(unraisable.object, gzip.GzipFile) and isinstance(unraisable.exc_value, ValueError)):
        sys.__unraisablehook__(unraisable)


def run_installer(folder):
    """Runs an extension's install.py in a process of its own."""
    installer = os.path.join(folder, "install.py")
    if not os.path.isfile(installer):
        return
    path = [ROOT, os.environ.get("PYTHONPATH", "")]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(path))
    cwd = folder if cmd_opts.shape == "sdnext" else None
    done = subprocess.run(
        [sys.executable, installer], env=env, cwd=cwd, capture_output=True, text=True, errors="ignore"
    )
    if done.returncode:
        errors.report(
            f"Error running install.py for extension {folder}.\n"
            f"Error code: {done.returncode}\nstdout: {done.stdout}\nstderr: {done.stderr}"
        )
    elif done.stdout.strip():
        print(done.stdout.strip())


def main():
    sys.stdout.reconfigure(line_buffering=True)
    sys.unraisablehook = overlook_gzip
    if not cmd_opts.httptools:
        sys.modules.update(httptools=None, uvloop=None)  # uvicorn takes them where they are installed
    os.chdir(ROOT)
    print(f"Python {sys.version}")
    print(f"Version: stand-in, {cmd_opts.shape}")
    if not cmd_opts.skip_install:
        for folder in extensions.folders():
            run_installer(folder)
    print("Launching Web UI with arguments:", *sys.argv[1:])
    import webui

    webui.start()


if __name__ == "__main__":
    main()
