#!/usr/bin/env python3
# This file must parse on any Python, so that an old one gets a plain answer.
import sys

if sys.version_info < (3, 8):
    sys.exit("This needs Python 3.8 or newer; you started it with Python " + sys.version.split()[0] + ".")

import argparse
import os

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "support"))

import environment

HELP = """\
Everything there is to do with Job Tracker's tests, on any Python from 3.8.

  python3 tests/run.py demo               watch Job Tracker work, then try it yourself
  python3 tests/run.py demo --fleet       watch three webuis share their jobs, and one of them die
  python3 tests/run.py test               run the tests, each promise once
  python3 tests/run.py test --all         in every mode, with every client and gateway, and two minutes of soak
  python3 tests/run.py test --rest        what --all has besides, for who has run the tests already
  python3 tests/run.py test -k purge -x   run some of them: more words go to pytest
  python3 tests/run.py bench              measure what it costs, with a table and a picture
  python3 tests/run.py matrix             the tests on all hosts' packages and all Pythons there are

The packages go into .venv/, by themselves, in about a minute the first
time. Nothing is installed outside this folder, and no GPU or model is needed.
"""


def demo(options, _):
    if options.fleet:
        python = environment.ensure(options.host, "test")
        script = str(environment.PROJECT / "tests" / "support" / "demonstration_fleet.py")
        flags = [name for name in ("--nowebui", "--once") if vars(options)[name[2:]]]
        command = [python, script, "--port", str(options.port), *flags]
        return environment.call(command, cwd=environment.PROJECT, env={"WEBUI_HOST": options.host})

    import demonstration

    python = environment.ensure(options.host)
    return demonstration.run(python, options.host, options.port, options.nowebui, options.once)


def test(options, pytest_arguments):
    python = environment.ensure(options.host, "test")
    # Paths are as seen from here, while pytest starts in the project's folder, and its options know them from there.
    there = environment.PROJECT
    words = [os.path.relpath(w, there) if os.path.exists(w.split("::")[0]) else w for w in pytest_arguments]
    env = {"WEBUI_HOST": options.host, "WEBUI_SERVER": options.server}
    env["PYTHONDONTWRITEBYTECODE"] = ""  # where it is set, each process would compile all the tests again
    # Many of them wait: three at once keep two cores busy. Each begins with a third of them, in their order, and who is
    # done takes over from the others, so that none is left alone with a long file.
    at_once = ["-n", "3", "--dist", "worksteal"] if not words or words in (["--all"], ["--rest"]) else []
    return environment.call([python, "-m", "pytest", *at_once, *words], cwd=environment.PROJECT, env=env)


def bench(options, parts):
    python = environment.ensure(options.host, "test")
    script = str(environment.PROJECT / "tests" / "bench" / "bench.py")
    return environment.call(
        [python, script, str(options.jobs), *parts], cwd=environment.PROJECT, env={"WEBUI_HOST": options.host}
    )


def matrix(options, pytest_arguments):
    import matrix

    return matrix.run(options.at_once, pytest_arguments)


def main():
    parser = argparse.ArgumentParser(
        prog="run.py", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.required = True

    def add_command(function, text):
        command = commands.add_parser(function.__name__, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        return command

    def add_command_on_host(function, text):
        command = add_command(function, text)
        command.add_argument(
            "--host", choices=environment.HOSTS, default="a1111", help="whose package versions to use (default: a1111)"
        )
        return command

    command = add_command_on_host(demo, "start a webui with Job Tracker and show what it does")
    command.add_argument("--port", type=int, default=7860, help="port of the webui (default: 7860, or a free one)")
    command.add_argument("--nowebui", action="store_true", help="offer the API only")
    command.add_argument("--once", action="store_true", help="end after the show; the exit status says how it went")

    text = "start three that share a PostgreSQL and an S3 store, kill one, and show how their jobs end"
    command.add_argument("--fleet", action="store_true", help=text)

    command = add_command_on_host(test, "run the tests; every argument not listed here goes to pytest")
    text = "what the webui's server speaks HTTP by (default: h11, as the webuis have it)"
    command.add_argument("--server", choices=("h11", "httptools"), default="h11", help=text)

    text = "measure what it costs; parts: store, requests, parked, events, http, fleet, growth (default: all)"
    command = add_command_on_host(bench, text)
    command.add_argument("--jobs", type=int, default=100_000, help="how many jobs there are (default: 100000)")

    text = "run the tests with each host's packages on each Python of this machine, and print a table"
    command = add_command(matrix, text)
    command.add_argument("--at-once", type=int, default=1, metavar="N", help="how many run side by side (default: 1)")

    options, rest = parser.parse_known_args()
    if rest and options.function not in (test, bench, matrix):
        parser.error("unknown: " + " ".join(rest))
    try:
        return options.function(options, rest)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
