"""The proxies of the README, started before a webui."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path
from string import Template
from typing import Iterator, NamedTuple, Tuple

import pytest
from disks import ROOT

from harness import Webui, free_port, until


class ReverseProxy(NamedTuple):
    """A program that stands before a webui. `$port`, `$webui` (its port), `$folder` and `$setting` are filled in."""

    program: str
    package: str  # of Debian and Ubuntu
    version: Tuple[str, ...]  # what it is to be asked for its version
    start: Tuple[str, ...]  # stays in the foreground
    config: str


NGINX = ReverseProxy(
    "nginx",
    "nginx-light",
    ("-v",),
    ("-c", "$folder/config"),
    f"daemon off; pid $folder/pid; error_log stderr; worker_processes 1; {'user root;' if ROOT else ''}\n"
    "events {}\n"
    "http {\n"
    "  access_log off; client_body_temp_path $folder; proxy_temp_path $folder; fastcgi_temp_path $folder;\n"
    "  uwsgi_temp_path $folder; scgi_temp_path $folder;\n"
    "  server { listen 127.0.0.1:$port; location / { proxy_pass http://127.0.0.1:$webui; $setting } }\n"
    "}\n",
)

HAPROXY = ReverseProxy(
    "haproxy",
    "haproxy",
    ("-v",),
    ("-db", "-f", "$folder/config"),
    "defaults\n"
    "  mode http\n"
    "  timeout connect 5s\n"
    "  timeout client 60s\n"
    "  timeout server 60s\n"
    "listen webui\n"
    "  bind 127.0.0.1:$port\n"
    "  $setting\n"
    "  server webui 127.0.0.1:$webui\n",
)

APACHE = ReverseProxy(
    "apache2",
    "apache2-bin",
    ("-v",),
    ("-DFOREGROUND", "-f", "$folder/config"),
    "ServerRoot $folder\n"
    "ServerName localhost\n"
    "DefaultRuntimeDir $folder\n"
    "PidFile $folder/pid\n"
    "ErrorLog $folder/error.log\n"
    "Listen 127.0.0.1:$port\n"
    + "".join(
        f"LoadModule {it}_module /usr/lib/apache2/modules/mod_{it}.so\n"
        for it in ("mpm_event", "authz_core", "proxy", "proxy_http")
    )
    + ("User www-data\nGroup www-data\n" if ROOT else "")
    + "ProxyPass / http://127.0.0.1:$webui/\n$setting\n",
)

VARNISH = ReverseProxy(
    "varnishd",
    "varnish",
    ("-V",),
    ("-F", "-j", "none", "-a", "127.0.0.1:$port", "-f", "$folder/config", "-n", "$folder/varnish"),
    'vcl 4.1;\nbackend webui { .host = "127.0.0.1"; .port = "$webui"; }\n$setting\n',
)

LIGHTTPD = ReverseProxy(
    "lighttpd",
    "lighttpd",
    ("-v",),
    ("-D", "-f", "$folder/config"),
    'server.document-root = "$folder"\n'
    'server.bind = "127.0.0.1"\n'
    "server.port = $port\n"
    'server.modules = ("mod_proxy")\n'
    'proxy.server = ("" => (("host" => "127.0.0.1", "port" => $webui)))\n'
    "$setting\n",
)

CADDY = ReverseProxy(
    "caddy",
    "caddy",
    ("version",),
    ("run", "--config", "$folder/config", "--adapter", "caddyfile"),
    "{\n"
    "  admin off\n"
    "  auto_https off\n"
    "}\n"
    "http://127.0.0.1:$port {\n"
    "  reverse_proxy 127.0.0.1:$webui {\n"
    "    $setting\n"
    "  }\n"
    "}\n",
)

HTTP_PROXY = ReverseProxy(
    "node",
    "nodejs",
    ("-p", "require('$folder/node_modules/http-proxy/package.json').version"),
    ("$folder/config.mjs",),
    'import httpProxy from "http-proxy";\n'
    'httpProxy.createProxyServer({ target: "http://127.0.0.1:$webui", $setting }).listen($port, "127.0.0.1");\n',
)

PROXIES = {
    "nginx": NGINX,
    "HAProxy": HAPROXY,
    "Apache": APACHE,
    "Varnish": VARNISH,
    "lighttpd": LIGHTTPD,
    "Caddy": CADDY,
    "http-proxy for Node": HTTP_PROXY,
}
NPM_PACKAGES = {"private": True, "dependencies": {"http-proxy": "1.18.1"}}


def find(proxy: ReverseProxy) -> str:
    program = shutil.which(proxy.program, path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip(f"{proxy.program} is not on this machine (on Debian and Ubuntu: apt install {proxy.package})")
    return program


@contextlib.contextmanager
def running(proxy: ReverseProxy, webui: Webui, folder: Path, setting: str = "") -> Iterator[int]:
    """A proxy before a webui. Gives its port."""
    port = free_port()
    values = {"port": port, "webui": webui.port, "folder": folder, "setting": setting}
    for name in ("config", "config.mjs"):  # Node goes by the ending
        (folder / name).write_text(Template(proxy.config).substitute(values))
    command = [find(proxy), *(Template(word).substitute(values) for word in proxy.start)]
    log = folder / "proxy.log"
    environ = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file)

    def listens() -> bool:
        assert process.poll() is None, log.read_text(errors="replace")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        until(listens, what=f"{proxy.program} listens")
        yield port
    finally:
        process.terminate()
        process.wait(10)
