"""The flags. Names and meaning are those of the real program."""

import argparse
import os
import tempfile

parser = argparse.ArgumentParser(description="Stand-in for stable-diffusion-webui")
add = parser.add_argument

add("--port", type=int, default=None, help="port; else the first free one from 7860, or 7861 with --nowebui")
add("--api", action="store_true", help="offer the API beside the UI")
add("--nowebui", action="store_true", help="offer the API instead of the UI")
add("--api-auth", type=str, default=None, help='credentials of the API: "u1:p1,u2:p2"')
add("--api-log", action="store_true", help="log every API request")
add("--api-server-stop", action="store_true", help="allow stop, restart and kill by API")
add("--gradio-auth", type=str, default=None, help='credentials of the UI: "u1:p1,u2:p2"')
add("--cors-allow-origins", "--cors-origins", type=str, default=None, help="allowed origins, separated by commas")
add("--cors-allow-origins-regex", "--cors-regex", type=str, default=None, help="allowed origins as an expression")
add("--subpath", type=str, default=None, help="path under which a reverse proxy offers this program")
add("--tls-keyfile", type=str, default=None, help="key for TLS, of the API without the UI")
add("--tls-certfile", type=str, default=None, help="certificate for TLS, likewise")
add("--lowvram", action="store_true", help="spare the memory of the graphics card")
add("--timeout-keep-alive", type=int, default=30, help="seconds an idle connection is kept")
add("--skip-install", action="store_true", help="do not run the extensions' install.py")
add("--data-dir", type=str, default=None, help="folder for settings and saved images; else a new temporary one")
add("--ui-config-file", type=str, default=None, help="file of the UI's start values")
add("--ui-settings-file", type=str, default=None, help="file of the settings")

standin = parser.add_argument_group("stand-in only")
add = standin.add_argument
add("--shape", choices=("a1111", "forge", "sdnext"), default="a1111", help="which of the family to behave like")
add("--extension", action="append", default=[], metavar="DIR", help="folder of an extension; repeatable")
add("--httptools", action="store_true", help="serve by httptools and uvloop, which the program does not bring along")
add("--step-time", type=float, default=0.05, metavar="SECONDS", help="duration of a sampling step")

sdnext = parser.add_argument_group("SD.Next's own, with --shape sdnext")
add = sdnext.add_argument
add("--auth", type=str, default=None, help="credentials of API and UI; --api-auth and --gradio-auth do the same")
add("--no-rate-limit", action="store_true", help="answer any number of requests a minute")

cmd_opts = parser.parse_args()

cmd_opts.extension = [os.path.abspath(folder) for folder in cmd_opts.extension]
cmd_opts.data_dir = os.path.abspath(cmd_opts.data_dir or tempfile.mkdtemp(prefix="webui-"))
cmd_opts.ui_config_file = cmd_opts.ui_config_file or os.path.join(cmd_opts.data_dir, "ui-config.json")
cmd_opts.ui_settings_file = cmd_opts.ui_settings_file or os.path.join(cmd_opts.data_dir, "config.json")
os.makedirs(cmd_opts.data_dir, exist_ok=True)

if cmd_opts.shape == "sdnext":
    cmd_opts.cors_origins = vars(cmd_opts).pop("cors_allow_origins")
    cmd_opts.cors_regex = vars(cmd_opts).pop("cors_allow_origins_regex")
    cmd_opts.auth = cmd_opts.auth or cmd_opts.api_auth or cmd_opts.gradio_auth
    cmd_opts.port = cmd_opts.port or 7860
    cmd_opts.subpath = "/" + cmd_opts.subpath.strip("/") if cmd_opts.subpath else None
